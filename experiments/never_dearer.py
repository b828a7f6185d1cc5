"""Is the superset ever dearer than functions written for one consumer alone?

A count of compiled programs, for a CPU: XLA's instructions, arithmetic operations and bytes. Nothing is
timed and nothing runs. What the superset is compared with stands in `specialised_metadata.py`.

1. Each consumer's own function against the superset, inlined (everything is prepared, the program
   returns what the consumer reads, the compiler removes the rest) and selected
   (`prepare_metadata(consumers=...)`, a program of its own).
2. All consumers at once against the sum of their own functions; and what one more window class adds
   against a function that derives that class alone from what is shared.

Layers that derive it again are the question of `once_per_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from compiled_cost import UNFUSED, Cost, compiled, cost_of, program_cost
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import COLORS, grouped_bars, level, lighten, white_figure
from rich.progress import track
from specialised_metadata import (
    SPECIALISED,
    Arrays,
    further_class_arrays,
    read_by,
    without_repeats,
)

from jaxattn import AttentionSpec, Bucket, RaggedBatch, RopeConfig, prepare_metadata
from jaxattn.batch.ragged import abstract_batch
from jaxattn.metadata.consumers import CONSUMERS
from jaxattn.metadata.spec import WindowClass

Layers = tuple[AttentionSpec, ...]

_SIZES: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "rope": RopeConfig()}
GLOBAL = AttentionSpec(**_SIZES)
SLIDING = AttentionSpec(**_SIZES, sliding_window=128)
WIDER = AttentionSpec(**_SIZES, sliding_window=512)
TWO_SIDED = AttentionSpec(**_SIZES, causal=False)

LAYERS: dict[str, Layers] = {
    "global": (GLOBAL,),
    "sliding": (SLIDING,),
    "5 sliding : 1 global": (*(SLIDING,) * 5, GLOBAL),
    "three classes": (GLOBAL, SLIDING, TWO_SIDED),
}
"""Layers of models by name; equal ones share a window class."""

BUCKETS = {
    "decode 32": Bucket(32, 32, 512, max_q_len=1),
    "decode 256": Bucket(256, 256, 4096, max_q_len=1),
    "speculative 128": Bucket(128, 32, 512, max_q_len=4),
    "mixed 512": Bucket(512, 32, 512),
    "mixed 4096": Bucket(4096, 256, 8192),
}
"""Buckets by name, with the pages of paged batches."""

PAGE_SIZE = 16
TABLE_WIDTH = 16
READERS = ("reference", "xla", "triton", "triton_gradient", "mosaic", "mosaic_gradient")


def window_classes(layers: Layers) -> Layers:
    """One layer of each window class, in order."""
    classes: dict[Any, AttentionSpec] = {}
    for layer in layers:
        classes.setdefault(layer.window_class, layer)
    return tuple(classes.values())


def empty_batch(bucket: Bucket, *, paged: bool) -> RaggedBatch:
    """The shapes of a batch in a bucket."""
    if paged:
        return abstract_batch(bucket, PAGE_SIZE)
    return abstract_batch(Bucket(bucket.tokens, bucket.seqs, max_q_len=bucket.max_q_len))


# Consumers one by one.


def specialised(consumer: str, layers: Layers) -> Callable[[RaggedBatch], Arrays]:
    """The consumer's own function."""
    return lambda batch: SPECIALISED[consumer](batch, window_classes(layers))


def inlined(consumer: str, layers: Layers) -> Callable[[RaggedBatch], Arrays]:
    """Everything is prepared, and what the consumer reads is returned."""

    def prepare(batch: RaggedBatch) -> Arrays:
        metadata = prepare_metadata(batch, layers, max_pages_per_seq=TABLE_WIDTH)
        return read_by(consumer, metadata, window_classes(layers))

    return prepare


def selected(consumers: str | Iterable[str], layers: Layers) -> Callable[[RaggedBatch], Any]:
    """A program of its own that prepares what the consumers read."""
    return lambda batch: prepare_metadata(batch, layers, consumers=consumers)


def programs(consumer: str, layers: Layers, batch: RaggedBatch) -> dict[str, jax.stages.Compiled]:
    """The consumer's own function and both uses of the superset, compiled."""
    functions = {"specialised": specialised, "inlined": inlined, "selected": selected}
    return {name: compiled(make(consumer, layers), batch) for name, make in functions.items()}


# Consumers together, and one window class more.


def compare_together(layers: Layers, batch: RaggedBatch) -> dict[str, Cost]:
    """The superset for every consumer at once against the sum of their own functions."""
    needs_pages = {"write_cache", "decoder"}
    consumers = [name for name in CONSUMERS if batch.page_size is not None or name not in needs_pages]
    alone = [cost_of(specialised(name, layers), batch) for name in consumers]
    return {"specialised": sum_of(alone), "superset": cost_of(selected(consumers, layers), batch)}


def sum_of(costs: Iterable[Cost]) -> Cost:
    """The cost of several programs."""
    return Cost(*(sum(column) for column in zip(*costs, strict=True)))


def compare_further_class(consumer: str, layers: Layers, batch: RaggedBatch) -> dict[str, Cost]:
    """What the last of several window classes adds, unfused, against a function for that class alone."""
    window = layers[-1].window_class
    assert isinstance(window, WindowClass)
    with_it, without = (
        cost_of(
            lambda batch, some=some: without_repeats(inlined(consumer, some)(batch)), batch, options=UNFUSED
        )
        for some in (layers, layers[:-1])
    )
    shared = _shared(consumer, layers, batch)
    alone = cost_of(lambda *args: further_class_arrays(window, *args), *shared, options=UNFUSED)
    return {"specialised": alone, "superset": with_it.minus(without)}


def _shared(consumer: str, layers: Layers, batch: RaggedBatch) -> tuple[Arrays, list[Arrays]]:
    """Shapes of what window classes share."""
    T, R = batch.bucket.tokens, batch.bucket.seqs

    def ints(n: int) -> Any:
        return jax.ShapeDtypeStruct((n,), jnp.int32)

    def flags(n: int) -> Any:
        return jax.ShapeDtypeStruct((n,), jnp.bool_)

    tokens = {"kv_end": ints(T), "row": ints(T), "real": flags(T), "kv_lens": ints(R)}
    arrays = jax.eval_shape(inlined(consumer, layers[-1:]), batch)
    sizes = [arrays[name].size for name in ("short.seq/0", "long.seq/0") if name in arrays]
    return tokens, [{"q_start": ints(n), "last": ints(n), "live": flags(n)} for n in sizes]


# Running and reporting.


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What is compiled."""

    buckets: tuple[str, ...] = tuple(BUCKETS)
    """Names in `BUCKETS`."""
    layers: tuple[str, ...] = tuple(LAYERS)
    """Names in `LAYERS`."""
    paged: tuple[bool, ...] = (True, False)
    """Whether keys lie in pages, or packed beside their queries."""
    readers: tuple[str, ...] = READERS
    """Consumers that are compared one by one."""


def rows(config: Config) -> Iterator[Row]:
    """A row per comparison."""
    cases = [(bucket, paged) for bucket in config.buckets for paged in config.paged]
    for bucket, paged in track(cases, "buckets"):
        case, batch = {"bucket": bucket, "paged": paged}, empty_batch(BUCKETS[bucket], paged=paged)
        for name in config.layers:
            for consumer in config.readers:
                costs = {k: program_cost(p) for k, p in programs(consumer, LAYERS[name], batch).items()}
                yield {"kind": "consumer", **case, "layers": name, "consumer": consumer, **_written(costs)}
        costs = compare_together(LAYERS["three classes"], batch)
        yield {"kind": "all consumers", **case, **_written(costs)}
        # The kernels' classes have split plans and orders of their own, which 1 compares.
        for consumer in ("reference", "xla"):
            costs = compare_further_class(consumer, (GLOBAL, SLIDING, WIDER), batch)
            yield {"kind": "a third window", **case, "consumer": consumer, **_written(costs)}


def _written(costs: dict[str, Cost]) -> Row:
    return {name: cost._asdict() for name, cost in costs.items()}


FIGURES = ("instructions", "flops", "bytes")


def _of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def tables(rows: list[Row]) -> dict[str, Table]:
    """Sums over all comparisons; superset ÷ specialised for all consumers at once, and for a third window."""
    consumers = _of_kind(rows, "consumer")
    forms = {
        "specialised": "specialised functions, summed",
        "inlined": "the superset, inlined and pruned by the compiler",
        "selected": "the superset, selected by `consumers=`",
    }
    totals = [
        [
            label,
            *(f"{sum(row[form][figure] for row in consumers):,.0f}" for figure in FIGURES),
            f"{sum(_is_dearer(row, form) for row in consumers)} of {len(consumers)}",
        ]
        for form, label in forms.items()
    ]
    together = [
        [
            f"{row['bucket']}, {'paged' if row['paged'] else 'not paged'}",
            *(f"{_share(row, figure):.2f}" for figure in FIGURES),
        ]
        for row in _of_kind(rows, "all consumers")
    ]
    further = _of_kind(rows, "a third window")
    window = [
        [
            f"`{consumer}`",
            *(_shares([row for row in further if row["consumer"] == consumer], f) for f in FIGURES),
        ]
        for consumer in dict.fromkeys(row["consumer"] for row in further)
    ]
    return {
        "totals": Table(
            ("", "instructions", "operations", "bytes", "comparisons in which it is dearer"), totals
        ),
        "together": Table(("batch", "instructions", "operations", "bytes"), together),
        "window": Table(("consumer", "instructions", "operations", "bytes"), window),
    }


def _is_dearer(row: Row, form: str) -> bool:
    return any(row[form][figure] > row["specialised"][figure] for figure in FIGURES)


def _shares(rows: list[Row], figure: str) -> str:
    shares = [_share(row, figure) for row in rows]
    return f"{min(shares):.2f} to {max(shares):.2f}"


def _share(row: Row, figure: str) -> float:
    return row["superset"][figure] / row["specialised"][figure]


def plot(rows: list[Row]) -> Figure:
    """Every comparison, and what all consumers share."""
    figure = white_figure("Is the superset ever dearer than functions written for one consumer?", 11, 4.4)
    alone, together = figure.subplots(1, 2)
    consumers = _of_kind(rows, "consumer")
    for name, color in zip(dict.fromkeys(row["consumer"] for row in consumers), COLORS, strict=False):
        points = [
            (row["specialised"]["instructions"], row["inlined"]["instructions"])
            for row in consumers
            if row["consumer"] == name
        ]
        alone.plot(*zip(*points, strict=True), "o", color=color, alpha=0.6, label=name, markersize=4)
    most = max(row["specialised"]["instructions"] for row in consumers)
    alone.plot([0, most], [0, most], color="#333333", linewidth=1, linestyle="--", label="equal")
    alone.set(xlabel="instructions of its own function", ylabel="instructions of the superset, inlined")
    alone.legend(frameon=False, fontsize=8)
    lighten(alone)
    all_at_once = _of_kind(rows, "all consumers")
    cases = [f"{row['bucket']}, {'paged' if row['paged'] else 'not'}" for row in all_at_once]
    series = {figure: [_share(row, figure) for row in all_at_once] for figure in ("instructions", "flops")}
    grouped_bars(together, cases, series)
    together.set(xlabel="batch", ylabel="all consumers at once ÷ sum of their own")
    level(together)
    together.set_ylim(0, 1.3)
    together.legend(frameon=False, loc="upper right", ncols=2)
    return figure


EXPERIMENT = Experiment(
    question="Is the superset ever dearer than functions written for one consumer alone?",
    committed=Config(),
    small=Config(buckets=("decode 32",), layers=("sliding",), paged=(True,), readers=("reference", "xla")),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
