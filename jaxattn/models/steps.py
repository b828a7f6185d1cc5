"""What runs on the device, as pure functions: score a batch, prefill prompts, decode in a loop."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxattn.batch import RaggedBatch, advance
from jaxattn.cache import quantization_scale
from jaxattn.metadata import prepare_metadata
from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import Cache, Params, forward, unembed
from jaxattn.models.sampling import sample
from jaxattn_kernels.arrays import KVScales

NO_STOP_TOKEN = -1


def score(
    params: Params, batch: RaggedBatch, *, config: DecoderConfig, implementation: str
) -> Float[Array, "T V"]:
    """Logits of every token of an unpaged batch, without a cache."""
    metadata = prepare_metadata(batch, config.layer_specs())
    hidden, _ = forward(params, config, batch.token_ids, metadata, implementation=implementation)
    return unembed(params, hidden)


def calibrate(
    params: Params, batch: RaggedBatch, *, config: DecoderConfig, cache_dtype: str, implementation: str
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
    implementation: str,
) -> tuple[Float[Array, "rows V"], Cache]:
    """One step over a paged batch: the logits of each row's last token, and the cache."""
    metadata = prepare_metadata(batch, config.layer_specs())
    hidden, cache = forward(params, config, batch.token_ids, metadata, cache, implementation=implementation)
    return unembed(params, hidden[metadata.logits_indices[:num_rows]]), cache


def prefill(
    params: Params,
    cache: Cache,
    batch: RaggedBatch,
    *,
    config: DecoderConfig,
    decode_seqs: int,
    implementation: str,
) -> tuple[Float[Array, "decode_seqs V"], Cache, RaggedBatch]:
    """Prefill prompts, and make ready to decode.

    Returns:
        Logits of each prompt's last token, the cache, and the batch in the decode bucket of
        `decode_seqs` rows, every row quiet.
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
    return logits, cache, quiet


class Decoding(NamedTuple):
    """State of the decode loop.

    Attributes:
        num_steps: Tokens chosen so far by a row that has not stopped.
        batch: The last step's batch.
        cache: The paged cache.
        last: The token each row chose last.
        active: Rows that have not stopped.
        tokens: All tokens chosen.
        num_tokens: How many each row chose, the stop token included.
    """

    num_steps: Int32[Array, ""]
    batch: RaggedBatch
    cache: Cache
    last: Int32[Array, " R"]
    active: Bool[Array, " R"]
    tokens: Int32[Array, "R max_new_tokens"]
    num_tokens: Int32[Array, " R"]

    @classmethod
    def start(cls, batch: RaggedBatch, cache: Cache, max_new_tokens: int) -> Decoding:
        """The state before the first token."""
        R = batch.bucket.seqs
        return cls(
            num_steps=jnp.int32(0),
            batch=batch,
            cache=cache,
            last=jnp.zeros(R, jnp.int32),
            active=jnp.arange(R) < batch.num_seqs,
            tokens=jnp.zeros((R, max_new_tokens), jnp.int32),
            num_tokens=jnp.zeros(R, jnp.int32),
        )

    def record(self, tokens: Int32[Array, " R"], stop_token: Int32[Array, ""]) -> Decoding:
        """The state after each active row has chosen a token."""
        kept = jnp.where(self.active, tokens, 0)
        return self._replace(
            num_steps=self.num_steps + 1,
            last=tokens,
            active=self.active & (tokens != stop_token),
            tokens=lax.dynamic_update_slice_in_dim(self.tokens, kept[:, None], self.num_steps, 1),
            num_tokens=self.num_tokens + self.active.astype(jnp.int32),
        )


def decode(
    params: Params,
    cache: Cache,
    batch: RaggedBatch,
    logits: Float[Array, "R V"],
    key: Array,
    temperature: Float[Array, ""],
    num_new_tokens: Int32[Array, ""],
    stop_token: Int32[Array, ""],
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    greedy: bool,
    top_k: int | None,
    implementation: str,
) -> tuple[Int32[Array, "R max_new_tokens"], Int32[Array, " R"], Cache]:
    """From the results of `prefill` to new tokens, in one loop on the device.

    Args:
        params: The parameters.
        cache: From `prefill`, with pages reserved for all tokens to come.
        batch: From `prefill`.
        logits: From `prefill`.
        key: Random key of all draws.
        temperature: Divides the logits; unread when greedy.
        num_new_tokens: Tokens to choose per row, at most `max_new_tokens`.
        stop_token: A row that chooses it ends; `NO_STOP_TOKEN` for none.
        config: The decoder.
        max_new_tokens: Room for tokens.
        greedy: Take the likeliest token.
        top_k: Draw among this many likeliest tokens only.
        implementation: Of the attention.

    Returns:
        The tokens of each row, how many there are, and the cache.
    """

    def choose(logits: Array, num_steps: Array) -> Array:
        return sample(logits, jax.random.fold_in(key, num_steps), temperature, greedy=greedy, top_k=top_k)

    def goes_on(state: Decoding) -> Array:
        return (state.num_steps < num_new_tokens) & state.active.any()

    def take_step(state: Decoding) -> Decoding:
        batch = advance(state.batch, state.last, q_lens=state.active.astype(jnp.int32))
        logits, cache = step(
            params,
            state.cache,
            batch,
            config=config,
            num_rows=batch.bucket.seqs,
            implementation=implementation,
        )
        state = state._replace(batch=batch, cache=cache)
        return state.record(choose(logits, state.num_steps), stop_token)

    state = Decoding.start(batch, cache, max_new_tokens)
    state = state.record(choose(logits, state.num_steps), stop_token)
    state = lax.while_loop(goes_on, take_step, state)
    return state.tokens, state.num_tokens, state.cache
