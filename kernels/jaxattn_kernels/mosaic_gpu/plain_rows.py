"""A consumer's plain rows, in which queries arrive and outputs leave, and numbers that belong to its rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.mosaic_gpu.program import LOG2E, Arguments, KernelProgram, Unit


def fetch(program: KernelProgram, unit: Unit, head, me, barrier, *sources_and_rows: tuple[Any, Any]) -> None:
    """Copy a consumer's queries, or what else is `[T, N, H]`, into its plain rows, and wait for them.

    Args:
        program: What is static.
        unit: The unit.
        head: The key head.
        me: Number of the consumer.
        barrier: For as many arrivals as there are copies.
        *sources_and_rows: What is copied, and where to.
    """
    tokens = pl.ds(unit.q_start + me * program.tokens, program.tokens)
    heads = pl.ds(head * program.group_size, program.group_size)
    for source, rows in sources_and_rows:
        place = of_tokens(program, rows, 0, program.tokens)
        plgpu.copy_gmem_to_smem(source.at[tokens, heads], place, barrier)
    plgpu.barrier_wait(barrier)


def load_ranges(program: KernelProgram, unit: Unit, me, refs: Arguments) -> tuple[Any, jax.Array]:
    """`[rows]` First key that each row of a consumer sees, None where it is key 0; and one past the last."""
    row_start = None if refs.row_start is None else load_numbers(program, refs.row_start.at[unit.tile, me])
    row_end = load_numbers(program, refs.row_end.at[unit.tile, me])
    if refs.partial is not None and program.page_size is None:  # units of packed keys may share a block
        assert row_start is not None
        row_start, row_end = jnp.maximum(row_start, unit.kv_start), jnp.minimum(row_end, unit.kv_end)
    return row_start, row_end


def load_numbers(program: KernelProgram, ref) -> jax.Array:
    """`[rows]`, each number where its row lies."""
    return plgpu.load(ref, layout=program.layout.reduce(1), optimized=False)


def load(program: KernelProgram, rows) -> jax.Array:
    """`[rows, columns]` of a consumer's plain rows."""
    if program.interpreted:
        return rows[...].reshape(-1, rows.shape[-1])[: program.rows]
    return plgpu.load(rows, layout=program.layout, optimized=False)


def store(program: KernelProgram, rows, values: jax.Array) -> None:
    """Write `[rows, columns]` to a consumer's plain rows."""
    values = values.astype(rows.dtype)
    if program.interpreted:
        excess = math.prod(program.rows_shape) - program.rows
        rows[...] = jnp.pad(values, ((0, excess), (0, 0))).reshape(rows.shape)
    else:
        store_anywhere(rows, values)


def of_tokens(program: KernelProgram, rows, first, num_tokens: int):
    """Some tokens of plain rows, `[num_tokens, G, H]`, as copies take them."""
    if program.interpreted:
        return rows.at[pl.ds(first, num_tokens)]
    G = program.group_size
    return rows.at[pl.ds(first * G, num_tokens * G)].reshape(num_tokens, G, rows.shape[-1])


def store_results(
    program: KernelProgram,
    u,
    unit: Unit,
    head,
    me,
    refs: Arguments,
    places: Any,
    lse: jax.Array,
    write: Callable[[Any, int], None],
) -> None:
    """Let a consumer's outputs and log-sum-exp leave: as results if its unit is whole, else as partial ones.

    Args:
        program: What is static.
        u: Number of the unit.
        unit: The unit.
        head: The key head.
        me: Number of the consumer.
        refs: Arguments.
        places: Plain rows, `[rows, H]`; and, where tiles are split, `[rows, H / 2]` of float32.
        lse: `[rows]` Log-sum-exp in base 2.
        write: `write(place, first)` writes as many columns of the outputs as a place has, from the first on.
    """
    heads = pl.ds(head * program.group_size, program.group_size)
    first_token = me * program.tokens
    num_tokens = jnp.clip(unit.q_len - first_token, 0, program.tokens)
    rows, *partial_rows = places

    @pl.when(unit.is_whole == 1)
    def _():
        store_anywhere(refs.lse.at[unit.tile, me, head], lse / LOG2E)
        begin = unit.q_start + first_token
        write_tokens(
            program, rows, num_tokens, write, lambda i, n, some: refs.out.at[pl.ds(begin + i, n), heads, some]
        )

    if refs.partial is None:
        return

    @pl.when(unit.is_whole == 0)
    def _():
        (place,), partial = partial_rows, refs.partial.out
        store_anywhere(refs.partial.lse.at[u, me, head], lse)
        write_tokens(
            program, place, num_tokens, write,
            lambda i, n, some: partial.at[u, pl.ds(first_token + i, n), heads, some],
        )  # fmt: skip


def write_tokens(
    program: KernelProgram,
    place,
    num_tokens,
    write: Callable[[Any, int], None],
    destination: Callable[[Any, int, Any], Any],
) -> None:
    """Let the first tokens of a consumer leave by way of plain rows.

    Args:
        program: What is static.
        place: Plain rows, of all columns, or of half of them: of numbers of 32 bits in the memory of as many
            of 16.
        num_tokens: How many tokens.
        write: `write(place, first)` writes as many columns of the rows as a place has, from the first on.
        destination: `destination(first, number, columns)` is where tokens go.
    """
    width = place.shape[-1]
    for first in range(0, program.head_dim, width):
        write(place, first)
        columns = pl.ds(first, width)
        copy_tokens(
            program, place, num_tokens, lambda i, n, columns=columns: destination(i, n, columns)
        )  # fmt: skip


def copy_tokens(program: KernelProgram, rows, num_tokens, destination: Callable) -> None:
    """Copy the first tokens of plain rows to `destination(first, number)`."""
    plgpu.commit_smem()
    # A copy has a fixed size: as many tokens as there are, in powers of two.
    done = 0
    for size in (1 << bit for bit in reversed(range(program.tokens.bit_length()))):
        here = num_tokens & size

        @pl.when(here != 0)
        def _(done=done, size=size):
            plgpu.copy_smem_to_gmem(of_tokens(program, rows, done, size), destination(done, size))

        done += here
    plgpu.wait_smem_to_gmem(0)


def store_anywhere(ref, values: jax.Array) -> None:
    """Write, also where threads do not write neighbouring numbers, or not to different banks."""
    if hasattr(plgpu, "store"):  # since 0.12, which otherwise refuses it
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values
