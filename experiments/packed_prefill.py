"""What does packing save when prompts of different lengths run through a whole decoder?

The same prompts, through the same small decoder, which returns the logits of every token; no cache. Three
ways:

- `packed`, the baseline: one ragged batch in the smallest bucket of the default grid (`steps.score`).
- `padded, ragged call`: each prompt padded to the longest, and the padded ones run through the same program.
  What it costs more is the padding alone.
- `padded, dense`: the same rows with `jax.nn`'s attention, as one would write it without this library. What
  it costs more than the one before is how attention is computed: dense, every score kept, masked ones too.

The prompts of a batch have lengths of one of three laws: even, log-normal, and one long prompt beside many
that are a sixteenth as long. What is compared: that the logits of all real tokens are the same; the share of
computed tokens that are padding; temporary memory of the program, by XLA's analysis; and time,
elapsed and of the processor, in turns.

Not compared: attention alone (`cpu_attention.py`); decoding; attention kernels of other devices.

    python experiments/packed_prefill.py
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import COLORS, MARKERS
from rich.progress import track
from side_by_side import measure, milliseconds, rounds_of, times_as_long

from jaxattn import Bucket, DecoderConfig, RaggedBatch, nest_sequences
from jaxattn.cli.demo import dense_logits
from jaxattn.models import Model, init_params
from jaxattn.models.params import Params
from jaxattn.models.steps import score

BASELINE = "packed"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The decoder and the prompts."""

    hidden_size: int = 128
    """Width of the decoder; its MLP is four times as wide."""
    num_layers: int = 2
    """Layers."""
    prompts: int = 16
    """Prompts of a batch."""
    longest: tuple[int, ...] = (128, 512)
    """Tokens of the longest prompt."""
    rounds: int = 5
    """Rounds of timing."""


def prompt_lens(law: str, longest: int, n: int) -> np.ndarray:
    """Lengths of n prompts, the longest of which has as many tokens as given.

    Args:
        law: "even", "log-normal" or "one long".
        longest: Tokens.
        n: Prompts.
    """
    rng = np.random.default_rng(0)
    if law == "even":
        lens = rng.integers(1, longest + 1, n)
    elif law == "log-normal":
        lens = np.clip(rng.lognormal(np.log(longest / 8), 1.0, n).astype(int), 1, longest)
    else:
        lens = np.full(n, max(longest // 16, 1))
    lens[0] = longest
    return lens


LAWS = ("even", "log-normal", "one long")


def decoder_of(config: Config) -> DecoderConfig:
    """A decoder with heads of 32, two query heads to a key head."""
    return DecoderConfig(
        vocab_size=256,
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_layers=config.num_layers,
        num_q_heads=config.hidden_size // 32,
        num_kv_heads=config.hidden_size // 64,
        head_dim=32,
    )


@dataclass(frozen=True)
class Way:
    """A compiled program and what it is called with.

    Attributes:
        program: Returns logits.
        args: Its arguments.
        computed: Tokens that it computes, padding included.
        place: Where among its logits, taken as one list, the real tokens stand.
    """

    program: jax.stages.Compiled
    args: tuple[Any, ...]
    computed: int
    place: np.ndarray

    def call(self, _: int = 0) -> jax.Array:
        """Run, and wait."""
        return jax.block_until_ready(self.program(*self.args))

    def logits(self) -> np.ndarray:
        """Of all real tokens, prompt after prompt."""
        logits = np.asarray(self.call())
        return logits.reshape(-1, logits.shape[-1])[self.place]

    @property
    def temporary_bytes(self) -> int:
        """Memory that the program takes beside its arguments and results, by XLA's analysis."""
        analysis = self.program.memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes


@dataclass(frozen=True)
class Compiler:
    """Compiles both functions, once per shape of their batch.

    Attributes:
        decoder: The decoder.
        params: Its parameters.
        programs: What has been compiled.
    """

    decoder: DecoderConfig
    params: Params
    programs: dict[Hashable, jax.stages.Compiled] = field(default_factory=dict)

    def way(self, function: Callable, batch: Any, *, computed: int, place: np.ndarray) -> Way:
        """A function of parameters and a batch, as a candidate."""
        leaves, tree = jax.tree.flatten(batch)
        key = (function.__name__, tree, tuple(leaf.shape for leaf in leaves))
        if key not in self.programs:
            self.programs[key] = jax.jit(function).lower(self.params, batch).compile()
        return Way(self.programs[key], (self.params, batch), computed, place)

    def ragged(self, params: Params, batch: RaggedBatch) -> jax.Array:
        """Logits of a ragged batch."""
        return score(params, batch, config=self.decoder, implementation="xla")

    def dense(self, params: Params, rows: jax.Array) -> jax.Array:
        """Logits of padded rows."""
        return jax.vmap(functools.partial(dense_logits, Model.from_params(self.decoder, params)))(rows)


def ways(compiler: Compiler, lens: np.ndarray) -> dict[str, Way]:
    """The candidates, on the same random tokens."""
    n, longest = lens.size, int(lens.max())
    tokens = np.random.default_rng(1).integers(0, compiler.decoder.vocab_size, lens.sum())
    is_real = np.arange(longest)[None, :] < lens[:, None]
    padded = np.zeros((n, longest), np.int32)
    padded[is_real] = tokens
    packed = nest_sequences(tokens, q_lens=lens)
    rows = nest_sequences(padded, bucket=Bucket(padded.size, n))
    in_rows: Any = {"computed": padded.size, "place": np.flatnonzero(is_real)}
    return {
        BASELINE: compiler.way(
            compiler.ragged, packed, computed=packed.bucket.tokens, place=np.arange(tokens.size)
        ),
        "padded, ragged call": compiler.way(compiler.ragged, rows, **in_rows),
        "padded, dense": compiler.way(compiler.dense, jnp.asarray(padded), **in_rows),
    }


def rows(config: Config) -> Iterator[Row]:
    """A row per law and length."""
    decoder = decoder_of(config)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0, impl="rbg"), decoder)
    compiler = Compiler(decoder, params)
    cases = list(itertools.product(LAWS, config.longest))
    for law, longest in track(cases, description="prompts"):
        lens = prompt_lens(law, longest, config.prompts)
        found = ways(compiler, lens)
        expected = found[BASELINE].logits()
        for name, way in found.items():
            np.testing.assert_allclose(way.logits(), expected, atol=1e-4, err_msg=name)
        timings = measure(
            {name: way.call for name, way in found.items()}, inputs=1, repeats=5, rounds=config.rounds
        )
        yield {
            "law": law,
            "longest": longest,
            "tokens": int(lens.sum()),
            "padding": {name: 1 - int(lens.sum()) / way.computed for name, way in found.items()},
            "temporary_bytes": {name: way.temporary_bytes for name, way in found.items()},
            **rounds_of(timings),
        }


def tables(rows: list[Row]) -> dict[str, Table]:
    """Waste and memory; time."""
    names = list(rows[0]["elapsed_us"])
    others = [name for name in names if name != BASELINE]

    def of(row: Row) -> list[str]:
        return [row["law"], f"{row['longest']}", f"{row['tokens']:,}"]

    first = ["lengths", "longest", "tokens"]
    return {
        "waste": Table(
            [*first, "padding, packed", "padding, padded", *(f"{name}, MiB" for name in names)],
            [
                [
                    *of(row),
                    *(f"{row['padding'][name]:.1%}" for name in (BASELINE, others[0])),
                    *(f"{row['temporary_bytes'][name] / 2**20:.1f}" for name in names),
                ]
                for row in rows
            ],
        ),
        "time": Table(
            [
                *first[:2],
                "way",
                "tokens ÷ packed",
                "processor ms",
                "processor time ÷ packed",
                "elapsed ÷ packed",
            ],
            [
                [
                    *of(row)[:2],
                    name,
                    f"{(1 - row['padding'][BASELINE]) / (1 - row['padding'][name]):.1f}",
                    f"{milliseconds(row['processor_us'], name):.1f}",
                    *(
                        "1" if name == BASELINE else times_as_long(row[of_kind], name, BASELINE).text(".1f")
                        for of_kind in ("processor_us", "elapsed_us")
                    ),
                ]
                for row in rows
                for name in names
            ],
        ),
    }


def plot(rows: list[Row]) -> Figure:
    """Padding, memory and time, by law and length."""
    figure = Figure(figsize=(13, 4.8), layout="constrained", facecolor="white")
    padding, memory, time = figure.subplots(1, 3, sharey=True)
    names = list(rows[0]["elapsed_us"])
    cases = [f"{row['law']},\n{row['longest']}" for row in rows]
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        places = np.arange(len(rows)) + (number - (len(names) - 1) / 2) * height
        ratios = [times_as_long(row["processor_us"], name, BASELINE) for row in rows]
        style: Any = {"color": COLORS[number], "label": name}
        points: Any = style | {"marker": MARKERS[number], "linestyle": "none"}
        padding.barh(places, [100 * row["padding"][name] for row in rows], height=height, **style)
        memory.plot([row["temporary_bytes"][name] / 2**20 for row in rows], places, **points)
        spread = [[r.median - r.least for r in ratios], [r.most - r.median for r in ratios]]
        time.errorbar([r.median for r in ratios], places, xerr=spread, capsize=3, **points)
    padding.set_yticks(np.arange(len(rows)), cases)
    padding.invert_yaxis()
    padding.set(xlabel="padding, % of the computed tokens", ylabel="lengths, and the longest in tokens")
    memory.set(xlabel="temporary memory, MiB", xscale="log")
    time.set(xlabel="processor time ÷ packed", xscale="log")
    time.axvline(1, color="black", linewidth=0.8)
    padding.set_title("What does packing save in a whole decoder?\npadding")
    memory.set_title("memory of the program\nby XLA's analysis")
    time.set_title("time, in turns:\nmedian and range of the rounds")
    for axes in (padding, memory, time):
        axes.grid(alpha=0.3, axis="x")
    time.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(names), fontsize=8)
    return figure


EXPERIMENT = Experiment(
    question="What does packing save when prompts of different lengths run through a whole decoder?",
    committed=Config(),
    small=Config(hidden_size=64, num_layers=1, prompts=4, longest=(32,), rounds=2),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
