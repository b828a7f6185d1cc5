"""Which families are read in which formats: the cells that tests go through, and the table in README."""

from __future__ import annotations

import tiny_checkpoints as tiny

FAMILIES = tuple(name for name in tiny.FAMILIES if "images" not in name)
GEMMAS = tuple(name for name in FAMILIES if name.startswith("Gemma"))
NAMED_BY_HUGGING_FACE = (
    "safetensors",
    "safetensors, sharded",
    "safetensors of Flax",
    "msgpack",
    "msgpack, sharded",
    "Orbax, Linen tree",
    "Orbax, Linen tree, scanned",
    "Orbax, NNX state",
)
FORMATS = {
    **dict.fromkeys(NAMED_BY_HUGGING_FACE, FAMILIES),
    **dict.fromkeys(("gemma library, nested", "gemma library, flat", "gemma library, stacked"), GEMMAS),
    **dict.fromkeys(("MaxText", "MaxText, scanned"), tuple(name for name in FAMILIES if name != "Phi-3")),
}
"""The families that are read in each format."""

CELLS = tuple((name, family) for name, families in FORMATS.items() for family in families)


def markdown() -> str:
    """The table, between comments by which README finds it."""
    header = ("format", *FAMILIES)
    rows = [(name, *("✓" if family in FORMATS[name] else "" for family in FAMILIES)) for name in FORMATS]
    lines = [header, tuple("---" for _ in header), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"<!-- checkpoints: tests/checkpoint_matrix.py -->\n\n{table}\n\n<!-- end of checkpoints -->"
