"""Is it better to derive metadata inside the model's own program, or in a program of their own?

A small decoder on `xla` runs a step, with metadata

- `inlined`: `prepare_metadata(batch, spec)` inside the model's jit, where the compiler drops what nobody
  reads;
- `consumers=`: a program of its own that derives what the decoder and `xla` read, and no more;
- `everything`: a program of its own that derives all fields, for every implementation: the outputs of a jit
  are computed whether they are read or not;
- `given`: what the decoder and `xla` read, derived before and not timed. No design is as cheap; it shows what
  metadata cost at all.

A step is all of it, from the batch on the device to logits; caches are donated. Compared is the processor
time of all threads; the time elapsed, in which they wait for the cores of a busy machine, is in the results.
Layers are small, so that the share of the metadata shows: that of a real model is smaller.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from compiled_cost import compiled, work
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import COLORS, grouped_bars, level, lighten, white_figure
from rich.progress import track
from serving_steps import CASES, INPUTS, PAGE_SIZE, Case, bucket_of, draw_steps, nest, ready
from side_by_side import Call, measure, ratios_by_round, with_range

from jaxattn import AttentionMetadata, DecoderConfig, RaggedBatch, prepare_metadata
from jaxattn.models.decoder import forward, unembed
from jaxattn.models.layer_caches import init_model_cache
from jaxattn.models.params import init_params

DECODER = DecoderConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=16,
    sliding_windows=(None, 1024),
)
SPECS = DECODER.layer_specs()


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which steps, and how often."""

    cases: tuple[str, ...] = ("decode 8", "decode 64", "mixed 2 x 512 + 62")
    """Names in `serving_steps.CASES`."""
    rounds: int = 7
    """Rounds of timing; the candidates take turns."""
    repeats: int = 30
    """Calls of a candidate per round, fewer where they take long."""


def prepare_for_xla(batch: RaggedBatch) -> AttentionMetadata:
    """What the decoder on `xla` reads, and no more."""
    return prepare_metadata(batch, SPECS, consumers=("decoder", "xla"))


def prepare_everything(batch: RaggedBatch) -> AttentionMetadata:
    """Every field."""
    return prepare_metadata(batch, SPECS)


APART: dict[str, Callable[[RaggedBatch], AttentionMetadata]] = {
    "consumers=": prepare_for_xla,
    "everything": prepare_everything,
}
"""Metadata in programs of their own."""
OTHERS = (*APART, "given")
"""What is divided by `inlined`."""


def model_step(params: Any) -> Callable[[Any, RaggedBatch, AttentionMetadata], tuple[jax.Array, Any]]:
    """The decoder's step, given its metadata."""

    def run(cache: Any, batch: RaggedBatch, metadata: AttentionMetadata) -> tuple[jax.Array, Any]:
        hidden, cache = forward(params, DECODER, batch.token_ids, metadata, cache, implementation="xla")
        return unembed(params, DECODER, hidden[metadata.logits_indices]), cache

    return run


def calls_of(case: Case) -> tuple[dict[str, Call], RaggedBatch]:
    """The candidates, and one of the batches."""
    steps = draw_steps(case, num_pages=None, vocab_size=DECODER.vocab_size)
    batches = [nest(step, bucket_of(steps), transfer=True) for step in steps]
    run = model_step(init_params(jax.random.key(0), DECODER))
    given = jax.jit(run, donate_argnums=0)
    inlined = jax.jit(lambda cache, batch: run(cache, batch, prepare_everything(batch)), donate_argnums=0)
    caches = {
        name: init_model_cache(DECODER, num_pages=steps[0].num_pages, page_size=PAGE_SIZE, dtype="float32")
        for name in ("inlined", *OTHERS)
    }

    def call_inlined(i: int) -> None:
        _, caches["inlined"] = ready(inlined(caches["inlined"], batches[i]))

    def apart(name: str, metadata_of: Callable[[int], AttentionMetadata]) -> Call:
        def call(i: int) -> None:
            _, caches[name] = ready(given(caches[name], batches[i], metadata_of(i)))

        return call

    before = [ready(prepare_for_xla(batch)) for batch in batches]
    calls = {
        name: apart(name, lambda i, prepare=prepare: prepare(batches[i])) for name, prepare in APART.items()
    }
    return {"inlined": call_inlined, **calls, "given": apart("given", lambda i: before[i])}, batches[0]


def metadata_program(name: str, batch: RaggedBatch) -> Row:
    """Instructions of the program of its own, and what it returns."""
    leaves = jax.tree.leaves(jax.eval_shape(APART[name], batch))
    return {
        "instructions": work(compiled(APART[name], batch).as_text() or ""),
        "arrays": len(leaves),
        "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    }


def rows(config: Config) -> Iterator[Row]:
    """A row per case."""
    for name in track(config.cases, "cases"):
        calls, batch = calls_of(CASES[name])
        timings = measure(calls, inputs=INPUTS, repeats=config.repeats, rounds=config.rounds)
        yield {
            "case": name,
            "programs": {apart: metadata_program(apart, batch) for apart in APART},
            "timings": {name: timing._asdict() for name, timing in timings.items()},
        }


def tables(rows: list[Row]) -> dict[str, Table]:
    """Times of a step, and what the programs of their own compute."""
    times, programs = [], []
    for row in rows:
        inlined = statistics.median(row["timings"]["inlined"]["processor_us"]) / 1e3
        ratios = [ratios_by_round(row["timings"], name, "inlined", of="processor_us") for name in OTHERS]
        times.append([row["case"], f"{inlined:.2f}", *map(with_range, ratios)])
        for name, program in row["programs"].items():
            size = f"{program['bytes'] / 1024:,.1f}"
            programs.append([row["case"], name, str(program["instructions"]), str(program["arrays"]), size])
    return {
        "steps": Table(("step", "inlined, ms", *(f"{name} ÷ inlined (range)" for name in OTHERS)), times),
        "programs": Table(("step", "a program of", "instructions", "arrays", "KiB"), programs),
    }


def plot(rows: list[Row]) -> Figure:
    """Every round's ratio of times, and instructions of the programs of their own."""
    figure = white_figure("Metadata inside the model's own program, or in one of their own?", 10, 4)
    timed, counted = figure.subplots(1, 2)
    cases = [row["case"] for row in rows]
    for i, name in enumerate(OTHERS):
        for place, row in enumerate(rows):
            ratios = ratios_by_round(row["timings"], name, "inlined", of="processor_us")
            x = place + 0.25 * (i - 1)
            label = name if place == 0 else None
            timed.plot([x] * len(ratios), ratios, "o", color=COLORS[i], alpha=0.5, markersize=4, label=label)
            timed.plot([x - 0.08, x + 0.08], [statistics.median(ratios)] * 2, color="black")
    timed.set_xticks(range(len(cases)), cases)
    timed.set(xlabel="step", ylabel="processor time ÷ inlined; a dot per round")
    level(timed)
    lighten(timed)
    series = {name: [row["programs"][name]["instructions"] for row in rows] for name in APART}
    grouped_bars(counted, cases, series, form="{:.0f}")
    counted.set(xlabel="step", ylabel="instructions of the metadata's program")
    for axes in (timed, counted):
        axes.legend(frameon=False)
    return figure


EXPERIMENT = Experiment(
    question="Is it better to derive metadata inside the model's own program, or in one of their own?",
    committed=Config(),
    small=Config(cases=("decode 8",), rounds=2, repeats=3),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
