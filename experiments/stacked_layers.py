"""What do stacked layers save when programs are compiled, and what do they cost when these run?

    python experiments/stacked_layers.py

Decoders of 4 and 12 layers (width 768, float32, 8 prompts of 16 to 128 tokens, 32 new tokens), once with
layers apart and once stacked. Each is lowered and compiled for prefill and decode three times anew. Then the
two run in turns, from the same weights, and must write the same tokens.

Writes `experiments/results/stacked_layers.json` with provenance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table
from side_by_side import measure, provenance

from jaxattn import DecoderConfig, generate, plan_generation
from jaxattn.models import Model, init_params, stack_layers

RESULTS = Path(__file__).parent / "results" / "stacked_layers.json"
NUM_LAYERS = (4, 12)
PROMPT_LENS = (16, 128, 33, 70, 20, 100, 64, 48)
NEW_TOKENS = 32
COMPILED = 3
CONFIG = DecoderConfig(
    vocab_size=8192,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=1,
    num_q_heads=12,
    num_kv_heads=4,
    head_dim=64,
)


def seconds_to_compile(model: Model) -> float:
    """Of prefill and decode, from nothing."""
    jax.clear_caches()
    fresh = dataclasses.replace(model.programs, compiled={})
    started = time.perf_counter()
    plan_generation(PROMPT_LENS, NEW_TOKENS)(fresh)
    return time.perf_counter() - started


def examine(num_layers: int) -> dict[str, Any]:
    """Both kinds of one decoder."""
    one_for_all = {"sliding_windows": CONFIG.sliding_windows[:1], "ropes": CONFIG.ropes[:1]}
    config = dataclasses.replace(CONFIG, num_layers=num_layers, **one_for_all)
    params = init_params(jax.random.key(0), config)
    models = {
        "apart": Model.from_params(config, params),
        "stacked": Model.from_params(config, stack_layers(params)),
    }
    compiling = {name: [seconds_to_compile(model) for _ in range(COMPILED)] for name, model in models.items()}
    prompts = [[(7 * i + n) % config.vocab_size for i in range(n)] for n in PROMPT_LENS]
    tokens = [generate(model, prompts, NEW_TOKENS) for model in models.values()]
    assert tokens[0] == tokens[1]
    calls = {
        name: lambda _, model=model: generate(model, prompts, NEW_TOKENS) for name, model in models.items()
    }
    timings = measure(calls, inputs=1, repeats=3, rounds=5)
    return {
        "num_layers": num_layers,
        "seconds_to_compile": compiling,
        "microseconds_to_generate": {name: timing._asdict() for name, timing in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = [examine(num_layers) for num_layers in track(NUM_LAYERS, "decoders")]
    table = Table("layers", "compile, apart (s)", "stacked (s)", "generate, apart (s)", "stacked ÷ apart")
    for row in rows:
        compiling = {name: statistics.median(values) for name, values in row["seconds_to_compile"].items()}
        running = row["microseconds_to_generate"]
        apart, stacked = (running[name]["rounds_us"] for name in ("apart", "stacked"))
        ratios = [b / a for a, b in zip(apart, stacked, strict=True)]
        table.add_row(
            str(row["num_layers"]),
            f"{compiling['apart']:.1f}",
            f"{compiling['stacked']:.1f}",
            f"{running['apart']['median_us'] / 1e6:.2f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )
    Console(width=110).print(table)
    arguments.out.write_text(json.dumps({"provenance": provenance(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
