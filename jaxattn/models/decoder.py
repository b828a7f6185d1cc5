"""The decoder, as pure functions over a plain tree of parameters.

    x = embed[token]
    x = x + attention(norm(x)) ; x = x + mlp(norm(x))      per layer
    logits = norm(x) · head

What families add to that, norms, biases, scales and caps, the config says. Parameters are a dictionary
`{"embed", "layers": (…,), "final_norm"[, "head"]}`; `abstract_params` is the single source of its shapes and
of where its leaves lie.

"layers" is one dictionary per layer, or a single one of stacked leaves: see `stacked.py`.
"""

from __future__ import annotations

import functools
from typing import Any, cast, overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.attention.layer import attend_layer
from jaxattn.cache.paged import PagedKVCache
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.models.config import DecoderConfig
from jaxattn.models.layer_caches import Cache
from jaxattn.models.params import Params
from jaxattn.models.stacked import PackedKV, is_stacked, scan_layers


@overload
def forward(
    params: Params,
    config: DecoderConfig,
    token_ids: Int32[Array, " T"],
    metadata: AttentionMetadata,
    cache: None = None,
    *,
    implementation: str | ChoiceTable = "auto",
) -> tuple[Array, PackedKV]: ...


@overload
def forward(
    params: Params,
    config: DecoderConfig,
    token_ids: Int32[Array, " T"],
    metadata: AttentionMetadata,
    cache: Cache,
    *,
    implementation: str | ChoiceTable = "auto",
) -> tuple[Array, Cache]: ...


def forward(
    params: Params,
    config: DecoderConfig,
    token_ids: Int32[Array, " T"],
    metadata: AttentionMetadata,
    cache: Cache | None = None,
    *,
    implementation: str | ChoiceTable = "auto",
) -> tuple[Float[Array, "T D"], Cache | PackedKV]:
    """Run the decoder over a ragged batch.

    Args:
        params: The parameters.
        config: The configuration.
        token_ids: Packed query tokens.
        metadata: Prepared for `config.layer_specs()`; shared by all layers.
        cache: The paged cache, or None to attend among the packed tokens alone.
        implementation: The implementation of attention.

    Returns:
        Final hidden states, after the last norm, and the cache with this step's keys written; without a
            cache, this step's keys and values.

    Raises:
        ValueError: If layers are stacked in the parameters and not in the cache, or the other way round.
    """
    if cache is not None and isinstance(cache, PagedKVCache) != is_stacked(params):
        raise ValueError(
            f"layers are stacked in {'params' if is_stacked(params) else 'cache'} alone; "
            f"make the cache by init_model_cache(..., stack_layers={is_stacked(params)})"
        )
    x = params["embed"][token_ids]
    if config.embedding_scale is not None:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    run = functools.partial(_run_layer, config=config, implementation=implementation)
    layers, specs, given = params["layers"], config.layer_specs(), cast(Any, cache)
    if is_stacked(params):
        x, written = scan_layers(layers, x, metadata, given, specs, run)
    else:
        written = ()
        for layer, spec, of_layer in zip(layers, specs, given or [None] * len(specs), strict=True):
            x, layer_written = run(x, layer, metadata, of_layer, spec)
            written = (*written, layer_written)
    return rms_norm(x, params["final_norm"], config), written


def _run_layer(
    x: Float[Array, "T D"],
    layer: Params,
    metadata: AttentionMetadata,
    cache: PagedKVCache | None,
    spec: AttentionSpec,
    *,
    config: DecoderConfig,
    implementation: str | ChoiceTable,
) -> tuple[Float[Array, "T D"], Any]:
    """Hidden states after a layer, and its cache, or its keys and values."""
    h = rms_norm(x, layer["attention_norm"], config)
    q, k, v = _project_qkv(h, layer, config)
    out, written = attend_layer(q, k, v, metadata, spec, cache, implementation=implementation)
    h = _project("tnh,nhd->td", out, layer["o"])
    x = x + (rms_norm(h, layer["post_attention_norm"], config) if config.post_norms else h)
    h = _mlp(rms_norm(x, layer["mlp_norm"], config), layer, config)
    return x + (rms_norm(h, layer["post_mlp_norm"], config) if config.post_norms else h), written


def unembed(params: Params, config: DecoderConfig, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
    """Logits of hidden states, in float32."""
    head = params["head"] if "head" in params else params["embed"].T
    logits = _project("td,dv->tv", hidden, head, preferred_element_type=jnp.float32)
    cap = config.final_logits_soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def rms_norm(x: Float[Array, "*rows D"], weight: Float[Array, " D"], config: DecoderConfig) -> Array:
    """Root-mean-square norm, x / √(mean(x²) + ε) · scale, computed in float32.

    The scale is the weight, a factor on the rounded norm; or 1 + weight with `norm_offset`, and then rounded
    with the rest.
    """
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.rms_norm_eps)
    weight = jnp.expand_dims(weight, range(x.ndim - 1))
    if config.norm_offset:
        return (y * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return y.astype(x.dtype) * weight


def _project_qkv(h: Float[Array, "T D"], layer: Params, config: DecoderConfig) -> tuple[Array, Array, Array]:
    """Queries `[T, N, H]`, keys and values `[T, K, H]`, not yet rotated."""
    q, k, v = (_project("td,dnh->tnh", h, layer[name]) for name in "qkv")
    if config.qkv_bias:
        q, k, v = q + layer["q_bias"][None], k + layer["k_bias"][None], v + layer["v_bias"][None]
    if config.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], config), rms_norm(k, layer["k_norm"], config)
    return q, k, v


def _mlp(h: Float[Array, "T D"], layer: Params, config: DecoderConfig) -> Float[Array, "T D"]:
    gate = _project("td,df->tf", h, layer["gate"])
    gate = jax.nn.gelu(gate, approximate=True) if config.activation == "gelu_tanh" else jax.nn.silu(gate)
    return _project("tf,fd->td", gate * _project("td,df->tf", h, layer["up"]), layer["down"])


def _project(equation: str, x: Array, weight: Array, **kwargs: Any) -> Array:
    # Full float32 products: on a GPU the default for float32 rounds to 10 bits of mantissa.
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision, **kwargs)
