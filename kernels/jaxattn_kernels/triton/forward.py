"""Ragged attention on the Pallas Triton backend: Ampere and every later NVIDIA GPU.

One kernel serves prefill, chunked prefill, decode and mixed batches. What distinguishes them is
the tile list. The visible key range of every token comes as two arrays, so causal, windowed and
two-sided attention are the same code, and a mask that is a range needs no new kernel. Where the
keys of a tile are split among programs, a second kernel merges their partial results.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxattn_kernels.arrays import Attended, KeyLookup, KVScales, Tiles, VisibleRange
from jaxattn_kernels.triton.launch import launch, like, live_units, operands_of, room_for_units, unit_of
from jaxattn_kernels.triton.parts import (
    LOG2E,
    KernelConfig,
    Keys,
    Layer,
    Rows,
    Shape,
    base2_logits,
    block_of,
    for_blocks,
    load,
    mask_of,
    product,
    rows_of,
    store,
)

# Finite, so that a row that has seen nothing yet has exp2(NEG - NEG) = 1 and not NaN.
NEG = -1e30


def config_for(*, block_rows: int, head_dim: int, itemsize: int, quantized: bool = False) -> KernelConfig:
    """The sizes that compile without spilling registers on sm_80 to sm_120 (tests/compile).

    16-bit operands: the accumulator decides, a row of it per query row, since it stays in registers
    through all loops. Twice the accumulator leaves room for half the keys; four times needs twice
    the threads. Loads run one step ahead of the products; two steps where a tile of 64 rows has a small
    accumulator, as ptxas then needs fewer registers on three GPUs of four, and spills on none. Keys of
    one byte are widened in registers, and leave room for half as many.

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
    accumulator = block_rows * block_of(head_dim)
    is_small, is_large = accumulator <= 64 * 64, accumulator > 64 * 128
    block_k = (16 if is_large else 32) if quantized else (64 if is_small else 32)
    num_stages = 3 if is_small and block_rows >= 64 else 2
    return KernelConfig(block_k=block_k, num_warps=8 if is_large else 4, num_stages=num_stages)


def ragged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: VisibleRange,
    lookup: KeyLookup,
    tile_lists: tuple[Tiles, ...],
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
        interpret: Run on the CPU, in the interpreter of Pallas.
        config: Sizes of the launches; chosen by `config_for` where None.

    Returns:
        `out [T, N, H]` in the dtype of `q`, and `lse [T, N]`, a natural logarithm; 0 and -inf for a
        token that sees no key. Rows that no tile covers are undefined.
    """
    layer, done = Layer(page_size, scale, logits_soft_cap, windowed), None
    for tiles in tile_lists:
        inputs = _Inputs(*operands_of(tiles), lookup, visible, q, k, v, sinks, kv_scales)
        done = _attend_list(inputs, done, layer, interpret=interpret, config=config)
    assert done is not None
    return done


class _Inputs(NamedTuple):
    """What the programs of a launch read: see `ragged_attention`."""

    tiles: Tiles
    num_live: Any
    lookup: KeyLookup
    visible: VisibleRange
    q: Any
    k: Any
    v: Any
    sinks: Any
    kv_scales: KVScales | None


def _attend_list(
    inputs: _Inputs, done: Any, layer: Layer, *, interpret: bool, config: KernelConfig | None
) -> Any:
    """Attend with one list, into `done`, the results of the lists before it, where there are any."""
    tiles, q, K = inputs.tiles, inputs.q, inputs.k.shape[1]
    T, N, H = q.shape
    config = config or config_for(
        block_rows=block_of(tiles.block_q * (N // K)), head_dim=H, itemsize=q.dtype.itemsize,
        quantized=inputs.kv_scales is not None,
    )  # fmt: skip
    shape = Shape.of_launch(config, q.shape, K, tiles.block_q)
    num_units, num_tiles = room_for_units(tiles), tiles.seq.shape[0]

    def abstract(rows: int, dtype: Any) -> Attended:
        return Attended(like(q, (rows, N, H), dtype), like(q, (rows, N), jnp.float32))

    result = abstract(T, q.dtype)
    partial = None if tiles.split is None else abstract(num_units * tiles.block_q, jnp.float32)
    done, partial = launch(
        functools.partial(_ragged_attention, shape=shape, layer=layer),
        f"ragged_attention_q{shape.block_rows}",
        num_units * shape.items_per_unit,
        lambda inputs, *_: live_units(inputs.tiles, inputs.num_live) * shape.items_per_unit,
        (inputs,), (result, partial), done,
        config=config, interpret=interpret,
    )  # fmt: skip
    if partial is None:
        return done
    (done,) = launch(
        functools.partial(_merge_attention, shape=shape),
        f"merge_attention_q{shape.block_rows}",
        num_tiles * shape.items_per_unit,
        lambda _, num_live, *__: num_live[...] * shape.items_per_unit,
        (tiles, inputs.num_live, inputs.visible, inputs.sinks, partial), (result,), done,
        config=config, interpret=interpret,
    )  # fmt: skip
    return done


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
    def begin(cls, rows: Rows, sinks, is_whole, shape: Shape) -> _Softmax:
        """Before the first key. A sink comes first, once per row that sees a key; its value is 0."""
        acc = jnp.zeros((shape.block_rows, shape.head_block), jnp.float32)
        if sinks is None:
            none = jnp.zeros((shape.block_rows,), jnp.float32)
            return cls(acc, none + NEG, none)
        has_sink = rows.is_live & (rows.first < rows.end) & is_whole
        sink = load(sinks.at[rows.q_head], mask=has_sink, other=0.0)
        return cls(acc, jnp.where(has_sink, sink * LOG2E, NEG), jnp.where(has_sink, 1.0, 0.0))

    def finish(self, v_scale: Any = 1.0) -> tuple[jax.Array, jax.Array]:
        """Outputs and the base-2 logarithm of the denominator; 0 and -inf where nothing was seen."""
        total = jnp.where(self.total > 0, self.total, 1.0)
        lse = jnp.where(self.total > 0, self.max + jnp.log(total) * LOG2E, -jnp.inf)
        return self.acc * (v_scale / total)[:, None], lse


def _ragged_attention(
    item, inputs: _Inputs, result: Any, partial: Any, *, shape: Shape, layer: Layer
) -> None:
    """One key head, and one part, of a tile with all its keys, or with those of one unit.

    Args:
        item: Number of the work item.
        inputs: References to what is read.
        result: References to the results of tokens.
        partial: References to the results of units that are not whole; None where no tile is split.
        shape: Sizes of the launch.
        layer: What is static about the layer.
    """
    tiles, scales = inputs.tiles, inputs.kv_scales
    number, head, part = shape.split_item(item)
    unit = unit_of(tiles, number)

    @pl.when(unit.is_live & (tiles.q_len[unit.tile] > part * shape.block_q))
    def _():
        rows = rows_of(tiles, unit.tile, head, part, inputs.visible, shape)
        keys = Keys(inputs.lookup.pages, inputs.lookup.start[tiles.seq[unit.tile]], head, layer.page_size)
        state = _Softmax.begin(rows, inputs.sinks, unit.is_whole, shape)
        state = _attend_keys(
            rows, keys, inputs, state, key_start=unit.key_start, key_end=unit.key_end,
            k_scale=1.0 if scales is None else scales.k[head], shape=shape, layer=layer,
        )  # fmt: skip
        out, lse = state.finish(1.0 if scales is None else scales.v[head])
        if partial is None:
            _store(result, rows.q_row, rows.is_live, rows, out, lse / LOG2E, shape)
            return
        # A unit that is its whole tile has the result; it is written at once, and not merged.
        to_result, to_partial = rows.is_live & unit.is_whole, rows.is_live & ~unit.is_whole
        place = jnp.where(to_result, rows.q_row, shape.tokens)
        _store(result, place, to_result, rows, out, lse / LOG2E, shape)
        place = jnp.where(to_partial, number * shape.tile_q + rows.token, partial.lse.shape[0])
        _store(partial, place, to_partial, rows, out, lse, shape)


def _merge_attention(
    item, tiles: Tiles, num_live, visible, sinks, partial: Any, result: Any, *, shape: Shape
) -> None:
    """One key head, and one part, of a tile whose keys were split among several units."""
    del num_live
    split, (w, head, part) = tiles.split, shape.split_item(item)
    assert split is not None
    first, end = split.indptr[w], split.indptr[w + 1]

    @pl.when((end - first > 1) & (tiles.q_len[w] > part * shape.block_q))
    def _():
        rows = rows_of(tiles, w, head, part, visible, shape)
        d = jnp.arange(shape.head_block, dtype=jnp.int32)
        mask = mask_of(rows.is_live, shape)

        def add_unit(unit, state: _Softmax) -> _Softmax:
            place = unit * shape.tile_q + rows.token
            out = load(partial.out.at[place[:, None], rows.q_head[:, None], d[None, :]], mask=mask, other=0.0)
            lse = load(partial.lse.at[place, rows.q_head], mask=rows.is_live, other=-jnp.inf)
            new_max = jnp.maximum(state.max, lse)
            rescale, weight = jnp.exp2(state.max - new_max), jnp.exp2(lse - new_max)
            acc = state.acc * rescale[:, None] + out * weight[:, None]
            return _Softmax(acc, new_max, state.total * rescale + weight)

        state = lax.fori_loop(first, end, add_unit, _Softmax.begin(rows, sinks, True, shape))
        out, lse = state.finish()
        _store(result, rows.q_row, rows.is_live, rows, out, lse / LOG2E, shape)


def _store(refs: Any, place, is_stored, rows: Rows, out, lse, shape: Shape) -> None:
    """Write outputs to rows `place` of `refs`, which lie out of bounds where they are not stored."""
    d = jnp.arange(shape.head_block, dtype=jnp.int32)
    where = refs.out.at[place[:, None], rows.q_head[:, None], d[None, :]]
    store(where, out.astype(refs.out.dtype), mask=mask_of(is_stored, shape))
    store(refs.lse.at[place, rows.q_head], lse, mask=is_stored)


def _attend_keys(
    rows: Rows, keys: Keys, inputs: _Inputs, state: _Softmax,
    *, key_start, key_end, k_scale, shape: Shape, layer: Layer,
) -> _Softmax:  # fmt: skip
    """Add the keys `key_start .. key_end` of a sequence to the softmax of the rows."""
    block_k, windowed, q = shape.block_k, layer.windowed, rows.load(inputs.q, shape)

    def visible(positions):
        sees = positions[None, :] < rows.end[:, None]
        # Without a window this comparison is true throughout, and costs registers.
        return sees & (rows.first[:, None] <= positions[None, :]) if windowed else sees

    def attend_block(j, state: _Softmax, masked: bool) -> _Softmax:
        positions = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
        ok = positions < key_end if masked else positions >= 0
        if masked and windowed:
            ok &= positions >= key_start
        slots = keys.slots(j * block_k, positions, ok)
        k = keys.load(inputs.k, slots, ok, q.dtype, shape)
        s = base2_logits(product(q, k.T), layer.scale * k_scale, layer.logits_soft_cap)
        sees = visible(positions) if masked else True
        if masked:
            s = jnp.where(sees, s, NEG)
        new_max = jnp.maximum(state.max, s.max(axis=1))
        rescale = jnp.exp2(state.max - new_max)
        p = jnp.exp2(s - new_max[:, None])
        if masked:
            p = jnp.where(sees, p, 0.0)
        v = keys.load(inputs.v, slots, ok, q.dtype, shape)
        pv = product(p.astype(v.dtype), v)
        return _Softmax(state.acc * rescale[:, None] + pv, new_max, state.total * rescale + p.sum(axis=1))

    return for_blocks(attend_block, state, rows, key_start, key_end, block_k=block_k, windowed=windowed)
