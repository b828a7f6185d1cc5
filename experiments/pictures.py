"""Colours, bars and lines that the experiments' pictures share: a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from side_by_side import Range

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555", "#F0E442")
"""Okabe and Ito's colours, which the colour-blind tell apart too; for series in their order."""

MARKERS = ("o", "s", "^", "D", "v", "P")
"""A form for each of the first six."""


def white_figure(title: str, width: float, height: float) -> Figure:
    """A figure on white with a title, in inches; panels do not overlap."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title)
    return figure


def grouped_bars(
    axes: Axes, cases: Sequence[str], series: Mapping[str, Sequence[float | None]], *, form: str = ""
) -> None:
    """A group of bars per case, with a bar per series.

    Args:
        axes: Drawn on.
        cases: Names of the groups.
        series: A figure per case, None for no bar, by name.
        form: How figures are written above their bars; nothing is where it is empty.
    """
    width, places = 0.8 / len(series), np.arange(len(cases))
    for i, (name, values) in enumerate(series.items()):
        heights = [np.nan if value is None else value for value in values]
        middle = places + (i - (len(series) - 1) / 2) * width
        bars = axes.bar(middle, heights, width, label=name, color=COLORS[i % len(COLORS)])
        if form:
            labels = ["" if value is None else form.format(value) for value in values]
            axes.bar_label(bars, labels, padding=2, fontsize=7)
    turned = max(map(len, cases)) * len(cases) > 60
    axes.set_xticks(places, cases, rotation=25 if turned else 0, ha="right" if turned else "center")
    lighten(axes)


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


def level(axes: Axes, value: float = 1.0) -> None:
    """A line where two candidates are equal."""
    axes.axhline(value, color="#333333", linewidth=1, linestyle="--")


def lighten(axes: Axes) -> None:
    """A faint grid behind, and no box."""
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
