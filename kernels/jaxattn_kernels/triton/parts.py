"""What the kernels on the Pallas Triton backend share: their sizes, rows of queries, blocks of keys.

Every call that exists only on Pallas's Triton backend is made in this file and in `launch.py` (`plgpu`).
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

from jaxattn_kernels.arrays import Tiles

# Softmax in base 2: the GPU has exp2, and log2(e) goes into the scale.
LOG2E = math.log2(math.e)
# The narrowest operand of a tensor-core product.
MIN_DOT = 16

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

    @classmethod
    def of_launch(
        cls, config: KernelConfig, q_shape: tuple[int, ...], num_kv_heads: int, tile_q: int
    ) -> Shape:
        """The sizes of a launch for tiles of `tile_q` tokens, from `[T, N, H]` and K."""
        T, N, H = q_shape
        block_q = max(1, min(tile_q, config.max_rows // (N // num_kv_heads)))
        return cls(T, N, num_kv_heads, H, tile_q, block_q, config.block_k)

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
    def items_per_unit(self) -> int:
        """Work items per unit: one per key head and per part of a tile that is too tall for one program."""
        return self.num_kv_heads * pl.cdiv(self.tile_q, self.block_q)

    def split_item(self, item: Any) -> tuple[Any, Any, Any]:
        """The unit of a work item, its key head, and its part of the tile."""
        K = self.num_kv_heads
        return item // self.items_per_unit, item % K, item % self.items_per_unit // K


def block_of(n: int) -> int:
    """The smallest block size that holds n: a power of two that a tensor-core product accepts."""
    return max(MIN_DOT, 1 << (n - 1).bit_length())


class Layer(NamedTuple):
    """What is static about a layer.

    Attributes:
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        windowed: Whether a token's range may begin after the sequence does.
    """

    page_size: int | None
    scale: float
    logits_soft_cap: float | None
    windowed: bool


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


def rows_of(tiles: Tiles, w, head, part, visible: Any, shape: Shape) -> Rows:
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
