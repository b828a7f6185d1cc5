"""The compiled programs of a decoder: `score`, `calibrate`, `prefill` and `decode` of `steps.py`.

Each is compiled once per bucket, ahead of time, from shapes alone: no weights are needed, so
compilation can run while a checkpoint is still being read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.batch import abstract_batch
from jaxattn.buckets import Bucket
from jaxattn.cache import is_quantized
from jaxattn.models import steps
from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import Params, abstract_params, check_cache_dtype, init_cache
from jaxattn_kernels.arrays import KVScales


@dataclass(slots=True)
class Programs:
    """Compiles a decoder's programs and keeps them.

    Attributes:
        config: The decoder.
        dtype: Of the parameters, and of a cache for which no other is asked.
        compiled: Every program compiled so far, by what it was compiled for.
    """

    config: DecoderConfig
    dtype: jnp.dtype
    compiled: dict[Hashable, jax.stages.Compiled] = field(default_factory=dict)

    def score(self, bucket: Bucket, *, implementation: str = "auto") -> Callable:
        """The program `(params, batch) -> logits` of `steps.score`."""
        return self._compile(
            steps.score, self._params(), abstract_batch(bucket), implementation=implementation
        )

    def calibrate(
        self, bucket: Bucket, *, cache_dtype: jax.typing.DTypeLike, implementation: str = "auto"
    ) -> Callable:
        """The program `(params, batch) -> scales` of `steps.calibrate`."""
        return self._compile(
            steps.calibrate,
            self._params(),
            abstract_batch(bucket),
            cache_dtype=jnp.dtype(cache_dtype).name,
            implementation=implementation,
        )

    def prefill(
        self,
        bucket: Bucket,
        *,
        page_size: int,
        num_pages: int,
        decode_seqs: int,
        cache_dtype: jax.typing.DTypeLike | None = None,
        implementation: str = "auto",
    ) -> Callable:
        """The program `(params, cache, batch) -> (logits, cache, batch)` of `steps.prefill`."""
        return self._compile(
            steps.prefill,
            self._params(),
            self._cache(num_pages, page_size, cache_dtype),
            abstract_batch(bucket, page_size),
            decode_seqs=decode_seqs,
            implementation=implementation,
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
        cache_dtype: jax.typing.DTypeLike | None = None,
        implementation: str = "auto",
    ) -> Callable:
        """The program `(params, cache, batch, logits, key, temperature, num_new_tokens, stop_token)`.

        It returns `(tokens, how many per row, cache)`; see `steps.decode`.
        """
        integer = jax.ShapeDtypeStruct((), jnp.int32)
        return self._compile(
            steps.decode,
            self._params(),
            self._cache(num_pages, page_size, cache_dtype),
            abstract_batch(bucket, page_size),
            jax.ShapeDtypeStruct((bucket.seqs, self.config.vocab_size), jnp.float32),
            jax.eval_shape(jax.random.key, 0),
            jax.ShapeDtypeStruct((), jnp.float32),
            integer,
            integer,
            max_new_tokens=max_new_tokens,
            greedy=greedy,
            top_k=top_k,
            implementation=implementation,
        )

    def _compile(self, function: Callable, *abstract_args: Any, **static: Any) -> jax.stages.Compiled:
        """The program of a function for arguments of these shapes; a cache among them is donated."""
        leaves, tree = jax.tree.flatten(abstract_args)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (function.__name__, tree, shapes, tuple(static.items()))
        if key not in self.compiled:
            jitted = jax.jit(
                function,
                static_argnames=("config", *static),
                donate_argnames="cache" if function in (steps.prefill, steps.decode) else None,
            )
            self.compiled[key] = jitted.lower(*abstract_args, config=self.config, **static).compile()
        return self.compiled[key]

    def _params(self) -> Params:
        return abstract_params(self.config, self.dtype)

    def _cache(self, num_pages: int, page_size: int, cache_dtype: jax.typing.DTypeLike | None) -> Any:
        dtype = check_cache_dtype(cache_dtype, self.dtype)
        ones = jnp.ones((self.config.num_layers, self.config.num_kv_heads))
        return jax.eval_shape(
            lambda: init_cache(
                self.config,
                num_pages=num_pages,
                page_size=page_size,
                dtype=dtype,
                kv_scales=KVScales(ones, ones) if is_quantized(dtype) else None,
            )
        )


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
