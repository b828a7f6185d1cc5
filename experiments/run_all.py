"""Run every experiment in its small setting, and bring the tables in `README.md` up to date.

    python experiments/run_all.py            # everything that changed, as `make experiments` does
    python experiments/run_all.py packing    # this one, changed or not
    python experiments/run_all.py --tables   # only the tables

The tables between `<!-- table: EXPERIMENT.NAME -->` and `<!-- end of table -->` are made from the committed
results, `results/EXPERIMENT.jsonl`; a test fails when one is out of date. A small run must have the same
tables and a picture of the same shape as the committed results: it shows that the script still makes what was
committed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from experiment import RESULTS, UNCOMMITTED, Experiment, read_result
from matplotlib.figure import Figure
from rich.console import Console
from state import state_of

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
NAMES = tuple(
    sorted(path.stem for path in FOLDER.glob("*.py") if "\nEXPERIMENT = " in path.read_text(encoding="utf-8"))
)
"""Every script that is an `Experiment`. `gpu.py` needs a GPU, and `mutation.py` hours: neither is one."""

_BLOCK = re.compile(r"(<!-- table: (\w+)\.(\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def experiment(name: str) -> Experiment:
    """The experiment of a script."""
    return importlib.import_module(name).EXPERIMENT


def origin(provenance: dict[str, Any]) -> str:
    """A line below a table: when, on what commit, and how busy the machine was."""
    load = provenance.get("load_average")
    busy = f", {provenance['cores']} cores with a load average of {load[0]:.0f}" if load else ""
    return f"*{provenance['date']}, commit {provenance['commit'][:7]}{busy}.*"


def rewrite(text: str) -> str:
    """A document with its tables made anew from the committed results.

    Raises:
        KeyError: If an experiment has no table of that name.
    """

    def table(block: re.Match[str]) -> str:
        name, wanted = block[2], block[3]
        result = read_result(RESULTS / f"{name}.jsonl")
        tables = experiment(name).tables(result.rows)
        if wanted not in tables:
            raise KeyError(f"{name} has no table {wanted!r}; it has {', '.join(tables)}")
        return f"{block[1]}\n{tables[wanted].markdown()}\n{origin(result.provenance)}\n\n{block[4]}"

    return _BLOCK.sub(table, text)


def shape_of(figure: Figure) -> list[tuple[str, ...]]:
    """What stays of a picture whatever the numbers: its panels and what their axes show."""
    return [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]


def check_small_run(name: str) -> None:
    """Run the small setting, and compare its shape with the committed results.

    Raises:
        ValueError: If it has other tables or another picture.
    """
    small = experiment(name)
    result = small.run(small.small, UNCOMMITTED / f"{name}.jsonl")
    committed = read_result(RESULTS / f"{name}.jsonl")
    for what, shapes in {
        "tables": [
            {key: tuple(table.header) for key, table in small.tables(rows).items()}
            for rows in (result.rows, committed.rows)
        ],
        "picture": [shape_of(small.plot(rows)) for rows in (result.rows, committed.rows)],
    }.items():
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name}: a small run's {what} has the shape {shapes[0]}, the committed results {shapes[1]}; "
                f"run `python experiments/{name}.py` again"
            )


def compile_cheaply() -> None:
    """Skip optimisations and keep programs, here and in further processes: they run a few times only."""
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(FOLDER.parent / ".jax_cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def main() -> None:
    """Run the small settings, unless only the tables are asked for, and rewrite the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="default: all")
    arguments = parser.parse_args()
    compile_cheaply()
    console, state = Console(width=120), state_of()
    for name in () if arguments.tables else arguments.names or NAMES:
        console.print(f"[bold]{name}[/]: {experiment(name).question}")
        stamp = UNCOMMITTED / f"{name}.state"
        if name not in arguments.names and stamp.exists() and stamp.read_text() == state:
            console.print(f"{name}: ran before, with the same sources and versions")
            continue
        started = time.perf_counter()
        check_small_run(name)
        stamp.write_text(state)
        console.print(f"{name}: {time.perf_counter() - started:.0f} s")
    README.write_text(rewrite(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
