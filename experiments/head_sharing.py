"""What do shared key heads cost and save, where the parameters they free go into the MLP?

Decoders of two layers learn functions of Python's standard library, packed by best fit. They differ in the
number of key/value heads that their query heads share. Sharing frees parameters of the projections to keys
and values; the MLP is widened by as many, so that all arms have the same number of parameters to less than
1 %:

- `MHA`, the baseline: a key head for each query head;
- `GQA`: groups of four query heads share one;
- `MQA`: all eight share one;
- `MQA, narrow`: the same with the MLP of the baseline, so with fewer parameters. What it lacks against `MQA`
  is what the wider MLP brings.

All arms see the same batches in the same order for a seed, and parameters of the same shape begin with the
same numbers. What is compared: the loss on held-out functions, seed by seed; the bytes of cache that a token
takes; and the processor time of a decode step of the whole decoder over long contexts, in turns. Before that,
in every arm, the loss of a function is compared with a dense forward pass by `jax.nn`, and the logits of a
decode step with those of `reference`.

Not compared: models of a size at which sharing is used. With some hundred thousand bytes of text the loss is
far from its end, and a difference within the range of the seeds says nothing either way.

    python experiments/head_sharing.py
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import COLORS, MARKERS, draw
from rich.progress import track
from side_by_side import Call, Range, measure, milliseconds, rounds_of, times_as_long

from jaxattn import Bucket, DecoderConfig, RaggedBatch, nest_batches, nest_sequences, pack_best_fit
from jaxattn.cli.demo import dense_logits, next_token_loss, standard_library_functions, training_batches
from jaxattn.models import Model, abstract_params, init_model_cache, init_params
from jaxattn.models.layer_caches import Cache
from jaxattn.models.params import Params
from jaxattn.models.steps import step

BASELINE = "MHA"
PAGE_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained, and how a decode step is timed."""

    hidden_size: int = 64
    """Width of the residual stream."""
    mlp_width: int = 256
    """Width of the baseline's MLP."""
    num_layers: int = 2
    """Layers of each decoder."""
    num_q_heads: int = 8
    """Query heads, and key heads of the baseline."""
    kv_heads: tuple[int, ...] = (2, 1)
    """Key heads of the other arms."""
    narrow: bool = True
    """Whether the last arm is trained with the baseline's MLP, too."""
    head_dim: int = 16
    """Size of a head."""
    doc_lens: tuple[int, int] = (16, 512)
    """Bytes of the shortest and of the longest function."""
    tokens: int = 512
    """Tokens of a training batch."""
    steps: int = 200
    """Optimiser steps of a run."""
    held_out: int = 64
    """Functions that are only evaluated on."""
    evaluations: int = 4
    """Evaluations of a run, evenly spaced."""
    seeds: int = 3
    """Runs of each arm."""
    learning_rate: float = 3e-3
    """Its peak, after a tenth of the steps."""
    contexts: tuple[int, ...] = (256, 1024, 4096)
    """Keys of each sequence in a decode step that is timed."""
    decode_seqs: int = 4
    """Sequences of a decode step."""
    rounds: int = 5
    """Rounds of timing."""


def arms(config: Config) -> dict[str, DecoderConfig]:
    """The decoders that are compared."""
    baseline = DecoderConfig(
        vocab_size=256,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_width,
        num_layers=config.num_layers,
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_q_heads,
        head_dim=config.head_dim,
    )
    decoders = {BASELINE: baseline}
    for heads in config.kv_heads:
        name, shared = _name(heads), dataclasses.replace(baseline, num_kv_heads=heads)
        decoders[name] = widened(shared, num_params(baseline))
        if config.narrow and heads == config.kv_heads[-1]:
            decoders[f"{name}, narrow"] = shared
    return decoders


def _name(kv_heads: int) -> str:
    return "MQA" if kv_heads == 1 else f"GQA, {kv_heads} key heads"


def num_params(decoder: DecoderConfig) -> int:
    """Parameters of a decoder."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(decoder, "float32")))


def widened(decoder: DecoderConfig, wanted: int) -> DecoderConfig:
    """The decoder with the width of the MLP that brings it closest to a number of parameters."""
    per_feature = 3 * decoder.hidden_size * decoder.num_layers
    more = round((wanted - num_params(decoder)) / per_feature)
    return dataclasses.replace(decoder, intermediate_size=decoder.intermediate_size + more)


def cache_bytes_per_token(decoder: DecoderConfig) -> int:
    """Bytes of float32 keys and values of all layers."""
    return 4 * 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim


@dataclass(frozen=True)
class Text:
    """What is trained on, and what is evaluated on.

    Attributes:
        documents: Functions to train on.
        held_out: The others, packed into batches of the same bucket.
        bucket: Of all batches.
    """

    documents: list[np.ndarray]
    held_out: tuple[RaggedBatch, ...]
    bucket: Bucket

    @classmethod
    def of(cls, config: Config) -> Text:
        """Functions of the standard library."""
        shortest, longest = config.doc_lens
        functions = standard_library_functions(range(shortest, longest + 1))
        bucket = Bucket(config.tokens, config.tokens // shortest)
        packs = pack_best_fit(functions[: config.held_out], bucket)
        return cls(functions[config.held_out :], tuple(nest_batches(packs, bucket)), bucket)


def num_targets(batch: RaggedBatch) -> int:
    """Tokens of a batch that have a successor in their document."""
    return int(np.asarray(batch.cu_q_lens)[-1]) - int(batch.num_seqs)


def held_out_loss(params: Params, decoder: DecoderConfig, batches: Sequence[RaggedBatch]) -> float:
    """Mean loss of all tokens that have a successor, in nats per byte."""
    losses = [float(_loss(params, batch, decoder)) for batch in batches]
    return float(np.average(losses, weights=[num_targets(batch) for batch in batches]))


@functools.partial(jax.jit, static_argnums=2)
def _loss(params: Params, batch: RaggedBatch, decoder: DecoderConfig) -> jax.Array:
    return next_token_loss(params, batch, decoder)


def train(decoder: DecoderConfig, config: Config, text: Text, seed: int) -> Iterator[tuple[int, float]]:
    """One run: after how many steps, the loss on the held-out functions.

    Args:
        decoder: What is trained.
        config: For how long.
        text: On what.
        seed: Of the initial parameters and of the order of functions.
    """
    params = _initial(_key(seed), decoder)
    state = (params, _optimizer(config).init(params))
    marks = set(np.linspace(0, config.steps, config.evaluations + 1).round().astype(int).tolist())
    batches = training_batches(text.documents, text.bucket, seed)
    for number, batch in zip(range(config.steps + 1), batches, strict=False):
        if number in marks:
            yield number, held_out_loss(state[0], decoder, text.held_out)
        state = _take_step(decoder, config, state, batch)


_initial = jax.jit(init_params, static_argnums=1)
_key = functools.partial(jax.random.key, impl="rbg")  # whose programs compile in a fifth of the time


def _optimizer(config: Config) -> optax.GradientTransformation:
    peak, steps = config.learning_rate, config.steps
    rate = optax.warmup_cosine_decay_schedule(0, peak, steps // 10, steps, peak / 20)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _take_step(decoder: DecoderConfig, config: Config, state: tuple, batch: RaggedBatch) -> tuple:
    """Parameters and moments of the optimiser after one more batch."""
    params, moments = state
    gradients = jax.grad(next_token_loss)(params, batch, decoder)
    updates, moments = _optimizer(config).update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments


def check_loss(decoder: DecoderConfig, text: Text) -> None:
    """Compare the loss of one function with that of a dense forward pass.

    Raises:
        AssertionError: If they differ.
    """
    params, document = _initial(_key(0), decoder), text.documents[0].astype(np.int32)
    dense = jax.jit(lambda params, ids: dense_logits(Model.from_params(decoder, params), ids))
    losses = optax.softmax_cross_entropy_with_integer_labels(dense(params, document)[:-1], document[1:])
    found = _loss(params, nest_sequences([document], bucket=text.bucket), decoder)
    np.testing.assert_allclose(found, losses.mean(), rtol=1e-5)


def decode_batch(config: Config, context: int) -> tuple[RaggedBatch, int]:
    """A decode step of equal contexts, and the number of pages."""
    seqs, pages = config.decode_seqs, -(-context // PAGE_SIZE)
    batch = nest_sequences(
        np.arange(seqs),
        q_lens=np.ones(seqs, np.int32),
        context_lens=np.full(seqs, context - 1),
        page_tables=np.random.default_rng(0).permutation(seqs * pages).reshape(seqs, pages),
        page_size=PAGE_SIZE,
        bucket=Bucket(seqs, seqs, seqs * pages, max_q_len=1),
    )
    return batch, seqs * pages


def random_cache(decoder: DecoderConfig, num_pages: int) -> Cache:
    """A cache that is full of random keys and values."""
    empty = init_model_cache(decoder, num_pages=num_pages, page_size=PAGE_SIZE, dtype="float32")
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), empty)


def decode_call(decoder: DecoderConfig, config: Config, context: int) -> Call:
    """A decode step of the whole decoder; each call writes the same token's keys again."""
    batch, num_pages = decode_batch(config, context)
    params = _initial(_key(0), decoder)
    run = functools.partial(step, config=decoder, num_rows=config.decode_seqs)
    take_step = jax.jit(functools.partial(run, implementation="xla"), donate_argnums=1)
    logits, cache = take_step(params, random_cache(decoder, num_pages), batch)
    if context == min(config.contexts):
        of_reference = jax.jit(functools.partial(run, implementation="reference"))
        expected, _ = of_reference(params, random_cache(decoder, num_pages), batch)
        np.testing.assert_allclose(logits, expected, atol=1e-4)

    def call(_: int) -> None:
        nonlocal cache
        logits, cache = take_step(params, cache, batch)
        jax.block_until_ready(logits)

    return call


def rows(config: Config) -> Iterator[Row]:
    """Train every arm with every seed, then time decode steps."""
    text, decoders = Text.of(config), arms(config)
    for name, decoder in decoders.items():
        check_loss(decoder, text)
        yield {
            "kind": "arm",
            "arm": name,
            "kv_heads": decoder.num_kv_heads,
            "mlp_width": decoder.intermediate_size,
            "parameters": num_params(decoder),
            "cache_bytes_per_token": cache_bytes_per_token(decoder),
            "held_out_targets": sum(map(num_targets, text.held_out)),
        }
    runs = list(itertools.product(range(config.seeds), decoders.items()))
    for seed, (name, decoder) in track(runs, description="runs"):
        yield {"kind": "run", "arm": name, "seed": seed, "curve": list(train(decoder, config, text, seed))}
    for context in track(config.contexts, description="decode steps"):
        calls = {name: decode_call(decoder, config, context) for name, decoder in decoders.items()}
        timings = measure(calls, inputs=1, repeats=10, rounds=config.rounds)
        yield {"kind": "decode", "context": context, **rounds_of(timings)}


def final_losses(rows: list[Row], arm: str) -> list[float]:
    """The last held-out loss of each of an arm's runs, by seed."""
    return [row["curve"][-1][1] for row in rows if row["kind"] == "run" and row["arm"] == arm]


def _minus_baseline(rows: list[Row], arm: str) -> list[float]:
    pairs = zip(final_losses(rows, arm), final_losses(rows, BASELINE), strict=True)
    return [loss - baseline for loss, baseline in pairs]


def tables(rows: list[Row]) -> dict[str, Table]:
    """What an arm is and learns, and how long it decodes."""
    described = [row for row in rows if row["kind"] == "arm"]
    loss_lines = []
    for row in described:
        differences = ", ".join(f"{d:+.3f}" for d in _minus_baseline(rows, row["arm"]))
        loss_lines.append(
            [
                row["arm"],
                f"{row['kv_heads']}",
                f"{row['mlp_width']}",
                f"{row['parameters']:,}",
                Range.of(final_losses(rows, row["arm"])).text(".3f"),
                differences if row["arm"] != BASELINE else "",
                f"{row['cache_bytes_per_token']:,}",
            ]
        )
    decode_lines = [
        [
            f"{row['context']:,}",
            name,
            f"{milliseconds(row['processor_us'], name):.2f}",
            times_as_long(row["processor_us"], name, BASELINE).text() if name != BASELINE else "1",
        ]
        for row in rows
        if row["kind"] == "decode"
        for name in row["processor_us"]
    ]
    return {
        "loss": Table(
            [
                "arm",
                "key heads",
                "MLP",
                "parameters",
                "held-out loss",
                "minus MHA, by seed",
                "cache, bytes per token",
            ],
            loss_lines,
        ),
        "decode": Table(["keys per sequence", "arm", "processor ms a step", "÷ MHA"], decode_lines),
    }


def plot(rows: list[Row]) -> Figure:
    """Loss over training, its difference from the baseline by seed, and the time of a decode step."""
    figure = Figure(figsize=(13, 4.4), layout="constrained", facecolor="white")
    curves, differences, time = figure.subplots(1, 3, width_ratios=(5, 3, 4))
    names = [row["arm"] for row in rows if row["kind"] == "arm"]
    for number, name in enumerate(names):
        points = np.array([row["curve"] for row in rows if row["kind"] == "run" and row["arm"] == name])
        ranges = [Range.of(losses) for losses in points[:, :, 1].T.tolist()]
        draw(curves, points[0, :, 0].tolist(), ranges, number, name)
        found = _minus_baseline(rows, name)
        differences.plot(
            [number] * len(found), found, color=COLORS[number], marker=MARKERS[number], linestyle="none"
        )
    trained = [loss for row in rows if row["kind"] == "run" for _, loss in row["curve"][1:]]
    curves.set(xlabel="optimiser steps", ylabel="held-out loss, nats per byte")
    curves.set_ylim(min(trained) - 0.05, max(trained) + 0.05)
    curves.set_title("What do shared key heads cost at equal parameters?\nmedian and range of the seeds")
    curves.legend(frameon=False)
    differences.axhline(0, color="black", linewidth=0.8)
    differences.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    differences.set_xlim(-0.5, len(names) - 0.5)
    differences.set(xlabel="arm", ylabel="nats per byte")
    differences.set_title("final loss minus MHA's,\nof the same seed")
    decoded = [row for row in rows if row["kind"] == "decode"]
    for number, name in enumerate(names):
        ranges = [times_as_long(row["processor_us"], name, BASELINE) for row in decoded]
        draw(time, [row["context"] for row in decoded], ranges, number, name)
    time.set_xscale("log", base=2)
    time.set_xticks([row["context"] for row in decoded], [f"{row['context']:,}" for row in decoded])
    time.set(xlabel="keys per sequence", ylabel="processor time of a decode step ÷ MHA's", ylim=(0, None))
    time.set_title("a decode step, timed in turns:\nmedian and range of the rounds")
    for axes in (curves, differences, time):
        axes.grid(alpha=0.3)
    return figure


EXPERIMENT = Experiment(
    question="What do shared key heads cost and save, where the parameters they free go into the MLP?",
    committed=Config(),
    small=Config(
        num_layers=1,
        kv_heads=(1,),
        narrow=False,
        tokens=256,
        doc_lens=(16, 128),
        steps=4,
        held_out=8,
        evaluations=2,
        seeds=1,
        contexts=(64,),
        rounds=2,
    ),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
