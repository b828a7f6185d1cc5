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

`--checkpoint FOLDER` saves the packed arm's decoder for `load_model`.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, Row, Table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import COLORS, white_figure
from rich.progress import Progress
from side_by_side import measure, with_range

from jaxattn import Bucket, DecoderConfig, RaggedBatch, nest_batches, nest_sequences, pack_best_fit
from jaxattn.checkpoints import save_params
from jaxattn.cli.demo import dense_logits, next_token_loss, standard_library_functions
from jaxattn.models import Model, init_params
from jaxattn.models.params import Params


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What is trained, on what, and for how long."""

    hidden_size: int = 64
    """Width of the decoder."""
    intermediate_size: int = 256
    """Width of its MLPs."""
    num_q_heads: int = 2
    """Its query heads; there is one key head."""
    head_dim: int = 32
    """Their size."""
    windows: tuple[int | None, ...] = (None, 128)
    """Keys that each layer sees, None for all; a layer per entry."""
    min_len: int = 16
    """Bytes of the shortest document."""
    tokens: int = 1024
    """Tokens of a packed batch and of a truncated row, and bytes of the longest document."""
    seqs: int = 32
    """Documents of a packed batch, at most."""
    rows: int = 4
    """Documents of a padded batch."""
    row_lens: tuple[int, ...] = (128, 256, 384, 512, 768, 1024)
    """Lengths that padded rows may have, ascending; the last is `tokens`."""
    held_out: int = 64
    """Documents for evaluation."""
    steps: int = 300
    """Every run sees this many times `tokens` real tokens."""
    seeds: int = 3
    """Runs of each arm; a seed gives the initial parameters and the order of documents."""
    evaluations: int = 8
    """Evaluations of a run, evenly spaced."""
    learning_rate: float = 3e-3
    """Its peak, after a tenth of the tokens."""
    timed: int = 16
    """Batches of each kind that are timed, one after the other."""
    rounds: int = 5
    """Rounds of timing."""
    checkpoint: str | None = None
    """Folder for the decoder of the packed arm's first run; None to keep none."""

    @property
    def model(self) -> DecoderConfig:
        """The decoder."""
        return DecoderConfig(
            vocab_size=256,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=len(self.windows),
            num_q_heads=self.num_q_heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            sliding_windows=self.windows,
        )

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


def packed(documents: Documents, config: Config) -> Iterator[Batch]:
    """Whole documents, as many as fit."""
    return nest_batches(pack_best_fit(documents, config.bucket), config.bucket)


def padded(documents: Documents, config: Config) -> Iterator[Batch]:
    """A document per row, padded to the longest of the batch, rounded up to one of a few lengths."""
    for group in itertools.batched(documents, config.rows):
        lens = np.array([document.size for document in group], np.int32)
        width = min(length for length in config.row_lens if length >= lens.max())
        token_ids = np.stack([np.pad(document, (0, width - document.size)) for document in group])
        yield Rows(token_ids.astype(np.int32), lens)


def grouped(documents: Documents, config: Config, window: int = 64) -> Iterator[Batch]:
    """Padded batches of like lengths: of every 64 documents, ordered by length."""
    for group in itertools.batched(documents, window):
        yield from padded(sorted(group, key=len), config)


def cut(documents: Documents, config: Config) -> Iterator[np.ndarray]:
    """All documents one after the other, cut into rows."""
    for row in itertools.batched(itertools.chain.from_iterable(documents), config.tokens):
        yield np.array(row, np.int32)


def truncated(documents: Documents, config: Config) -> Iterator[Batch]:
    """A row per batch, nested as one sequence."""
    return (nest_sequences([row], bucket=config.bucket) for row in cut(documents, config))


def truncated_dense(documents: Documents, config: Config) -> Iterator[Batch]:
    """A row per batch."""
    return (Rows(row[None], np.array([row.size], np.int32)) for row in cut(documents, config))


ARMS: dict[str, Callable[[Documents, Config], Iterator[Batch]]] = {
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


def row_losses(params: Params, rows: Rows, decoder: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """`[B, L-1]` -log p of each token but a row's first, and which of them are real."""
    model, ids = Model.from_params(decoder, params), jnp.asarray(rows.token_ids)
    logits = jax.vmap(lambda row: dense_logits(model, row))(ids)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return losses, jnp.arange(1, ids.shape[1])[None, :] < rows.lens[:, None]


def batch_loss(params: Params, batch: Batch, decoder: DecoderConfig) -> jax.Array:
    """Mean cross-entropy of each token's successor in its sequence, in nats."""
    if isinstance(batch, RaggedBatch):
        return next_token_loss(params, batch, decoder)
    losses, is_real = row_losses(params, batch, decoder)
    return losses.mean(where=is_real)


class State(NamedTuple):
    """Parameters, and the moments of the optimiser."""

    params: Params
    moments: Any


@dataclass(slots=True)
class Trainer:
    """Optimiser steps and evaluations, compiled once per shape of a batch, for all arms and seeds."""

    config: Config
    compiled: dict[Hashable, jax.stages.Compiled] = field(default_factory=dict)

    @property
    def budget(self) -> int:
        """Real tokens of a run."""
        return self.config.steps * self.config.tokens

    def start(self, seed: int) -> State:
        """The state before the first step."""
        params = init_params(jax.random.key(seed), self.config.model)
        return State(params, self._optimizer().init(params))

    def step(self, state: State, batch: Batch, tokens_seen: int) -> State:
        """The state after one more batch; the old one is used up."""
        return self.program(state, batch)(state, batch, jnp.int32(tokens_seen))

    def program(self, state: State, batch: Batch) -> jax.stages.Compiled:
        """The compiled step for batches of this shape."""
        return self._compiled(self._step, (state, batch, jnp.int32(0)), donate_argnums=0)

    def losses(self, params: Params, rows: Rows) -> tuple[jax.Array, jax.Array]:
        """`row_losses`, compiled."""
        function = functools.partial(row_losses, decoder=self.config.model)
        return self._compiled(function, (params, rows))(params, rows)

    def _optimizer(self) -> optax.GradientTransformation:
        # The learning rate is a factor on the update: it follows the tokens seen, not the steps.
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, b2=0.99))

    def _step(self, state: State, batch: Batch, tokens_seen: jax.Array) -> State:
        gradients = jax.grad(batch_loss)(state.params, batch, self.config.model)
        updates, moments = self._optimizer().update(gradients, state.moments, state.params)
        peak = self.config.learning_rate
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
    for rows in padded(sorted(held_out, key=len), trainer.config):
        assert isinstance(rows, Rows)
        losses, is_real = map(np.asarray, trainer.losses(params, rows))
        values.append(losses[is_real])
        positions.append(1 + np.nonzero(is_real)[1])
    return Losses(np.concatenate(values), np.concatenate(positions))


def by_position(losses: Losses, config: Config) -> dict[str, float]:
    """Mean loss by place in the document: its start, further on, and from a quarter of the limit."""
    edges = (1, config.tokens // 32, config.tokens // 4, config.tokens)
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
    report: Callable[[float], None],
) -> tuple[Row, Params]:
    """One run.

    Args:
        trainer: The compiled steps.
        arm: Of `ARMS`.
        seed: Of the initial parameters and of the order of documents.
        documents: To train on.
        held_out: To evaluate on.
        report: Called with the loss of each evaluation.

    Returns:
        The evaluations, and the final parameters.
    """
    state, seen, curve = trainer.start(seed), 0, []
    marks = np.linspace(0, trainer.budget, trainer.config.evaluations + 1)
    losses = None
    for batch in ARMS[arm](endless(documents, seed), trainer.config):
        if seen >= marks[len(curve)]:
            losses = evaluate(trainer, state.params, held_out)
            while len(curve) < len(marks) and seen >= marks[len(curve)]:  # a large batch may pass several
                curve.append((seen, float(losses.values.mean())))
            report(curve[-1][1])
        if seen >= trainer.budget:
            break
        state = trainer.step(state, batch, seen)
        seen += real_tokens(batch)
    assert losses is not None
    row = {
        "kind": "run",
        "arm": arm,
        "seed": seed,
        "curve": curve,
        "by_position": by_position(losses, trainer.config),
    }
    return row, state.params


def cost(trainer: Trainer, documents: list[np.ndarray]) -> list[Row]:
    """Padding, memory and time of an optimiser step, by layout; timed in turns."""
    config, state, calls, rows = trainer.config, trainer.start(0), {}, []
    for name, layout in LAYOUTS.items():
        epoch = [(real_tokens(batch), padded_tokens(batch)) for batch in layout(documents, config)]
        real, computed = map(sum, zip(*epoch, strict=True))
        batches = list(itertools.islice(layout(endless(documents, 0), config), config.timed))
        programs = {id(p): p for p in (trainer.program(state, batch) for batch in batches)}
        memory = [program.memory_analysis() for program in programs.values()]
        calls[name] = functools.partial(_run, trainer, state, batches)
        rows.append(
            {
                "kind": "cost",
                "layout": name,
                "padding": 1 - real / computed,
                "real_tokens_per_batch": real / len(epoch),
                "programs": len(programs),
                "temporary_bytes": max(m.temp_size_in_bytes for m in memory if m is not None),
                "argument_bytes": max(m.argument_size_in_bytes for m in memory if m is not None),
                "timed_tokens": sum(map(real_tokens, batches)),
            }
        )
    timings = measure(calls, inputs=1, repeats=1, rounds=config.rounds)
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


def compare_gradients(config: Config, params: Params, documents: Documents) -> dict[str, float]:
    """How far gradients of the same documents are from those of the packed batch.

    Args:
        config: Its bucket holds all of the documents.
        params: Where to differentiate.
        documents: A batch.

    Returns:
        For the documents padded, and for them truncated, that is, one after the other in one row: the largest
        difference of an entry, over the largest entry of the same parameter; of all parameters the largest.
    """
    documents = list(documents)
    gradient = jax.jit(jax.grad(batch_loss), static_argnums=2)
    rows = Config(rows=len(documents), row_lens=(max(map(len, documents)),))
    batches = {
        "packed": nest_sequences(documents, bucket=config.bucket),
        "padded": next(padded(documents, rows)),
        "truncated": nest_sequences([np.concatenate(documents)], bucket=config.bucket),
    }
    expected, *others = (gradient(params, batch, config.model) for batch in batches.values())

    def distance(got: Any) -> float:
        errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), got, expected)
        return float(max(jax.tree.leaves(errors)))

    return dict(zip(("padded", "truncated"), map(distance, others), strict=True))


def rows(config: Config) -> Iterator[Row]:
    """A row per run, then one per layout, then one of gradients."""
    everything = standard_library_functions(range(config.min_len, config.tokens + 1))
    held_out, documents = everything[: config.held_out], everything[config.held_out :]
    trainer = Trainer(config)
    yield {
        "kind": "documents",
        "trained": len(documents),
        "tokens": sum(map(len, documents)),
        "held_out": len(held_out),
    }
    yield from runs(trainer, documents, held_out)
    yield from cost(trainer, documents)
    pack = next(pack_best_fit(endless(documents, 0), config.bucket))
    yield {
        "kind": "gradients",
        "documents": [len(document) for document in pack],
        "relative_to_packed": compare_gradients(config, trainer.start(0).params, pack),
    }


def runs(trainer: Trainer, documents: list[np.ndarray], held_out: list[np.ndarray]) -> Iterator[Row]:
    """Train every arm with every seed."""
    config = trainer.config
    with Progress() as progress:
        task = progress.add_task("", total=len(ARMS) * config.seeds * (config.evaluations + 1))
        for seed, arm in itertools.product(range(config.seeds), ARMS):

            def report(loss: float, name: str = f"{arm}, seed {seed}") -> None:
                progress.update(task, advance=1, description=f"{name}: {loss:.3f}")

            row, params = train(trainer, arm, seed, documents, held_out, report)
            yield row
            if config.checkpoint is not None and (arm, seed) == ("packed", 0):
                save_params(config.checkpoint, params, config.model)


def _of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def final_losses(rows: list[Row], arm: str) -> np.ndarray:
    """The last held-out loss of an arm's runs, by seed."""
    return np.array([row["curve"][-1][1] for row in _of_kind(rows, "run") if row["arm"] == arm])


def _loss_line(rows: list[Row], arm: str) -> list[str]:
    losses = final_losses(rows, arm)
    differences = [f"{d:+.3f}" for d in losses - final_losses(rows, "packed")]
    of_arm = [row["by_position"] for row in _of_kind(rows, "run") if row["arm"] == arm]
    means = [np.mean([losses[place] for losses in of_arm]) for place in of_arm[0]]
    return [
        arm,
        f"{losses.mean():.3f} ({losses.min():.3f} to {losses.max():.3f})",
        "–" if arm == "packed" else ", ".join(differences),
        *(f"{loss:.3f}" for loss in means),
    ]


def tables(rows: list[Row]) -> dict[str, Table]:
    """Losses by arm, costs by layout, and gradients."""
    costs = _of_kind(rows, "cost")
    lines = []
    for row in costs:
        turns = zip(row["us_per_token"], costs[0]["us_per_token"], strict=True)
        lines.append(
            [
                row["layout"],
                f"{row['padding']:.1%}",
                f"{row['real_tokens_per_batch']:.0f}",
                f"{row['programs']}",
                f"{row['temporary_bytes'] / 2**20:.1f}",
                with_range([us / of_packed for us, of_packed in turns]),
            ]
        )
    (gradients,) = _of_kind(rows, "gradients")
    distances = gradients["relative_to_packed"]
    return {
        "losses": Table(
            ("arm", "held-out loss", "minus packed, by seed", "at its start", "further on", "from a quarter"),
            [_loss_line(rows, arm) for arm in ARMS],
        ),
        "cost": Table(
            ("layout", "padding", "tokens a batch", "programs", "temporary, MiB", "time ÷ packed (range)"),
            lines,
        ),
        "gradients": Table(
            ("the same documents", "largest difference from the packed gradient"),
            [[name, f"{distance:.1e}"] for name, distance in distances.items()],
        ),
    }


LAYOUT_COLORS: dict[str, str] = dict(zip(LAYOUTS, COLORS, strict=False))


def plot(rows: list[Row]) -> Figure:
    """Loss against real tokens, and the cost of a step."""
    figure = white_figure("Does it matter how documents become training batches?", 13, 4.6)
    loss, speed, memory = figure.subplots(1, 3, width_ratios=(5, 4, 4))
    _curves(loss, _of_kind(rows, "run"))
    costs = _of_kind(rows, "cost")
    rates = {row["layout"]: 1 / row["time_of_packed"] for row in costs}
    _bars(speed, rates, "real tokens per second, packed = 1", "{:.2f}")
    megabytes = {row["layout"]: row["temporary_bytes"] / 2**20 for row in costs}
    _bars(memory, megabytes, "temporary memory, largest program, MiB", "{:.0f}")
    return figure


def _curves(axes: Axes, runs: list[Row]) -> None:
    for arm in ARMS:
        curves = np.array([run["curve"] for run in runs if run["arm"] == arm])
        tokens, losses = curves[:, :, 0].mean(axis=0) / 1e3, curves[:, :, 1]
        color = LAYOUT_COLORS[arm]
        axes.plot(tokens, losses.mean(axis=0), color=color, marker="o", markersize=4, label=arm)
        axes.fill_between(tokens, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.25)
    axes.set(xlabel="thousands of real tokens seen", ylabel="held-out loss, nats per byte (range of seeds)")
    of_trained = np.array([point[1] for run in runs for point in run["curve"][2:]])
    axes.set_ylim(of_trained.min() - 0.05, of_trained.max() + 0.15)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)


def _bars(axes: Axes, values: dict[str, float], label: str, form: str) -> None:
    colors = [LAYOUT_COLORS[name] for name in values]
    bars = axes.barh(list(values), list(values.values()), color=colors)
    axes.bar_label(bars, labels=[form.format(value) for value in values.values()], padding=3)
    axes.set_xlim(0, 1.18 * max(values.values()))
    axes.invert_yaxis()
    axes.set(xlabel=label, ylabel="layout")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


EXPERIMENT = Experiment(
    question="Does it matter how documents become training batches: packed, padded, or concatenated and cut?",
    committed=Config(),
    small=Config(
        hidden_size=32,
        intermediate_size=64,
        head_dim=16,
        windows=(24,),
        tokens=128,
        seqs=8,
        rows=1,
        row_lens=(128,),
        held_out=6,
        steps=6,
        seeds=1,
        evaluations=2,
        timed=2,
        rounds=1,
    ),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
