"""From prompts to logits or new tokens: nest, prefill, decode on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.batch import DEFAULT_GRID, flatten_rows, nest_sequences
from jaxattn.buckets import Bucket, BucketGrid, quarter_steps
from jaxattn.cache import QUANTIZED_DTYPES, PagePool, is_quantized
from jaxattn.models import Model, Programs, check_cache_dtype, check_kv_scales, init_cache
from jaxattn.models.steps import NO_STOP_TOKEN
from jaxattn_kernels.arrays import KVScales

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
        One float32 array `[len(prompt), vocab_size]` per prompt; they share memory, read-only.

    Raises:
        ValueError: If the prompts are empty, hold an id outside the vocabulary, or fit no bucket.
    """
    batch = nest_sequences(prompts, vocab_size=model.config.vocab_size, bucket=grid)
    logits = model.programs.score(batch.bucket, implementation=implementation)(model.params, batch)
    ends = np.cumsum([len(prompt) for prompt in prompts])
    return np.split(np.asarray(logits)[: ends[-1]], ends[:-1])


def calibrate_kv_scales(
    model: Model,
    prompts: Sequence[Any],
    cache_dtype: jax.typing.DTypeLike,
    *,
    implementation: str = "auto",
    grid: BucketGrid = DEFAULT_GRID,
) -> KVScales:
    """Scales of a quantised cache, measured on prompts by one prefill that nothing quantises.

    The largest absolute key of each layer and head, and the largest value, become the largest number that
    can be stored. What exceeds them later is stored as that number: take prompts that stand for all texts.

    Args:
        model: The model.
        prompts: Token ids, one list or 1-D integer array per prompt; all of them in one batch.
        cache_dtype: "int8", "float8_e4m3fn" or "float8_e5m2".
        implementation: Of the attention; see `jaxattn.attention`.
        grid: The buckets to choose from.

    Returns:
        Scales `[L, K]` of keys and values, per layer and key head; float32.

    Raises:
        ValueError: If the dtype is none of a quantised cache, the prompts are empty, hold an id outside the
            vocabulary or fit no bucket, or a key or value is not finite.
    """
    cache_dtype = check_cache_dtype(cache_dtype, model.programs.dtype)
    if not is_quantized(cache_dtype):
        raise ValueError(
            f"cache_dtype={cache_dtype.name} needs no scales; use one of {', '.join(QUANTIZED_DTYPES)}"
        )
    batch = nest_sequences(prompts, vocab_size=model.config.vocab_size, bucket=grid)
    calibrate = model.programs.calibrate(batch.bucket, cache_dtype=cache_dtype, implementation=implementation)
    kv_scales = calibrate(model.params, batch)
    check_kv_scales(kv_scales, model.config, cache_dtype)
    return kv_scales


class GenerationPlan(NamedTuple):
    """The static sizes of a run of `generate`, known from lengths alone; a bucket of `load_model`.

    Attributes:
        bucket: Of the prefill.
        decode_bucket: Of each step after it.
        page_size: Tokens per page.
        num_pages: Pages of the cache.
        max_new_tokens: Room for new tokens.
    """

    bucket: Bucket
    decode_bucket: Bucket
    page_size: int
    num_pages: int
    max_new_tokens: int

    def __call__(self, programs: Programs) -> None:
        """Have the programs compile what a run with the defaults of `generate` needs."""
        compile_generation(programs, self)


def plan_generation(
    prompt_lens: Sequence[int] | np.ndarray,
    max_new_tokens: int,
    *,
    page_size: int = DEFAULT_PAGE_SIZE,
    grid: BucketGrid = DEFAULT_GRID,
) -> GenerationPlan:
    """The sizes that prompts of these lengths will be run in.

    Args:
        prompt_lens: Tokens of each prompt.
        max_new_tokens: Tokens to add to each.
        page_size: Tokens per page of the cache.
        grid: The buckets to choose from.

    Raises:
        ValueError: If a size is not a positive integer, or nothing in the grid fits.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("page_size", page_size)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    lens = np.asarray(prompt_lens, np.int64)
    if lens.size == 0:
        raise ValueError("prompts is empty; give at least one prompt")
    # Pages for all new tokens are in the list from the start: decoding never returns to the host.
    num_pages = int((-(-(lens + max_new_tokens) // page_size)).sum())
    bucket = grid.pick(tokens=max(int(lens.sum()), 1), seqs=lens.size, pages=num_pages)
    return GenerationPlan(
        bucket=bucket,
        decode_bucket=bucket.decode(min(_next_size(lens.size), bucket.seqs)),
        page_size=page_size,
        num_pages=_next_size(num_pages),
        max_new_tokens=_next_size(max_new_tokens),
    )


def compile_generation(
    programs: Programs,
    plan: GenerationPlan,
    *,
    greedy: bool = True,
    top_k: int | None = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
    implementation: str = "auto",
) -> tuple[Callable, Callable]:
    """The prefill and decode programs of a plan; compiled now if they were not before.

    No weights are needed: a call of this may be one of the `buckets` of `load_model`, and runs while they
    are being read.

    Args:
        programs: Of the model.
        plan: From `plan_generation`.
        greedy: Whether the likeliest token is taken.
        top_k: As of `generate`; without meaning when greedy.
        cache_dtype: As of `generate`.
        implementation: Of the attention.

    Raises:
        ValueError: If no cache can have this dtype.
    """
    shared: dict[str, Any] = {
        "page_size": plan.page_size,
        "num_pages": plan.num_pages,
        "cache_dtype": cache_dtype,
        "implementation": implementation,
    }
    prefill = programs.prefill(plan.bucket, decode_seqs=plan.decode_bucket.seqs, **shared)
    decode = programs.decode(
        plan.decode_bucket,
        max_new_tokens=plan.max_new_tokens,
        greedy=greedy,
        top_k=None if greedy else top_k,
        **shared,
    )
    return prefill, decode


def generate(
    model: Model,
    prompts: Sequence[Any],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
    stop_token_id: int | None = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
    kv_scales: KVScales | None = None,
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
        key: Random key, one of `jax.random.key`; required where `temperature` is above 0.
        stop_token_id: A sequence that chooses this token ends with it.
        cache_dtype: Element type of the cache: that of the parameters, which is the default, or a quantised
            one, "int8", "float8_e4m3fn" or "float8_e5m2".
        kv_scales: Of a quantised cache, its scales. By default those that `calibrate_kv_scales` measures on
            these prompts, so that the tokens of each depend a little on the others.
        implementation: Of the attention; see `jaxattn.attention`.
        page_size: Tokens per page of the cache.
        grid: The buckets to choose from.

    Returns:
        The new tokens of each prompt, in the order of the prompts; `max_new_tokens` of them, or
        fewer for a sequence that has stopped.

    Raises:
        ValueError: If an argument is out of range, or the prompts fit no bucket.
    """
    token_ids, lens = flatten_rows("prompts", prompts)
    plan = plan_generation(lens, max_new_tokens, page_size=page_size, grid=grid)
    _check_sampling(model, temperature, top_k, key, stop_token_id)
    cache_dtype = check_cache_dtype(cache_dtype, model.programs.dtype)
    check_kv_scales(kv_scales, model.config, cache_dtype)
    pool = PagePool(plan.num_pages, page_size)
    batch = nest_sequences(
        token_ids,
        q_lens=lens,
        page_tables=[pool.allocate(int(length) + max_new_tokens) for length in lens],
        page_size=page_size,
        num_pages=plan.num_pages,
        vocab_size=model.config.vocab_size,
        bucket=plan.bucket,
    )
    prefill, decode = compile_generation(
        model.programs,
        plan,
        greedy=temperature == 0,
        top_k=top_k,
        cache_dtype=cache_dtype,
        implementation=implementation,
    )
    if kv_scales is None and is_quantized(cache_dtype):
        kv_scales = calibrate_kv_scales(model, prompts, cache_dtype, implementation=implementation, grid=grid)
    cache = init_cache(
        model.config,
        num_pages=plan.num_pages,
        page_size=page_size,
        dtype=cache_dtype,
        kv_scales=kv_scales,
        stack_layers=model.programs.stack_layers,
    )
    logits, cache, batch = prefill(model.params, cache, batch)
    tokens, num_tokens, _ = decode(
        model.params,
        cache,
        batch,
        logits,
        jax.random.key(0) if key is None else _typed_key(key),
        jnp.float32(temperature),
        jnp.int32(max_new_tokens),
        jnp.int32(NO_STOP_TOKEN if stop_token_id is None else stop_token_id),
    )
    tokens, num_tokens = np.asarray(tokens), np.asarray(num_tokens)
    return [tokens[i, : num_tokens[i]].tolist() for i in range(lens.size)]


def _next_size(n: int) -> int:
    """The quarter step at or above n: few sizes, few programs."""
    return next(size for size in quarter_steps(1, 2 * n) if size >= n)


def _typed_key(key: jax.Array) -> jax.Array:
    """A key of `jax.random.key`, of one of `jax.random.PRNGKey`, too."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    default = jax.eval_shape(jax.random.key, 0)
    if key.dtype != default.dtype or key.shape:
        raise ValueError(
            f"key is {key.dtype}{list(key.shape)}; expected one {default.dtype}, as of jax.random.key"
        )
    return key


def _check_sampling(
    model: Model,
    temperature: float,
    top_k: int | None,
    key: jax.Array | None,
    stop_token_id: int | None,
) -> None:
    vocab_size = model.config.vocab_size
    smallest, largest = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max)
    if temperature != 0 and not smallest <= temperature <= largest:
        raise ValueError(f"temperature={temperature} must be 0 (greedy), or positive and within float32")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws at random; give key=jax.random.key(seed)")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k={top_k} must lie between 1 and vocab_size={vocab_size}")
    if stop_token_id is not None and not 0 <= stop_token_id < vocab_size:
        raise ValueError(
            f"stop_token_id={stop_token_id} must lie between 0 and vocab_size-1={vocab_size - 1}"
        )
