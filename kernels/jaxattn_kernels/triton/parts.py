"""What the kernels on the Pallas Triton backend share: launches, rows of queries, blocks of keys.

Every call that exists only on Pallas's Triton backend is made in this file (`plgpu`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn_kernels.arrays import TileArrays

# Softmax in base 2: the GPU has exp2, and log2(e) goes into the scale.
LOG2E = math.log2(math.e)
# The narrowest operand of a tensor-core product.
MIN_DOT = 16
MAX_PROGRAMS = 512
"""Programs of one launch, at most: what the largest GPUs run at once, three or four on each multiprocessor.
Where a list has room for more units, each program takes every 512th of those that are live, so that room
which a batch leaves empty costs nothing."""

load, store = plgpu.load, plgpu.store


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """Sizes of one kernel launch.

    Attributes:
        block_k: Keys per step of the loop; a power of two.
        num_warps: Warps per program.
        num_stages: Depth of the load pipeline.
        max_rows: Rows of one program, at most; a tile with more is divided among programs. A
            token's G rows stay together, however many they are.
    """

    block_k: int
    num_warps: int
    num_stages: int
    max_rows: int = 128


class Shape(NamedTuple):
    """Static sizes of a launch.

    Attributes:
        tokens: Rows of the query array, T.
        num_q_heads: N.
        num_kv_heads: K.
        head_dim: H.
        tile_q: Tokens per tile, at most.
        block_q: Those of them that one program serves.
        block_k: Keys per step.
    """

    tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    tile_q: int
    block_q: int
    block_k: int

    @property
    def group_size(self) -> int:
        """Query heads per key head, G."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def block_rows(self) -> int:
        """Rows of a program, those that fill the block included."""
        return block_of(self.block_q * self.group_size)

    @property
    def head_block(self) -> int:
        """H, and what fills the block."""
        return block_of(self.head_dim)

    @property
    def programs_per_unit(self) -> int:
        """One per key head and per part of a tile that is too tall for one program."""
        return self.num_kv_heads * pl.cdiv(self.tile_q, self.block_q)


def block_of(n: int) -> int:
    """The smallest block size that holds n: a power of two that a tensor-core product accepts."""
    return max(MIN_DOT, 1 << (n - 1).bit_length())


def like(array: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """The shape of a result that varies over the same axes of a mesh as an array does."""
    return jax.eval_shape(lambda x: jnp.broadcast_to(x.ravel()[0], shape).astype(dtype), array)


def launch(
    kernel: Callable[..., None],
    name: str,
    programs: int,
    live_programs: Callable[..., Any],
    inputs: tuple,
    outputs: tuple,
    before: Any = None,
    *,
    config: KernelConfig,
    interpret: bool,
) -> tuple:
    """Run `kernel(program, *inputs, *outputs)` for every live program, all arguments as references.

    Args:
        kernel: The kernel.
        name: Its name.
        programs: Programs that there is room for.
        live_programs: From the inputs, how many of them are live, which come first; asked where a launch
            has fewer programs than there is room for.
        inputs: Arrays, in pytrees.
        outputs: Shapes of the results, in pytrees.
        before: What the first outputs hold before, whose memory they take; None for nothing.
        config: Sizes of the launch.
        interpret: Run on the CPU, as the interpreter of Pallas does.
    """
    anywhere, first = pl.BlockSpec(memory_space=pl.ANY), len(jax.tree.leaves(inputs))

    def body(*refs: Any) -> None:
        arguments = (*refs[: len(inputs)], *refs[len(inputs) + 1 :])
        _for_each(lambda program: kernel(program, *arguments), programs, lambda: live_programs(*arguments))

    return pl.pallas_call(
        body,
        grid=(min(programs, MAX_PROGRAMS),),
        in_specs=jax.tree.map(lambda _: anywhere, (*inputs, before)),
        out_specs=jax.tree.map(lambda _: anywhere, outputs),
        out_shape=outputs,
        input_output_aliases={first + i: i for i in range(len(jax.tree.leaves(before)))},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name=name,
    )(*inputs, before)


def _for_each(run: Callable[[Any], None], programs: int, live_programs: Callable[[], Any]) -> None:
    """Run this program's share of the `programs` that there is room for."""
    first = pl.program_id(0)
    if programs <= MAX_PROGRAMS:  # a dead one ends at once
        run(first)
        return
    live = live_programs()

    def step(i, _):
        # Odd rounds run backwards: where long tiles come first, everybody's share is then equally long.
        place = jnp.where((i & 1) == 0, first, MAX_PROGRAMS - 1 - first)
        program = i * MAX_PROGRAMS + place
        pl.when(program < live)(lambda: run(program))

    lax.fori_loop(0, (live + (MAX_PROGRAMS - 1)) // MAX_PROGRAMS, step, None)


class Rows(NamedTuple):
    """The rows that one program serves: row r is token `r // G` and query head `head * G + r % G`.

    Attributes:
        token: `[block_rows]` Token of the tile.
        is_live: `[block_rows]` Whether the tile has it.
        q_row: `[block_rows]` Its row in the packed arrays; T, out of bounds, where it is dead.
        q_head: `[block_rows]` Query head.
        first: `[block_rows]` First visible key.
        end: `[block_rows]` One past the last visible key.
    """

    token: jax.Array
    is_live: jax.Array
    q_row: jax.Array
    q_head: jax.Array
    first: jax.Array
    end: jax.Array

    def load(self, ref: Any, shape: Shape) -> jax.Array:
        """`[block_rows, head_block]` The rows of an array `[T, N, H]`, 0 where there are none."""
        # A plain arange: a masked index here would turn 128-bit loads into 16-bit ones.
        d = jnp.arange(shape.head_block, dtype=jnp.int32)
        place = (self.q_row[:, None], self.q_head[:, None], d[None, :])
        return load(ref.at[place], mask=mask_of(self.is_live, shape), other=0.0)

    def load_numbers(self, ref: Any) -> jax.Array:
        """`[block_rows]` The numbers of an array `[T, N]`, 0 where there are none."""
        return load(ref.at[self.q_row, self.q_head], mask=self.is_live, other=0.0)


def rows_of(tiles: TileArrays, w, head, part, visible: Any, shape: Shape) -> Rows:
    """The rows of one key head, and of one part, of a tile."""
    r, G = jnp.arange(shape.block_rows, dtype=jnp.int32), shape.group_size
    token = part * shape.block_q + r // G
    is_live = (token < tiles.q_len[w]) & (r < shape.block_q * G)
    # Loads and stores of dead rows go out of bounds, never onto a live row.
    q_row = jnp.where(is_live, tiles.q_start[w] + token, shape.tokens)
    return Rows(token, is_live, q_row, head * G + r % G, *ranges_of(q_row, is_live, visible))


def ranges_of(q_row, is_live, visible: Any) -> tuple[jax.Array, jax.Array]:
    """Which keys rows see, from references to a `VisibleRange`; none where they are dead."""
    first = load(visible.start.at[q_row], mask=is_live, other=0)
    return first, load(visible.end.at[q_row], mask=is_live, other=0)


def mask_of(rows_ok: jax.Array, shape: Shape) -> jax.Array:
    """`[rows, head_block]` The elements that exist."""
    mask = rows_ok[:, None]
    if shape.head_block != shape.head_dim:
        mask &= (jnp.arange(shape.head_block, dtype=jnp.int32) < shape.head_dim)[None, :]
    return jnp.broadcast_to(mask, (rows_ok.shape[0], shape.head_block))


class Keys(NamedTuple):
    """Where the keys of one sequence lie, for one key head.

    Attributes:
        pages: `[P]` Physical pages, or None for keys that are packed.
        base: The sequence's first entry in `pages`, or its first key.
        head: Key head.
        page_size: Tokens per page, or None (static).
    """

    pages: Any
    base: Any
    head: Any
    page_size: int | None

    def slots(self, first, positions: jax.Array, ok: jax.Array) -> jax.Array:
        """Places of a block of keys on the flat axis.

        Args:
            first: Position of the block's first key, a multiple of the block's length.
            positions: Positions of its keys.
            ok: Which of them exist.
        """
        if self.page_size is None:
            return self.base + positions
        if self.page_size % positions.shape[0] == 0:  # the whole block lies in one page
            page = self.pages[self.base + first // self.page_size]
        else:
            page = load(self.pages.at[self.base + positions // self.page_size], mask=ok, other=0)
        return page * self.page_size + positions % self.page_size

    def load(self, ref: Any, slots: jax.Array, ok: jax.Array, dtype: Any, shape: Shape) -> jax.Array:
        """`[block_k, head_block]` Keys or values, 0 where there are none."""
        d = jnp.arange(shape.head_block, dtype=jnp.int32)
        place = (slots[:, None], self.head, d[None, :])
        block = load(ref.at[place], mask=mask_of(ok, shape), other=jnp.zeros((), ref.dtype))
        # Every number of eight bits is one of 16, too: the product is of the type of the queries.
        return block.astype(dtype)


def for_blocks(
    step: Callable[..., Any], state: Any, rows: Rows, key_start, key_end, *, block_k: int, windowed: bool
) -> Any:
    """Fold `step(j, state, masked=...)` over the blocks of keys `key_start .. key_end`.

    Blocks that every live row sees whole need no mask: [all_begin, all_end) of [begin, stop).
    """
    begin, stop = key_start // block_k, (key_end + block_k - 1) // block_k
    all_end = jnp.min(jnp.where(rows.is_live, rows.end, key_end)) // block_k
    all_begin = (jnp.max(rows.first) + block_k - 1) // block_k if windowed else begin
    all_begin = jnp.clip(all_begin, begin, stop)
    all_end = jnp.clip(all_end, all_begin, stop)
    if windowed:
        state = lax.fori_loop(begin, all_begin, functools.partial(step, masked=True), state)
    state = lax.fori_loop(all_begin, all_end, functools.partial(step, masked=False), state)
    return lax.fori_loop(all_end, stop, functools.partial(step, masked=True), state)


def base2_logits(products: jax.Array, factor: Any, logits_soft_cap: float | None) -> jax.Array:
    """Logits of the softmax in base 2 from products of queries and keys.

    Args:
        products: Products.
        factor: Their factor.
        logits_soft_cap: Cap, or None.
    """
    if logits_soft_cap is None:
        return products * (factor * LOG2E)
    return jnp.tanh(products * (factor / logits_soft_cap)) * (logits_soft_cap * LOG2E)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of matrices, accumulated in float32; of float32 in full, outside the tensor cores."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, preferred_element_type=jnp.float32, precision=precision)
