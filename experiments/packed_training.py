"""Does it matter how documents become training batches: packed, padded, or concatenated and cut?

The same decoder, initial parameters, optimiser and number of real tokens, on functions of Python's standard
library of 16 to 1,024 bytes, in three arms:

- `packed`: whole documents, packed by best fit into batches of 1,024 tokens; none sees another. Ragged call.
- `padded`: four documents a batch, a row each, padded to the longest, in steps of a few lengths; dense
  attention by `jax.nn`. The rows are causal and padded on the right, so that no token sees padding.
- `truncated`: documents one after the other without a boundary, cut every 1,024 tokens; a token attends to,
  and counts its position from, whatever stands before it since the cut. Ragged call, one sequence a batch.

What is compared: the loss on held-out documents, each in a row of its own and evaluated densely, against the
real tokens seen; and, timed in turns, the time of an optimiser step per real token, with the memory of its
program. `grouped` and `truncated, dense` are there for the cost alone: padded batches of documents of like
length, and one dense row without padding. Last, the gradient of the same documents packed and padded.

    python experiments/packed_training.py
    python experiments/packed_training.py --checkpoint CHECKPOINT --log LOG.jsonl

prints tables and writes `packed_training.json`, with provenance, and `packed_training.png` to
`experiments/results`. `--checkpoint` saves the packed arm's decoder for `load_model`; `--log` writes every
evaluation as a JSON line when it is made.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from side_by_side import measure, provenance

from jaxattn import Bucket, DecoderConfig, RaggedBatch, nest_batches, nest_sequences, pack_best_fit
from jaxattn.checkpoints import save_params
from jaxattn.demo import dense_logits, next_token_loss, standard_library_functions
from jaxattn.models import Model, init_params
from jaxattn.models.decoder import Params

RESULTS = Path(__file__).parent / "results"
MODEL = DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=256,
    num_layers=2,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=32,
    sliding_windows=(None, 128),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is trained, on what, and for how long.

    Attributes:
        model: The decoder.
        min_len: Bytes of the shortest document.
        tokens: Tokens of a packed batch and of a truncated row, and bytes of the longest document.
        seqs: Documents of a packed batch, at most.
        rows: Documents of a padded batch.
        row_lens: Lengths that padded rows may have, ascending; the last is `tokens`.
        held_out: Documents for evaluation.
        steps: Every run sees this many times `tokens` real tokens.
        seeds: Runs of each arm; a seed gives the initial parameters and the order of documents.
        evaluations: Evaluations of a run, evenly spaced.
        learning_rate: Its peak, after a tenth of the tokens.
        timed: Batches of each kind that are timed, one after the other.
        rounds: Rounds of timing.
    """

    model: DecoderConfig = MODEL
    min_len: int = 16
    tokens: int = 1024
    seqs: int = 32
    rows: int = 4
    row_lens: tuple[int, ...] = (128, 256, 384, 512, 768, 1024)
    held_out: int = 64
    steps: int = 300
    seeds: int = 3
    evaluations: int = 8
    learning_rate: float = 3e-3
    timed: int = 16
    rounds: int = 5

    @property
    def bucket(self) -> Bucket:
        """Of packed batches and truncated rows alike: both run the same compiled program."""
        return Bucket(self.tokens, self.seqs)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["token_ids", "lens"], meta_fields=[])
@dataclass(frozen=True, slots=True)
class Rows:
    """A dense batch.

    Attributes:
        token_ids: `[B, L]` A document per row, 0 past its end.
        lens: `[B]` Tokens of each.
    """

    token_ids: Any
    lens: Any


Batch = RaggedBatch | Rows
Documents = Iterable[np.ndarray]


def packed(documents: Documents, setting: Setting) -> Iterator[Batch]:
    """Whole documents, as many as fit."""
    return nest_batches(pack_best_fit(documents, setting.bucket), setting.bucket)


def padded(documents: Documents, setting: Setting) -> Iterator[Batch]:
    """A document per row, padded to the longest of the batch, rounded up to one of a few lengths."""
    for group in itertools.batched(documents, setting.rows):
        lens = np.array([document.size for document in group], np.int32)
        width = min(length for length in setting.row_lens if length >= lens.max())
        token_ids = np.stack([np.pad(document, (0, width - document.size)) for document in group])
        yield Rows(token_ids.astype(np.int32), lens)


def grouped(documents: Documents, setting: Setting, window: int = 64) -> Iterator[Batch]:
    """Padded batches of like lengths: of every 64 documents, ordered by length."""
    for group in itertools.batched(documents, window):
        yield from padded(sorted(group, key=len), setting)


def cut(documents: Documents, setting: Setting) -> Iterator[np.ndarray]:
    """All documents one after the other, cut into rows."""
    for row in itertools.batched(itertools.chain.from_iterable(documents), setting.tokens):
        yield np.array(row, np.int32)


def truncated(documents: Documents, setting: Setting) -> Iterator[Batch]:
    """A row per batch, nested as one sequence."""
    return (nest_sequences([row], bucket=setting.bucket) for row in cut(documents, setting))


def truncated_dense(documents: Documents, setting: Setting) -> Iterator[Batch]:
    """A row per batch."""
    return (Rows(row[None], np.array([row.size], np.int32)) for row in cut(documents, setting))


ARMS: dict[str, Callable[[Documents, Setting], Iterator[Batch]]] = {
    "packed": packed,
    "padded": padded,
    "truncated": truncated,
}
"""What is trained."""
LAYOUTS = {**ARMS, "grouped": grouped, "truncated, dense": truncated_dense}
"""What is timed."""


def real_tokens(batch: Batch) -> int:
    """Tokens of a batch that are no padding."""
    return int(batch.lens.sum() if isinstance(batch, Rows) else np.asarray(batch.cu_q_lens)[-1])


def padded_tokens(batch: Batch) -> int:
    """Tokens that the program computes, padding included."""
    return batch.token_ids.size


def endless(documents: list[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """All documents in a new order in every epoch."""
    rng = np.random.default_rng(seed)
    return (documents[i] for _ in itertools.count() for i in rng.permutation(len(documents)))


def row_losses(params: Params, rows: Rows, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """`[B, L-1]` -log p of each token but a row's first, and which of them are real."""
    model, ids = Model.from_params(config, params), jnp.asarray(rows.token_ids)
    logits = jax.vmap(lambda row: dense_logits(model, row))(ids)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return losses, jnp.arange(1, ids.shape[1])[None, :] < rows.lens[:, None]


def batch_loss(params: Params, batch: Batch, config: DecoderConfig) -> jax.Array:
    """Mean cross-entropy of each token's successor in its sequence, in nats."""
    if isinstance(batch, RaggedBatch):
        return next_token_loss(params, batch, config)
    losses, is_real = row_losses(params, batch, config)
    return losses.mean(where=is_real)


class State(NamedTuple):
    """Parameters, and the moments of the optimiser."""

    params: Params
    moments: Any


@dataclass(slots=True)
class Trainer:
    """Optimiser steps and evaluations, compiled once per shape of a batch, for all arms and seeds."""

    setting: Setting
    compiled: dict[Hashable, jax.stages.Compiled] = field(default_factory=dict)

    @property
    def budget(self) -> int:
        """Real tokens of a run."""
        return self.setting.steps * self.setting.tokens

    def start(self, seed: int) -> State:
        """The state before the first step."""
        params = init_params(jax.random.key(seed), self.setting.model)
        return State(params, self._optimizer().init(params))

    def step(self, state: State, batch: Batch, tokens_seen: int) -> State:
        """The state after one more batch; the old one is used up."""
        return self.program(state, batch)(state, batch, jnp.int32(tokens_seen))

    def program(self, state: State, batch: Batch) -> jax.stages.Compiled:
        """The compiled step for batches of this shape."""
        return self._compiled(self._step, (state, batch, jnp.int32(0)), donate_argnums=0)

    def losses(self, params: Params, rows: Rows) -> tuple[jax.Array, jax.Array]:
        """`row_losses`, compiled."""
        function = functools.partial(row_losses, config=self.setting.model)
        return self._compiled(function, (params, rows))(params, rows)

    def _optimizer(self) -> optax.GradientTransformation:
        # The learning rate is a factor on the update: it follows the tokens seen, not the steps.
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, b2=0.99))

    def _step(self, state: State, batch: Batch, tokens_seen: jax.Array) -> State:
        gradients = jax.grad(batch_loss)(state.params, batch, self.setting.model)
        updates, moments = self._optimizer().update(gradients, state.moments, state.params)
        peak = self.setting.learning_rate
        rate = optax.warmup_cosine_decay_schedule(0, peak, self.budget // 10, self.budget, peak / 20)
        updates = jax.tree.map(lambda update: rate(tokens_seen) * update, updates)
        params: Any = optax.apply_updates(state.params, updates)
        return State(params, moments)

    def _compiled(self, function: Callable, args: tuple, **options: Any) -> jax.stages.Compiled:
        leaves, tree = jax.tree.flatten(args)
        key = (bool(options), tree, tuple(leaf.shape for leaf in leaves))
        if key not in self.compiled:
            self.compiled[key] = jax.jit(function, **options).lower(*args).compile()
        return self.compiled[key]


class Losses(NamedTuple):
    """Losses of all held-out tokens that have one, and their positions in their documents."""

    values: np.ndarray
    positions: np.ndarray


def evaluate(trainer: Trainer, params: Params, held_out: list[np.ndarray]) -> Losses:
    """The loss of each held-out token, every document in a row of its own."""
    values, positions = [], []
    for rows in padded(sorted(held_out, key=len), trainer.setting):
        assert isinstance(rows, Rows)
        losses, is_real = map(np.asarray, trainer.losses(params, rows))
        values.append(losses[is_real])
        positions.append(1 + np.nonzero(is_real)[1])
    return Losses(np.concatenate(values), np.concatenate(positions))


def by_position(losses: Losses, setting: Setting) -> dict[str, float]:
    """Mean loss by place in the document: its start, further on, and from a quarter of the limit."""
    edges = (1, setting.tokens // 32, setting.tokens // 4, setting.tokens)
    return {
        f"{start} to {end - 1}": float(
            losses.values[(losses.positions >= start) & (losses.positions < end)].mean()
        )
        for start, end in itertools.pairwise(edges)
    }


def train(
    trainer: Trainer,
    arm: str,
    seed: int,
    documents: list[np.ndarray],
    held_out: list[np.ndarray],
    report: Callable[[dict[str, Any]], None],
) -> tuple[dict[str, Any], Params]:
    """One run.

    Args:
        trainer: The compiled steps.
        arm: Of `ARMS`.
        seed: Of the initial parameters and of the order of documents.
        documents: To train on.
        held_out: To evaluate on.
        report: Called with each evaluation.

    Returns:
        The evaluations, and the final parameters.
    """
    state, seen, curve = trainer.start(seed), 0, []
    marks = np.linspace(0, trainer.budget, trainer.setting.evaluations + 1)
    losses = None
    for batch in ARMS[arm](endless(documents, seed), trainer.setting):
        if seen >= marks[len(curve)]:
            losses = evaluate(trainer, state.params, held_out)
            while len(curve) < len(marks) and seen >= marks[len(curve)]:  # a large batch may pass several
                curve.append((seen, float(losses.values.mean())))
            report({"arm": arm, "seed": seed, "tokens": seen, "held_out_loss": curve[-1][1]})
        if seen >= trainer.budget:
            break
        state = trainer.step(state, batch, seen)
        seen += real_tokens(batch)
    assert losses is not None
    result = {"arm": arm, "seed": seed, "curve": curve, "by_position": by_position(losses, trainer.setting)}
    return result, state.params


def cost(trainer: Trainer, documents: list[np.ndarray]) -> list[dict[str, Any]]:
    """Padding, memory and time of an optimiser step, by layout; timed in turns."""
    setting, state, calls, rows = trainer.setting, trainer.start(0), {}, []
    for name, layout in LAYOUTS.items():
        epoch = [(real_tokens(batch), padded_tokens(batch)) for batch in layout(documents, setting)]
        real, computed = map(sum, zip(*epoch, strict=True))
        batches = list(itertools.islice(layout(endless(documents, 0), setting), setting.timed))
        programs = {id(p): p for p in (trainer.program(state, batch) for batch in batches)}
        memory = [program.memory_analysis() for program in programs.values()]
        calls[name] = functools.partial(_run, trainer, state, batches)
        rows.append(
            {
                "layout": name,
                "padding": 1 - real / computed,
                "real_tokens_per_batch": real / len(epoch),
                "programs": len(programs),
                "temporary_bytes": max(m.temp_size_in_bytes for m in memory if m is not None),
                "argument_bytes": max(m.argument_size_in_bytes for m in memory if m is not None),
                "timed_tokens": sum(map(real_tokens, batches)),
            }
        )
    timings = measure(calls, inputs=1, repeats=1, rounds=setting.rounds)
    for row in rows:
        row["us_per_token"] = [us / row["timed_tokens"] for us in timings[row["layout"]].rounds_us]
    for row in rows:
        turns = zip(row["us_per_token"], rows[0]["us_per_token"], strict=True)
        row["time_of_packed"] = statistics.median(us / of_packed for us, of_packed in turns)
    return rows


def _run(trainer: Trainer, state: State, batches: list[Batch], number: int) -> None:
    """Steps over some batches, from a copy of the state."""
    state = jax.tree.map(jnp.copy, state)
    for batch in batches:
        state = trainer.step(state, batch, number)
    jax.block_until_ready(state)


def compare_gradients(setting: Setting, params: Params, documents: Documents) -> dict[str, float]:
    """How far gradients of the same documents are from those of the packed batch.

    Args:
        setting: Its bucket holds all of the documents.
        params: Where to differentiate.
        documents: A batch.

    Returns:
        For the documents padded, and for them truncated, that is, one after the other in one row: the largest
        difference of an entry, over the largest entry of the same parameter; of all parameters the largest.
    """
    documents = list(documents)
    gradient = jax.jit(jax.grad(batch_loss), static_argnums=2)
    rows = Setting(rows=len(documents), row_lens=(max(map(len, documents)),))
    batches = {
        "packed": nest_sequences(documents, bucket=setting.bucket),
        "padded": next(padded(documents, rows)),
        "truncated": nest_sequences([np.concatenate(documents)], bucket=setting.bucket),
    }
    expected, *others = (gradient(params, batch, setting.model) for batch in batches.values())

    def distance(got: Any) -> float:
        errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), got, expected)
        return float(max(jax.tree.leaves(errors)))

    return dict(zip(("padded", "truncated"), map(distance, others), strict=True))


def run(
    setting: Setting,
    *,
    log: Path | None = None,
    checkpoint: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train all arms, measure their cost, and compare their gradients.

    Args:
        setting: What is trained.
        log: A file for a JSON line per evaluation, the first of them the provenance.
        checkpoint: A folder for the decoder of the packed arm's first run.
        console: Shows the progress.
    """
    everything = standard_library_functions(range(setting.min_len, setting.tokens + 1))
    held_out, documents = everything[: setting.held_out], everything[setting.held_out :]
    trainer, origin = Trainer(setting), provenance()
    runs: list[dict[str, Any]] = []
    with Progress(console=console) as progress:
        total = len(ARMS) * setting.seeds * (setting.evaluations + 1)
        task = progress.add_task("training", total=total)

        def report(line: dict[str, Any]) -> None:
            _append(log, line)
            progress.update(
                task,
                advance=1,
                description=f"{line['arm']}, seed {line['seed']}: {line['held_out_loss']:.3f}",
            )

        _append(log, origin)
        for seed, arm in itertools.product(range(setting.seeds), ARMS):
            result, params = train(trainer, arm, seed, documents, held_out, report)
            runs.append(result)
            if checkpoint is not None and (arm, seed) == ("packed", 0):
                save_params(checkpoint, params, setting.model)
    pack = next(pack_best_fit(endless(documents, 0), setting.bucket))
    return {
        "provenance": origin,
        "setting": asdict(setting),
        "documents": {
            "trained": len(documents),
            "tokens": sum(map(len, documents)),
            "held_out": len(held_out),
        },
        "runs": runs,
        "cost": cost(trainer, documents),
        "gradients": {
            "documents": [len(document) for document in pack],
            "relative_to_packed": compare_gradients(setting, trainer.start(0).params, pack),
        },
    }


def _append(log: Path | None, line: dict[str, Any]) -> None:
    if log is not None:
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def final_losses(result: dict[str, Any], arm: str) -> np.ndarray:
    """The last held-out loss of an arm's runs, by seed."""
    return np.array([run["curve"][-1][1] for run in result["runs"] if run["arm"] == arm])


def show(console: Console, result: dict[str, Any]) -> None:
    """Print the tables."""
    regions = list(result["runs"][0]["by_position"])
    table = Table("arm", "held-out loss: mean (least to most)", "minus packed, by seed", *regions)
    for arm in ARMS:
        losses = final_losses(result, arm)
        differences = ", ".join(f"{d:+.3f}" for d in losses - final_losses(result, "packed"))
        means = [
            np.mean([run["by_position"][region] for run in result["runs"] if run["arm"] == arm])
            for region in regions
        ]
        table.add_row(
            arm,
            f"{losses.mean():.3f} ({losses.min():.3f} to {losses.max():.3f})",
            differences,
            *(f"{loss:.3f}" for loss in means),
        )
    console.print(table)
    table = Table("layout", "padding", "tokens a batch", "programs", "temporary, MiB", "time ÷ packed")
    for row in result["cost"]:
        table.add_row(
            row["layout"],
            f"{row['padding']:.1%}",
            f"{row['real_tokens_per_batch']:.0f}",
            f"{row['programs']}",
            f"{row['temporary_bytes'] / 2**20:.1f}",
            f"{row['time_of_packed']:.2f}",
        )
    console.print(table)
    console.print(f"gradients, relative to packed: {result['gradients']['relative_to_packed']}")


COLORS = {
    "packed": "#0072B2",
    "padded": "#E69F00",
    "truncated": "#009E73",
    "grouped": "#CC79A7",
    "truncated, dense": "#56B4E9",
}


def plot(result: dict[str, Any]) -> Figure:
    """Loss against real tokens, and the cost of a step, on a white ground."""
    figure = Figure(figsize=(13, 4.4), layout="constrained", facecolor="white")
    loss, speed, memory = figure.subplots(1, 3, width_ratios=(5, 4, 4))
    for arm in ARMS:
        curves = np.array([run["curve"] for run in result["runs"] if run["arm"] == arm])
        tokens, losses = curves[:, :, 0].mean(axis=0) / 1e3, curves[:, :, 1]
        loss.plot(tokens, losses.mean(axis=0), color=COLORS[arm], marker="o", markersize=4, label=arm)
        loss.fill_between(tokens, losses.min(axis=0), losses.max(axis=0), color=COLORS[arm], alpha=0.25)
    loss.set(xlabel="thousands of real tokens seen", ylabel="nats per byte")
    loss.set_title(f"loss on held-out documents: mean and\nrange of {result['setting']['seeds']} seeds")
    of_trained = np.array([point[1] for run in result["runs"] for point in run["curve"][2:]])
    loss.set_ylim(of_trained.min() - 0.05, of_trained.max() + 0.15)
    loss.legend(frameon=False)
    loss.grid(alpha=0.3)
    rates = {row["layout"]: 1 / row["time_of_packed"] for row in result["cost"]}
    _bars(speed, rates, "real tokens per second,\npacked = 1", "{:.2f}")
    megabytes = {row["layout"]: row["temporary_bytes"] / 2**20 for row in result["cost"]}
    _bars(memory, megabytes, "temporary memory of the largest\nprogram, MiB", "{:.0f}")
    return figure


def _bars(axes: Axes, values: dict[str, float], title: str, form: str) -> None:
    bars = axes.barh(list(values), list(values.values()), color=[COLORS[name] for name in values])
    axes.bar_label(bars, labels=[form.format(value) for value in values.values()], padding=3)
    axes.set_xlim(0, 1.18 * max(values.values()))
    axes.invert_yaxis()
    axes.set_title(title)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=Setting().steps)
    parser.add_argument("--seeds", type=int, default=Setting().seeds)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result and the picture")
    parser.add_argument("--checkpoint", type=Path, help="folder for the packed arm's decoder")
    parser.add_argument("--log", type=Path, help="file for a JSON line per evaluation")
    options = parser.parse_args()
    console = Console(width=120)
    setting = Setting(steps=options.steps, seeds=options.seeds)
    result = run(setting, log=options.log, checkpoint=options.checkpoint, console=console)
    show(console, result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "packed_training.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result).savefig(options.out / "packed_training.png", dpi=110)


if __name__ == "__main__":
    main()
