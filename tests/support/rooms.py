"""The picture of the house in DESIGN.md: its rooms with their files, in the layers of the contract.

    python tests/support/rooms.py notebooks/_static/rooms.svg

draws it from the imports, and a test fails when it is out of date. Behind the arrow of a room stand the
rooms that it imports. Cards are left out: whoever shows itself imports its own when asked.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import grimp

ROOT = Path(__file__).parents[2]
CARDS = "jaxattn.viz.cards"
INK, LINE = "#7b7b7b", "#8a8a8a"  # legible on white and on black
CHARACTER, LEADING, MARGIN, GAP, WIDTH = 6.4, 15, 6, 14, 960


class Box(NamedTuple):
    """A room where it is drawn: its files, and the rooms that it imports, in lines that fit."""

    name: str
    files: list[str]
    imports: list[str]
    x: float
    y: float
    width: float
    height: float


def layers() -> list[list[str]]:
    """The rooms of each layer, the highest first: those of the contract, and the kernels below."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    rows = [[room.strip() for room in row.split(":")] for row in contract["layers"]]
    return [*([f"jaxattn.{room}" for room in row] for row in rows), ["jaxattn_kernels"]]


@cache
def imports() -> dict[str, frozenset[str]]:
    """The rooms that each room imports."""
    graph = grimp.build_graph("jaxattn", "jaxattn_kernels")
    rooms = [room for row in layers() for room in row]
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            importer, target = _room(module, rooms), _room(imported, rooms)
            if importer and target and importer != target and imported != CARDS:
                found[importer].add(target)
    return {room: frozenset(targets) for room, targets in found.items()}


def _room(module: str, rooms: Iterable[str]) -> str | None:
    return next((room for room in rooms if module == room or module.startswith(f"{room}.")), None)


def files_of(room: str) -> tuple[str, ...]:
    """Files and folders of a room."""
    folder = ROOT / ("kernels" if room.startswith("jaxattn_kernels") else "") / room.replace(".", "/")
    files = sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_"))
    return (*files, *sorted(f"{f.parent.name}/" for f in folder.glob("*/__init__.py")))


def boxes() -> list[Box]:
    """Where each room is drawn."""
    order = [room for row in layers() for room in row]
    found: list[Box] = []
    y = float(MARGIN)
    for row in layers():
        width = (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row)
        room_for = int((width - 18) / CHARACTER)
        texts = {
            room: (
                _wrapped(files_of(room), room_for, ""),
                _wrapped([_short(r) for r in order if r in imports()[room]], room_for, "→ "),
            )
            for room in row
        }
        height = 16 + LEADING * (1 + max(len(files) + len(down) for files, down in texts.values()))
        for i, (room, (files, down)) in enumerate(texts.items()):
            x = MARGIN + i * (width + GAP)
            found.append(Box(_short(room), files, down, x, y, width, float(height)))
        y += height + GAP
    return found


def _short(room: str) -> str:
    return room.removeprefix("jaxattn.")


def _wrapped(words: Iterable[str], most: int, before: str) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and len(f"{lines[-1]} · {word}") <= most:
            lines[-1] += f" · {word}"
        else:
            lines.append((" " * len(before) if lines else before) + word)
    return lines


def picture() -> str:
    """The picture as SVG."""
    placed = boxes()
    height = max(box.y + box.height for box in placed) + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        'aria-label="The rooms of jaxattn, their files, and which room imports which" '
        f'font-family="monospace" font-size="10.5" fill="{INK}">'
    )
    return "\n".join([head, *map(_drawn, placed), "</svg>\n"])


def _drawn(box: Box) -> str:
    lines = [
        f'<text x="{box.x + 8:g}" y="{box.y + 18:g}" font-size="13" font-weight="bold">{box.name}</text>'
    ]
    for i, line in enumerate([*box.files, *box.imports]):
        style = ' font-style="italic" xml:space="preserve"' if i >= len(box.files) else ""
        lines.append(f'<text x="{box.x + 8:g}" y="{box.y + 18 + LEADING * (i + 1):g}"{style}>{line}</text>')
    return (
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="6" '
        f'fill="{LINE}" fill-opacity="0.12" stroke="{LINE}"/>{"".join(lines)}'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
