"""Blocks of keys and values in shared memory: how they come, and what of them belongs to no key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.mosaic_gpu.program import KernelProgram, Unit


def source_row(page_size: int | None, pages, key, base, begin, end):
    """Where keys lie on the key axis, from a key on; past the last page of a tile, where that page lies.

    Args:
        page_size: Tokens per page, or None for packed keys.
        pages: `[P]` Page list, or None.
        key: The first key; at the beginning of a page, unless all of them lie in one.
        base: The sequence's first entry in the page list, or the row of key 0.
        begin: First key of the tile.
        end: One past its last.
    """
    if page_size is None:
        return base + key
    page = jnp.clip(key // page_size, begin // page_size, (end - 1) // page_size)
    return pages[base + page] * page_size + key % page_size


def produce(
    program: KernelProgram,
    unit: Unit,
    head,
    refs: Any,
    smem: Any,
    barriers: Any,
    beside: Iterable[tuple[Any, Any]] = (),
) -> None:
    """Copy the unit's blocks of keys and values to shared memory, each as soon as its place is free.

    Pages past the sequence's own are not read: the last one is copied in their place, and masked.

    Args:
        program: What is static.
        unit: The unit.
        head: The key head.
        refs: With `k`, `v` and `pages`.
        smem: With `k` and `v`, `[num_stages, block_k, H]`.
        barriers: With `k_ready`, `v_ready`, `k_free` and `v_free`, one per stage.
        beside: What comes and goes with packed keys: numbers per key, `[..., S]`, and their places,
            `[num_stages, ..., block_k]`.
    """
    copy_rows, keys = program.copy_rows, (unit.key_base, unit.kv_start, unit.kv_end)
    block_k, num_stages = program.sizes.block_k, program.sizes.num_stages

    @pl.loop(0, unit.num_blocks)
    def _(i):
        stage = lax.rem(i, jnp.int32(num_stages))
        first = (unit.begin + i) * block_k
        sources = [
            source_row(program.page_size, refs.pages, first + n * copy_rows, *keys)
            for n in range(program.copies)
        ]
        for ref, place, ready, free in (
            (refs.k, smem.k, barriers.k_ready, barriers.k_free),
            (refs.v, smem.v, barriers.v_ready, barriers.v_free),
        ):

            @pl.when(i >= num_stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[stage])

            for n, source in enumerate(sources):
                plgpu.copy_gmem_to_smem(
                    ref.at[pl.ds(source, copy_rows), head],
                    place.at[stage, pl.ds(n * copy_rows, copy_rows)],
                    ready.at[stage],
                )
        for ref, place in beside:
            before = (slice(None),) * (len(ref.shape) - 1)
            plgpu.copy_gmem_to_smem(
                ref.at[*before, pl.ds(sources[0], block_k)], place.at[stage], barriers.k_ready.at[stage]
            )

    # The program ends when nobody arrives at a barrier any more.
    @pl.loop(jnp.maximum(unit.num_blocks - num_stages, 0), unit.num_blocks)
    def _(i):
        stage = lax.rem(i, jnp.int32(num_stages))
        plgpu.barrier_wait(barriers.k_free.at[stage])
        plgpu.barrier_wait(barriers.v_free.at[stage])


def has_out_of_range(program: KernelProgram, unit: Unit, j) -> jax.Array:
    """Whether block j has places that hold no key of the unit."""
    first_key, block_k = j * program.sizes.block_k, program.sizes.block_k
    return (first_key < unit.kv_start) | (unit.kv_end < first_key + block_k)


def clear_out_of_range(program: KernelProgram, unit: Unit, v_smem, j, mine: Any = True) -> None:
    """Zero the values of block j that belong to no key of the unit.

    Their weights are zero, but what lies there may be NaN, and 0 * NaN is NaN.

    Args:
        program: What is static.
        unit: The unit.
        v_smem: `[block_k, H]` The values.
        j: Number of the block.
        mine: Whether it is this warpgroup that does it.
    """
    block_k, columns = program.sizes.block_k, program.tile_columns
    first_key, rows = j * block_k, 64  # as many rows as a layout that tiles can be loaded in

    @pl.when(has_out_of_range(program, unit, j) & mine)
    def _():
        for row in range(0, block_k, rows):
            for column in range(0, program.head_dim, columns):
                part = v_smem.at[pl.ds(row, rows), pl.ds(column, columns)]
                values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
                key += first_key + row
                own = (unit.kv_start <= key) & (key < unit.kv_end)
                part[...] = jnp.where(own, values, jnp.zeros_like(values))
        plgpu.commit_smem()
