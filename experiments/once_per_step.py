"""What is gained if metadata are derived once per step, and not in every layer?

A small stack of layers that attend, in one batch, as

- `loop`: one program, unrolled; `loop, unfused`: the same before XLA fuses, where what is computed once
  stands once; `scan`: one program, `lax.scan` over layers;
- `rematerialised`: the gradient, with each layer under `jax.checkpoint`;
- `programs`: a program per layer, which derives its metadata in it, or is given what a program before all
  layers derived;
- `two programs`: a program of the metadata before every layer's own, or one before all layers.

Instructions of the metadata are counted in what XLA compiles for a CPU; for `programs`, in each program as
often as it runs. Within one program nothing should be gained, since the compiler merges what is equal; where
it may not look, much. The deepest stacks take turns and are timed, in a batch so small that dispatch is most
of it.

How much time there is to gain is asked once more on steps of a server, where metadata are larger: with layers
that do little but read every field. No model gains as much, since its layers take longer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compiled_cost import UNFUSED, compiled, work
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import COLORS, level, lighten, white_figure
from rich.progress import track
from serving_steps import CASES, INPUTS, bucket_of, draw_steps, nest, ready
from side_by_side import Call, measure, ratios_by_round, with_range

from jaxattn import (
    AttentionMetadata,
    AttentionSpec,
    Bucket,
    RaggedBatch,
    attention,
    nest_sequences,
    prepare_metadata,
)
from jaxattn.batch.ragged import abstract_batch

FORMS = (
    "loop",
    "loop, unfused",
    "scan",
    "rematerialised loop",
    "rematerialised scan",
    "programs",
    "two programs",
)
"""How a stack of layers becomes a program; the last two are several programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which stacks, and how often they run."""

    implementations: tuple[str, ...] = ("reference", "xla")
    """Of the attention."""
    forms: tuple[str, ...] = FORMS
    """Names in `FORMS`; the loops of `xla` have no gradient, so it is not rematerialised."""
    num_layers: tuple[int, ...] = (2, 8)
    """Layers of the stacks, ascending and even: two window classes take turns."""
    cases: tuple[str, ...] = ("decode 64", "mixed 2 x 512 + 62")
    """Steps for layers that only read, names in `serving_steps.CASES`."""
    rounds: int = 5
    """Rounds of timing; the two take turns."""
    repeats: int = 20
    """Calls per round."""


STACK_BUCKET = Bucket(32, 4, 16)
STACK_PAGE_SIZE = 4
_SMALL: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}
STACK_LAYERS: tuple[AttentionSpec, ...] = (AttentionSpec(**_SMALL), AttentionSpec(**_SMALL, sliding_window=8))


def stack(
    num_layers: int,
    implementation: str,
    form: str,
    *,
    once: bool,
    classes: tuple[AttentionSpec, ...] = STACK_LAYERS,
) -> Callable[[RaggedBatch, jax.Array, jax.Array, jax.Array], jax.Array]:
    """A stack of layers that attend, or its gradient where it is rematerialised.

    Args:
        num_layers: Layers; the window classes take turns.
        implementation: Of the attention.
        form: One of `FORMS` but the last two.
        once: Whether metadata are derived before the layers, or in each of them.
        classes: Layers of each window class.
    """
    period = len(classes)

    def run(batch: RaggedBatch, x: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        shared = prepare_metadata(batch, classes) if once else None

        def layer(x: jax.Array, kv: tuple[jax.Array, jax.Array], spec: AttentionSpec) -> jax.Array:
            metadata = prepare_metadata(batch, classes) if shared is None else shared
            return x + attention(x, *kv, metadata, spec, implementation=implementation)

        def repeat(x: jax.Array, kv: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            for i, spec in enumerate(classes):
                x = layer(x, (kv[0][i], kv[1][i]), spec)
            return x, None

        if "scan" in form:
            body = jax.checkpoint(repeat) if "remat" in form else repeat
            k, v = (pages.reshape(-1, period, *pages.shape[1:]) for pages in (k, v))
            return jax.lax.scan(body, x, (k, v))[0]
        for i in range(num_layers):
            attend = jax.checkpoint(layer, static_argnums=2) if "remat" in form else layer
            x = attend(x, (k[i], v[i]), classes[i % period])
        return x

    if "remat" in form:
        return jax.grad(lambda batch, x, k, v: run(batch, x, k, v).sum(), argnums=1)
    return run


def stack_arguments(num_layers: int) -> tuple[RaggedBatch, Any, Any, Any]:
    """The shapes of a stack's arguments."""
    N, K, H = (_SMALL[name] for name in ("num_q_heads", "num_kv_heads", "head_dim"))
    batch = abstract_batch(STACK_BUCKET, STACK_PAGE_SIZE)
    x = jax.ShapeDtypeStruct((STACK_BUCKET.tokens, N, H), jnp.float32)
    pages = jax.ShapeDtypeStruct((num_layers, STACK_BUCKET.pages, STACK_PAGE_SIZE, K, H), jnp.float32)
    return batch, x, pages, pages


METADATA = "jit(_prepare)"
"""What the name of every instruction of `prepare_metadata` holds, wherever it was moved or fused."""


def stack_text(*args: Any, options: dict[str, bool | str] | None = None, **kwargs: Any) -> str:
    """The compiled program of a `stack`."""
    return compiled(stack(*args, **kwargs), *stack_arguments(args[0]), options=options).as_text() or ""


def programs_of(
    num_layers: int, implementation: str, form: str, *, once: bool
) -> tuple[Any, list[tuple[Any, int]]]:
    """What is called, and its compiled programs with how often each runs.

    Returns:
        A function of a stack's arguments, and the programs.
    """
    if "programs" not in form:
        function = stack(num_layers, implementation, form, once=once)
        options = UNFUSED if "unfused" in form else None
        program = compiled(function, *stack_arguments(num_layers), options=options)
        return program, [(program, 1)]
    if form == "programs" and not once:
        return _layers_for_themselves(num_layers, implementation)
    return _metadata_apart(num_layers, implementation, once=once)


def _layers_for_themselves(num_layers: int, implementation: str) -> tuple[Any, list[tuple[Any, int]]]:
    """A program per window class, with its metadata in it, which runs once per layer."""
    each = [
        compiled(stack(1, implementation, "loop", once=True, classes=(spec,)), *stack_arguments(1))
        for spec in STACK_LAYERS
    ]

    def run(batch: RaggedBatch, x: jax.Array, k: list[jax.Array], v: list[jax.Array]) -> jax.Array:
        for i in range(num_layers):
            x = each[i % len(each)](batch, x, k[i], v[i])
        return x

    return run, [(program, num_layers // len(each)) for program in each]


def _metadata_apart(num_layers: int, implementation: str, *, once: bool) -> tuple[Any, list[tuple[Any, int]]]:
    """A program of the metadata, once or before every layer, and one per layer that is given them."""
    batch, x, pages, _ = stack_arguments(1)

    def derive(batch: RaggedBatch) -> AttentionMetadata:
        return prepare_metadata(batch, STACK_LAYERS, consumers=implementation)

    prepare, metadata = compiled(derive, batch), jax.eval_shape(derive, batch)

    def layer(spec: AttentionSpec) -> Any:
        def run(metadata: AttentionMetadata, x: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return x + attention(x, k[0], v[0], metadata, spec, implementation=implementation)

        return compiled(run, metadata, x, pages, pages)

    layers = [layer(spec) for spec in STACK_LAYERS]

    def run(batch: RaggedBatch, x: jax.Array, k: list[jax.Array], v: list[jax.Array]) -> jax.Array:
        metadata = prepare(batch)
        for i in range(num_layers):
            metadata = metadata if once or i == 0 else prepare(batch)
            x = layers[i % len(layers)](metadata, x, k[i], v[i])
        return x

    return run, [
        (prepare, 1 if once else num_layers),
        *((program, num_layers // len(layers)) for program in layers),
    ]


def count(programs: list[tuple[Any, int]]) -> int:
    """Instructions of the metadata in some programs, each as often as it runs."""
    return sum(times * work(program.as_text() or "", METADATA) for program, times in programs)


def metadata_instructions(num_layers: int, implementation: str, form: str, *, once: bool) -> int:
    """Instructions of the metadata in a stack; in `programs`, of each program as often as it runs."""
    return count(programs_of(num_layers, implementation, form, once=once)[1])


def concrete_arguments(num_layers: int) -> tuple[RaggedBatch, jax.Array, jax.Array, jax.Array]:
    """Three decodes and a prefill in the stack's bucket, with random numbers."""
    batch = nest_sequences(
        [[1], [2], [3], [4] * 13],
        context_lens=[8, 11, 14, 7],
        page_tables=[[0, 5, 2], [9, 1, 3], [4, 6, 7, 8], [10, 11, 12, 13, 14]],
        page_size=STACK_PAGE_SIZE,
        num_pages=STACK_BUCKET.pages,
        bucket=STACK_BUCKET,
    )
    _, *shapes = stack_arguments(num_layers)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x, k, v = (jax.random.normal(key, s.shape, s.dtype) for key, s in zip(keys, shapes, strict=True))
    return batch, x, k, v


WHEN = {"once": True, "in every layer": False}


def examine(num_layers: int, implementation: str, form: str, config: Config) -> Row:
    """Counts of both, and times of the deepest stacks unless it is a form for counting alone."""
    found = {name: programs_of(num_layers, implementation, form, once=once) for name, once in WHEN.items()}
    row: Row = {
        "kind": "attending",
        "implementation": implementation,
        "form": form,
        "num_layers": num_layers,
        "instructions": {name: count(programs) for name, (_, programs) in found.items()},
    }
    if "unfused" not in form and num_layers == max(config.num_layers):
        batch, x, k, v = concrete_arguments(num_layers)
        if "programs" in form:
            k, v = jnp.split(k, num_layers), jnp.split(v, num_layers)
        calls: dict[str, Call] = {
            name: lambda _, run=run: jax.block_until_ready(run(batch, x, k, v))
            for name, (run, _) in found.items()
        }
        timings = measure(calls, inputs=1, repeats=config.repeats, rounds=config.rounds)
        row["timings"] = {name: timing._asdict() for name, timing in timings.items()}
    return row


# Layers that only read.


def prepare_for_xla(batch: RaggedBatch) -> AttentionMetadata:
    """What a decoder on `xla` reads, and no more."""
    return prepare_metadata(batch, STACK_LAYERS, consumers=("decoder", "xla"))


def read_everything(x: jax.Array, weight: jax.Array, metadata: AttentionMetadata) -> jax.Array:
    """A layer that does little but read every field that was prepared."""
    total = sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(metadata))
    return jnp.tanh(x @ weight + 1e-9 * total)


def _read_for_itself(x: jax.Array, weight: jax.Array, batch: RaggedBatch) -> jax.Array:
    return read_everything(x, weight, prepare_for_xla(batch))


def reading_stack(form: str, *, once: bool) -> Callable[[jax.Array, jax.Array, RaggedBatch], jax.Array]:
    """A program of `weights [L, D, D]`, `x [1, D]` and a batch; the gradient where it is rematerialised."""
    layer: Any = read_everything if once else _read_for_itself
    layer = jax.checkpoint(layer) if "remat" in form else layer

    def run(weights: jax.Array, x: jax.Array, batch: RaggedBatch) -> jax.Array:
        read = prepare_for_xla(batch) if once else batch
        if "scan" in form:
            return jax.lax.scan(lambda x, weight: (layer(x, weight, read), None), x, weights)[0]
        for weight in weights:
            x = layer(x, weight, read)
        return x

    if "remat" in form:
        return jax.grad(lambda weights, x, batch: run(weights, x, batch).sum())
    return run


def reading_call(form: str, batches: list[RaggedBatch], num_layers: int, *, once: bool) -> Call:
    """A stack of layers that only read, on each of the batches."""
    rng = np.random.default_rng(0)
    weights, x = jnp.asarray(rng.normal(size=(num_layers, 16, 16)), jnp.float32), jnp.ones((1, 16))
    if "programs" not in form:
        program = jax.jit(reading_stack(form, once=once))
        return lambda i: ready(program(weights, x, batches[i]))
    prepare, each = jax.jit(prepare_for_xla), list(weights)
    is_given = once or form == "two programs"
    layer: Any = jax.jit(read_everything if is_given else _read_for_itself)

    def call(i: int) -> None:
        y, read = x, prepare(batches[i]) if is_given else batches[i]
        for number, weight in enumerate(each):
            read = prepare(batches[i]) if is_given and not once and number > 0 else read
            y = layer(y, weight, read)
        ready(y)

    return call


def read_steps(case: str, form: str, config: Config) -> Row:
    """Times of layers that only read."""
    steps = draw_steps(CASES[case])
    batches = [nest(step, bucket_of(steps), transfer=True) for step in steps]
    num_layers = max(config.num_layers)
    calls = {name: reading_call(form, batches, num_layers, once=once) for name, once in WHEN.items()}
    timings = measure(calls, inputs=INPUTS, repeats=config.repeats, rounds=config.rounds)
    return {
        "kind": "reading",
        "case": case,
        "form": form,
        "num_layers": num_layers,
        "timings": {name: timing._asdict() for name, timing in timings.items()},
    }


# Running and reporting.


def rows(config: Config) -> Iterator[Row]:
    """A row per implementation, form and number of layers, then one per step and form."""
    stacks = [
        (num_layers, implementation, form)
        for implementation in config.implementations
        for form in config.forms
        for num_layers in config.num_layers
        if not (implementation == "xla" and "rematerialised" in form)
    ]
    for case in track(stacks, "stacks that attend"):
        yield examine(*case, config)
    forms = [form for form in config.forms if "unfused" not in form]
    for case, form in track([(case, form) for case in config.cases for form in forms], "that only read"):
        yield read_steps(case, form, config)


def _of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _of_most_layers(rows: list[Row]) -> list[Row]:
    most = max(row["num_layers"] for row in rows)
    return [row for row in _of_kind(rows, "attending") if row["num_layers"] == most]


def _ratios(row: Row) -> list[float]:
    return ratios_by_round(row["timings"], "in every layer", "once", of="processor_us")


def tables(rows: list[Row]) -> dict[str, Table]:
    """Counts and times of the deepest stacks."""
    lines = []
    for row in _of_most_layers(rows):
        counts = [row["instructions"][name] for name in WHEN]
        ratio = with_range(_ratios(row)) if "timings" in row else "–"
        lines.append(
            [
                f"`{row['implementation']}`",
                row["form"],
                str(row["num_layers"]),
                *(f"{n:,}" for n in counts),
                ratio,
            ]
        )
    header = (
        "implementation",
        "form",
        "layers",
        "instructions of the metadata, once",
        "in every layer",
        "processor time, in every layer ÷ once (range)",
    )
    read = [[row["case"], row["form"], with_range(_ratios(row))] for row in _of_kind(rows, "reading")]
    return {
        "stacks": Table(header, lines),
        "reading": Table(("step", "form", "processor time, in every layer ÷ once (range)"), read),
    }


def plot(rows: list[Row]) -> Figure:
    """How counts grow with layers, and every round's ratio of times of layers that only read."""
    figure = white_figure("What is gained by metadata once per step, not in every layer?", 11, 4.6)
    counted, timed = figure.subplots(1, 2)
    forms = list(dict.fromkeys(row["form"] for row in rows))
    for form, color in zip(forms, COLORS, strict=False):
        for implementation, style in (("reference", "-"), ("xla", ":")):
            some = [
                row
                for row in _of_kind(rows, "attending")
                if (row["form"], row["implementation"]) == (form, implementation)
            ]
            ratios = [row["instructions"]["in every layer"] / row["instructions"]["once"] for row in some]
            label = form if implementation == "reference" else None
            layers = [row["num_layers"] for row in some]
            counted.plot(layers, ratios, style, color=color, marker="o", label=label)
    counted.set(xlabel="layers (dotted: xla)", ylabel="instructions of the metadata, every layer ÷ once")
    counted.legend(frameon=False, fontsize=8)
    reading = _of_kind(rows, "reading")
    for i, row in enumerate(reading):
        ratios, color = _ratios(row), COLORS[forms.index(row["form"])]
        timed.barh(i, statistics.median(ratios), color=color, alpha=0.8)
        timed.plot(ratios, [i] * len(ratios), "|", color="black", markersize=9)
    timed.set_yticks(range(len(reading)), [f"{row['case']}, {row['form']}" for row in reading], fontsize=8)
    timed.invert_yaxis()
    timed.axvline(1, color="#333333", linewidth=1, linestyle="--")
    timed.set(xlabel="processor time, every layer ÷ once", ylabel="step, form of layers that only read")
    level(counted)
    lighten(counted)
    return figure


EXPERIMENT = Experiment(
    question="What is gained if metadata are derived once per step, and not in every layer?",
    committed=Config(),
    small=Config(
        implementations=("reference",),
        forms=("loop", "rematerialised loop", "programs"),
        num_layers=(2,),
        cases=("decode 8",),
        rounds=2,
        repeats=3,
    ),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
