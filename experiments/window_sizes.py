"""What does a sliding window save, and from which length on?

One layer, with windows of 32 to 2,048 keys and with none, which is the baseline, at two lengths, in three
phases: the prefill of one sequence, a chunk of its last 256 tokens over the keys before them, and a decode
step of eight such sequences. All windows are served by one metadata object.

What is compared: tiles of queries that `xla` visits, and keys that it reads for them, in whole blocks,
beside the keys that tokens see; instructions, operations and bytes of the compiled program, which knows no
length; and the processor time of attention, in turns. Then what several window classes cost in one metadata
object, against an object for each.

Before that, the chunk and the decode step are compared with `reference` at the shorter length, the last rows
of the prefill with the chunk at both, and what a class gets from the shared object with what it gets from its
own, bit by bit.

Not compared: kernels on a GPU; caches that let go of what no window sees (`jaxattn` keeps all pages).

    python experiments/window_sizes.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from compiled_cost import cost_of, program_cost
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import draw
from rich.progress import track
from side_by_side import Range, measure, milliseconds, rounds_of, times_as_long

from jaxattn import (
    AttentionMetadata,
    AttentionSpec,
    Bucket,
    RaggedBatch,
    attention,
    nest_sequences,
    prepare_metadata,
)
from jaxattn.attention.xla_tiles import BLOCKS_OF_KEYS
from jaxattn.metadata.consumers import xla_tiling

PAGE_SIZE = 16
NONE = "none"
PHASES = ("prefill", "chunk", "decode")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The layer and its windows."""

    num_q_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 2
    """Key heads."""
    head_dim: int = 64
    """Size of a head."""
    windows: tuple[int, ...] = (32, 128, 512, 2048)
    """Keys that a token sees, its own included; none is tried besides."""
    lengths: tuple[int, ...] = (1024, 4096)
    """Keys of a sequence."""
    chunk: int = 256
    """Query tokens of a chunk."""
    decode_seqs: int = 8
    """Sequences of a decode step."""
    rounds: int = 4
    """Rounds of timing."""

    @property
    def specs(self) -> dict[str, AttentionSpec]:
        """The layer, by its window."""
        layer = functools.partial(
            AttentionSpec,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
        )
        return {f"{window}": layer(sliding_window=window) for window in self.windows} | {NONE: layer()}


@dataclass(frozen=True)
class Case:
    """A batch with queries, cached keys and the metadata of all windows.

    Attributes:
        batch: The batch.
        q: `[T, N, H]` Queries.
        pages: Keys and values.
        metadata: Of all windows.
        programs: What has been compiled, by window and implementation.
    """

    batch: RaggedBatch
    q: jax.Array
    pages: tuple[jax.Array, jax.Array]
    metadata: AttentionMetadata
    programs: dict[tuple[AttentionSpec, str], jax.stages.Compiled] = field(default_factory=dict)

    @classmethod
    def of(cls, phase: str, length: int, config: Config) -> Case:
        """Random keys and queries; those of a chunk are the last ones of the prefill."""
        seqs = config.decode_seqs if phase == "decode" else 1
        query = {"prefill": length, "chunk": min(config.chunk, length), "decode": 1}[phase]
        count = -(-length // PAGE_SIZE)
        rng = np.random.default_rng(0)
        batch = nest_sequences(
            np.zeros(seqs * query, np.int32),
            q_lens=np.full(seqs, query),
            context_lens=np.full(seqs, length - query),
            page_tables=rng.permutation(seqs * count).reshape(seqs, count),
            page_size=PAGE_SIZE,
            bucket=Bucket(seqs * query, seqs, seqs * count, max_q_len=query),
        )
        shape = (seqs * count, PAGE_SIZE, config.num_kv_heads, config.head_dim)
        k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
        q = rng.standard_normal((seqs, length, config.num_q_heads, config.head_dim))[:, -query:]
        metadata = prepare_metadata(batch, config.specs.values(), consumers=("xla", "reference"))
        return cls(batch, jnp.asarray(q.reshape(-1, *q.shape[2:]), jnp.float32), (k, v), metadata)

    def program(self, spec: AttentionSpec, implementation: str = "xla") -> jax.stages.Compiled:
        """Attention with one of the windows, compiled."""
        if (spec, implementation) not in self.programs:
            run = functools.partial(attention, spec=spec, implementation=implementation)
            lowered = jax.jit(run).lower(self.q, *self.pages, self.metadata)
            self.programs[spec, implementation] = lowered.compile()
        return self.programs[spec, implementation]

    def attend(self, spec: AttentionSpec, implementation: str = "xla") -> jax.Array:
        """Attention with one of the windows."""
        return self.program(spec, implementation)(self.q, *self.pages, self.metadata)


def check(cases: dict[str, Case], specs: dict[str, AttentionSpec], *, by_reference: bool) -> None:
    """Compare results before anything is timed.

    Args:
        cases: Of one length, by phase.
        specs: The windows.
        by_reference: Whether the chunk and the decode step are also computed by `reference`.

    Raises:
        AssertionError: If two that should be the same differ.
    """
    for name, spec in specs.items():
        for phase in ("chunk", "decode") if by_reference else ():
            found, expected = (cases[phase].attend(spec, by) for by in ("xla", "reference"))
            np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)
        last = cases["prefill"].attend(spec)[-len(cases["chunk"].q) :]
        np.testing.assert_allclose(last, cases["chunk"].attend(spec), atol=2e-5, err_msg=name)


def check_own_metadata(case: Case, spec: AttentionSpec) -> None:
    """A class gets the same from the shared object as from one of its own.

    Raises:
        AssertionError: If it does not.
    """
    shared = case.metadata.visible_keys(spec.window_class)
    alone = prepare_metadata(case.batch, spec, consumers=("xla", "reference")).visible_keys(spec.window_class)
    jax.tree.map(np.testing.assert_array_equal, shared, alone)


def tiles_and_keys(metadata: AttentionMetadata, spec: AttentionSpec) -> dict[str, int]:
    """What `xla` does for a batch: tiles of queries, and keys that it reads for them in whole blocks.

    Beside them `seen_keys`, the keys that tokens see; a tile of many tokens reads a key once for all.
    """
    visible = metadata.visible_keys(spec.window_class)
    tiles, keys = 0, 0
    lists = visible.schedule(xla_tiling(spec)).lists
    for found, block in zip(lists, BLOCKS_OF_KEYS, strict=False):
        live = int(found.num_attending)
        start, end = np.asarray(found.kv_start)[:live], np.asarray(found.kv_end)[:live]
        tiles += live
        keys += int(((end + block - 1) // block - start // block).sum()) * block
    seen = int((np.asarray(visible.kv_end) - np.asarray(visible.kv_start)).sum())
    return {"tiles": tiles, "read_keys": keys, "seen_keys": seen}


def window_rows(length: int, config: Config) -> Iterator[Row]:
    """A row per phase: what each window visits, costs and takes."""
    specs = config.specs
    cases = {phase: Case.of(phase, length, config) for phase in PHASES}
    check(cases, specs, by_reference=length == min(config.lengths))
    for phase, case in cases.items():
        check_own_metadata(case, specs[f"{config.windows[0]}"])
        calls = {name: functools.partial(_ready, case, spec) for name, spec in specs.items()}
        costs = {name: program_cost(case.program(spec))._asdict() for name, spec in specs.items()}
        yield {
            "kind": "window",
            "phase": phase,
            "length": length,
            "work": {name: tiles_and_keys(case.metadata, spec) for name, spec in specs.items()},
            "cost": costs,
            **rounds_of(measure(calls, inputs=1, repeats=6, rounds=config.rounds)),
        }


def _ready(case: Case, spec: AttentionSpec, _: int) -> None:
    jax.block_until_ready(case.attend(spec))


def class_rows(phase: str, length: int, config: Config) -> Iterator[Row]:
    """A row per number of window classes: one metadata object for all, and one for each."""
    batch, specs = Case.of(phase, length, config).batch, list(config.specs.values())[::-1]
    for count in range(1, len(specs) + 1):
        chosen = tuple(specs[:count])
        prepared: dict[str, tuple[Callable[[RaggedBatch], AttentionMetadata], ...]] = {
            "one object": (functools.partial(_prepare, specs=chosen),),
            "an object for each": tuple(functools.partial(_prepare, specs=(spec,)) for spec in chosen),
        }
        calls = {
            name: lambda _, functions=functions: jax.block_until_ready([f(batch) for f in functions])
            for name, functions in prepared.items()
        }
        yield {
            "kind": "classes",
            "phase": phase,
            "length": length,
            "classes": count,
            "instructions": {
                name: sum(cost_of(function, batch).instructions for function in functions)
                for name, functions in prepared.items()
            },
            **rounds_of(measure(calls, inputs=1, repeats=50, rounds=config.rounds)),
        }


def _prepare(batch: RaggedBatch, *, specs: tuple[AttentionSpec, ...]) -> AttentionMetadata:
    return prepare_metadata(batch, specs, consumers=("xla", "write_cache"))


def rows(config: Config) -> Iterator[Row]:
    """Windows by length, then window classes."""
    for length in track(config.lengths, description="lengths"):
        yield from window_rows(length, config)
    for phase in track(PHASES[1:], description="classes"):
        yield from class_rows(phase, config.lengths[-1], config)


def tables(rows: list[Row]) -> dict[str, Table]:
    """What is read and how long it takes; the compiled program; several classes at once."""
    by_window = [row for row in rows if row["kind"] == "window"]
    windows = [
        [
            f"{row['phase']}, {row['length']:,}",
            name,
            f"{work['tiles']:,}",
            f"{work['read_keys']:,}",
            f"{work['read_keys'] / row['work'][NONE]['read_keys']:.2f}",
            f"{work['seen_keys'] / row['work'][NONE]['seen_keys']:.2f}",
            f"{milliseconds(row['processor_us'], name):.2f}",
            "1" if name == NONE else times_as_long(row["processor_us"], name, NONE).text(),
        ]
        for row in by_window
        for name, work in row["work"].items()
    ]
    programs = [
        [
            f"{row['phase']}, {row['length']:,}",
            *(
                _spread([cost[what] for cost in row["cost"].values()])
                for what in ("instructions", "flops", "bytes")
            ),
        ]
        for row in by_window
    ]
    classes = [
        [
            f"{row['phase']}, {row['length']:,}",
            f"{row['classes']}",
            *(f"{count:,}" for count in row["instructions"].values()),
            times_as_long(row["processor_us"], "an object for each", "one object").text(),
        ]
        for row in rows
        if row["kind"] == "classes"
    ]
    return {
        "windows": Table(
            [
                "batch",
                "window",
                "tiles",
                "keys read",
                "read ÷ none",
                "seen ÷ none",
                "processor ms",
                "time ÷ none",
            ],
            windows,
        ),
        "programs": Table(["batch", "instructions", "operations", "bytes"], programs),
        "classes": Table(
            [
                "batch",
                "window classes",
                "instructions, one object",
                "an object for each",
                "time, an object for each ÷ one",
            ],
            classes,
        ),
    }


def _spread(figures: list[float]) -> str:
    """All of some figures: one where they are the same, else the least and the largest."""
    least, most = f"{min(figures):,.0f}", f"{max(figures):,.0f}"
    return least if least == most else f"{least} to {most}"


def plot(rows: list[Row]) -> Figure:
    """Time against the window, and several classes in one object."""
    figure = Figure(figsize=(13, 4.6), layout="constrained", facecolor="white")
    read, time, shared = figure.subplots(1, 3)
    by_window = [row for row in rows if row["kind"] == "window"]
    lengths = sorted({row["length"] for row in by_window})
    for row in by_window:
        number, style = PHASES.index(row["phase"]), ("-", "--", ":")[lengths.index(row["length"]) % 3]
        windows = [name for name in row["work"] if name != NONE]
        label, places = f"{row['phase']}, {row['length']:,}", [int(name) for name in windows]
        of_none = row["work"][NONE]["read_keys"]
        shares = [row["work"][name]["read_keys"] / of_none for name in windows]
        draw(read, places, [Range.of([share]) for share in shares], number, label, style)
        ratios = [times_as_long(row["processor_us"], name, NONE) for name in windows]
        draw(time, places, ratios, number, label, style)
    for number, phase in enumerate(PHASES):
        of_phase = [row for row in rows if row["kind"] == "classes" and row["phase"] == phase]
        ratios = [times_as_long(row["processor_us"], "an object for each", "one object") for row in of_phase]
        if of_phase:
            draw(shared, [row["classes"] for row in of_phase], ratios, number, phase)
    read.set(ylabel="keys read ÷ without a window", title="What does a sliding window save?\nkeys read")
    time.set(
        ylabel="processor time ÷ without a window", title="time, in turns:\nmedian and range of the rounds"
    )
    for axes in (read, time):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel="window, keys", ylim=(0, None))
        axes.axhline(1, color="black", linewidth=0.8)
    shared.set(
        xlabel="window classes of a step", ylabel="processor time, an object for each ÷ one", ylim=(0, None)
    )
    shared.set_title("metadata: one object for all classes,\nagainst one for each")
    shared.axhline(1, color="black", linewidth=0.8)
    shared.set_xticks(sorted({row["classes"] for row in rows if row["kind"] == "classes"}))
    for axes in (read, time, shared):
        axes.grid(alpha=0.3)
    read.set_ylim(0, 1.5)
    read.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    shared.legend(frameon=False)
    return figure


EXPERIMENT = Experiment(
    question="What does a sliding window save, and from which length on?",
    committed=Config(),
    small=Config(
        head_dim=16,
        windows=(32,),
        lengths=(128,),
        chunk=32,
        decode_seqs=2,
        rounds=2,
    ),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
