"""Attention in pure XLA over the tile schedule: the default on CPUs, and right on any device.

Two loops, one over the tiles of short and one over those of long queries. A tile walks over the
blocks of keys that it can see with an online softmax, so the work is that of the live tiles and
the memory that of one block: no [T, S] array, no padding to the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from jaxattn.attention.xla_tiles import (
    BLOCKS_OF_KEYS,
    KeyBlock,
    QueryTile,
    Ranges,
    key_block,
    padded_ranges,
    product,
    query_tile,
)
from jaxattn.metadata.consumers import xla_tiling
from jaxattn.metadata.spec import AttentionSpec, softmax_dtype
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.arrays import KVScales, Tiles

# Finite, so that a row that has seen nothing yet has exp(NEG - NEG) = 1 and not NaN.
NEG = -1e30


class _Softmax(NamedTuple):
    """State of an online softmax: the sum of weighted values, the maximum, the sum of weights."""

    acc: Float[Array, "K R H"]
    max: Float[Array, "K R"]
    total: Float[Array, "K R"]


def attend(
    q: Float[Array, "T N H"],
    k: Shaped[Array, "..."],
    v: Shaped[Array, "..."],
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: KVScales | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attend tile by tile.

    Products take the inputs' dtype and accumulate in float32, or in float64 for float64 inputs.

    Args:
        q: Queries, packed.
        k: Keys, packed `[T, K, H]` or in pages `[pages, page_size, K, H]`.
        v: Values, like the keys.
        metadata: The batch's metadata, with the schedule of this implementation.
        spec: The layer.
        sinks: Logits of the sinks, if the layer has them.
        kv_scales: What quantised keys and values stand for, if they are.

    Returns:
        Outputs in the dtype of `q`, and the natural logarithm of the softmax's denominator; 0 and
        -inf for padding.
    """
    visible = metadata.visible_keys(spec.window_class)
    schedule = visible.schedule(xla_tiling(spec))
    # Tiles may reach past the last token: their rows lie in padding that is cut off again.
    T, margin = q.shape[0], max(tiles.block_q for tiles in schedule.lists)
    inputs = _Inputs(
        q=jnp.pad(q, ((0, margin), (0, 0), (0, 0))),
        k=k.reshape(-1, *k.shape[-2:]),
        v=v.reshape(-1, *v.shape[-2:]),
        ranges=padded_ranges(visible, margin),
        places_of=_place_lookup(metadata, page_size=k.shape[1] if k.ndim == 4 else None),
        sinks=sinks,
        kv_scales=kv_scales,
        spec=spec,
    )
    results = jnp.zeros_like(inputs.q), jnp.full_like(inputs.q[..., 0], -jnp.inf, softmax_dtype(q.dtype))
    for tiles, block_k in zip(schedule.lists, BLOCKS_OF_KEYS, strict=False):
        results = _attend_tiles(results, tiles, inputs, block_k)
    out, lse = results
    return out[:T], lse[:T]


class _Inputs(NamedTuple):
    """What every tile reads.

    Attributes:
        q: Queries, with room for tiles that reach past the last one.
        k: Keys on one axis, packed or the slots of a cache.
        v: Values, like the keys.
        ranges: Which keys each token sees.
        places_of: From a sequence and positions in it to places on the axis of keys.
        sinks: Logits of the sinks, if the layer has them.
        kv_scales: What quantised keys and values stand for, if they are.
        spec: The layer.
    """

    q: Float[Array, "Tpad N H"]
    k: Shaped[Array, "slots K H"]
    v: Shaped[Array, "slots K H"]
    ranges: Ranges
    places_of: Callable[[Array, Int32[Array, " block_k"]], Int32[Array, " block_k"]]
    sinks: Float[Array, " N"] | None
    kv_scales: KVScales | None
    spec: AttentionSpec


def _place_lookup(
    metadata: AttentionMetadata, page_size: int | None
) -> Callable[[Array, Int32[Array, " block_k"]], Int32[Array, " block_k"]]:
    """The function from a sequence and key positions in it to places on the flat key axis."""
    if page_size is None:
        starts = metadata.cu_kv_lens
        return lambda seq, positions: starts[seq] + positions
    indptr, pages = metadata.page_indptr, metadata.page_list
    return lambda seq, positions: (
        pages.at[indptr[seq] + positions // page_size].get(mode="clip") * page_size + positions % page_size
    )


def _attend_tiles(
    results: tuple[Float[Array, "Tpad N H"], Float[Array, "Tpad N"]],
    tiles: Tiles,
    inputs: _Inputs,
    block_k: int,
) -> tuple[Float[Array, "Tpad N H"], Float[Array, "Tpad N"]]:
    """Write outputs and log-sum-exp of one list of tiles into the results."""

    def attend(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        tile = query_tile(tiles, i, inputs.ranges, inputs.spec)
        state = _walk(tile, inputs, block_k)
        out, lse = results
        return tile.write(out, _output(state, inputs)), tile.write(lse, _log_sum_exp(state))

    return lax.fori_loop(0, tiles.num_attending, attend, results)


def _walk(tile: QueryTile, inputs: _Inputs, block_k: int) -> _Softmax:
    """The softmax of a tile over all blocks of keys that it sees."""
    q = tile.rows_of(inputs.q)

    def add_block(j: Array, state: _Softmax) -> _Softmax:
        block = key_block(tile, j, block_k)
        places = inputs.places_of(tile.seq, block.positions)
        k = inputs.k.at[places].get(mode="clip").astype(q.dtype)
        v = block.live(inputs.v.at[places].get(mode="clip").astype(q.dtype))
        return _update(state, _scores(q, k, block, inputs), block.sees, v)

    return lax.fori_loop(*tile.blocks(block_k), add_block, _initial(tile, q, inputs))


def _initial(tile: QueryTile, q: Float[Array, "K R H"], inputs: _Inputs) -> _Softmax:
    """Nothing seen yet but the sink: a key that comes first, and whose value is 0."""
    dtype = softmax_dtype(q.dtype)
    acc = jnp.zeros_like(q, dtype)
    if inputs.sinks is None:
        return _Softmax(acc, jnp.full_like(q[..., 0], NEG, dtype), jnp.zeros_like(q[..., 0], dtype))
    sink = inputs.sinks.astype(dtype).reshape(tile.num_kv_heads, tile.group_size)
    sink = jnp.tile(sink, (1, tile.block_q))
    sees = tile.first < tile.end
    return _Softmax(acc, jnp.where(sees, sink, NEG), jnp.where(sees, jnp.ones_like(sink), 0))


def _scores(
    q: Float[Array, "K R H"], k: Float[Array, "S K H"], block: KeyBlock, inputs: _Inputs
) -> Float[Array, "K R S"]:
    """Scaled and capped products, `NEG` where a row does not see a key."""
    dtype, cap = softmax_dtype(q.dtype), inputs.spec.logits_soft_cap
    scores = product("krh,skh->krs", q, k, dtype) * inputs.spec.softmax_scale
    if inputs.kv_scales is not None:
        scores = scores * inputs.kv_scales.k.astype(dtype)[:, None, None]
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    return jnp.where(block.sees[None], scores, NEG)


def _update(
    state: _Softmax,
    scores: Float[Array, "K R S"],
    sees: Array,
    v_block: Float[Array, "S K H"],
) -> _Softmax:
    """One step of the online softmax: rescale what was summed, add a block of keys."""
    new_max = jnp.maximum(state.max, scores.max(axis=-1))
    rescale = jnp.exp(state.max - new_max)
    weights = jnp.where(sees[None], jnp.exp(scores - new_max[..., None]), 0)
    values = product("krs,skh->krh", weights.astype(v_block.dtype), v_block, scores.dtype)
    return _Softmax(
        acc=state.acc * rescale[..., None] + values,
        max=new_max,
        total=state.total * rescale + weights.sum(axis=-1),
    )


def _output(state: _Softmax, inputs: _Inputs) -> Float[Array, "K R H"]:
    """Weighted means of the values; 0 for a row that sees no key."""
    total = jnp.where(state.total > 0, state.total, 1)
    acc = state.acc
    if inputs.kv_scales is not None:
        acc = acc * inputs.kv_scales.v.astype(acc.dtype)[:, None, None]
    return acc / total[..., None]


def _log_sum_exp(state: _Softmax) -> Float[Array, "K R"]:
    """The logarithm of the softmax's denominator; -inf for a row that sees no key."""
    seen = state.total > 0
    return jnp.where(seen, state.max + jnp.log(jnp.where(seen, state.total, 1)), -jnp.inf)
