"""Pictures of buckets: what padding costs by the number of programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jaxattn.viz.style import INK, color_of, panels, picture

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_tradeoff(curves: Mapping[str, Sequence[float]], *, title: str = "") -> Figure:
    """Draw what padding costs by the number of programs, a line per way to choose buckets.

    Args:
        curves: By name, the cost for 1, 2, … programs over the cost without padding; the plan comes first.
        title: The title of the figure.

    Returns:
        The figure.
    """
    figure = picture(7.2, 4.4)
    (axes,) = panels(figure, 1)
    draw_tradeoff(axes, curves)
    axes.legend(frameon=False, labelcolor=INK)
    if title:
        axes.set_title(title)
    return figure


def draw_tradeoff(axes: Axes, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw the lines of `plot_tradeoff` into axes.

    Args:
        axes: The axes.
        curves: By name, the cost for 1, 2, … programs over the cost without padding; the plan comes first.
    """
    for i, (name, ratios) in enumerate(curves.items()):
        counts = range(1, len(ratios) + 1)
        (line,) = axes.plot(counts, [ratio - 1 for ratio in ratios], label=name, markersize=4, linewidth=1.4)
        line.set_color(color_of(i))
        line.set_marker(_MARKERS[i % len(_MARKERS)])
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(FuncFormatter(lambda value, _: f"{value:.0%}" if f"{value:.0e}"[0] in "12357" else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("programs")
    axes.set_ylabel("modelled cost of padding, over none")
    axes.grid(visible=True, which="both", alpha=0.25)
