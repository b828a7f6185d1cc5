"""What does one superset of metadata save against a preparation per backend, and per window class?

A step is nested and its metadata are made ready on the device, for some backends of a model with some window
classes, in four designs:

- `one superset`: nested once, one transfer, one program of `prepare_metadata` for all;
- `a program per backend`: nested once, one transfer; every backend derives its own metadata in a program;
- `per backend and class`: the same, with a program for each window class of each backend;
- `nested per backend`: every backend nests, transfers and derives for itself, as separate libraries do.

All are ours, so that nothing but the design differs. Counted are nestings on the host, each of which is one
transfer, programs that are dispatched, the instructions of these programs and the arrays that they return;
timed is the whole, from arrays on the host until the last array is ready, as processor time of all threads.
Within one jit the compiler would merge what backends have in common: `once_per_step.py` and `never_dearer.py`
count that. AutoDeploy's designs are compared in `nesting_cost.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
from compiled_cost import compiled, work
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import COLORS, grouped_bars, level, lighten, white_figure
from rich.progress import track
from serving_steps import CASES, INPUTS, bucket_of, draw_steps, nest, ready
from side_by_side import Call, measure, ratios_by_round, with_range

from jaxattn import AttentionMetadata, AttentionSpec, RaggedBatch, prepare_metadata

BACKENDS = ("xla", "reference", "triton", "mosaic")
"""Taken from the left: so many as a row says."""
WINDOWS = (None, 1024, 128)
"""Of the window classes, from the left too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which steps, for how many readers, and how often."""

    cases: tuple[str, ...] = ("decode 64", "mixed 2 x 512 + 62")
    """Names in `serving_steps.CASES`."""
    num_backends: tuple[int, ...] = (1, 2, 4)
    """Backends that read the metadata."""
    num_classes: tuple[int, ...] = (1, 3)
    """Window classes of the model."""
    rounds: int = 5
    """Rounds of timing; the designs take turns."""
    repeats: int = 20
    """Calls of a design per round, fewer where they take long."""


Prepare = Callable[[RaggedBatch], AttentionMetadata]


@dataclass(frozen=True, slots=True)
class Design:
    """How metadata are made ready.

    Attributes:
        nestings: Times that a step is nested on the host; each is one transfer.
        programs: What is dispatched for the nested batches, in turns of equal number.
    """

    nestings: int
    programs: tuple[Prepare, ...]

    def run(self, nest_once: Callable[[], RaggedBatch]) -> None:
        """Nest, transfer and derive, and wait for all of it."""
        batches = [nest_once() for _ in range(self.nestings)]
        ready([prepare(batches[i % len(batches)]) for i, prepare in enumerate(self.programs)])


def prepare_for(specs: tuple[AttentionSpec, ...], consumers: tuple[str, ...]) -> Prepare:
    """A program that derives what some backends read for some window classes."""
    return lambda batch: prepare_metadata(batch, specs, consumers=consumers)


def designs(num_backends: int, num_classes: int) -> dict[str, Design]:
    """The designs by name."""
    backends = BACKENDS[:num_backends]
    specs = tuple(
        AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, sliding_window=window)
        for window in WINDOWS[:num_classes]
    )
    each = tuple(prepare_for(specs, (backend,)) for backend in backends)
    by_class = tuple(prepare_for((spec,), (backend,)) for backend in backends for spec in specs)
    return {
        "one superset": Design(1, (prepare_for(specs, backends),)),
        "a program per backend": Design(1, each),
        "per backend and class": Design(1, by_class),
        "nested per backend": Design(num_backends, each),
    }


def count(design: Design, batch: RaggedBatch) -> Row:
    """What a step of a design takes, without running it."""
    programs = [compiled(prepare, batch).as_text() or "" for prepare in design.programs]
    results = [jax.eval_shape(prepare, batch) for prepare in design.programs]
    return {
        "nestings": design.nestings,
        "programs": len(programs),
        "instructions": sum(map(work, programs)),
        "arrays": len(jax.tree.leaves(results)),
    }


def examine(case: str, num_backends: int, num_classes: int, config: Config) -> Row:
    """Counts and times of all designs."""
    steps = draw_steps(CASES[case])
    bucket = bucket_of(steps)

    def call(design: Design) -> Call:
        return lambda i: design.run(lambda: nest(steps[i], bucket, transfer=True))

    found = designs(num_backends, num_classes)
    batch = nest(steps[0], bucket, transfer=True)
    counts = {name: count(design, batch) for name, design in found.items()}
    calls = {name: call(design) for name, design in found.items()}
    timings = measure(calls, inputs=INPUTS, repeats=config.repeats, rounds=config.rounds)
    return {
        "case": case,
        "num_backends": num_backends,
        "num_classes": num_classes,
        "counts": counts,
        "timings": {name: timing._asdict() for name, timing in timings.items()},
    }


def rows(config: Config) -> Iterator[Row]:
    """A row per case, number of backends and number of window classes."""
    cases = [
        (case, backends, classes)
        for case in config.cases
        for backends in config.num_backends
        for classes in config.num_classes
    ]
    for case in track(cases, "readers"):
        yield examine(*case, config)


FIGURES = {
    "nestings": "nestings, each a transfer",
    "programs": "programs dispatched",
    "instructions": "their instructions",
    "arrays": "arrays that they return",
}
"""What is counted, and how columns name it."""


def tables(rows: list[Row]) -> dict[str, Table]:
    """Counts and times of the most readers, and times over all of them."""
    most = max(rows, key=lambda row: (row["num_backends"], row["num_classes"]))
    counts = [
        [name, *(f"{numbers[figure]:,}" for figure in FIGURES)] for name, numbers in most["counts"].items()
    ]
    names = list(rows[0]["counts"])[1:]
    times = [
        [
            row["case"],
            str(row["num_backends"]),
            str(row["num_classes"]),
            *(
                with_range(ratios_by_round(row["timings"], name, "one superset", of="processor_us"))
                for name in names
            ),
        ]
        for row in rows
    ]
    return {
        "counts": Table(("design", *FIGURES.values()), counts),
        "times": Table(
            ("step", "backends", "window classes", *(f"{name} ÷ one superset" for name in names)), times
        ),
    }


def _readers(row: Row) -> str:
    return f"{row['num_backends']} × {row['num_classes']}"


def plot(rows: list[Row]) -> Figure:
    """Instructions and times over those of one superset, by number of readers."""
    figure = white_figure("What does one superset save against a preparation per backend?", 11, 4.4)
    counted, timed = figure.subplots(1, 2)
    names = list(rows[0]["counts"])[1:]
    first = [row for row in rows if row["case"] == rows[0]["case"]]
    series = {
        name: [
            row["counts"][name]["instructions"] / row["counts"]["one superset"]["instructions"]
            for row in first
        ]
        for name in names
    }
    grouped_bars(counted, [_readers(row) for row in first], series)
    counted.set_title(rows[0]["case"], fontsize=9)
    counted.set(xlabel="backends × window classes", ylabel="instructions ÷ those of one superset")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for name, color in zip(names, COLORS, strict=False):
        for case, marker in zip(cases, "os^", strict=False):
            some = [row for row in rows if row["case"] == case]
            ratios = [
                ratios_by_round(row["timings"], name, "one superset", of="processor_us") for row in some
            ]
            middle = [statistics.median(values) for values in ratios]
            timed.plot(
                [_readers(row) for row in some], middle, color=color, marker=marker, label=f"{name}, {case}"
            )
            timed.vlines(
                range(len(some)), list(map(min, ratios)), list(map(max, ratios)), color=color, alpha=0.4
            )
    timed.set(xlabel="backends × window classes", ylabel="processor time ÷ one superset (range of rounds)")
    for axes in (counted, timed):
        level(axes)
        lighten(axes)
        axes.legend(frameon=False, fontsize=7, loc="upper left")
    return figure


EXPERIMENT = Experiment(
    question="What does one superset of metadata save against a preparation per backend and window class?",
    committed=Config(),
    small=Config(cases=("decode 64",), num_backends=(2,), num_classes=(1,), rounds=2, repeats=3),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
