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

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jaxattn.batch.bucket import Bucket
from jaxattn.batch.segments import prefix_sums, segment_of
from jaxattn_kernels.arrays import KeyTiles, SplitPlan, Tiles


class Tiling(NamedTuple):
    """How the query axis is cut, and the key axis of short queries.

    Attributes:
        short_q: Tokens per tile of a short query; a query of at most this many tokens is short.
        long_q: Tokens per tile of a longer query. Where it is no larger than `short_q`, every
            query is cut into tiles of `short_q`.
        split_keys: Keys per unit of a short query's tile, where several programs share a tile's
            keys and their partial results are merged (split-KV); None for one program per tile.
            A constant of the backend: a sum in other pieces has other bits.
        longest_first: Whether tiles of long queries are also ordered by their number of keys.
    """

    short_q: int
    long_q: int
    split_keys: int | None = None
    longest_first: bool = False


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

    def _repr_html_(self) -> str:
        from jaxattn.viz.cards import schedule_card  # when looked at

        return schedule_card(self)


def _card(record: Any) -> str:
    from jaxattn.viz.cards import record_card  # when looked at

    return record_card(record)


# The kernels, where these are declared, know of no notebook.
for _record in (Tiles, SplitPlan, KeyTiles):
    setattr(_record, "_repr_html_", _card)  # noqa: B010


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


def split_bound(num_tiles: int, keys: int, split_keys: int, span: int | None, block_q: int) -> int:
    """The most units that short tiles can be split into, one tile per sequence.

    Args:
        num_tiles: Tiles.
        keys: Keys of all sequences together, at most.
        split_keys: Keys per unit.
        span: The most keys that one token sees, or None where ranges begin with the sequence.
        block_q: Tokens per tile.
    """
    bound = num_tiles + keys // split_keys  # n keys lie in ⌈n / split⌉ units; without keys there is one
    if span is None:
        return bound
    # A range that begins anywhere touches one unit more, and holds the spans of all its tokens.
    return min(bound, num_tiles * ((span + block_q - 3) // split_keys + 2))


def schedule_tiles(
    bucket: Bucket,
    tiling: Tiling,
    *,
    cu_q_lens: Int32[Array, " R_plus_1"],
    token_to_seq: Int32[Array, " T"],
    kv_start: Int32[Array, " T"],
    kv_end: Int32[Array, " T"],
    max_keys: int,
    span: int | None,
) -> TileSchedule:
    """Cut the query axis of a batch into tiles.

    Args:
        bucket: Static sizes.
        tiling: How to cut.
        cu_q_lens: Prefix sums of query lengths.
        token_to_seq: Row of each token; R for padding.
        kv_start: First visible key of each token; within a sequence it never decreases.
        kv_end: One past the last visible key of each token; within a sequence it never decreases.
        max_keys: The most keys that all sequences have together (static).
        span: The most keys that one token sees; None where ranges begin with their sequence (static).
    """
    T, R = bucket.tokens, bucket.seqs

    def with_split(tiles: Tiles, split_keys: int | None) -> Tiles:
        if split_keys is None or max_keys <= split_keys:  # all keys there are make one unit
            return tiles
        units = split_bound(tiles.seq.shape[0], max_keys, split_keys, span, tiles.block_q)
        return dataclasses.replace(tiles, split=_split(tiles, split_keys, units))

    if bucket.max_q_len == 1:
        short = _cut_single_tokens(cu_q_lens, token_to_seq, kv_start, kv_end, block_q=tiling.short_q)
        return TileSchedule(short=with_split(short, tiling.split_keys), long=None, tiling=tiling)

    # Row R holds the padding tokens.
    row_ends = jnp.concatenate([cu_q_lens[1:], jnp.full(1, T, jnp.int32)])

    def cut(selected: Bool[Array, " R_plus_1"] | None, block_q: int, num_tiles: int) -> Tiles:
        return _cut(cu_q_lens, row_ends, selected, kv_start, kv_end, block_q=block_q, num_tiles=num_tiles)

    def with_order(tiles: Tiles) -> Tiles:
        return dataclasses.replace(tiles, order=_longest_first(tiles)) if tiling.longest_first else tiles

    if bucket.max_q_len <= tiling.short_q or tiling.long_q <= tiling.short_q:
        short = cut(None, tiling.short_q, tile_bound(T, R + 1, tiling.short_q))
        # Without a promise of short queries a sequence has several tiles, and no bound on its units.
        if bucket.max_q_len > tiling.short_q:
            return TileSchedule(short=with_order(short), long=None, tiling=tiling)
        return TileSchedule(short=with_split(short, tiling.split_keys), long=None, tiling=tiling)
    is_short = row_ends - cu_q_lens <= tiling.short_q
    short = cut(is_short, tiling.short_q, min(T, R + 1))
    long = cut(~is_short, tiling.long_q, tile_bound(T, R + 1, tiling.long_q, min_q=tiling.short_q + 1))
    return TileSchedule(short=with_split(short, tiling.split_keys), long=with_order(long), tiling=tiling)


def schedule_key_tiles(
    block_k: int,
    *,
    stored_lens: Int32[Array, " R"],
    token_to_seq: Int32[Array, " T"],
    kv_start: Int32[Array, " T"],
    kv_end: Int32[Array, " T"],
    max_keys: int,
) -> KeyTiles:
    """Cut the key axis of a batch into tiles, and find the queries that see each.

    Args:
        block_k: Keys per tile.
        stored_lens: Keys of each sequence that have a place.
        token_to_seq: Row of each token; R for padding.
        kv_start: First visible key of each token; within a sequence it never decreases.
        kv_end: One past the last visible key of each token; within a sequence it never decreases.
        max_keys: The most keys that all sequences have together (static).
    """
    num_tiles = tile_bound(max_keys, stored_lens.shape[0], block_k)
    tile_ends = jnp.cumsum((stored_lens + (block_k - 1)) // block_k, dtype=jnp.int32)
    tile_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), tile_ends[:-1]])
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    live = tile < tile_ends[-1]
    seq = jnp.where(live, segment_of(tile_ends, num_tiles), 0)
    start = jnp.where(live, (tile - tile_starts[seq]) * block_k, 0)
    # A token sees tiles from that of its first key to that of its last. Both rise along the token axis, so
    # the tokens that begin too late, and those that end too early, are counted by a histogram.
    first_tile = tile_starts.at[token_to_seq].get(mode="fill", fill_value=num_tiles)
    begins, ends = first_tile + kv_start // block_k, first_tile + (kv_end + (block_k - 1)) // block_k
    return KeyTiles(
        seq=seq,
        kv_start=start,
        kv_end=jnp.where(live, jnp.minimum(start + block_k, stored_lens[seq]), 0),
        q_start=segment_of(ends, num_tiles),
        q_end=segment_of(begins, num_tiles),
        num_live=tile_ends[-1],
        block_k=block_k,
    )


def _longest_first(tiles: Tiles) -> Int32[Array, " W"]:
    """Tiles by descending number of keys, dead ones last: the order in which a device ends soonest."""
    cost = jnp.where(tiles.q_len > 0, tiles.kv_end - tiles.kv_start, -1)
    return jnp.argsort(cost, descending=True, stable=True).astype(jnp.int32)


def _cut(
    row_starts: Int32[Array, " R_plus_1"],
    row_ends: Int32[Array, " R_plus_1"],
    selected: Bool[Array, " R_plus_1"] | None,
    kv_start: Int32[Array, " T"],
    kv_end: Int32[Array, " T"],
    *,
    block_q: int,
    num_tiles: int,
) -> Tiles:
    """Tiles of the selected rows, or of all."""
    tiles_of_row = (row_ends - row_starts + (block_q - 1)) // block_q
    if selected is not None:
        tiles_of_row = jnp.where(selected, tiles_of_row, 0)
    tile_ends = jnp.cumsum(tiles_of_row, dtype=jnp.int32)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    live = tile < tile_ends[-1]
    seq = jnp.where(live, segment_of(tile_ends, num_tiles), 0)
    # A row's first token and its first tile, folded into one distance per row: one gather.
    shift = row_starts - (tile_ends - tiles_of_row) * block_q
    q_start = jnp.where(live, tile * block_q + shift[seq], 0)
    if block_q == 1:
        q_len, last = live.astype(jnp.int32), q_start
    else:
        q_len = jnp.where(live, jnp.minimum(block_q, row_ends[seq] - q_start), 0)
        last = jnp.maximum(q_start + q_len - 1, 0)
    # Ranges never decrease within a sequence: the first token begins the tile's, the last ends it.
    return Tiles(
        seq=seq,
        q_start=q_start,
        q_len=q_len,
        kv_start=jnp.where(live, kv_start[q_start], 0),
        kv_end=jnp.where(live, kv_end[last], 0),
        num_attending=tile_ends[-2],
        num_live=tile_ends[-1],
        order=None,
        split=None,
        block_q=block_q,
    )


def _cut_single_tokens(
    cu_q_lens: Int32[Array, " R_plus_1"],
    token_to_seq: Int32[Array, " T"],
    kv_start: Int32[Array, " T"],
    kv_end: Int32[Array, " T"],
    *,
    block_q: int,
) -> Tiles:
    """Where no sequence has more than one token: a tile per token, then tiles of padding.

    No row has to be searched for.
    """
    T, R, num_tokens = token_to_seq.shape[0], cu_q_lens.shape[0] - 1, cu_q_lens[-1]
    num_tiles = tile_bound(T, R + 1, block_q)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    if block_q == 1:
        seq, q_start, q_len = token_to_seq, tile, jnp.ones(T, jnp.int32)
        num_live = jnp.asarray(T, jnp.int32)
    else:
        num_live = num_tokens + (T - num_tokens + (block_q - 1)) // block_q
        is_real = tile < num_tokens
        q_start = jnp.where(is_real, tile, num_tokens + (tile - num_tokens) * block_q)
        live = q_start < T
        q_len = jnp.where(is_real, 1, jnp.clip(T - q_start, 0, block_q))
        q_start, seq = jnp.where(live, q_start, 0), jnp.where(live, token_to_seq[:num_tiles], 0)
    return Tiles(
        seq=seq,
        q_start=q_start,
        q_len=q_len,
        kv_start=kv_start[:num_tiles],  # of padding it is empty, as its tiles' ranges are
        kv_end=kv_end[:num_tiles],
        num_attending=num_tokens,
        num_live=num_live,
        order=None,
        split=None,
        block_q=block_q,
    )


def _split(tiles: Tiles, split_keys: int, max_units: int) -> SplitPlan:
    tile_start, tile_end, live = tiles.kv_start, tiles.kv_end, tiles.q_len > 0
    first = tile_start // split_keys
    units = jnp.maximum((tile_end + split_keys - 1) // split_keys - first, 1)
    indptr = prefix_sums(jnp.where(live, units, 0))
    unit = jnp.arange(max_units, dtype=jnp.int32)
    is_unit = unit < indptr[-1]
    tile = segment_of(indptr[1:], max_units)
    owner = jnp.where(is_unit, tile, 0)
    begin = (first[owner] + unit - indptr[owner]) * split_keys
    return SplitPlan(
        tile=tile,
        kv_start=jnp.where(is_unit, jnp.maximum(begin, tile_start[owner]), 0),
        kv_end=jnp.where(is_unit, jnp.minimum(begin + split_keys, tile_end[owner]), 0),
        indptr=indptr,
        split_keys=split_keys,
    )
