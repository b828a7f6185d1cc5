"""Tile schedules: which program attends with which query tokens to which keys.

The query axis of a batch is cut into tiles that never cross a sequence. Short queries (decode,
speculation) and long ones (prefill) are cut into tiles of different sizes and stand in separate
lists, so that a decode token does not pay for a prefill tile. Which list a sequence stands in,
and where its tiles begin, depends on its own length alone: never on the bucket, on another
sequence, or on a maximum over the batch.

All sizes are static bounds in closed form, so the schedule is plain jax.numpy: no host
synchronisation and no data-dependent shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jaxattn.buckets import Bucket
from jaxattn.spec import AttentionSpec


class Tiling(NamedTuple):
    """How the query axis is cut.

    Attributes:
        short_q: Tokens per tile of a short query; a query of at most this many tokens is short.
        long_q: Tokens per tile of a longer query. Where it is no larger than `short_q`, every
            query is cut into tiles of `short_q`.
    """

    short_q: int
    long_q: int


def tiling_for(implementation: str, spec: AttentionSpec) -> Tiling | None:
    """The tiling that an implementation wants, or None where it reads no schedule."""
    match implementation:
        case "reference":
            return None
        case "xla":
            # A loop over tiles on few cores: one token, or enough rows to keep a product busy.
            return Tiling(short_q=1, long_q=64)
        case "triton":
            # Tensor-core tiles of 16 or 64 rows, in which the G heads of a group are packed.
            G = spec.group_size
            return Tiling(short_q=max(1, 16 // G), long_q=max(1, 64 // G))
        case _:
            raise ValueError(f"unknown implementation={implementation!r}; no tiling is known for it")


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """A list of W tiles. Live tiles stand first; the rest have `q_len` 0.

    Tokens past `num_tokens` form one more sequence, of row R and without keys: its tiles come
    last among the live ones, and a backend that runs them writes zeros there.

    Attributes:
        seq: Row of the tile's sequence; R for padding tokens.
        q_start: First query token of the tile, on the packed token axis.
        q_len: Query tokens in the tile, at most `block_q`; 0 for a dead tile.
        kv_start: First key that any token of the tile sees, as a position in the sequence.
        kv_end: One past the last such key; equal to `kv_start` where none is seen.
        num_live: Tiles with query tokens.
        num_attending: Tiles with query tokens of real sequences; they come first.
        block_q: Tokens per tile (static).
    """

    seq: Int32[Array, " W"]
    q_start: Int32[Array, " W"]
    q_len: Int32[Array, " W"]
    kv_start: Int32[Array, " W"]
    kv_end: Int32[Array, " W"]
    num_live: Int32[Array, ""]
    num_attending: Int32[Array, ""]
    block_q: int = field(metadata={"static": True})


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class TileSchedule:
    """Every query token of a batch exactly once, in tiles of short and of long queries.

    Attributes:
        short: Tiles of short queries.
        long: Tiles of long queries, or None where the bucket or the tiling has none.
        tiling: How the tiles were cut (static).
    """

    short: Tiles
    long: Tiles | None
    tiling: Tiling = field(metadata={"static": True})

    @property
    def lists(self) -> tuple[Tiles, ...]:
        """The tile lists that exist."""
        return (self.short,) if self.long is None else (self.short, self.long)


def segment_of(ends: Int32[Array, " S"], length: int) -> Int32[Array, " length"]:
    """The segment of each index 0..length-1, given ascending segment ends; S past the last end.

    It is the number of ends at or before the index: a histogram of the ends, summed up. Linear;
    a binary search per index costs log(S) gathers, and unrolled takes seconds to compile.
    """
    ends_at = jnp.zeros(length, jnp.int32).at[ends].add(1, mode="drop")
    return jnp.cumsum(ends_at, dtype=jnp.int32)


def tile_bound(tokens: int, rows: int, block_q: int, min_q: int = 1) -> int:
    """The most tiles of `block_q` that queries of at least `min_q` tokens can be cut into.

    A row's first tile takes at least `min_q` tokens, each further one at least
    `block_q + 1 - min_q` more. Tight for `min_q = 1`.

    Args:
        tokens: Tokens of all rows together, at most.
        rows: Number of rows, at most.
        block_q: Tokens per tile; more than `min_q - 1`.
        min_q: Tokens of a row, at least.
    """
    rows = min(rows, tokens // min_q)
    return rows + (tokens - rows * min_q) // (block_q + 1 - min_q)


def schedule_tiles(
    bucket: Bucket,
    tiling: Tiling,
    *,
    cu_q_lens: Int32[Array, " R_plus_1"],
    kv_start: Int32[Array, " T"],
    kv_end: Int32[Array, " T"],
) -> TileSchedule:
    """Cut the query axis of a batch into tiles.

    Args:
        bucket: Static sizes.
        tiling: How to cut.
        cu_q_lens: Prefix sums of query lengths.
        kv_start: First visible key of each token; within a sequence it never decreases.
        kv_end: One past the last visible key of each token; within a sequence it never decreases.
    """
    T, R = bucket.tokens, bucket.seqs
    # Row R holds the padding tokens.
    row_ends = jnp.concatenate([cu_q_lens[1:], jnp.full(1, T, jnp.int32)])
    row_lens = row_ends - cu_q_lens
    is_short = row_lens <= tiling.short_q

    def cut(selected: Bool[Array, " R_plus_1"], block_q: int, num_tiles: int) -> Tiles:
        return _cut(cu_q_lens, row_lens, selected, kv_start, kv_end, block_q=block_q, num_tiles=num_tiles)

    if bucket.max_q_len <= tiling.short_q or tiling.long_q <= tiling.short_q:
        everything = jnp.ones_like(is_short)
        short = cut(everything, tiling.short_q, tile_bound(T, R + 1, tiling.short_q))
        return TileSchedule(short=short, long=None, tiling=tiling)
    short = cut(is_short, tiling.short_q, min(T, R + 1))
    long = cut(~is_short, tiling.long_q, tile_bound(T, R + 1, tiling.long_q, min_q=tiling.short_q + 1))
    return TileSchedule(short=short, long=long, tiling=tiling)


def _cut(
    row_starts: Int32[Array, " R_plus_1"],
    row_lens: Int32[Array, " R_plus_1"],
    selected: Bool[Array, " R_plus_1"],
    kv_start: Int32[Array, " T"],
    kv_end: Int32[Array, " T"],
    *,
    block_q: int,
    num_tiles: int,
) -> Tiles:
    tiles_of_row = jnp.where(selected, (row_lens + block_q - 1) // block_q, 0)
    tile_ends = jnp.cumsum(tiles_of_row, dtype=jnp.int32)
    seq = segment_of(tile_ends, num_tiles)
    live = jnp.arange(num_tiles, dtype=jnp.int32) < tile_ends[-1]
    seq = jnp.where(live, seq, 0)
    offset = (jnp.arange(num_tiles, dtype=jnp.int32) - (tile_ends - tiles_of_row)[seq]) * block_q
    q_start = jnp.where(live, row_starts[seq] + offset, 0)
    q_len = jnp.where(live, jnp.minimum(block_q, row_lens[seq] - offset), 0)
    # Ranges never decrease within a sequence: the first token begins the tile's, the last ends it.
    last = jnp.maximum(q_start + q_len - 1, 0)
    return Tiles(
        seq=seq,
        q_start=q_start,
        q_len=q_len,
        kv_start=jnp.where(live, kv_start[q_start], 0),
        kv_end=jnp.where(live, kv_end[last], 0),
        num_live=tile_ends[-1],
        num_attending=tile_ends[-2],
        block_q=block_q,
    )
