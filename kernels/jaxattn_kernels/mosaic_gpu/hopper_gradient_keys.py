"""The gradients of keys and values on Hopper: a program has a tile of keys, and all queries that see it.

Queries and keys have changed places: a block that the producer brings is one of rows of queries and of the
gradients of their outputs, and a consumer's own rows are keys and values. Warpgroups, memory and launch are
those of `hopper_gradient.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.arrays import GradientInputs, KeyTiles
from jaxattn_kernels.mosaic_gpu import hopper_gradient as shared
from jaxattn_kernels.mosaic_gpu import key_blocks, plain_rows
from jaxattn_kernels.mosaic_gpu.hopper import ROWS, add_products, products
from jaxattn_kernels.mosaic_gpu.hopper_gradient import Barriers, Smem
from jaxattn_kernels.mosaic_gpu.program import (
    TILE_ROWS,
    KernelProgram,
    Unit,
)


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
        inputs: What is read, of a layer that the kernels can serve.
        delta: `[T, N]` From `queries_gradient`.
        tiles: Tiles of at most `shared.KEY_TILE` keys.
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
        num_consumers=shared.KEY_TILE // ROWS,
        rows=ROWS,
        layout=plgpu.Layout.WGMMA,
        group_size=1,
        head_dim=H,
        page_size=None,  # of rows of queries, which are what is read block by block
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        masks_start=windowed,
        interpreted=interpret is not None,
        sizes=shared.SIZES,
    )
    dk_ref, dv_ref = (jax.new_ref(jnp.zeros((num_rows, K, H), dtype)) for _ in range(2))
    numbers = (shared.base2(inputs.results.lse), delta)
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
    shared.launch(program, consume, _produce_rows, arguments, K, scratch, interpret)
    return jax.freeze(dk_ref), jax.freeze(dv_ref)


class _KeysArguments(NamedTuple):
    """Arrays in the GPU's memory that a program reads and writes; in the kernel, references to them.

    Of the L rows of queries, row t G + g of key head n is that of token t and query head n G + g.

    Attributes:
        plan: `[W, fields of Unit]` The tiles of keys: queries and keys have changed places. A unit has
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


def _keys_scratch(
    program: KernelProgram, dtype, page_size: int | None, *, is_wide: bool
) -> tuple[Smem, Barriers]:
    rows = shared.own_rows(program, dtype, is_wide=is_wide)
    blocks, shape = shared.blocks(program, dtype), (program.sizes.num_stages, 2, program.sizes.block_k)
    smem = Smem(
        q_or_k=rows, d_out_or_v=rows, out=None, k=blocks, v=blocks,
        numbers=plgpu.SMEM(shape, jnp.float32), ranges=plgpu.SMEM(shape, jnp.int32),
    )  # fmt: skip
    return smem, shared.barriers_of(program, own_copies=2 * (ROWS // _keys_per_copy(page_size)), beside=2)


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


def _produce_rows(program: KernelProgram, unit: Unit, head, refs: _KeysArguments, smem, barriers) -> None:
    beside = ((refs.numbers.at[head], smem.numbers), (refs.ranges, smem.ranges))
    key_blocks.produce(program, unit, head, _Blocks(refs.q, refs.d_out), smem, barriers, beside)


class _Place(NamedTuple):
    """Which keys a consumer has.

    Attributes:
        start: The sequence's first entry in the page list, or, unpaged, the place of its first key.
        first: The consumer's first key, as a position in the sequence.
        end: One past the last key of the tile, of which the consumer has a part.
    """

    start: Any
    first: Any
    end: Any


def _consume_rows(
    program: KernelProgram,
    unit: Unit,
    head,
    me,
    refs: _KeysArguments,
    smem: Smem,
    barriers: Barriers,
    *,
    page_size: int | None,
) -> None:
    """The gradients of the keys and values of one consumer, over the rows of queries that see the tile.

    A product has a row per key of the consumer, and a column per row of queries.

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
    dtype, sizes = refs.q.dtype, program.sizes
    start, end = refs.start[unit.tile], unit.q_start + unit.q_len
    keys = _Place(start, unit.q_start + me * ROWS, end)
    (k_rows, k_tiles, *k_wide), (v_rows, v_tiles, *v_wide) = smem.q_or_k, smem.d_out_or_v
    arriving = (refs.k, k_rows), (refs.v, v_rows)
    _fetch_keys(program, unit, head, me, keys, refs.pages, barriers.rows_ready.at[me], arriving, page_size)
    for rows, tiles in ((k_rows, k_tiles), (v_rows, v_tiles)):
        tiles[me] = plain_rows.load(program, rows.at[me])
    plgpu.commit_smem()

    def add_rows(j, gradients):
        dk, dv = gradients
        stage = lax.rem(j, jnp.int32(sizes.num_stages))
        q, d_out, numbers, ranges = (ref.at[stage] for ref in (smem.k, smem.v, smem.numbers, smem.ranges))
        plgpu.barrier_wait(barriers.k_ready.at[stage])
        plgpu.barrier_wait(barriers.v_ready.at[stage])
        shared.clear_out_of_range(program, unit, j, me, barriers, q, d_out)
        # Ranges never decrease within a sequence: the first row ends first, the last one begins last.
        sees_all = jnp.minimum(keys.first + ROWS, keys.end) <= ranges[1, 0]
        sees_all &= ~key_blocks.has_out_of_range(program, unit, j)
        if program.masks_start:
            sees_all &= ranges[0, sizes.block_k - 1] <= keys.first

        def seen(x):
            return lax.cond(
                sees_all, lambda x: x, lambda x: _mask_unseen(program, unit, keys.first, j, ranges, x), x
            )

        # `me`, but the compiler cannot know so: it would compute the addresses of every part of both tiles
        # before the loop, and spill them.
        mine = me + jnp.minimum(ranges[1, 0], 0)
        k, v = k_tiles.at[mine], v_tiles.at[mine]
        (scores,) = products(program, (k, q))
        lse = _repeat_down(_load_per_column(program, numbers.at[0]), scores.shape)
        weights, sloped = shared.weights_of(program, scores, lse)
        (dv,) = add_products(program, (dv, seen(weights).astype(dtype), d_out))
        (d_weights,) = products(program, (v, d_out))
        plgpu.barrier_arrive(barriers.v_free.at[stage])
        delta = _repeat_down(_load_per_column(program, numbers.at[1]), scores.shape)
        d_scores = seen(sloped * (d_weights - delta))
        (dk,) = add_products(program, (dk, d_scores.astype(dtype), q))
        plgpu.barrier_arrive(barriers.k_free.at[stage])
        return dk, dv

    dk, dv = lax.fori_loop(0, unit.num_blocks, add_rows, (shared.zeros(program), shared.zeros(program)))
    num_keys = jnp.clip(keys.end - keys.first, 0, ROWS)
    row = keys.start * (page_size or 1) + keys.first
    # Results in float32 leave by memory of that type, where there is some.
    (k_leaves,), (v_leaves,) = k_wide or (k_rows,), v_wide or (v_rows,)
    for place, values, ref in ((k_leaves, dk * program.scale, refs.dk), (v_leaves, dv, refs.dv)):
        plain_rows.write_tokens(
            program, place.at[me], num_keys, shared.writer(program, values),
            lambda i, n, columns, ref=ref: ref.at[pl.ds(row + i, n), pl.ds(head, 1), columns],
        )  # fmt: skip


def _fetch_keys(
    program: KernelProgram,
    unit: Unit,
    head,
    me,
    keys: _Place,
    pages,
    barrier,
    sources_and_rows: tuple[tuple[Any, Any], ...],
    page_size: int | None,
) -> None:
    """Copy a consumer's keys and values into its plain rows, and wait for them."""
    copy_rows = _keys_per_copy(page_size)

    @pl.loop(0, ROWS // copy_rows)
    def _(n):
        begin = n * copy_rows
        source = key_blocks.source_row(
            page_size, pages, keys.first + begin, keys.start, unit.q_start, keys.end
        )
        for ref, rows in sources_and_rows:
            plgpu.copy_gmem_to_smem(
                ref.at[pl.ds(source, copy_rows), pl.ds(head, 1)],
                plain_rows.of_tokens(program, rows.at[me], begin, copy_rows),
                barrier,
            )

    plgpu.barrier_wait(barrier)


def _mask_unseen(program: KernelProgram, unit: Unit, first_key, j, ranges, x: jax.Array) -> jax.Array:
    """0 in place of numbers of rows of block j that do not see a key, or belong to no query of the unit."""
    block_k, layout = program.sizes.block_k, program.layout
    row = plgpu.broadcasted_iota(jnp.int32, (block_k,), 0, layout=layout.reduce(0))
    row += j * block_k
    is_own = (unit.kv_start <= row) & (row < unit.kv_end)
    key = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout) + first_key
    sees = key < _repeat_down(jnp.where(is_own, _load_per_column(program, ranges.at[1]), 0), x.shape)
    if program.masks_start:
        sees &= _repeat_down(_load_per_column(program, ranges.at[0]), x.shape) <= key
    return jnp.where(sees, x, 0.0)


def _load_per_column(program: KernelProgram, ref) -> jax.Array:
    """`[block_k]`, each number where its column of a product lies."""
    return plgpu.load(ref, layout=program.layout.reduce(0), optimized=False)


def _keys_per_copy(page_size: int | None) -> int:
    return min(page_size or ROWS, ROWS)


def _repeat_down(column_values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a number per column along the column."""
    return lax.broadcast_in_dim(column_values, shape, [1])
