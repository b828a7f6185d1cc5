"""What does it cost to come back to the host between the tokens of a decode?

The same decoder continues the same prompts greedily by the same number of tokens, in four ways, after a
prefill that they share:

- `device loop`, the baseline: `steps.decode` chooses all tokens in one program, as `generate` does; each
  step's batch is made by `advance`.
- `a dispatch per token`: the same program, told to come back after every token, and called again. Nothing is
  read before the end.
- `dispatch and read`: the same, and the new tokens are read each time, as for a stream.
- `nested on the host`: the tokens are read, `nest_sequences` makes the next batch from arrays, and one
  jitted step computes it.

What is compared: that all tokens are the same; dispatches, transfers and reads per step, counted while they
are made; the time of a step, in turns, by the number of prompts, for a decoder that is narrow, in which such
costs stand out, and for a wider one.

Not compared: prompts that end at different times, where a host may put others in their place (that is
`serve`); and devices other than a CPU, where host and device share cores and memory.

    python experiments/decode_loop.py
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import draw
from rich.progress import track
from side_by_side import measure, milliseconds, rounds_of, times_as_long

from jaxattn import Bucket, DecoderConfig, RaggedBatch, Sampling, nest_sequences
from jaxattn.models import init_model_cache, init_params
from jaxattn.models.layer_caches import Cache
from jaxattn.models.options import PromptOptions, RowOptions
from jaxattn.models.params import Params
from jaxattn.models.steps import Decoding, decode, prefill, step

BASELINE = "device loop"
PAGE_SIZE = 16
MAX_PROMPT = 48


@dataclass(frozen=True, kw_only=True)
class Config:
    """The decoders, and what they decode."""

    widths: tuple[int, ...] = (64, 256)
    """Widths of the decoders; their MLPs are four times as wide."""
    num_layers: int = 2
    """Layers of each."""
    prompts: tuple[int, ...] = (1, 8, 64)
    """Prompts of a batch."""
    new_tokens: int = 32
    """Tokens that each prompt is continued by; the first is the prefill's."""
    rounds: int = 5
    """Rounds of timing."""


def decoder_of(width: int, config: Config) -> DecoderConfig:
    """A decoder with heads of 32, two query heads to a key head."""
    return DecoderConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=config.num_layers,
        num_q_heads=width // 32,
        num_kv_heads=width // 64,
        head_dim=32,
    )


@dataclass(slots=True)
class Traffic:
    """Calls programs and reads their results, and counts.

    Attributes:
        dispatches: Programs that were called.
        transfers: Arrays in host memory that they were called with, each of which goes to the device.
        transferred_bytes: Their bytes.
        reads: Arrays that were read on the host.
    """

    dispatches: int = 0
    transfers: int = 0
    transferred_bytes: int = 0
    reads: int = 0

    def run(self, program: Callable, *args: Any) -> Any:
        """Call a program."""
        from_host = [leaf for leaf in jax.tree.leaves(args) if not isinstance(leaf, jax.Array)]
        self.dispatches += 1
        self.transfers += len(from_host)
        self.transferred_bytes += sum(np.asarray(leaf).nbytes for leaf in from_host)
        return program(*args)

    def read(self, array: jax.Array) -> np.ndarray:
        """Read an array; waits for it."""
        self.reads += 1
        return np.asarray(array)


@dataclass(slots=True)
class Decode:
    """Prompts that were prefilled, and everything that continues them.

    A way may run any number of times: it begins with the prefill's state, and overwrites the keys of its own
    tokens alone.

    Attributes:
        params: The decoder's parameters.
        cache: Its cache, which each call gives away and gets back.
        state: After the prefill.
        options: Of each row, on the device.
        prompt_lens: Tokens of each prompt.
        page_tables: Pages of each, a row of as many for all.
        num_steps: Tokens to choose after the first.
        decode: `steps.decode`, jitted.
        take_step: A step that returns the likeliest tokens, jitted.
    """

    params: Params
    cache: Cache
    state: Decoding
    options: Any
    prompt_lens: np.ndarray
    page_tables: np.ndarray
    num_steps: int
    decode: Callable
    take_step: Callable

    def on_device(self, traffic: Traffic) -> np.ndarray:
        """All tokens in one loop on the device."""
        state, self.cache = traffic.run(
            self.decode, self.params, self.cache, self.state, self.options, np.int32(self.num_steps)
        )
        return traffic.read(state.tokens)

    def dispatch_per_token(self, traffic: Traffic, *, reads: bool = False) -> np.ndarray:
        """A call per token of the program that holds the loop."""
        state, one = self.state, jnp.int32(1)
        for _ in range(self.num_steps):
            state, self.cache = traffic.run(self.decode, self.params, self.cache, state, self.options, one)
            if reads:
                traffic.read(state.last)
        return traffic.read(state.tokens)

    def nested_on_host(self, traffic: Traffic) -> np.ndarray:
        """A batch nested and a step dispatched per token."""
        n, pages = self.page_tables.shape
        last, contexts = np.asarray(self.state.last)[:n], self.prompt_lens.copy()
        tokens, bucket = [last], Bucket(n, n, n * pages, max_q_len=1)
        ones, counts, flat = np.ones(n, np.int32), np.full(n, pages), self.page_tables.reshape(-1)
        for _ in range(self.num_steps):
            batch = nest_sequences(
                last,
                q_lens=ones,
                context_lens=contexts,
                page_tables=flat,
                page_counts=counts,
                page_size=PAGE_SIZE,
                bucket=bucket,
                transfer=False,
            )
            chosen, self.cache = traffic.run(self.take_step, self.params, self.cache, batch)
            last = traffic.read(chosen)
            contexts += 1
            tokens.append(last)
        return np.stack(tokens, axis=1)

    @property
    def ways(self) -> dict[str, Callable[[Traffic], np.ndarray]]:
        """The candidates: each returns the new tokens `[R, new_tokens]`."""
        return {
            BASELINE: self.on_device,
            "a dispatch per token": self.dispatch_per_token,
            "dispatch and read": functools.partial(self.dispatch_per_token, reads=True),
            "nested on the host": self.nested_on_host,
        }


def _likeliest(
    params: Params, cache: Cache, batch: RaggedBatch, *, config: DecoderConfig
) -> tuple[jax.Array, Cache]:
    logits, cache = step(
        params, cache, batch, config=config, num_rows=batch.bucket.seqs, implementation="xla"
    )
    return logits.argmax(axis=1).astype(jnp.int32), cache


def prefilled(decoder: DecoderConfig, num_prompts: int, config: Config) -> Decode:
    """Random prompts of 8 to 48 tokens, with pages for all their tokens, prefilled."""
    rng = np.random.default_rng(0)
    lens = rng.integers(8, MAX_PROMPT + 1, num_prompts)
    pages = -(-(MAX_PROMPT + config.new_tokens) // PAGE_SIZE)
    tables = rng.permutation(num_prompts * pages).reshape(num_prompts, pages)
    batch = nest_sequences(
        rng.integers(0, decoder.vocab_size, lens.sum()),
        q_lens=lens,
        page_tables=tables,
        page_size=PAGE_SIZE,
        bucket=Bucket(int(lens.sum()), num_prompts, tables.size),
    )
    prompts = [PromptOptions(config.new_tokens, Sampling(), ())] * num_prompts
    options = RowOptions.of(prompts, num_rows=num_prompts, max_stop_tokens=1, vocab_size=decoder.vocab_size)
    options = jax.device_put(options)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0, impl="rbg"), decoder)
    cache = init_model_cache(decoder, num_pages=tables.size, page_size=PAGE_SIZE, dtype="float32")
    shared: dict[str, Any] = {"config": decoder, "greedy": True, "implementation": "xla"}
    fill = functools.partial(prefill, decode_seqs=num_prompts, max_new_tokens=config.new_tokens, **shared)
    state, cache = jax.jit(fill, donate_argnums=1)(params, cache, batch, options)
    return Decode(
        params=params,
        cache=cache,
        state=state,
        options=options,
        prompt_lens=lens,
        page_tables=tables,
        num_steps=config.new_tokens - 1,
        decode=jax.jit(functools.partial(decode, **shared), donate_argnums=1),
        take_step=jax.jit(functools.partial(_likeliest, config=decoder), donate_argnums=1),
    )


def rows(config: Config) -> Iterator[Row]:
    """A row per decoder and number of prompts."""
    cases = list(itertools.product(config.widths, config.prompts))
    for width, num_prompts in track(cases, description="decodes"):
        found = prefilled(decoder_of(width, config), num_prompts, config)
        traffic = {name: Traffic() for name in found.ways}
        tokens = {name: way(traffic[name]) for name, way in found.ways.items()}
        for name in found.ways:
            np.testing.assert_array_equal(tokens[name], tokens[BASELINE], err_msg=name)
        calls = {
            name: functools.partial(lambda _, way: way(Traffic()), way=way)
            for name, way in found.ways.items()
        }
        timings = measure(calls, inputs=1, repeats=2, rounds=config.rounds)
        yield {
            "width": width,
            "prompts": num_prompts,
            "steps": found.num_steps,
            "distinct_tokens": len(np.unique(tokens[BASELINE])),
            "traffic": {
                name: {
                    "dispatches": counted.dispatches,
                    "transfers": counted.transfers,
                    "transferred_bytes": counted.transferred_bytes,
                    "reads": counted.reads,
                }
                for name, counted in traffic.items()
            },
            **rounds_of(timings),
        }


def tables(rows: list[Row]) -> dict[str, Table]:
    """What goes back and forth, and the time of a step."""
    ways = list(rows[0]["elapsed_us"])
    of_first = [row for row in rows if row["width"] == rows[0]["width"]]
    traffic = [
        [
            name,
            *(
                f"{rows[0]['traffic'][name][what] / rows[0]['steps']:.2f}"
                for what in ("dispatches", "transfers", "reads")
            ),
            ", ".join(f"{row['traffic'][name]['transferred_bytes'] / row['steps']:,.0f}" for row in of_first),
        ]
        for name in ways
    ]
    times = [
        [
            f"{row['width']}",
            f"{row['prompts']}",
            name,
            f"{milliseconds(row['elapsed_us'], name) / row['steps']:.2f}",
            *(
                "1" if name == BASELINE else times_as_long(row[of], name, BASELINE).text()
                for of in ("elapsed_us", "processor_us")
            ),
        ]
        for row in rows
        for name in ways
    ]
    return {
        "traffic": Table(
            [
                "per step",
                "dispatches",
                "transfers",
                "reads",
                "bytes transferred, by number of prompts",
            ],
            traffic,
        ),
        "time": Table(
            ["width", "prompts", "way", "ms a step", "elapsed ÷ device loop", "processor time ÷ device loop"],
            times,
        ),
    }


def plot(rows: list[Row]) -> Figure:
    """How many times as long a step takes as in the loop, elapsed and of the processor."""
    figure = Figure(figsize=(12, 4.6), layout="constrained", facecolor="white")
    elapsed, processor = figure.subplots(1, 2)
    ways = [name for name in rows[0]["elapsed_us"] if name != BASELINE]
    widths = sorted({row["width"] for row in rows})
    for (number, name), (place, width) in itertools.product(enumerate(ways), enumerate(widths)):
        of_width = [row for row in rows if row["width"] == width]
        prompts = [row["prompts"] for row in of_width]
        style, label = ("-", "--", ":")[place % 3], f"{name}, width {width}"
        for axes, of in ((elapsed, "elapsed_us"), (processor, "processor_us")):
            ratios = [times_as_long(row[of], name, BASELINE) for row in of_width]
            draw(axes, prompts, ratios, number, label, style)
    elapsed.set_title(
        "What does it cost to come back to the host\nbetween tokens? (1 = the loop on the device)"
    )
    elapsed.set(ylabel="time elapsed in a step ÷ device loop")
    processor.set_title("processor time of all threads:\nmedian and range of the rounds")
    processor.set(ylabel="processor time of a step ÷ device loop")
    for axes in (elapsed, processor):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(*_ticks(sorted({row["prompts"] for row in rows})))
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="prompts of the batch")
        axes.grid(alpha=0.3)
    processor.legend(frameon=False, fontsize=8)
    return figure


def _ticks(prompts: list[int]) -> tuple[list[int], list[str]]:
    return prompts, [f"{count}" for count in prompts]


EXPERIMENT = Experiment(
    question="What does it cost to come back to the host between the tokens of a decode?",
    committed=Config(),
    small=Config(widths=(64,), num_layers=1, prompts=(2,), new_tokens=4, rounds=2),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
