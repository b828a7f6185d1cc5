"""Candidates timed in turns, their ratios, and where it was measured: a library for the experiments."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Call = Callable[[int], Any]
"""A candidate: runs on the input of this number, and returns when its result is ready."""

ROUND_NS = 250_000_000
"""A round of a candidate ends after this time, whatever the number of calls."""


Rounds = Mapping[str, Sequence[float]]
"""Per candidate, its microseconds in each round: time elapsed, or processor time."""


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


class Range(NamedTuple):
    """Some figures of the same thing.

    Attributes:
        median: Their median.
        least: The least of them.
        most: The largest.
    """

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Range:
        """The range of at least one figure."""
        return cls(statistics.median(figures), min(figures), max(figures))

    def text(self, form: str = "") -> str:
        """As it stands in a table: the median, with the range in parentheses.

        Args:
            form: How each is written; by default with two decimals, with fewer where it is large.
        """
        median, least, most = (f"{figure:{form}}" if form else _short(figure) for figure in self)
        return f"{median} ({least} to {most})"


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


def rounds_of(timings: Mapping[str, Timing]) -> dict[str, dict[str, list[float]]]:
    """What of `measure` goes into a row of results: time elapsed, and processor time of all threads."""
    return {
        "elapsed_us": {name: timing.rounds_us for name, timing in timings.items()},
        "processor_us": {name: timing.processor_us for name, timing in timings.items()},
    }


def times_as_long(rounds: Rounds, name: str, baseline: str) -> Range:
    """How many times as long as a baseline a candidate takes, over the rounds."""
    return Range.of([us / base for us, base in zip(rounds[name], rounds[baseline], strict=True)])


def milliseconds(rounds: Rounds, name: str) -> float:
    """The median of a candidate's rounds."""
    return statistics.median(rounds[name]) / 1e3


def ratios_by_round(
    timings: Mapping[str, Any], name: str, other: str, *, of: str = "rounds_us"
) -> list[float]:
    """How many times as long as another candidate one takes, round by round; so a drift cancels out.

    Args:
        timings: By candidate, each as a `Timing`, as a file of results has them.
        name: The one.
        other: The other.
        of: "rounds_us" or "processor_us".
    """
    rounds = (timings[candidate][of] for candidate in (name, other))
    return [a / b for a, b in zip(*rounds, strict=True)]


def with_range(values: Sequence[float]) -> str:
    """The median of some figures, and their range in parentheses."""
    return Range.of(values).text()


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:,.{0 if abs(value) >= 99.95 else 1}f}"
