"""What do buckets that were fitted to a trace save against fixed grids, by the number of programs?

    python experiments/bucket_policies.py

Five traces. In four of them our own `Scheduler` makes the batches, which `nest_sequences` logs and
`read_trace` reads back; requests arrive at random, more and fewer of them in turns. No model runs: what a
request's new tokens are makes no difference to the sizes of batches.

- *library*: prompts and continuations are functions of Python's standard library, cut at random. Their bytes
  and lengths are real, and so are shared prefixes; when they arrive is not.
- *ShareGPT*, *Azure code*, *Azure conversation*: log-normal lengths with published figures (`LAWS`). They are
  like those data in the figures that are named there and in nothing else.
- *log-uniform*: independent sizes without pages, as if nothing were known of the scale.

Plans are made from the first half of a trace and judged on the second, with the default `LinearCost`, and
with a headroom of a quarter or none. They are those of `plan_buckets`, from one line of batches, and once,
with headroom, cut along tokens and pages (`nested_cuts.py`). Fixed grids are chosen with the whole trace at
hand, generously (`grid_curve`), so that they never meet a size that they have no program for. No time on a
device and no compile time is measured here: the cost is a model. What is measured is how long planning takes.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from nested_cuts import plan_curve_with_pages
from rich.progress import track

from jaxattn import Bucket, PagePool
from jaxattn.batch import BatchLog, Trace, read_trace
from jaxattn.cli.demo import standard_library_functions
from jaxattn.planning import fit_of, plan_curve
from jaxattn.planning.fixed_grids import FIXED_GRIDS, grid_curve
from jaxattn.planning.planner import unpadded_cost
from jaxattn.serving import Scheduler, largest_step
from jaxattn.viz.buckets import draw_tradeoff

PAGE_SIZE = 16
PLAN, ROOMY, NESTED = "plan", "plan, headroom", "tokens and pages, headroom"
HEADROOM = 0.25
SHOWN = (2, 4, 8, 12, 16, 23, 33, 45)
"""Numbers of programs in the table."""


@dataclass(frozen=True)
class Law:
    """Log-normal lengths of a service's requests, in tokens.

    Attributes:
        prompt: Median of the prompts.
        prompt_sigma: Of the logarithms.
        new: Median of the new tokens.
        new_sigma: Of the logarithms.
    """

    prompt: float
    prompt_sigma: float
    new: float
    new_sigma: float

    @classmethod
    def of_means(cls, prompt: float, new: float, sigma: float) -> Law:
        """From means alone, with a sigma that is assumed."""
        return cls(prompt / np.exp(sigma**2 / 2), sigma, new / np.exp(sigma**2 / 2), sigma)

    @classmethod
    def of(cls, prompt: tuple[float, float], new: tuple[float, float]) -> Law:
        """From median and mean of each."""
        sigmas = [float(np.sqrt(2 * np.log(mean / median))) for median, mean in (prompt, new)]
        return cls(prompt[0], sigmas[0], new[0], sigmas[1])


LAWS = {
    # Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
    # SOSP 2023, figure 11: mean input 161.31, mean output 337.99 tokens. The sigma is assumed.
    "ShareGPT": Law.of_means(161.31, 337.99, sigma=1.0),
    # Patel et al., "Splitwise", ISCA 2024: medians of 1,500 and 13 tokens (coding) and of 1,020 and 129
    # (conversation). Of the published sample, AzureLLMInferenceTrace_{code,conv}.csv, others have computed
    # medians of 1,469 and 13 and means of 2,048 and 28 (code), and means of 1,155 and 211 (conversation).
    "Azure code": Law.of(prompt=(1469, 2048), new=(13, 28)),
    "Azure conversation": Law.of(prompt=(1020, 1155), new=(129, 211)),
}


@dataclass(frozen=True)
class Config:
    """What is run."""

    num_batches: int = 3000
    """Of each trace that the scheduler makes; half of them are planned with."""
    num_sizes: int = 20_000
    """Of the log-uniform trace."""
    timed_batches: int = 100_000
    """Batches of the traces on which planning is timed."""
    timed_programs: tuple[int, ...] = (8, 45)
    """Most programs of the plans that are timed."""
    max_programs: int = 45
    """Most programs of all other plans."""
    candidates: int = 64
    """Sizes per axis that a search along tokens and pages considers."""
    finer: int = 96
    """The same, where it is asked what finer ones would save, on one trace and with `finer_programs`."""
    finer_programs: int = 16
    """Most programs there."""
    seed: int = 0
    """Of all random numbers."""


SMALL = Config(
    num_batches=120,
    num_sizes=300,
    timed_batches=400,
    timed_programs=(4,),
    max_programs=8,
    candidates=8,
    finer=12,
    finer_programs=4,
)


@dataclass(frozen=True)
class Service:
    """Requests, and the server that they come to.

    Attributes:
        requests: Prompts, and how many new tokens follow each.
        mean_prompt: Tokens of a prompt, on average.
        mean_new: New tokens of a request, on average.
        token_budget: As of `Server`, like the other two.
        max_seqs: Most requests that run at a time.
        num_pages: Pages of the cache.
        share_prefixes: As of `Server`.
    """

    requests: Iterator[tuple[np.ndarray, int]]
    mean_prompt: float
    mean_new: float
    token_budget: int
    max_seqs: int
    num_pages: int
    share_prefixes: bool


def library(config: Config) -> Service:
    """Functions of the standard library, each cut at a random place into prompt and continuation."""
    rng = np.random.default_rng(config.seed)
    functions = standard_library_functions(range(32, 2049))
    mean = float(np.mean([len(function) for function in functions])) / 2

    def requests() -> Iterator[tuple[np.ndarray, int]]:
        while True:
            function = functions[rng.integers(len(functions))]
            cut = int(rng.integers(1, len(function)))
            yield function[:cut], len(function) - cut

    return Service(requests(), mean, mean, token_budget=512, max_seqs=32, num_pages=2048, share_prefixes=True)


def synthetic(law: Law, config: Config) -> Service:
    """Requests of random tokens, with lengths by a law, up to 8,192 tokens."""
    rng = np.random.default_rng(config.seed)

    def length(median: float, sigma: float) -> int:
        return int(np.clip(rng.lognormal(np.log(median), sigma), 1, 4096))

    def requests() -> Iterator[tuple[np.ndarray, int]]:
        while True:
            prompt = length(law.prompt, law.prompt_sigma)
            yield rng.integers(0, 1 << 20, prompt), length(law.new, law.new_sigma)

    prompt, new = (
        median * float(np.exp(sigma**2 / 2))
        for median, sigma in ((law.prompt, law.prompt_sigma), (law.new, law.new_sigma))
    )
    limits = {"token_budget": 2048, "max_seqs": 64, "num_pages": 1 << 14}
    return Service(requests(), prompt, new, **limits, share_prefixes=False)


def serve_without_model(service: Service, num_batches: int, seed: int) -> Trace:
    """The batches that a server would run. Twice per half of them many requests arrive, and twice few."""
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(
        PagePool(service.num_pages, PAGE_SIZE),
        token_budget=service.token_budget,
        max_seqs=service.max_seqs,
        share_prefixes=service.share_prefixes,
    )
    # On average six tenths of what the scheduler can do, by the scarcer of rows and tokens.
    by_tokens = service.token_budget / (service.mean_prompt + service.mean_new)
    per_step = 0.6 * min(service.max_seqs / service.mean_new, by_tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "batches.jsonl")
        with BatchLog(path) as log:
            for i in range(num_batches):
                wave = 1 + 0.9 * np.sin(2 * np.pi * 4 * i / num_batches)
                for _ in range(max(int(rng.poisson(per_step * wave)), not scheduler.has_work)):
                    scheduler.add(*next(service.requests))
                if (step := scheduler.schedule()) is None:
                    raise RuntimeError("a scheduler with work has no step")
                step.nest(transfer=False, validate=False, log=log)
                scheduler.commit(step, np.zeros(step.num_rows, np.int32))
        return read_trace(path)


def log_uniform(n: int, seed: int) -> Trace:
    """Independent sizes from 16 to 32,768 tokens, one sequence each, no pages."""
    tokens = np.exp(np.random.default_rng(seed).uniform(np.log(16), np.log(32769), n)).astype(np.int64)
    return Trace(np.stack([tokens, np.ones_like(tokens), np.zeros_like(tokens), tokens], axis=1))


def rows(config: Config) -> Iterator[Row]:
    """One row per trace and number of programs, and some on the planner itself."""
    made: dict[str, Trace] = {}
    for name in track(["library", *LAWS, "log-uniform"], description="traces"):
        if name == "log-uniform":
            made[name], limits = log_uniform(config.num_sizes, config.seed), Bucket(32768, 1)
        else:
            service = library(config) if name == "library" else synthetic(LAWS[name], config)
            made[name] = serve_without_model(service, config.num_batches, config.seed)
            limits = largest_step(
                num_pages=service.num_pages,
                token_budget=service.token_budget,
                max_seqs=service.max_seqs,
                share_prefixes=service.share_prefixes,
            )
        yield describe(name, made[name])
        yield from compare(name, made[name], limits, config)
    for name in track(["Azure conversation", "log-uniform"], description="time"):
        yield from time_planner(name, made[name], config)
    yield refine("Azure conversation", made["Azure conversation"], config)


def describe(name: str, trace: Trace) -> Row:
    """A trace in a few figures."""
    half = len(trace) // 2
    seen = set(map(tuple, trace[:half].sizes.tolist()))
    return {
        "about": "trace",
        "trace": name,
        "batches": len(trace),
        "decode": float((trace.max_q_len == 1).mean()),
        "tokens": [int(x) for x in np.quantile(trace.tokens, (0, 0.5, 0.9, 1))],
        "pages": int(trace.pages.max()),
        "new": float(np.mean([row not in seen for row in map(tuple, trace[half:].sizes.tolist())])),
    }


def compare(name: str, trace: Trace, limits: Bucket, config: Config) -> Iterator[Row]:
    """Plans of the first half and grids of the whole, judged on both halves."""
    halves = {"first": trace[: len(trace) // 2], "second": trace[len(trace) // 2 :]}
    options: dict[str, Any] = {"limits": limits}
    known = halves["first"], config.max_programs
    curves = {
        PLAN: plan_curve(*known, **options),
        ROOMY: plan_curve(*known, headroom=HEADROOM, **options),
        NESTED: plan_curve_with_pages(*known, headroom=HEADROOM, candidates=config.candidates, **options),
    }
    for grid, sizes in FIXED_GRIDS.items():
        curves[grid] = grid_curve(sizes, trace, config.max_programs, **options)
    least = {half: unpadded_cost(part) for half, part in halves.items()}
    for k in range(1, config.max_programs + 1):
        row: Row = {"about": "policies", "trace": name, "programs": k, "first": {}, "second": {}}
        for half, part in halves.items():
            for way, curve in curves.items():
                fit = fit_of(curve[k - 1], part)
                row[half][way] = {"over": fit.cost / least[half] - 1, "padding": fit.padding}
        yield row


def time_planner(name: str, trace: Trace, config: Config) -> Iterator[Row]:
    """Seconds to plan for many batches: those of a trace, drawn again and changed a little."""
    rng = np.random.default_rng(config.seed)
    sizes = trace.sizes[rng.integers(len(trace), size=config.timed_batches)]
    is_long = sizes[:, 3] > 1
    sizes[:, 2] += (sizes[:, 2] > 0) * rng.integers(0, 64, len(sizes))
    sizes[is_long, 0] += rng.integers(0, 64, int(is_long.sum()))
    many = Trace(sizes)
    searches = {
        "one line": plan_curve,
        "tokens and pages": functools.partial(plan_curve_with_pages, candidates=config.candidates),
    }
    for programs, search in itertools.product(config.timed_programs, searches):
        started, processor = time.perf_counter(), time.process_time()
        searches[search](many, programs)
        yield {
            "about": "time",
            "trace": name,
            "search": search,
            "batches": len(many),
            "tokens": len(np.unique(many.tokens)),
            "pages": len(np.unique(many.pages)),
            "programs": programs,
            "seconds": time.perf_counter() - started,
            "processor": time.process_time() - processor,
        }


def refine(name: str, trace: Trace, config: Config) -> Row:
    """What more candidates save along both axes, on the very trace that is planned for."""
    part = trace[: len(trace) // 2]
    coarse, fine = (
        fit_of(plan_curve_with_pages(part, config.finer_programs, candidates=n)[-1], part).cost
        for n in (config.candidates, config.finer)
    )
    return {
        "about": "candidates",
        "trace": name,
        "programs": config.finer_programs,
        "coarse": config.candidates,
        "fine": config.finer,
        "saved": 1 - fine / coarse,
    }


def tables(rows: list[Row]) -> dict[str, Table]:
    """Traces, costs by number of programs, and time."""
    ways = [PLAN, ROOMY, NESTED, *FIXED_GRIDS]
    policies = [row for row in rows if row["about"] == "policies" and row["programs"] in SHOWN]
    return {
        "traces": Table(
            (
                "trace",
                "batches",
                "decode steps",
                "tokens: least, median, 90 %, most",
                "most pages",
                "new sizes",
            ),
            [
                (
                    row["trace"],
                    f"{row['batches']:,}",
                    f"{row['decode']:.0%}",
                    ", ".join(f"{n:,}" for n in row["tokens"]),
                    f"{row['pages']:,}",
                    f"{row['new']:.0%}",
                )
                for row in rows
                if row["about"] == "trace"
            ],
        ),
        "policies": Table(
            ("trace", "programs", "plan, on its own half", *ways, "saved", "padding: three plans, best grid"),
            [_policy_line(row, ways) for row in policies],
        ),
        "time": Table(
            (
                "trace like",
                "batches",
                "sizes of tokens, of pages",
                "cut along",
                "programs",
                "seconds",
                "processor time",
            ),
            [
                (
                    row["trace"],
                    f"{row['batches']:,}",
                    f"{row['tokens']:,}, {row['pages']:,}",
                    row["search"],
                    str(row["programs"]),
                    f"{row['seconds']:.1f}",
                    f"{row['processor']:.1f}",
                )
                for row in rows
                if row["about"] == "time"
            ],
        ),
        "candidates": Table(
            ("trace", "programs", "candidates", "finer ones", "saved by them"),
            [
                (
                    row["trace"],
                    str(row["programs"]),
                    str(row["coarse"]),
                    str(row["fine"]),
                    f"{row['saved']:.2%}",
                )
                for row in rows
                if row["about"] == "candidates"
            ],
        ),
    }


def _policy_line(row: Row, ways: Sequence[str]) -> Sequence[str]:
    found = row["second"]
    best = min(FIXED_GRIDS, key=lambda name: found[name]["over"])
    saved = [1 - (1 + found[way]["over"]) / (1 + found[best]["over"]) for way in (PLAN, ROOMY, NESTED)]
    return (
        row["trace"],
        str(row["programs"]),
        f"{row['first'][PLAN]['over']:.1%}",
        *(f"{found[way]['over']:.1%}" for way in ways),
        ", ".join(f"{share:.1%}" for share in saved),
        ", ".join(f"{found[way]['padding']:.0%}" for way in (PLAN, ROOMY, NESTED, best)),
    )


def plot(rows: list[Row]) -> Figure:
    """A panel per trace: what padding costs by the number of programs, on batches not planned for."""
    policies = [row for row in rows if row["about"] == "policies"]
    names = list(dict.fromkeys(row["trace"] for row in policies))
    figure = Figure(figsize=(13, 7.6), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 3).flat
    for ax, name in zip(axes, names, strict=False):
        mine = [row["second"] for row in policies if row["trace"] == name]
        draw_tradeoff(
            ax, {way: [1 + row[way]["over"] for row in mine] for way in (PLAN, ROOMY, NESTED, *FIXED_GRIDS)}
        )
        ax.set_title(name)
    handles, labels = next(iter(figure.axes)).get_legend_handles_labels()
    axes[-1].set_axis_off()
    axes[-1].legend(handles, labels, loc="center", frameon=False, fontsize=12)
    figure.suptitle("What does padding cost on batches that were not planned for, by the number of programs?")
    return figure


EXPERIMENT = Experiment(
    question="What do buckets fitted to a trace save against fixed grids, by the number of programs?",
    committed=Config(),
    small=SMALL,
    rows=rows,
    tables=tables,
    plot=plot,
)


if __name__ == "__main__":
    EXPERIMENT.main(__file__)
