"""What every kernel takes and returns: the metadata's part for it, as plain arrays."""

from __future__ import annotations

from typing import NamedTuple

import jax

TRITON_MAX_HEAD_DIM = 256
"""The largest head that the Triton kernels serve; here, where it can be read without their compiler."""


class TileArrays(NamedTuple):
    """A list of W tiles, as int32 arrays of length W (see `jaxattn.metadata.schedule.Tiles`)."""

    seq: jax.Array
    q_start: jax.Array
    q_len: jax.Array
    kv_start: jax.Array
    kv_end: jax.Array


class SplitArrays(NamedTuple):
    """How the keys of W tiles are split into U units (see `jaxattn.metadata.schedule.SplitPlan`).

    Attributes:
        tile: `[U]` Tile of the unit; W for a dead one.
        kv_start: `[U]` Its first key.
        kv_end: `[U]` One past its last key.
        indptr: `[W + 1]` Prefix sums of the units of each tile.
    """

    tile: jax.Array
    kv_start: jax.Array
    kv_end: jax.Array
    indptr: jax.Array


class KeyTileArrays(NamedTuple):
    """A list of W tiles of keys, as int32 arrays of length W (see `jaxattn.metadata.schedule.KeyTiles`).

    Attributes:
        seq: Row of the tile's sequence.
        kv_start: Its first key.
        kv_end: One past its last key.
        q_start: First query token that sees a key of the tile.
        q_end: One past the last such token.
        num_live: `[1]` How many tiles are live, which stand first.
    """

    seq: jax.Array
    kv_start: jax.Array
    kv_end: jax.Array
    q_start: jax.Array
    q_end: jax.Array
    num_live: jax.Array


class TileList(NamedTuple):
    """Tiles of at most `block_q` tokens.

    Attributes:
        tiles: The tiles.
        block_q: Tokens per tile, at most.
        split: How their keys are split, if they are.
        order: `[W]` The tile that comes first, second, ... where they are not split; None for the order
            in which they stand.
        num_live: `[1]` How many tiles are live, which stand first; None if every tile is to be looked at.
    """

    tiles: TileArrays
    block_q: int
    split: SplitArrays | None
    order: jax.Array | None = None
    num_live: jax.Array | None = None


class KeyLookup(NamedTuple):
    """Where the keys of a sequence lie on the flat key axis.

    Attributes:
        start: `[R + 1]` The sequence's first entry in `pages`, or, unpaged, its first key.
        pages: `[P]` Physical pages, or None for keys that are packed.
    """

    start: jax.Array
    pages: jax.Array | None


class KVScales(NamedTuple):
    """What a stored number of a quantised cache stands for, per key head: the number times its scale.

    Attributes:
        k: `[K]` float32 Scale of the keys; of all layers of a model `[L, K]`.
        v: The same for values.
    """

    k: jax.Array
    v: jax.Array


class VisibleRange(NamedTuple):
    """Which keys each token sees, as positions in its sequence.

    Attributes:
        start: `[T]` The first key.
        end: `[T]` One past the last key.
    """

    start: jax.Array
    end: jax.Array


class Attended(NamedTuple):
    """What attention returns, of all keys of a token or of some.

    Attributes:
        out: `[rows, N, H]` Outputs.
        lse: `[rows, N]` float32 Logarithm of the softmax's denominator.
    """

    out: jax.Array
    lse: jax.Array


class GradientInputs(NamedTuple):
    """What the kernels of a gradient read.

    Attributes:
        visible: Which keys each token sees.
        lookup: Where a sequence's keys lie.
        q: `[T, N, H]` Queries, packed.
        k: `[S, K, H]` Keys on one flat axis, packed or pages one after the other, in the dtype of `q`.
        v: `[S, K, H]` Values, like the keys.
        results: Outputs in the dtype of `q`, and the log-sum-exp, a natural logarithm.
        d_results: Their gradients, in the same dtypes.
    """

    visible: VisibleRange
    lookup: KeyLookup
    q: jax.Array
    k: jax.Array
    v: jax.Array
    results: Attended
    d_results: Attended
