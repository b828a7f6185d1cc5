"""Compile before anybody waits, and measure what a step takes.

For a server whose buckets were fitted to a trace:

    plan = plan_buckets(read_trace("batches.jsonl"), 8, limits=largest_step(num_pages=512))
    warmup(model, plan, num_pages=512)
    server = Server(model, num_pages=512, grid=plan)   # compiles nothing any more
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.batch.bucket import Bucket, BucketGrid, BucketPlan
from jaxattn.batch.nest import nest_sequences
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.cache.paged import DEFAULT_PAGE_SIZE
from jaxattn.compiling.compiles import count_compiles
from jaxattn.models import CompiledSteps, Model
from jaxattn.models.sampling import SamplingArrays

type Warmable = Bucket | Callable[[CompiledSteps], object]
"""What can be warmed up: a bucket, for the steps of a server, or a plan of `plan_generation`, or any function
that has the `CompiledSteps` it is called with compile what is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupReport:
    """What warming up took.

    Attributes:
        programs: Names of the programs that are new to the model.
        seconds: From beginning to end.
        compiling_seconds: In the compiler, or reading what the persistent cache had; the rest is tracing.
        cache_hits: Programs that the persistent cache had, so that they were read and not compiled.
    """

    programs: tuple[str, ...]
    seconds: float
    compiling_seconds: float
    cache_hits: int


def warmup(
    model: Model | CompiledSteps,
    buckets: BucketPlan | BucketGrid | Iterable[Warmable],
    *,
    num_pages: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    cache_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | ChoiceTable = "auto",
    progress: bool = True,
) -> WarmupReport:
    """Compile what serving, or generating, in these buckets needs; programs that are there already are kept.

    Afterwards a `Server` with the same `num_pages`, `page_size`, `cache_dtype` and `implementation` compiles
    nothing for steps in these buckets, and nor does `generate` for the plans: run it within
    `forbid_compiles()` to be sure. No weights are needed and no memory of the cache; nothing runs.

    Args:
        model: The model, or its compiled steps alone.
        buckets: A plan; a grid, of which all combinations of tokens and pages are compiled, for decode steps
            as well, and those may be many; or single buckets and plans of `plan_generation`.
        num_pages: Pages of the server's cache; needed for buckets.
        page_size: Tokens per page, as of `Server`.
        cache_dtype: Element type of the cache, as of `Server`.
        implementation: The implementation of attention, as of `Server`.
        progress: Whether to show a bar, if the standard error is a terminal.

    Raises:
        ValueError: If there are buckets and no `num_pages`, or a program cannot be compiled.
    """
    compiled = model.compiled if isinstance(model, Model) else model
    wanted = _listed(buckets)
    if num_pages is None and any(isinstance(entry, Bucket) for entry in wanted):
        raise ValueError(
            "num_pages was not given, and the programs of a server depend on it; give its cache's"
        )
    options: dict[str, Any] = {"page_size": page_size, "num_pages": num_pages, "cache_dtype": cache_dtype}
    before, started = len(compiled.programs), time.perf_counter()
    with count_compiles() as compiles, _bar(progress) as bar:
        task = bar.add_task("compiling", total=len(wanted))
        for entry in wanted:
            bar.update(task, description=f"compiling {_described(entry)}")
            if isinstance(entry, Bucket):
                compiled.empty_cache(**options)
                compiled.choose_tokens(entry, implementation=implementation, **options)
            else:
                entry(compiled)
            bar.advance(task)
        bar.update(task, description="compiled")
    return WarmupReport(
        programs=compiled.names[before:],
        seconds=time.perf_counter() - started,
        compiling_seconds=compiles.seconds,
        cache_hits=compiles.cache_hits,
    )


def measure_steps(
    model: Model,
    buckets: Sequence[Bucket],
    *,
    num_pages: int,
    page_size: int = DEFAULT_PAGE_SIZE,
    implementation: str | ChoiceTable = "auto",
    repeats: int = 5,
) -> list[float]:
    """Seconds of a server's step in each bucket, with greedy tokens, for `fit_cost`.

    Each bucket is filled as far as the cache allows. Buckets take turns, so that other work on the machine
    does not hit one alone; the median of the turns counts.

    Args:
        model: The model.
        buckets: The buckets; of several sizes in tokens and pages, with decode buckets among them.
        num_pages: Pages of the cache.
        page_size: Tokens per page.
        implementation: The implementation of attention.
        repeats: Turns.

    Raises:
        ValueError: If a bucket has no pages.
    """
    batches = [_full_batch(bucket, page_size, num_pages) for bucket in buckets]
    options: dict[str, Any] = {"page_size": page_size, "num_pages": num_pages}
    cache = model.empty_cache(**options)
    programs = [model.compiled.choose_tokens(b, implementation=implementation, **options) for b in buckets]
    seconds: list[list[float]] = [[] for _ in buckets]
    for turn in range(repeats + 1):
        for program, batch, measured in zip(programs, batches, seconds, strict=True):
            sampling = SamplingArrays.of((), batch.bucket.seqs, model.config.vocab_size)
            started = time.perf_counter()
            token_ids, cache = program(model.params, cache, batch, sampling)
            jax.block_until_ready((token_ids, cache))
            if turn:  # the first one is cold
                measured.append(time.perf_counter() - started)
    return [statistics.median(measured) for measured in seconds]


def _listed(buckets: BucketPlan | BucketGrid | Iterable[Warmable]) -> list[Warmable]:
    if isinstance(buckets, BucketPlan):
        return list(buckets.buckets)
    if isinstance(buckets, BucketGrid):
        pairs = itertools.product(buckets.tokens, buckets.pages)
        every = [Bucket(tokens, min(tokens, buckets.max_seqs), pages) for tokens, pages in pairs]
        return list(dict.fromkeys([*every, *(bucket.decode() for bucket in every)]))
    return list(buckets)


def _described(entry: Warmable) -> str:
    if not isinstance(entry, Bucket):
        return type(entry).__name__
    kind = "decode, " if entry.max_q_len == 1 else ""
    return f"{kind}{entry.tokens} tokens, {entry.pages} pages"


def _bar(shown: bool) -> Progress:
    return Progress(console=Console(stderr=True), disable=not (shown and sys.stderr.isatty()), transient=True)


def _full_batch(bucket: Bucket, page_size: int, num_pages: int) -> RaggedBatch:
    """A batch that fills a bucket with decoding rows, or chunks of prompts, of equal length."""
    listed = min(bucket.pages, num_pages)
    if listed == 0:
        raise ValueError(f"{bucket} has no pages; a server's steps are paged")
    rows = min(bucket.seqs, listed)
    counts = np.full(rows, listed // rows)
    q_lens = np.minimum(min(bucket.tokens // rows, bucket.max_q_len), counts * page_size)
    return nest_sequences(
        np.zeros(int(q_lens.sum()), np.int32),
        q_lens=q_lens,
        context_lens=counts * page_size - q_lens,
        page_tables=np.arange(int(counts.sum()), dtype=np.int32),
        page_counts=counts,
        page_size=page_size,
        num_pages=num_pages,
        bucket=bucket,
        transfer=False,
    )
