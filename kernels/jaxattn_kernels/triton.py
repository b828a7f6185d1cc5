"""Ragged attention on the Pallas Triton backend: Ampere and every later NVIDIA GPU.

One kernel serves prefill, chunked prefill, decode and mixed batches. What distinguishes them is
the tile list. The visible key range of every token comes as two arrays, so causal, windowed and
two-sided attention are the same code, and a mask that is a range needs no new kernel. Where the
keys of a tile are split among programs, a second kernel merges their partial results.

Every call that exists only on Pallas's Triton backend is made in this file (`plgpu`).
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
from jax.experimental.pallas import triton as plgpu

from jaxattn_kernels.arrays import (
    Attended,
    KeyLookup,
    KVScales,
    SplitArrays,
    TileArrays,
    TileList,
    VisibleRange,
)

# Softmax in base 2: the GPU has exp2, and log2(e) goes into the scale.
LOG2E = math.log2(math.e)
# Finite, so that a row that has seen nothing yet has exp2(NEG - NEG) = 1 and not NaN.
NEG = -1e30
# The narrowest operand of a tensor-core product.
MIN_DOT = 16
MAX_HEAD_DIM = 256
"""The largest head that the kernel serves."""
MAX_PROGRAMS = 512
"""Programs of one launch, at most: what the largest GPUs run at once, three or four on each multiprocessor.
Where a list has room for more units, each program takes every 512th of those that are live, so that room
which a batch leaves empty costs nothing."""


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


def config_for(*, block_rows: int, head_dim: int, itemsize: int, quantized: bool = False) -> KernelConfig:
    """The sizes that compile without spilling registers on sm_80 to sm_120 (tests/compile).

    16-bit operands: the accumulator decides, a row of it per query row, since it stays in registers
    through all loops. Twice the accumulator leaves room for half the keys; four times needs twice
    the threads. Loads run one step ahead of the products. Keys of one byte are widened in registers, and
    leave room for half as many.

    32-bit operands: the product in full float32 runs outside the tensor cores, and holds whole rows
    of both operands in registers; so few rows, few keys, many threads, and no load ahead.

    Args:
        block_rows: Rows of the query tile.
        head_dim: Size of a head.
        itemsize: Bytes per element of the queries.
        quantized: Whether keys and values have one byte per element.
    """
    if itemsize > 2:
        return KernelConfig(block_k=16, num_warps=8, num_stages=1, max_rows=32)
    accumulator = block_rows * _block(head_dim)
    is_small, is_large = accumulator <= 64 * 64, accumulator > 64 * 128
    block_k = (16 if is_large else 32) if quantized else (64 if is_small else 32)
    return KernelConfig(block_k=block_k, num_warps=8 if is_large else 4, num_stages=2)


def ragged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: VisibleRange,
    lookup: KeyLookup,
    tile_lists: tuple[TileList, ...],
    *,
    sinks: jax.Array | None = None,
    kv_scales: KVScales | None = None,
    page_size: int | None,
    scale: float,
    logits_soft_cap: float | None,
    windowed: bool,
    interpret: bool,
    config: KernelConfig | None = None,
) -> Attended:
    """Attend with every tile of every list; each row of the output is written by one program.

    Args:
        q: `[T, N, H]` Queries, packed.
        k: `[S, K, H]` Keys on one flat axis, packed or pages one after the other; in the dtype of `q`, or
            quantised, in one byte.
        v: `[S, K, H]` Values, like the keys.
        visible: Which keys each token sees.
        lookup: Where a sequence's keys lie.
        tile_lists: The tiles.
        sinks: `[N]` float32 One logit per query head that takes its share of the softmax and has no
            value; None for none.
        kv_scales: What quantised keys and values stand for; None where they are not.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        windowed: Whether a token's range may begin after the sequence does; otherwise
            `visible.start` is 0 everywhere.
        interpret: Run on the CPU, as the interpreter of Pallas does.
        config: Sizes of the launches; chosen by `config_for` where None.

    Returns:
        `out [T, N, H]` in the dtype of `q`, and `lse [T, N]`, a natural logarithm; 0 and -inf for a
        token that sees no key. Rows that no tile covers are undefined.
    """
    done = None
    for tile_list in tile_lists:
        done = _attend_list(
            q, k, v, visible, lookup, tile_list, sinks, kv_scales, done, page_size=page_size, scale=scale,
            logits_soft_cap=logits_soft_cap, windowed=windowed, interpret=interpret, config=config,
        )  # fmt: skip
    assert done is not None
    return done


class _Shape(NamedTuple):
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
        return self.num_q_heads // self.num_kv_heads

    @property
    def block_rows(self) -> int:
        return _block(self.block_q * self.group_size)

    @property
    def head_block(self) -> int:
        return _block(self.head_dim)

    @property
    def programs_per_unit(self) -> int:
        """One per key head and per part of a tile that is too tall for one program."""
        return self.num_kv_heads * pl.cdiv(self.tile_q, self.block_q)


class _Work(NamedTuple):
    """The arrays of a `TileList`."""

    tiles: TileArrays
    split: SplitArrays | None
    order: jax.Array | None
    num_live: jax.Array | None

    @property
    def max_tiles(self) -> int:
        return self.tiles.seq.shape[0]

    @property
    def max_units(self) -> int:
        """Units that there is room for: pieces of the tiles' keys, or the tiles."""
        return self.max_tiles if self.split is None else self.split.tile.shape[0]

    def live_tiles(self) -> Any:
        return self.max_tiles if self.num_live is None else self.num_live[0]

    def live_units(self) -> Any:
        return self.live_tiles() if self.split is None else self.split.indptr[self.max_tiles]


def _attend_list(
    q, k, v, visible, lookup, tile_list, sinks, kv_scales, done, *, config, interpret, **options
) -> Attended:
    """Attend with one list, into `done`, the results of the lists before it, where there are any."""
    tile_q, work = tile_list.block_q, _Work(*(getattr(tile_list, name) for name in _Work._fields))
    (T, N, H), K = q.shape, k.shape[1]
    config = config or config_for(
        block_rows=_block(tile_q * (N // K)), head_dim=H, itemsize=q.dtype.itemsize,
        quantized=kv_scales is not None,
    )  # fmt: skip
    block_q = max(1, min(tile_q, config.max_rows // (N // K)))
    shape = _Shape(T, N, K, H, tile_q, block_q, config.block_k)

    def launch(kernel: functools.partial, units: int, inputs: tuple, outputs: tuple, done: Attended | None):
        programs = units * shape.programs_per_unit
        in_place = range(len(jax.tree.leaves(done)))
        before = len(jax.tree.leaves((work, inputs)))
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            functools.partial(_for_each, kernel, programs, shape.programs_per_unit),
            grid=(min(programs, MAX_PROGRAMS),),
            in_specs=jax.tree.map(lambda _: anywhere, (work, *inputs, done)),
            out_specs=jax.tree.map(lambda _: anywhere, outputs),
            out_shape=outputs,
            input_output_aliases={before + i: i for i in in_place},
            compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
            interpret=interpret,
            name=f"{kernel.func.__name__.strip('_')}_q{shape.block_rows}",
        )(work, *inputs, done)

    def abstract(rows: int, dtype: Any) -> Attended:
        out: Any = jax.ShapeDtypeStruct((rows, N, H), dtype)
        lse: Any = jax.ShapeDtypeStruct((rows, N), jnp.float32)
        return Attended(out, lse)

    result = abstract(T, q.dtype)
    partial = None if work.split is None else abstract(work.max_units * tile_q, jnp.float32)
    attend = functools.partial(_ragged_attention, shape=shape, **options)
    inputs = (lookup, visible, q, k, v, sinks, kv_scales)
    done, partial = launch(attend, work.max_units, inputs, (result, partial), done)
    if partial is None:
        return done
    merge = functools.partial(_merge_attention, shape=shape)
    (done,) = launch(merge, work.max_tiles, (visible, sinks, partial), (result,), done)
    return done


def _for_each(kernel: functools.partial, programs: int, programs_per_unit: int, work: _Work, *refs) -> None:
    """Run the kernel for this program's share of the `programs` that there is room for."""
    first = pl.program_id(0)
    if programs <= MAX_PROGRAMS:  # a dead one ends at once
        kernel(first, work, *refs)
        return
    units = work.live_tiles() if kernel.func is _merge_attention else work.live_units()
    live = units * programs_per_unit

    def step(i, _):
        # Odd rounds run backwards: where long tiles come first, everybody's share is then equally long.
        place = jnp.where((i & 1) == 0, first, MAX_PROGRAMS - 1 - first)
        program = i * MAX_PROGRAMS + place
        pl.when(program < live)(lambda: kernel(program, work, *refs))

    lax.fori_loop(0, (live + (MAX_PROGRAMS - 1)) // MAX_PROGRAMS, step, None)


class _Rows(NamedTuple):
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


def _rows_of(tiles, w, head, part, visible, shape: _Shape) -> _Rows:
    r, G = jnp.arange(shape.block_rows, dtype=jnp.int32), shape.group_size
    token = part * shape.block_q + r // G
    is_live = (token < tiles.q_len[w]) & (r < shape.block_q * G)
    # Loads and stores of dead rows go out of bounds, never onto a live row.
    q_row = jnp.where(is_live, tiles.q_start[w] + token, shape.tokens)
    first = plgpu.load(visible.start.at[q_row], mask=is_live, other=0)
    end = plgpu.load(visible.end.at[q_row], mask=is_live, other=0)
    return _Rows(token, is_live, q_row, head * G + r % G, first, end)


class _Softmax(NamedTuple):
    """State of an online softmax in base 2, all float32.

    Attributes:
        acc: `[block_rows, head_block]` Sum of weighted values.
        max: `[block_rows]` The largest logit so far.
        total: `[block_rows]` Sum of weights.
    """

    acc: jax.Array
    max: jax.Array
    total: jax.Array

    @classmethod
    def begin(cls, rows: _Rows, sinks, is_whole, shape: _Shape) -> _Softmax:
        """Before the first key. A sink comes first, once per row that sees a key; its value is 0."""
        acc = jnp.zeros((shape.block_rows, shape.head_block), jnp.float32)
        if sinks is None:
            none = jnp.zeros((shape.block_rows,), jnp.float32)
            return cls(acc, none + NEG, none)
        has_sink = rows.is_live & (rows.first < rows.end) & is_whole
        sink = plgpu.load(sinks.at[rows.q_head], mask=has_sink, other=0.0)
        return cls(acc, jnp.where(has_sink, sink * LOG2E, NEG), jnp.where(has_sink, 1.0, 0.0))

    def finish(self, v_scale=1.0) -> tuple[jax.Array, jax.Array]:
        """Outputs and the base-2 logarithm of the denominator; 0 and -inf where nothing was seen."""
        total = jnp.where(self.total > 0, self.total, 1.0)
        lse = jnp.where(self.total > 0, self.max + jnp.log(total) * LOG2E, -jnp.inf)
        return self.acc * (v_scale / total)[:, None], lse


def _ragged_attention(
    program, work: _Work, lookup, visible, q_ref, k_ref, v_ref, sinks, kv_scales, _done, result, partial,
    *, shape: _Shape, **options,
) -> None:  # fmt: skip
    """One key head, and one part, of a tile with all its keys, or with those of one unit."""
    tiles, split = work.tiles, work.split
    K, unit = shape.num_kv_heads, program // shape.programs_per_unit
    head, part = program % K, program % shape.programs_per_unit // K
    if split is None:
        w, is_live, is_whole = unit if work.order is None else work.order[unit], True, True
        key_start, key_end = tiles.kv_start[w], tiles.kv_end[w]
    else:
        num_tiles = tiles.seq.shape[0]
        w = jnp.minimum(split.tile[unit], num_tiles - 1)
        is_live = split.tile[unit] < num_tiles
        is_whole = split.indptr[w + 1] - split.indptr[w] == 1
        key_start, key_end = split.kv_start[unit], split.kv_end[unit]

    @pl.when(is_live & (tiles.q_len[w] > part * shape.block_q))
    def _():
        rows = _rows_of(tiles, w, head, part, visible, shape)
        state = _attend_keys(
            rows, q_ref, k_ref, v_ref, lookup.pages, _Softmax.begin(rows, sinks, is_whole, shape),
            head=head, key_start=key_start, key_end=key_end, key_base=lookup.start[tiles.seq[w]],
            k_scale=1.0 if kv_scales is None else kv_scales.k[head], shape=shape, **options,
        )  # fmt: skip
        out, lse = state.finish(1.0 if kv_scales is None else kv_scales.v[head])
        if partial is None:
            _store(result, rows.q_row, rows.is_live, rows, out, lse / LOG2E, shape)
            return
        # A unit that is its whole tile has the result; it is written at once, and not merged.
        to_result, to_partial = rows.is_live & is_whole, rows.is_live & ~is_whole
        _store(
            result, jnp.where(to_result, rows.q_row, shape.tokens), to_result, rows, out, lse / LOG2E, shape
        )
        num_rows = partial.lse.shape[0]
        place = jnp.where(to_partial, unit * shape.tile_q + rows.token, num_rows)
        _store(partial, place, to_partial, rows, out, lse, shape)


def _merge_attention(program, work: _Work, visible, sinks, partial, _done, result, *, shape: _Shape) -> None:
    """One key head, and one part, of a tile whose keys were split among several units."""
    tiles, split = work.tiles, work.split
    assert split is not None
    K, w = shape.num_kv_heads, program // shape.programs_per_unit
    head, part = program % K, program % shape.programs_per_unit // K
    first, end = split.indptr[w], split.indptr[w + 1]

    @pl.when((end - first > 1) & (tiles.q_len[w] > part * shape.block_q))
    def _():
        rows = _rows_of(tiles, w, head, part, visible, shape)
        d = jnp.arange(shape.head_block, dtype=jnp.int32)
        mask = _mask(rows.is_live, shape)

        def add_unit(unit, state: _Softmax) -> _Softmax:
            place = unit * shape.tile_q + rows.token
            out = plgpu.load(
                partial.out.at[place[:, None], rows.q_head[:, None], d[None, :]], mask=mask, other=0.0
            )
            lse = plgpu.load(partial.lse.at[place, rows.q_head], mask=rows.is_live, other=-jnp.inf)
            new_max = jnp.maximum(state.max, lse)
            rescale, weight = jnp.exp2(state.max - new_max), jnp.exp2(lse - new_max)
            acc = state.acc * rescale[:, None] + out * weight[:, None]
            return _Softmax(acc, new_max, state.total * rescale + weight)

        state = lax.fori_loop(first, end, add_unit, _Softmax.begin(rows, sinks, True, shape))
        out, lse = state.finish()
        _store(result, rows.q_row, rows.is_live, rows, out, lse / LOG2E, shape)


def _mask(rows_ok: jax.Array, shape: _Shape) -> jax.Array:
    """`[rows, head_block]` The elements that exist."""
    mask = rows_ok[:, None]
    if shape.head_block != shape.head_dim:
        mask &= (jnp.arange(shape.head_block, dtype=jnp.int32) < shape.head_dim)[None, :]
    return jnp.broadcast_to(mask, (rows_ok.shape[0], shape.head_block))


def _store(refs: Any, place, is_stored, rows: _Rows, out, lse, shape: _Shape) -> None:
    """Write outputs to rows `place` of `refs`, which lie out of bounds where they are not stored."""
    d = jnp.arange(shape.head_block, dtype=jnp.int32)
    where = refs.out.at[place[:, None], rows.q_head[:, None], d[None, :]]
    plgpu.store(where, out.astype(refs.out.dtype), mask=_mask(is_stored, shape))
    plgpu.store(refs.lse.at[place, rows.q_head], lse, mask=is_stored)


def _attend_keys(
    rows: _Rows, q_ref, k_ref, v_ref, pages_ref, state: _Softmax,
    *, head, key_start, key_end, key_base, k_scale, shape: _Shape,
    page_size, scale, logits_soft_cap, windowed,
) -> _Softmax:  # fmt: skip
    """Add the keys `key_start .. key_end` of a sequence to the softmax of the rows."""
    block_k = shape.block_k
    # A plain arange: a masked index here would turn 128-bit loads into 16-bit ones.
    d = jnp.arange(shape.head_block, dtype=jnp.int32)
    q_place = (rows.q_row[:, None], rows.q_head[:, None], d[None, :])
    q = plgpu.load(q_ref.at[q_place], mask=_mask(rows.is_live, shape), other=0.0)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def slots_of(j, positions, ok):
        if pages_ref is None:
            return key_base + positions
        if page_size % block_k == 0:  # the whole block lies in one page
            page = pages_ref[key_base + (j * block_k) // page_size]
        else:
            page = plgpu.load(pages_ref.at[key_base + positions // page_size], mask=ok, other=0)
        return page * page_size + positions % page_size

    def load_block(ref, slots, ok):
        place = (slots[:, None], head, d[None, :])
        # Every number of eight bits is one of 16, too: the product is of the type of the queries.
        return plgpu.load(ref.at[place], mask=_mask(ok, shape), other=jnp.zeros((), ref.dtype)).astype(
            q.dtype
        )

    def visible(positions):
        sees = positions[None, :] < rows.end[:, None]
        # Without a window this comparison is true throughout, and costs registers.
        return sees & (rows.first[:, None] <= positions[None, :]) if windowed else sees

    def attend_block(j, state: _Softmax, masked: bool) -> _Softmax:
        positions = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
        ok = positions < key_end if masked else positions >= 0
        if masked and windowed:
            ok &= positions >= key_start
        slots = slots_of(j, positions, ok)
        k = load_block(k_ref, slots, ok)
        s = jnp.dot(q, k.T, preferred_element_type=jnp.float32, precision=precision)
        if logits_soft_cap is None:
            s = s * (scale * LOG2E * k_scale)
        else:
            s = jnp.tanh(s * (scale / logits_soft_cap * k_scale)) * (logits_soft_cap * LOG2E)
        sees = visible(positions) if masked else True
        if masked:
            s = jnp.where(sees, s, NEG)
        new_max = jnp.maximum(state.max, s.max(axis=1))
        rescale = jnp.exp2(state.max - new_max)
        p = jnp.exp2(s - new_max[:, None])
        if masked:
            p = jnp.where(sees, p, 0.0)
        v = load_block(v_ref, slots, ok)
        pv = jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=precision)
        return _Softmax(state.acc * rescale[:, None] + pv, new_max, state.total * rescale + p.sum(axis=1))

    # Blocks that every live row sees whole need no mask: [all_begin, all_end) of [begin, stop).
    begin, stop = key_start // block_k, (key_end + block_k - 1) // block_k
    all_end = jnp.min(jnp.where(rows.is_live, rows.end, key_end)) // block_k
    all_begin = (jnp.max(rows.first) + block_k - 1) // block_k if windowed else begin
    all_begin = jnp.clip(all_begin, begin, stop)
    all_end = jnp.clip(all_end, all_begin, stop)
    if windowed:
        state = lax.fori_loop(begin, all_begin, functools.partial(attend_block, masked=True), state)
    state = lax.fori_loop(all_begin, all_end, functools.partial(attend_block, masked=False), state)
    return lax.fori_loop(all_end, stop, functools.partial(attend_block, masked=True), state)


def _block(n: int) -> int:
    """The smallest block size that holds n: a power of two that a tensor-core product accepts."""
    return max(MIN_DOT, 1 << (n - 1).bit_length())
