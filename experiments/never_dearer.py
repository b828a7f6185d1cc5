"""Is the superset ever dearer than functions written for one consumer alone?

A count of compiled programs, for a CPU: XLA's instructions, arithmetic operations and bytes. Nothing is
timed and nothing runs. What the superset is compared with stands in `specialised_metadata.py`.

    python experiments/never_dearer.py

prints tables and writes `experiments/results/never_dearer.json` with provenance. What is compared:

1. Each consumer's own function against the superset, inlined (everything is prepared, the program
   returns what the consumer reads, the compiler removes the rest) and selected
   (`prepare_metadata(consumers=...)`, a program of its own).
2. All consumers at once against the sum of their own functions; and what one more window class adds
   against a function that derives that class alone from what is shared.
3. Stacks of layers: instructions of the metadata by number of layers, derived once or in every layer: in
   one program nothing is gained, under rematerialisation and in programs of their own much is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from compiled_cost import UNFUSED, Cost, compiled, cost_of, program_cost, work
from cpu_attention import provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table
from specialised_metadata import (
    SPECIALISED,
    Arrays,
    further_class_arrays,
    read_by,
    without_repeats,
)

from jaxattn import AttentionSpec, Bucket, RaggedBatch, RopeConfig, attention, prepare_metadata
from jaxattn.batch import abstract_batch
from jaxattn.consumers import CONSUMERS
from jaxattn.spec import WindowClass

RESULTS = Path(__file__).parent / "results" / "never_dearer.json"

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


# 1. Consumers one by one.


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


# 2. Consumers together, and one window class more.


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


# 3. Stacks of layers.

FORMS = ("loop", "loop, unfused", "scan", "rematerialised loop", "rematerialised scan", "programs")
STACK_BUCKET = Bucket(32, 4, 16)
STACK_PAGE_SIZE = 4
_SMALL: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}
STACK_LAYERS: Layers = (AttentionSpec(**_SMALL), AttentionSpec(**_SMALL, sliding_window=8))


def stack(
    num_layers: int, implementation: str, form: str, *, once: bool, classes: Layers = STACK_LAYERS
) -> Callable[[RaggedBatch, jax.Array, jax.Array, jax.Array], jax.Array]:
    """A stack of layers that attend, or its gradient where it is rematerialised.

    Args:
        num_layers: Layers; the window classes take turns.
        implementation: Of the attention.
        form: One of `FORMS` but the last.
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


def metadata_instructions(num_layers: int, implementation: str, form: str, *, once: bool) -> int:
    """Instructions of the metadata in a stack; in `programs`, of each program as often as it runs."""
    if form != "programs":
        options = UNFUSED if "unfused" in form else None
        return work(stack_text(num_layers, implementation, form, once=once, options=options), METADATA)
    if once:
        batch = stack_arguments(1)[0]
        text = compiled(selected(implementation, STACK_LAYERS), batch).as_text() or ""
        return work(text, METADATA)
    one = [
        work(stack_text(1, implementation, "loop", once=True, classes=(spec,)), METADATA)
        for spec in STACK_LAYERS
    ]
    return sum(one[i % len(one)] for i in range(num_layers))


# Tables.


def matrix(buckets: Sequence[str] = tuple(BUCKETS)) -> list[dict[str, Any]]:
    """Every consumer on every batch and set of layers."""
    rows = []
    for bucket in track(buckets, description="consumers"):
        for paged in (True, False):
            batch = empty_batch(BUCKETS[bucket], paged=paged)
            for name, layers in LAYERS.items():
                for consumer in READERS:
                    case = {"bucket": bucket, "paged": paged, "layers": name, "consumer": consumer}
                    costs = {k: program_cost(p) for k, p in programs(consumer, layers, batch).items()}
                    rows.append(case | {key: cost._asdict() for key, cost in costs.items()})
    return rows


def together(buckets: Sequence[str] = tuple(BUCKETS)) -> list[dict[str, Any]]:
    """All consumers at once, and one more window class."""
    rows = []
    for bucket in track(buckets, description="together"):
        for paged in (True, False):
            batch = empty_batch(BUCKETS[bucket], paged=paged)
            case = {"bucket": bucket, "paged": paged}
            costs = compare_together(LAYERS["three classes"], batch)
            rows.append(case | {"what": "all consumers"} | {k: c._asdict() for k, c in costs.items()})
            # The kernels' classes have split plans and orders of their own, which 1 compares.
            for consumer in ("reference", "xla"):
                costs = compare_further_class(consumer, (GLOBAL, SLIDING, WIDER), batch)
                rows.append(
                    case
                    | {"what": f"a third window, {consumer}"}
                    | {k: c._asdict() for k, c in costs.items()}
                )
    return rows


def stacks(layers: Sequence[int] = (2, 4, 8, 16)) -> list[dict[str, Any]]:
    """Instructions of the metadata in stacks of layers."""
    rows = []
    for implementation in track(("reference", "xla"), description="stacks"):
        for form in FORMS:
            if implementation == "xla" and "remat" in form:
                continue  # its loops have no gradient
            for once in (True, False):
                counts = {str(n): metadata_instructions(n, implementation, form, once=once) for n in layers}
                rows.append(
                    {"implementation": implementation, "form": form, "once": once, "instructions": counts}
                )
    return rows


def _figures(cost: dict[str, float]) -> str:
    return f"{cost['instructions']:,.0f} / {cost['flops']:,.0f} / {cost['bytes']:,.0f}"


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(_figures(v) if isinstance(v, dict) else str(v) for v in row.values()))
    return table


def main() -> None:
    before = provenance()  # the commit may move on while programs are compiled
    results = {"consumers": matrix(), "together": together(), "stacks": stacks()}
    console = Console(width=160)
    for name in ("consumers", "together"):
        console.print(_table(f"{name}: instructions / FLOPs / bytes", results[name]))
    flat = [
        {k: v for k, v in row.items() if k != "instructions"} | row["instructions"]
        for row in results["stacks"]
    ]
    console.print(_table("instructions of the metadata, by number of layers", flat))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"provenance": before, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
