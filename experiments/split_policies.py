"""What does it cost that the keys of short queries are cut into pieces of a constant size?

A constant makes a sequence's bits independent of the batch. Compared are pieces that depend on it: *fits*,
the smallest with which all programs run at once, and no cut where the tiles alone fill the device; *even*, an
even share of all keys.

All of it is **modelled**, in `launch_model.py`, for one layer of the Triton kernel; nothing is timed. A CPU
could not answer: there the `xla` implementation does not split, and an interpreted kernel runs its programs
one after the other, so that splits only add work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from experiment import Experiment, Row, Table
from launch_model import (
    MERGED_KEYS,
    PAGE_SIZE,
    SLOTS,
    WORKLOADS,
    config_of,
    in_blocks,
    longest_first,
    makespan,
    programs_per_unit,
    rows_of,
    schedule_of,
)
from matplotlib.figure import Figure
from pictures import grouped_bars, level, white_figure
from rich.progress import track

from jaxattn.metadata.consumers import SPLIT_KEYS
from jaxattn_kernels.arrays import Tiles

BY_BATCH = ("fits", "even")
"""The policies that depend on the batch."""
LEAST_PIECE = 128
"""Keys of the smallest piece that a policy which depends on the batch makes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which workloads and constants."""

    workloads: tuple[str, ...] = (
        "decode 16 x 1k",
        "decode 64 x 512",
        "mixed 15 decode + 512",
        "skewed decode 4096 + 15 x 64",
        "decode 64 x 8k",
        "decode 1 x 8k",
        "decode 32 x 4k",
        "skewed decode 64k + 63 short",
    )
    """Names in `launch_model.WORKLOADS`, of workloads with short queries."""
    constants: tuple[int, ...] = (128, 256, SPLIT_KEYS, 1024, 2048)
    """Keys of pieces of a constant size; ours must be among them."""
    overheads: tuple[int, ...] = (0, 32, 128)
    """What a piece costs besides its keys, in keys; the second is what the tables with one overhead show."""


def piece_that_fits(keys: np.ndarray, heads: int) -> int:
    """The smallest piece with which all programs run at once; all keys where the tiles alone are too many."""
    longest = int(keys.max())
    for piece in range(LEAST_PIECE, longest, PAGE_SIZE):
        if (-(-keys // piece)).sum() * heads <= SLOTS:
            return piece
    return longest


def piece_of_even_share(keys: np.ndarray, heads: int) -> int:
    """The share of a slot, were all keys shared out evenly, in whole pages."""
    share = -(-int(keys.sum()) * heads // SLOTS)
    return max(LEAST_PIECE, -(-share // PAGE_SIZE) * PAGE_SIZE)


def split_costs(keys: np.ndarray, piece: int, tile_q: int, overhead: int) -> np.ndarray:
    """Costs of units, when the keys of each tile are cut into pieces."""
    counts = np.maximum(-(-keys // piece), 1)
    lengths = np.concatenate(
        [np.minimum(piece, n - piece * np.arange(c)) for n, c in zip(keys, counts, strict=True)]
    )
    blocks = in_blocks(np.zeros_like(lengths), lengths, config_of(tile_q).block_k)
    return rows_of(tile_q) * (blocks + overhead + MERGED_KEYS * np.repeat(counts > 1, counts))


def pieces_of(keys: np.ndarray, heads: int, constants: tuple[int, ...]) -> dict[str, int]:
    """Keys of a piece, by policy."""
    fixed = {str(size): size for size in constants}
    return {**fixed, "fits": piece_that_fits(keys, heads), "even": piece_of_even_share(keys, heads)}


def over_even(tiles: Tiles, constants: tuple[int, ...], overhead: int) -> dict[str, Any]:
    """Pieces and modelled times of a list of short queries, over an even share of its keys at no overhead."""
    keys = (np.asarray(tiles.kv_end) - np.asarray(tiles.kv_start))[: int(tiles.num_attending)]
    heads = programs_per_unit(tiles.block_q)
    even = split_costs(keys, int(keys.max()), tiles.block_q, 0).sum() * heads / SLOTS
    pieces = pieces_of(keys, heads, constants)
    times = {
        name: makespan(longest_first(np.repeat(split_costs(keys, piece, tiles.block_q, overhead), heads)))
        for name, piece in pieces.items()
    }
    return {"pieces": pieces, "times": {name: time / even for name, time in times.items()}}


def rows(config: Config) -> Iterator[Row]:
    """A row per workload and overhead."""
    for workload in track(config.workloads, "workloads"):
        tiles = schedule_of(WORKLOADS[workload])[1]["short"]
        for overhead in config.overheads:
            yield {
                "workload": workload,
                "overhead": overhead,
                **over_even(tiles, config.constants, overhead),
            }


def against_best(row: Row) -> float:
    """Time of our constant over the better of the two policies that depend on the batch."""
    times = row["times"]
    return times[str(SPLIT_KEYS)] / min(times[name] for name in BY_BATCH)


def _by_overhead(rows: list[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row["overhead"], []).append(row)
    return found


def tables(rows: list[Row]) -> dict[str, Table]:
    """Times at one overhead, and our constant against the best at all of them."""
    overheads = _by_overhead(rows)
    one = overheads[sorted(overheads)[1]]
    names = {name: name if name in BY_BATCH else f"constant {name}" for name in one[0]["times"]}
    times = [
        [
            row["workload"],
            f"{row['pieces']['fits']:,} / {row['pieces']['even']:,}",
            *(f"{row['times'][name]:.2f}" for name in names),
        ]
        for row in one
    ]
    best = [
        [of_workload[0]["workload"], *(f"{against_best(row):.2f}" for row in of_workload)]
        for of_workload in zip(*overheads.values(), strict=True)
    ]
    return {
        "times": Table(("workload", "keys a piece: fits / even", *names.values()), times),
        "constant": Table(("workload", *(f"at an overhead of {n} keys" for n in overheads)), best),
    }


def plot(rows: list[Row]) -> Figure:
    """Modelled times by policy, at one overhead."""
    overheads = _by_overhead(rows)
    overhead = sorted(overheads)[1]
    one = overheads[overhead]
    figure = white_figure("What do pieces of a constant size cost? (modelled, not timed)", 11, 4.5)
    axes = figure.subplots()
    series = {
        name if name in BY_BATCH else f"constant {name}": [row["times"][name] for row in one]
        for name in one[0]["times"]
    }
    grouped_bars(axes, [row["workload"] for row in one], series)
    axes.set(
        xlabel=f"workload; a piece costs {overhead} keys besides its own",
        ylabel="modelled end ÷ even share",
        yscale="log",
    )
    axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.minorticks_off()
    level(axes)
    axes.legend(frameon=False, ncols=2)
    return figure


EXPERIMENT = Experiment(
    question="What does it cost that the keys of short queries are cut into pieces of a constant size?",
    committed=Config(),
    small=Config(workloads=("decode 16 x 1k", "decode 1 x 8k")),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
