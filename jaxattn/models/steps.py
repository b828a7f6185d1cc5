"""What runs on the device, as pure functions: score, prefill, decode in a loop, take a server's step."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.batch.advance import advance
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.cache.quantization import quantization_scale
from jaxattn.metadata.prepare import prepare_metadata
from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import forward, unembed
from jaxattn.models.layer_caches import Cache, init_model_cache
from jaxattn.models.options import RowOptions
from jaxattn.models.params import Params
from jaxattn.models.sampling import SamplingArrays, sample
from jaxattn_kernels.arrays import KVScales


def score(
    params: Params, batch: RaggedBatch, *, config: DecoderConfig, implementation: str | ChoiceTable
) -> Float[Array, "T V"]:
    """Logits of every token of an unpaged batch, without a cache."""
    metadata = prepare_metadata(batch, config.layer_specs())
    hidden, _ = forward(params, config, batch.token_ids, metadata, implementation=implementation)
    return unembed(params, config, hidden)


def calibrate(
    params: Params,
    batch: RaggedBatch,
    *,
    config: DecoderConfig,
    cache_dtype: str,
    implementation: str | ChoiceTable,
) -> KVScales:
    """Scales `[L, K]` with which a packed batch's largest keys and values are the largest stored numbers."""
    metadata = prepare_metadata(batch, config.layer_specs())
    _, packed = forward(params, config, batch.token_ids, metadata, implementation=implementation)
    is_real = (jnp.arange(batch.bucket.tokens) < metadata.num_tokens)[:, None, None]

    def scales(layers: tuple[Array, ...]) -> Float[Array, "L K"]:
        return jnp.stack([quantization_scale(jnp.where(is_real, x, 0), cache_dtype) for x in layers])

    keys, values = zip(*packed, strict=True)
    return KVScales(scales(keys), scales(values))


def step(
    params: Params,
    cache: Cache,
    batch: RaggedBatch,
    *,
    config: DecoderConfig,
    num_rows: int,
    implementation: str | ChoiceTable,
) -> tuple[Float[Array, "rows V"], Cache]:
    """One step over a paged batch: the logits of each row's last token, and the cache."""
    metadata = prepare_metadata(batch, config.layer_specs())
    hidden, cache = forward(params, config, batch.token_ids, metadata, cache, implementation=implementation)
    return unembed(params, config, hidden[metadata.logits_indices[:num_rows]]), cache


def empty_cache(
    kv_scales: KVScales | None,
    *,
    config: DecoderConfig,
    num_pages: int,
    page_size: int,
    cache_dtype: str,
    stack_layers: bool,
) -> Cache:
    """A cache without keys; `init_model_cache` as one program."""
    return init_model_cache(
        config,
        num_pages=num_pages,
        page_size=page_size,
        dtype=cache_dtype,
        kv_scales=kv_scales,
        stack_layers=stack_layers,
    )


def choose_tokens(
    params: Params,
    cache: Cache,
    batch: RaggedBatch,
    sampling: SamplingArrays,
    *,
    config: DecoderConfig,
    implementation: str | ChoiceTable,
) -> tuple[Int32[Array, " R"], Cache]:
    """One step over a paged batch: the next token of each row, and the cache."""
    logits, cache = step(
        params, cache, batch, config=config, num_rows=batch.bucket.seqs, implementation=implementation
    )
    return sample(logits, batch.kv_lens, sampling), cache


class Decoding(NamedTuple):
    """State of the decode loop.

    Attributes:
        num_steps: Tokens chosen so far by a row that has not ended.
        batch: The last step's batch.
        last: The token each row chose last; it has not been computed yet.
        active: Rows that have not ended.
        tokens: All tokens chosen.
        num_tokens: How many each row chose, the stop token included.
    """

    num_steps: Int32[Array, ""]
    batch: RaggedBatch
    last: Int32[Array, " R"]
    active: Bool[Array, " R"]
    tokens: Int32[Array, "R max_new_tokens"]
    num_tokens: Int32[Array, " R"]

    @classmethod
    def start(cls, batch: RaggedBatch, max_new_tokens: int) -> Decoding:
        """The state before the first token."""
        R = batch.bucket.seqs
        return cls(
            num_steps=jnp.int32(0),
            batch=batch,
            last=jnp.zeros(R, jnp.int32),
            active=jnp.arange(R) < batch.num_seqs,
            tokens=jnp.zeros((R, max_new_tokens), jnp.int32),
            num_tokens=jnp.zeros(R, jnp.int32),
        )

    def choose(self, logits: Float[Array, "R V"], options: RowOptions, *, greedy: bool) -> Decoding:
        """The state after each active row has chosen a token."""
        tokens = sample(logits, self.batch.kv_lens, options.sampling, greedy=greedy)
        num_tokens = self.num_tokens + self.active.astype(jnp.int32)
        stops = (tokens[:, None] == options.stop_tokens).any(axis=1)
        kept = jnp.where(self.active, tokens, 0)
        return self._replace(
            num_steps=self.num_steps + 1,
            last=tokens,
            active=self.active & ~stops & (num_tokens < options.limits),
            tokens=lax.dynamic_update_slice_in_dim(self.tokens, kept[:, None], self.num_steps, 1),
            num_tokens=num_tokens,
        )


def prefill(
    params: Params,
    cache: Cache,
    batch: RaggedBatch,
    options: RowOptions,
    *,
    config: DecoderConfig,
    decode_seqs: int,
    max_new_tokens: int,
    greedy: bool,
    implementation: str | ChoiceTable,
) -> tuple[Decoding, Cache]:
    """Prefill prompts, and choose the first new token of each.

    Args:
        params: The parameters.
        cache: With pages reserved for all tokens to come.
        batch: The prompts.
        options: Of each of `decode_seqs` rows.
        config: The decoder.
        decode_seqs: Rows of the steps to come.
        max_new_tokens: Room for new tokens.
        greedy: Whether no row draws.
        implementation: The implementation of attention.

    Returns:
        The state in which `decode` goes on, and the cache.
    """
    logits, cache = step(
        params, cache, batch, config=config, num_rows=decode_seqs, implementation=implementation
    )
    R = batch.bucket.seqs
    quiet = advance(
        batch,
        jnp.zeros(R, jnp.int32),
        q_lens=jnp.zeros(R, jnp.int32),
        bucket=batch.bucket.decode(decode_seqs),
    )
    return Decoding.start(quiet, max_new_tokens).choose(logits, options, greedy=greedy), cache


def decode(
    params: Params,
    cache: Cache,
    state: Decoding,
    options: RowOptions,
    num_steps: Int32[Array, ""],
    *,
    config: DecoderConfig,
    greedy: bool,
    implementation: str | ChoiceTable,
) -> tuple[Decoding, Cache]:
    """Choose more tokens, in one loop on the device, until every row has ended.

    Args:
        params: The parameters.
        cache: From `prefill` or from here.
        state: The same.
        options: Of each row.
        num_steps: The loop comes back after this many tokens per row, and can be called again.
        config: The decoder.
        greedy: Whether no row draws.
        implementation: The implementation of attention.

    Returns:
        The state, and the cache.
    """
    end = state.num_steps + num_steps

    def goes_on(carry: tuple[Decoding, Cache]) -> Array:
        state, _ = carry
        return (state.num_steps < end) & state.active.any()

    def take_step(carry: tuple[Decoding, Cache]) -> tuple[Decoding, Cache]:
        state, cache = carry
        batch = advance(state.batch, state.last, q_lens=state.active.astype(jnp.int32))
        logits, cache = step(
            params,
            cache,
            batch,
            config=config,
            num_rows=batch.bucket.seqs,
            implementation=implementation,
        )
        return state._replace(batch=batch).choose(logits, options, greedy=greedy), cache

    return lax.while_loop(goes_on, take_step, (state, cache))
