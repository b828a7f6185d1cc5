"""The second kernel where keys are split: it merges the partial results of a tile's units, on any GPU.

It needs neither shared memory nor barriers of its own, nor any instruction that only one generation has.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.arrays import Attended, Tiles
from jaxattn_kernels.mosaic_gpu import plain_rows, softmax
from jaxattn_kernels.mosaic_gpu.program import LOG2E, NEG, KernelProgram, for_own_units, run

MERGED = 32
"""Partial results that a program loads at once."""


def merge(program: KernelProgram, tiles: Tiles, partial: Attended, sinks, out, lse, interpret) -> None:
    """Merge the units of each tile that has several.

    Args:
        program: What is static about the programs that wrote the partial results.
        tiles: The tiles and their split.
        partial: `out [units, tokens, N, H]` and, in base 2, `lse [units, consumers, K, rows]`, references;
            of at least `MERGED` units.
        sinks: `[N]` Sinks, or None.
        out: `[T, N, H]` Reference to the outputs.
        lse: `[W, consumers, K, rows]` Reference to the log-sum-exp of each row.
        interpret: How to simulate the GPU, or None.
    """
    split = tiles.split
    assert split is not None
    arguments = _Arguments(
        q_start=tiles.q_start,
        q_len=tiles.q_len,
        indptr=split.indptr,
        sinks=None if sinks is None else sinks.astype(jnp.float32) * LOG2E,
        partial=partial,
        out=out,
        lse=lse,
    )
    run(
        functools.partial(_merge, program),
        arguments,
        num_units=tiles.seq.shape[0],
        num_heads=out.shape[1],
        interpret=interpret,
    )


class _Arguments(NamedTuple):
    """Arrays in the GPU's memory that a program of the merge reads and writes.

    Attributes:
        q_start: `[W]` First token of each tile.
        q_len: `[W]` Its tokens.
        indptr: `[W + 1]` Prefix sums of its units.
        sinks: `[N]` Sinks in base 2, or None.
        partial: `out [units, tokens, N, H]` and, in base 2, `lse [units, consumers, K, rows]`.
        out: `[T, N, H]` Outputs.
        lse: `[W, consumers, K, rows]` Log-sum-exp of each row.
    """

    q_start: Any
    q_len: Any
    indptr: Any
    sinks: Any
    partial: Any
    out: Any
    lse: Any


def _merge(program: KernelProgram, refs: _Arguments) -> None:
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
            weights = plgpu.layout_cast(softmax.across(weight, (MERGED, H)), layout)
            acc = acc * rescale + (out * weights).sum(axis=0)
            return acc, new_top, total * rescale + weight.sum()

        acc = plgpu.layout_cast(jnp.zeros((H,), jnp.float32), layout.reduce(0))
        state = acc, jnp.float32(NEG), jnp.float32(0)
        acc, top, total = lax.fori_loop(0, (end - first + (MERGED - 1)) // MERGED, add_units, state)
        rescale = 1.0
        if refs.sinks is not None:
            rescale, top, total = softmax.add_sink(top, total, refs.sinks[head])
        out = acc * (rescale / jnp.where(total > 0, total, 1.0))
        plain_rows.store_anywhere(refs.out.at[refs.q_start[w] + token, head], out.astype(refs.out.dtype))
        refs.lse[w, me, head // G, row] = jnp.where(total > 0, (top + jnp.log2(total)) / LOG2E, -jnp.inf)

    @functools.partial(for_own_units, refs.q_len.shape[0])
    def _(w):
        @pl.when(refs.indptr[w + 1] - refs.indptr[w] > 1)
        def _():
            pl.loop(0, refs.q_len[w])(lambda token: merge_token(w, token))
