"""What the two kernels of the gradient on Hopper share: of products by `wgmma`, like the forward pass.

As on the Triton backend, one kernel has a program per tile of queries and writes their gradient
(`hopper_gradient_queries.py`), the other one per tile of keys and writes the gradients of keys and values
(`hopper_gradient_keys.py`): each number is written by one program, in one order. The warpgroups of either
have the roles of the forward pass (`hopper.py`): one copies blocks into shared memory, as far ahead as there
is room, and one or two consume them, with 64 rows each. In the first kernel a block is of keys and values;
in the second, one of queries and the gradients of their outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.mosaic_gpu import hopper, key_blocks, plain_rows, softmax
from jaxattn_kernels.mosaic_gpu.hopper import ROWS
from jaxattn_kernels.mosaic_gpu.program import (
    LOG2E,
    KernelConfig,
    KernelProgram,
    Unit,
    for_live_units,
    one_memory,
    run,
    unsupported_head_dim,
)

# Of 65,536 registers of a multiprocessor; two accumulators of 64 each leave little to the rest.
PRODUCER_REGISTERS = 24
CONSUMER_REGISTERS = 240

HEAD_DIMS = (64, 80, 96, 128)
KEY_TILE = 2 * ROWS
"""Keys per tile: two consumers have 64 each."""
SIZES = KernelConfig(block_k=64, num_stages=3)
"""Of blocks of keys, or of rows of queries: they fit, and no register is spilled (tests/compile)."""


def unsupported_reason(
    *,
    dtype: jax.typing.DTypeLike,
    head_dim: int,
    group_size: int,
    page_size: int | None,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> str | None:
    """Why the kernels cannot serve a layer; None where they can.

    Args:
        dtype: Element type of queries.
        head_dim: Size of a head.
        group_size: Query heads per key head.
        page_size: Tokens per page, or None for packed keys.
        kv_dtype: Element type of keys and values; that of queries where None.
    """
    if reason := unsupported_head_dim(head_dim, HEAD_DIMS):
        return reason
    return hopper.unsupported_reason(
        dtype=dtype, head_dim=head_dim, group_size=group_size, page_size=page_size, kv_dtype=kv_dtype
    )


class Smem(NamedTuple):
    """Shared memory of a program.

    What begins anywhere arrives in plain rows, as in the forward pass: a consumer's own rows. References to
    one memory are plain, `[consumers, ROWS, H]`, and tiled; for results in float32 also `[.., H / 2]`.
    """

    q_or_k: Any  # references to one memory: queries, or keys
    d_out_or_v: Any  # references to one memory: gradients of outputs, or values
    out: Any  # [consumers, ROWS, H], plain: outputs; None for keys
    k: Any  # [num_stages, block_k, H], tiled: keys, or queries
    v: Any  # [num_stages, block_k, H], tiled: values, or gradients of outputs
    numbers: Any  # [num_stages, 2, block_k] Numbers of rows; None for queries
    ranges: Any  # [num_stages, 2, block_k] The ranges they see; None for queries


class Barriers(NamedTuple):
    """What the warpgroups of a program wait for."""

    rows_ready: Any  # per consumer: its own rows have arrived
    k_ready: Any  # per stage: the block has arrived
    v_ready: Any
    k_free: Any  # per stage: every consumer has read the block
    v_free: Any
    cleared: Any  # what is out of the unit's range in a block is cleared; None for one consumer


def own_rows(program: KernelProgram, dtype, *, is_wide: bool = False) -> Any:
    """Memory for the consumers' own rows."""
    consumers, H = program.num_consumers, program.head_dim
    plain = plgpu.SMEM((consumers, *program.rows_shape, H), dtype)
    tiles = plgpu.SMEM((consumers, ROWS, H), dtype, transforms=program.tiled)
    wide = plgpu.SMEM((consumers, *program.rows_shape, H // 2), jnp.float32)
    return one_memory(program, plain, tiles, *[wide] * is_wide)


def blocks(program: KernelProgram, dtype) -> Any:
    """Memory for blocks, as many as there are stages."""
    shape = (program.sizes.num_stages, program.sizes.block_k, program.head_dim)
    return plgpu.SMEM(shape, dtype, transforms=program.tiled)


def barriers_of(program: KernelProgram, *, own_copies: int, beside: int) -> Barriers:
    """Barriers of a program, given the copies of a consumer's own rows, and those beside a block."""
    consumers, num_stages = program.num_consumers, program.sizes.num_stages
    released = plgpu.Barrier(num_arrivals=consumers, num_barriers=num_stages)
    return Barriers(
        rows_ready=plgpu.Barrier(num_arrivals=own_copies, num_barriers=consumers),
        k_ready=plgpu.Barrier(num_arrivals=program.copies + beside, num_barriers=num_stages),
        v_ready=plgpu.Barrier(num_arrivals=program.copies, num_barriers=num_stages),
        k_free=released,
        v_free=released,
        cleared=plgpu.Barrier(num_arrivals=2) if consumers == 2 else None,
    )


def launch(
    program: KernelProgram,
    consume: Callable[..., None],
    produce_blocks: Callable[..., None],
    arguments: Any,
    num_kv_heads: int,
    scratch: tuple[Smem, Barriers],
    interpret: Any,
) -> None:
    """Run a kernel whose last warpgroup produces what the others consume."""
    consumers = program.num_consumers

    def kernel(refs, smem: Smem, barriers: Barriers) -> None:
        head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")

        @pl.when(warpgroup < consumers)
        def _():
            if consumers == 2:
                plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            for_live_units(
                refs, lambda _, unit: consume(program, unit, head, warpgroup, refs, smem, barriers)
            )

        @pl.when(warpgroup == consumers)
        def _():
            if consumers == 2:
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            for_live_units(refs, lambda _, unit: produce_blocks(program, unit, head, refs, smem, barriers))

    run(
        kernel,
        arguments,
        num_units=arguments.plan.shape[0],
        num_heads=num_kv_heads,
        num_threads=consumers + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        interpret=interpret,
    )


def base2(lse: jax.Array) -> jax.Array:
    """Log-sum-exp in base 2; 0 for a row that sees no key."""
    return jnp.where(jnp.isfinite(lse), lse * LOG2E, 0.0)


def zeros(program: KernelProgram) -> jax.Array:
    """`[ROWS, H]` An accumulator that nothing has been added to."""
    return plgpu.layout_cast(jnp.zeros((ROWS, program.head_dim), jnp.float32), program.layout)


def writer(program: KernelProgram, values: jax.Array) -> Callable[[Any, int], None]:
    """What writes columns of values into plain rows (see `plain_rows.write_tokens`)."""
    return lambda place, first: plain_rows.store(program, place, values[:, first : first + place.shape[-1]])


def clear_out_of_range(program: KernelProgram, unit: Unit, j, me, barriers: Barriers, *blocks: Any) -> None:
    """Zero what belongs to no key or query of the unit in block j, before any consumer reads it."""
    consumers = program.num_consumers
    for n, block in enumerate(blocks):
        key_blocks.clear_out_of_range(program, unit, block, j, mine=me == n % consumers)

    if consumers == 2:

        @pl.when(key_blocks.has_out_of_range(program, unit, j))
        def _():
            plgpu.barrier_arrive(barriers.cleared)
            plgpu.barrier_wait(barriers.cleared)


def weights_of(program: KernelProgram, scores: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights of the softmax, and the same times the derivative of the cap.

    Args:
        program: What is static.
        scores: Products of queries and keys.
        lse: The log-sum-exp of each row, in base 2.
    """
    capped = softmax.logits(program, scores)
    weights = jnp.exp2(capped - lse)
    if program.logits_soft_cap is None:
        return weights, weights
    share = capped * (1 / (program.logits_soft_cap * LOG2E))
    return weights, weights * (1.0 - share * share)  # 1 - tanh²
