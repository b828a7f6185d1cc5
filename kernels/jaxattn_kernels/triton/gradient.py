"""The gradient of ragged attention on the Pallas Triton backend, in two kernels that share no memory.

One has a program per tile of queries, as the forward pass, and walks over keys: it writes the gradient of
the queries. The other has a program per tile of keys and walks over the queries that see it, which are
neighbours: it writes the gradients of keys and values. Each number is written by one program, in one order,
so equal inputs give equal bits. Weights are made anew from the log-sum-exp.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxattn_kernels.arrays import GradientInputs, KeyTileArrays, TileArrays, TileList
from jaxattn_kernels.triton.parts import (
    LOG2E,
    KernelConfig,
    Keys,
    Rows,
    Shape,
    base2_logits,
    block_of,
    for_blocks,
    launch,
    like,
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
    tile_lists: tuple[TileList, ...],
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
        tile_lists: Tiles of queries; that their keys may be split is of no interest here.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        windowed: Whether a token's range may begin after the sequence does.
        interpret: Run on the CPU, as the interpreter of Pallas does.
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
    done = None
    for tile_list in tile_lists:
        tile_q, num_live = tile_list.block_q, tile_list.num_live
        num_tiles = tile_list.tiles.seq.shape[0]
        block_q = max(1, min(tile_q, config.max_rows // (N // K)))
        shape = Shape(T, N, K, H, tile_q, block_q, config.block_k)
        done = launch(
            functools.partial(
                _queries_gradient, shape=shape, page_size=page_size, scale=scale,
                logits_soft_cap=logits_soft_cap, windowed=windowed,
            ),
            f"queries_gradient_q{shape.block_rows}",
            num_tiles * shape.programs_per_unit,
            functools.partial(_live_programs, num_tiles, shape.programs_per_unit),
            ((tile_list.tiles, tile_list.order), num_live, inputs), (dq, delta), done,
            config=config, interpret=interpret,
        )  # fmt: skip
    assert done is not None
    return done


def _live_programs(num_tiles: int, programs_per_tile: int, work, num_live, *_) -> Any:
    del work
    return (num_tiles if num_live is None else num_live[0]) * programs_per_tile


def _queries_gradient(
    program, work, num_live, inputs: GradientInputs, dq_ref, delta_ref,
    *, shape: Shape, page_size, scale, logits_soft_cap, windowed,
) -> None:  # fmt: skip
    """One key head, and one part, of a tile of queries."""
    del num_live
    tiles: TileArrays = work[0]
    order = work[1]
    unit, K, block_k = program // shape.programs_per_unit, shape.num_kv_heads, shape.block_k
    head, part = program % K, program % shape.programs_per_unit // K
    w = unit if order is None else order[unit]

    @pl.when(tiles.q_len[w] > part * shape.block_q)
    def _():
        rows = rows_of(tiles, w, head, part, inputs.visible, shape)
        keys = Keys(inputs.lookup.pages, inputs.lookup.start[tiles.seq[w]], head, page_size)
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
                product(q, k.T), product(d_out, v.T), lse[:, None], delta[:, None], sees, scale,
                logits_soft_cap,
            )  # fmt: skip
            return dq + product(d_products.astype(q.dtype), k)

        dq = jnp.zeros((shape.block_rows, shape.head_block), jnp.float32)
        dq = for_blocks(add_block, dq, rows, key_start, key_end, block_k=block_k, windowed=windowed) * scale
        _store_rows(dq_ref, rows.q_row, rows.q_head, dq, rows.is_live, shape)


def keys_gradient(
    inputs: GradientInputs,
    delta: jax.Array,
    tiles: KeyTileArrays,
    tile_k: int,
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
        tiles: Tiles of keys.
        tile_k: Keys per tile, at most; a power of two.
        num_rows: Rows of the results.
        dtype: Dtype of the results.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        interpret: Run on the CPU, as the interpreter of Pallas does.
        config: Sizes of the launch; chosen by `keys_config` where None.

    Returns:
        The gradients; rows that hold no key are 0.
    """
    (T, N, H), K = inputs.q.shape, inputs.k.shape[1]
    config = config or keys_config(head_dim=H, itemsize=inputs.q.dtype.itemsize)
    block_k = min(config.block_k, tile_k)
    shape, parts = Shape(T, N, K, H, 1, 1, block_k), pl.cdiv(tile_k, block_k)
    result = like(inputs.k, (num_rows, K, H), dtype)
    zeros = jnp.zeros(result.shape, dtype) + jnp.zeros_like(inputs.k.ravel()[0], dtype)
    num_tiles, programs_per_tile = tiles.seq.shape[0], K * parts
    return launch(
        functools.partial(
            _keys_gradient, shape=shape, parts=parts, block_rows=config.max_rows, page_size=page_size,
            scale=scale, logits_soft_cap=logits_soft_cap,
        ),
        f"keys_gradient_k{block_k}",
        num_tiles * programs_per_tile,
        functools.partial(_live_programs, num_tiles, programs_per_tile),
        (tiles, tiles.num_live, inputs, delta), (result, result), (zeros, zeros),
        config=config, interpret=interpret,
    )  # fmt: skip


def _keys_gradient(
    program, tiles: KeyTileArrays, num_live, inputs: GradientInputs, delta_ref, dk_ref, dv_ref,
    *, shape: Shape, parts: int, block_rows: int, page_size, scale, logits_soft_cap,
) -> None:  # fmt: skip
    """One key head, and one part, of a tile of keys."""
    del num_live
    K, G, block_k = shape.num_kv_heads, shape.group_size, shape.block_k
    w, head, part = program // (K * parts), program % K, program % (K * parts) // K
    begin = tiles.kv_start[w] + part * block_k

    @pl.when(begin < tiles.kv_end[w])
    def _():
        positions = begin + jnp.arange(block_k, dtype=jnp.int32)
        ok = positions < tiles.kv_end[w]
        start = inputs.lookup.start[tiles.seq[w]]
        keys = Keys(inputs.lookup.pages, start, head, page_size)
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
                product(k, q.T), product(v, d_out.T), lse[None, :], delta[None, :], sees, scale,
                logits_soft_cap,
            )  # fmt: skip
            return (
                dk + product(d_products.astype(q.dtype), q),
                dv + product(weights.astype(q.dtype), d_out),
            )

        zeros = jnp.zeros((block_k, shape.head_block), jnp.float32)
        num_blocks = (end_row - first_row + (block_rows - 1)) // block_rows
        dk, dv = lax.fori_loop(0, num_blocks, add_rows, (zeros, zeros))
        place = start * (page_size or 1) + positions
        heads = jnp.zeros((block_k,), jnp.int32) + head
        _store_rows(dk_ref, place, heads, dk * scale, ok, shape)
        _store_rows(dv_ref, place, heads, dv, ok, shape)


def _sees(positions, first, end) -> jax.Array:
    return (first <= positions) & (positions < end)


def _weights(
    products: jax.Array, d_weights: jax.Array, lse, delta, sees, scale: float, cap: float | None
) -> tuple[jax.Array, jax.Array]:
    """Weights of the softmax, and the gradient of the products, but for the scale.

    Args:
        products: Products of queries and keys.
        d_weights: Products of gradients of outputs, and values.
        lse: The log-sum-exp of each row, in base 2.
        delta: What the weights' gradients of each row are compared with.
        sees: Which keys each row sees; None for all.
        scale: Factor on the products.
        cap: Cap of the logits, or None.
    """
    logits = base2_logits(products, scale, cap)
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
