"""From prompts to new tokens: nest, prefill, and decode on the device; or in continuous batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.batch.bucket import Buckets
from jaxattn.batch.nest import DEFAULT_GRID, nest_sequences
from jaxattn.batch.numbers import positive_int
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.batch.rows import flatten_rows
from jaxattn.batch.trace import BatchLog
from jaxattn.cache.paged import DEFAULT_PAGE_SIZE
from jaxattn.cache.pool import PagePool
from jaxattn.cache.quantization import is_quantized
from jaxattn.models import Model, Sampling, check_cache_dtype, check_kv_scales
from jaxattn.models.options import (
    Limits,
    OnTokens,
    PromptOptions,
    RowOptions,
    StopTokens,
    options_per_prompt,
)
from jaxattn.models.sampling import GREEDY
from jaxattn.models.steps import Decoding
from jaxattn.serving.score import calibrate_kv_scales
from jaxattn.serving.server import serve
from jaxattn.serving.sizes import (
    GenerationPlan,
    compile_generation,
    fits_one_batch,
    pages_of_largest,
    plan_generation,
)
from jaxattn_kernels.arrays import KVScales

STREAM_EVERY = 8
"""Tokens per prompt between two trips to the host, where they are asked for as they come."""


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
    implementation: str | ChoiceTable = "auto",
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
        kv_scales: The scales `[L, K]` of a quantised cache. By default those that `calibrate_kv_scales`
            measures on these prompts, so that the tokens of each depend a little on the others.
        implementation: The implementation of attention; see `jaxattn.attention`.
        page_size: Tokens per page of the cache.
        grid: The buckets of one batch: a grid, or a plan of `plan_buckets`.
        log: Where to write the sizes of batches, for `plan_buckets`: of every step in continuous batches, of
            the prefill alone in one batch, whose decode steps never come back to the host.

    Returns:
        The new tokens of each prompt, in the order of the prompts; `max_new_tokens` of them, or
        fewer for a prompt that has stopped.

    Raises:
        ValueError: If an argument is out of range, or the cache cannot hold one of the prompts.
    """
    token_ids, lens = flatten_rows("prompts", prompts)
    asked = options_per_prompt(
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
        if num_pages is None:
            sizes["num_pages"] = pages_of_largest(lens, max_new_tokens, page_size)
        return serve(
            model,
            prompts,
            max_new_tokens,
            sampling=sampling,
            stop_token_ids=stop_token_ids,
            on_tokens=on_tokens,
            cache_dtype=cache_dtype,
            kv_scales=kv_scales,
            implementation=implementation,
            log=log,
            **sizes,
        )
    num_stop_tokens = max((len(one.stop_token_ids) for one in asked), default=0)
    plan = plan_generation(lens, max_new_tokens, num_stop_tokens=num_stop_tokens, grid=grid, **sizes)
    batch = _nest_with_room(token_ids, lens, asked, plan, model.config.vocab_size, log)
    if kv_scales is None and is_quantized(cache_dtype):
        kv_scales = calibrate_kv_scales(model, prompts, cache_dtype, implementation=implementation, grid=grid)
    results: list[list[int]] = [[] for _ in asked]
    for state in _decode_batch(
        model,
        batch,
        asked,
        plan,
        num_steps=plan.max_new_tokens if on_tokens is None else stream_every,
        cache_dtype=cache_dtype,
        kv_scales=kv_scales,
        implementation=implementation,
    ):
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


def _decode_batch(
    model: Model,
    batch: RaggedBatch,
    options: Sequence[PromptOptions],
    plan: GenerationPlan,
    *,
    num_steps: int,
    cache_dtype: jax.typing.DTypeLike,
    kv_scales: KVScales | None,
    implementation: str | ChoiceTable,
) -> Iterator[Decoding]:
    """Prefill, then decode until every prompt has ended: states, the first one with one token per prompt."""
    prefill, decode = compile_generation(
        model.compiled,
        plan,
        greedy=all(asked.sampling.temperature == 0 for asked in options),
        cache_dtype=cache_dtype,
        implementation=implementation,
    )
    cache = model.empty_cache(
        num_pages=plan.num_pages, page_size=plan.page_size, cache_dtype=cache_dtype, kv_scales=kv_scales
    )
    rows = RowOptions.of(
        options,
        num_rows=plan.decode_bucket.seqs,
        max_stop_tokens=plan.max_stop_tokens,
        vocab_size=model.config.vocab_size,
    )
    state, cache = prefill(model.params, cache, batch, rows)
    yield state
    while np.asarray(state.active).any():
        state, cache = decode(model.params, cache, state, rows, np.int32(num_steps))
        yield state


def _collect(results: list[list[int]], state: Decoding, on_tokens: OnTokens | None) -> None:
    """Append to each prompt's tokens those that are new in a state."""
    tokens, num_tokens = np.asarray(state.tokens), np.asarray(state.num_tokens)
    for i, result in enumerate(results):
        new = tokens[i, len(result) : num_tokens[i]].tolist()
        result.extend(new)
        if new and on_tokens is not None:
            on_tokens(i, new)
