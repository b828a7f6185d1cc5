"""The compiled programs of a decoder: score, prefill and the on-device decode loop.

Each is compiled once per bucket, ahead of time, from shapes alone: no weights are needed, so
compilation can run while a checkpoint is still being read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxattn.batch import RaggedBatch, abstract_batch, advance
from jaxattn.buckets import Bucket
from jaxattn.metadata import AttentionMetadata, prepare_metadata
from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import Cache, Params, abstract_params, forward, init_cache, unembed
from jaxattn.models.sampling import sample

NO_STOP_TOKEN = -1


class Decoding(NamedTuple):
    """State of the decode loop.

    Attributes:
        step: Tokens chosen so far, for a sequence that has not stopped.
        batch: The last step's batch.
        cache: The paged cache.
        last: The token each row chose last.
        active: Rows that have not stopped.
        tokens: All tokens chosen.
        num_tokens: How many each row chose, the stop token included.
    """

    step: Int32[Array, ""]
    batch: RaggedBatch
    cache: Cache
    last: Int32[Array, " R"]
    active: Bool[Array, " R"]
    tokens: Int32[Array, "R max_new_tokens"]
    num_tokens: Int32[Array, " R"]


@dataclass(slots=True)
class Programs:
    """Compiles a decoder's programs and keeps them.

    Attributes:
        config: The decoder.
        dtype: Of parameters and cache.
        compiled: Every program compiled so far, by what it was compiled for.
    """

    config: DecoderConfig
    dtype: jnp.dtype
    compiled: dict[Hashable, jax.stages.Compiled] = field(default_factory=dict)

    def score(self, bucket: Bucket, *, implementation: str = "auto") -> Callable:
        """The program `(params, batch) -> [T, V] logits` of every token, without a cache."""

        def score(params: Params, batch: RaggedBatch) -> Float[Array, "T V"]:
            metadata = self._metadata(batch)
            hidden, _ = forward(params, self.config, batch.token_ids, metadata, implementation=implementation)
            return unembed(params, hidden)

        return self._compile(
            ("score", bucket, implementation), score, (self._abstract_params(), abstract_batch(bucket))
        )

    def prefill(
        self,
        bucket: Bucket,
        *,
        page_size: int,
        num_pages: int,
        decode_seqs: int,
        implementation: str = "auto",
    ) -> Callable:
        """The program `(params, cache, batch) -> (logits, cache, batch)` of a prompt.

        It returns the logits of each sequence's last token, `[decode_seqs, V]`, the cache, and the
        batch in the decode bucket with every sequence quiet, for the decode loop to go on from.
        """

        def prefill(params: Params, cache: Cache, batch: RaggedBatch) -> tuple[Array, Cache, RaggedBatch]:
            logits, cache = self._last_logits(params, cache, batch, decode_seqs, implementation)
            quiet = jnp.zeros(bucket.seqs, bool)
            none = jnp.zeros(bucket.seqs, jnp.int32)
            return logits, cache, advance(batch, none, active=quiet, bucket=bucket.decode(decode_seqs))

        return self._compile(
            ("prefill", bucket, page_size, num_pages, decode_seqs, implementation),
            prefill,
            (
                self._abstract_params(),
                self._abstract_cache(num_pages, page_size),
                abstract_batch(bucket, page_size),
            ),
            donate=(1,),
        )

    def decode(
        self,
        bucket: Bucket,
        *,
        page_size: int,
        num_pages: int,
        max_new_tokens: int,
        greedy: bool = True,
        top_k: int | None = None,
        implementation: str = "auto",
    ) -> Callable:
        """The decode loop, from prefill's results to new tokens, in one program.

        The program takes `(params, cache, batch, logits, key, temperature, num_new_tokens,
        stop_token)`, where `num_new_tokens <= max_new_tokens` and `stop_token` may be
        `NO_STOP_TOKEN`, and returns `(tokens [R, max_new_tokens], how many per row [R], cache)`.
        """

        def decode(params, cache, batch, logits, key, temperature, num_new_tokens, stop_token):
            def choose(logits: Array, step: Array) -> Array:
                return sample(logits, jax.random.fold_in(key, step), temperature, greedy=greedy, top_k=top_k)

            def goes_on(state: Decoding) -> Array:
                return (state.step < num_new_tokens) & state.active.any()

            def take_step(state: Decoding) -> Decoding:
                batch = advance(state.batch, state.last, active=state.active)
                logits, cache = self._last_logits(params, state.cache, batch, bucket.seqs, implementation)
                return record(state._replace(batch=batch, cache=cache), choose(logits, state.step))

            def record(state: Decoding, tokens: Array) -> Decoding:
                kept = jnp.where(state.active, tokens, 0)
                return state._replace(
                    step=state.step + 1,
                    last=tokens,
                    active=state.active & (tokens != stop_token),
                    tokens=lax.dynamic_update_slice_in_dim(state.tokens, kept[:, None], state.step, 1),
                    num_tokens=state.num_tokens + state.active.astype(jnp.int32),
                )

            R = bucket.seqs
            state = Decoding(
                step=jnp.int32(0),
                batch=batch,
                cache=cache,
                last=jnp.zeros(R, jnp.int32),
                active=jnp.arange(R) < batch.num_seqs,
                tokens=jnp.zeros((R, max_new_tokens), jnp.int32),
                num_tokens=jnp.zeros(R, jnp.int32),
            )
            state = record(state, choose(logits, state.step))
            state = lax.while_loop(goes_on, take_step, state)
            return state.tokens, state.num_tokens, state.cache

        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        return self._compile(
            ("decode", bucket, page_size, num_pages, max_new_tokens, greedy, top_k, implementation),
            decode,
            (
                self._abstract_params(),
                self._abstract_cache(num_pages, page_size),
                abstract_batch(bucket, page_size),
                jax.ShapeDtypeStruct((bucket.seqs, self.config.vocab_size), jnp.float32),
                jax.eval_shape(jax.random.key, 0),
                jax.ShapeDtypeStruct((), jnp.float32),
                scalar,
                scalar,
            ),
            donate=(1,),
        )

    def _last_logits(
        self, params: Params, cache: Cache, batch: RaggedBatch, num_rows: int, implementation: str
    ) -> tuple[Array, Cache]:
        """One step over a paged batch: the logits of each sequence's last token, and the cache."""
        metadata = self._metadata(batch)
        hidden, new_cache = forward(
            params, self.config, batch.token_ids, metadata, cache, implementation=implementation
        )
        assert new_cache is not None
        return unembed(params, hidden[metadata.logits_indices[:num_rows]]), new_cache

    def _metadata(self, batch: RaggedBatch) -> AttentionMetadata:
        return prepare_metadata(batch, self.config.layer_specs())

    def _abstract_params(self) -> Params:
        return abstract_params(self.config, self.dtype)

    def _abstract_cache(self, num_pages: int, page_size: int) -> Any:
        return jax.eval_shape(
            lambda: init_cache(self.config, num_pages=num_pages, page_size=page_size, dtype=self.dtype)
        )

    def _compile(
        self, key: Hashable, function: Callable, abstract_args: tuple, donate: tuple[int, ...] = ()
    ) -> jax.stages.Compiled:
        if key not in self.compiled:
            self.compiled[key] = jax.jit(function, donate_argnums=donate).lower(*abstract_args).compile()
        return self.compiled[key]


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with its weights on the device and its compiled programs.

    Attributes:
        config: The decoder's configuration.
        params: Its parameters.
        programs: What has been compiled for it.
    """

    config: DecoderConfig
    params: Params
    programs: Programs

    @classmethod
    def from_params(cls, config: DecoderConfig, params: Params) -> Model:
        """A model of parameters that are on the device already; nothing is compiled yet."""
        return cls(config, params, Programs(config, params["embed"].dtype))
