"""Which families are read in which formats: the cells of the tests, and the table in the reference."""

from __future__ import annotations

import effort
import tiny_checkpoints as tiny

FAMILIES = tuple(name for name in tiny.FAMILIES if "images" not in name)
GEMMAS = tuple(name for name in FAMILIES if name.startswith("Gemma"))
MAXTEXTS = tuple(name for name in FAMILIES if name != "Phi-3")

FILES = ("safetensors", "safetensors, sharded", "safetensors of Flax", "msgpack", "msgpack, sharded")
TREES = {
    "Orbax, Linen tree": FAMILIES,
    "Orbax, Linen tree, scanned": FAMILIES,
    "Orbax, NNX state": FAMILIES,
    "gemma library, nested": GEMMAS,
    "gemma library, flat": GEMMAS,
    "gemma library, stacked": GEMMAS,
    "MaxText": MAXTEXTS,
    "MaxText, scanned": MAXTEXTS,
}
"""What an Orbax folder holds."""

FORMATS = dict.fromkeys(FILES, FAMILIES) | TREES
"""The families that are read in each format."""

CELLS = tuple((name, family) for name, families in FORMATS.items() for family in families)


WRITTEN = (("float32", 4), ("bfloat16", 5))
"""Dtype, and the version of transformers whose dialect the config has."""

CASES = tuple((*cell, *written) for cell in CELLS for written in WRITTEN)


def _pairs_of(case: tuple) -> set[tuple]:
    """What a case tries together: its format with its dtype, and its family with its dtype."""
    format_name, family, stored, _ = case
    return {(format_name, stored), (family, stored)}


def _covering(cases: tuple, least: int) -> frozenset:
    """A few cases, in which every pair stands; which ones being up to the rotation."""
    left = effort.rotated(cases, key=str)
    chosen, missing = [], set().union(*map(_pairs_of, cases))
    while missing or len(chosen) < least:
        best = max(left, key=lambda case: len(_pairs_of(case) & missing))
        left.remove(best)
        chosen.append(best)
        missing -= _pairs_of(best)
    return frozenset(chosen)


EVERYDAY = _covering(CASES, 35)
"""The cases of an everyday run; the others are slow."""


def markdown() -> str:
    """The table, between comments by which the page is found."""
    header = ("format", *FAMILIES)
    rows = [(name, *("✓" if family in FORMATS[name] else "" for family in FAMILIES)) for name in FORMATS]
    lines = [header, tuple("---" for _ in header), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"<!-- checkpoints -->\n\n{table}\n\n<!-- end of checkpoints -->"
