"""Which families are read in which formats: the cells of the tests, and the table in the reference."""

from __future__ import annotations

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


def markdown() -> str:
    """The table, between comments by which the page is found."""
    header = ("format", *FAMILIES)
    rows = [(name, *("✓" if family in FORMATS[name] else "" for family in FAMILIES)) for name in FORMATS]
    lines = [header, tuple("---" for _ in header), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"<!-- checkpoints -->\n\n{table}\n\n<!-- end of checkpoints -->"
