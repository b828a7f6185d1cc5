"""The attention layer as a Linen module."""

from __future__ import annotations

import functools
from typing import Any, overload

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.attention.layer import attend_layer
from jaxattn.cache.paged import PagedKVCache
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata


class Attention(nn.Module):
    """Self-attention over a ragged batch: projections, rotary embedding, cache, attention.

    Parameters are named and shaped as in Flax's own `nn.MultiHeadAttention`: `query/kernel [D, N, H]`,
    `key/kernel` and `value/kernel [D, K, H]`, `out/kernel [N, H, D]`, each with its `bias` where it has one.
    `query_norm/scale` and `key_norm/scale [H]`, and `sinks [N]`, are there where they are asked for.

    Three things differ from Flax's module. `normalize_qk` is an RMS norm, as in Qwen 3 and Gemma 3, where
    Flax has layer norms (`query_ln`, `key_ln`): weights trained with one give other numbers with the other.
    Biases are off unless they are asked for. There is no dropout.

    Attributes:
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
    """

    spec: AttentionSpec
    use_qkv_bias: bool = False
    use_out_bias: bool = False
    normalize_qk: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.linear.default_kernel_init
    out_kernel_init: Initializer = nn.linear.default_kernel_init
    implementation: str | ChoiceTable = "auto"

    @overload
    def __call__(self, x: Array, metadata: AttentionMetadata) -> Array: ...

    @overload
    def __call__(
        self, x: Array, metadata: AttentionMetadata, *, cache: PagedKVCache
    ) -> tuple[Array, PagedKVCache]: ...

    @nn.compact
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
        spec = self.spec
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }
        project = functools.partial(
            nn.DenseGeneral, use_bias=self.use_qkv_bias, kernel_init=self.kernel_init, **options
        )
        q = project((spec.num_q_heads, spec.head_dim), name="query")(x)
        k = project((spec.num_kv_heads, spec.head_dim), name="key")(x)
        v = project((spec.num_kv_heads, spec.head_dim), name="value")(x)
        if self.normalize_qk:
            norm = functools.partial(nn.RMSNorm, dtype=self.dtype, param_dtype=self.param_dtype)
            q, k = norm(name="query_norm")(q), norm(name="key_norm")(k)
        sinks = None
        if spec.sinks:
            sinks = self.param("sinks", nn.initializers.zeros, (spec.num_q_heads,), self.param_dtype)
        out, written = attend_layer(
            q, k, v, metadata, spec, cache, sinks=sinks, implementation=self.implementation
        )
        y = nn.DenseGeneral(
            x.shape[-1],
            axis=(-2, -1),
            use_bias=self.use_out_bias,
            kernel_init=self.out_kernel_init,
            name="out",
            **options,
        )(out)
        return (y, written) if isinstance(written, PagedKVCache) else y
