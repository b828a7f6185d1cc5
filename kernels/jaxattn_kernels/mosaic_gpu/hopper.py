"""Ragged attention on Pallas's Mosaic GPU backend: Hopper, its copy engine (TMA) and its `wgmma` products.

The same tile lists as for the Triton kernel, and the same rule: the ranges of visible keys are the
only mask. A program serves a unit, a tile or some of its keys, and one key head. Its warpgroups have
roles: a producer copies blocks of keys and values into shared memory, as far ahead as there is room, and
each consumer attends with 64 rows. A short tile has one consumer. A long one has two that take turns:
while one multiplies, the other computes its softmax. Where the keys of a tile are split among programs,
a second kernel merges their partial results.

Calls that exist only on the Mosaic GPU backend are made in this folder alone (`plgpu`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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

ROWS = 64
"""Rows of a consumer: the height of a `wgmma` product."""
HEAD_DIMS = (64, 80, 96, 128, 256)

# A multiprocessor has 65,536 registers; the producer needs few of them, and leaves its own to two consumers.
PRODUCER_REGISTERS = 40
CONSUMER_REGISTERS = 232


def config_for(*, num_consumers: int, head_dim: int) -> KernelConfig:
    """The sizes that fit in shared memory and compile without spilling registers (tests/compile).

    Args:
        num_consumers: Consumer warpgroups of a program, 1 or 2.
        head_dim: Size of a head.
    """
    if head_dim > 128:
        return KernelConfig(block_k=64, num_stages=2)
    if num_consumers == 1:
        return KernelConfig(block_k=64, num_stages=4)
    return KernelConfig(block_k=128, num_stages=2)


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
    if group_size > ROWS:
        return f"a token's {group_size} query heads per key head exceed the {ROWS} rows of a product"
    block_sizes = {config_for(num_consumers=n, head_dim=head_dim).block_k for n in (1, 2)}
    rows = tokens_per_consumer(group_size) * group_size
    return unsupported_copy(rows, head_dim) or unsupported_page_size(page_size, block_sizes)


def tokens_per_consumer(group_size: int) -> int:
    """Tokens whose query heads, G for one key head, fill the rows of one consumer."""
    return ROWS // group_size


def _consumers_for(block_q: int, group_size: int) -> tuple[int, int]:
    tokens = tokens_per_consumer(group_size)
    return tokens, pl.cdiv(block_q, tokens)


class _Smem(NamedTuple):
    """Shared memory of a program.

    `wgmma` reads tiles of eight rows. A copy into such tiles must begin at a multiple of eight rows of
    its source too: right for keys in pages, and wrong for queries, whose tokens begin anywhere. Queries
    therefore arrive, and outputs leave, in plain rows.
    """

    # References to one memory: [consumers, ROWS, H] plain and tiled, and, of partial results in float32,
    # [consumers, ROWS, H / 2] plain.
    rows_or_q: Any
    k: Any  # [num_stages, block_k, H], tiled
    v: Any  # [num_stages, block_k, H], tiled


class _Barriers(NamedTuple):
    """What the warpgroups of a program wait for."""

    q_ready: Any  # per consumer: its queries have arrived
    k_ready: Any  # per stage: the keys have arrived
    v_ready: Any
    k_free: Any  # per stage: every consumer has read the keys
    v_free: Any
    turn: Any  # two consumers change places at the tensor cores; None for one


def _scratch(program: KernelProgram, dtype, *, is_split: bool) -> tuple[_Smem, _Barriers]:
    """Shared memory and barriers of a program."""
    sizes, consumers, H = program.sizes, program.num_consumers, program.head_dim
    blocks = plgpu.SMEM((sizes.num_stages, sizes.block_k, H), dtype, transforms=program.tiled)
    # Each consumer has its own part of both.
    rows_or_q = (
        plgpu.SMEM((consumers, *program.rows_shape, H), dtype),
        plgpu.SMEM((consumers, ROWS, H), dtype, transforms=program.tiled),
    )
    if is_split:
        rows_or_q += (plgpu.SMEM((consumers, *program.rows_shape, H // 2), jnp.float32),)
    smem = _Smem(rows_or_q=one_memory(program, *rows_or_q), k=blocks, v=blocks)
    arrived = plgpu.Barrier(num_arrivals=program.copies, num_barriers=sizes.num_stages)
    released = plgpu.Barrier(num_arrivals=consumers, num_barriers=sizes.num_stages)
    barriers = _Barriers(
        q_ready=plgpu.Barrier(num_barriers=consumers),
        k_ready=arrived,
        v_ready=arrived,
        k_free=released,
        v_free=released,
        turn=plgpu.Barrier(num_arrivals=2) if consumers == 2 else None,
    )
    return smem, barriers


def _kernel(program: KernelProgram, refs: Arguments, smem: _Smem, barriers: _Barriers) -> None:
    """Give the warpgroups their roles."""
    head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    consumers = program.num_consumers

    @pl.when(warpgroup < consumers)
    def _():
        if consumers == 2:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        for_live_units(
            refs, lambda u, unit: _consume(program, u, unit, head, warpgroup, refs, smem, barriers)
        )

    @pl.when(warpgroup == consumers)
    def _():
        if consumers == 2:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        for_live_units(refs, lambda u, unit: key_blocks.produce(program, unit, head, refs, smem, barriers))


def _consume(
    program: KernelProgram, u, unit: Unit, head, me, refs: Arguments, smem: _Smem, barriers: _Barriers
) -> None:
    """Online softmax of the rows of one consumer over the unit's keys.

    Row r is token `r // G` of the consumer and query head `head * G + r % G`.

    Args:
        program: What is static.
        u: Number of the unit.
        unit: The unit.
        head: The key head.
        me: Number of the consumer.
        refs: Arguments.
        smem: Shared memory.
        barriers: Barriers.
    """
    sizes, H = program.sizes, program.head_dim
    block_k = sizes.block_k
    rows, q_smem, *partial_rows = (ref.at[me] for ref in smem.rows_or_q)
    row_start, row_end = plain_rows.load_ranges(program, unit, me, refs)

    plain_rows.fetch(program, unit, head, me, barriers.q_ready.at[me], (refs.q, rows))
    q_smem[...] = plain_rows.load(program, rows)
    plgpu.commit_smem()

    def take_turns():
        if program.num_consumers == 2:
            plgpu.barrier_arrive(barriers.turn)
            plgpu.barrier_wait(barriers.turn)

    def attend_block(i, state):
        acc, row_max, total = state
        stage, j = lax.rem(i, jnp.int32(sizes.num_stages)), unit.begin + i
        plgpu.barrier_wait(barriers.k_ready.at[stage])
        (s,) = products(program, (q_smem, smem.k.at[stage]), while_running=take_turns)
        plgpu.barrier_arrive(barriers.k_free.at[stage])
        s = softmax.logits(program, s)
        sees_all = (unit.all_begin <= j) & (j < unit.all_end)
        s = lax.cond(
            sees_all, lambda s: s, lambda s: softmax.mask(program, s, j * block_k, row_start, row_end), s
        )
        new_max = jnp.maximum(row_max, s.max(axis=1))
        rescale = jnp.exp2(row_max - new_max)
        p = jnp.exp2(s - softmax.across(jnp.maximum(new_max, FLOOR), s.shape))
        total = total * rescale + p.sum(axis=1)
        acc = acc * softmax.across(rescale, acc.shape)

        if program.num_consumers == 2:
            plgpu.barrier_arrive(barriers.turn)
        plgpu.barrier_wait(barriers.v_ready.at[stage])
        # For both consumers: the second is half a step behind, and multiplies when the first has given up
        # its turn.
        key_blocks.clear_out_of_range(program, unit, smem.v.at[stage], j, mine=me == 0)
        if program.num_consumers == 2:
            plgpu.barrier_wait(barriers.turn)
        (acc,) = add_products(program, (acc, p.astype(refs.q.dtype), smem.v.at[stage]))
        plgpu.barrier_arrive(barriers.v_free.at[stage])
        return acc, new_max, total

    layout = plgpu.Layout.WGMMA
    state = (
        plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), layout),
        plgpu.layout_cast(jnp.full((ROWS,), NEG, jnp.float32), layout.reduce(1)),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1)),
    )
    # The second consumer begins when the first has issued its first product.
    pl.when(me == 1)(take_turns)
    acc, row_max, total = lax.fori_loop(0, unit.num_blocks, attend_block, state)
    pl.when(me == 0)(take_turns)

    factor, lse = softmax.finish(program, unit, head, row_max, total, refs)
    out = acc * softmax.across(factor, acc.shape)

    def write(place, first):
        plain_rows.store(program, place, out[:, first : first + place.shape[-1]])

    plain_rows.store_results(program, u, unit, head, me, refs, (rows, *partial_rows), lse, write)


def products(
    program: KernelProgram, *pairs: tuple[Any, Any], while_running: Callable[[], None] = lambda: None
) -> tuple[jax.Array, ...]:
    """`a @ b.T` of pairs of operands that lie in shared memory, `[ROWS, rows of b]`.

    Args:
        program: What is static.
        *pairs: The operands, `[ROWS, H]` and `[rows, H]`.
        while_running: Something to do while the tensor cores are at it.
    """
    if program.interpreted:
        while_running()
        return tuple(_simulated_product(a[...], b[...].T) for a, b in pairs)

    def multiply(*results):
        for result, (a, b) in zip(results, pairs, strict=True):
            plgpu.wgmma(result, a, b.transpose((1, 0)))
        while_running()
        return tuple(result[...] for result in results)

    return pl.run_scoped(
        multiply, *(plgpu.WGMMAAccumulatorRef((ROWS, b.shape[0]), jnp.float32) for _, b in pairs)
    )


def add_products(program: KernelProgram, *terms: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, ...]:
    """`sum + a @ b`, in place, of each sum, a and b: sums and a lie in registers, b in shared memory."""
    if program.interpreted:
        return tuple(total + _simulated_product(a, b[...]) for total, a, b in terms)

    def add(totals):
        for total, (_, a, b) in zip(totals, terms, strict=True):
            plgpu.wgmma(total, a, b)

    in_place: Any = pl.run_state(add)
    return in_place(tuple(plgpu.WGMMAAccumulatorRef.init(total) for total, _, _ in terms))


def _simulated_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of loaded values. What `wgmma` reads, the simulator does not check for races."""
    plgpu.commit_smem()  # unlike a read by `wgmma`, a load is unknown to the copy that overwrites the place
    return lax.dot(a, b, preferred_element_type=jnp.float32)


KERNEL = mosaic_launch.Kernel(
    rows=ROWS,
    layout=plgpu.Layout.WGMMA,
    helpers=1,
    unsupported_reason=unsupported_reason,
    consumers_for=_consumers_for,
    config_for=config_for,
    scratch=_scratch,
    body=_kernel,
)
ragged_attention = functools.partial(mosaic_launch.ragged_attention, KERNEL)
