"""How many programs are launched for how many that have work, and how evenly is that work shared out?

    python experiments/launches.py

For each workload and one layer (32 query heads, 8 key heads, head dim 128, bf16, pages of 16), in the bucket
that the default grid picks:

1. *Counted*, from the tile lists that the Triton kernel is given: places of its work lists (units × key
   heads × parts of a tile), programs launched, places visited, and those with keys to attend to.
2. *Modelled*, not timed: when the last of `SLOTS` concurrent programs ends, if a unit costs its rows times
   its keys, in whole blocks, plus a constant. Compared are orders of the units, and pieces of the keys of
   short queries, dearest first: ours, which do not depend on the batch, and two that do. The model knows
   nothing of caches, of bandwidth that few programs share, or of launches; it says what a choice can cost,
   not what it does.

Writes `experiments/results/launches.json` with provenance.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from side_by_side import provenance

from jaxattn import AttentionSpec, prepare_metadata
from jaxattn.batch import DEFAULT_GRID
from jaxattn.cases import SERVING, Workload, nest_workload, random_page_tables
from jaxattn.consumers import triton_tiling
from jaxattn.schedule import Tiles
from jaxattn_kernels.triton import config_for
from jaxattn_kernels.triton_parts import MAX_PROGRAMS, KernelConfig

RESULTS = Path(__file__).parent / "results" / "launches.json"
SPEC = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
PAGE_SIZE = 16
SLOTS = 132 * 2
"""Programs that run at once: two on each multiprocessor of an H100."""
OVERHEADS = (0, 32, 128)
"""What a unit costs besides its keys, in keys. Where 4.3 TB/s are shared by all slots, 32 keys take 1 µs."""
OVERHEAD = 32
MERGED_KEYS = 8
"""What a piece's results cost that are written and read again, in keys: at 4 heads a group, 4 KiB."""
LEAST_PIECE = 128
"""Keys of the smallest piece that a split which depends on the batch makes."""


def _decode(name: str, *kv_lens: int) -> Workload:
    return Workload(name, (1,) * len(kv_lens), tuple(n - 1 for n in kv_lens), "a shape to time")


def workloads() -> tuple[Workload, ...]:
    """The serving workloads, and the shapes that others publish figures for."""
    short = np.random.default_rng(0).integers(64, 2048, 63)
    return (
        *SERVING,
        _decode("decode 64 x 8k", *(8192,) * 64),
        _decode("decode 1 x 8k", 8192),
        _decode("decode 32 x 4k", *(4096,) * 32),
        _decode("skewed decode 64k + 63 short", 65536, *map(int, short)),
        Workload("prefill 4k", (4096,), (0,), "a shape to time"),
        Workload("prefill 32k", (32768,), (0,), "a shape to time"),
    )


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
    """The launches for one list of tiles, as `jaxattn_kernels.triton` makes them."""
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
    visited = places if places <= MAX_PROGRAMS else live * parts
    return Launch(kernel, places, min(places, MAX_PROGRAMS), visited, working * parts)


def programs_per_unit(tile_q: int) -> int:
    """One per key head and per part of a tile that is too tall for one program."""
    part_q = max(1, min(tile_q, _config(tile_q).max_rows // SPEC.group_size))
    return SPEC.num_kv_heads * -(-tile_q // part_q)


def _rows(tile_q: int) -> int:
    return max(16, 1 << (tile_q * SPEC.group_size - 1).bit_length())


def _config(tile_q: int) -> KernelConfig:
    return config_for(block_rows=_rows(tile_q), head_dim=SPEC.head_dim, itemsize=2)


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
    keys = _in_blocks(np.asarray(begin)[:units], np.asarray(end)[:units], _config(tiles.block_q).block_k)
    is_piece = np.repeat(pieces > 1, pieces)
    return _rows(tiles.block_q) * (keys + overhead + MERGED_KEYS * is_piece)


def _in_blocks(begin: np.ndarray, end: np.ndarray, block_k: int) -> np.ndarray:
    return (-(-end // block_k) - begin // block_k) * block_k


def makespan(costs: np.ndarray, slots: int = SLOTS) -> int:
    """When the last program ends, if each begins in the order given as soon as a slot is free."""
    free = [0] * slots
    for cost in costs.tolist():
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def longest_first(costs: np.ndarray) -> np.ndarray:
    """The same units, dearest first."""
    return -np.sort(-costs)


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
        "strided": makespan(strided(best, MAX_PROGRAMS, serpentine=False)),
        "serpentine": makespan(strided(best, MAX_PROGRAMS, serpentine=True)),
        "a program per slot": makespan(strided(best, SLOTS, serpentine=True)),
    }
    return {name: time / even for name, time in times.items()}


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
    blocks = _in_blocks(np.zeros_like(lengths), lengths, _config(tile_q).block_k)
    return _rows(tile_q) * (blocks + overhead + MERGED_KEYS * np.repeat(counts > 1, counts))


def splits(tiles: Tiles, overhead: int) -> dict[str, Any]:
    """Pieces and times of a list of short queries, over an even share of its keys at no overhead."""
    assert tiles.split is not None
    attending = int(tiles.num_attending)
    keys = (np.asarray(tiles.kv_end) - np.asarray(tiles.kv_start))[:attending]
    heads = programs_per_unit(tiles.block_q)
    even = split_costs(keys, int(keys.max()), tiles.block_q, 0).sum() * heads / SLOTS
    pieces = {
        "constant": tiles.split.split_keys,
        "fits": piece_that_fits(keys, heads),
        "even": piece_of_even_share(keys, heads),
    }
    times = {
        name: makespan(longest_first(np.repeat(split_costs(keys, piece, tiles.block_q, overhead), heads)))
        for name, piece in pieces.items()
    }
    return {
        "pieces": pieces,
        "over_even": {name: time / even for name, time in times.items()},
        "constant_over_best": times["constant"] / min(times["fits"], times["even"]),
    }


# Running and reporting.


def examine(workload: Workload) -> dict[str, Any]:
    """Counts and models of one workload."""
    tables, _ = random_page_tables(workload, PAGE_SIZE, np.random.default_rng(0))
    bucket = DEFAULT_GRID.pick(
        tokens=sum(workload.q_lens), seqs=len(workload.q_lens), pages=sum(len(table) for table in tables)
    )
    if set(workload.q_lens) == {1}:
        bucket = dataclasses.replace(bucket, max_q_len=1)
    batch = nest_workload(workload, page_tables=tables, page_size=PAGE_SIZE, bucket=bucket)
    visible = prepare_metadata(batch, SPEC, consumers="triton").visible_keys(SPEC.window_class)
    schedule = visible.schedule(triton_tiling(SPEC))
    lists = dict(zip(("short", "long"), schedule.lists, strict=False))
    launches = [launch for name, tiles in lists.items() for launch in launches_of(tiles, name)]
    working = {name: tiles for name, tiles in lists.items() if int(tiles.num_attending)}
    return {
        "workload": workload.name,
        "bucket": dataclasses.asdict(bucket),
        "launches": [launch._asdict() for launch in launches],
        "total": total(launches)._asdict(),
        "orders": {
            name: orders(np.repeat(unit_costs(tiles, OVERHEAD), programs_per_unit(tiles.block_q)))
            for name, tiles in working.items()
        },
        "splits": {
            overhead: splits(working["short"], overhead)
            for overhead in OVERHEADS
            if "short" in working and working["short"].split is not None
        },
    }


def print_report(console: Console, results: list[dict[str, Any]]) -> None:
    """Three tables."""
    counts = Table("workload", "places", "launched", "visited", "with work", "launched ÷", "visited ÷")
    for r in results:
        t = Launch(**r["total"])
        numbers = (f"{n:,}" for n in t[1:])
        counts.add_row(
            r["workload"], *numbers, f"{t.launched / t.working:.2f}", f"{t.visited / t.working:.2f}"
        )
    names = tuple(next(iter(results[0]["orders"].values())))
    order = Table("workload", "list", *names, title="Orders, modelled: time over an even share")
    for r in results:
        for name, times in r["orders"].items():
            order.add_row(r["workload"], name, *(f"{times[x]:.2f}" for x in names))
    columns = ("pieces", "constant", "fits", "even", *(f"÷ best at {n}" for n in OVERHEADS))
    split = Table("workload", *columns, title=f"Splits, modelled: time over an even share at {OVERHEAD}")
    for r in results:
        if r["splits"]:
            s = r["splits"][OVERHEAD]
            pieces = " / ".join(str(n) for n in s["pieces"].values())
            times = (f"{x:.2f}" for x in s["over_even"].values())
            split.add_row(
                r["workload"], pieces, *times,
                *(f"{r['splits'][n]['constant_over_best']:.2f}" for n in OVERHEADS),
            )  # fmt: skip
    for table in (counts, order, split):
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = [examine(workload) for workload in workloads()]
    print_report(Console(width=140), results)
    sizes = {"slots": SLOTS, "max_programs": MAX_PROGRAMS, "page_size": PAGE_SIZE, "overhead": OVERHEAD}
    text = {"provenance": provenance(), "sizes": sizes, "results": results}
    arguments.out.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
