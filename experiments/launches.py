"""How many programs are launched for how many that have work, and how evenly is that work shared out?

For each workload and one layer, in the bucket that the default grid picks:

1. *Counted*, from the tile lists that the Triton kernel is given: places of its work lists (units × key
   heads × parts of a tile), programs launched, places visited, and those with keys to attend to.
2. *Modelled*, not timed, in `launch_model.py`: when the last program ends, by the order of their units.

What pieces the keys of short queries should be cut into is the question of `split_policies.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from experiment import Experiment, Row, Table
from launch_model import (
    MERGED_KEYS,
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

from jaxattn_kernels.arrays import Tiles
from jaxattn_kernels.triton.launch import MAX_TRITON_PROGRAMS


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which workloads, and the model's constant."""

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    """Names in `launch_model.WORKLOADS`."""
    overhead: int = 32
    """What a unit costs besides its keys, in keys. Where 4.3 TB/s are shared by all slots, 32 take 1 µs."""


# Counting.


class Launch(NamedTuple):
    """One launch of a kernel, in programs.

    Attributes:
        kernel: What it does.
        places: Programs that the work list has room for.
        launched: Programs of the grid.
        visited: Places that some program looks at.
        working: Places with keys to attend to, or results to merge.
    """

    kernel: str
    places: int
    launched: int
    visited: int
    working: int


def launches_of(tiles: Tiles, kernel: str) -> list[Launch]:
    """The launches for one list of tiles, as `jaxattn_kernels.triton.forward` makes them."""
    parts = programs_per_unit(tiles.block_q)
    num_tiles, live_tiles, attending = tiles.seq.shape[0], int(tiles.num_live), int(tiles.num_attending)
    if tiles.split is None:
        return [_launch(kernel, num_tiles, live_tiles, attending, parts)]
    indptr, num_units = np.asarray(tiles.split.indptr), tiles.split.tile.shape[0]
    merged = int((np.diff(indptr) > 1).sum())
    return [
        _launch(kernel, num_units, int(indptr[-1]), int(indptr[attending]), parts),
        _launch(f"merge of {kernel}", num_tiles, live_tiles, merged, parts),
    ]


def _launch(kernel: str, room: int, live: int, working: int, parts: int) -> Launch:
    """A launch over a list with room for so many units; where programs are fewer, they visit live ones."""
    places = room * parts
    visited = places if places <= MAX_TRITON_PROGRAMS else live * parts
    return Launch(kernel, places, min(places, MAX_TRITON_PROGRAMS), visited, working * parts)


def total(launches: Sequence[Launch]) -> Launch:
    """All launches of a layer."""
    return Launch("all", *(sum(column) for column in list(zip(*launches, strict=True))[1:]))


# The model.


def unit_costs(tiles: Tiles, overhead: int) -> np.ndarray:
    """The cost of each unit with keys, in the list's order: rows times keys, in whole blocks."""
    attending = int(tiles.num_attending)
    if tiles.split is None:
        begin, end, pieces = tiles.kv_start, tiles.kv_end, np.ones(attending, int)
        units = attending
    else:
        begin, end, indptr = tiles.split.kv_start, tiles.split.kv_end, np.asarray(tiles.split.indptr)
        units, pieces = int(indptr[attending]), np.diff(indptr)[:attending]
    keys = in_blocks(np.asarray(begin)[:units], np.asarray(end)[:units], config_of(tiles.block_q).block_k)
    is_piece = np.repeat(pieces > 1, pieces)
    return rows_of(tiles.block_q) * (keys + overhead + MERGED_KEYS * is_piece)


def strided(costs: np.ndarray, programs: int, *, serpentine: bool) -> np.ndarray:
    """What each of so many programs costs that take units in turns; on odd rounds backwards, if told to."""
    rounds = -(-costs.size // programs)
    table = np.zeros((rounds, programs), np.int64)
    table.reshape(-1)[: costs.size] = costs
    if serpentine:
        table[1::2] = table[1::2, ::-1]
    return table.sum(axis=0)


def orders(costs: np.ndarray) -> dict[str, float]:
    """How long each order of the programs' work takes, over what it would take if shared out evenly."""
    even, best = costs.sum() / SLOTS, longest_first(costs)
    times = {
        "as listed": makespan(costs),
        "longest first": makespan(best),
        "strided": makespan(strided(best, MAX_TRITON_PROGRAMS, serpentine=False)),
        "serpentine": makespan(strided(best, MAX_TRITON_PROGRAMS, serpentine=True)),
        "a program per slot": makespan(strided(best, SLOTS, serpentine=True)),
    }
    return {name: time / even for name, time in times.items()}


# Running and reporting.


def examine(workload: str, overhead: int) -> Row:
    """Counts and modelled times of one workload."""
    bucket, lists = schedule_of(WORKLOADS[workload])
    launches = [launch for name, tiles in lists.items() for launch in launches_of(tiles, name)]
    working = {name: tiles for name, tiles in lists.items() if int(tiles.num_attending)}
    return {
        "workload": workload,
        "bucket": dataclasses.asdict(bucket),
        "launches": [launch._asdict() for launch in launches],
        "total": total(launches)._asdict(),
        "orders": {
            name: orders(np.repeat(unit_costs(tiles, overhead), programs_per_unit(tiles.block_q)))
            for name, tiles in working.items()
        },
    }


def rows(config: Config) -> Iterator[Row]:
    """A row per workload."""
    for workload in track(config.workloads, "workloads"):
        yield examine(workload, config.overhead)


def tables(rows: list[Row]) -> dict[str, Table]:
    """Counts, and modelled times by order."""
    counts = []
    for row in rows:
        all_of_it = Launch(**row["total"])
        ratios = (n / all_of_it.working for n in (all_of_it.launched, all_of_it.visited))
        counts.append(
            [row["workload"], *(f"{n:,}" for n in all_of_it[1:]), *(f"{ratio:.2f}" for ratio in ratios)]
        )
    by_order = [
        [row["workload"], name, *(f"{time:.2f}" for time in times.values())]
        for row in rows
        for name, times in row["orders"].items()
    ]
    names = next(iter(rows[0]["orders"].values()))
    columns = ("places", "launched", "visited", "with work", "launched ÷ with work", "visited ÷ with work")
    return {
        "counts": Table(("workload", *columns), counts),
        "orders": Table(("workload", "list", *names), by_order),
    }


def plot(rows: list[Row]) -> Figure:
    """Programs over those with work, and the modelled end over an even share."""
    figure = white_figure("How many programs have work, and how evenly is it shared out?", 12, 8)
    counted, modelled = figure.subplots(2, 1)
    totals = [Launch(**row["total"]) for row in rows]
    series = {
        "launched": [t.launched / t.working for t in totals],
        "visited": [t.visited / t.working for t in totals],
    }
    grouped_bars(counted, [row["workload"] for row in rows], series, form="{:.2f}")
    counted.set(xlabel="workload", ylabel="programs ÷ those with work", yscale="log")
    cases = [(row["workload"], name, times) for row in rows for name, times in row["orders"].items()]
    names = ("as listed", "longest first", "serpentine")
    series = {name: [times[name] for *_, times in cases] for name in names}
    grouped_bars(modelled, [f"{workload}, {name}" for workload, name, _ in cases], series)
    modelled.set(xlabel="workload, list of tiles", ylabel="modelled end ÷ even share")
    for axes in (counted, modelled):
        level(axes)
        axes.legend(frameon=False)
    return figure


EXPERIMENT = Experiment(
    question="How many programs are launched for how many that have work, and how evenly is it shared out?",
    committed=Config(),
    small=Config(workloads=("decode 16 x 1k", "mixed 15 decode + 512")),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
