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

from jaxattn.metadata.consumers import xla_tiling
from jaxattn.metadata.spec import AttentionSpec, softmax_dtype
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.metadata.visible import VisibleKeys
from jaxattn_kernels.arrays import KVScales, Tiles

# Keys per block. Constants, not functions of the bucket: a sum in other blocks has other bits.
SHORT_BLOCK_K = 512
LONG_BLOCK_K = 256

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
    slots_of = _slot_lookup(metadata, page_size=k.shape[1] if k.ndim == 4 else None)
    k, v = k.reshape(-1, *k.shape[-2:]), v.reshape(-1, *v.shape[-2:])

    # Tiles may reach past the last token: their rows lie in padding that is cut off again.
    T = q.shape[0]
    margin = max(tiles.block_q for tiles in schedule.lists)
    q = jnp.pad(q, ((0, margin), (0, 0), (0, 0)))
    out, lse = jnp.zeros_like(q), jnp.full_like(q[..., 0], -jnp.inf, softmax_dtype(q.dtype))
    for tiles, block_k in zip(schedule.lists, (SHORT_BLOCK_K, LONG_BLOCK_K), strict=False):
        out, lse = _attend_tiles(
            out, lse, q, k, v, tiles, visible, spec, sinks, kv_scales, block_k=block_k, slots_of=slots_of
        )
    return out[:T], lse[:T]


def _slot_lookup(
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
    out: Float[Array, "Tpad N H"],
    lse: Float[Array, "Tpad N"],
    q: Float[Array, "Tpad N H"],
    k: Shaped[Array, "slots K H"],
    v: Shaped[Array, "slots K H"],
    tiles: Tiles,
    visible: VisibleKeys,
    spec: AttentionSpec,
    sinks: Float[Array, " N"] | None,
    kv_scales: KVScales | None,
    *,
    block_k: int,
    slots_of: Callable,
) -> tuple[Float[Array, "Tpad N H"], Float[Array, "Tpad N"]]:
    """Write the results of one list of tiles into `out` and `lse`."""
    block_q, (_, N, H), K, G = tiles.block_q, q.shape, spec.num_kv_heads, spec.group_size
    dtype = softmax_dtype(q.dtype)
    margin = q.shape[0] - visible.kv_start.shape[0]
    row_start, row_end = jnp.pad(visible.kv_start, (0, margin)), jnp.pad(visible.kv_end, (0, margin))

    def rows(array: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(array, start, block_q)

    def attend_tile(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        seq, q_start, kv_begin, kv_end = tiles.seq[i], tiles.q_start[i], tiles.kv_start[i], tiles.kv_end[i]
        in_tile = jnp.arange(block_q, dtype=jnp.int32) < tiles.q_len[i]
        # Rows of one key head: block_q tokens times the G heads that share it.
        q_tile = rows(q, q_start).reshape(block_q, K, G, H).transpose(1, 0, 2, 3).reshape(K, block_q * G, H)
        first = jnp.repeat(jnp.where(in_tile, rows(row_start, q_start), 0), G)
        end = jnp.repeat(jnp.where(in_tile, rows(row_end, q_start), 0), G)

        def attend_block(j: Array, state: _Softmax) -> _Softmax:
            positions = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
            in_range = (positions >= kv_begin) & (positions < kv_end)
            slots = slots_of(seq, positions)
            k_block = k.at[slots].get(mode="clip").astype(q.dtype)
            # Outside the range lies another sequence's key, or NaN: 0 * NaN is NaN.
            v_block = jnp.where(in_range[:, None, None], v.at[slots].get(mode="clip").astype(q.dtype), 0)
            scores = product("krh,skh->krs", q_tile, k_block, dtype)
            scores = scores * spec.softmax_scale
            if kv_scales is not None:
                scores = scores * kv_scales.k.astype(dtype)[:, None, None]
            if spec.logits_soft_cap is not None:
                scores = spec.logits_soft_cap * jnp.tanh(scores / spec.logits_soft_cap)
            sees = (first[:, None] <= positions[None, :]) & (positions[None, :] < end[:, None])
            return _update(state, jnp.where(sees[None], scores, NEG), sees, v_block)

        state = _Softmax(
            acc=jnp.zeros_like(q_tile, dtype),
            max=jnp.full_like(q_tile[..., 0], NEG, dtype),
            total=jnp.zeros_like(q_tile[..., 0], dtype),
        )
        if sinks is not None:  # a key that comes first, and whose value is 0
            sink = jnp.tile(sinks.astype(dtype).reshape(K, G), (1, block_q))
            state = state._replace(
                max=jnp.where(first < end, sink, NEG), total=jnp.where(first < end, jnp.ones_like(sink), 0)
            )
        state = lax.fori_loop(kv_begin // block_k, (kv_end + block_k - 1) // block_k, attend_block, state)
        seen = state.total > 0
        total = jnp.where(seen, state.total, 1)
        acc = state.acc if kv_scales is None else state.acc * kv_scales.v.astype(dtype)[:, None, None]
        o_tile = (acc / total[..., None]).reshape(K, block_q, G, H).transpose(1, 0, 2, 3)
        lse_tile = jnp.where(seen, state.max + jnp.log(total), -jnp.inf)
        lse_tile = lse_tile.reshape(K, block_q, G).transpose(1, 0, 2).reshape(block_q, N)

        def write(result: Array, tile: Array) -> Array:
            kept = jnp.where(in_tile.reshape(-1, *[1] * (tile.ndim - 1)), tile, rows(result, q_start))
            return lax.dynamic_update_slice_in_dim(result, kept, q_start, 0)

        out, lse = results
        return write(out, o_tile.reshape(block_q, N, H).astype(out.dtype)), write(lse, lse_tile)

    return lax.fori_loop(0, tiles.num_attending, attend_tile, (out, lse))


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


def product(equation: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """`jnp.einsum`, accumulated in `dtype`."""
    # Full float32 products: on a GPU the default for float32 rounds to 10 bits of mantissa.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=dtype)
