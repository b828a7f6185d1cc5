"""From prompts to logits or new tokens: nest, prefill, decode on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.batch import DEFAULT_GRID, nest_sequences
from jaxattn.buckets import BucketGrid, quarter_steps
from jaxattn.cache import PagePool
from jaxattn.models import Model, init_cache
from jaxattn.models.steps import NO_STOP_TOKEN

DEFAULT_PAGE_SIZE = 16


def compute_logits(
    model: Model,
    prompts: Sequence[Any],
    *,
    implementation: str = "auto",
    grid: BucketGrid = DEFAULT_GRID,
) -> list[np.ndarray]:
    """Logits of every token of every prompt, in one ragged batch without padding between them.

    Args:
        model: The model.
        prompts: Token ids, one list or 1-D integer array per prompt.
        implementation: Of the attention; see `jaxattn.attention`.
        grid: The buckets to choose from.

    Returns:
        One float32 array `[len(prompt), vocab_size]` per prompt.

    Raises:
        ValueError: If the prompts are empty, hold an id outside the vocabulary, or fit no bucket.
    """
    batch = nest_sequences(prompts, vocab_size=model.config.vocab_size, bucket=grid)
    logits = model.programs.score(batch.bucket, implementation=implementation)(model.params, batch)
    ends = np.cumsum([len(prompt) for prompt in prompts])
    return np.split(np.asarray(logits)[: ends[-1]], ends[:-1])


def generate(
    model: Model,
    prompts: Sequence[Any],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
    stop_token_id: int | None = None,
    implementation: str = "auto",
    page_size: int = DEFAULT_PAGE_SIZE,
    grid: BucketGrid = DEFAULT_GRID,
) -> list[list[int]]:
    """Continue every prompt: one ragged prefill, then one loop on the device.

    Pages for the prompts and all new tokens are reserved first, so that the loop never has to
    come back to the host.

    Args:
        model: The model.
        prompts: Token ids, one list or 1-D integer array per prompt.
        max_new_tokens: Tokens to add to each prompt.
        temperature: 0 takes the likeliest token; above, a draw from softmax(logits / temperature).
        top_k: Draw among this many likeliest tokens only.
        key: Random key; required where `temperature` is above 0.
        stop_token_id: A sequence that chooses this token ends with it.
        implementation: Of the attention; see `jaxattn.attention`.
        page_size: Tokens per page of the cache.
        grid: The buckets to choose from.

    Returns:
        The new tokens of each prompt, in the order of the prompts; `max_new_tokens` of them, or
        fewer for a sequence that has stopped.

    Raises:
        ValueError: If an argument is out of range, or the prompts fit no bucket.
    """
    _check_sampling(model, max_new_tokens, temperature, top_k, key, stop_token_id)
    lens = [len(prompt) for prompt in prompts]
    counts = [-(-(length + max_new_tokens) // page_size) for length in lens] if page_size > 0 else [0]
    # One bucket for prefill; its page list holds what the decode loop will need as well.
    bucket = grid.pick(tokens=max(sum(lens), 1), seqs=max(len(lens), 1), pages=sum(counts))
    pool = PagePool(bucket.pages, page_size)
    batch = nest_sequences(
        prompts,
        page_tables=[pool.allocate(length + max_new_tokens) for length in lens],
        page_size=page_size,
        num_pages=bucket.pages,
        vocab_size=model.config.vocab_size,
        bucket=bucket,
    )
    decode_bucket = bucket.decode(_round_up(len(lens), bucket.seqs))
    shared: dict[str, Any] = {
        "page_size": page_size,
        "num_pages": bucket.pages,
        "implementation": implementation,
    }
    prefill = model.programs.prefill(bucket, decode_seqs=decode_bucket.seqs, **shared)
    decode = model.programs.decode(
        decode_bucket,
        max_new_tokens=_round_up(max_new_tokens),
        greedy=temperature == 0,
        top_k=top_k,
        **shared,
    )
    cache = init_cache(model.config, num_pages=bucket.pages, page_size=page_size, dtype=model.programs.dtype)
    logits, cache, batch = prefill(model.params, cache, batch)
    tokens, num_tokens, _ = decode(
        model.params,
        cache,
        batch,
        logits,
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        jnp.int32(max_new_tokens),
        jnp.int32(NO_STOP_TOKEN if stop_token_id is None else stop_token_id),
    )
    tokens, num_tokens = np.asarray(tokens), np.asarray(num_tokens)
    return [tokens[i, : num_tokens[i]].tolist() for i in range(len(lens))]


def _round_up(n: int, largest: int | None = None) -> int:
    """The quarter step at or above n, but no more than `largest`: few sizes, few programs."""
    above = next(size for size in quarter_steps(1, 2 * n) if size >= n)
    return above if largest is None else min(above, largest)


def _check_sampling(
    model: Model,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    key: jax.Array | None,
    stop_token_id: int | None,
) -> None:
    vocab_size = model.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws at random; give key=jax.random.key(seed)")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k={top_k} must lie between 1 and vocab_size={vocab_size}")
    if stop_token_id is not None and not 0 <= stop_token_id < vocab_size:
        raise ValueError(
            f"stop_token_id={stop_token_id} must lie between 0 and vocab_size-1={vocab_size - 1}"
        )
