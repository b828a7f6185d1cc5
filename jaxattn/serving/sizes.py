"""The static sizes of a run, known from lengths alone, and the programs that these sizes need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.batch.bucket import Bucket, Buckets, quarter_steps
from jaxattn.batch.nest import DEFAULT_GRID
from jaxattn.batch.numbers import positive_int
from jaxattn.cache.paged import DEFAULT_PAGE_SIZE
from jaxattn.models import CompiledSteps
from jaxattn.models.options import Limits, limits_per_prompt

MAX_SEQS = 32
"""Requests of continuous batches that run at a time where nothing else is asked for."""

_MIN_STOP_TOKENS = 8  # room for so many in every program: few models have more


class GenerationPlan(NamedTuple):
    """The static sizes of a run of `generate` in one batch; it may stand among the `buckets` of `load_model`.

    Attributes:
        bucket: The bucket of the prefill.
        decode_bucket: The bucket of each step after it, one token per row.
        page_size: Tokens per page.
        num_pages: Pages of the cache.
        max_new_tokens: Room for new tokens of a prompt.
        max_stop_tokens: Room for stop tokens of a prompt.
    """

    bucket: Bucket
    decode_bucket: Bucket
    page_size: int
    num_pages: int
    max_new_tokens: int
    max_stop_tokens: int

    def __call__(self, compiled: CompiledSteps) -> None:
        """Compile what a run with the defaults of `generate` needs."""
        compile_generation(compiled, self)


def plan_generation(
    prompt_lens: Sequence[int] | np.ndarray,
    max_new_tokens: Limits,
    *,
    num_stop_tokens: int = 0,
    num_pages: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    grid: Buckets = DEFAULT_GRID,
) -> GenerationPlan:
    """Choose the sizes in which `generate` runs prompts of these lengths in one batch.

    Sizes are rounded up to quarter steps between powers of two, so that few programs serve many runs.

    Args:
        prompt_lens: `[prompts]` Tokens of each prompt.
        max_new_tokens: The most tokens to add: one number for all prompts, or one per prompt.
        num_stop_tokens: The largest number of stop tokens of a prompt; up to 8 make no difference.
        num_pages: The most pages the cache may have; by default as many as are needed.
        page_size: Tokens per page of the cache.
        grid: The buckets to choose from.

    Returns:
        The sizes of the prefill, of the decode steps and of the cache.

    Raises:
        ValueError: If a size is not a positive integer, or the prompts do not fit one batch
            (see `fits_one_batch`).
    """
    pages = _pages_per_prompt(prompt_lens, max_new_tokens, page_size)
    needed = int(pages.sum())
    if pages.size == 0:
        raise ValueError("prompts is empty; give at least one prompt")
    if num_pages is not None and needed > num_pages:
        raise ValueError(
            f"the prompts and their new tokens need {needed} pages of {page_size} tokens, but "
            f"num_pages={num_pages}; raise it, or generate in continuous batches"
        )
    num_tokens = int(np.sum(prompt_lens, dtype=np.int64))
    bucket = grid.pick(tokens=max(num_tokens, 1), seqs=pages.size, pages=needed)
    roomy = _next_size(needed)
    return GenerationPlan(
        bucket=bucket,
        decode_bucket=bucket.decode(min(_next_size(pages.size), bucket.seqs)),
        page_size=page_size,
        num_pages=roomy if num_pages is None else min(roomy, num_pages),
        max_new_tokens=_next_size(max(limits_per_prompt(pages.size, max_new_tokens))),
        max_stop_tokens=_next_size(max(num_stop_tokens, _MIN_STOP_TOKENS)),
    )


def fits_one_batch(
    prompt_lens: Sequence[int] | np.ndarray,
    max_new_tokens: Limits,
    *,
    num_pages: int | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    grid: Buckets = DEFAULT_GRID,
) -> bool:
    """Whether `generate` runs prompts of these lengths in one batch; it takes continuous batches otherwise.

    They fit one batch if a bucket of the grid holds the prompts, and the cache holds the prompts with all
    their new tokens.

    Args:
        prompt_lens: `[prompts]` Tokens of each prompt.
        max_new_tokens: The most tokens to add: one number for all prompts, or one per prompt.
        num_pages: The most pages the cache may have; None for as many as are needed.
        page_size: Tokens per page of the cache.
        grid: The buckets to choose from.

    Raises:
        ValueError: If a size is not a positive integer.
    """
    pages = _pages_per_prompt(prompt_lens, max_new_tokens, page_size)
    if num_pages is not None:
        positive_int("num_pages", num_pages)
    needed, num_tokens = int(pages.sum()), int(np.sum(prompt_lens, dtype=np.int64))
    return grid.holds(tokens=num_tokens, seqs=pages.size, pages=needed) and needed <= (num_pages or needed)


def compile_generation(
    compiled: CompiledSteps,
    plan: GenerationPlan,
    *,
    greedy: bool = True,
    cache_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | ChoiceTable = "auto",
) -> tuple[Callable, Callable]:
    """Compile the three programs of a run in one batch: its empty cache, its prefill, its decode loop.

    Programs that the model has already are kept. No weights are needed: a call of this may be one of the
    `buckets` of `load_model`, and runs while they are being read. Limits, stop tokens and sampling are
    arguments of the programs.

    Args:
        compiled: The compiled steps of the model, `Model.compiled`.
        plan: The sizes, from `plan_generation`.
        greedy: Whether every temperature is 0; random draws make programs longer.
        cache_dtype: Element type of the cache; None for that of the parameters.
        implementation: The implementation of attention; see `jaxattn.attention`.

    Returns:
        The programs `(params, cache, batch, options) -> (state, cache)` of the prefill and
            `(params, cache, state, options, num_steps) -> (state, cache)` of the decode loop.

    Raises:
        ValueError: If no cache can have this dtype, or a program may not be compiled (`compile="none"`).
    """
    compiled.empty_cache(num_pages=plan.num_pages, page_size=plan.page_size, cache_dtype=cache_dtype)
    shared: dict[str, Any] = {
        "page_size": plan.page_size,
        "num_pages": plan.num_pages,
        "max_new_tokens": plan.max_new_tokens,
        "max_stop_tokens": plan.max_stop_tokens,
        "greedy": greedy,
        "cache_dtype": cache_dtype,
        "implementation": implementation,
    }
    prefill = compiled.prefill(plan.bucket, decode_seqs=plan.decode_bucket.seqs, **shared)
    return prefill, compiled.decode(plan.decode_bucket, **shared)


def largest_step(
    *, num_pages: int, token_budget: int = 256, max_seqs: int = MAX_SEQS, share_prefixes: bool = True
) -> Bucket:
    """The smallest bucket that holds every step a `Server` with these arguments can take.

    It is what `plan_buckets` needs as its `limits`.

    Args:
        num_pages: Pages of the cache.
        token_budget: The most query tokens per step.
        max_seqs: The most requests that run at a time.
        share_prefixes: Whether requests share pages; a shared page is listed once per row.
    """
    num_seqs = min(max_seqs, token_budget)
    return Bucket(token_budget, num_seqs, num_pages * (num_seqs if share_prefixes else 1))


def pages_of_largest(prompt_lens: Sequence[int] | np.ndarray, max_new_tokens: Limits, page_size: int) -> int:
    """Pages with which the `MAX_SEQS` largest prompts can run at a time: the default of continuous batches.

    Raises:
        ValueError: If a size is not an integer of at least 1.
    """
    return int(np.sort(_pages_per_prompt(prompt_lens, max_new_tokens, page_size))[-MAX_SEQS:].sum())


def _pages_per_prompt(
    prompt_lens: Sequence[int] | np.ndarray, max_new_tokens: Limits, page_size: int
) -> np.ndarray:
    """Pages for each prompt and all its new tokens: decoding never returns to the host for more."""
    positive_int("page_size", page_size)
    lens = np.asarray(prompt_lens, np.int64)
    limits = np.array(limits_per_prompt(lens.size, max_new_tokens), np.int64)
    return -(-(lens + limits) // page_size)


def _next_size(n: int) -> int:
    """The quarter step at or above n: few sizes, few programs."""
    return next(size for size in quarter_steps(1, 2 * n) if size >= n)
