"""What the Mosaic GPU kernels have in common, whatever the GPU: units, copies, masks, plain rows, results.

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

MAX_PROGRAMS = 2048
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


def dtype_obstacle(dtype: jax.typing.DTypeLike, kv_dtype: jax.typing.DTypeLike | None) -> str | None:
    """Why element types cannot be served; None where they can."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"dtype {name} is not one of {', '.join(DTYPES)}"
    kv_name = name if kv_dtype is None else jnp.dtype(kv_dtype).name
    if kv_name != name:
        return f"keys are {kv_name} and queries {name}; a product takes both in one type"
    return None


def copy_obstacle(rows: int, head_dim: int) -> str | None:
    """Why the rows of a consumer cannot be copied; None where they can."""
    if rows * head_dim % COPY_SIZE:
        return f"{rows} rows of {head_dim} numbers are no multiple of the {COPY_SIZE} that a copy brings"
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
        grid=(min(num_units, max(1, MAX_PROGRAMS // num_heads)), num_heads),
        grid_names=("unit", "head"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **options,
    )(*leaves)


def share(num_units: int, act: Callable[[Any], None]) -> None:
    """Do this program's share of the units."""
    first, stride = lax.axis_index("unit"), lax.axis_size("unit")
    if stride == num_units:
        act(first)
        return

    @pl.loop(0, pl.cdiv(num_units, stride))
    def _(i):
        unit = first + i * stride
        pl.when(unit < num_units)(lambda: act(unit))


def play(refs: Any, role: Callable[[Any, Unit], None]) -> None:
    """Play a role in each live unit of this program's, given its number and the unit."""

    @functools.partial(share, refs.plan.shape[0])
    def _(u):
        @pl.when(refs.plan[u, Unit._fields.index("q_len")] > 0)
        def _():
            role(u, Unit(*(refs.plan[u, i] for i in range(len(Unit._fields)))))


def one_memory(program: KernelProgram, *places: Any) -> Any:
    """Shared memory that is used in turns. The simulator sees a union as one piece, hence races in it."""
    return places if program.interpreted else plgpu.RefUnion(*places)


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


def has_strangers(program: KernelProgram, unit: Unit, j) -> jax.Array:
    """Whether block j has places that hold no key of the unit."""
    first_key, block_k = j * program.sizes.block_k, program.sizes.block_k
    return (first_key < unit.kv_start) | (unit.kv_end < first_key + block_k)


def clear_strangers(program: KernelProgram, unit: Unit, v_smem, j, mine: Any = True) -> None:
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

    @pl.when(has_strangers(program, unit, j) & mine)
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


def fetch_queries(
    program: KernelProgram, unit: Unit, head, me, barrier, *sources_and_rows: tuple[Any, Any]
) -> None:
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
        place = token_rows(program, rows, 0, program.tokens)
        plgpu.copy_gmem_to_smem(source.at[tokens, heads], place, barrier)
    plgpu.barrier_wait(barrier)


def row_ranges(program: KernelProgram, unit: Unit, me, refs: Arguments) -> tuple[Any, jax.Array]:
    """`[rows]` First key that each row of a consumer sees, None where it is key 0; and one past the last."""
    row_start = None if refs.row_start is None else row_numbers(program, refs.row_start.at[unit.tile, me])
    row_end = row_numbers(program, refs.row_end.at[unit.tile, me])
    if refs.partial is not None and program.page_size is None:  # units of packed keys may share a block
        assert row_start is not None
        row_start, row_end = jnp.maximum(row_start, unit.kv_start), jnp.minimum(row_end, unit.kv_end)
    return row_start, row_end


def row_numbers(program: KernelProgram, ref) -> jax.Array:
    """`[rows]`, each number where its row lies."""
    return plgpu.load(ref, layout=program.layout.reduce(1), optimized=False)


def mask(
    program: KernelProgram, s: jax.Array, first_key, row_start, row_end, otherwise: float = NEG
) -> jax.Array:
    """Scores, those of keys that a row does not see replaced."""
    key = first_key + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=program.layout)
    sees = key < across(row_end, s.shape)
    if row_start is not None:
        sees &= across(row_start, s.shape) <= key
    return jnp.where(sees, s, otherwise)


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


def finish(
    program: KernelProgram, unit: Unit, head, row_max: jax.Array, total: jax.Array, refs: Arguments
) -> tuple[jax.Array, jax.Array]:
    """`[rows]` twice: the factor on a row's sum of values, and its log-sum-exp in base 2, sink included.

    Args:
        program: What is static.
        unit: The unit.
        head: The key head.
        row_max: `[rows]` What weights are relative to.
        total: `[rows]` Their sum; 0 where no key was seen.
        refs: Arguments.
    """
    rescale = 1.0
    if refs.sinks is not None:  # a tile has its sink once: where it is split, the merge adds it
        num_kv_heads = refs.sinks.shape[0] - 1
        sink = row_numbers(program, refs.sinks.at[jnp.where(unit.is_whole == 1, head, num_kv_heads)])
        rescale, row_max, total = add_sink(row_max, total, sink)
    lse = jnp.where(total > 0, row_max + jnp.log2(total), -jnp.inf)
    return rescale / jnp.where(total > 0, total, 1.0), lse


def add_sink(row_max: jax.Array, total: jax.Array, sink: jax.Array) -> tuple[jax.Array, ...]:
    """Add to a softmax a key whose value is 0. What has seen no key has no sink.

    Args:
        row_max: Largest logit, in base 2.
        total: Sum of weights; 0 where no key was seen.
        sink: Logit of the sink, in base 2.

    Returns:
        The factor on sums of weights, the new maximum and the new total.
    """
    new_max = jnp.maximum(row_max, sink)
    rescale = jnp.exp2(row_max - new_max)
    return rescale, new_max, jnp.where(total > 0, total * rescale + jnp.exp2(sink - new_max), total)


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
        store(refs.lse.at[unit.tile, me, head], lse / LOG2E)
        begin = unit.q_start + first_token
        write_tokens(
            program, rows, num_tokens, write, lambda i, n, some: refs.out.at[pl.ds(begin + i, n), heads, some]
        )

    if refs.partial is None:
        return

    @pl.when(unit.is_whole == 0)
    def _():
        (place,), partial = partial_rows, refs.partial.out
        store(refs.partial.lse.at[u, me, head], lse)
        write_tokens(
            program, place, num_tokens, write,
            lambda i, n, some: partial.at[u, pl.ds(first_token + i, n), heads, some],
        )  # fmt: skip


def load_rows(program: KernelProgram, rows) -> jax.Array:
    """`[rows, columns]` of a consumer's plain rows."""
    if program.interpreted:
        return rows[...].reshape(-1, rows.shape[-1])[: program.rows]
    return plgpu.load(rows, layout=program.layout, optimized=False)


def store_rows(program: KernelProgram, rows, values: jax.Array) -> None:
    """Write `[rows, columns]` to a consumer's plain rows."""
    values = values.astype(rows.dtype)
    if program.interpreted:
        excess = math.prod(program.rows_shape) - program.rows
        rows[...] = jnp.pad(values, ((0, excess), (0, 0))).reshape(rows.shape)
    else:
        store(rows, values)


def token_rows(program: KernelProgram, rows, first, num_tokens: int):
    """Some tokens of plain rows, `[num_tokens, G, H]`, as copies take them."""
    if program.interpreted:
        return rows.at[pl.ds(first, num_tokens)]
    G = program.group_size
    return rows.at[pl.ds(first * G, num_tokens * G)].reshape(num_tokens, G, rows.shape[-1])


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
            plgpu.copy_smem_to_gmem(token_rows(program, rows, done, size), destination(done, size))

        done += here
    plgpu.wait_smem_to_gmem(0)


def store(ref, values: jax.Array) -> None:
    """Write, also where threads do not write neighbouring numbers, or not to different banks."""
    if hasattr(plgpu, "store"):  # since 0.12, which otherwise refuses it
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values
