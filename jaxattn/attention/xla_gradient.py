"""The gradient of attention in pure XLA over the tile schedule: the tiles and blocks of `xla`, once more.

One pass computes all three gradients. A tile walks over its blocks of keys again, makes their weights from
the log-sum-exp, and adds to the gradients of those keys: no [T, S] array.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxattn.attention.vjp import Gradients, first_listed, listed_keys
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
    more_q, more_k = max(tiles.block_q for tiles in schedule.lists), max(BLOCKS_OF_KEYS)
    inputs = _Inputs(
        q=_padded(q, more_q),
        k=_padded(k, more_k),
        v=_padded(v, more_k),
        results=Attended(*(_padded(x, more_q) for x in results)),
        d_results=Attended(*(_padded(x, more_q) for x in d_results)),
        ranges=padded_ranges(visible, more_q),
        first_key=first_listed(metadata),
        spec=spec,
    )
    gradients = Gradients(
        jnp.zeros_like(inputs.q),
        jnp.zeros_like(inputs.k, dtype),
        jnp.zeros_like(inputs.v, dtype),
        jnp.zeros_like(inputs.results.lse),
    )
    for tiles, block_k in zip(schedule.lists, BLOCKS_OF_KEYS, strict=False):
        gradients = _add_tiles(gradients, tiles, inputs, block_k)
    # Sums over sequences that share a page are still to come; packed keys have none.
    key_dtype = k.dtype if metadata.page_size is None else dtype
    dk, dv = (total[:L].astype(key_dtype) for total in (gradients.k, gradients.v))
    return Gradients(gradients.q[:T], dk, dv, gradients.delta[:T])


class _Inputs(NamedTuple):
    """What every tile reads, with room for tiles and blocks that reach past the end.

    Attributes:
        q: Queries.
        k: Keys on one axis, sequence after sequence.
        v: Values, like the keys.
        results: Outputs and log-sum-exp.
        d_results: Their gradients.
        ranges: Which keys each token sees.
        first_key: Where each sequence's keys begin on their axis.
        spec: The layer.
    """

    q: Float[Array, "Tpad N H"]
    k: Float[Array, "Lpad K H"]
    v: Float[Array, "Lpad K H"]
    results: Attended
    d_results: Attended
    ranges: Ranges
    first_key: Int32[Array, " R_plus_1"]
    spec: AttentionSpec


class _Rows(NamedTuple):
    """A tile's rows, key head by key head; 0 where the tile has no token."""

    q: Float[Array, "K R H"]
    lse: Float[Array, "K R"]
    d_out: Float[Array, "K R H"]
    delta: Float[Array, "K R"]


def _add_tiles(gradients: Gradients, tiles: Tiles, inputs: _Inputs, block_k: int) -> Gradients:
    """Write the gradients of the queries of one list of tiles, and add to those of keys and values."""

    def add(i: Array, gradients: Gradients) -> Gradients:
        tile = query_tile(tiles, i, inputs.ranges, inputs.spec)
        rows = _rows(tile, inputs)
        dq, dk, dv = _walk(tile, rows, gradients.k, gradients.v, inputs, block_k)
        return Gradients(tile.write(gradients.q, dq), dk, dv, tile.write(gradients.delta, rows.delta))

    return lax.fori_loop(0, tiles.num_attending, add, gradients)


def _rows(tile: QueryTile, inputs: _Inputs) -> _Rows:
    dtype = softmax_dtype(inputs.q.dtype)
    arrays = (inputs.q, *inputs.results, *inputs.d_results)
    q, out, lse, d_out, d_lse = (tile.live_rows_of(x) for x in arrays)
    # Here, and not of all tokens at once: so its bits do not depend on how many there are.
    delta = (d_out.astype(dtype) * out.astype(dtype)).sum(axis=-1) - d_lse
    return _Rows(q, lse, d_out, delta)


def _walk(
    tile: QueryTile,
    rows: _Rows,
    dk: Float[Array, "Lpad K H"],
    dv: Float[Array, "Lpad K H"],
    inputs: _Inputs,
    block_k: int,
) -> tuple[Float[Array, "K R H"], Float[Array, "Lpad K H"], Float[Array, "Lpad K H"]]:
    """The gradient of a tile's queries, over all blocks that it sees; to the others its share is added."""
    dtype = softmax_dtype(rows.q.dtype)

    def add_block(j: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = sums
        block = key_block(tile, j, block_k)
        place = inputs.first_key[tile.seq] + j * block_k
        k, v = (block.live(lax.dynamic_slice_in_dim(x, place, block_k)) for x in (inputs.k, inputs.v))
        weights, d_products = _weights(rows, k, v, block, inputs.spec)
        return (
            dq + product("krs,skh->krh", d_products, k, dtype),
            _added(dk, place, product("krs,krh->skh", d_products, rows.q, dtype)),
            _added(dv, place, product("krs,krh->skh", weights, rows.d_out, dtype)),
        )

    return lax.fori_loop(*tile.blocks(block_k), add_block, (jnp.zeros_like(rows.q, dtype), dk, dv))


def _weights(
    rows: _Rows, k: Float[Array, "S K H"], v: Float[Array, "S K H"], block: KeyBlock, spec: AttentionSpec
) -> tuple[Float[Array, "K R S"], Float[Array, "K R S"]]:
    """The weights p of a block, from the log-sum-exp, and the gradients of its products q·k."""
    dtype, cap = softmax_dtype(rows.q.dtype), spec.logits_soft_cap
    logits = product("krh,skh->krs", rows.q, k, dtype) * spec.softmax_scale
    slope = 1.0
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
        slope = 1 - (logits / cap) ** 2
    weights = jnp.where(block.sees[None], jnp.exp(logits - rows.lse[..., None]), 0)
    d_weights = product("krh,skh->krs", rows.d_out, v, dtype)
    d_products = weights * (d_weights - rows.delta[..., None]) * (spec.softmax_scale * slope)
    return weights.astype(rows.q.dtype), d_products.astype(rows.q.dtype)


def _added(
    total: Float[Array, "Lpad K H"], place: Int32[Array, ""], more: Float[Array, "S K H"]
) -> Float[Array, "Lpad K H"]:
    sums = lax.dynamic_slice_in_dim(total, place, more.shape[0]) + more
    return lax.dynamic_update_slice_in_dim(total, sums, place, 0)


def _padded(array: Array, rows: int) -> Array:
    return jnp.pad(array, ((0, rows), *[(0, 0)] * (array.ndim - 1)))
