"""Ragged attention on Pallas's Mosaic GPU backend: Blackwell, its copy engine (TMA), its `tcgen05` products.

The same tile lists and the same rule as for the Hopper kernel (`mosaic.py`): the ranges of visible keys are
the only mask. One program serves one tile and one key head, with 128 rows. Scores, weights and outputs lie
in tensor memory, where products write. Three warpgroups have roles: one copies blocks of keys and values
into shared memory, one issues the products, and one computes the softmax, a row per thread. While it is at
the weights of a block, the scores of the next one are multiplied.

Every call that exists only on the Mosaic GPU backend is made in this file, in `mosaic_parts.py`
and in `mosaic.py` (`plgpu`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.arrays import Attended, KeyLookup, TileArrays, TileList, VisibleRange
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

ROWS = 128
"""Rows of a program, each a pair of a token and a query head: the height of a `tcgen05` product, and the
threads of a warpgroup."""
HEAD_DIMS = (64, 128, 256)
# Most query heads per key head, so that the longer of two kinds of tiles, of two tokens at least, fits.
MAX_GROUP = ROWS // 2
# Columns of tensor memory that the softmax warpgroup moves at a time, to spare registers.
COLUMNS = 64
# Weights may reach this power of two before outputs are rescaled to a new maximum: 16-bit numbers are as
# precise there as at 1, and after a row's first blocks its maximum seldom grows by so much.
GROWTH = 8.0

SOFTMAX, PRODUCER, PRODUCTS = range(3)  # the warpgroups
# A multiprocessor has 65,536 registers: 168 for each of 384 threads, and the softmax gets more of them.
PRODUCER_REGISTERS = 80
PRODUCTS_REGISTERS = 152
SOFTMAX_REGISTERS = 240

# A thread has a row, so that sums and maxima of rows need no exchange.
NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE


def config_for(*, head_dim: int) -> KernelConfig:
    """The sizes that fit in shared and tensor memory and compile without spilling registers (tests/compile).

    Args:
        head_dim: Size of a head.
    """
    if head_dim > 128:
        return KernelConfig(block_k=64, num_stages=2)
    return KernelConfig(block_k=128, num_stages=4 if head_dim == 64 else 3)


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
    if group_size > MAX_GROUP:
        return f"two tokens' {group_size} query heads per key head exceed the {ROWS} rows of a product"
    return page_obstacle(page_size, {config_for(head_dim=head_dim).block_k})


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
    """Attend with every tile of every list; each row of the output is written by one program.

    Args:
        q: `[T, N, H]` Queries, packed.
        k: `[S, K, H]` Keys on one flat axis, packed or pages one after the other.
        v: `[S, K, H]` Values.
        visible: Which keys each token sees.
        lookup: Where a sequence's keys lie.
        tile_lists: The tiles, each of at most `ROWS` rows. How their keys may be split is not read: one
            program attends to all keys of a tile.
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
        token that sees no key. Outputs of rows that no tile covers are undefined.

    Raises:
        NotImplementedError: If there is an `obstacle`.
        ValueError: If tiles have more rows than a program.
    """
    (T, N, H), K = q.shape, k.shape[1]
    G = N // K
    if reason := obstacle(dtype=q.dtype, kv_dtype=k.dtype, head_dim=H, group_size=G, page_size=page_size):
        raise NotImplementedError(reason)
    if remainder := -k.shape[0] % TILE_ROWS:  # whole tiles are copied
        k, v = (jnp.pad(x, ((0, remainder), (0, 0), (0, 0))) for x in (k, v))
    # All launches write into one buffer. Interpreted, a row that none of them writes is NaN.
    blank = lax.empty(q.shape, q.dtype) if interpret is None else jnp.full(q.shape, jnp.nan, q.dtype)
    out_ref = jax.new_ref(blank)
    lse = jnp.full((T, K, G), -jnp.inf, jnp.float32)
    for tile_list in tile_lists:
        program = _Program(
            tokens=tile_list.block_q,
            group_size=G,
            head_dim=H,
            page_size=page_size,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            # Packed keys are read from a multiple of eight on; what lies before the first is masked.
            masks_start=windowed or page_size is None,
            has_sinks=sinks is not None,
            interpreted=interpret is not None,
            sizes=config or config_for(head_dim=H),
        )
        if program.tokens * G > ROWS:
            raise ValueError(f"tiles of {program.tokens} tokens with {G} heads each exceed {ROWS} rows")
        rows = _launch(program, q, k, v, visible, lookup, tile_list, sinks, out_ref, interpret)
        lse = lse.at[rows.token, :, rows.head].set(rows.lse, mode="drop")
    return Attended(jax.freeze(out_ref), lse.reshape(T, N))


@dataclass(frozen=True, kw_only=True)
class _Program(KernelProgram):
    """What is static about a program; `tokens` are those of a tile, at most."""

    has_sinks: bool

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Of plain rows; the simulator cannot view them as tokens, and is given tokens."""
        if self.interpreted:
            return pl.cdiv(ROWS, self.group_size), self.group_size, self.head_dim
        return ROWS, self.head_dim


class _Tile(NamedTuple):
    """What a program has to know of its tile. Keys are numbered as the program reads them.

    Attributes:
        q_start: First token.
        q_len: Tokens; 0 for a dead tile.
        key_base: The sequence's first entry in the page list, or, unpaged, the row of key 0.
        kv_start: First key that any row sees.
        kv_end: One past the last.
        begin: First block of keys.
        num_blocks: Blocks of keys.
        all_begin: First block that every row sees whole, as it does those up to `all_end`.
        all_end: One past the last such block.
    """

    q_start: jax.Array
    q_len: jax.Array
    key_base: jax.Array
    kv_start: jax.Array
    kv_end: jax.Array
    begin: jax.Array
    num_blocks: jax.Array
    all_begin: jax.Array
    all_end: jax.Array


class _Rows(NamedTuple):
    """The rows of W tiles, of which one holds token `r // G` and query head `r % G` of the group.

    Attributes:
        token: `[W, ROWS]` The token; T for a dead row.
        head: `[1, ROWS]` The query head.
        lse: `[W, ROWS, K]` Natural logarithms of the denominators.
    """

    token: jax.Array
    head: jax.Array
    lse: jax.Array


class _Smem(NamedTuple):
    """Shared memory of a program.

    Products read tiles of eight rows, and a copy into such tiles must begin at a multiple of eight rows of
    its source: right for keys in pages, and wrong for queries, whose tokens begin anywhere. Queries
    therefore arrive, and outputs leave, in plain rows.
    """

    rows: Any  # [ROWS, H], plain
    k: Any  # [num_stages, block_k, H], tiled
    v: Any  # [num_stages, block_k, H], tiled


class _Tmem(NamedTuple):
    """Tensor memory of a program: 128 lanes, one per row, of 512 columns of 32 bits."""

    q: Any  # [ROWS, H], two to a column
    scores: Any  # [ROWS, block_k] float32
    weights: Any  # [ROWS, block_k], two to a column
    out: Any  # [ROWS, H] float32


class _Barriers(NamedTuple):
    """What the warpgroups of a program wait for."""

    q_copied: Any  # queries are in shared memory
    q_ready: Any  # queries are in tensor memory
    k_ready: Any  # per stage: the keys have arrived
    v_ready: Any
    k_free: Any  # per stage: the product has read the keys
    v_free: Any
    scores_ready: Any
    scores_free: Any  # the softmax has read them
    weights_ready: Any  # and outputs are rescaled, and values cleared
    out_ready: Any  # the product has added to the outputs, hence read the weights


def _launch(
    program: _Program, q, k, v, visible, lookup, tile_list: TileList, sinks, out_ref, interpret
) -> _Rows:
    """Run one list of tiles; writes outputs into `out_ref`."""
    sizes, (T, _, H), K = program.sizes, q.shape, k.shape[1]
    tiles = tile_list.tiles
    if (order := tile_list.order) is not None:
        tiles = TileArrays(*(x[order] for x in tiles))
    plan, token, row_start, row_end = _plan(program, visible, lookup, tiles)
    head = jnp.arange(ROWS, dtype=jnp.int32)[None] % program.group_size
    inputs = [plan, row_end]
    inputs += [row_start] if program.masks_start else []
    inputs += [lookup.pages] if lookup.pages is not None else []
    if sinks is not None:
        sinks = jnp.maximum(sinks.astype(jnp.float32) * LOG2E, NEG).reshape(K, program.group_size)
        inputs += [sinks[:, head[0]]]
    lse_ref = jax.new_ref(jnp.zeros((plan.shape[0], K, ROWS), jnp.float32))

    blocks = plgpu.SMEM((sizes.num_stages, sizes.block_k, H), q.dtype, transforms=program.tiled)
    arrived = plgpu.Barrier(num_arrivals=program.copies, num_barriers=sizes.num_stages)
    released = plgpu.Barrier(num_barriers=sizes.num_stages, orders_tensor_core=True)
    step = plgpu.Barrier(orders_tensor_core=True)
    plgpu.kernel(
        functools.partial(_kernel, program),
        grid=(plan.shape[0], K),
        grid_names=("tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=(
            _Smem(rows=plgpu.SMEM(program.rows_shape, q.dtype), k=blocks, v=blocks),
            _Tmem(
                q=plgpu.TMEM((ROWS, H), q.dtype, packed=True),
                scores=plgpu.TMEM((ROWS, sizes.block_k), jnp.float32),
                weights=plgpu.TMEM((ROWS, sizes.block_k), q.dtype, packed=True),
                out=plgpu.TMEM((ROWS, H), jnp.float32),
            ),
            _Barriers(
                q_copied=plgpu.Barrier(),
                q_ready=step,
                k_ready=arrived,
                v_ready=arrived,
                k_free=released,
                v_free=released,
                scores_ready=step,
                scores_free=step,
                weights_ready=step,
                out_ready=step,
            ),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(*inputs, q, k, v, out_ref, lse_ref)
    return _Rows(jnp.where(token < 0, T, token), head, jax.freeze(lse_ref).transpose(0, 2, 1))


def _plan(program: _Program, visible, lookup, tiles: TileArrays):
    """Gather each tile's part of the metadata.

    Returns:
        `[W, fields of _Tile]` The tiles; and three times `[W, ROWS]`: the token of each row, -1 for a dead
        one, and the first and one past the last key that it sees, none if it is dead.
    """
    block_k = program.sizes.block_k
    token = jnp.arange(ROWS, dtype=jnp.int32)[None] // program.group_size  # of each row, in its tile
    live = token < tiles.q_len[:, None]
    token = jnp.where(live, tiles.q_start[:, None] + token, -1)
    row_start = jnp.where(live, visible.start.at[token].get(mode="clip"), 0)
    row_end = jnp.where(live, visible.end.at[token].get(mode="clip"), 0)
    first, end, key_base = tiles.kv_start, tiles.kv_end, lookup.start[tiles.seq]
    if program.page_size is None:
        # Key 0 of what the program reads lies at a multiple of eight.
        shift = key_base % TILE_ROWS
        first, end, key_base = first + shift, end + shift, key_base - shift
        row_start += jnp.where(live, shift[:, None], 0)
        row_end += jnp.where(live, shift[:, None], 0)
    begin = first // block_k
    stop = jnp.where(end > first, (end + (block_k - 1)) // block_k, begin)
    least_end = jnp.where(live, row_end, end[:, None]).min(axis=1)
    plan = _Tile(
        q_start=tiles.q_start,
        q_len=tiles.q_len,
        key_base=key_base,
        kv_start=first,
        kv_end=end,
        begin=begin,
        num_blocks=stop - begin,
        all_begin=(row_start.max(axis=1) + (block_k - 1)) // block_k,
        all_end=least_end // block_k,
    )
    return jnp.stack(plan, axis=1), token, row_start, row_end


def _kernel(program: _Program, plan_ref, row_end_ref, *refs) -> None:
    """Unpack the references, in the order of `_launch`, and give the warpgroups their roles."""
    row_start_ref, refs = (refs[0], refs[1:]) if program.masks_start else (None, refs)
    pages_ref, refs = (refs[0], refs[1:]) if program.page_size is not None else (None, refs)
    sink_ref, refs = (refs[0], refs[1:]) if program.has_sinks else (None, refs)
    q_ref, k_ref, v_ref, o_ref, lse_ref, smem, tmem, barriers = refs

    w, head, warpgroup = lax.axis_index("tile"), lax.axis_index("head"), lax.axis_index("warpgroup")

    @pl.when(plan_ref[w, _Tile._fields.index("q_len")] > 0)
    def _():
        tile = _Tile(*(plan_ref[w, i] for i in range(len(_Tile._fields))))

        @pl.when(warpgroup == SOFTMAX)
        def _():
            row_start = None if row_start_ref is None else _row_numbers(row_start_ref.at[w])
            row_end = _row_numbers(row_end_ref.at[w])
            sink = None if sink_ref is None else _row_numbers(sink_ref.at[head])
            _attend(
                program, tile, head, row_start, row_end, sink, q_ref, o_ref, lse_ref.at[w, head],
                smem, tmem, barriers,
            )  # fmt: skip

        @pl.when(warpgroup == PRODUCER)
        def _():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            produce(program, tile, head, pages_ref, k_ref, v_ref, smem, barriers)

        @pl.when(warpgroup == PRODUCTS)
        def _():
            _multiply(program, tile, smem, tmem, barriers)


def _multiply(program: _Program, tile: _Tile, smem: _Smem, tmem: _Tmem, barriers: _Barriers) -> None:
    """Issue the products: the scores of a block before the outputs of the one before it."""
    plgpu.set_max_registers(PRODUCTS_REGISTERS, action="decrease")

    def stage_of(i):
        return lax.rem(i, jnp.int32(program.sizes.num_stages))

    def scores(i):
        stage = stage_of(i)
        plgpu.barrier_wait(barriers.k_ready.at[stage])
        plgpu.tcgen05_mma(tmem.scores, tmem.q, smem.k.at[stage].transpose((1, 0)), accumulate=False)
        plgpu.tcgen05_commit_arrive(barriers.k_free.at[stage])
        plgpu.tcgen05_commit_arrive(barriers.scores_ready)

    plgpu.barrier_wait(barriers.q_ready)
    pl.when(tile.num_blocks > 0)(lambda: scores(jnp.int32(0)))

    @pl.loop(0, tile.num_blocks)
    def _(i):
        plgpu.barrier_wait(barriers.scores_free)
        pl.when(i + 1 < tile.num_blocks)(lambda: scores(i + 1))
        stage = stage_of(i)
        plgpu.barrier_wait(barriers.v_ready.at[stage])
        clear_strangers(program, tile, smem.v.at[stage], tile.begin + i)
        plgpu.barrier_wait(barriers.weights_ready)
        plgpu.tcgen05_mma(tmem.out, tmem.weights, smem.v.at[stage], accumulate=i > 0)
        plgpu.tcgen05_commit_arrive(barriers.v_free.at[stage])
        plgpu.tcgen05_commit_arrive(barriers.out_ready)


def _attend(
    program: _Program,
    tile: _Tile,
    head,
    row_start,
    row_end,
    sink,
    q_ref,
    o_ref,
    lse_ref,
    smem: _Smem,
    tmem: _Tmem,
    barriers: _Barriers,
) -> None:
    """Online softmax of the rows over the tile's keys.

    Row r is token `r // G` of the tile and query head `head * G + r % G`.

    Args:
        program: What is static.
        tile: The tile.
        head: The key head.
        row_start: `[ROWS]` First visible key of each row, or None where it is key 0.
        row_end: `[ROWS]` One past the last.
        sink: `[ROWS]` Logit of each row's sink in base 2, or None for none.
        q_ref: `[T, N, H]` Queries.
        o_ref: `[T, N, H]` Outputs.
        lse_ref: `[ROWS]` Logarithms of the denominators.
        smem: Shared memory.
        tmem: Tensor memory.
        barriers: Barriers.
    """
    block_k = program.sizes.block_k
    columns = [pl.ds(first, COLUMNS) for first in range(0, program.head_dim, COLUMNS)]
    heads = pl.ds(head * program.group_size, program.group_size)
    plgpu.set_max_registers(SOFTMAX_REGISTERS, action="increase")

    plgpu.copy_gmem_to_smem(
        q_ref.at[pl.ds(tile.q_start, program.tokens), heads],
        token_rows(program, smem.rows, 0, program.tokens),
        barriers.q_copied,
    )
    plgpu.barrier_wait(barriers.q_copied)
    for part in columns:
        plgpu.async_store_tmem(tmem.q.at[:, part], _load_rows(program, smem.rows, part))
    plgpu.commit_tmem()
    plgpu.barrier_arrive(barriers.q_ready)

    def mask(s, first_key):
        key = first_key + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=NATIVE)
        sees = key < across(row_end, s.shape)
        if row_start is not None:
            sees &= across(row_start, s.shape) <= key
        return jnp.where(sees, s, NEG)

    def rescale_out(factor):
        for part in columns:
            old = plgpu.async_load_tmem(tmem.out.at[:, part], layout=NATIVE)
            plgpu.wait_load_tmem()
            plgpu.async_store_tmem(tmem.out.at[:, part], old * across(factor, old.shape))

    def attend_block(i, state):
        row_max, total = state  # the maximum that weights are relative to, and their sum
        j = tile.begin + i
        plgpu.barrier_wait(barriers.scores_ready)
        s = plgpu.async_load_tmem(tmem.scores, layout=NATIVE)
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(barriers.scores_free)
        s = logits(program, s)
        sees_all = (tile.all_begin <= j) & (j < tile.all_end)
        s = lax.cond(sees_all, lambda s: s, lambda s: mask(s, j * block_k), s)
        new_max = s.max(axis=1)
        grows = new_max > row_max + GROWTH
        new_max = jnp.where(grows, new_max, row_max)
        rescale = jnp.exp2(row_max - new_max)
        p = jnp.exp2(s - across(jnp.maximum(new_max, FLOOR), s.shape))
        total = total * rescale + p.sum(axis=1)
        any_grows = jnp.where(grows, 1.0, 0.0).max() > 0

        pl.when(i > 0)(lambda: plgpu.barrier_wait(barriers.out_ready))
        plgpu.async_store_tmem(tmem.weights, p.astype(q_ref.dtype))
        pl.when((i > 0) & any_grows)(lambda: rescale_out(rescale))
        plgpu.commit_tmem()
        plgpu.barrier_arrive(barriers.weights_ready)
        return new_max, total

    # A sink is a key that comes first and has no value.
    first_max, first_total = (NEG, 0.0) if sink is None else (sink, 1.0)
    state = tuple(
        plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), NATIVE.reduce(1)) if isinstance(x, float) else x
        for x in (first_max, first_total)
    )
    row_max, total = lax.fori_loop(0, tile.num_blocks, attend_block, state)
    pl.when(tile.num_blocks > 0)(lambda: plgpu.barrier_wait(barriers.out_ready))

    # A row that sees no key has no sink either; what lies in tensor memory may be anything.
    sees_any = row_end > (0 if row_start is None else row_start)
    total = jnp.where(sees_any, total, 1.0)
    lse = jnp.where(sees_any, (row_max + jnp.log2(total)) * (1 / LOG2E), -jnp.inf)
    store(lse_ref, lse)
    for part in columns:
        out = plgpu.async_load_tmem(tmem.out.at[:, part], layout=NATIVE)
        out = jnp.where(across(sees_any, out.shape), out * across(1.0 / total, out.shape), 0.0)
        _store_rows(program, smem.rows, part, out.astype(o_ref.dtype))
    copy_tokens(
        program, smem.rows, tile.q_len, lambda first, n: o_ref.at[pl.ds(tile.q_start + first, n), heads]
    )


def _row_numbers(ref) -> jax.Array:
    """`[ROWS]`, each number in its row's thread."""
    return plgpu.load(ref, layout=NATIVE.reduce(1), optimized=False)


def _load_rows(program: _Program, rows, part) -> jax.Array:
    """`[ROWS, COLUMNS]` of plain rows."""
    if program.interpreted:
        return rows[:, :, part].reshape(-1, COLUMNS)[:ROWS]
    return plgpu.load(rows.at[:, part], layout=NATIVE, optimized=False)


def _store_rows(program: _Program, rows, part, values: jax.Array) -> None:
    """Write `[ROWS, COLUMNS]` to plain rows."""
    if program.interpreted:
        excess = math.prod(program.rows_shape[:2]) - ROWS
        padded = jnp.pad(values, ((0, excess), (0, 0)))
        rows[:, :, part] = padded.reshape(*program.rows_shape[:2], COLUMNS)
    else:
        store(rows.at[:, part], values)
