"""Candidates that were timed in turns, compared round by round: figures, text, and a line of a picture.

A library. Two candidates of one round met the same load of the machine, so a ratio is taken in each round;
the median of the rounds is the figure, and their range comes along.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from side_by_side import Timing

Rounds = Mapping[str, Sequence[float]]
"""Per candidate, its microseconds in each round: time elapsed, or processor time."""

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Colours that the colour-blind can tell apart."""

MARKERS = ("o", "s", "^", "D", "v", "P")
"""A form for each colour."""


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

    def text(self, form: str = ".2f") -> str:
        """As it stands in a table: the median, with the range in parentheses."""
        median, least, most = (f"{figure:{form}}" for figure in self)
        return f"{median} ({least} to {most})"


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


def draw(
    axes: Axes,
    places: Sequence[float],
    ranges: Sequence[Range],
    number: int,
    label: str,
    linestyle: str = "-",
) -> None:
    """Draw a line through medians, with a bar for each range.

    Args:
        axes: Where.
        places: On the x axis.
        ranges: On the y axis.
        number: Gives its colour and marker.
        label: In the legend.
        linestyle: As of matplotlib.
    """
    medians = [found.median for found in ranges]
    below = [found.median - found.least for found in ranges]
    above = [found.most - found.median for found in ranges]
    axes.errorbar(
        places,
        medians,
        yerr=[below, above],
        color=COLORS[number % len(COLORS)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        capsize=3,
        linestyle=linestyle,
        label=label,
    )
