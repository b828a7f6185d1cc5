"""The gradient of the queries on Hopper: a program has a tile of queries, and walks over keys and values.

Its warpgroups, its memory and its launch are those of `hopper_gradient.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.arrays import GradientInputs, Tiles
from jaxattn_kernels.mosaic_gpu import hopper, key_blocks, plain_rows, softmax
from jaxattn_kernels.mosaic_gpu import hopper_gradient as shared
from jaxattn_kernels.mosaic_gpu.hopper import ROWS, add_products, products
from jaxattn_kernels.mosaic_gpu.hopper_gradient import Barriers, Smem
from jaxattn_kernels.mosaic_gpu.launch import numbers_of_tokens, plan_units
from jaxattn_kernels.mosaic_gpu.program import (
    TILE_ROWS,
    KernelProgram,
    Unit,
    blank,
)


def queries_gradient(
    inputs: GradientInputs,
    tile_lists: tuple[Tiles, ...],
    *,
    page_size: int | None,
    scale: float,
    logits_soft_cap: float | None,
    windowed: bool,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of the queries, and what the other kernel compares with.

    Args:
        inputs: What is read.
        tile_lists: Tiles of queries, as the forward pass has them; that their keys may be split is of no
            interest here.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        windowed: Whether a token's range may begin after the sequence does.
        interpret: `plgpu.InterpretGPUParams` to simulate the GPU on a CPU; None to compile.

    Returns:
        `[T, N, H]` the gradient, in the dtype of `q`, and `[T, N]` float32 the sum of the products of an
        output and its gradient, less the gradient of its log-sum-exp; 0 for a token that sees no key. Rows
        that no tile covers are undefined.

    Raises:
        NotImplementedError: If the kernels cannot serve the layer.
    """
    q = inputs.q
    (T, N, H), K = q.shape, inputs.k.shape[1]
    if reason := shared.unsupported_reason(
        dtype=q.dtype, kv_dtype=inputs.k.dtype, head_dim=H, group_size=N // K, page_size=page_size
    ):
        raise NotImplementedError(reason)
    # Whole tiles of eight rows are copied.
    k, v = (jnp.pad(x, ((0, -x.shape[0] % TILE_ROWS), (0, 0), (0, 0))) for x in (inputs.k, inputs.v))
    # All launches write into one buffer.
    dq_ref = jax.new_ref(blank(q.shape, q.dtype, interpret))
    delta = jnp.full((T, N), jnp.nan, jnp.float32)
    lse = shared.base2(inputs.results.lse)
    for tiles in tile_lists:
        tiles = dataclasses.replace(tiles, split=None)
        tokens = hopper.tokens_per_consumer(N // K)
        program = KernelProgram(
            tokens=tokens,
            num_consumers=pl.cdiv(tiles.block_q, tokens),
            rows=ROWS,
            layout=plgpu.Layout.WGMMA,
            group_size=N // K,
            head_dim=H,
            page_size=page_size,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            masks_start=windowed or page_size is None,
            interpreted=interpret is not None,
            sizes=shared.SIZES,
        )
        plan, row_start, row_end = plan_units(program, inputs.visible, inputs.lookup, tiles)
        shape = (row_end.shape[0], program.num_consumers, K, ROWS)
        arguments = _QueriesArguments(
            plan=plan,
            row_start=row_start if program.masks_start else None,
            row_end=row_end,
            pages=inputs.lookup.pages,
            q=q,
            k=k,
            v=v,
            out=inputs.results.out,
            d_out=inputs.d_results.out,
            lse=_numbers_of_rows(program, tiles, lse),
            d_lse=_numbers_of_rows(program, tiles, inputs.d_results.lse),
            dq=dq_ref,
            delta=jax.new_ref(blank(shape, jnp.float32, interpret)),
        )
        shared.launch(
            program, _consume_keys, _produce_keys, arguments, K, _queries_scratch(program, q.dtype), interpret
        )
        delta = numbers_of_tokens(program, tiles, jax.freeze(arguments.delta), delta)
    return jax.freeze(dq_ref), delta


class _QueriesArguments(NamedTuple):
    """Arrays in the GPU's memory that a program reads and writes; in the kernel, references to them.

    Attributes:
        plan: `[U, fields of Unit]` The tiles of queries, in the order in which programs take them.
        row_start: `[W, consumers, ROWS]` First key that each row of a tile sees; None where it is key 0.
        row_end: `[W, consumers, ROWS]` One past the last; a dead row sees none.
        pages: `[P]` Page list, or None.
        q: `[T, N, H]` Queries.
        k: `[S, K, H]` Keys.
        v: `[S, K, H]` Values.
        out: `[T, N, H]` Outputs.
        d_out: `[T, N, H]` Their gradients.
        lse: `[W, consumers, K, ROWS]` Log-sum-exp of each row, in base 2.
        d_lse: `[W, consumers, K, ROWS]` Its gradient, of the natural logarithm.
        dq: `[T, N, H]` Gradients of the queries.
        delta: `[W, consumers, K, ROWS]` What the gradients of a row's weights are compared with.
    """

    plan: Any
    row_start: Any
    row_end: Any
    pages: Any
    q: Any
    k: Any
    v: Any
    out: Any
    d_out: Any
    lse: Any
    d_lse: Any
    dq: Any
    delta: Any


def _queries_scratch(program: KernelProgram, dtype) -> tuple[Smem, Barriers]:
    rows = shared.own_rows(program, dtype)
    out = plgpu.SMEM((program.num_consumers, *program.rows_shape, program.head_dim), dtype)
    blocks = shared.blocks(program, dtype)
    smem = Smem(q_or_k=rows, d_out_or_v=rows, out=out, k=blocks, v=blocks, numbers=None, ranges=None)
    return smem, shared.barriers_of(program, own_copies=3, beside=0)


def _numbers_of_rows(program: KernelProgram, tiles: Tiles, of_tokens: jax.Array) -> jax.Array:
    """`[W, consumers, K, ROWS]` Numbers `[T, N]`, each at its row; of a dead row it may be any."""
    G, tokens = program.group_size, program.tokens
    by_group = of_tokens.reshape(len(of_tokens), -1, G)
    consumer, head, row = (
        jnp.arange(n, dtype=jnp.int32).reshape(shape)
        for n, shape in (
            (program.num_consumers, (1, -1, 1, 1)), (by_group.shape[1], (1, 1, -1, 1)), (ROWS, (1, 1, 1, -1)),
        )
    )  # fmt: skip
    token = tiles.q_start[:, None, None, None] + consumer * tokens + row // G
    return by_group.at[token, head, row % G].get(mode="clip")


def _produce_keys(program: KernelProgram, unit: Unit, head, refs: _QueriesArguments, smem, barriers) -> None:
    key_blocks.produce(program, unit, head, refs, smem, barriers)


def _consume_keys(
    program: KernelProgram, unit: Unit, head, me, refs: _QueriesArguments, smem: Smem, barriers: Barriers
) -> None:
    """The gradients of the queries of one consumer, over the keys of the tile.

    Row r is token `r // G` of the consumer and query head `head * G + r % G`.

    Args:
        program: What is static.
        unit: The tile.
        head: The key head.
        me: Number of the consumer.
        refs: Arguments.
        smem: Shared memory.
        barriers: Barriers.
    """
    dtype, sizes = refs.q.dtype, program.sizes
    q_rows, q_tiles = (ref.at[me] for ref in smem.q_or_k)
    d_out_rows, d_out_tiles = (ref.at[me] for ref in smem.d_out_or_v)
    out_rows = smem.out.at[me]
    row_start = (
        None if refs.row_start is None else plain_rows.load_numbers(program, refs.row_start.at[unit.tile, me])
    )
    row_end = plain_rows.load_numbers(program, refs.row_end.at[unit.tile, me])
    lse = plain_rows.load_numbers(program, refs.lse.at[unit.tile, me, head])

    plain_rows.fetch(
        program, unit, head, me, barriers.rows_ready.at[me],
        (refs.q, q_rows), (refs.d_out, d_out_rows), (refs.out, out_rows),
    )  # fmt: skip
    d_out = plain_rows.load(program, d_out_rows)
    delta = (d_out.astype(jnp.float32) * plain_rows.load(program, out_rows).astype(jnp.float32)).sum(axis=1)
    delta -= plain_rows.load_numbers(program, refs.d_lse.at[unit.tile, me, head])
    d_out_tiles[...] = d_out
    q_tiles[...] = plain_rows.load(program, q_rows)
    plgpu.commit_smem()
    plain_rows.store_anywhere(refs.delta.at[unit.tile, me, head], delta)

    def add_block(i, dq):
        stage, j = lax.rem(i, jnp.int32(sizes.num_stages)), unit.begin + i
        k, v = smem.k.at[stage], smem.v.at[stage]
        plgpu.barrier_wait(barriers.k_ready.at[stage])
        plgpu.barrier_wait(barriers.v_ready.at[stage])
        shared.clear_out_of_range(program, unit, j, me, barriers, k)
        scores, d_weights = products(program, (q_tiles, k), (d_out_tiles, v))
        plgpu.barrier_arrive(barriers.v_free.at[stage])
        shape = scores.shape
        _, sloped = shared.weights_of(program, scores, softmax.across(lse, shape))
        d_scores = sloped * (d_weights - softmax.across(delta, shape))
        sees_all = (unit.all_begin <= j) & (j < unit.all_end)
        d_scores = lax.cond(
            sees_all,
            lambda x: x,
            lambda x: softmax.mask(program, x, j * sizes.block_k, row_start, row_end, otherwise=0.0),
            d_scores,
        )
        (dq,) = add_products(program, (dq, d_scores.astype(dtype), k))
        plgpu.barrier_arrive(barriers.k_free.at[stage])
        return dq

    dq = lax.fori_loop(0, unit.num_blocks, add_block, shared.zeros(program)) * program.scale
    first_token, heads = me * program.tokens, pl.ds(head * program.group_size, program.group_size)
    begin = unit.q_start + first_token
    plain_rows.write_tokens(
        program, q_rows, jnp.clip(unit.q_len - first_token, 0, program.tokens), shared.writer(program, dq),
        lambda i, n, columns: refs.dq.at[pl.ds(begin + i, n), heads, columns],
    )  # fmt: skip
