"""What results follow from beside the code that is run: the library's sources, and installed versions.

What was run in the same state before need not be run again: `make docs` keeps the outputs of pages, and
`make experiments` skips experiments.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
READ = ("jaxattn", "kernels", "experiments", "pyproject.toml")
SUFFIXES = (".py", ".pyi", ".toml", ".json", ".jsonl")


def state_of(*further: Path) -> str:
    """A hash of the versions, the library, the experiments and their committed results, and further files."""
    state = hashlib.sha256(sys.version.encode())
    folders = [path for name in READ for path in (ROOT / name, *(ROOT / name).rglob("*"))]
    for path in sorted([*folders, *further]):
        if path.suffix in SUFFIXES and "uncommitted" not in path.parts:
            state.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    for line in sorted({f"{found.name} {found.version}" for found in importlib.metadata.distributions()}):
        state.update(line.encode())
    return state.hexdigest()[:16]
