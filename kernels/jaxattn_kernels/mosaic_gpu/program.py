"""What a program of the Mosaic GPU kernels is: its static sizes, its units, its arguments, its launch.

A program of either kernel is described by a `KernelProgram`, and what it does by a `Unit`. A *consumer* is a
warpgroup that attends, with as many rows as a product is high: each a pair of a token and a query head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
# A copy that is waited for brings a multiple of 128 bytes, here of 64 numbers.
COPY_SIZE = 64

MAX_MOSAIC_PROGRAMS = 2048
"""Programs of one launch, at most; beyond them, each takes several units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """Sizes of one kernel launch.

    Attributes:
        block_k: Keys per step of the loop.
        num_stages: Blocks of keys, and of values, that shared memory holds.
    """

    block_k: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelProgram:
    """What is static about a program.

    Attributes:
        tokens: Tokens of a consumer, at most.
        num_consumers: Consumers.
        rows: Rows of a consumer, in which its tokens stand with all heads of a group.
        layout: How these rows lie among the threads of a consumer.
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
    num_consumers: int
    rows: int
    layout: Any
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
    def rows_shape(self) -> tuple[int, ...]:
        """Of a consumer's plain rows; the simulator cannot view them as tokens, and is given tokens."""
        if self.interpreted:
            return pl.cdiv(self.rows, self.group_size), self.group_size
        return (self.rows,)

    @property
    def copy_rows(self) -> int:
        """Keys per copy: a page, or a block where pages are larger or there are none."""
        return min(self.page_size or self.sizes.block_k, self.sizes.block_k)

    @property
    def copies(self) -> int:
        """Copies per block of keys."""
        return self.sizes.block_k // self.copy_rows


class Unit(NamedTuple):
    """A tile and all its keys, or some of them. Keys are numbered as the program reads them.

    Attributes:
        tile: The tile.
        is_whole: Whether the unit has all its keys.
        q_start: First token.
        q_len: Tokens; 0 for a dead unit.
        key_base: The sequence's first entry in the page list, or, unpaged, the row of key 0.
        kv_start: First key of the unit.
        kv_end: One past its last.
        begin: First block of keys.
        num_blocks: Blocks of keys.
        all_begin: First block that every row sees whole, as it does those up to `all_end`.
        all_end: One past the last such block.
    """

    tile: jax.Array
    is_whole: jax.Array
    q_start: jax.Array
    q_len: jax.Array
    key_base: jax.Array
    kv_start: jax.Array
    kv_end: jax.Array
    begin: jax.Array
    num_blocks: jax.Array
    all_begin: jax.Array
    all_end: jax.Array


class Arguments(NamedTuple):
    """Arrays in the GPU's memory that a program reads and writes; in the kernel, references to them.

    Attributes:
        plan: `[U, fields of Unit]` The units, in the order in which programs take them.
        row_start: `[W, consumers, rows]` First key that each row of a tile sees; None where it is key 0.
        row_end: `[W, consumers, rows]` One past the last; a dead row sees none.
        sinks: `[K + 1, rows]` The sink of each row in base 2, and one that counts for nothing; or None.
        pages: `[P]` Page list, or None.
        q: `[T, N, H]` Queries.
        k: `[S, K, H]` Keys.
        v: `[S, K, H]` Values.
        out: `[T, N, H]` Outputs.
        lse: `[W, consumers, K, rows]` Log-sum-exp of each row. Outputs leave by the copy engine, which
            takes no less than 16 bytes; so these stay with the rows, and are sorted by token beside
            the kernel, where somebody reads them.
        partial: The results of units that are not whole, or None where no tile is split.
    """

    plan: Any
    row_start: Any
    row_end: Any
    sinks: Any
    pages: Any
    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    partial: Any


def unsupported_dtype(dtype: jax.typing.DTypeLike, kv_dtype: jax.typing.DTypeLike | None) -> str | None:
    """Why element types cannot be served; None where they can."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"dtype {name} is not one of {', '.join(DTYPES)}"
    kv_name = name if kv_dtype is None else jnp.dtype(kv_dtype).name
    if kv_name != name:
        return f"keys are {kv_name} and queries {name}; a product takes both in one type"
    return None


def unsupported_head_dim(head_dim: int, head_dims: tuple[int, ...]) -> str | None:
    """Why a size of a head cannot be served; None where it can."""
    if head_dim not in head_dims:
        return f"head_dim={head_dim} is not one of {', '.join(map(str, head_dims))}"
    return None


def unsupported_copy(rows: int, head_dim: int) -> str | None:
    """Why the rows of a consumer cannot be copied; None where they can."""
    if rows * head_dim % COPY_SIZE:
        return f"{rows} rows of {head_dim} numbers are no multiple of the {COPY_SIZE} that a copy brings"
    return None


def unsupported_page_size(page_size: int | None, blocks: Iterable[int]) -> str | None:
    """Why pages cannot be copied to blocks of so many keys; None where they can, or keys are packed."""
    if page_size is None:
        return None
    if page_size % TILE_ROWS:
        return f"page_size={page_size} is not a multiple of {TILE_ROWS}, the rows of a tile in shared memory"
    if any(page_size % block_k and block_k % page_size for block_k in blocks):
        return f"page_size={page_size} neither divides nor is a multiple of every block of {set(blocks)} keys"
    return None


def blank(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, interpret: Any) -> jax.Array:
    """Memory for a result. Interpreted, what nobody writes is NaN."""
    return lax.empty(shape, dtype) if interpret is None else jnp.full(shape, jnp.nan, dtype)


def run(body: Callable[..., None], arguments: Any, *, num_units: int, num_heads: int, **options) -> None:
    """Launch a kernel; its body gets the arguments as references, and then what is allocated for it.

    Args:
        body: What a program does.
        arguments: A pytree of arrays.
        num_units: Units, which programs share.
        num_heads: Heads, of which a program has one.
        **options: Further ones of `plgpu.kernel`.
    """
    leaves, structure = jax.tree.flatten(arguments)

    def kernel(*refs) -> None:
        body(structure.unflatten(refs[: len(leaves)]), *refs[len(leaves) :])

    plgpu.kernel(
        kernel,
        grid=(min(num_units, max(1, MAX_MOSAIC_PROGRAMS // num_heads)), num_heads),
        grid_names=("unit", "head"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **options,
    )(*leaves)


def for_own_units(num_units: int, act: Callable[[Any], None]) -> None:
    """Do this program's share of the units."""
    first, stride = lax.axis_index("unit"), lax.axis_size("unit")
    if stride == num_units:
        act(first)
        return

    @pl.loop(0, pl.cdiv(num_units, stride))
    def _(i):
        unit = first + i * stride
        pl.when(unit < num_units)(lambda: act(unit))


def for_live_units(refs: Any, role: Callable[[Any, Unit], None]) -> None:
    """Play a role in each live unit of this program's, given its number and the unit."""

    @functools.partial(for_own_units, refs.plan.shape[0])
    def _(u):
        @pl.when(refs.plan[u, Unit._fields.index("q_len")] > 0)
        def _():
            role(u, Unit(*(refs.plan[u, i] for i in range(len(Unit._fields)))))


def one_memory(program: KernelProgram, *places: Any) -> Any:
    """Shared memory that is used in turns. The simulator sees a union as one piece, hence races in it."""
    return places if program.interpreted else plgpu.RefUnion(*places)
