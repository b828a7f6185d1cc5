"""The compiled programs of a decoder: `score`, `calibrate`, `prefill` and `decode` of `steps.py`.

Each is compiled once per bucket, ahead of time, from `abstract_params` alone: no weights are needed, so
compilation can run while a checkpoint is still being read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxattn.batch import abstract_batch
from jaxattn.buckets import Bucket
from jaxattn.cache import is_quantized
from jaxattn.models import steps
from jaxattn.models.compile_cache import compile_cache
from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import Params, abstract_params, check_cache_dtype, init_cache, replicated
from jaxattn_kernels.arrays import KVScales


@dataclass(slots=True)
class Programs:
    """Compiles a decoder's programs and keeps them.

    Attributes:
        config: The decoder.
        dtype: Of the parameters, and of a cache for which no other is asked.
        mesh: The devices, as of `abstract_params`; what is no parameter is on each of them.
        cache_dir: Folder of JAX's persistent compilation cache for these programs; None leaves it as JAX is
            configured.
        may_compile: Whether a program that is not there yet is compiled when it is asked for.
        compiled: Every program compiled so far, by what it was compiled for.
    """

    config: DecoderConfig
    dtype: jnp.dtype
    mesh: Mesh | None = None
    cache_dir: str | os.PathLike[str] | None = None
    may_compile: bool = True
    compiled: dict[tuple[Hashable, ...], jax.stages.Compiled] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What the programs compiled so far do, such as "score" or "prefill"."""
        return tuple(str(name) for name, *_ in self.compiled)

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
        if key in self.compiled:
            return self.compiled[key]
        if not self.may_compile:
            raise ValueError(
                f"the program {function.__name__!r} is not compiled, and compile='none' was asked for; load "
                f"the model with compile='lazy', or with 'overlap' and its bucket among buckets"
            )
        jitted = jax.jit(
            function,
            static_argnames=("config", *static),
            donate_argnames="cache" if function in (steps.prefill, steps.decode) else None,
            out_shardings=None if self.mesh is None else replicated(self.mesh),
        )
        with compile_cache(self.cache_dir):
            placed = jax.tree.map(self._place, abstract_args)
            self.compiled[key] = jitted.lower(*placed, config=self.config, **static).compile()
        return self.compiled[key]

    def _place(self, leaf: Any) -> jax.ShapeDtypeStruct:
        """An argument like this leaf, on all devices, unless it is abstract and says where it is."""
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(self.mesh))

    def _params(self) -> Params:
        return abstract_params(self.config, self.dtype, self.mesh)

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
        """A model of parameters on one device, or placed as by `abstract_params`; nothing is compiled."""
        embed = params["embed"]
        sharding = getattr(embed, "sharding", None)  # a NumPy array has none
        mesh = (
            sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None
        )
        return Model(config, params, Programs(config, embed.dtype, mesh))
