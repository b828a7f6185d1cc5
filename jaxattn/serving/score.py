"""Prompts through one packed forward pass, without a cache: their logits, and the scales of a cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.batch.bucket import Buckets
from jaxattn.batch.nest import DEFAULT_GRID, nest_sequences
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.cache.quantization import QUANTIZED_DTYPES, is_quantized
from jaxattn.compiling.context import neutral_context
from jaxattn.models import Model, check_cache_dtype, check_kv_scales
from jaxattn_kernels.arrays import KVScales


def compute_logits(
    model: Model,
    prompts: Sequence[Any],
    *,
    implementation: str | ChoiceTable = "auto",
    grid: Buckets = DEFAULT_GRID,
) -> list[np.ndarray]:
    """Logits of every token of every prompt, in one ragged batch without padding between them.

    Args:
        model: The model.
        prompts: Token ids, one list or 1-D integer array per prompt.
        implementation: The implementation of attention; see `jaxattn.attention`.
        grid: The buckets to choose from.

    Returns:
        One float32 array `[len(prompt), vocab_size]` per prompt; they share memory, read-only.

    Raises:
        ValueError: If the prompts are empty, hold an id outside the vocabulary, or fit no bucket.
    """
    batch = nest_sequences(prompts, vocab_size=model.config.vocab_size, bucket=grid, transfer=False)
    logits = model.compiled.score(batch.bucket, implementation=implementation)(model.params, batch)
    ends = np.cumsum([len(prompt) for prompt in prompts])
    return np.split(np.asarray(logits)[: ends[-1]], ends[:-1])


def calibrate_kv_scales(
    model: Model,
    prompts: Sequence[Any],
    cache_dtype: jax.typing.DTypeLike,
    *,
    implementation: str | ChoiceTable = "auto",
    grid: Buckets = DEFAULT_GRID,
) -> KVScales:
    """Scales of a quantised cache, measured on prompts by a prefill that nothing quantises.

    The largest absolute key of each layer and head, and the largest value, become the largest number that
    can be stored. What exceeds them later is stored as that number: take prompts that stand for all texts.

    Args:
        model: The model.
        prompts: Token ids, one list or 1-D integer array per prompt; in as many batches as the grid needs.
        cache_dtype: "int8", "float8_e4m3fn" or "float8_e5m2".
        implementation: The implementation of attention; see `jaxattn.attention`.
        grid: The buckets to choose from.

    Returns:
        Scales `[L, K]` of keys and values, per layer and key head; float32.

    Raises:
        ValueError: If the dtype is none of a quantised cache, the prompts are empty, hold an id outside the
            vocabulary or one fits no bucket, or a key or value is not finite.
    """
    cache_dtype = check_cache_dtype(cache_dtype, model.compiled.dtype)
    if not is_quantized(cache_dtype):
        raise ValueError(
            f"cache_dtype={cache_dtype.name} needs no scales; use one of {', '.join(QUANTIZED_DTYPES)}"
        )
    kv_scales = functools.reduce(
        _larger_scales,
        (
            model.compiled.calibrate(batch.bucket, cache_dtype=cache_dtype, implementation=implementation)(
                model.params, batch
            )
            for batch in _nest_batches(prompts, model.config.vocab_size, grid)
        ),
    )
    check_kv_scales(kv_scales, model.config, cache_dtype)
    return kv_scales


@neutral_context()
def _larger_scales(a: KVScales, b: KVScales) -> KVScales:
    return KVScales(jnp.maximum(a.k, b.k), jnp.maximum(a.v, b.v))


def _nest_batches(prompts: Sequence[Any], vocab_size: int, grid: Buckets) -> Iterator[RaggedBatch]:
    """The prompts in their order, each batch as long as the grid allows."""
    start, num_tokens = 0, 0
    for i, prompt in enumerate(prompts):
        if i > start and not grid.holds(tokens=num_tokens + len(prompt), seqs=i + 1 - start):
            yield nest_sequences(prompts[start:i], vocab_size=vocab_size, bucket=grid, transfer=False)
            start, num_tokens = i, 0
        num_tokens += len(prompt)
    yield nest_sequences(prompts[start:], vocab_size=vocab_size, bucket=grid, transfer=False)
