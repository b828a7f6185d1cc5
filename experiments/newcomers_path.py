"""How long does it take a newcomer from a fresh clone to the last cell of the first notebook?

    python experiments/newcomers_path.py

Clones the repository, makes the environment as `make jupyter` does, and runs the first notebook in a kernel,
once. What is installed comes from pip's cache where it is there, unless `--no-pip-cache` is given. The small
setting runs the notebook's script in the interpreter at hand, without a clone.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from rich.progress import track

ROOT = Path(__file__).parents[1]
NOTEBOOK = "notebooks/01_ragged_batch"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    fresh: bool = True
    """Clone and install first."""
    pip_cache: bool = True
    """Let pip take from its cache what it has there."""


def steps(config: Config, clone: Path) -> dict[str, list[str]]:
    """Commands by what they do, in order; those after the clone run inside it."""
    run_script = {"run the first notebook": [sys.executable, f"{NOTEBOOK}.py"]}
    if not config.fresh:
        return run_script
    return {
        "clone": ["git", "clone", "--quiet", os.fspath(ROOT), os.fspath(clone)],
        "install jaxattn": ["make", "install"],
        "install Jupyter": ["make", ".venv/installed-notebooks"],
        "run the first notebook": [".venv/bin/jupyter", "execute", f"{NOTEBOOK}.ipynb"],
    }


def rows(config: Config) -> Iterator[Row]:
    """A row per step."""
    no_cache = {} if config.pip_cache else {"PIP_NO_CACHE_DIR": "1"}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "jaxattn"
        for step, command in track(steps(config, clone).items(), "steps"):
            started = time.perf_counter()
            subprocess.run(
                command,
                cwd=clone if clone.exists() else ROOT,
                env=os.environ | no_cache,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            yield {"step": step, "seconds": time.perf_counter() - started}


def tables(rows: list[Row]) -> dict[str, Table]:
    """Seconds of each step, and since the beginning."""
    lines, total = [], 0.0
    for row in rows:
        total += row["seconds"]
        lines.append((row["step"], f"{row['seconds']:.0f}", f"{total:.0f}"))
    return {"steps": Table(("step", "seconds", "since the beginning"), lines)}


def plot(rows: list[Row]) -> Figure:
    """Steps one after the other."""
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots()
    start = 0.0
    for i, row in enumerate(rows):
        axes.barh(i, row["seconds"], left=start, color="#0072B2")
        start += row["seconds"]
        axes.text(start, i, f" {row['seconds']:.0f} s", va="center")
    axes.set_yticks(range(len(rows)), [row["step"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * start)
    axes.set_xlabel("seconds since the beginning")
    axes.set_ylabel("step")
    axes.set_title(EXPERIMENT.question)
    return figure


EXPERIMENT = Experiment(
    question="How long from a fresh clone to the last cell of the first notebook?",
    committed=Config(),
    small=Config(fresh=False),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
