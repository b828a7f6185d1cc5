"""Notebooks and their pairs: the same cells, no outputs, names that follow from what stands in a cell.

They are run where the site is built (`make docs`).
"""

import ast
import hashlib
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))


def cells_of(source: Path) -> list[tuple[str, str]]:
    """Type and text of each cell of a file in the percent format."""
    _, *cells = re.split(r"^# %%(.*)\n", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = []
    for kind, text in zip(cells[::2], cells[1::2], strict=True):
        text = text.strip("\n")
        if kind.strip() == "[markdown]":
            found.append(("markdown", re.sub(r"^# ?", "", text, flags=re.MULTILINE)))
        else:
            found.append(("code", text))
    return found


def notebook_of(source: Path) -> dict:
    return json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))


def test_every_notebook_is_a_pair_of_files():
    assert len(SOURCES) >= 7
    assert sorted(FOLDER.glob("[0-9]*.ipynb")) == [source.with_suffix(".ipynb") for source in SOURCES]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_pairs_agree_cell_by_cell(source):
    cells = notebook_of(source)["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert texts == cells_of(source), "write the pairs again: python notebooks/pair.py"
    for cell in cells:
        name = hashlib.sha256(f"{cell['cell_type']} {''.join(cell['source'])}".encode()).hexdigest()[:12]
        assert cell["id"].startswith(name)
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert len({cell["id"] for cell in cells}) == len(cells)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebooks_begin_with_their_title_and_have_one(source):
    kinds, texts = zip(*cells_of(source), strict=True)
    titles = [line for text in texts for line in text.splitlines() if line.startswith("# ")]
    prose = [text for kind, text in cells_of(source) if kind == "markdown"]
    assert kinds[0] == "markdown"
    assert re.match(r"# \S", texts[0])
    assert sum(text.count("\n# ") + text.startswith("# ") for text in prose) == 1, titles
    for kind, text in cells_of(source):
        if kind == "code":
            ast.parse(text)
