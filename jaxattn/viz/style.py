"""The look of the figures: transparent, in colours that can be told apart on white and on black."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from jaxattn.viz.html import COLORS, MUTED

INK = "#7b7b7b"
"""Text and lines: a grey of equal contrast, 4.3, with white and with a notebook's black."""
EMPTY = MUTED
"""Padding, free pages and whatever else belongs to nobody; drawn faintly."""
FAINT = 0.22
"""Opacity of what belongs to nobody."""


class Picture(Figure):
    """A figure that a notebook shows also where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", facecolor=self.get_facecolor())
        return buffer.getvalue()


def picture(width: float, height: float) -> Picture:
    """An empty figure, in inches, without a background."""
    return Picture(figsize=(width, height), dpi=110, layout="constrained", facecolor="none")


def panels(figure: Figure, columns: int) -> list[Axes]:
    """Axes side by side, in the figures' style."""
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.set_facecolor("none")
        ax.tick_params(colors=INK, labelcolor=INK)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_color(INK)
        for side, spine in ax.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))
    return axes


def color_of(sequence: int) -> str:
    """The colour of a sequence; colours come round again after eight."""
    return COLORS[sequence % len(COLORS)]


def legend(figure: Figure, handles: list[Patch]) -> None:
    """A legend below the panels, as wide as the figure."""
    columns = max(2, int(figure.get_figwidth() / 2.9))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
    )


def sequence_handles(labels: list[str]) -> list[Patch]:
    """Handles for sequences, those of which a colour is not yet taken; the last one says how many follow."""
    shown = [Patch(color=color_of(s), label=label) for s, label in enumerate(labels[: len(COLORS)])]
    if len(labels) > len(COLORS):
        shown.append(Patch(color="none", label=f"and {len(labels) - len(COLORS):,} more, colours again"))
    return shown


def count(n: int, what: str) -> str:
    """A number and a noun, in the plural where it must be."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
