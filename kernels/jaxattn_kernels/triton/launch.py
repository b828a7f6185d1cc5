"""Launches on the Pallas Triton backend: which program does which units of a list of tiles, in which order.

All but `launch` itself is plain arithmetic, which pictures of a launch use as it stands
(`jaxattn.viz.programs`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxattn_kernels.arrays import Tiles
from jaxattn_kernels.triton.parts import KernelConfig

MAX_TRITON_PROGRAMS = 512
"""Programs of one launch, at most: what the largest GPUs run at once, three or four on each multiprocessor.
Where a list has room for more work items, each program takes every 512th of those that are live, so that
room which a batch leaves empty costs nothing."""


def room_for_units(tiles: Tiles) -> int:
    """Units that a list has room for: pieces of the keys of its tiles, or, where none is split, its tiles."""
    return (tiles.seq if tiles.split is None else tiles.split.tile).shape[0]


def live_units(tiles: Tiles, num_live: Any) -> Any:
    """How many of these units are live, which stand first, given how many tiles are."""
    return num_live[...] if tiles.split is None else tiles.split.indptr[tiles.seq.shape[0]]


def operands_of(tiles: Tiles) -> tuple[Tiles, jax.Array]:
    """A list as a kernel is given it: what programs read of it, and by itself how many tiles are live.

    ptxas minds the order of operands: with the number amid the list, a decoding kernel takes 148 registers
    in place of 128 (tests/compile).
    """
    return dataclasses.replace(tiles, num_attending=None, num_live=None), tiles.num_live


class Unit(NamedTuple):
    """A tile and all its keys, or some of them.

    Attributes:
        tile: The tile.
        is_live: Whether it is a unit of any tile.
        is_whole: Whether it has all keys of its tile.
        key_start: Its first key.
        key_end: One past its last key.
    """

    tile: Any
    is_live: Any
    is_whole: Any
    key_start: Any
    key_end: Any


def unit_of(tiles: Tiles, number: Any) -> Unit:
    """The unit with a number, from arrays or in a kernel from references to them."""
    split = tiles.split
    if split is None:
        tile = number if tiles.order is None else tiles.order[number]
        return Unit(tile, True, True, tiles.kv_start[tile], tiles.kv_end[tile])
    num_tiles = tiles.seq.shape[0]
    tile = jnp.minimum(split.tile[number], num_tiles - 1)
    is_live = split.tile[number] < num_tiles
    is_whole = split.indptr[tile + 1] - split.indptr[tile] == 1
    return Unit(tile, is_live, is_whole, split.kv_start[number], split.kv_end[number])


def work_item(turn: Any, program: Any) -> Any:
    """The work item that a program does in one of its turns, of which all programs together do a round."""
    # Odd rounds run backwards: where long tiles come first, everybody's share is then equally long.
    place = jnp.where((turn & 1) == 0, program, MAX_TRITON_PROGRAMS - 1 - program)
    return turn * MAX_TRITON_PROGRAMS + place


def launch(
    kernel: Callable[..., None],
    name: str,
    items: int,
    live_items: Callable[..., Any],
    inputs: tuple,
    outputs: tuple,
    before: Any = None,
    *,
    config: KernelConfig,
    interpret: bool,
) -> tuple:
    """Run `kernel(item, *inputs, *outputs)` for every live work item, all arguments as references.

    Args:
        kernel: The kernel.
        name: Its name.
        items: Work items that there is room for.
        live_items: From the inputs, how many of them are live, which come first; asked where a launch has
            fewer programs than there is room for.
        inputs: Arrays, in pytrees.
        outputs: Shapes of the results, in pytrees.
        before: What the first outputs hold before, whose memory they take; None for nothing.
        config: Sizes of the launch.
        interpret: Run on the CPU, in the interpreter of Pallas.
    """
    anywhere, first = pl.BlockSpec(memory_space=pl.ANY), len(jax.tree.leaves(inputs))

    def body(*refs: Any) -> None:
        arguments = (*refs[: len(inputs)], *refs[len(inputs) + 1 :])
        _for_each(lambda item: kernel(item, *arguments), items, lambda: live_items(*arguments))

    return pl.pallas_call(
        body,
        grid=(min(items, MAX_TRITON_PROGRAMS),),
        in_specs=jax.tree.map(lambda _: anywhere, (*inputs, before)),
        out_specs=jax.tree.map(lambda _: anywhere, outputs),
        out_shape=outputs,
        input_output_aliases={first + i: i for i in range(len(jax.tree.leaves(before)))},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name=name,
    )(*inputs, before)


def _for_each(run: Callable[[Any], None], items: int, live_items: Callable[[], Any]) -> None:
    """Run this program's share of the items that there is room for."""
    program = pl.program_id(0)
    if items <= MAX_TRITON_PROGRAMS:  # a dead one ends at once
        run(program)
        return
    live = live_items()

    def step(turn, _):
        item = work_item(turn, program)
        pl.when(item < live)(lambda: run(item))

    lax.fori_loop(0, (live + (MAX_TRITON_PROGRAMS - 1)) // MAX_TRITON_PROGRAMS, step, None)


def like(array: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """The shape of a result that varies over the same axes of a mesh as an array does."""
    return jax.eval_shape(lambda x: jnp.broadcast_to(x.ravel()[0], shape).astype(dtype), array)
