"""Small pieces of HTML for notebooks: plain strings, bounded in size, legible on white and on black.

Text takes the colour of its surroundings, everything else a mid-tone or a part of that colour. What a bar
shows stands beside it as a number.
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

_CARD = (
    "display:inline-block;min-width:22em;max-width:60em;padding:.6em .9em;border-radius:.4em;"
    f"border:1px solid {MUTED};color:inherit;background:transparent;font-size:.92em;line-height:1.45"
)
_CELL = (
    "text-align:left;padding:.1em 1em .1em 0;border:0;color:inherit;background:transparent;vertical-align:top"
)

_ROW = '<tr style="background:transparent">'  # no theme's stripes


class Meter(NamedTuple):
    """A share of something, drawn as a bar.

    Attributes:
        label: Of what.
        value: How much of it is used.
        limit: How much there is.
        note: What else is to be said.
    """

    label: str
    value: int
    limit: int
    note: str = ""


class Part(NamedTuple):
    """A part of a strip.

    Attributes:
        size: Its length.
        label: What is said where the mouse rests on it.
        color: Its colour; None for an empty part.
    """

    size: float
    label: str
    color: str | None


def values_of(array: Any) -> np.ndarray | None:
    """The values of an array on the host, or None where there are none to be had (see `why_unknown`)."""
    return None if why_unknown(array) else np.asarray(array)


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
    if array.size > MAX_FETCHED:
        return "too large to be shown"
    return ""


def shape_of(array: Any) -> str:
    """Element type and shape, such as `int32[4, 8]`."""
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        return type(array).__name__
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"


def preview(array: Any) -> str:
    """The first values of an array, or why there are none; escaped."""
    values = values_of(array)
    if values is None:
        return f'<span style="opacity:.75">{html.escape(why_unknown(array))}</span>'
    first = [_number(value) for value in values.reshape(-1)[:MAX_VALUES].tolist()]
    numbers = f'<code style="color:inherit;background:transparent">{", ".join(first)}</code>'
    if values.size <= MAX_VALUES:
        return numbers
    return f'{numbers} <span style="opacity:.75">… {values.size:,} in all</span>'


def card(kind: str, headline: str, *body: str) -> str:
    """A frame with a title.

    Args:
        kind: What the object is.
        headline: The most important about it.
        *body: HTML.
    """
    title = f"<strong>{html.escape(kind)}</strong>"
    head = f'<div style="margin-bottom:.3em">{title} &nbsp;{html.escape(headline)}</div>'
    return f'<div style="{_CARD}">{head}{"".join(body)}</div>'


def note(text: str) -> str:
    """A line of text."""
    return f'<div style="opacity:.8">{html.escape(text)}</div>'


def meters(rows: Iterable[Meter]) -> str:
    """Bars below each other, each with its numbers."""
    cells = []
    for row in rows:
        share = row.value / row.limit if row.limit else 0.0
        text = f"{row.value:,} of {row.limit:,}" + (f", {share:.0%}" if row.limit else "")
        text = f"{text}; {row.note}" if row.note else text
        cells.append((html.escape(row.label), _bar(share, f"{row.label}: {text}"), html.escape(text)))
    return _rows(cells)


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, in two columns."""
    return _rows((html.escape(name), html.escape(text)) for name, text in rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, total: int | None = None) -> str:
    """A table.

    Args:
        header: Names of the columns.
        rows: Cells, HTML.
        total: How many rows there are in all, where `rows` are the first of them.
    """
    head = "".join(f'<th scope="col" style="{_CELL};font-weight:600">{html.escape(n)}</th>' for n in header)
    rows = list(rows)
    left = 0 if total is None else total - len(rows)
    return _rows(rows, f"<thead>{_ROW}{head}</tr></thead>") + (
        note(f"… and {left:,} more") if left > 0 else ""
    )


def details(summary: str, *body: str) -> str:
    """What is shown on a click."""
    head = f'<summary style="cursor:pointer">{html.escape(summary)}</summary>'
    return f"<details>{head}{''.join(body)}</details>"


def strip(parts: Sequence[Part], label: str) -> str:
    """Parts side by side, as long as they are; nothing where there are too many to be seen.

    Args:
        parts: The parts.
        label: What the whole shows, in words.
    """
    total = sum(part.size for part in parts)
    if not 0 < len(parts) <= MAX_PARTS or not total:
        return ""
    boxes, at = [], 0.0
    for part in parts:
        width = 100 * part.size / total
        fill = f'fill="{part.color}"' if part.color else f'fill="{MUTED}" fill-opacity="0.18"'
        boxes.append(
            f'<rect x="{at:.3f}" y="0" width="{width:.3f}" height="6" {fill} stroke="{MUTED}" '
            f'stroke-width="0.15"><title>{html.escape(part.label)}</title></rect>'
        )
        at += width
    return _svg(boxes, label, "0 0 100 6", "width:100%;height:1.1em;margin:.2em 0")


def cells(fills: Sequence[Part], label: str) -> str:
    """Cells of equal size in rows, each filled to its size, from 0 to 1; nothing where there are too many.

    Args:
        fills: The cells.
        label: What the whole shows, in words.
    """
    if not 0 < len(fills) <= MAX_PARTS:
        return ""
    columns = min(32, len(fills))
    boxes = []
    for i, part in enumerate(fills):
        x, y = i % columns, i // columns
        title = f"<title>{html.escape(part.label)}</title>"
        frame = f'x="{x + 0.06:.2f}" y="{y + 0.06:.2f}" width="0.88" height="0.88"'
        fill = f'fill="{part.color}" fill-opacity="{part.size:.2f}"' if part.color else 'fill="none"'
        boxes.append(f'<rect {frame} {fill} stroke="{MUTED}" stroke-width="0.06">{title}</rect>')
    rows = -(-len(fills) // columns)
    style = f"width:{1.15 * columns:.1f}em;height:{1.15 * rows:.1f}em;margin:.2em 0"
    return _svg(boxes, label, f"0 0 {columns} {rows}", style)


def _bar(share: float, label: str) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    boxes = [
        f'<rect x="0" y="0" width="100" height="8" fill="{MUTED}" fill-opacity="0.25"/>',
        f'<rect x="0" y="0" width="{width:.1f}" height="8" fill="{COLORS[0]}"/>',
    ]
    return _svg(boxes, label, "0 0 100 8", "width:9em;height:.72em;margin-top:.36em")


def _svg(shapes: Sequence[str], label: str, box: str, style: str) -> str:
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" viewBox="{box}" preserveAspectRatio="none" '
        f'style="{style};display:block">{"".join(shapes)}</svg>'
    )


def _rows(rows: Iterable[Sequence[str]], head: str = "") -> str:
    body = "".join(
        _ROW + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in row) + "</tr>" for row in rows
    )
    return (
        '<table style="border-collapse:collapse;margin:.1em 0;color:inherit;background:transparent">'
        f"{head}<tbody>{body}</tbody></table>"
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
