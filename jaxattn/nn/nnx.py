"""The attention layer as an NNX module."""

from __future__ import annotations

import functools
from typing import Any, overload

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.attention.layer import attend_layer
from jaxattn.cache.paged import PagedKVCache
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata


class Attention(nnx.Module):
    """Self-attention over a ragged batch: projections, rotary embedding, cache, attention.

    Parameters are named and shaped as in Flax's own `nnx.MultiHeadAttention`, and as in
    `jaxattn.nn.linen.Attention`, where it is said what differs from Flax's module. Unlike the Linen module,
    this one is told the size of the features.

    Args:
        in_features: The size of the features of inputs and outputs, D.
        spec: The layer: heads, window, soft cap, rotary embedding, sinks; prepare the metadata with it.
        use_qkv_bias: Whether queries, keys and values have biases.
        use_out_bias: Whether the output has a bias.
        normalize_qk: Whether each head of queries and keys goes through an RMS norm before it is rotated.
        dtype: The dtype of the computation; None: the one that inputs and parameters promote to. A cache that
            is not quantised must have it too.
        param_dtype: The dtype of the parameters.
        precision: The precision of the projections' products.
        kernel_init: The initialiser of the kernels of queries, keys and values.
        out_kernel_init: The initialiser of the output's kernel.
        implementation: The implementation of attention; see `jaxattn.attention`.
        rngs: The random keys for the parameters.
    """

    def __init__(
        self,
        in_features: int,
        spec: AttentionSpec,
        *,
        use_qkv_bias: bool = False,
        use_out_bias: bool = False,
        normalize_qk: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer = default_kernel_init,
        implementation: str | ChoiceTable = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self.spec = spec
        self.implementation = implementation
        options: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "rngs": rngs,
        }
        project = functools.partial(
            nnx.LinearGeneral, in_features, use_bias=use_qkv_bias, kernel_init=kernel_init, **options
        )
        heads = (spec.num_q_heads, spec.head_dim)
        self.query = project(heads)
        self.key = project((spec.num_kv_heads, spec.head_dim))
        self.value = project((spec.num_kv_heads, spec.head_dim))
        self.out = nnx.LinearGeneral(
            heads, in_features, axis=(-2, -1), use_bias=use_out_bias, kernel_init=out_kernel_init, **options
        )
        norm = functools.partial(nnx.RMSNorm, spec.head_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.query_norm = norm() if normalize_qk else None
        self.key_norm = norm() if normalize_qk else None
        self.sinks = nnx.Param(jnp.zeros(spec.num_q_heads, param_dtype)) if spec.sinks else None

    @overload
    def __call__(self, x: Array, metadata: AttentionMetadata) -> Array: ...

    @overload
    def __call__(
        self, x: Array, metadata: AttentionMetadata, *, cache: PagedKVCache
    ) -> tuple[Array, PagedKVCache]: ...

    def __call__(
        self, x: Float[Array, "T D"], metadata: AttentionMetadata, *, cache: PagedKVCache | None = None
    ) -> Float[Array, "T D"] | tuple[Float[Array, "T D"], PagedKVCache]:
        """Attend: out(attention(rope(norm(query(x))), rope(norm(key(x))), value(x))).

        Args:
            x: The features of all sequences' tokens, packed, [T, D].
            metadata: The metadata of the batch, prepared with this layer's spec. All layers share it.
            cache: The layer's cache, for a batch that was nested with page tables.

        Returns:
            One output per token, [T, D]; with a cache, also the cache, with this step's keys and values.

        Raises:
            ValueError: If shapes, dtypes and spec do not go together, as in `jaxattn.attention`, or batch and
                cache do not.
            NotImplementedError: If the implementation cannot compute this layer on this device.
        """
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        sinks = None if self.sinks is None else self.sinks[...]
        out, written = attend_layer(
            q, k, v, metadata, self.spec, cache, sinks=sinks, implementation=self.implementation
        )
        y = self.out(out)
        return (y, written) if isinstance(written, PagedKVCache) else y
