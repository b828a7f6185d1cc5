"""What surrounds the Mosaic GPU kernels: the plan that programs read, launches, the log-sum-exp of tokens.

The kernel for a generation of GPUs is handed over as a `Kernel`; nothing here depends on which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn_kernels.arrays import Attended, KeyLookup, Tiles, VisibleRange
from jaxattn_kernels.mosaic_gpu.merge import MERGED, merge
from jaxattn_kernels.mosaic_gpu.program import (
    LOG2E,
    NEG,
    TILE_ROWS,
    Arguments,
    KernelConfig,
    KernelProgram,
    Unit,
    blank,
    run,
)

INT32_MAX = 2**31 - 1


class Kernel(NamedTuple):
    """The kernel for one generation of GPUs.

    Attributes:
        rows: Rows of a consumer: the height of a product.
        layout: How they lie among its threads.
        helpers: Warpgroups of a program besides its consumers.
        unsupported_reason: `unsupported_reason(dtype=, kv_dtype=, head_dim=, group_size=, page_size=)` says
            why it cannot serve a layer; None where it can.
        consumers_for: `consumers_for(block_q, group_size)` Tokens of a consumer, and number of consumers.
        config_for: `config_for(num_consumers=, head_dim=)` The sizes that fit.
        scratch: `scratch(program, dtype, is_split=)` What a program allocates.
        body: `body(program, arguments, *scratch)` What it does.
    """

    rows: int
    layout: Any
    helpers: int
    unsupported_reason: Callable[..., str | None]
    consumers_for: Callable[[int, int], tuple[int, int]]
    config_for: Callable[..., KernelConfig]
    scratch: Callable[..., tuple[Any, ...]]
    body: Callable[..., None]


def ragged_attention(
    kernel: Kernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: VisibleRange,
    lookup: KeyLookup,
    tile_lists: tuple[Tiles, ...],
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
        kernel: The kernel.
        q: `[T, N, H]` Queries, packed.
        k: `[S, K, H]` Keys on one flat axis, packed or pages one after the other.
        v: `[S, K, H]` Values.
        visible: Which keys each token sees.
        lookup: Where a sequence's keys lie.
        tile_lists: The tiles, of as many tokens as the kernel has consumers for. Where their keys are split,
            it is at multiples of `block_k`.
        sinks: `[N]` float32 One logit per query head that takes its share of the softmax and has no
            value; None for none.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        windowed: Whether a token's range may begin after the sequence does; otherwise
            `visible.start` is 0 everywhere.
        interpret: `plgpu.InterpretGPUParams` to simulate the GPU on a CPU; None to compile.
        config: Sizes of the launches; chosen by the kernel where None.

    Returns:
        `out [T, N, H]` in the dtype of `q`, and `lse [T, N]`, a natural logarithm; 0 and -inf for a
        token that sees no key. Rows that no tile covers are undefined.

    Raises:
        NotImplementedError: If the kernel cannot serve the layer.
        ValueError: If tiles have more rows than a program.
    """
    (T, N, H), K = q.shape, k.shape[1]
    G = N // K
    if reason := kernel.unsupported_reason(
        dtype=q.dtype, kv_dtype=k.dtype, head_dim=H, group_size=G, page_size=page_size
    ):
        raise NotImplementedError(reason)
    if remainder := -k.shape[0] % TILE_ROWS:  # whole tiles are copied
        k, v = (jnp.pad(x, ((0, remainder), (0, 0), (0, 0))) for x in (k, v))
    # All launches write into one buffer.
    out_ref = jax.new_ref(blank(q.shape, q.dtype, interpret))
    lse = jnp.full((T, N), jnp.nan, jnp.float32)
    for tiles in tile_lists:
        tokens, num_consumers = kernel.consumers_for(tiles.block_q, G)
        program = KernelProgram(
            tokens=tokens,
            num_consumers=num_consumers,
            rows=kernel.rows,
            layout=kernel.layout,
            group_size=G,
            head_dim=H,
            page_size=page_size,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            # Packed keys are read from a multiple of eight on; what lies before the first is masked.
            masks_start=windowed or page_size is None,
            interpreted=interpret is not None,
            sizes=config or kernel.config_for(num_consumers=num_consumers, head_dim=H),
        )
        lse_of_rows = _launch(kernel, program, q, k, v, visible, lookup, tiles, sinks, out_ref, interpret)
        lse = numbers_of_tokens(program, tiles, lse_of_rows, lse)
    return Attended(jax.freeze(out_ref), lse)


def _launch(
    kernel: Kernel,
    program: KernelProgram,
    q,
    k,
    v,
    visible,
    lookup,
    tiles: Tiles,
    sinks,
    out_ref,
    interpret,
) -> jax.Array:
    """Run one list of tiles: write into `out_ref`, and return the log-sum-exp of the rows."""
    consumers, K = program.num_consumers, k.shape[1]
    plan, row_start, row_end = plan_units(program, visible, lookup, tiles)
    num_units, num_tiles = plan.shape[0], row_end.shape[0]

    def result(*shape: int) -> Any:
        return jax.new_ref(blank(shape, jnp.float32, interpret))

    partial = None
    if tiles.split is not None:
        room = max(num_units, MERGED)
        partial = Attended(
            out=result(room, consumers * program.tokens, *q.shape[1:]),
            lse=result(room, consumers, K, program.rows),
        )
    arguments = Arguments(
        plan=plan,
        row_start=row_start if program.masks_start else None,
        row_end=row_end,
        sinks=None if sinks is None else _sinks_of_rows(program, sinks),
        pages=lookup.pages,
        q=q,
        k=k,
        v=v,
        out=out_ref,
        lse=result(num_tiles, consumers, K, program.rows),
        partial=partial,
    )
    run(
        functools.partial(kernel.body, program),
        arguments,
        num_units=num_units,
        num_heads=K,
        num_threads=consumers + kernel.helpers,
        thread_name="warpgroup",
        scratch_types=kernel.scratch(program, q.dtype, is_split=partial is not None),
        interpret=interpret,
    )
    if partial is not None:
        merge(program, tiles, partial, sinks, out_ref, arguments.lse, interpret)
    return jax.freeze(arguments.lse)


def plan_units(
    program: KernelProgram, visible: VisibleRange, lookup: KeyLookup, tiles: Tiles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gather what programs read of the metadata, of each unit and of each tile's rows.

    Returns:
        `plan`, `row_start` and `row_end`: see `Arguments`.
    """
    block_k, split, num_tiles = program.sizes.block_k, tiles.split, tiles.seq.shape[0]
    tile = _tiles_of_units(tiles)
    is_live_row, first_seen, end_seen = _ranges_of_rows(program, visible, tiles)
    base = lookup.start[tiles.seq]
    # Packed keys are read from a multiple of eight on: so far before the sequence's first key lies key 0 of
    # what a program reads, and all keys are numbered from there.
    shift = base % TILE_ROWS if program.page_size is None else None

    def of_units(of_tiles: jax.Array) -> jax.Array:
        is_same = split is None and tiles.order is None
        return of_tiles if is_same else of_tiles[tile]

    def of_live_rows(of_tiles: jax.Array) -> jax.Array:
        return jnp.where(is_live_row, of_tiles[:, None, None], 0)

    def as_read(key: jax.Array, select: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return key if shift is None else key + select(shift)

    if split is None:
        first, end = of_units(tiles.kv_start), of_units(tiles.kv_end)
        q_len, is_whole = of_units(tiles.q_len), jnp.ones(tile.shape, jnp.int32)
    else:
        first, end = split.kv_start, split.kv_end
        q_len = jnp.where(split.tile < num_tiles, of_units(tiles.q_len), 0)
        is_whole = (of_units(jnp.diff(split.indptr)) == 1).astype(jnp.int32)
    kv_start, kv_end = as_read(first, of_units), as_read(end, of_units)
    row_start, row_end = as_read(first_seen, of_live_rows), as_read(end_seen, of_live_rows)
    begin = kv_start // block_k
    stop = jnp.where(kv_end > kv_start, (kv_end + (block_k - 1)) // block_k, begin)
    last_start, first_end = row_start.max((1, 2)), jnp.where(is_live_row, row_end, INT32_MAX).min((1, 2))
    plan = Unit(
        tile=tile,
        is_whole=is_whole,
        q_start=of_units(tiles.q_start),
        q_len=q_len,
        key_base=of_units(base if shift is None else base - shift),
        kv_start=kv_start,
        kv_end=kv_end,
        begin=begin,
        num_blocks=stop - begin,
        all_begin=(jnp.maximum(of_units(last_start), kv_start) + (block_k - 1)) // block_k,
        all_end=jnp.minimum(of_units(first_end), kv_end) // block_k,
    )
    return jnp.stack(plan, axis=1), row_start, row_end


def _tiles_of_units(tiles: Tiles) -> jax.Array:
    """`[U]` The tile of each unit, in the order in which programs take them; any tile of a dead one."""
    if tiles.split is not None:
        return jnp.minimum(tiles.split.tile, tiles.seq.shape[0] - 1)
    return jnp.arange(tiles.seq.shape[0], dtype=jnp.int32) if tiles.order is None else tiles.order


def _ranges_of_rows(
    program: KernelProgram, visible: VisibleRange, tiles: Tiles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[W, consumers, rows]` Whether a row has a token, the first key that this sees, one past the last."""
    consumer = jnp.arange(program.num_consumers, dtype=jnp.int32)[None, :, None]
    row = jnp.arange(program.rows, dtype=jnp.int32)[None, None, :]
    token = consumer * program.tokens + row // program.group_size  # of each row, in its tile
    is_live = (row < program.tokens * program.group_size) & (token < tiles.q_len[:, None, None])
    place = tiles.q_start[:, None, None] + token
    first, end = (jnp.where(is_live, x.at[place].get(mode="clip"), 0) for x in visible)
    return is_live, first, end


def _sinks_of_rows(program: KernelProgram, sinks: jax.Array) -> jax.Array:
    """`[K + 1, rows]` The sink of each row of a consumer, in base 2; at last one that counts for nothing."""
    head = jnp.arange(program.rows, dtype=jnp.int32) % program.group_size
    sinks = sinks.astype(jnp.float32).reshape(-1, program.group_size)[:, head] * LOG2E
    return jnp.pad(sinks, ((0, 1), (0, 0)), constant_values=NEG)


def numbers_of_tokens(
    program: KernelProgram, tiles: Tiles, of_rows: jax.Array, others: jax.Array
) -> jax.Array:
    """Numbers of rows, such as the log-sum-exp, as those of the tokens of a list.

    Args:
        program: What is static.
        tiles: The list.
        of_rows: `[W, consumers, K, rows]` The numbers.
        others: `[T, N]` Those of tokens that the list does not have.
    """
    (_, consumers, K, _), (T, N) = of_rows.shape, others.shape
    token = jnp.arange(consumers * program.tokens, dtype=jnp.int32)[None, :]
    place = jnp.where(token < tiles.q_len[:, None], tiles.q_start[:, None] + token, T)
    consumer = jnp.arange(tiles.seq.shape[0], dtype=jnp.int32)[:, None] * consumers + token // program.tokens
    first_row = consumer * (K * program.rows) + token % program.tokens * program.group_size
    # The same for all layers of a step: the compiler keeps one, and none where nobody reads the result.
    first_row = jnp.full((T,), -1, jnp.int32).at[place].set(first_row, mode="drop")[:, None]
    head = jnp.arange(N, dtype=jnp.int32)
    row = first_row + (head // program.group_size * program.rows + head % program.group_size)[None, :]
    return jnp.where(first_row >= 0, of_rows.reshape(-1).at[row].get(mode="clip"), others)
