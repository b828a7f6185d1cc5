"""Candidates timed in turns, and tables with a column per case: a library for the experiments."""

from __future__ import annotations

import functools
import gc
import operator
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

Call = Callable[[int], Any]
"""A candidate: runs on the input of this number, and returns when its result is ready."""

ROUND_NS = 250_000_000
"""A round of a candidate ends after this time, whatever the number of calls."""


class Timing(NamedTuple):
    """Microseconds per call.

    Attributes:
        median_us: The median over rounds of `rounds_us`.
        rounds_us: The median of each round.
        processor_us: The same of the processor time of all threads. On a busy machine programs of several
            threads wait for cores, some longer than they compute; that is not in it.
    """

    median_us: float
    rounds_us: list[float]
    processor_us: list[float]


def measure(calls: Mapping[str, Call], *, inputs: int, repeats: int, rounds: int) -> dict[str, Timing]:
    """Time candidates in turns, warm.

    Args:
        calls: The candidates by name.
        inputs: How many inputs there are; each call takes the next, so that nothing is kept by value.
        repeats: Calls of a candidate per round, fewer for a slow one.
        rounds: Rounds, each of which begins with another candidate.
    """
    medians: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        for i in range(inputs):
            call(i)
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            turn = r * len(names) // rounds
            for name in names[turn:] + names[:turn]:
                medians[name].append(_medians_us(calls[name], inputs, repeats))
    finally:
        gc.enable()
    found = {}
    for name, rounds_of_it in medians.items():
        elapsed, processor = map(list, zip(*rounds_of_it, strict=True))
        found[name] = Timing(statistics.median(elapsed), elapsed, processor)
    return found


def _medians_us(call: Call, inputs: int, repeats: int) -> tuple[float, float]:
    """Of a round: time elapsed, and processor time."""
    call(0)
    nanoseconds: list[tuple[int, int]] = []
    end = time.perf_counter_ns() + ROUND_NS
    while len(nanoseconds) < min(3, repeats) or (len(nanoseconds) < repeats and time.perf_counter_ns() < end):
        number = len(nanoseconds) % inputs
        before, started = time.process_time_ns(), time.perf_counter_ns()
        call(number)
        elapsed = time.perf_counter_ns() - started
        nanoseconds.append((elapsed, time.process_time_ns() - before))
    elapsed, processor = (statistics.median(column) / 1e3 for column in zip(*nanoseconds, strict=True))
    return elapsed, processor


def provenance() -> dict[str, Any]:
    """Where and on what figures are taken; a commit ending in `-dirty` had changes beside it."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


Row = dict[str, Any]
"""What is known of a case: at least its name as `case`, and `timings` by candidate, as dictionaries."""
Line = tuple[str, Callable[[Row], float | None]]
"""A line of a table: its label, and its figure for a case, None where the case has none."""


def microseconds(row: Row, name: str) -> float | None:
    """A candidate's median, or None where the case has no such candidate."""
    timing = row["timings"].get(name)
    return None if timing is None else timing["median_us"]


def by_round(row: Row, name: str, other: str, combine: Callable[[float, float], float]) -> float | None:
    """The median over rounds of a combination of two candidates' figures; so a drift cancels out."""
    timings = [row["timings"].get(candidate) for candidate in (name, other)]
    if None in timings:
        return None
    return statistics.median(map(combine, *(timing["rounds_us"] for timing in timings)))


def ratio(row: Row, name: str, other: str) -> float | None:
    """How many times as long as another candidate one takes."""
    return by_round(row, name, other, operator.truediv)


def times(*names: str) -> list[Line]:
    """A line per candidate."""
    return [(name, functools.partial(microseconds, name=name)) for name in names]


def ratios(other: str, *names: str) -> list[Line]:
    """A line per candidate: how many times as long as another it takes."""
    return [(f"{name} ÷ {other}", functools.partial(ratio, name=name, other=other)) for name in names]


def difference(label: str, name: str, other: str) -> Line:
    """A line: how much longer than another a candidate takes; below zero it is noise."""
    return label, functools.partial(by_round, name=name, other=other, combine=operator.sub)


def table_of(title: str, rows: Sequence[Row], *groups: Sequence[Line]) -> Table:
    """A table with a column per case, and a rule between groups of lines."""
    table = Table("", title=title, title_justify="left")
    for row in rows:
        table.add_column(row["case"], justify="right")
    for lines in groups:
        for label, figure in lines:
            figures = [figure(row) for row in rows]
            if any(value is not None for value in figures):
                table.add_row(label, *map(written, figures))
        table.add_section()
    return table


def written(value: float | None) -> str:
    """A figure with a decimal where it is below 100; a dash for none."""
    return "–" if value is None else f"{value:,.{0 if abs(value) >= 99.95 else 1}f}"
