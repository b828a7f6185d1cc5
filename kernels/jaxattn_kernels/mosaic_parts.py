"""What the Mosaic GPU kernels have in common, whatever the GPU: copies, masks of values, scores, plain rows.

A program of either kernel is described by a `KernelProgram`. A *work item* is what it does: a tile, or a unit
of one, with `key_base`, `kv_start`, `kv_end`, `begin` and `num_blocks`, in keys as the program reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Softmax in base 2: the GPU has exp2 and log2, and log2(e) goes into the scale.
LOG2E = math.log2(math.e)
# The score of a key that is not seen, finite so that no difference of two of them is NaN.
NEG = -1e30
# A row's maximum counts as at least this much, so that of a row that sees nothing exp2(NEG - FLOOR) is 0.
FLOOR = NEG / 2
# Shared memory for products is tiled and swizzled. A tile has as many columns as divide a head.
TILE_ROWS, TILE_COLUMNS = 8, (64, 32, 16)
DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """Sizes of one kernel launch.

    Attributes:
        block_k: Keys per step of the loop.
        num_stages: Blocks of keys, and of values, that shared memory holds.
    """

    block_k: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class KernelProgram:
    """What is static about a program.

    Attributes:
        tokens: Tokens, with all heads of a group, that the rows of one softmax hold.
        group_size: Query heads per key head, G.
        head_dim: Size of a head, H.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        masks_start: Whether a row's visible keys may begin after those that the program reads.
        interpreted: Whether the GPU is simulated. The simulator cannot reshape references, nor see what a
            `wgmma` product reads.
        sizes: Sizes of the launch.
    """

    tokens: int
    group_size: int
    head_dim: int
    page_size: int | None
    scale: float
    logits_soft_cap: float | None
    masks_start: bool
    interpreted: bool
    sizes: KernelConfig

    @property
    def tile_columns(self) -> int:
        """Columns of a tile in shared memory."""
        return next(columns for columns in TILE_COLUMNS if self.head_dim % columns == 0)

    @property
    def tiled(self) -> tuple[Any, ...]:
        """How products want their operands to lie in shared memory."""
        return (
            plgpu.TilingTransform((TILE_ROWS, self.tile_columns)),  # pyright: ignore[reportAbstractUsage]
            plgpu.SwizzleTransform(2 * self.tile_columns),  # pyright: ignore[reportAbstractUsage]
        )

    @property
    def copy_rows(self) -> int:
        """Keys per copy: a page, or a block where pages are larger or there are none."""
        return min(self.page_size or self.sizes.block_k, self.sizes.block_k)

    @property
    def copies(self) -> int:
        """Copies per block of keys."""
        return self.sizes.block_k // self.copy_rows


def dtype_obstacle(dtype: jax.typing.DTypeLike, kv_dtype: jax.typing.DTypeLike | None) -> str | None:
    """Why element types cannot be served; None where they can."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"dtype {name} is not one of {', '.join(DTYPES)}"
    kv_name = name if kv_dtype is None else jnp.dtype(kv_dtype).name
    if kv_name != name:
        return f"keys are {kv_name} and queries {name}; a product takes both in one type"
    return None


def page_obstacle(page_size: int | None, blocks: Iterable[int]) -> str | None:
    """Why pages cannot be copied to blocks of so many keys; None where they can, or keys are packed."""
    if page_size is None:
        return None
    if page_size % TILE_ROWS:
        return f"page_size={page_size} is not a multiple of {TILE_ROWS}, the rows of a tile in shared memory"
    if any(page_size % block_k and block_k % page_size for block_k in blocks):
        return f"page_size={page_size} neither divides nor is a multiple of every block of {set(blocks)} keys"
    return None


def produce(program: KernelProgram, item: Any, head, pages, k, v, smem: Any, barriers: Any) -> None:
    """Copy the item's blocks of keys and values to shared memory, each as soon as its place is free.

    Pages past the sequence's own are not read: the last one is copied in their place, and masked.

    Args:
        program: What is static.
        item: The tile or unit.
        head: The key head.
        pages: `[P]` Page list, or None.
        k: `[S, K, H]` Keys.
        v: `[S, K, H]` Values.
        smem: With `k` and `v`, `[num_stages, block_k, H]`.
        barriers: With `k_ready`, `v_ready`, `k_free` and `v_free`, one per stage.
    """
    copy_rows, page_size = program.copy_rows, program.page_size
    block_k, num_stages = program.sizes.block_k, program.sizes.num_stages

    def source_row(key):
        """Where `copy_rows` keys lie on the key axis, the first of them given."""
        if page_size is None:
            return item.key_base + key
        page = jnp.clip(key // page_size, item.kv_start // page_size, (item.kv_end - 1) // page_size)
        return pages[item.key_base + page] * page_size + key % page_size

    @pl.loop(0, item.num_blocks)
    def _(i):
        stage = lax.rem(i, jnp.int32(num_stages))
        first = (item.begin + i) * block_k
        sources = [source_row(first + n * copy_rows) for n in range(program.copies)]
        for ref, place, ready, free in (
            (k, smem.k, barriers.k_ready, barriers.k_free),
            (v, smem.v, barriers.v_ready, barriers.v_free),
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

    # The program ends when nobody arrives at a barrier any more.
    @pl.loop(jnp.maximum(item.num_blocks - num_stages, 0), item.num_blocks)
    def _(i):
        stage = lax.rem(i, jnp.int32(num_stages))
        plgpu.barrier_wait(barriers.k_free.at[stage])
        plgpu.barrier_wait(barriers.v_free.at[stage])


def clear_strangers(program: KernelProgram, item: Any, v_smem, j, mine: Any = True) -> None:
    """Zero the values of block j that belong to no key of the item.

    Their weights are zero, but what lies there may be NaN, and 0 * NaN is NaN.

    Args:
        program: What is static.
        item: The tile or unit.
        v_smem: `[block_k, H]` The values.
        j: Number of the block.
        mine: Whether it is this warpgroup that does it.
    """
    block_k, columns = program.sizes.block_k, program.tile_columns
    first_key, rows = j * block_k, 64  # as many rows as a layout that tiles can be loaded in
    has_strangers = (first_key < item.kv_start) | (item.kv_end < first_key + block_k)

    @pl.when(has_strangers & mine)
    def _():
        for row in range(0, block_k, rows):
            for column in range(0, program.head_dim, columns):
                part = v_smem.at[pl.ds(row, rows), pl.ds(column, columns)]
                values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
                key += first_key + row
                own = (item.kv_start <= key) & (key < item.kv_end)
                part[...] = jnp.where(own, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def across(row_values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a number per row along the row."""
    return lax.broadcast_in_dim(row_values, shape, [0])


def logits(program: KernelProgram, products: jax.Array) -> jax.Array:
    """Scaled, capped products in base 2."""
    if (cap := program.logits_soft_cap) is None:
        return products * (program.scale * LOG2E)
    # tanh(x) = 1 - 2 / (1 + exp(2x)). The GPU's own tanh has eleven bits: under a cap of 50, 2 % of a weight.
    exp_2x = jnp.exp2(products * (program.scale / cap * 2 * LOG2E))
    return cap * LOG2E - (2 * cap * LOG2E) / (1.0 + exp_2x)


def token_rows(program: KernelProgram, rows, first, num_tokens: int):
    """Some tokens of plain rows, `[num_tokens, G, H]`, as copies take them."""
    if program.interpreted:
        return rows.at[pl.ds(first, num_tokens)]
    G = program.group_size
    return rows.at[pl.ds(first * G, num_tokens * G)].reshape(num_tokens, G, rows.shape[-1])


def copy_tokens(program: KernelProgram, rows, num_tokens, destination: Callable) -> None:
    """Copy the first tokens of plain rows to `destination(first, number)`."""
    plgpu.commit_smem()
    # A copy has a fixed size: as many tokens as there are, in powers of two.
    done = 0
    for size in (1 << bit for bit in reversed(range(program.tokens.bit_length()))):
        here = num_tokens & size

        @pl.when(here != 0)
        def _(done=done, size=size):
            plgpu.copy_smem_to_gmem(token_rows(program, rows, done, size), destination(done, size))

        done += here
    plgpu.wait_smem_to_gmem(0)


def store(ref, values: jax.Array) -> None:
    """Write, also where threads do not write neighbouring numbers, or not to different banks."""
    if hasattr(plgpu, "store"):  # since 0.12, which otherwise refuses it
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values
