"""A picture of a launch: which program of the Triton kernel does which units of work, one after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jaxattn.metadata.consumers import triton_tiling
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.viz.style import EMPTY, INK, color_of, count, legend, panels, picture, sequence_handles
from jaxattn_kernels.arrays import Tiles
from jaxattn_kernels.triton.forward import config_for
from jaxattn_kernels.triton.launch import (
    MAX_TRITON_PROGRAMS,
    live_units,
    room_for_units,
    unit_of,
    work_item,
)
from jaxattn_kernels.triton.parts import Shape, block_of

MAX_SPACED = 96
"""Programs of a picture that has room for gaps between them."""


class Launch(NamedTuple):
    """What the programs of one launch do: an entry per piece of work, a unit for one key head.

    Attributes:
        programs: Programs launched.
        program: `[n]` The program that does it.
        turn: `[n]` In which of its turns.
        tile: `[n]` Its tile.
        head: `[n]` Its key head.
        seq: `[n]` Row of the tile's sequence; R for padding, whose output is zeros.
        keys: `[n]` Keys that it walks over, in whole blocks.
        merged: Tiles whose keys were split, and which a second launch merges.
    """

    programs: int
    program: np.ndarray
    turn: np.ndarray
    tile: np.ndarray
    head: np.ndarray
    seq: np.ndarray
    keys: np.ndarray
    merged: int

    def begins(self) -> np.ndarray:
        """`[n]` Keys that its program has walked over before."""
        # A program does its pieces in the order in which they stand.
        order = np.argsort(self.program, kind="stable")
        program, keys = self.program[order], self.keys[order]
        before = np.cumsum(keys) - keys
        first = np.searchsorted(program, program)  # the first piece of each piece's program
        begins = np.empty_like(before)
        begins[order] = before - before[first]
        return begins

    def shares(self) -> np.ndarray:
        """Keys that each program with work walks over."""
        shares = np.bincount(self.program, self.keys, minlength=self.programs)
        return shares[shares > 0]


def launch_of(tiles: Tiles, spec: AttentionSpec, *, itemsize: int = 2) -> Launch:
    """Who does what in the launch for a list of tiles, by the kernel's own arithmetic.

    Args:
        tiles: The list, of the Triton kernel's tiling.
        spec: The layer.
        itemsize: Bytes per element of queries and keys, on which the size of a program depends.
    """
    N, K, H = spec.num_q_heads, spec.num_kv_heads, spec.head_dim
    config = config_for(block_rows=block_of(tiles.block_q * (N // K)), head_dim=H, itemsize=itemsize)
    shape = Shape.of_launch(config, (0, N, H), K, tiles.block_q)  # how many tokens there are changes nothing
    programs = min(room_for_units(tiles) * shape.items_per_unit, MAX_TRITON_PROGRAMS)
    num_items = int(live_units(tiles, tiles.num_live)) * shape.items_per_unit
    turn, program = (x.ravel() for x in np.indices((-(-num_items // MAX_TRITON_PROGRAMS), programs)))
    item = np.asarray(work_item(turn, program))
    in_order = np.argsort(item)[:num_items]
    turn, program, item = turn[in_order], program[in_order], item[in_order]
    number, head, part = shape.split_item(item)
    unit = unit_of(tiles, number)
    tile, key_start, key_end = (np.asarray(x) for x in (unit.tile, unit.key_start, unit.key_end))
    has_rows = np.asarray(tiles.q_len)[tile] > part * shape.block_q
    num_blocks = -(-key_end // config.block_k) - key_start // config.block_k
    merged = 0 if tiles.split is None else int((np.diff(np.asarray(tiles.split.indptr)) > 1).sum())
    return Launch(
        programs=programs,
        program=program[has_rows],
        turn=turn[has_rows],
        tile=tile[has_rows],
        head=head[has_rows],
        seq=np.asarray(tiles.seq)[tile][has_rows],
        keys=(num_blocks * config.block_k)[has_rows],
        merged=merged,
    )


def plot_programs(metadata: AttentionMetadata, spec: AttentionSpec, *, itemsize: int = 2) -> Figure:
    """Draw the launches of one layer: programs downwards, and to the right the keys that each walks over.

    A bar is a piece of work: a tile, or a unit of one whose keys are split, for one key head. Programs run
    side by side; what stands in one row is done by one program, in turn. A launch waits for its longest row.
    Every second turn is paler. Launches without work are left out.

    Args:
        metadata: Metadata with the schedule of the Triton kernel.
        spec: The layer.
        itemsize: Bytes per element of queries and keys: 2 for bfloat16.

    Returns:
        The figure.

    Raises:
        MissingFieldError: If `prepare_metadata` was not asked for that schedule.
    """
    schedule = metadata.visible_keys(spec.window_class).schedule(triton_tiling(spec))
    named = zip(("short queries", "long queries"), schedule.lists, strict=False)
    every = {name: launch_of(tiles, spec, itemsize=itemsize) for name, tiles in named}
    launches = {name: launch for name, launch in every.items() if len(launch.program)}
    figure = picture(6.2 * len(launches), 5.2)
    for ax, (name, launch) in zip(panels(figure, len(launches)), launches.items(), strict=True):
        _draw(ax, name, launch, metadata.bucket.seqs)
    figure.axes[0].set_ylabel("program")
    labels = [f"sequence {s}" for s in range(int(metadata.num_seqs))]
    legend(figure, [*sequence_handles(labels), Patch(color=EMPTY, label="zeros for padding")])
    return figure


def _draw(ax: Axes, name: str, launch: Launch, padding_row: int) -> None:
    n, rows, shares = len(launch.program), int(launch.program.max()) + 1, launch.shares()
    longest = int(shares.max(initial=1))
    # Pieces without keys get a stub; rows that are too thin for gaps touch each other.
    widths = np.maximum(launch.keys, longest / 120)
    height, edge = (0.84, 0.6) if rows <= MAX_SPACED else (1.0, 0.0)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    starts = np.stack([launch.begins(), launch.program - height / 2], axis=1)
    bars = starts[:, None, :] + corners * np.stack([widths, np.full(n, height)], axis=1)[:, None, :]
    colors = [
        to_rgba(EMPTY if s == padding_row else color_of(s), 1.0 if turn % 2 == 0 else 0.6)
        for s, turn in zip(launch.seq.tolist(), launch.turn.tolist(), strict=True)
    ]
    ax.add_collection(
        PolyCollection([*bars], facecolors=colors, edgecolors=INK, linewidths=edge, antialiaseds=edge > 0)
    )
    ax.set_xlim(0, longest * 1.02)
    ax.set_ylim(rows - 0.5, -0.5)
    ax.set_xlabel("keys walked over, in whole blocks")
    merged = f", then {count(launch.merged, 'tile')} merged" if launch.merged else ""
    balance = longest / shares.mean() if len(shares) else 1.0
    ax.set_title(
        f"{name}: {count(n, 'piece')} for {count(launch.programs, 'program')}{merged}\n"
        f"longest row {balance:.2f} × the mean",
        fontsize=10,
    )
