"""Ragged attention on Pallas's Mosaic GPU backend: Blackwell, its copy engine (TMA), its `tcgen05` products.

The same units as for the Hopper kernel (`hopper.py`), and the same rule: the ranges of visible keys are the
only mask. A program serves a unit and a key head, with 128 rows. Scores, weights and outputs lie in tensor
memory, where products write. Three warpgroups have roles: one computes the softmax, a row per thread, one
copies blocks of keys and values into shared memory, and one issues the products. While the weights of a block
are computed, the scores of the next one are multiplied.

Calls that exist only on the Mosaic GPU backend are made in this folder alone (`plgpu`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.mosaic_gpu import key_blocks, plain_rows, softmax
from jaxattn_kernels.mosaic_gpu import launch as mosaic_launch
from jaxattn_kernels.mosaic_gpu.program import (
    FLOOR,
    NEG,
    Arguments,
    KernelConfig,
    KernelProgram,
    Unit,
    for_live_units,
    one_memory,
    unsupported_copy,
    unsupported_dtype,
    unsupported_head_dim,
    unsupported_page_size,
)

ROWS = 128
"""Rows of a consumer: the height of a `tcgen05` product, and the threads of a warpgroup."""
HEAD_DIMS = (64, 80, 96, 128, 256)
# Most query heads per key head, so that the longer of two kinds of tiles, of two tokens at least, fits.
MAX_GROUP = ROWS // 2
# Columns of tensor memory that the softmax warpgroup moves at a time, at most, to spare registers.
COLUMNS = 64
# Weights may reach this power of two before outputs are rescaled to a new maximum: 16-bit numbers are as
# precise there as at 1, and after a row's first blocks its maximum seldom grows by so much.
GROWTH = 8.0

SOFTMAX, PRODUCER, PRODUCTS = range(3)  # the warpgroups
# A multiprocessor has 65,536 registers: 168 for each of 384 threads, of which the softmax gets more.
PRODUCER_REGISTERS = 112
PRODUCTS_REGISTERS = 152
SOFTMAX_REGISTERS = 240

# A thread has a row, so that sums and maxima of rows need no exchange.
NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE


def config_for(*, num_consumers: int = 1, head_dim: int) -> KernelConfig:
    """The sizes that fit in shared and tensor memory and compile without spilling registers (tests/compile).

    Args:
        num_consumers: 1.
        head_dim: Size of a head.
    """
    del num_consumers
    if head_dim > 128:
        return KernelConfig(block_k=64, num_stages=2)
    return KernelConfig(block_k=128, num_stages=3 if head_dim == 128 else 4)


def unsupported_reason(
    *,
    dtype: jax.typing.DTypeLike,
    head_dim: int,
    group_size: int,
    page_size: int | None,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> str | None:
    """Why the kernel cannot serve a layer; None where it can.

    Args:
        dtype: Element type of queries.
        head_dim: Size of a head.
        group_size: Query heads per key head.
        page_size: Tokens per page, or None for packed keys.
        kv_dtype: Element type of keys and values; that of queries where None.
    """
    if reason := unsupported_dtype(dtype, kv_dtype):
        return reason
    if reason := unsupported_head_dim(head_dim, HEAD_DIMS):
        return reason
    if group_size > MAX_GROUP:
        return f"two tokens' {group_size} query heads per key head exceed the {ROWS} rows of a product"
    rows = MAX_GROUP // group_size * group_size  # of a short tile, and half of those of a long one
    block_sizes = {config_for(head_dim=head_dim).block_k}
    return unsupported_copy(rows, head_dim) or unsupported_page_size(page_size, block_sizes)


def _consumers_for(block_q: int, group_size: int) -> tuple[int, int]:
    if block_q * group_size > ROWS:
        raise ValueError(f"tiles of {block_q} tokens with {group_size} heads each exceed {ROWS} rows")
    return block_q, 1


class _Smem(NamedTuple):
    """Shared memory of a program.

    Products read tiles of eight rows, and a copy into such tiles must begin at a multiple of eight rows of
    its source: right for keys in pages, and wrong for queries, whose tokens begin anywhere. Queries
    therefore arrive, and outputs leave, in plain rows.
    """

    # References to one memory: [ROWS, H], and, of partial results in float32, [ROWS, H / 2], plain.
    rows: Any
    k: Any  # [num_stages, block_k, H], tiled
    v: Any  # [num_stages, block_k, H], tiled


class _Tmem(NamedTuple):
    """Tensor memory of a program: 128 lanes, one per row, of 512 columns of 32 bits.

    In this order whatever a product writes begins at a multiple of 32 columns, for heads of any size.
    """

    scores: Any  # [ROWS, block_k] float32
    weights: Any  # [ROWS, block_k], two to a column
    out: Any  # [ROWS, H] float32
    q: Any  # [ROWS, H], two to a column


class _Barriers(NamedTuple):
    """What the warpgroups of a program wait for."""

    q_copied: Any  # queries are in shared memory
    q_ready: Any  # queries are in tensor memory
    k_ready: Any  # per stage: the keys have arrived
    v_ready: Any
    k_free: Any  # per stage: the product has read the keys
    v_free: Any
    scores_ready: Any
    scores_free: Any  # the softmax has read them
    weights_ready: Any  # and outputs are rescaled, and values cleared
    out_ready: Any  # the product has added to the outputs, hence read the weights


def _scratch(program: KernelProgram, dtype, *, is_split: bool) -> tuple[_Smem, _Tmem, _Barriers]:
    """Shared memory, tensor memory and barriers of a program."""
    sizes, H = program.sizes, program.head_dim
    rows = (plgpu.SMEM((*program.rows_shape, H), dtype),)
    if is_split:
        rows += (plgpu.SMEM((*program.rows_shape, H // 2), jnp.float32),)
    blocks = plgpu.SMEM((sizes.num_stages, sizes.block_k, H), dtype, transforms=program.tiled)
    arrived = plgpu.Barrier(num_arrivals=program.copies, num_barriers=sizes.num_stages)
    released = plgpu.Barrier(num_barriers=sizes.num_stages, orders_tensor_core=True)
    step = plgpu.Barrier(orders_tensor_core=True)
    return (
        _Smem(rows=one_memory(program, *rows), k=blocks, v=blocks),
        _Tmem(
            scores=plgpu.TMEM((ROWS, sizes.block_k), jnp.float32),
            weights=plgpu.TMEM((ROWS, sizes.block_k), dtype, packed=True),
            out=plgpu.TMEM((ROWS, H), jnp.float32),
            q=plgpu.TMEM((ROWS, H), dtype, packed=True),
        ),
        _Barriers(
            q_copied=plgpu.Barrier(),
            q_ready=step,
            k_ready=arrived,
            v_ready=arrived,
            k_free=released,
            v_free=released,
            scores_ready=step,
            scores_free=step,
            weights_ready=step,
            out_ready=step,
        ),
    )


def _kernel(program: KernelProgram, refs: Arguments, smem: _Smem, tmem: _Tmem, barriers: _Barriers) -> None:
    """Give the warpgroups their roles."""
    head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")

    @pl.when(warpgroup == SOFTMAX)
    def _():
        plgpu.set_max_registers(SOFTMAX_REGISTERS, action="increase")
        for_live_units(refs, lambda u, unit: _attend(program, u, unit, head, refs, smem, tmem, barriers))

    @pl.when(warpgroup == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        for_live_units(refs, lambda u, unit: key_blocks.produce(program, unit, head, refs, smem, barriers))

    @pl.when(warpgroup == PRODUCTS)
    def _():
        plgpu.set_max_registers(PRODUCTS_REGISTERS, action="decrease")
        for_live_units(refs, lambda u, unit: _multiply(program, unit, smem, tmem, barriers))


def _multiply(program: KernelProgram, unit: Unit, smem: _Smem, tmem: _Tmem, barriers: _Barriers) -> None:
    """Issue the products: the scores of a block before the outputs of the one before it."""

    def stage_of(i):
        return lax.rem(i, jnp.int32(program.sizes.num_stages))

    def scores(i):
        stage = stage_of(i)
        plgpu.barrier_wait(barriers.k_ready.at[stage])
        plgpu.tcgen05_mma(tmem.scores, tmem.q, smem.k.at[stage].transpose((1, 0)), accumulate=False)
        plgpu.tcgen05_commit_arrive(barriers.k_free.at[stage])
        plgpu.tcgen05_commit_arrive(barriers.scores_ready)

    plgpu.barrier_wait(barriers.q_ready)
    pl.when(unit.num_blocks > 0)(lambda: scores(jnp.int32(0)))

    @pl.loop(0, unit.num_blocks)
    def _(i):
        plgpu.barrier_wait(barriers.scores_free)
        pl.when(i + 1 < unit.num_blocks)(lambda: scores(i + 1))
        stage = stage_of(i)
        plgpu.barrier_wait(barriers.v_ready.at[stage])
        key_blocks.clear_out_of_range(program, unit, smem.v.at[stage], unit.begin + i)
        plgpu.barrier_wait(barriers.weights_ready)
        plgpu.tcgen05_mma(tmem.out, tmem.weights, smem.v.at[stage], accumulate=i > 0)
        plgpu.tcgen05_commit_arrive(barriers.v_free.at[stage])
        plgpu.tcgen05_commit_arrive(barriers.out_ready)


def _attend(
    program: KernelProgram,
    u,
    unit: Unit,
    head,
    refs: Arguments,
    smem: _Smem,
    tmem: _Tmem,
    barriers: _Barriers,
) -> None:
    """Online softmax of the rows over the unit's keys.

    Row r is token `r // G` of the tile and query head `head * G + r % G`.

    Args:
        program: What is static.
        u: Number of the unit.
        unit: The unit.
        head: The key head.
        refs: Arguments.
        smem: Shared memory.
        tmem: Tensor memory.
        barriers: Barriers.
    """
    block_k, H, me = program.sizes.block_k, program.head_dim, 0
    rows, *partial_rows = smem.rows
    row_start, row_end = plain_rows.load_ranges(program, unit, me, refs)
    plain_rows.fetch(program, unit, head, me, barriers.q_copied, (refs.q, rows))
    for part in _parts(H):
        plgpu.async_store_tmem(tmem.q.at[:, part], plain_rows.load(program, rows.at[..., part]))
    plgpu.commit_tmem()
    plgpu.barrier_arrive(barriers.q_ready)

    def rescale_out(factor):
        for part in _parts(H):
            old = plgpu.async_load_tmem(tmem.out.at[:, part], layout=NATIVE)
            plgpu.wait_load_tmem()
            plgpu.async_store_tmem(tmem.out.at[:, part], old * softmax.across(factor, old.shape))

    def attend_block(i, state):
        row_max, total = state  # the maximum that weights are relative to, and their sum
        j = unit.begin + i
        plgpu.barrier_wait(barriers.scores_ready)
        s = plgpu.async_load_tmem(tmem.scores, layout=NATIVE)
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(barriers.scores_free)
        s = softmax.logits(program, s)
        sees_all = (unit.all_begin <= j) & (j < unit.all_end)
        s = lax.cond(
            sees_all, lambda s: s, lambda s: softmax.mask(program, s, j * block_k, row_start, row_end), s
        )
        new_max = s.max(axis=1)
        grows = new_max > row_max + GROWTH
        new_max = jnp.where(grows, new_max, row_max)
        rescale = jnp.exp2(row_max - new_max)
        p = jnp.exp2(s - softmax.across(jnp.maximum(new_max, FLOOR), s.shape))
        total = total * rescale + p.sum(axis=1)
        any_grows = jnp.where(grows, 1.0, 0.0).max() > 0

        pl.when(i > 0)(lambda: plgpu.barrier_wait(barriers.out_ready))
        plgpu.async_store_tmem(tmem.weights, p.astype(refs.q.dtype))
        pl.when((i > 0) & any_grows)(lambda: rescale_out(rescale))
        plgpu.commit_tmem()
        plgpu.barrier_arrive(barriers.weights_ready)
        return new_max, total

    state = tuple(plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), NATIVE.reduce(1)) for x in (NEG, 0.0))
    row_max, total = lax.fori_loop(0, unit.num_blocks, attend_block, state)
    pl.when(unit.num_blocks > 0)(lambda: plgpu.barrier_wait(barriers.out_ready))
    factor, lse = softmax.finish(program, unit, head, row_max, total, refs)

    def write(place, first):
        for part in _parts(place.shape[-1]):
            out = plgpu.async_load_tmem(tmem.out.at[:, pl.ds(first + part.start, part.size)], layout=NATIVE)
            plgpu.wait_load_tmem()
            # Of a row that sees no key, what lies there may be anything.
            out = jnp.where(
                softmax.across(total > 0, out.shape), out * softmax.across(factor, out.shape), 0.0
            )
            plain_rows.store(program, place.at[..., part], out)

    plain_rows.store_results(program, u, unit, head, me, refs, (rows, *partial_rows), lse, write)


def _parts(num_columns: int) -> list[pl.Slice]:
    """Columns as they are moved: in equal parts."""
    width = num_columns // pl.cdiv(num_columns, COLUMNS)
    return [pl.ds(first, width) for first in range(0, num_columns, width)]


KERNEL = mosaic_launch.Kernel(
    rows=ROWS,
    layout=NATIVE,
    helpers=2,
    unsupported_reason=unsupported_reason,
    consumers_for=_consumers_for,
    config_for=config_for,
    scratch=_scratch,
    body=_kernel,
)
ragged_attention = functools.partial(mosaic_launch.ragged_attention, KERNEL)
