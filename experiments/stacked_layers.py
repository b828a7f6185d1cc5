"""What do stacked layers save when programs are compiled, and what do they cost when these run?

Decoders of some layers in float32, once with layers apart and once stacked. Each is lowered and compiled for
prefill and decode several times anew. Then the two generate in turns, from the same weights, and must write
the same tokens. How long reading and stacking weights takes is not compared.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import grouped_bars, level, white_figure
from rich.progress import track
from side_by_side import measure, ratios_by_round, with_range

from jaxattn import DecoderConfig, generate
from jaxattn.models import Model, init_params, stack_layers
from jaxattn.serving import plan_generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which decoders, what they write, and how often."""

    num_layers: tuple[int, ...] = (4, 12)
    """Layers of each decoder."""
    hidden_size: int = 768
    """Width; a head has 64, and three query heads share a key head."""
    vocab_size: int = 8192
    """Token ids."""
    prompt_lens: tuple[int, ...] = (16, 128, 33, 70, 20, 100, 64, 48)
    """Tokens of each prompt."""
    new_tokens: int = 32
    """Tokens written for each."""
    compiled: int = 3
    """Times that each decoder is compiled."""
    rounds: int = 5
    """Rounds of generating."""

    def decoder(self, num_layers: int) -> DecoderConfig:
        """A decoder of so many layers."""
        heads = self.hidden_size // 64
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size * 8 // 3,
            num_layers=num_layers,
            num_q_heads=heads,
            num_kv_heads=heads // 3,
            head_dim=64,
        )


def seconds_to_compile(model: Model, config: Config) -> float:
    """Of prefill and decode, from nothing."""
    jax.clear_caches()
    fresh = dataclasses.replace(model.compiled, programs={})
    started = time.perf_counter()
    plan_generation(config.prompt_lens, config.new_tokens)(fresh)
    return time.perf_counter() - started


def examine(num_layers: int, config: Config) -> Row:
    """Both kinds of one decoder.

    Raises:
        RuntimeError: If they write different tokens.
    """
    decoder = config.decoder(num_layers)
    params = init_params(jax.random.key(0), decoder)
    models = {
        "apart": Model.from_params(decoder, params),
        "stacked": Model.from_params(decoder, stack_layers(params)),
    }
    compiling = {
        name: [seconds_to_compile(model, config) for _ in range(config.compiled)]
        for name, model in models.items()
    }
    prompts = [[(7 * i + n) % decoder.vocab_size for i in range(n)] for n in config.prompt_lens]
    tokens = [generate(model, prompts, config.new_tokens) for model in models.values()]
    if tokens[0] != tokens[1]:
        raise RuntimeError(f"with {num_layers} layers, stacked ones write other tokens than those apart")
    calls = {
        name: lambda _, model=model: generate(model, prompts, config.new_tokens)
        for name, model in models.items()
    }
    timings = measure(calls, inputs=1, repeats=3, rounds=config.rounds)
    return {
        "num_layers": num_layers,
        "seconds_to_compile": compiling,
        "timings": {name: timing._asdict() for name, timing in timings.items()},
    }


def rows(config: Config) -> Iterator[Row]:
    """A row per decoder."""
    for num_layers in track(config.num_layers, "decoders"):
        yield examine(num_layers, config)


def tables(rows: list[Row]) -> dict[str, Table]:
    """A line per decoder."""
    header = (
        "layers",
        "compile, apart",
        "compile, stacked",
        "generate, apart",
        "generate, stacked ÷ apart (range)",
    )
    lines = []
    for row in rows:
        compiling = (statistics.median(row["seconds_to_compile"][name]) for name in ("apart", "stacked"))
        seconds = (*compiling, row["timings"]["apart"]["median_us"] / 1e6)
        ratio = with_range(ratios_by_round(row["timings"], "stacked", "apart"))
        lines.append([str(row["num_layers"]), *(f"{s:.1f} s" for s in seconds), ratio])
    return {"cost": Table(header, lines)}


def plot(rows: list[Row]) -> Figure:
    """Seconds to compile, and time of generating."""
    figure = white_figure("What do stacked layers save when compiled, and cost when they run?", 9, 3.8)
    compiling, running = figure.subplots(1, 2)
    cases = [str(row["num_layers"]) for row in rows]
    seconds = {
        name: [statistics.median(row["seconds_to_compile"][name]) for row in rows]
        for name in ("apart", "stacked")
    }
    grouped_bars(compiling, cases, seconds, form="{:.1f}")
    compiling.set(xlabel="layers", ylabel="seconds to lower and compile")
    compiling.legend(frameon=False)
    for i, row in enumerate(rows):
        ratios = ratios_by_round(row["timings"], "stacked", "apart")
        running.plot([i] * len(ratios), ratios, "o", color="#E69F00", alpha=0.6)
        running.plot([i - 0.15, i + 0.15], [statistics.median(ratios)] * 2, color="black")
    running.set_xticks(range(len(rows)), cases)
    running.set_xlim(-0.5, len(rows) - 0.5)
    running.set(xlabel="layers", ylabel="time of generating, stacked ÷ apart")
    level(running)
    return figure


EXPERIMENT = Experiment(
    question="What do stacked layers save when programs compile, and what do they cost when these run?",
    committed=Config(),
    small=Config(
        num_layers=(1,), hidden_size=192, vocab_size=64, prompt_lens=(9,), new_tokens=2, compiled=1, rounds=2
    ),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
