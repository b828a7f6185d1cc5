"""The gradient of ragged attention on the Pallas Triton backend, in two kernels that share no memory.

One has a program per tile of queries, as the forward pass, and walks over keys: it writes the gradient of
the queries. The other has a program per tile of keys and walks over the queries that see it, which are
neighbours: it writes the gradients of keys and values. Each number is written by one program, in one order,
so equal inputs give equal bits. Weights are made anew from the log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxattn_kernels.arrays import GradientInputs, KeyTiles, Tiles
from jaxattn_kernels.triton.launch import launch, like, operands_of
from jaxattn_kernels.triton.parts import (
    LOG2E,
    KernelConfig,
    Keys,
    Layer,
    Rows,
    Shape,
    base2_logits,
    block_of,
    for_blocks,
    mask_of,
    product,
    ranges_of,
    rows_of,
    store,
)


def queries_config(*, head_dim: int, itemsize: int) -> KernelConfig:
    """Sizes of the kernel for queries that compile without spilling registers (tests/compile).

    Args:
        head_dim: Size of a head.
        itemsize: Bytes per element of the queries.
    """
    if itemsize > 2:
        return KernelConfig(block_k=16, num_warps=8, num_stages=1, max_rows=32)
    is_large = block_of(head_dim) > 128
    num_warps, max_rows = (8, 32) if is_large else (4, 64)
    return KernelConfig(block_k=32, num_warps=num_warps, num_stages=2, max_rows=max_rows)


def keys_config(*, head_dim: int, itemsize: int) -> KernelConfig:
    """Sizes of the kernel for keys and values; `max_rows` are the rows of queries per step.

    Args:
        head_dim: Size of a head.
        itemsize: Bytes per element of the queries.
    """
    if itemsize > 2:
        return KernelConfig(block_k=16, num_warps=8, num_stages=1, max_rows=16)
    is_large = block_of(head_dim) > 128
    return KernelConfig(block_k=32 if is_large else 64, num_warps=8, num_stages=2, max_rows=32)


def queries_gradient(
    inputs: GradientInputs,
    tile_lists: tuple[Tiles, ...],
    *,
    page_size: int | None,
    scale: float,
    logits_soft_cap: float | None,
    windowed: bool,
    interpret: bool,
    config: KernelConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of the queries, and what the other kernel compares with.

    Args:
        inputs: What is read.
        tile_lists: Tiles of queries; whether their keys are split does not matter here.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        windowed: Whether a token's range may begin after the sequence does.
        interpret: Run on the CPU, in the interpreter of Pallas.
        config: Sizes of the launches; chosen by `queries_config` where None.

    Returns:
        `[T, N, H]` the gradient, in the dtype of `q`, and `[T, N]` float32 the sum of the products of an
        output and its gradient, less the gradient of its log-sum-exp; 0 for a token that sees no key. Rows
        that no tile covers are undefined.
    """
    q = inputs.q
    (T, N, H), K = q.shape, inputs.k.shape[1]
    config = config or queries_config(head_dim=H, itemsize=q.dtype.itemsize)
    dq, delta = like(q, q.shape, q.dtype), like(q, (T, N), jnp.float32)
    layer, done = Layer(page_size, scale, logits_soft_cap, windowed), None
    for tiles in tile_lists:
        shape = Shape.of_launch(config, q.shape, K, tiles.block_q)
        done = launch(
            functools.partial(_queries_gradient, shape=shape, layer=layer),
            f"queries_gradient_q{shape.block_rows}",
            tiles.seq.shape[0] * shape.items_per_unit,
            lambda _, num_live, *__, n=shape.items_per_unit: num_live[...] * n,
            (*operands_of(dataclasses.replace(tiles, split=None)), inputs), (dq, delta), done,
            config=config, interpret=interpret,
        )  # fmt: skip
    assert done is not None
    return done


def _queries_gradient(
    item, tiles: Tiles, num_live, inputs: GradientInputs, dq_ref, delta_ref, *, shape: Shape, layer: Layer
) -> None:
    """One key head, and one part, of a tile of queries."""
    del num_live
    (number, head, part), block_k = shape.split_item(item), shape.block_k
    w = number if tiles.order is None else tiles.order[number]

    @pl.when(tiles.q_len[w] > part * shape.block_q)
    def _():
        rows = rows_of(tiles, w, head, part, inputs.visible, shape)
        keys = Keys(inputs.lookup.pages, inputs.lookup.start[tiles.seq[w]], head, layer.page_size)
        q, d_out = rows.load(inputs.q, shape), rows.load(inputs.d_results.out, shape)
        out, lse = rows.load(inputs.results.out, shape), rows.load_numbers(inputs.results.lse) * LOG2E
        delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=1)
        delta -= rows.load_numbers(inputs.d_results.lse)
        store(delta_ref.at[rows.q_row, rows.q_head], delta, mask=rows.is_live)
        key_start, key_end = tiles.kv_start[w], tiles.kv_end[w]

        def add_block(j, dq: jax.Array, masked: bool) -> jax.Array:
            positions = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
            ok = (positions >= key_start) & (positions < key_end)
            slots = keys.slots(j * block_k, positions, ok)
            k = keys.load(inputs.k, slots, ok, q.dtype, shape)
            v = keys.load(inputs.v, slots, ok, q.dtype, shape)
            sees = _sees(positions[None, :], rows.first[:, None], rows.end[:, None]) if masked else None
            _, d_products = _weights(
                product(q, k.T), product(d_out, v.T), lse[:, None], delta[:, None], sees, layer
            )
            return dq + product(d_products.astype(q.dtype), k)

        dq = jnp.zeros((shape.block_rows, shape.head_block), jnp.float32)
        dq = for_blocks(
            add_block, dq, rows, key_start, key_end, block_k=block_k, windowed=layer.windowed
        )  # fmt: skip
        _store_rows(dq_ref, rows.q_row, rows.q_head, dq * layer.scale, rows.is_live, shape)


def keys_gradient(
    inputs: GradientInputs,
    delta: jax.Array,
    tiles: KeyTiles,
    num_rows: int,
    dtype: Any,
    *,
    page_size: int | None,
    scale: float,
    logits_soft_cap: float | None,
    interpret: bool,
    config: KernelConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`[num_rows, K, H]` twice: the gradients of keys and of values, sequence after sequence.

    The row of a key is its place in its sequence after `lookup.start`, which counts pages where there are
    pages: the gradients of a page that several sequences share stand in several rows.

    Args:
        inputs: What is read.
        delta: `[T, N]` From `queries_gradient`.
        tiles: Tiles of keys, of at most a power of two.
        num_rows: Rows of the results.
        dtype: Dtype of the results.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        interpret: Run on the CPU, in the interpreter of Pallas.
        config: Sizes of the launch; chosen by `keys_config` where None.

    Returns:
        The gradients; rows that hold no key are 0.
    """
    (T, N, H), K = inputs.q.shape, inputs.k.shape[1]
    config = config or keys_config(head_dim=H, itemsize=inputs.q.dtype.itemsize)
    block_k = min(config.block_k, tiles.block_k)
    shape, parts = Shape(T, N, K, H, 1, 1, block_k), pl.cdiv(tiles.block_k, block_k)
    # Both ends of a row's range are compared here, whether or not it begins with the sequence.
    layer = Layer(page_size, scale, logits_soft_cap, windowed=True)
    result = like(inputs.k, (num_rows, K, H), dtype)
    zeros = jnp.zeros(result.shape, dtype) + jnp.zeros_like(inputs.k.ravel()[0], dtype)
    return launch(
        functools.partial(_keys_gradient, shape=shape, parts=parts, block_rows=config.max_rows, layer=layer),
        f"keys_gradient_k{block_k}",
        tiles.seq.shape[0] * K * parts,
        lambda tiles, *_: tiles.num_live[...] * (K * parts),
        (tiles, inputs, delta), (result, result), (zeros, zeros),
        config=config, interpret=interpret,
    )  # fmt: skip


def _keys_gradient(
    item, tiles: KeyTiles, inputs: GradientInputs, delta_ref, dk_ref, dv_ref,
    *, shape: Shape, parts: int, block_rows: int, layer: Layer,
) -> None:  # fmt: skip
    """One key head, and one part, of a tile of keys."""
    K, G, block_k = shape.num_kv_heads, shape.group_size, shape.block_k
    w, head, part = item // (K * parts), item % K, item % (K * parts) // K
    begin = tiles.kv_start[w] + part * block_k

    @pl.when(begin < tiles.kv_end[w])
    def _():
        positions = begin + jnp.arange(block_k, dtype=jnp.int32)
        ok = positions < tiles.kv_end[w]
        start = inputs.lookup.start[tiles.seq[w]]
        keys = Keys(inputs.lookup.pages, start, head, layer.page_size)
        slots = keys.slots(begin, positions, ok)
        k = keys.load(inputs.k, slots, ok, inputs.q.dtype, shape)
        v = keys.load(inputs.v, slots, ok, inputs.q.dtype, shape)
        first_row, end_row = tiles.q_start[w] * G, tiles.q_end[w] * G

        def add_rows(i, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dk, dv = gradients
            row = first_row + i * block_rows + jnp.arange(block_rows, dtype=jnp.int32)
            is_live = row < end_row
            token = lax.div(row, G)
            q_row = jnp.where(is_live, token, shape.tokens)
            q_head = head * G + (row - token * G)
            rows = Rows(token, is_live, q_row, q_head, *ranges_of(q_row, is_live, inputs.visible))
            q, d_out = rows.load(inputs.q, shape), rows.load(inputs.d_results.out, shape)
            lse, delta = rows.load_numbers(inputs.results.lse) * LOG2E, rows.load_numbers(delta_ref)
            sees = _sees(positions[:, None], rows.first[None, :], rows.end[None, :])
            weights, d_products = _weights(
                product(k, q.T), product(v, d_out.T), lse[None, :], delta[None, :], sees, layer
            )
            return (
                dk + product(d_products.astype(q.dtype), q),
                dv + product(weights.astype(q.dtype), d_out),
            )

        zeros = jnp.zeros((block_k, shape.head_block), jnp.float32)
        num_blocks = (end_row - first_row + (block_rows - 1)) // block_rows
        dk, dv = lax.fori_loop(0, num_blocks, add_rows, (zeros, zeros))
        place = start * (layer.page_size or 1) + positions
        heads = jnp.zeros((block_k,), jnp.int32) + head
        _store_rows(dk_ref, place, heads, dk * layer.scale, ok, shape)
        _store_rows(dv_ref, place, heads, dv, ok, shape)


def _sees(positions, first, end) -> jax.Array:
    return (first <= positions) & (positions < end)


def _weights(
    products: jax.Array, d_weights: jax.Array, lse, delta, sees, layer: Layer
) -> tuple[jax.Array, jax.Array]:
    """Weights of the softmax, and the gradient of the products, but for the scale.

    Args:
        products: Products of queries and keys.
        d_weights: Products of gradients of outputs, and values.
        lse: The log-sum-exp of each row, in base 2.
        delta: What the weights' gradients of each row are compared with.
        sees: Which keys each row sees; None for all.
        layer: What is static about the layer.
    """
    cap = layer.logits_soft_cap
    logits = base2_logits(products, layer.scale, cap)
    weights = jnp.exp2(logits - lse)
    weights = weights if sees is None else jnp.where(sees, weights, 0.0)
    d_products = weights * (d_weights - delta)
    if cap is not None:  # the derivative of the cap, 1 - tanh²
        share = logits * (1 / (cap * LOG2E))
        d_products *= 1 - share * share
    return weights, d_products


def _store_rows(ref: Any, row, head, values: jax.Array, ok: jax.Array, shape: Shape) -> None:
    """Write rows of an array `[rows, heads, H]`."""
    d = jnp.arange(shape.head_block, dtype=jnp.int32)
    where = ref.at[row[:, None], head[:, None], d[None, :]]
    store(where, values.astype(ref.dtype), mask=mask_of(ok, shape))
