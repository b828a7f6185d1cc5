"""Write the `.ipynb` beside every notebook of this folder: `python notebooks/pair.py`.

The `.py` files, in jupytext's percent format, are the source. Outputs are not kept, and the name of a cell
follows from what stands in it, so that writing a notebook again changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent


def write_pairs(folder: Path = FOLDER) -> None:
    """Write every notebook's pair."""
    for source in sorted(folder.glob("[0-9]*.py")):
        notebook = jupytext.read(source)
        seen: Counter[str] = Counter()
        for cell in notebook.cells:
            name = hashlib.sha256(f"{cell.cell_type} {cell.source}".encode()).hexdigest()[:12]
            seen[name] += 1
            cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
            cell.metadata = {}
        nbformat.validate(notebook)
        source.with_suffix(".ipynb").write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_pairs()
