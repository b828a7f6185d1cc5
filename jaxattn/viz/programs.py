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
from jaxattn.metadata.schedule import Tiles
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.viz.style import EMPTY, INK, color_of, count, legend, panels, picture, sequence_handles
from jaxattn_kernels.triton.forward import config_for
from jaxattn_kernels.triton.parts import MAX_PROGRAMS, block_of

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
    """Who does what in the launch for a list of tiles, by the rule of `jaxattn_kernels.triton.parts.launch`.

    Args:
        tiles: The list, of the Triton kernel's tiling.
        spec: The layer.
        itemsize: Bytes per element of queries and keys, on which the size of a program depends.
    """
    G, K = spec.group_size, spec.num_kv_heads
    config = config_for(block_rows=block_of(tiles.block_q * G), head_dim=spec.head_dim, itemsize=itemsize)
    block_q = max(1, min(tiles.block_q, config.max_rows // G))
    per_unit = K * -(-tiles.block_q // block_q)
    unit_tiles, starts, ends, room = _units(tiles)
    place = np.arange(len(unit_tiles) * per_unit)
    programs = min(room * per_unit, MAX_PROGRAMS)
    unit, head, part = place // per_unit, place % K, place % per_unit // K
    tile = unit_tiles[unit]
    has_rows = np.asarray(tiles.q_len)[tile] > part * block_q
    first, end = starts[unit] // config.block_k, -(-ends[unit] // config.block_k)
    merged = 0 if tiles.split is None else int((np.diff(np.asarray(tiles.split.indptr)) > 1).sum())
    return Launch(
        programs=programs,
        program=_program_of(place)[has_rows],
        turn=(place // MAX_PROGRAMS)[has_rows],
        tile=tile[has_rows],
        head=head[has_rows],
        seq=np.asarray(tiles.seq)[tile][has_rows],
        keys=((end - first) * config.block_k)[has_rows],
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


def _units(tiles: Tiles) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of each live unit, in the order of the launch, its tile and its keys; and the room for units."""
    if tiles.split is None:
        live = int(tiles.num_live)
        order = np.arange(tiles.seq.shape[0]) if tiles.order is None else np.asarray(tiles.order)
        tile = order[:live]
        return tile, np.asarray(tiles.kv_start)[tile], np.asarray(tiles.kv_end)[tile], tiles.seq.shape[0]
    live, split = int(tiles.split.indptr[-1]), tiles.split
    unit = np.arange(live)
    tile, starts, ends = (np.asarray(x)[unit] for x in (split.tile, split.kv_start, split.kv_end))
    return tile, starts, ends, split.tile.shape[0]


def _program_of(place: np.ndarray) -> np.ndarray:
    """The program that a place of the work list falls to: they take turns, on odd rounds backwards."""
    turn = place % MAX_PROGRAMS
    return np.where(place // MAX_PROGRAMS % 2 == 0, turn, MAX_PROGRAMS - 1 - turn)


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
