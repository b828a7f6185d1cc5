"""The records that every kernel takes and returns, each declared once: plain arrays under their names.

Work lists (`Tiles`, `SplitPlan`, `KeyTiles`) are made by `jaxattn.metadata.schedule`, and are fields of the
metadata as they stand here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple, no_type_check

import jax
from jaxtyping import Array, Int32

TRITON_MAX_HEAD_DIM = 256
"""The largest head that the Triton kernels serve; here, where it can be read without their compiler."""


def described(meaning: str, also_called: str = "") -> Any:
    """A field of a record: a dataclass field with its meaning and its other names."""
    return dataclasses.field(metadata={"meaning": meaning, "also_called": also_called})


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """A list of W tiles. Live tiles stand first; the rest have `q_len` 0.

    Tokens past `num_tokens` form one more sequence, of row R and without keys: its tiles come
    last among the live ones, and a backend that runs them writes zeros there.
    """

    seq: Int32[Array, " W"] = described("row of the tile's sequence; R for padding tokens", "request_indices")
    q_start: Int32[Array, " W"] = described(
        "first query token of the tile, on the packed token axis", "qo_tile_indices, in tiles"
    )
    q_len: Int32[Array, " W"] = described("query tokens in the tile, at most `block_q`; 0 for a dead tile")
    kv_start: Int32[Array, " W"] = described(
        "first key that any token of the tile sees, as a position in the sequence", "lower_bounds"
    )
    kv_end: Int32[Array, " W"] = described(
        "one past the last such key; equal to `kv_start` where none is seen", "upper_bounds"
    )
    num_attending: Int32[Array, ""] = described("tiles of real sequences; they come first")
    num_live: Int32[Array, ""] = described("tiles with query tokens, those of the padding included")
    order: Int32[Array, " W"] | None = described(
        "tiles by descending number of keys, dead ones last, where the tiling asks for it", "varlen_batch_idx"
    )
    split: SplitPlan | None
    block_q: int = field(metadata={"static": True})


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """U units of work, each a tile and some of its keys, and how their results are merged.

    The keys of a tile are cut at multiples of `split_keys`, counted from the sequence's first key,
    so the cut depends on nothing but the tile. The units of a tile stand together; a tile without
    keys has one, so that its zeros are written. With the partial results of units
    `indptr[w] .. indptr[w + 1]`, each with its log-sum-exp, tile w is merged.
    """

    tile: Int32[Array, " U"] = described("tile of the unit; W for a dead unit", "batch_indices")
    kv_start: Int32[Array, " U"] = described("first key of the unit", "kv_tile_indices, in chunks")
    kv_end: Int32[Array, " U"] = described("one past its last key")
    indptr: Int32[Array, " W_plus_1"] = described(
        "prefix sums of the units of each tile", "o_indptr, merge_indptr"
    )
    split_keys: int = field(metadata={"static": True})


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTiles:
    """The transposed list, for gradients of keys: W tiles of the key axis, and which queries see them.

    Every key of every sequence stands in exactly one tile; tiles begin at multiples of `block_k` from
    their sequence's first key. Live tiles stand first; the rest have no keys. The queries that see some
    key of a tile are neighbours, since ranges never decrease within a sequence.
    """

    seq: Int32[Array, " W"] = described("row of the tile's sequence; 0 for a dead tile")
    kv_start: Int32[Array, " W"] = described("first key of the tile, as a position in the sequence")
    kv_end: Int32[Array, " W"] = described("one past its last key; equal to `kv_start` for a dead tile")
    q_start: Int32[Array, " W"] = described(
        "first query token that sees a key of the tile, on the packed token axis", "q_indices of a block mask"
    )
    q_end: Int32[Array, " W"] = described("one past the last such token")
    num_live: Int32[Array, ""] = described("tiles with keys")
    block_k: int = field(metadata={"static": True})


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
