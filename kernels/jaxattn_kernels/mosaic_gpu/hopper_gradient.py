"""The gradient of ragged attention on Hopper: two Mosaic GPU kernels, of products by `wgmma`.

As in `triton_gradient.py`, one kernel has a program per tile of queries and writes their gradient, the other
one per tile of keys and writes the gradients of keys and values: each number is written by one program, in
one order. The warpgroups of either have the roles of the forward pass (`mosaic.py`): one copies blocks into
shared memory, as far ahead as there is room, and one or two consume them, with 64 rows each. In the first
kernel a block is one of keys and values; in the second, one of queries and the gradients of their outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.arrays import GradientInputs, KeyTiles, Tiles
from jaxattn_kernels.mosaic_gpu import hopper as mosaic
from jaxattn_kernels.mosaic_gpu.hopper import ROWS, add_products, products
from jaxattn_kernels.mosaic_gpu.launch import numbers_of_tokens, plan_units
from jaxattn_kernels.mosaic_gpu.parts import (
    LOG2E,
    TILE_ROWS,
    KernelConfig,
    KernelProgram,
    Unit,
    across,
    blank,
    clear_strangers,
    fetch_queries,
    has_strangers,
    load_rows,
    logits,
    mask,
    one_memory,
    play,
    produce,
    row_numbers,
    run,
    source_row,
    store,
    store_rows,
    token_rows,
    write_tokens,
)

# Of 65,536 registers of a multiprocessor; two accumulators of 64 each leave little to the rest.
PRODUCER_REGISTERS = 24
CONSUMER_REGISTERS = 240

HEAD_DIMS = (64, 80, 96, 128)
KEY_TILE = 2 * ROWS
"""Keys per tile: two consumers have 64 each."""
SIZES = KernelConfig(block_k=64, num_stages=3)
"""Of blocks of keys, or of rows of queries: they fit, and no register is spilled (tests/compile)."""


def obstacle(
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
    if head_dim not in HEAD_DIMS:
        return f"head_dim={head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    return mosaic.obstacle(
        dtype=dtype, head_dim=head_dim, group_size=group_size, page_size=page_size, kv_dtype=kv_dtype
    )


def queries_gradient(
    inputs: GradientInputs,
    tile_lists: tuple[Tiles, ...],
    *,
    page_size: int | None,
    scale: float,
    logits_soft_cap: float | None,
    windowed: bool,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of the queries, and what the other kernel compares with.

    Args:
        inputs: What is read.
        tile_lists: Tiles of queries, as the forward pass has them; that their keys may be split is of no
            interest here.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        windowed: Whether a token's range may begin after the sequence does.
        interpret: `plgpu.InterpretGPUParams` to simulate the GPU on a CPU; None to compile.

    Returns:
        `[T, N, H]` the gradient, in the dtype of `q`, and `[T, N]` float32 the sum of the products of an
        output and its gradient, less the gradient of its log-sum-exp; 0 for a token that sees no key. Rows
        that no tile covers are undefined.

    Raises:
        NotImplementedError: If there is an obstacle.
    """
    q = inputs.q
    (T, N, H), K = q.shape, inputs.k.shape[1]
    if reason := obstacle(
        dtype=q.dtype, kv_dtype=inputs.k.dtype, head_dim=H, group_size=N // K, page_size=page_size
    ):
        raise NotImplementedError(reason)
    # Whole tiles of eight rows are copied.
    k, v = (jnp.pad(x, ((0, -x.shape[0] % TILE_ROWS), (0, 0), (0, 0))) for x in (inputs.k, inputs.v))
    # All launches write into one buffer.
    dq_ref = jax.new_ref(blank(q.shape, q.dtype, interpret))
    delta = jnp.full((T, N), jnp.nan, jnp.float32)
    lse = _base2(inputs.results.lse)
    for tiles in tile_lists:
        tiles = dataclasses.replace(tiles, split=None)
        tokens = mosaic.tokens_per_consumer(N // K)
        program = KernelProgram(
            tokens=tokens,
            num_consumers=pl.cdiv(tiles.block_q, tokens),
            rows=ROWS,
            layout=plgpu.Layout.WGMMA,
            group_size=N // K,
            head_dim=H,
            page_size=page_size,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            masks_start=windowed or page_size is None,
            interpreted=interpret is not None,
            sizes=SIZES,
        )
        plan, row_start, row_end = plan_units(program, inputs.visible, inputs.lookup, tiles)
        shape = (row_end.shape[0], program.num_consumers, K, ROWS)
        arguments = _QueriesArguments(
            plan=plan,
            row_start=row_start if program.masks_start else None,
            row_end=row_end,
            pages=inputs.lookup.pages,
            q=q,
            k=k,
            v=v,
            out=inputs.results.out,
            d_out=inputs.d_results.out,
            lse=_numbers_of_rows(program, tiles, lse),
            d_lse=_numbers_of_rows(program, tiles, inputs.d_results.lse),
            dq=dq_ref,
            delta=jax.new_ref(blank(shape, jnp.float32, interpret)),
        )
        _launch(
            program, _consume_keys, _produce_keys, arguments, K, _queries_scratch(program, q.dtype), interpret
        )
        delta = numbers_of_tokens(program, tiles, jax.freeze(arguments.delta), delta)
    return jax.freeze(dq_ref), delta


def keys_gradient(
    inputs: GradientInputs,
    delta: jax.Array,
    tiles: KeyTiles,
    num_rows: int,
    dtype: Any,
    *,
    page_size: int | None,
    scale: float,
    logits_soft_cap: float | None,
    windowed: bool,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`[num_rows, K, H]` twice: the gradients of keys and of values, sequence after sequence.

    The row of a key is its place in its sequence after `lookup.start`, which counts pages where there are
    pages: the gradients of a page that several sequences share stand in several rows.

    Args:
        inputs: What is read, without an obstacle.
        delta: `[T, N]` From `queries_gradient`.
        tiles: Tiles of at most `KEY_TILE` keys.
        num_rows: Rows of the results.
        dtype: Dtype of the results: that of `q`, or float32.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        windowed: Whether a token's range may begin after the sequence does.
        interpret: `plgpu.InterpretGPUParams` to simulate the GPU on a CPU; None to compile.

    Returns:
        The gradients; rows that hold no key are 0.
    """
    (_, N, H), K = inputs.q.shape, inputs.k.shape[1]
    program = KernelProgram(
        tokens=ROWS,
        num_consumers=KEY_TILE // ROWS,
        rows=ROWS,
        layout=plgpu.Layout.WGMMA,
        group_size=1,
        head_dim=H,
        page_size=None,  # of rows of queries, which are what is read block by block
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        masks_start=windowed,
        interpreted=interpret is not None,
        sizes=SIZES,
    )
    dk_ref, dv_ref = (jax.new_ref(jnp.zeros((num_rows, K, H), dtype)) for _ in range(2))
    numbers = (_base2(inputs.results.lse), delta)
    arguments = _KeysArguments(
        plan=_plan_keys(program, tiles, N // K),
        start=inputs.lookup.start[tiles.seq],
        pages=inputs.lookup.pages,
        q=_rows_of_queries(inputs.q, K),
        d_out=_rows_of_queries(inputs.d_results.out, K),
        numbers=jnp.stack([_rows_of_queries(x, K).T for x in numbers], axis=1),
        ranges=jnp.stack(
            [_rows_of_queries(jnp.repeat(x[:, None], N // K, 1), 1)[:, 0] for x in inputs.visible]
        ),
        k=inputs.k,
        v=inputs.v,
        dk=dk_ref,
        dv=dv_ref,
    )
    consume = functools.partial(_consume_rows, page_size=page_size)
    scratch = _keys_scratch(program, inputs.q.dtype, page_size, is_wide=jnp.dtype(dtype).itemsize > 2)
    _launch(program, consume, _produce_rows, arguments, K, scratch, interpret)
    return jax.freeze(dk_ref), jax.freeze(dv_ref)


class _QueriesArguments(NamedTuple):
    """Arrays in the GPU's memory that a program reads and writes; in the kernel, references to them.

    Attributes:
        plan: `[U, fields of Unit]` The tiles of queries, in the order in which programs take them.
        row_start: `[W, consumers, ROWS]` First key that each row of a tile sees; None where it is key 0.
        row_end: `[W, consumers, ROWS]` One past the last; a dead row sees none.
        pages: `[P]` Page list, or None.
        q: `[T, N, H]` Queries.
        k: `[S, K, H]` Keys.
        v: `[S, K, H]` Values.
        out: `[T, N, H]` Outputs.
        d_out: `[T, N, H]` Their gradients.
        lse: `[W, consumers, K, ROWS]` Log-sum-exp of each row, in base 2.
        d_lse: `[W, consumers, K, ROWS]` Its gradient, of the natural logarithm.
        dq: `[T, N, H]` Gradients of the queries.
        delta: `[W, consumers, K, ROWS]` What the gradients of a row's weights are compared with.
    """

    plan: Any
    row_start: Any
    row_end: Any
    pages: Any
    q: Any
    k: Any
    v: Any
    out: Any
    d_out: Any
    lse: Any
    d_lse: Any
    dq: Any
    delta: Any


class _KeysArguments(NamedTuple):
    """Arrays in the GPU's memory that a program reads and writes; in the kernel, references to them.

    Of the L rows of queries, row t G + g of key head n is that of token t and query head n G + g.

    Attributes:
        plan: `[W, fields of Unit]` The tiles of keys: queries and keys have exchanged their parts. A unit has
            `q_len` keys, from key `q_start` of its sequence on, and reads rows `kv_start` to `kv_end`,
            counted from row `key_base`.
        start: `[W]` Its sequence's first entry in the page list, or, unpaged, the place of its first key.
        pages: `[P]` Page list, or None.
        q: `[L, K, H]` Rows of queries.
        d_out: `[L, K, H]` Gradients of their outputs.
        numbers: `[K, 2, L]` Their log-sum-exp, in base 2, and what gradients of weights are compared with.
        ranges: `[2, L]` First key that they see, and one past the last.
        k: `[S, K, H]` Keys.
        v: `[S, K, H]` Values.
        dk: `[rows, K, H]` Gradients of the keys.
        dv: `[rows, K, H]` Gradients of the values.
    """

    plan: Any
    start: Any
    pages: Any
    q: Any
    d_out: Any
    numbers: Any
    ranges: Any
    k: Any
    v: Any
    dk: Any
    dv: Any


class _Blocks(NamedTuple):
    """What the producer reads and where it puts it: keys and values, or what stands in their place."""

    k: Any
    v: Any
    pages: Any = None


class _Smem(NamedTuple):
    """Shared memory of a program.

    What begins anywhere arrives in plain rows, as in the forward pass: a consumer's own rows. References to
    one memory are plain, `[consumers, ROWS, H]`, and tiled; for results in float32 also `[.., H / 2]`.
    """

    first: Any  # references to one memory: queries, or keys
    second: Any  # references to one memory: gradients of outputs, or values
    out: Any  # [consumers, ROWS, H], plain: outputs; None for keys
    k: Any  # [num_stages, block_k, H], tiled: keys, or queries
    v: Any  # [num_stages, block_k, H], tiled: values, or gradients of outputs
    numbers: Any  # [num_stages, 2, block_k] Numbers of rows; None for queries
    ranges: Any  # [num_stages, 2, block_k] The ranges they see; None for queries


class _Barriers(NamedTuple):
    """What the warpgroups of a program wait for."""

    rows_ready: Any  # per consumer: its own rows have arrived
    k_ready: Any  # per stage: the block has arrived
    v_ready: Any
    k_free: Any  # per stage: every consumer has read the block
    v_free: Any
    cleared: Any  # what a block holds of strangers is cleared; None for one consumer


def _queries_scratch(program: KernelProgram, dtype) -> tuple[_Smem, _Barriers]:
    rows = _own_rows(program, dtype)
    out = plgpu.SMEM((program.num_consumers, *program.rows_shape, program.head_dim), dtype)
    blocks = _blocks(program, dtype)
    smem = _Smem(first=rows, second=rows, out=out, k=blocks, v=blocks, numbers=None, ranges=None)
    return smem, _barriers(program, own_copies=3, beside=0)


def _keys_scratch(
    program: KernelProgram, dtype, page_size: int | None, *, is_wide: bool
) -> tuple[_Smem, _Barriers]:
    rows = _own_rows(program, dtype, is_wide=is_wide)
    blocks, shape = _blocks(program, dtype), (program.sizes.num_stages, 2, program.sizes.block_k)
    smem = _Smem(
        first=rows, second=rows, out=None, k=blocks, v=blocks,
        numbers=plgpu.SMEM(shape, jnp.float32), ranges=plgpu.SMEM(shape, jnp.int32),
    )  # fmt: skip
    return smem, _barriers(program, own_copies=2 * (ROWS // _keys_per_copy(page_size)), beside=2)


def _own_rows(program: KernelProgram, dtype, *, is_wide: bool = False) -> Any:
    """Memory for the consumers' own rows."""
    consumers, H = program.num_consumers, program.head_dim
    plain = plgpu.SMEM((consumers, *program.rows_shape, H), dtype)
    tiles = plgpu.SMEM((consumers, ROWS, H), dtype, transforms=program.tiled)
    wide = plgpu.SMEM((consumers, *program.rows_shape, H // 2), jnp.float32)
    return one_memory(program, plain, tiles, *[wide] * is_wide)


def _blocks(program: KernelProgram, dtype) -> Any:
    shape = (program.sizes.num_stages, program.sizes.block_k, program.head_dim)
    return plgpu.SMEM(shape, dtype, transforms=program.tiled)


def _barriers(program: KernelProgram, *, own_copies: int, beside: int) -> _Barriers:
    """Barriers of a program, given the copies of a consumer's own rows, and those beside a block."""
    consumers, num_stages = program.num_consumers, program.sizes.num_stages
    released = plgpu.Barrier(num_arrivals=consumers, num_barriers=num_stages)
    return _Barriers(
        rows_ready=plgpu.Barrier(num_arrivals=own_copies, num_barriers=consumers),
        k_ready=plgpu.Barrier(num_arrivals=program.copies + beside, num_barriers=num_stages),
        v_ready=plgpu.Barrier(num_arrivals=program.copies, num_barriers=num_stages),
        k_free=released,
        v_free=released,
        cleared=plgpu.Barrier(num_arrivals=2) if consumers == 2 else None,
    )


def _launch(
    program: KernelProgram,
    consume: Callable[..., None],
    produce_blocks: Callable[..., None],
    arguments: Any,
    num_kv_heads: int,
    scratch: tuple[_Smem, _Barriers],
    interpret: Any,
) -> None:
    """Run a kernel whose last warpgroup produces what the others consume."""
    consumers = program.num_consumers

    def kernel(refs, smem: _Smem, barriers: _Barriers) -> None:
        head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")

        @pl.when(warpgroup < consumers)
        def _():
            if consumers == 2:
                plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            play(refs, lambda _, unit: consume(program, unit, head, warpgroup, refs, smem, barriers))

        @pl.when(warpgroup == consumers)
        def _():
            if consumers == 2:
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            play(refs, lambda _, unit: produce_blocks(program, unit, head, refs, smem, barriers))

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


def _base2(lse: jax.Array) -> jax.Array:
    """Log-sum-exp in base 2; 0 for a row that sees no key."""
    return jnp.where(jnp.isfinite(lse), lse * LOG2E, 0.0)


def _numbers_of_rows(program: KernelProgram, tiles: Tiles, of_tokens: jax.Array) -> jax.Array:
    """`[W, consumers, K, ROWS]` Numbers `[T, N]`, each at its row; of a dead row it may be any."""
    G, tokens = program.group_size, program.tokens
    by_group = of_tokens.reshape(len(of_tokens), -1, G)
    consumer, head, row = (
        jnp.arange(n, dtype=jnp.int32).reshape(shape)
        for n, shape in (
            (program.num_consumers, (1, -1, 1, 1)), (by_group.shape[1], (1, 1, -1, 1)), (ROWS, (1, 1, 1, -1)),
        )
    )  # fmt: skip
    token = tiles.q_start[:, None, None, None] + consumer * tokens + row // G
    return by_group.at[token, head, row % G].get(mode="clip")


def _rows_of_queries(of_tokens: jax.Array, num_kv_heads: int) -> jax.Array:
    """`[L, K, ...]` Rows of queries of `[T, N, ...]`, L a multiple of eight; where K or G is 1, a view."""
    T, N, *rest = of_tokens.shape
    by_group = of_tokens.reshape(T, num_kv_heads, N // num_kv_heads, *rest).swapaxes(1, 2)
    rows = by_group.reshape(-1, num_kv_heads, *rest)
    return jnp.pad(rows, ((0, -len(rows) % TILE_ROWS), *[(0, 0)] * (rows.ndim - 1)))


def _plan_keys(program: KernelProgram, tiles: KeyTiles, group_size: int) -> jax.Array:
    """`[W, fields of Unit]` What programs read of the tiles of keys: see `_KeysArguments`."""
    begin, end = tiles.q_start * group_size, tiles.q_end * group_size
    length = jnp.where(begin < end, tiles.kv_end - tiles.kv_start, 0)
    base = begin - begin % TILE_ROWS
    none = jnp.zeros_like(base)
    num_blocks = (end - base + (program.sizes.block_k - 1)) // program.sizes.block_k
    plan = Unit(
        tile=jnp.arange(len(base), dtype=jnp.int32), is_whole=none, q_start=tiles.kv_start, q_len=length,
        key_base=base, kv_start=begin - base, kv_end=end - base, begin=none, num_blocks=num_blocks,
        all_begin=none, all_end=none,
    )  # fmt: skip
    return jnp.stack(plan, axis=1)


def _produce_keys(program: KernelProgram, unit: Unit, head, refs: _QueriesArguments, smem, barriers) -> None:
    produce(program, unit, head, refs, smem, barriers)


def _produce_rows(program: KernelProgram, unit: Unit, head, refs: _KeysArguments, smem, barriers) -> None:
    beside = ((refs.numbers.at[head], smem.numbers), (refs.ranges, smem.ranges))
    produce(program, unit, head, _Blocks(refs.q, refs.d_out), smem, barriers, beside)


def _consume_keys(
    program: KernelProgram, unit: Unit, head, me, refs: _QueriesArguments, smem: _Smem, barriers: _Barriers
) -> None:
    """The gradients of the queries of one consumer, over the keys of the tile.

    Row r is token `r // G` of the consumer and query head `head * G + r % G`.

    Args:
        program: What is static.
        unit: The tile.
        head: The key head.
        me: Number of the consumer.
        refs: Arguments.
        smem: Shared memory.
        barriers: Barriers.
    """
    dtype, sizes = refs.q.dtype, program.sizes
    q_rows, q_tiles = (ref.at[me] for ref in smem.first)
    d_out_rows, d_out_tiles = (ref.at[me] for ref in smem.second)
    out_rows = smem.out.at[me]
    row_start = None if refs.row_start is None else row_numbers(program, refs.row_start.at[unit.tile, me])
    row_end = row_numbers(program, refs.row_end.at[unit.tile, me])
    lse = row_numbers(program, refs.lse.at[unit.tile, me, head])

    fetch_queries(
        program, unit, head, me, barriers.rows_ready.at[me],
        (refs.q, q_rows), (refs.d_out, d_out_rows), (refs.out, out_rows),
    )  # fmt: skip
    d_out = load_rows(program, d_out_rows)
    delta = (d_out.astype(jnp.float32) * load_rows(program, out_rows).astype(jnp.float32)).sum(axis=1)
    delta -= row_numbers(program, refs.d_lse.at[unit.tile, me, head])
    d_out_tiles[...] = d_out
    q_tiles[...] = load_rows(program, q_rows)
    plgpu.commit_smem()
    store(refs.delta.at[unit.tile, me, head], delta)

    def add_block(i, dq):
        stage, j = lax.rem(i, jnp.int32(sizes.num_stages)), unit.begin + i
        k, v = smem.k.at[stage], smem.v.at[stage]
        plgpu.barrier_wait(barriers.k_ready.at[stage])
        plgpu.barrier_wait(barriers.v_ready.at[stage])
        _clear(program, unit, j, me, barriers, k)
        scores, d_weights = products(program, (q_tiles, k), (d_out_tiles, v))
        plgpu.barrier_arrive(barriers.v_free.at[stage])
        shape = scores.shape
        _, sloped = _weights(program, scores, across(lse, shape))
        d_scores = sloped * (d_weights - across(delta, shape))
        sees_all = (unit.all_begin <= j) & (j < unit.all_end)
        d_scores = lax.cond(
            sees_all,
            lambda x: x,
            lambda x: mask(program, x, j * sizes.block_k, row_start, row_end, otherwise=0.0),
            d_scores,
        )
        (dq,) = add_products(program, (dq, d_scores.astype(dtype), k))
        plgpu.barrier_arrive(barriers.k_free.at[stage])
        return dq

    dq = lax.fori_loop(0, unit.num_blocks, add_block, _zeros(program)) * program.scale
    first_token, heads = me * program.tokens, pl.ds(head * program.group_size, program.group_size)
    begin = unit.q_start + first_token
    write_tokens(
        program, q_rows, jnp.clip(unit.q_len - first_token, 0, program.tokens), _writer(program, dq),
        lambda i, n, columns: refs.dq.at[pl.ds(begin + i, n), heads, columns],
    )  # fmt: skip


def _consume_rows(
    program: KernelProgram,
    unit: Unit,
    head,
    me,
    refs: _KeysArguments,
    smem: _Smem,
    barriers: _Barriers,
    *,
    page_size: int | None,
) -> None:
    """The gradients of the keys and values of one consumer, over the rows of queries that see the tile.

    Args:
        program: What is static.
        unit: The tile of keys.
        head: The key head.
        me: Number of the consumer.
        refs: Arguments.
        smem: Shared memory.
        barriers: Barriers.
        page_size: Tokens per page, or None for packed keys.
    """
    dtype, sizes, layout = refs.q.dtype, program.sizes, program.layout
    rows, tiles, *wide_rows = zip(smem.first, smem.second, strict=True)  # each of keys, and of values
    start, end_key = refs.start[unit.tile], unit.q_start + unit.q_len
    first_key = unit.q_start + me * ROWS
    copy_rows = _keys_per_copy(page_size)

    @pl.loop(0, ROWS // copy_rows)
    def _(n):
        begin = n * copy_rows
        source = source_row(page_size, refs.pages, first_key + begin, start, unit.q_start, end_key)
        for ref, place in zip((refs.k, refs.v), rows, strict=True):
            plgpu.copy_gmem_to_smem(
                ref.at[pl.ds(source, copy_rows), pl.ds(head, 1)],
                token_rows(program, place.at[me], begin, copy_rows),
                barriers.rows_ready.at[me],
            )

    plgpu.barrier_wait(barriers.rows_ready.at[me])
    for arrived, place in zip(rows, tiles, strict=True):
        place[me] = load_rows(program, arrived.at[me])
    plgpu.commit_smem()

    def load_numbers(ref):
        """`[block_k]`, each number where its column of a product lies."""
        return plgpu.load(ref, layout=layout.reduce(0), optimized=False)

    def mask_rows(j, ranges, x):
        """0 in place of numbers of rows that do not see a key, or are strangers."""
        row = plgpu.broadcasted_iota(jnp.int32, (sizes.block_k,), 0, layout=layout.reduce(0))
        row += j * sizes.block_k
        is_own = (unit.kv_start <= row) & (row < unit.kv_end)
        key = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout) + first_key
        sees = key < _down(jnp.where(is_own, load_numbers(ranges.at[1]), 0), x.shape)
        if program.masks_start:
            sees &= _down(load_numbers(ranges.at[0]), x.shape) <= key
        return jnp.where(sees, x, 0.0)

    def add_rows(j, gradients):
        dk, dv = gradients
        stage = lax.rem(j, jnp.int32(sizes.num_stages))
        q, d_out, numbers, ranges = (ref.at[stage] for ref in (smem.k, smem.v, smem.numbers, smem.ranges))
        plgpu.barrier_wait(barriers.k_ready.at[stage])
        plgpu.barrier_wait(barriers.v_ready.at[stage])
        _clear(program, unit, j, me, barriers, q, d_out)
        # Ranges never decrease within a sequence: the first row ends first, the last one begins last.
        sees_all = (jnp.minimum(first_key + ROWS, end_key) <= ranges[1, 0]) & ~has_strangers(program, unit, j)
        if program.masks_start:
            sees_all &= ranges[0, sizes.block_k - 1] <= first_key

        def seen(x):
            return lax.cond(sees_all, lambda x: x, lambda x: mask_rows(j, ranges, x), x)

        # `me`, but the compiler cannot know so: it would compute the addresses of every part of both tiles
        # before the loop, and spill them.
        mine = me + jnp.minimum(ranges[1, 0], 0)
        k, v = (place.at[mine] for place in tiles)
        (scores,) = products(program, (k, q))
        shape = scores.shape
        weights, sloped = _weights(program, scores, _down(load_numbers(numbers.at[0]), shape))
        (dv,) = add_products(program, (dv, seen(weights).astype(dtype), d_out))
        (d_weights,) = products(program, (v, d_out))
        plgpu.barrier_arrive(barriers.v_free.at[stage])
        d_scores = seen(sloped * (d_weights - _down(load_numbers(numbers.at[1]), shape)))
        (dk,) = add_products(program, (dk, d_scores.astype(dtype), q))
        plgpu.barrier_arrive(barriers.k_free.at[stage])
        return dk, dv

    dk, dv = lax.fori_loop(0, unit.num_blocks, add_rows, (_zeros(program), _zeros(program)))
    num_keys = jnp.clip(end_key - first_key, 0, ROWS)
    row = start * (page_size or 1) + first_key
    leaving = zip((*wide_rows, rows)[0], (dk * program.scale, dv), (refs.dk, refs.dv), strict=True)
    for place, values, ref in leaving:
        write_tokens(
            program, place.at[me], num_keys, _writer(program, values),
            lambda i, n, columns, ref=ref: ref.at[pl.ds(row + i, n), pl.ds(head, 1), columns],
        )  # fmt: skip


def _keys_per_copy(page_size: int | None) -> int:
    return min(page_size or ROWS, ROWS)


def _zeros(program: KernelProgram) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((ROWS, program.head_dim), jnp.float32), program.layout)


def _writer(program: KernelProgram, values: jax.Array) -> Callable[[Any, int], None]:
    return lambda place, first: store_rows(program, place, values[:, first : first + place.shape[-1]])


def _down(column_values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a number per column along the column."""
    return lax.broadcast_in_dim(column_values, shape, [1])


def _clear(program: KernelProgram, unit: Unit, j, me, barriers: _Barriers, *blocks: Any) -> None:
    """Zero what strangers have left in block j, before any consumer reads it."""
    consumers = program.num_consumers
    for n, block in enumerate(blocks):
        clear_strangers(program, unit, block, j, mine=me == n % consumers)

    if consumers == 2:

        @pl.when(has_strangers(program, unit, j))
        def _():
            plgpu.barrier_arrive(barriers.cleared)
            plgpu.barrier_wait(barriers.cleared)


def _weights(program: KernelProgram, scores: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights of the softmax, and the same times the derivative of the cap.

    Args:
        program: What is static.
        scores: Products of queries and keys.
        lse: The log-sum-exp of each row, in base 2.
    """
    capped = logits(program, scores)
    weights = jnp.exp2(capped - lse)
    if program.logits_soft_cap is None:
        return weights, weights
    share = capped * (1 / (program.logits_soft_cap * LOG2E))
    return weights, weights * (1.0 - share * share)  # 1 - tanh²
