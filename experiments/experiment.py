"""What every experiment has: a frozen configuration, rows of results, tables and a picture. A library.

A script defines what is its own and ends with

    EXPERIMENT = Experiment(
        question=..., committed=Config(), small=Config(...), rows=..., tables=..., plot=...
    )

    if __name__ == "__main__":
        EXPERIMENT.main(__file__)

Then `python experiments/NAME.py` measures with the committed configuration and writes
`results/NAME.jsonl` and `results/NAME.png`; `python experiments/NAME.py small` is over in seconds. Every
field of the configuration is an option (`--help`). Any configuration but the committed one writes into
`results/uncommitted/`.

The first line of a `.jsonl` file holds question, configuration and provenance; each further line is a row,
written as soon as it is known.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.table
from matplotlib.figure import Figure
from rich.console import Console
from side_by_side import provenance

RESULTS = Path(__file__).parent / "results"
UNCOMMITTED = RESULTS / "uncommitted"

Row = dict[str, Any]
"""One result; what `json` can write."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that is printed in the terminal and written into `experiments/README.md`.

    Attributes:
        header: Names of the columns.
        lines: Cells, as they are to be read.
    """

    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for line in self.lines:
            if len(line) != len(self.header):
                raise ValueError(f"the line {line} has {len(line)} cells; the header has {len(self.header)}")

    def markdown(self) -> str:
        """As GitHub and MyST read it, with a line break at the end."""
        lines = [self.header, ["---" for _ in self.header], *self.lines]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def for_terminal(self, title: str) -> rich.table.Table:
        """As `rich` prints it."""
        table = rich.table.Table(*self.header, title=title, title_justify="left")
        for line in self.lines:
            table.add_row(*line)
        return table


class Result(NamedTuple):
    """A file of results.

    Attributes:
        config: The configuration, as JSON has it.
        provenance: Where, when and on what commit it was measured.
        rows: The rows.
    """

    config: dict[str, Any]
    provenance: dict[str, Any]
    rows: list[Row]


def read_result(path: Path) -> Result:
    """Read a `.jsonl` file of results.

    Raises:
        FileNotFoundError: If there is none, naming the command that makes it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run `python experiments/{path.stem}.py`")
    head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return Result(head["config"], head["provenance"], rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment[C]:
    """One question and how it is answered.

    Attributes:
        question: In a sentence.
        committed: The configuration of the committed results: a frozen dataclass.
        small: One that takes seconds on two cores and shows that all of it runs.
        rows: Measures, and yields one row after the other; shows its progress.
        tables: The tables of given rows, by a short name each.
        plot: The picture of given rows.
    """

    question: str
    committed: C
    small: C
    rows: Callable[[C], Iterable[Row]]
    tables: Callable[[list[Row]], Mapping[str, Table]]
    plot: Callable[[list[Row]], Figure]

    def run(self, config: C, path: Path) -> Result:
        """Measure, and write the rows to `path` and the picture beside it.

        Args:
            config: The configuration.
            path: The `.jsonl` file, overwritten.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "question": self.question,
            "config": config_as_json(config),
            "provenance": provenance(),
        }
        rows = []
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(head) + "\n")
            for row in self.rows(config):
                rows.append(_as_json(row))
                file.write(json.dumps(row) + "\n")
                file.flush()
        self.plot(rows).savefig(path.with_suffix(".png"), dpi=110)
        return Result(head["config"], head["provenance"], rows)

    def print_tables(self, rows: list[Row]) -> None:
        """Print the tables of some rows."""
        for name, table in self.tables(rows).items():
            Console(width=120).print(table.for_terminal(name))

    def main(self, file: str) -> None:
        """The command line of a script.

        Args:
            file: The script's `__file__`.
        """
        import tyro  # not on every machine that imports a script for its functions

        name = Path(file).stem
        configs = {
            "committed": ("the default", self.committed),
            "small": ("takes seconds, and shows that all of it runs", self.small),
        }
        arguments = sys.argv[1:]
        if not arguments or arguments[0] not in (*configs, "--help", "-h"):
            arguments = ["committed", *arguments]
        config = tyro.extras.overridable_config_cli(configs, description=self.question, args=arguments)
        folder = RESULTS if config == self.committed else UNCOMMITTED
        started = time.perf_counter()
        result = self.run(config, folder / f"{name}.jsonl")
        self.print_tables(result.rows)
        Console().print(f"{folder / name}.jsonl and .png, {time.perf_counter() - started:.0f} s")


def config_as_json(config: Any) -> dict[str, Any]:
    """A configuration as a file of results has it."""
    return _as_json(dataclasses.asdict(config))


def _as_json(value: Any) -> Any:
    """What `json` gives back of a value: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))
