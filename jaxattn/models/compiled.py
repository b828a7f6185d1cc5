"""The compiled programs of a decoder: functions of `steps.py`.

Each is compiled once per bucket, ahead of time, from `abstract_params` alone: no weights are needed, so
compilation can run while a checkpoint is still being read. The mesh or default device of a caller has no part
in it (`neutral_context`): the devices are those of the parameters.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import abstract_batch
from jaxattn.cache.quantization import is_quantized
from jaxattn.compiling.compiles import compile_cache
from jaxattn.compiling.context import neutral_context
from jaxattn.models import steps
from jaxattn.models.config import DecoderConfig
from jaxattn.models.layer_caches import Cache, check_cache_dtype, init_model_cache
from jaxattn.models.options import RowOptions
from jaxattn.models.params import Params, abstract_params, replicated
from jaxattn.models.sampling import SamplingArrays
from jaxattn.models.stacked import is_stacked
from jaxattn_kernels.arrays import KVScales


@dataclass(slots=True)
class CompiledSteps:
    """Compiles a decoder's programs and keeps them.

    Attributes:
        config: The decoder.
        dtype: The element type of the parameters, and of a cache for which no other is asked.
        mesh: The devices, divided as `abstract_params` says; what is no parameter is on each of them.
        cache_dir: Folder of JAX's persistent compilation cache for these programs; None leaves it as JAX is
            configured.
        stack_layers: Whether the parameters have stacked layers.
        may_compile: Whether a program that is not there yet is compiled when it is asked for.
        programs: Every program compiled so far, by what it was compiled for.
    """

    config: DecoderConfig
    dtype: jnp.dtype
    mesh: Mesh | None = None
    cache_dir: str | os.PathLike[str] | None = None
    stack_layers: bool = False
    may_compile: bool = True
    programs: dict[tuple[Hashable, ...], jax.stages.Compiled] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What the programs compiled so far do, such as "score" or "prefill"."""
        return tuple(str(name) for name, *_ in self.programs)

    @neutral_context()
    def score(self, bucket: Bucket, *, implementation: str | ChoiceTable = "auto") -> Callable:
        """The program `(params, batch) -> logits` of `steps.score`."""
        return self._compile(
            steps.score, self._params(), abstract_batch(bucket), implementation=implementation
        )

    @neutral_context()
    def calibrate(
        self, bucket: Bucket, *, cache_dtype: jax.typing.DTypeLike, implementation: str | ChoiceTable = "auto"
    ) -> Callable:
        """The program `(params, batch) -> scales` of `steps.calibrate`."""
        return self._compile(
            steps.calibrate,
            self._params(),
            abstract_batch(bucket),
            cache_dtype=jnp.dtype(cache_dtype).name,
            implementation=implementation,
        )

    @neutral_context()
    def prefill(
        self,
        bucket: Bucket,
        *,
        page_size: int,
        num_pages: int,
        decode_seqs: int,
        max_new_tokens: int,
        max_stop_tokens: int,
        greedy: bool = True,
        cache_dtype: jax.typing.DTypeLike | None = None,
        implementation: str | ChoiceTable = "auto",
    ) -> Callable:
        """The program `(params, cache, batch, options) -> (state, cache)` of `steps.prefill`."""
        return self._compile(
            steps.prefill,
            self._params(),
            self._cache(num_pages, page_size, cache_dtype),
            abstract_batch(bucket, page_size),
            self._options(decode_seqs, max_stop_tokens),
            decode_seqs=decode_seqs,
            max_new_tokens=max_new_tokens,
            greedy=greedy,
            implementation=implementation,
        )

    @neutral_context()
    def decode(
        self,
        bucket: Bucket,
        *,
        page_size: int,
        num_pages: int,
        max_new_tokens: int,
        max_stop_tokens: int,
        greedy: bool = True,
        cache_dtype: jax.typing.DTypeLike | None = None,
        implementation: str | ChoiceTable = "auto",
    ) -> Callable:
        """The program `(params, cache, state, options, num_steps) -> (state, cache)` of `steps.decode`."""
        return self._compile(
            steps.decode,
            self._params(),
            self._cache(num_pages, page_size, cache_dtype),
            jax.eval_shape(
                lambda batch: steps.Decoding.start(batch, max_new_tokens), abstract_batch(bucket, page_size)
            ),
            self._options(bucket.seqs, max_stop_tokens),
            jax.ShapeDtypeStruct((), jnp.int32),
            greedy=greedy,
            implementation=implementation,
        )

    @neutral_context()
    def choose_tokens(
        self,
        bucket: Bucket,
        *,
        page_size: int,
        num_pages: int,
        cache_dtype: jax.typing.DTypeLike | None = None,
        implementation: str | ChoiceTable = "auto",
    ) -> Callable:
        """The program `(params, cache, batch, sampling) -> (token_ids, cache)` of `steps.choose_tokens`."""
        return self._compile(
            steps.choose_tokens,
            self._params(),
            self._cache(num_pages, page_size, cache_dtype),
            abstract_batch(bucket, page_size),
            SamplingArrays.of((), bucket.seqs, self.config.vocab_size),
            implementation=implementation,
        )

    @neutral_context()
    def empty_cache(
        self, *, page_size: int, num_pages: int, cache_dtype: jax.typing.DTypeLike | None = None
    ) -> Callable:
        """The program `(kv_scales) -> cache` of `steps.empty_cache`.

        Scales are float32, or None for a cache that is not quantised.
        """
        dtype = check_cache_dtype(cache_dtype, self.dtype)
        return self._compile(
            steps.empty_cache,
            self._scales() if is_quantized(dtype) else None,
            num_pages=num_pages,
            page_size=page_size,
            cache_dtype=dtype.name,
            stack_layers=self.stack_layers,
        )

    def _compile(self, function: Callable, *abstract_args: Any, **static: Any) -> jax.stages.Compiled:
        """The program of a function for arguments of these shapes; a cache among them is donated."""
        leaves, tree = jax.tree.flatten(abstract_args)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        # Settings of JAX that are in force now, and that tracing reads.
        settings = (jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64)
        key = (function.__name__, tree, shapes, tuple(static.items()), settings)
        if key in self.programs:
            return self.programs[key]
        if not self.may_compile:
            raise ValueError(
                f"the program {function.__name__!r} is not compiled, and compile='none' was asked for; load "
                f"the model with compile='lazy', or with 'overlap' and its bucket among buckets"
            )
        jitted = jax.jit(
            function,
            static_argnames=("config", *static),
            donate_argnames="cache" if "cache" in inspect.signature(function).parameters else None,
            out_shardings=None if self.mesh is None else replicated(self.mesh),
        )
        with compile_cache(self.cache_dir):
            placed = jax.tree.map(self._place, abstract_args)
            self.programs[key] = jitted.lower(*placed, config=self.config, **static).compile()
        return self.programs[key]

    def _place(self, leaf: Any) -> jax.ShapeDtypeStruct:
        """An argument like this leaf, on all devices, unless it is abstract and says where it is."""
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(self.mesh))

    def _params(self) -> Params:
        return abstract_params(self.config, self.dtype, self.mesh, stack_layers=self.stack_layers)

    def _options(self, num_rows: int, max_stop_tokens: int) -> RowOptions:
        return RowOptions.of(
            (), num_rows=num_rows, max_stop_tokens=max_stop_tokens, vocab_size=self.config.vocab_size
        )

    def _scales(self) -> KVScales:
        ones: Any = np.ones((self.config.num_layers, self.config.num_kv_heads), np.float32)
        return KVScales(ones, ones)

    def _cache(self, num_pages: int, page_size: int, cache_dtype: jax.typing.DTypeLike | None) -> Any:
        dtype = check_cache_dtype(cache_dtype, self.dtype)
        return jax.eval_shape(
            lambda: init_model_cache(
                self.config,
                num_pages=num_pages,
                page_size=page_size,
                dtype=dtype,
                kv_scales=self._scales() if is_quantized(dtype) else None,
                stack_layers=self.stack_layers,
            )
        )


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with its weights on the device and its compiled programs.

    Attributes:
        config: The decoder's configuration.
        params: Its parameters.
        compiled: The programs of its steps.
    """

    config: DecoderConfig
    params: Params
    compiled: CompiledSteps

    @classmethod
    def from_params(cls, config: DecoderConfig, params: Params) -> Model:
        """A model of parameters on one device, or placed as by `abstract_params`; nothing is compiled."""
        embed = params["embed"]
        sharding = getattr(embed, "sharding", None)  # a NumPy array has none
        mesh = (
            sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None
        )
        compiled = CompiledSteps(config, embed.dtype, mesh, stack_layers=is_stacked(params))
        return Model(config, params, compiled)

    def empty_cache(
        self,
        *,
        num_pages: int,
        page_size: int,
        cache_dtype: jax.typing.DTypeLike | None = None,
        kv_scales: KVScales | None = None,
    ) -> Cache:
        """A cache for this model, without keys, by a program that is compiled once.

        Args:
            num_pages: Physical pages.
            page_size: Tokens per page.
            cache_dtype: Element type; None for that of the parameters.
            kv_scales: The scales `[L, K]` of a quantised cache; None for any other.

        Raises:
            ValueError: If no cache can have this dtype, or the number of a slot exceeds int32.
        """
        program = self.compiled.empty_cache(num_pages=num_pages, page_size=page_size, cache_dtype=cache_dtype)
        return program(jax.tree.map(lambda scale: np.asarray(scale, np.float32), kv_scales))
