"""The tables of fields in the documents, printed from the fields' own definitions.

    python tests/support/field_tables.py notebooks/reference/metadata.md

rewrites what stands between `<!-- fields -->` and `<!-- end of fields -->`. A test fails when it is
out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from jaxattn.batch.ragged import RaggedBatch
from jaxattn.metadata.cascade import Cascade
from jaxattn.metadata.consumers import CONSUMERS
from jaxattn.metadata.fields import FieldInfo, field_table
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.metadata.visible import VisibleKeys
from jaxattn_kernels.arrays import KeyTiles, SplitPlan, Tiles

GROUPS: tuple[tuple[str, type], ...] = (
    ("`RaggedBatch`, what the host sends", RaggedBatch),
    ("`AttentionMetadata`, once per step", AttentionMetadata),
    ("`VisibleKeys`, once per window class", VisibleKeys),
    ("`Tiles`, once per list of a schedule", Tiles),
    ("`SplitPlan`, where a tiling splits keys", SplitPlan),
    ("`KeyTiles`, for gradients of keys", KeyTiles),
    ("`Cascade`, of shared prefixes", Cascade),
)

_BLOCK = re.compile(r"(<!-- fields -->\n).*?(<!-- end of fields -->)", re.DOTALL)


def consumers_of(name: str) -> tuple[str, ...]:
    """The consumers that read a field of `AttentionMetadata` or `VisibleKeys`."""
    return tuple(
        consumer.name
        for consumer in CONSUMERS.values()
        if name in consumer.reads_of(True) | consumer.reads_of(False)
    )


def markdown() -> str:
    """The fields as Markdown, a table per class."""
    return "\n".join(_full_group(title, group) for title, group in GROUPS)


def rewrite(text: str) -> str:
    """A document with its tables brought up to date."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{markdown()}\n{block[2]}", text)


def _full_group(title: str, group: type) -> str:
    rows = [
        (*_short(f), ", ".join(consumers_of(f.name)) if group in (AttentionMetadata, VisibleKeys) else "")
        for f in field_table(group)
    ]
    also = [f.also_called for f in field_table(group)]
    header = ("field", "shape", "meaning", "read by", "other systems say")
    return f"**{title}**\n\n" + _table(header, [(*row, other) for row, other in zip(rows, also, strict=True)])


def _short(info: FieldInfo) -> tuple[str, ...]:
    shape = "" if info.shape is None else f"[{info.shape}]"
    dtype = f" {info.dtype}" if info.dtype not in (None, "int32") else ""
    return f"`{info.name}`", f"{shape}{dtype}", info.meaning.rstrip(".")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    """Rewrite the documents named on the command line."""
    for path in map(Path, sys.argv[1:]):
        path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
