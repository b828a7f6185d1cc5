"""What compiled kernels take of a multiprocessor: a table in `resources.json`, and its comparison.

The table names the versions it was made with. With the same versions every figure must be the same;
with others a kernel must neither spill more nor take other shared memory, and must still run its products
and copies by the same kinds of instructions. `write_resources.py` makes the table.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from deviceless import ptxas

TABLE = Path(__file__).with_name("resources.json")
MAX_REGISTERS = 255
"""Registers of a thread, at most."""

# By name: how an instruction is written in PTX.
INSTRUCTIONS = {
    "128-bit load": r"\bld\.global\S*\.(v4\.\w32|v2\.\w64)\b",
    "16-byte cp.async": r"\bcp\.async\.c[ag]\.shared\.global\S* [^;]*, (0x10|16)\b",
    "TMA copy": r"\bcp\.async\.bulk\.tensor\.\S*\.global\b",
    "mma.sync": r"\bmma\.sync\.",
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05.mma": r"\btcgen05\.mma\.",
}


class Key(NamedTuple):
    """Which kernel of which case.

    Attributes:
        backend: As in the names of implementations.
        case: What was compiled, but for the target.
        kernel: Its name.
        architecture: As ptxas names it.
    """

    backend: str
    case: str
    kernel: str
    architecture: str


class Resources(NamedTuple):
    """What a kernel takes.

    Attributes:
        registers: Registers per thread, at launch.
        spilled: Bytes per thread that do not fit in registers.
        shared_memory: Bytes per block.
        instructions: How often each of `INSTRUCTIONS` stands in its PTX, if it does.
    """

    registers: int
    spilled: int
    shared_memory: int
    instructions: dict[str, int]


Table = Mapping[Key, Resources]


def resources_of(kernel: Any) -> Resources:
    """The resources of a compiled kernel: of anything that has these figures and `ptx`."""
    counts = {name: len(re.findall(pattern, kernel.ptx)) for name, pattern in INSTRUCTIONS.items()}
    present = {name: count for name, count in counts.items() if count}
    return Resources(kernel.registers, kernel.spilled, kernel.shared_memory, present)


def versions() -> dict[str, str]:
    """Versions of whatever decides the figures."""
    report = subprocess.run([ptxas(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", report)
    assert found, report
    return {"jax": version("jax"), "jaxlib": version("jaxlib"), "ptxas": found[1]}


def read() -> tuple[dict[str, str], dict[Key, Resources]]:
    """The versions of the table, and the table."""
    text = json.loads(TABLE.read_text(encoding="utf-8"))
    entries = text["kernels"]
    return text["versions"], {
        Key(*(entry[name] for name in Key._fields)): Resources(
            *(entry[name] for name in Resources._fields)
        )
        for entry in entries
    }  # fmt: skip


def written(versions: Mapping[str, str], table: Table) -> str:
    """The table as JSON, a kernel per line."""
    lines = [json.dumps(key._asdict() | table[key]._asdict()) for key in sorted(table, key=_natural)]
    return f'{{\n"versions": {json.dumps(versions)},\n"kernels": [\n' + ",\n".join(lines) + "\n]\n}\n"


def changes(
    found: Table, versions: Mapping[str, str], *, recorded: tuple[Mapping[str, str], Table]
) -> list[str]:
    """How kernels differ from the table, a line each; of other versions, where they are worse."""
    their_versions, table = recorded
    same = versions == their_versions
    lines = []
    for key, new in found.items():
        old = table.get(key)
        if old is None:
            lines.append(f"{' '.join(key)} is not in the table")
        elif new != old if same else is_worse(new, old):
            lines.append(f"{' '.join(key)}: {new} instead of {old}, versions {versions} and {their_versions}")
    return lines


def is_worse(new: Resources, old: Resources) -> bool:
    """Whether a kernel that other versions made takes more than it may."""
    return (
        new.registers > MAX_REGISTERS
        or new.spilled > old.spilled
        or new.shared_memory != old.shared_memory
        or new.instructions.keys() != old.instructions.keys()
    )


def check(found: Table) -> None:
    """Fail where kernels differ from the table."""
    differences = changes(found, versions(), recorded=read())
    assert not differences, "\n".join([*differences, "if this is meant, run `make resources`"])


# The table in a document.

_BLOCK = re.compile(r"(<!-- resources -->\n).*?(<!-- end of resources -->)", re.DOTALL)


def rewrite(text: str, versions: Mapping[str, str], table: Table) -> str:
    """A document with its table brought up to date."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{markdown(versions, table)}\n{block[2]}", text)


def markdown(versions: Mapping[str, str], table: Table) -> str:
    """A table per backend: a row per case and kernel, a column per architecture."""
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    parts = [f"Made with {names}."]
    for backend in _unique(key.backend for key in table):
        mine = {key: value for key, value in table.items() if key.backend == backend}
        columns = sorted(_unique(key.architecture for key in mine), key=lambda name: _natural((name,)))
        lines = [(f"`{backend}`", "kernel", *columns), ("---",) * (len(columns) + 2)]
        for case, kernel in _unique((key.case, key.kernel) for key in mine):
            cells = (_cell(mine.get(Key(backend, case, kernel, column))) for column in columns)
            lines.append((case, kernel, *cells))
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _cell(resources: Resources | None) -> str:
    if resources is None:
        return ""
    spilled = f" + {resources.spilled} B" if resources.spilled else ""
    return f"{resources.registers}{spilled}, {round(resources.shared_memory / 1024, 1):g}"


def _natural(names: Iterable[str]) -> list:
    """A key to sort by in which numbers count as numbers."""
    return [[int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)] for name in names]


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))
