"""Which families are read in which formats: the cells that tests go through, and the table in README."""

from __future__ import annotations

import itertools

import tiny_checkpoints as tiny

FAMILIES = tuple(name for name in tiny.FAMILIES if "images" not in name)
FORMATS = (
    "safetensors",
    "safetensors, sharded",
    "safetensors of Flax",
    "msgpack",
    "msgpack, sharded",
    "Orbax, Linen tree",
)
CELLS = tuple(itertools.product(FORMATS, FAMILIES))


def markdown() -> str:
    """The table, between comments by which README finds it."""
    header = ("format", *FAMILIES)
    rows = [(name, *("✓" if (name, family) in CELLS else "" for family in FAMILIES)) for name in FORMATS]
    lines = [header, tuple("---" for _ in header), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"<!-- checkpoints: tests/checkpoint_matrix.py -->\n\n{table}\n\n<!-- end of checkpoints -->"
