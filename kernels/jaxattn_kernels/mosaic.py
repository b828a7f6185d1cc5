"""Ragged attention on Pallas's Mosaic GPU backend: Hopper, its copy engine (TMA) and its `wgmma` products.

The same tile lists as for the Triton kernel, and the same rule: the ranges of visible keys are the
only mask. A program serves a unit, a tile or some of its keys, and one key head. Its warpgroups have
roles: a producer copies blocks of keys and values into shared memory, as far ahead as there is room, and
each consumer attends with 64 rows. A short tile has one consumer. A long one has two that take turns:
while one multiplies, the other computes its softmax. Where the keys of a tile are split among programs,
a second kernel merges their partial results.

Every call that exists only on the Mosaic GPU backend is made in this file, in `mosaic_parts.py` and in
`blackwell.py` (`plgpu`).
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
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.arrays import Attended, KeyLookup, TileList, VisibleRange
from jaxattn_kernels.mosaic_parts import (
    FLOOR,
    LOG2E,
    NEG,
    TILE_ROWS,
    KernelConfig,
    KernelProgram,
    across,
    clear_strangers,
    copy_tokens,
    dtype_obstacle,
    logits,
    page_obstacle,
    produce,
    store,
    token_rows,
)

INT32_MAX = 2**31 - 1

ROWS = 64
"""Rows of a consumer, each a pair of a token and a query head: the height of a `wgmma` product."""
HEAD_DIMS = (64, 80, 96, 128, 256)
# A copy that is waited for brings a multiple of 128 bytes, here of 64 numbers.
COPY_SIZE = 64

MERGED = 32
"""Partial results that a program of the merge loads at once."""
MAX_PROGRAMS = 2048
"""Programs of one launch, at most; beyond them, each takes several units."""

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


def obstacle(
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
    if reason := dtype_obstacle(dtype, kv_dtype):
        return reason
    if head_dim not in HEAD_DIMS:
        return f"head_dim={head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if group_size > ROWS:
        return f"a token's {group_size} query heads per key head exceed the {ROWS} rows of a product"
    rows = tokens_per_consumer(group_size) * group_size
    if rows * head_dim % COPY_SIZE:
        return f"{rows} rows of {head_dim} numbers are no multiple of the {COPY_SIZE} that a copy brings"
    return page_obstacle(page_size, {config_for(num_consumers=n, head_dim=head_dim).block_k for n in (1, 2)})


def ragged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: VisibleRange,
    lookup: KeyLookup,
    tile_lists: tuple[TileList, ...],
    *,
    sinks: jax.Array | None = None,
    page_size: int | None,
    scale: float,
    logits_soft_cap: float | None,
    windowed: bool,
    interpret: Any = None,
    config: KernelConfig | None = None,
) -> Attended:
    """Attend with every tile of every list; each row of the output is written by one tile.

    Args:
        q: `[T, N, H]` Queries, packed.
        k: `[S, K, H]` Keys on one flat axis, packed or pages one after the other.
        v: `[S, K, H]` Values.
        visible: Which keys each token sees.
        lookup: Where a sequence's keys lie.
        tile_lists: The tiles; of at most `tokens_per_consumer` tokens for one consumer, of at most
            twice as many for two. Where their keys are split, it is at multiples of `block_k`.
        sinks: `[N]` float32 One logit per query head that takes its share of the softmax and has no
            value; None for none.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        windowed: Whether a token's range may begin after the sequence does; otherwise
            `visible.start` is 0 everywhere.
        interpret: `plgpu.InterpretGPUParams` to simulate the GPU on a CPU; None to compile.
        config: Sizes of the launches; chosen by `config_for` where None.

    Returns:
        `out [T, N, H]` in the dtype of `q`, and `lse [T, N]`, a natural logarithm; 0 and -inf for a
        token that sees no key. Rows that no tile covers are undefined.

    Raises:
        NotImplementedError: If there is an `obstacle`.
    """
    (T, N, head_dim), K = q.shape, k.shape[1]
    group_size = N // K
    if reason := obstacle(
        dtype=q.dtype, kv_dtype=k.dtype, head_dim=head_dim, group_size=group_size, page_size=page_size
    ):
        raise NotImplementedError(reason)
    if remainder := -k.shape[0] % TILE_ROWS:  # whole tiles are copied
        k, v = (jnp.pad(x, ((0, remainder), (0, 0), (0, 0))) for x in (k, v))
    # All launches write into one buffer.
    out_ref = jax.new_ref(_blank(q.shape, q.dtype, interpret))
    lse = jnp.full((T, N), jnp.nan, jnp.float32)
    for tile_list in tile_lists:
        num_consumers = pl.cdiv(tile_list.block_q, tokens_per_consumer(group_size))
        program = _Program(
            tokens=tokens_per_consumer(group_size),
            group_size=group_size,
            head_dim=head_dim,
            num_consumers=num_consumers,
            page_size=page_size,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            # Packed keys are read from a multiple of eight on; what lies before the first is masked.
            masks_start=windowed or page_size is None,
            interpreted=interpret is not None,
            sizes=config or config_for(num_consumers=num_consumers, head_dim=head_dim),
        )
        lse_of_rows = _launch(program, q, k, v, visible, lookup, tile_list, sinks, out_ref, interpret)
        lse = _lse_of_tokens(program, tile_list, lse_of_rows, lse)
    return Attended(jax.freeze(out_ref), lse)


def tokens_per_consumer(group_size: int) -> int:
    """Tokens whose query heads, G for one key head, fill the rows of one consumer."""
    return ROWS // group_size


def _blank(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, interpret: Any) -> jax.Array:
    """Memory for a result. Interpreted, what nobody writes is NaN."""
    return lax.empty(shape, dtype) if interpret is None else jnp.full(shape, jnp.nan, dtype)


@dataclass(frozen=True, kw_only=True)
class _Program(KernelProgram):
    """What is static about a program; `tokens` are those of one consumer."""

    num_consumers: int

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Of a consumer's plain rows; the simulator cannot view them as tokens, and is given tokens."""
        if self.interpreted:
            return pl.cdiv(ROWS, self.group_size), self.group_size
        return (ROWS,)


class _Unit(NamedTuple):
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


class _Arguments(NamedTuple):
    """Arrays in the GPU's memory that a program reads and writes; in the kernel, references to them.

    Attributes:
        plan: `[U, fields of _Unit]` The units, in the order in which programs take them.
        row_start: `[W, consumers, ROWS]` First key that each row of a tile sees; None where it is key 0.
        row_end: `[W, consumers, ROWS]` One past the last; a dead row sees none.
        sinks: `[K + 1, ROWS]` The sink of each row in base 2, and one that counts for nothing; or None.
        pages: `[P]` Page list, or None.
        q: `[T, N, H]` Queries.
        k: `[S, K, H]` Keys.
        v: `[S, K, H]` Values.
        out: `[T, N, H]` Outputs.
        lse: `[W, consumers, K, ROWS]` Log-sum-exp of each row. Outputs leave by the copy engine, which
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


def _launch(
    program: _Program, q, k, v, visible, lookup, tile_list: TileList, sinks, out_ref, interpret
) -> jax.Array:
    """Run one list of tiles: write into `out_ref`, and return the log-sum-exp of the rows."""
    consumers, H, K = program.num_consumers, program.head_dim, k.shape[1]
    plan, row_start, row_end = _plan(program, visible, lookup, tile_list)
    num_units, num_tiles = plan.shape[0], row_end.shape[0]

    def blank(*shape: int) -> Any:
        return jax.new_ref(_blank(shape, jnp.float32, interpret))

    partial = None
    if tile_list.split is not None:
        room = max(num_units, MERGED)
        partial = Attended(
            out=blank(room, consumers * program.tokens, q.shape[1], H), lse=blank(room, consumers, K, ROWS)
        )
    arguments = _Arguments(
        plan=plan,
        row_start=row_start if program.masks_start else None,
        row_end=row_end,
        sinks=None if sinks is None else _sinks_of_rows(program, sinks),
        pages=lookup.pages,
        q=q,
        k=k,
        v=v,
        out=out_ref,
        lse=blank(num_tiles, consumers, K, ROWS),
        partial=partial,
    )
    _run(
        functools.partial(_kernel, program),
        arguments,
        grid=(min(num_units, max(1, MAX_PROGRAMS // K)), K),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(program, q.dtype, is_split=partial is not None),
        interpret=interpret,
    )
    if tile_list.split is not None:
        N = q.shape[1]
        merged = _MergeArguments(
            q_start=tile_list.tiles.q_start,
            q_len=tile_list.tiles.q_len,
            indptr=tile_list.split.indptr,
            sinks=None if sinks is None else sinks.astype(jnp.float32) * LOG2E,
            partial=partial,
            out=out_ref,
            lse=arguments.lse,
        )
        _run(
            functools.partial(_merge, program),
            merged,
            grid=(min(num_tiles, max(1, MAX_PROGRAMS // N)), N),
            interpret=interpret,
        )
    return jax.freeze(arguments.lse)


def _run(body: Callable[..., None], arguments: Any, **options) -> None:
    """Launch a kernel; its body gets the arguments as references, and then what is allocated for it."""
    leaves, structure = jax.tree.flatten(arguments)

    def kernel(*refs) -> None:
        body(structure.unflatten(refs[: len(leaves)]), *refs[len(leaves) :])

    plgpu.kernel(
        kernel,
        grid_names=("unit", "head"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **options,
    )(*leaves)


def _for_each(num_units: int, act: Callable[[Any], None]) -> None:
    """Do this program's share of the units."""
    first, stride = lax.axis_index("unit"), lax.axis_size("unit")
    if stride == num_units:
        act(first)
        return

    @pl.loop(0, pl.cdiv(num_units, stride))
    def _(i):
        unit = first + i * stride
        pl.when(unit < num_units)(lambda: act(unit))


def _scratch(program: _Program, dtype, *, is_split: bool) -> tuple[_Smem, _Barriers]:
    """Shared memory and barriers of a program."""
    sizes, consumers, H = program.sizes, program.num_consumers, program.head_dim
    blocks = plgpu.SMEM((sizes.num_stages, sizes.block_k, H), dtype, transforms=program.tiled)
    # Each consumer has its own part of both. The simulator sees a union as one piece, hence races in it.
    rows_or_q = (
        plgpu.SMEM((consumers, *program.rows_shape, H), dtype),
        plgpu.SMEM((consumers, ROWS, H), dtype, transforms=program.tiled),
    )
    if is_split:
        rows_or_q += (plgpu.SMEM((consumers, *program.rows_shape, H // 2), jnp.float32),)
    smem = _Smem(
        rows_or_q=rows_or_q if program.interpreted else plgpu.RefUnion(*rows_or_q),
        k=blocks,
        v=blocks,
    )
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


def _plan(program: _Program, visible, lookup, tile_list: TileList):
    """Gather what programs read of the metadata, of each unit and of each tile's rows.

    Returns:
        `plan`, `row_start` and `row_end`: see `_Arguments`.
    """
    block_k, G, tiles = program.sizes.block_k, program.group_size, tile_list.tiles

    def per_row(tile_values):
        return tile_values[:, None, None]

    consumer = jnp.arange(program.num_consumers, dtype=jnp.int32)[None, :, None]
    row = jnp.arange(ROWS, dtype=jnp.int32)[None, None, :]
    token = consumer * program.tokens + row // G  # of each row, in its tile
    live = (row < program.tokens * G) & (token < per_row(tiles.q_len))
    place = per_row(tiles.q_start) + token
    row_start = jnp.where(live, visible.start.at[place].get(mode="clip"), 0)
    row_end = jnp.where(live, visible.end.at[place].get(mode="clip"), 0)
    num_tiles, split = tiles.seq.shape[0], tile_list.split
    tile = jnp.arange(num_tiles, dtype=jnp.int32) if tile_list.order is None else tile_list.order
    in_order = split is None and tile_list.order is None
    if split is not None:
        tile = jnp.minimum(split.tile, num_tiles - 1)

    def of_unit(of_tile):
        return of_tile if in_order else of_tile[tile]

    q_len, first, end, is_whole = of_unit(tiles.q_len), of_unit(tiles.kv_start), of_unit(tiles.kv_end), True
    if split is not None:
        q_len, is_whole = jnp.where(split.tile < num_tiles, q_len, 0), of_unit(jnp.diff(split.indptr)) == 1
        first, end = split.kv_start, split.kv_end
    key_base = of_unit(lookup.start[tiles.seq])
    if program.page_size is None:
        # Key 0 of what the program reads lies at a multiple of eight.
        shift = key_base % TILE_ROWS
        first, end, key_base = first + shift, end + shift, key_base - shift
        shift = jnp.where(live, per_row(lookup.start[tiles.seq] % TILE_ROWS), 0)
        row_start, row_end = row_start + shift, row_end + shift
    begin = first // block_k
    stop = jnp.where(end > first, (end + (block_k - 1)) // block_k, begin)
    all_begin = jnp.maximum(of_unit(row_start.max(axis=(1, 2))), first)
    all_end = jnp.minimum(of_unit(jnp.where(live, row_end, INT32_MAX).min(axis=(1, 2))), end)
    plan = _Unit(
        tile=tile,
        is_whole=jnp.broadcast_to(is_whole, tile.shape).astype(jnp.int32),
        q_start=of_unit(tiles.q_start),
        q_len=q_len,
        key_base=key_base,
        kv_start=first,
        kv_end=end,
        begin=begin,
        num_blocks=stop - begin,
        all_begin=(all_begin + (block_k - 1)) // block_k,
        all_end=all_end // block_k,
    )
    return jnp.stack(plan, axis=1), row_start, row_end


def _sinks_of_rows(program: _Program, sinks: jax.Array) -> jax.Array:
    """`[K + 1, ROWS]` The sink of each row of a consumer, in base 2; at last one that counts for nothing."""
    head = jnp.arange(ROWS, dtype=jnp.int32) % program.group_size
    sinks = sinks.astype(jnp.float32).reshape(-1, program.group_size)[:, head] * LOG2E
    return jnp.pad(sinks, ((0, 1), (0, 0)), constant_values=NEG)


def _lse_of_tokens(program: _Program, tile_list: TileList, lse_of_rows, lse: jax.Array) -> jax.Array:
    """`[T, N]` The log-sum-exp of the tokens of a list; that of other tokens is left as it is."""
    tiles, (_, consumers, K, _), (T, N) = tile_list.tiles, lse_of_rows.shape, lse.shape
    token = jnp.arange(consumers * program.tokens, dtype=jnp.int32)[None, :]
    place = jnp.where(token < tiles.q_len[:, None], tiles.q_start[:, None] + token, T)
    consumer = jnp.arange(tiles.seq.shape[0], dtype=jnp.int32)[:, None] * consumers + token // program.tokens
    first_row = consumer * (K * ROWS) + token % program.tokens * program.group_size
    # The same for all layers of a step: the compiler keeps one, and none where nobody reads the result.
    first_row = jnp.full((T,), -1, jnp.int32).at[place].set(first_row, mode="drop")[:, None]
    head = jnp.arange(N, dtype=jnp.int32)
    row = first_row + (head // program.group_size * ROWS + head % program.group_size)[None, :]
    return jnp.where(first_row >= 0, lse_of_rows.reshape(-1).at[row].get(mode="clip"), lse)


def _kernel(program: _Program, refs: _Arguments, smem: _Smem, barriers: _Barriers) -> None:
    """Give the warpgroups their roles."""
    head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    consumers = program.num_consumers

    def play(role: Callable[[jax.Array, _Unit], None]) -> None:
        @functools.partial(_for_each, refs.plan.shape[0])
        def _(u):
            @pl.when(refs.plan[u, _Unit._fields.index("q_len")] > 0)
            def _():
                role(u, _Unit(*(refs.plan[u, i] for i in range(len(_Unit._fields)))))

    @pl.when(warpgroup < consumers)
    def _():
        if consumers == 2:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        play(lambda u, unit: _consume(program, u, unit, head, warpgroup, refs, smem, barriers))

    @pl.when(warpgroup == consumers)
    def _():
        if consumers == 2:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        play(lambda u, unit: produce(program, unit, head, refs.pages, refs.k, refs.v, smem, barriers))


def _consume(
    program: _Program, u, unit: _Unit, head, me, refs: _Arguments, smem: _Smem, barriers: _Barriers
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
    first_token, heads = me * program.tokens, pl.ds(head * program.group_size, program.group_size)
    rows, q_smem, *partial_rows = (ref.at[me] for ref in smem.rows_or_q)
    # `[ROWS]` First visible key of each row, and one past the last.
    row_start = None if refs.row_start is None else _row_numbers(refs.row_start.at[unit.tile, me])
    row_end = _row_numbers(refs.row_end.at[unit.tile, me])
    if refs.partial is not None and program.page_size is None:  # units of packed keys may share a block
        assert row_start is not None
        row_start, row_end = jnp.maximum(row_start, unit.kv_start), jnp.minimum(row_end, unit.kv_end)

    plgpu.copy_gmem_to_smem(
        refs.q.at[pl.ds(unit.q_start + first_token, program.tokens), heads],
        token_rows(program, rows, 0, program.tokens),
        barriers.q_ready.at[me],
    )
    plgpu.barrier_wait(barriers.q_ready.at[me])
    q_smem[...] = _load_rows(program, rows)
    plgpu.commit_smem()

    def take_turns():
        if program.num_consumers == 2:
            plgpu.barrier_arrive(barriers.turn)
            plgpu.barrier_wait(barriers.turn)

    def mask(s, first_key):
        key = first_key + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
        sees = key < across(row_end, s.shape)
        if row_start is not None:
            sees &= across(row_start, s.shape) <= key
        return jnp.where(sees, s, NEG)

    def attend_block(i, state):
        acc, row_max, total = state
        stage, j = lax.rem(i, jnp.int32(sizes.num_stages)), unit.begin + i
        plgpu.barrier_wait(barriers.k_ready.at[stage])
        s = _scores(program, q_smem, smem.k.at[stage], while_running=take_turns)
        plgpu.barrier_arrive(barriers.k_free.at[stage])
        s = logits(program, s)
        sees_all = (unit.all_begin <= j) & (j < unit.all_end)
        s = lax.cond(sees_all, lambda s: s, lambda s: mask(s, j * block_k), s)
        new_max = jnp.maximum(row_max, s.max(axis=1))
        rescale = jnp.exp2(row_max - new_max)
        p = jnp.exp2(s - across(jnp.maximum(new_max, FLOOR), s.shape))
        total = total * rescale + p.sum(axis=1)
        acc = acc * across(rescale, acc.shape)

        if program.num_consumers == 2:
            plgpu.barrier_arrive(barriers.turn)
        plgpu.barrier_wait(barriers.v_ready.at[stage])
        # For both consumers: the second is half a step behind, and multiplies when the first has given up
        # its turn.
        clear_strangers(program, unit, smem.v.at[stage], j, mine=me == 0)
        if program.num_consumers == 2:
            plgpu.barrier_wait(barriers.turn)
        acc = _add_values(program, acc, p.astype(refs.q.dtype), smem.v.at[stage])
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

    rescale = 1.0
    if refs.sinks is not None:  # a tile has its sink once: where it is split, the merge adds it
        num_kv_heads = refs.sinks.shape[0] - 1
        sink = _row_numbers(refs.sinks.at[jnp.where(unit.is_whole == 1, head, num_kv_heads)])
        rescale, row_max, total = _add_sink(row_max, total, sink)
    out = acc * across(rescale / jnp.where(total > 0, total, 1.0), acc.shape)
    lse = jnp.where(total > 0, row_max + jnp.log2(total), -jnp.inf)
    num_tokens = jnp.clip(unit.q_len - first_token, 0, program.tokens)

    @pl.when(unit.is_whole == 1)
    def _():
        store(refs.lse.at[unit.tile, me, head], lse / LOG2E)
        _store_rows(program, rows, out.astype(refs.out.dtype))
        begin = unit.q_start + first_token
        copy_tokens(program, rows, num_tokens, lambda i, n: refs.out.at[pl.ds(begin + i, n), heads])

    if refs.partial is None:
        return

    @pl.when(unit.is_whole == 0)
    def _():
        (place,), partial = partial_rows, refs.partial.out
        store(refs.partial.lse.at[u, me, head], lse)
        for half in (0, H // 2):  # numbers of 32 bits in the memory of as many of 16
            _store_rows(program, place, out[:, half : half + H // 2])
            columns = pl.ds(half, H // 2)
            copy_tokens(
                program, place, num_tokens,
                lambda i, n, columns=columns: partial.at[u, pl.ds(first_token + i, n), heads, columns],
            )  # fmt: skip


def _add_sink(row_max: jax.Array, total: jax.Array, sink: jax.Array) -> tuple[jax.Array, ...]:
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


class _MergeArguments(NamedTuple):
    """Arrays in the GPU's memory that a program of the merge reads and writes.

    Attributes:
        q_start: `[W]` First token of each tile.
        q_len: `[W]` Its tokens.
        indptr: `[W + 1]` Prefix sums of its units.
        sinks: `[N]` Sinks in base 2, or None.
        partial: `out [units, tokens, N, H]` and, in base 2, `lse [units, consumers, K, ROWS]`.
        out: `[T, N, H]` Outputs.
        lse: `[W, consumers, K, ROWS]` Log-sum-exp of each row.
    """

    q_start: Any
    q_len: Any
    indptr: Any
    sinks: Any
    partial: Any
    out: Any
    lse: Any


def _merge(program: _Program, refs: _MergeArguments) -> None:
    """One query head of a tile whose keys were split: the partial results of its units, a row each.

    A unit has few rows and a tile may have hundreds of units: so here they stand one under the other, and
    many are loaded at once.
    """
    G, H, head = program.group_size, program.head_dim, lax.axis_index("head")
    room = refs.partial.out.shape[0]
    # A warp has a quarter of a tile's columns, and all of its rows: so sums of rows stay in it. A thread has
    # four neighbouring numbers, 16 bytes, or two where a quarter is only four columns wide (heads of 80). The
    # fewer threads a row takes, the more rows a warp has at once.
    quarter = program.tile_columns // 4
    each = min(4, quarter // 2)
    rows = 32 * each // quarter
    tiling = plgpu.Tiling(((rows, 4 * quarter), (rows, quarter), (each,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)

    def merge_token(w, token):
        me, row = token // program.tokens, token % program.tokens * G + head % G
        first, end = refs.indptr[w], refs.indptr[w + 1]

        def add_units(i, state):
            acc, top, total = state
            begin = first + i * MERGED
            place = jnp.minimum(begin, room - MERGED)

            def mine(shape, layout):
                unit = place + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
                return (begin <= unit) & (unit < end)

            units, of_unit = pl.ds(place, MERGED), layout.reduce(1)
            lse_ref, out_ref = refs.partial.lse, refs.partial.out
            lse = plgpu.load(lse_ref.at[units, me, head // G, row], layout=of_unit, optimized=False)
            out = plgpu.load(out_ref.at[units, token, head], layout=layout, optimized=False)
            lse = jnp.where(mine((MERGED,), of_unit), lse, -jnp.inf)
            out = jnp.where(mine((MERGED, H), layout), out, 0.0)  # what nobody wrote may be NaN
            new_top = jnp.maximum(top, lse.max())
            weight, rescale = jnp.exp2(lse - new_top), jnp.exp2(top - new_top)
            weights = plgpu.layout_cast(across(weight, (MERGED, H)), layout)
            acc = acc * rescale + (out * weights).sum(axis=0)
            return acc, new_top, total * rescale + weight.sum()

        acc = plgpu.layout_cast(jnp.zeros((H,), jnp.float32), layout.reduce(0))
        state = acc, jnp.float32(NEG), jnp.float32(0)
        acc, top, total = lax.fori_loop(0, (end - first + (MERGED - 1)) // MERGED, add_units, state)
        rescale = 1.0
        if refs.sinks is not None:
            rescale, top, total = _add_sink(top, total, refs.sinks[head])
        out = acc * (rescale / jnp.where(total > 0, total, 1.0))
        store(refs.out.at[refs.q_start[w] + token, head], out.astype(refs.out.dtype))
        refs.lse[w, me, head // G, row] = jnp.where(total > 0, (top + jnp.log2(total)) / LOG2E, -jnp.inf)

    @functools.partial(_for_each, refs.q_len.shape[0])
    def _(w):
        @pl.when(refs.indptr[w + 1] - refs.indptr[w] > 1)
        def _():
            pl.loop(0, refs.q_len[w])(lambda token: merge_token(w, token))


def _row_numbers(ref) -> jax.Array:
    """`[ROWS]`, each number where the row of a product lies."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _scores(program: _Program, q_smem, k_smem, while_running: Callable[[], None]) -> jax.Array:
    """`q @ k.T`, `[ROWS, block_k]`, and something to do while the tensor cores are at it."""
    if program.interpreted:
        while_running()
        return _simulated_product(q_smem[...], k_smem[...].T)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, q_smem, k_smem.transpose((1, 0)))
        while_running()
        return acc_ref[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, program.sizes.block_k), jnp.float32))


def _add_values(program: _Program, acc: jax.Array, p: jax.Array, v_smem) -> jax.Array:
    """`acc + p @ v`, in place: p and acc lie in registers."""
    if program.interpreted:
        return acc + _simulated_product(p, v_smem[...])
    in_place: Any = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, p, v_smem))
    return in_place(plgpu.WGMMAAccumulatorRef.init(acc))


def _simulated_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of loaded values. What `wgmma` reads, the simulator does not check for races."""
    plgpu.commit_smem()  # unlike a read by `wgmma`, a load is unknown to the copy that overwrites the place
    return lax.dot(a, b, preferred_element_type=jnp.float32)


def _load_rows(program: _Program, rows) -> jax.Array:
    """`[ROWS, H]` of a consumer's plain rows."""
    if program.interpreted:
        return rows[...].reshape(-1, program.head_dim)[:ROWS]
    return plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)


def _store_rows(program: _Program, rows, values: jax.Array) -> None:
    """Write `[ROWS, H]` to a consumer's plain rows."""
    if program.interpreted:
        excess = math.prod(program.rows_shape) - ROWS
        rows[...] = jnp.pad(values, ((0, excess), (0, 0))).reshape(rows.shape)
    else:
        store(rows, values)
