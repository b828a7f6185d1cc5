"""Are the kernels right on the GPU at hand, and how far are they from what it can do?

    python experiments/gpu.py

needs nothing but JAX with CUDA. It

1. compares every kernel, over a sample of all combinations of its options, with the reference in float64: an
   error may be at most twice that of plain XLA in the same precision, plus four roundings, row by row (of
   gradients, which are sums of many rows, over the whole array). Whatever slot no sequence owns is NaN;
2. checks that a second run, and a run without the other sequences, has the same bits; gradients again, too;
3. measures what the device can do at all: bytes copied per second, and products of large bf16 matrices;
4. times every kernel and, where they can be imported, others' kernels on the same shapes, in one run: device
   time of the kernels alone, over as many sets of inputs as it takes to leave the second-level cache; and
   `prepare_metadata`, the whole superset. Of prompts without context the gradient is timed as well, for
   itself: ours and cuDNN's. cuDNN comes with JAX; tokamax, PyTorch and FlashInfer are timed
   where they are installed, and what one of them refuses is recorded. Each result names its clock: PyTorch
   and FlashInfer are timed by CUDA's events, which include gaps between kernels; ours by CUPTI, without.

A line of JSON per result goes to `experiments/results/gpu.jsonl`, the first with provenance; tables are
printed, and a roofline is drawn where matplotlib is installed. `--quick` runs a little of everything, also
without a GPU, where kernels are interpreted and no time means anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# PyTorch, where it is timed too, needs memory beside JAX.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_baselines
import jax
import jax.numpy as jnp
import numpy as np
import torch_baselines
from rich.console import Console
from rich.table import Table
from side_by_side import provenance

from jaxattn import AttentionSpec, Bucket, RaggedBatch, attention, prepare_metadata
from jaxattn.attention import mosaic
from jaxattn.measuring.timing import Measured, measure
from jaxattn.measuring.workloads import ODD, Workload, nest_workload, random_page_tables

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
KERNELS = (
    ("triton", "mosaic")
    if mosaic.serves(getattr(jax.devices()[0], "compute_capability", None))
    else ("triton",)
)
CACHE_BYTES = 2 * 64 * 2**20
"""Twice the second-level cache of the largest GPU: sets of inputs rotate over more than this."""

Result = dict[str, Any]


class Problem(NamedTuple):
    """Inputs of one layer and one step: arguments of `attend`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sinks: jax.Array | None
    batch: RaggedBatch


def draw(
    workload: Workload, spec: AttentionSpec, page_size: int | None, dtype: str, bucket: Bucket, seed: int = 0
) -> Problem:
    """Random inputs; slots that no sequence owns are NaN, and so are queries of padding."""
    rng = np.random.default_rng(seed)

    def normal(rows: int, heads: int) -> np.ndarray:
        return rng.standard_normal((rows, heads, spec.head_dim), np.float32)

    if page_size is None:
        tables, slots, num_slots = None, np.arange(sum(workload.q_lens)), bucket.tokens
    else:
        tables, num_pages = random_page_tables(workload, page_size, rng)
        num_slots = num_pages * page_size
        slots = np.concatenate(
            [
                (table[:, None] * page_size + np.arange(page_size)).reshape(-1)[:n]
                for table, n in zip(tables, workload.kv_lens, strict=True)
            ]
        )

    def keys() -> jax.Array:
        flat = np.full((num_slots, spec.num_kv_heads, spec.head_dim), np.nan, np.float32)
        flat[slots] = normal(slots.size, spec.num_kv_heads)
        return jnp.asarray(flat if page_size is None else flat.reshape(-1, page_size, *flat.shape[1:]), dtype)

    q = np.full((bucket.tokens, spec.num_q_heads, spec.head_dim), np.nan, np.float32)
    q[: sum(workload.q_lens)] = normal(sum(workload.q_lens), spec.num_q_heads)
    sinks = jnp.asarray(rng.standard_normal(spec.num_q_heads), jnp.float32) if spec.sinks else None
    batch = nest_workload(workload, page_tables=tables, page_size=page_size, bucket=bucket)
    return Problem(jnp.asarray(q, dtype), keys(), keys(), sinks, batch)


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def attend(problem: Problem, spec: AttentionSpec, implementation: str) -> tuple[jax.Array, jax.Array]:
    """Outputs and log-sum-exp, metadata included."""
    metadata = prepare_metadata(problem.batch, spec)
    return attention(
        problem.q, problem.k, problem.v, metadata, spec, sinks=problem.sinks, return_lse=True,
        implementation=implementation,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def go_back(problem: Problem, spec: AttentionSpec, implementation: str) -> list[jax.Array]:
    """Gradients of queries, keys, values and sinks, of a fixed sum of the results."""

    def total(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        out, lse = attend(Problem(q, k, v, sinks, problem.batch), spec, implementation)
        weights = jnp.sin(jnp.arange(out.size, dtype=lse.dtype)).reshape(out.shape)
        # Padding has a logarithm of -inf, and its gradient is of no interest.
        return (out.astype(lse.dtype) * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(problem.q, problem.k, problem.v, problem.sinks)
    return jax.tree.leaves(gradients)


# Correctness.

LONG = (
    Workload("long decode", (1, 1, 1, 1), (1299, 511, 512, 30), "keys in several pieces"),
    Workload("long mixed", (1, 130, 3), (1299, 513, 600), "several key blocks"),
)
OPTIONS: dict[str, tuple] = {
    "group": (1, 2, 3, 4, 8),
    "head_dim": (64, 80, 96, 128, 256),
    "page_size": (None, 1, 8, 12, 16, 64, 128),
    "dtype": ("bfloat16", "float16", "float32"),
    "sliding_window": (None, 1, 100, 700),
    "logits_soft_cap": (None, 30.0),
    "sinks": (False, True),
    "causal": (True, False),
}


def sample_options(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different combinations, at random; a two-sided window has no meaning and is left out."""
    everything = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
    possible = [o for o in everything if o["causal"] or o["sliding_window"] is None]
    return random.Random(seed).sample(possible, number)


def check_options(options: dict[str, Any], workloads: tuple[Workload, ...]) -> Iterator[Result]:
    """Every kernel on one combination of options, over some workloads."""
    page_size, dtype = options["page_size"], options["dtype"]
    rest = {name: value for name, value in options.items() if name not in ("group", "page_size", "dtype")}
    spec = AttentionSpec(num_q_heads=2 * options["group"], num_kv_heads=2, **rest)
    for workload in workloads:
        if page_size is None and any(workload.context_lens):
            continue
        bucket = Bucket(160, 8, 0 if page_size is None else 2600 // page_size + 8)
        problem = draw(workload, spec, page_size, dtype, bucket)
        n = sum(workload.q_lens)
        exact, exact_back = (in_float64(function, problem, spec) for function in (attend, go_back))
        plain, plain_back = (
            [np.asarray(x, np.float64) for x in function(problem, spec, "xla")]
            for function in (attend, go_back)
        )
        for kernel in KERNELS:
            result = {"kind": "correctness", "kernel": kernel, "workload": workload.name, **options}
            try:
                outputs = attend(problem, spec, kernel)
            except NotImplementedError as refusal:
                yield result | {"refused": str(refusal)}
                continue
            got = [np.asarray(x, np.float64) for x in outputs]
            shares = {
                "out": worst_share(*(x[0][:n] for x in (got, plain, exact)), dtype=dtype),
                # Logarithms are summed in float32, and all of one size.
                "lse": worst_share(*(x[1][:n].reshape(1, -1) for x in (got, plain, exact)), dtype="float32"),
            }
            padding = bool((got[0][n:] == 0).all() and np.isneginf(got[1][n:]).all())
            is_right = padding and all(share <= 1 for share in shares.values())  # NaN is not
            yield result | {"error_over_bound": shares, "padding": padding, "ok": is_right}
            yield {**result, "kind": "gradient"} | judge_gradients(
                go_back(problem, spec, kernel), plain_back, exact_back, dtype
            )


def judge_gradients(got: Any, plain: list[np.ndarray], exact: list[np.ndarray], dtype: str) -> Result:
    """Whether gradients are right, and 0 where nothing depends on a number."""
    got = [np.asarray(x, np.float64) for x in got]
    shares = {
        name: worst_share(g.reshape(1, -1), p.reshape(1, -1), e.reshape(1, -1), dtype=dtype)
        for name, g, p, e in zip(("q", "k", "v", "sinks"), got, plain, exact, strict=False)
    }
    zeros = all(bool((g[e == 0] == 0).all()) for g, e in zip(got, exact, strict=True))
    is_right = zeros and all(share <= 1 for share in shares.values())
    return {"error_over_bound": shares, "zeros": zeros, "ok": is_right}


def worst_share(got: np.ndarray, plain: np.ndarray, exact: np.ndarray, *, dtype: str) -> float:
    """The largest error of a row over what is allowed there; rows lie along the last axis.

    Row by row, since a token with few keys has outputs many times as large as one with thousands.
    """
    rounding = float(jnp.finfo(dtype).eps) * np.abs(exact).max(-1)
    allowed = 2 * np.abs(plain - exact).max(-1) + 4 * rounding
    return float((np.abs(got - exact).max(-1) / allowed).max())


def in_float64(function: Callable[..., Any], problem: Problem, spec: AttentionSpec) -> list[np.ndarray]:
    """The reference's results, or its gradients, in float64."""
    with jax.enable_x64(True):
        wide = problem._replace(
            **{name: getattr(problem, name).astype("float64") for name in ("q", "k", "v")}
        )
        return [np.asarray(x) for x in function(wide, spec, "reference")]


def check_bits(kernel: str) -> Iterator[Result]:
    """Whether a second run, gradients included, and a run of each sequence alone, has the same bits."""
    spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
    for workload in (LONG[0], ODD[3]):
        tables, num_pages = random_page_tables(workload, 16, np.random.default_rng(0))
        bucket = Bucket(160, 8, num_pages)
        problem = draw(workload, spec, 16, "bfloat16", bucket)
        first = [np.asarray(x, np.float32) for x in attend(problem, spec, kernel)]
        first_back = [np.asarray(x, np.float32) for x in go_back(problem, spec, kernel)]
        same, alone_same, start = True, True, 0
        for _ in range(5):
            again = (*attend(problem, spec, kernel), *go_back(problem, spec, kernel))
            for a, b in zip((*first, *first_back), again, strict=True):
                same &= np.array_equal(a, np.asarray(b, np.float32))
        tables, _ = random_page_tables(workload, 16, np.random.default_rng(0))  # those that `draw` drew
        for i, n in enumerate(workload.q_lens):
            lone = Workload("alone", (n,), (workload.context_lens[i],), "")
            batch = nest_workload(lone, page_tables=[tables[i]], page_size=16, bucket=bucket)
            q = jnp.full_like(problem.q, jnp.nan).at[:n].set(problem.q[start : start + n])
            alone = attend(problem._replace(q=q, batch=batch), spec, kernel)
            for a, b in zip(alone, first, strict=True):
                alone_same &= np.array_equal(np.asarray(a, np.float32)[:n], b[start : start + n])
            start += n
        result = {"kind": "bits", "kernel": kernel, "workload": workload.name}
        yield result | {"repeated": same, "alone": bool(alone_same), "ok": bool(same and alone_same)}


# Speed.


class Heads(NamedTuple):
    """The model's shape: query heads, key heads, size of a head."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128


class SpeedCase(NamedTuple):
    """What is timed.

    Attributes:
        name: Short and unique.
        workload: The lengths.
        page_size: Tokens per page, or None.
        sliding_window: As of the spec.
        causal: As of the spec.
    """

    name: str
    workload: Workload
    page_size: int | None = 16
    sliding_window: int | None = None
    causal: bool = True

    @property
    def spec(self) -> AttentionSpec:
        """The layer."""
        window = {"sliding_window": self.sliding_window, "causal": self.causal}
        return AttentionSpec(**Heads()._asdict(), **window)

    @property
    def shapes(self) -> torch_baselines.Shapes:
        """What others' kernels have to know of it."""
        return torch_baselines.Shapes(
            q_lens=self.workload.q_lens,
            kv_lens=self.workload.kv_lens,
            heads=Heads(),
            page_size=self.page_size,
            window=self.sliding_window,
            causal=self.causal,
        )


def _lengths(name: str, q_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> Workload:
    return Workload(
        name, q_lens, tuple(k - q for q, k in zip(q_lens, kv_lens, strict=True)), "a shape to time"
    )


def speed_cases() -> list[SpeedCase]:
    """Prefill causal and two-sided, mixtures, windows, decode, short contexts, skew, page sizes."""
    rng = np.random.default_rng(0)

    def case(name: str, q_lens: tuple[int, ...], kv_lens: tuple[int, ...], **options: Any) -> SpeedCase:
        return SpeedCase(name, _lengths(name, q_lens, kv_lens), **options)

    def prefill(n: int, suffix: str = "", **options: Any) -> SpeedCase:
        lens = (n,) * max(1, 16384 // n)
        return case(f"prefill {n}{suffix}", lens, lens, **options)

    def decode(rows: int, n: int, suffix: str = "", **options: Any) -> SpeedCase:
        return case(f"decode {rows} x {n}{suffix}", (1,) * rows, (n,) * rows, **options)

    cases = []
    for n in (512, 1024, 2048, 4096, 8192, 16384, 32768):
        cases += [prefill(n), prefill(n, " two-sided", page_size=None, causal=False)]
    for n in (4096, 16384):
        cases += [
            prefill(n, " packed", page_size=None),
            prefill(n, " window 1024", sliding_window=1024),
        ]
    lens = tuple(int(n) for n in np.exp(rng.uniform(np.log(64), np.log(8192), 12)))
    cases += [
        case("prefill ragged", lens, lens),
        case("prefill ragged packed", lens, lens, page_size=None),
        case("chunk 2048 at 32k", (2048,), (32768,)),
        case("mixed 62 + 2 x 512", (1,) * 62 + (512,) * 2, (4096,) * 62 + (512,) * 2),
    ]
    cases += [decode(rows, n) for rows, n in ((64, 8192), (1, 8192), (32, 4096))]
    cases += [decode(64, n) for n in (32, 64, 128, 256, 512, 1024)]
    for n in (8, 32, 64, 128):
        cases += [
            decode(64, 8192, f" page {n}", page_size=n),
            prefill(4096, f" page {n}", page_size=n),
        ]
    cases.append(decode(64, 8192, " window 1024", sliding_window=1024))
    short = tuple(int(n) for n in rng.integers(64, 2048, 63))
    cases.append(case("decode skewed", (1,) * 64, (65536, *short)))
    cases.append(case("prefill skewed", (16384, *(64,) * 63), (16384, *(64,) * 63)))
    return cases


def quick_cases() -> list[SpeedCase]:
    """Two small ones."""
    decode = _lengths("decode 2 x 600", (1, 1), (600, 600))
    return [SpeedCase(decode.name, decode), SpeedCase("prefill 40", _lengths("prefill 40", (40,), (40,)))]


def pairs_of(case: SpeedCase) -> int:
    """Pairs of a query token and a key that it sees."""
    pairs = 0
    for q, kv in zip(case.workload.q_lens, case.workload.kv_lens, strict=True):
        ends = np.arange(kv - q + 1, kv + 1) if case.causal else np.full(q, kv)
        pairs += int(np.minimum(ends, case.sliding_window or kv).sum())
    return pairs


def bytes_of(case: SpeedCase, itemsize: int = 2) -> int:
    """Bytes that must be moved: the keys and values that any token sees, queries and outputs; each once."""
    heads, keys = Heads(), 0
    for q, kv in zip(case.workload.q_lens, case.workload.kv_lens, strict=True):
        keys += min(kv, q + case.sliding_window - 1) if case.sliding_window else kv
    tokens = sum(case.workload.q_lens)
    elements = 2 * keys * heads.num_kv_heads + 2 * tokens * heads.num_q_heads
    return elements * heads.head_dim * itemsize


def bucket_of(case: SpeedCase) -> Bucket:
    """The exact sizes: what padding costs is another question."""
    q_lens, page_size = case.workload.q_lens, case.page_size
    pages = 0 if page_size is None else sum(-(-n // page_size) for n in case.workload.kv_lens)
    return Bucket(sum(q_lens), len(q_lens), pages, max_q_len=max(q_lens))


def ceilings(*, quick: bool) -> Result:
    """What the device can do: bytes per second of a copy, operations per second of a bf16 product."""
    n, m = (2**20, 256) if quick else (2**30, 8192)
    copied = jnp.ones(n, jnp.uint8)
    copy = measure(lambda x: x ^ jnp.uint8(1), copied)
    square = jax.random.normal(jax.random.key(0), (m, m), jnp.bfloat16)
    product = measure(lambda x: x @ x, square)
    return {
        "kind": "ceilings",
        "copy_bytes_per_s": 2 * n / copy.median_s,
        "bf16_flops_per_s": 2 * m**3 / product.median_s,
        "clock": copy.clock,
    }


def time_case(case: SpeedCase, limits: Result, *, repeats: int, rotated: bool) -> Iterator[Result]:
    """Every kernel, then others' kernels where they serve the case, then the metadata."""
    flops, num_bytes = 4 * pairs_of(case) * Heads().num_q_heads * Heads().head_dim, bytes_of(case)
    floor = max(flops / limits["bf16_flops_per_s"], num_bytes / limits["copy_bytes_per_s"])
    sets = min(16, math.ceil(CACHE_BYTES / num_bytes)) if rotated else 1
    problems = [
        draw(case.workload, case.spec, case.page_size, "bfloat16", bucket_of(case), s) for s in range(sets)
    ]
    base = {"case": case.name, "sets": sets}

    def timed(name: str, take_time: Callable[[], Measured]) -> Result:
        return (
            base | {"kind": "speed", "kernel": name, "flops": flops, "bytes": num_bytes} | outcome(take_time)
        )

    def outcome(take_time: Callable[[], Measured]) -> Result:
        try:
            measured = take_time()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        seconds = measured.median_s / sets
        return {
            "us": 1e6 * seconds,
            "samples_us": [1e6 * s / sets for s in measured.samples_s],
            "clock": measured.clock,
            "tflops_per_s": flops / seconds / 1e12,
            "gb_per_s": num_bytes / seconds / 1e9,
            "share_of_ceiling": floor / seconds,
        }

    def timed_back(name: str, program: Callable[..., Any], *args: Any) -> Result:
        """Of prompts: five products for each two of the way there."""

        def take_time() -> Measured:
            back, needed = way_back(program, *args)
            return measure(back, *needed, repeats=repeats)

        found = outcome(take_time)
        figures = {k: found[k] for k in ("error", "us", "samples_us", "clock") if k in found}
        if "us" in found:
            figures["tflops_per_s"] = 2.5 * found["tflops_per_s"]
        return base | {"kind": "gradient speed", "kernel": name, "flops": 2.5 * flops} | figures

    trains = not any(case.workload.context_lens) and max(case.workload.q_lens) > 1
    for kernel in KERNELS:
        prepare = jax.jit(functools.partial(prepare_metadata, specs=case.spec, consumers=kernel))
        metadata = [jax.block_until_ready(prepare(problem.batch)) for problem in problems]

        def run(problems: list[Problem], metadata: list, kernel: str = kernel) -> list[jax.Array]:
            return [
                attention(p.q, p.k, p.v, m, case.spec, implementation=kernel)
                for p, m in zip(problems, metadata, strict=True)
            ]

        yield timed(kernel, functools.partial(measure, run, problems, metadata, repeats=repeats))
        if trains:

            def attend_all(inputs: list[tuple], kernel: str = kernel) -> list[jax.Array]:
                return [
                    attention(q, k, v, prepare_metadata(p.batch, case.spec), case.spec, implementation=kernel)
                    for (q, k, v), p in zip(inputs, problems, strict=True)
                ]

            yield timed_back(kernel, attend_all, [(p.q, p.k, p.v) for p in problems])
    equal_lens = case.shapes.equal_lens
    if equal_lens is not None and case.sliding_window is None:
        for name, program, args in gpu_baselines.candidates(
            len(case.workload.q_lens), *equal_lens, Heads(), causal=case.causal, sets=sets
        ):
            yield timed(name, functools.partial(measure, program, *args, repeats=repeats))
            if trains:
                yield timed_back(name, program, *args)
    for name, prepare in torch_baselines.candidates(case.shapes, sets=sets):
        yield timed(name, functools.partial(measure_torch, prepare, sets=sets, repeats=repeats))
    superset = functools.partial(prepare_metadata, specs=case.spec)
    measured = measure(superset, problems[0].batch, repeats=repeats)
    yield {
        "kind": "metadata", "case": case.name, "us": 1e6 * measured.median_s, "clock": measured.clock,
        "bucket": dataclasses.asdict(bucket_of(case)),
    }  # fmt: skip


def way_back(program: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], tuple]:
    """A program's gradient alone, and what it needs: what was kept, and gradients of the results."""
    results, back = jax.vjp(jax.jit(program), *args)
    return lambda back, d_results: back(d_results), (back, jax.tree.map(jnp.ones_like, results))


def measure_torch(
    prepare: Callable[[], torch_baselines.Program], *, sets: int, repeats: int, device: str = "cuda"
) -> Measured:
    """Make a candidate's inputs, and time it."""
    samples, clock = torch_baselines.measure(prepare(), sets=sets, repeats=repeats, device=device)
    return Measured(statistics.median(samples), tuple(samples), clock)


# Reporting.


def print_report(console: Console, results: list[Result]) -> None:
    """Failures one by one, then speed by case."""
    checks = [r for r in results if r["kind"] in ("correctness", "gradient", "bits")]
    failed = [r for r in checks if not r.get("ok", "refused" in r)]
    refused = sum("refused" in r for r in checks)
    console.print(f"{len(checks)} checks: {len(failed)} failed, {refused} refused by the kernel")
    for result in failed:
        console.print(result)
    table = Table("case", "kernel", "µs", "TFLOP/s", "GB/s", "of the ceiling", title="Device time")
    for r in results:
        if r["kind"] == "speed" and "us" in r:
            figures = (f"{r['us']:,.1f}", f"{r['tflops_per_s']:,.1f}", f"{r['gb_per_s']:,.0f}")
            table.add_row(r["case"], r["kernel"], *figures, f"{r['share_of_ceiling']:.0%}")
        elif r["kind"] in ("speed", "gradient speed") and "error" in r:
            table.add_row(r["case"], r["kernel"], r["error"][:40])
        elif r["kind"] == "gradient speed" and "us" in r:
            table.add_row(
                r["case"], f"{r['kernel']}, gradient", f"{r['us']:,.1f}", f"{r['tflops_per_s']:,.1f}"
            )
        elif r["kind"] == "metadata":
            table.add_row(r["case"], "prepare_metadata", f"{r['us']:,.1f}")
    console.print(table)


def draw_roofline(results: list[Result], path: Path) -> None:
    """Operations per byte against operations per second, under what the device can do."""
    import matplotlib.pyplot as plt

    (limits,) = (r for r in results if r["kind"] == "ceilings")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    speed = [r for r in results if r["kind"] == "speed" and "us" in r]
    for kernel in dict.fromkeys(r["kernel"] for r in speed):
        mine = [r for r in speed if r["kernel"] == kernel]
        axes.loglog(
            [r["flops"] / r["bytes"] for r in mine], [r["tflops_per_s"] for r in mine], "o", label=kernel
        )
    intensity = np.geomspace(0.5, 1e5, 200)
    roof = np.minimum(intensity * limits["copy_bytes_per_s"], limits["bf16_flops_per_s"]) / 1e12
    axes.loglog(intensity, roof, color="gray", label="copy, and bf16 product")
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("TFLOP/s")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(*, options: int, cases: list[SpeedCase], repeats: int, quick: bool) -> Iterator[Result]:
    """All results, in order."""
    yield {"kind": "provenance", **provenance(), "kernels": KERNELS}
    workloads = ODD[:1] if quick else (*ODD, *LONG)
    for chosen in sample_options(options):
        yield from check_options(chosen, workloads)
    for kernel in KERNELS:
        yield from check_bits(kernel)
    limits = ceilings(quick=quick)
    yield limits
    for case in cases:
        yield from time_case(case, limits, repeats=repeats, rotated=not quick)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--options", type=int, default=60, help="combinations of options to check")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each candidate")
    parser.add_argument("--only", help="time only cases whose name holds this")
    parser.add_argument("--quick", action="store_true", help="a little of everything: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console, results = Console(), []
    cases = quick_cases() if arguments.quick else speed_cases()
    cases = [case for case in cases if arguments.only is None or arguments.only in case.name]
    number, repeats = (1, 2) if arguments.quick else (arguments.options, arguments.repeats)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as lines:
        for result in run(options=number, cases=cases, repeats=repeats, quick=arguments.quick):
            results.append(result)
            lines.write(json.dumps(result) + "\n")
            lines.flush()
            console.print(result["kind"], result.get("case") or result.get("workload") or "", highlight=False)
    print_report(console, results)
    try:
        draw_roofline(results, arguments.out.with_suffix(".png"))
    except ImportError:
        console.print("matplotlib is not installed: no picture")


if __name__ == "__main__":
    main()
