"""The gradient of attention in pure XLA over the tile schedule: the tiles and blocks of `xla`, once more.

One pass computes all three gradients. A tile walks over its blocks of keys again, makes their weights from
the log-sum-exp, and adds to the gradients of those keys: no [T, S] array.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxattn.attention.vjp import Gradients, first_listed, listed_keys
from jaxattn.attention.xla import LONG_BLOCK_K, SHORT_BLOCK_K, product
from jaxattn.metadata.consumers import xla_tiling
from jaxattn.metadata.spec import AttentionSpec, softmax_dtype
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.metadata.visible import VisibleKeys
from jaxattn_kernels.arrays import Attended, Tiles


def attend_backward(
    q: Float[Array, "T N H"],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    results: Attended,
    d_results: Attended,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
) -> Gradients:
    """Gradients of queries, keys and values (see `gradients.Backward`).

    Products take the inputs' dtype; all sums are in float32, or in float64 for float64 inputs.

    Args:
        q: Queries, packed.
        k: Keys, packed `[T, K, H]` or in pages `[pages, page_size, K, H]`.
        v: Values, like the keys.
        results: Outputs and log-sum-exp.
        d_results: Their gradients.
        metadata: The batch's metadata, with the schedule of `xla`.
        spec: The layer.
    """
    visible = metadata.visible_keys(spec.window_class)
    schedule = visible.schedule(xla_tiling(spec))
    k, v = listed_keys(k, metadata), listed_keys(v, metadata)
    dtype, T, L = softmax_dtype(q.dtype), q.shape[0], k.shape[0]
    # Tiles and blocks may reach past the last row: into padding that is cut off again.
    more_q, more_k = max(tiles.block_q for tiles in schedule.lists), max(SHORT_BLOCK_K, LONG_BLOCK_K)
    q, k, v = _padded(q, more_q), _padded(k, more_k), _padded(v, more_k)
    results, d_results = (Attended(*(_padded(x, more_q) for x in pair)) for pair in (results, d_results))
    gradients = Gradients(
        jnp.zeros_like(q), jnp.zeros_like(k, dtype), jnp.zeros_like(v, dtype), jnp.zeros_like(results.lse)
    )
    for tiles, block_k in zip(schedule.lists, (SHORT_BLOCK_K, LONG_BLOCK_K), strict=False):
        gradients = _add_tiles(
            gradients,
            q,
            k,
            v,
            results,
            d_results,
            tiles,
            visible,
            spec,
            first_listed(metadata),
            block_k=block_k,
        )
    # Sums over sequences that share a page are still to come; packed keys have none.
    key_dtype = k.dtype if metadata.page_size is None else dtype
    dk, dv = (total[:L].astype(key_dtype) for total in (gradients.k, gradients.v))
    return Gradients(gradients.q[:T], dk, dv, gradients.delta[:T])


def _add_tiles(
    gradients: Gradients,
    q: Float[Array, "Tpad N H"],
    k: Float[Array, "Lpad K H"],
    v: Float[Array, "Lpad K H"],
    results: Attended,
    d_results: Attended,
    tiles: Tiles,
    visible: VisibleKeys,
    spec: AttentionSpec,
    first_key: Int32[Array, " R_plus_1"],
    *,
    block_k: int,
) -> Gradients:
    """Write the gradients of the queries of one list of tiles, and add to those of keys and values."""
    block_q, K, G = tiles.block_q, spec.num_kv_heads, spec.group_size
    dtype, cap = softmax_dtype(q.dtype), spec.logits_soft_cap
    margin = q.shape[0] - visible.kv_start.shape[0]
    row_start, row_end = _padded(visible.kv_start, margin), _padded(visible.kv_end, margin)

    def add_tile(i: Array, gradients: Gradients) -> Gradients:
        seq, q_start, kv_begin, kv_end = tiles.seq[i], tiles.q_start[i], tiles.kv_start[i], tiles.kv_end[i]
        in_tile = jnp.arange(block_q, dtype=jnp.int32) < tiles.q_len[i]

        def tile_of(array: Array) -> Array:
            """`[K, block_q * G, ...]` The tile's rows of one key head, 0 where it has none."""
            tile = lax.dynamic_slice_in_dim(array, q_start, block_q)
            tile = jnp.where(in_tile.reshape(-1, *[1] * (tile.ndim - 1)), tile, 0)
            return jnp.moveaxis(tile.reshape(block_q, K, G, *tile.shape[2:]), 1, 0).reshape(
                K, block_q * G, *tile.shape[2:]
            )

        def range_of(array: Array) -> Array:
            return jnp.repeat(jnp.where(in_tile, lax.dynamic_slice_in_dim(array, q_start, block_q), 0), G)

        q_tile, out, lse, do_tile, d_lse = (tile_of(x) for x in (q, *results, *d_results))
        # Here, and not of all tokens at once: so its bits do not depend on how many there are.
        delta = (do_tile.astype(dtype) * out.astype(dtype)).sum(axis=-1) - d_lse
        first, end = range_of(row_start), range_of(row_end)

        def add_block(j: Array, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq_tile, dk, dv = gradients
            positions = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
            in_range = (positions >= kv_begin) & (positions < kv_end)
            place = first_key[seq] + j * block_k

            def block_of(array: Array) -> Array:
                return lax.dynamic_slice_in_dim(array, place, block_k)

            # Outside the range lies another sequence's key, or NaN: 0 * NaN is NaN.
            k_block, v_block = (jnp.where(in_range[:, None, None], block_of(x), 0) for x in (k, v))
            logits = product("krh,skh->krs", q_tile, k_block, dtype) * spec.softmax_scale
            slope = 1.0
            if cap is not None:
                logits = cap * jnp.tanh(logits / cap)
                slope = 1 - (logits / cap) ** 2
            sees = (first[:, None] <= positions[None, :]) & (positions[None, :] < end[:, None])
            weights = jnp.where(sees[None], jnp.exp(logits - lse[..., None]), 0)
            d_weights = product("krh,skh->krs", do_tile, v_block, dtype)
            d_products = weights * (d_weights - delta[..., None]) * (spec.softmax_scale * slope)
            weights, d_products = weights.astype(q.dtype), d_products.astype(q.dtype)

            def add(total: Array, equation: str, of_rows: Array, tile: Array) -> Array:
                more = block_of(total) + product(equation, of_rows, tile, dtype)
                return lax.dynamic_update_slice_in_dim(total, more, place, 0)

            return (
                dq_tile + product("krs,skh->krh", d_products, k_block, dtype),
                add(dk, "krs,krh->skh", d_products, q_tile),
                add(dv, "krs,krh->skh", weights, do_tile),
            )

        dq_tile, dk, dv = lax.fori_loop(
            kv_begin // block_k,
            (kv_end + block_k - 1) // block_k,
            add_block,
            (jnp.zeros_like(q_tile, dtype), gradients.k, gradients.v),
        )

        def write(result: Array, tile: Array) -> Array:
            tile = jnp.moveaxis(tile.reshape(K, block_q, G, *tile.shape[2:]), 1, 0)
            tile = tile.reshape(block_q, *result.shape[1:]).astype(result.dtype)
            kept = lax.dynamic_slice_in_dim(result, q_start, block_q)
            tile = jnp.where(in_tile.reshape(-1, *[1] * (tile.ndim - 1)), tile, kept)
            return lax.dynamic_update_slice_in_dim(result, tile, q_start, 0)

        return Gradients(write(gradients.q, dq_tile), dk, dv, write(gradients.delta, delta))

    return lax.fori_loop(0, tiles.num_attending, add_tile, gradients)


def _padded(array: Array, rows: int) -> Array:
    return jnp.pad(array, ((0, rows), *[(0, 0)] * (array.ndim - 1)))
