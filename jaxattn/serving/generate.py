"""From prompts to new tokens: nest, prefill, and decode on the device; or in continuous batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxattn.batch.bucket import Bucket, Buckets, quarter_steps
from jaxattn.batch.nest import DEFAULT_GRID, nest_sequences
from jaxattn.batch.numbers import positive_int
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.batch.rows import flatten_rows
from jaxattn.batch.trace import BatchLog
from jaxattn.cache.paged import DEFAULT_PAGE_SIZE
from jaxattn.cache.pool import PagePool
from jaxattn.cache.quantization import is_quantized
from jaxattn.models import CompiledSteps, Model, Sampling, check_cache_dtype, check_kv_scales
from jaxattn.models.options import (
    Limits,
    OnTokens,
    PromptOptions,
    RowOptions,
    StopTokens,
    limits_per_prompt,
    options_per_prompt,
)
from jaxattn.models.sampling import GREEDY
from jaxattn.models.steps import Decoding
from jaxattn.serving.score import calibrate_kv_scales
from jaxattn.serving.server import MAX_SEQS, serve
from jaxattn_kernels.arrays import KVScales

STREAM_EVERY = 8
"""Tokens per prompt between two trips to the host, where they are asked for as they come."""

_MIN_STOP_TOKENS = 8  # room for so many in every program: few models have more


class GenerationPlan(NamedTuple):
    """The static sizes of a run of `generate`, known from lengths alone; a bucket of `load_model`.

    Attributes:
        bucket: Of the prefill.
        decode_bucket: Of each step after it.
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
        """Have the programs compile what a run with the defaults of `generate` needs."""
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
    """The sizes that prompts of these lengths will be run in, all of them in one batch.

    Args:
        prompt_lens: Tokens of each prompt.
        max_new_tokens: The most tokens to add, to every prompt or to each.
        num_stop_tokens: The most stop tokens of a prompt; up to 8 make no difference.
        num_pages: The most pages of the cache; by default as many as are needed.
        page_size: Tokens per page of the cache.
        grid: The buckets to choose from.

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
    """Whether `generate` runs prompts of these lengths in one batch, or in continuous batches.

    In one batch, if the prompts fit a bucket of the grid, and they and all their new tokens the pages of
    the cache.

    Args:
        prompt_lens: As of `plan_generation`, like all arguments.
        max_new_tokens: The most tokens to add, to every prompt or to each.
        num_pages: The most pages of the cache.
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
    implementation: str = "auto",
) -> tuple[Callable, Callable]:
    """The prefill and decode programs of a plan, and that of its cache; compiled now if they were not before.

    No weights are needed: a call of this may be one of the `buckets` of `load_model`, and runs while they
    are being read. Limits, stop tokens and how to draw are arguments of the programs.

    Args:
        compiled: The compiled steps of the model.
        plan: From `plan_generation`.
        greedy: Whether every temperature is 0; random draws make programs longer.
        cache_dtype: As of `generate`.
        implementation: Of the attention.

    Returns:
        Prefill and decode.

    Raises:
        ValueError: If no cache can have this dtype.
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


def generate(
    model: Model,
    prompts: Sequence[Any],
    max_new_tokens: Limits,
    *,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_token_ids: StopTokens = (),
    on_tokens: OnTokens | None = None,
    stream_every: int = STREAM_EVERY,
    num_pages: int | None = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
    kv_scales: KVScales | None = None,
    implementation: str = "auto",
    page_size: int = DEFAULT_PAGE_SIZE,
    grid: Buckets = DEFAULT_GRID,
    log: BatchLog | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Where all prompts fit one batch (`fits_one_batch`), by one ragged prefill and one loop on the device,
    with pages for all new tokens reserved first. Where they do not, in continuous batches (`serve`) over a
    cache of `num_pages` pages. A prompt gets the same tokens either way, whatever the other prompts are.

    Args:
        model: The model.
        prompts: Token ids, one list or 1-D integer array per prompt.
        max_new_tokens: The most tokens to add, to every prompt or to each.
        sampling: How tokens are chosen; the likeliest ones by default. Given once, prompt i draws with
            `seed + i`; or one per prompt.
        stop_token_ids: A prompt ends with any of these tokens, which is its last; the same for all
            prompts, or one collection per prompt.
        on_tokens: Called with the number of a prompt and a list of new tokens of it, as they come.
        stream_every: In one batch, how many tokens per prompt come at a time, after the first one. Each
            time the device waits for the host, and without `on_tokens` it never does. Continuous batches
            come back for every token.
        num_pages: The most pages of the cache; by default as many as one batch needs, or 32 of the prompts
            in continuous batches.
        cache_dtype: Element type of the cache: that of the parameters, which is the default, or a quantised
            one, "int8", "float8_e4m3fn" or "float8_e5m2".
        kv_scales: Of a quantised cache, its scales. By default those that `calibrate_kv_scales` measures on
            these prompts, so that the tokens of each depend a little on the others.
        implementation: Of the attention; see `jaxattn.attention`.
        page_size: Tokens per page of the cache.
        grid: The buckets of one batch: a grid, or a plan of `plan_buckets`.
        log: Where to write the sizes of batches, for `plan_buckets`: every step of continuous batches. Of one
            batch it is the prefill alone, since its decode steps never come back to the host.

    Returns:
        The new tokens of each prompt, in the order of the prompts; `max_new_tokens` of them, or
        fewer for a prompt that has stopped.

    Raises:
        ValueError: If an argument is out of range, or the cache cannot hold one of the prompts.
    """
    token_ids, lens = flatten_rows("prompts", prompts)
    options = options_per_prompt(
        lens.size,
        max_new_tokens,
        sampling=sampling,
        stop_token_ids=stop_token_ids,
        vocab_size=model.config.vocab_size,
    )
    positive_int("stream_every", stream_every)
    cache_dtype = check_cache_dtype(cache_dtype, model.compiled.dtype)
    check_kv_scales(kv_scales, model.config, cache_dtype)
    sizes: dict[str, Any] = {"num_pages": num_pages, "page_size": page_size}
    if not fits_one_batch(lens, max_new_tokens, grid=grid, **sizes):
        pages = np.sort(_pages_per_prompt(lens, max_new_tokens, page_size))
        return serve(
            model,
            prompts,
            max_new_tokens,
            sampling=sampling,
            stop_token_ids=stop_token_ids,
            on_tokens=on_tokens,
            num_pages=int(pages[-MAX_SEQS:].sum()) if num_pages is None else num_pages,
            page_size=page_size,
            cache_dtype=cache_dtype,
            kv_scales=kv_scales,
            implementation=implementation,
            log=log,
        )
    num_stop_tokens = max((len(asked.stop_token_ids) for asked in options), default=0)
    plan = plan_generation(lens, max_new_tokens, num_stop_tokens=num_stop_tokens, grid=grid, **sizes)
    batch = _nest_with_room(token_ids, lens, options, plan, model.config.vocab_size, log)
    prefill, decode = compile_generation(
        model.compiled,
        plan,
        greedy=all(asked.sampling.temperature == 0 for asked in options),
        cache_dtype=cache_dtype,
        implementation=implementation,
    )
    if kv_scales is None and is_quantized(cache_dtype):
        kv_scales = calibrate_kv_scales(model, prompts, cache_dtype, implementation=implementation, grid=grid)
    cache = model.empty_cache(
        num_pages=plan.num_pages, page_size=page_size, cache_dtype=cache_dtype, kv_scales=kv_scales
    )
    rows = RowOptions.of(
        options,
        num_rows=plan.decode_bucket.seqs,
        max_stop_tokens=plan.max_stop_tokens,
        vocab_size=model.config.vocab_size,
    )
    num_steps = np.int32(plan.max_new_tokens if on_tokens is None else stream_every)
    results: list[list[int]] = [[] for _ in options]
    state, cache = prefill(model.params, cache, batch, rows)
    _collect(results, state, on_tokens)
    while np.asarray(state.active).any():
        state, cache = decode(model.params, cache, state, rows, num_steps)
        _collect(results, state, on_tokens)
    return results


def _nest_with_room(
    token_ids: np.ndarray,
    lens: np.ndarray,
    options: Sequence[PromptOptions],
    plan: GenerationPlan,
    vocab_size: int,
    log: BatchLog | None,
) -> RaggedBatch:
    """The batch of all prompts, with pages for all their new tokens."""
    pool = PagePool(plan.num_pages, plan.page_size)
    rooms = [int(length) + asked.max_new_tokens for length, asked in zip(lens, options, strict=True)]
    return nest_sequences(
        token_ids,
        q_lens=lens,
        page_tables=[pool.allocate(room) for room in rooms],
        page_size=plan.page_size,
        num_pages=plan.num_pages,
        vocab_size=vocab_size,
        bucket=plan.bucket,
        transfer=False,
        log=log,
    )


def _collect(results: list[list[int]], state: Decoding, on_tokens: OnTokens | None) -> None:
    """Append to each prompt's tokens those that are new in a state."""
    tokens, num_tokens = np.asarray(state.tokens), np.asarray(state.num_tokens)
    for i, result in enumerate(results):
        new = tokens[i, len(result) : num_tokens[i]].tolist()
        result.extend(new)
        if new and on_tokens is not None:
            on_tokens(i, new)


def _pages_per_prompt(
    prompt_lens: Sequence[int] | np.ndarray, max_new_tokens: Limits, page_size: int
) -> np.ndarray:
    """Pages for a prompt and all its new tokens: decoding never returns to the host for more."""
    positive_int("page_size", page_size)
    lens = np.asarray(prompt_lens, np.int64)
    limits = np.array(limits_per_prompt(lens.size, max_new_tokens), np.int64)
    return -(-(lens + limits) // page_size)


def _next_size(n: int) -> int:
    """The quarter step at or above n: few sizes, few programs."""
    return next(size for size in quarter_steps(1, 2 * n) if size >= n)
