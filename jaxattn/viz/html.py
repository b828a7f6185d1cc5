"""Small pieces of HTML for notebooks: bounded in size, legible on white and on black.

Text takes the colour of its surroundings, everything else a mid-tone or a part of that colour. What a bar
shows stands beside it as a number. Text is escaped where it is put into a page, unless it is `Html`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

MAX_ROWS = 8
"""Rows of a table that are shown."""
MAX_VALUES = 8
"""Numbers of an array that are shown."""
MAX_PARTS = 64
"""Parts of a strip that are drawn."""
MAX_FETCHED = 1 << 22
"""Elements of the largest array that is brought from the device to be shown."""

COLORS = ("#1f74bd", "#de8f05", "#0f9b72", "#c96fa3", "#85bfe8", "#c8501a", "#958b00", "#8478d8")
"""Mid-tones, distinguishable with a colour-vision deficiency, on white and on black."""
MUTED = "#8a8a8a"

_PLAIN = "border:0;color:inherit;background:transparent"  # no theme's colours and stripes
_CARD = (
    f"{_PLAIN};display:inline-block;min-width:22em;max-width:60em;padding:.6em .9em;border-radius:.4em;"
    f"border:1px solid {MUTED};font-size:.92em;line-height:1.45"
)
_CELL = f"{_PLAIN};text-align:left;padding:.1em 1em .1em 0;vertical-align:top"


class Html(str):
    """Text that is HTML."""

    __slots__ = ()


class Part(NamedTuple):
    """A part of a strip or a grid.

    Attributes:
        label: What is said where the mouse rests on it.
        color: Its colour; None for an empty part.
        size: Its length in a strip.
    """

    label: str
    color: str | None
    size: float = 1.0


def why_unknown(array: Any) -> str:
    """Why an array shows no values; empty where it does."""
    if isinstance(array, Tracer):
        return "traced: values exist when the program runs"
    if isinstance(array, jax.ShapeDtypeStruct):
        return "a shape without values"
    if not isinstance(array, jax.Array | np.ndarray | np.generic):
        return f"{type(array).__name__}, not an array"
    if isinstance(array, jax.Array) and array.is_deleted():
        return "donated: its memory was given away"
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return "partly on other hosts"
    return "too large to be shown" if array.size > MAX_FETCHED else ""


def values_of(array: Any) -> np.ndarray | None:
    """The values of an array on the host, or None where there are none to be had (see `why_unknown`)."""
    return None if why_unknown(array) else np.asarray(array)


def shape_of(array: Any) -> str:
    """Element type and shape, such as `int32[4, 8]`."""
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        return type(array).__name__
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"


def preview(array: Any) -> str:
    """The first values of an array, or why there are none."""
    values = values_of(array)
    if values is None:
        return why_unknown(array)
    first = values.reshape(-1)[:MAX_VALUES].tolist()
    numbers = ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in first)
    return numbers if values.size <= MAX_VALUES else f"{numbers} … {values.size:,} in all"


def card(kind: str, headline: str, *body: Html) -> Html:
    """A frame with the kind of an object, what is most important about it, and more."""
    return Html(
        f'<div style="{_CARD}"><div style="margin-bottom:.3em"><strong>{_escaped(kind)}</strong> '
        f"&nbsp;{_escaped(headline)}</div>{''.join(body)}</div>"
    )


def note(text: str) -> Html:
    """A line of text."""
    return Html(f'<div style="opacity:.8">{_escaped(text)}</div>')


def details(summary: str, *body: Html) -> Html:
    """What is shown on a click."""
    head = f'<summary style="cursor:pointer">{_escaped(summary)}</summary>'
    return Html(f"<details>{head}{''.join(body)}</details>")


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = (), *, total: int = 0) -> Html:
    """A table of texts, numbers and HTML.

    Args:
        rows: Its rows.
        header: Names of the columns; empty where they need none.
        total: How many rows there are in all, where `rows` are the first of them.
    """
    names = "".join(f'<th scope="col" style="{_CELL};font-weight:600">{_escaped(n)}</th>' for n in header)
    lines = ["".join(f'<td style="{_CELL}">{_escaped(cell)}</td>' for cell in row) for row in rows]
    body = "".join(
        f'<tr style="background:transparent">{line}</tr>' for line in ([names] if header else []) + lines
    )
    left = note(f"… and {total - len(lines):,} more") if total > len(lines) else ""
    return Html(f'<table style="{_PLAIN};border-collapse:collapse;margin:.1em 0">{body}</table>{left}')


def meter(label: str, value: int, limit: int, more: str = "") -> tuple[str, Html, str]:
    """A row of a table: how much of something is used, as a bar and in numbers."""
    share = min(max(value / limit, 0.0), 1.0) if limit else 0.0
    text = (
        f"{value:,} of {limit:,}"
        + (f", {value / limit:.0%}" if limit else "")
        + (f"; {more}" if more else "")
    )
    bar = [_box((0, 0, width, 1), Part("", color)) for width, color in ((1, None), (share, COLORS[0]))]
    return label, _svg(bar, f"{label}: {text}", (1, 1), "width:9em;height:.72em;margin-top:.36em"), text


def strip(parts: Sequence[Part], label: str) -> Html:
    """Parts side by side, as long as they are; nothing where there are too many to be seen."""
    total = sum(part.size for part in parts)
    if not 0 < len(parts) <= MAX_PARTS or not total:
        return Html()
    ends = np.cumsum([part.size for part in parts])
    boxes = [_box((end - part.size, 0, part.size, 1), part) for end, part in zip(ends, parts, strict=True)]
    return _svg(boxes, label, (total, 1), "width:100%;height:1.1em;margin:.2em 0")


def grid(parts: Sequence[Part], label: str) -> Html:
    """Parts as cells of equal size, in rows; nothing where there are too many to be seen."""
    if not 0 < len(parts) <= MAX_PARTS:
        return Html()
    columns = min(32, len(parts))
    rows = -(-len(parts) // columns)
    boxes = [_box((i % columns + 0.06, i // columns + 0.06, 0.88, 0.88), p) for i, p in enumerate(parts)]
    style = f"width:{1.15 * columns:.1f}em;height:{1.15 * rows:.1f}em;margin:.2em 0"
    return _svg(boxes, label, (columns, rows), style)


def _box(area: Sequence[Any], part: Part) -> str:
    """A rectangle: its left end, its top, its width and its height."""
    x, y, width, height = (f"{n:.3f}" for n in area)
    fill = f'fill="{part.color}"' if part.color else f'fill="{MUTED}" fill-opacity="0.2"'
    title = f"<title>{_escaped(part.label)}</title>" if part.label else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" {fill} stroke="{MUTED}" stroke-width=".5" '
        f'vector-effect="non-scaling-stroke">{title}</rect>'
    )


def _svg(boxes: Iterable[str], label: str, size: Sequence[Any], style: str) -> Html:
    return Html(
        f'<svg role="img" aria-label="{_escaped(label)}" viewBox="0 0 {size[0]} {size[1]}" '
        f'preserveAspectRatio="none" style="{style};display:block">{"".join(boxes)}</svg>'
    )


def _escaped(cell: Any) -> str:
    if isinstance(cell, Html):
        return cell
    return html.escape(f"{cell:,}" if isinstance(cell, int) else str(cell))
