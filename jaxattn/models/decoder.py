"""The decoder, as pure functions over a plain tree of parameters.

    x = embed[token]
    x = x + attention(norm(x)) ; x = x + mlp(norm(x))      per layer
    logits = norm(x) · head

Parameters are a dictionary `{"embed", "layers": (…,), "final_norm"[, "head"]}`; `abstract_params`
is the single source of its shapes.
"""

from __future__ import annotations

from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxattn.cache import QUANTIZED_DTYPES, PagedKVCache, is_quantized
from jaxattn.cache import init_cache as init_layer_cache
from jaxattn.layer import attend_layer
from jaxattn.metadata import AttentionMetadata
from jaxattn.models.config import DecoderConfig
from jaxattn_kernels.arrays import KVScales

Params = dict[str, Any]
Cache = tuple[PagedKVCache, ...]
PackedKV = tuple[tuple[Array, Array], ...]
"""Keys and values `[T, K, H]` of each layer."""


def abstract_params(config: DecoderConfig, dtype: jax.typing.DTypeLike) -> Params:
    """Shapes and dtypes of the parameters, without any memory behind them."""
    V, D, F = config.vocab_size, config.hidden_size, config.intermediate_size
    N, K, H = config.num_q_heads, config.num_kv_heads, config.head_dim

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    layer = {
        "attention_norm": leaf(D),
        "q": leaf(D, N, H),
        "k": leaf(D, K, H),
        "v": leaf(D, K, H),
        "o": leaf(N, H, D),
        "mlp_norm": leaf(D),
        "gate": leaf(D, F),
        "up": leaf(D, F),
        "down": leaf(F, D),
    }
    params: Params = {
        "embed": leaf(V, D),
        "layers": tuple(dict(layer) for _ in range(config.num_layers)),
        "final_norm": leaf(D),
    }
    if not config.tie_embeddings:
        params["head"] = leaf(D, V)
    return params


def init_params(key: Array, config: DecoderConfig, dtype: jax.typing.DTypeLike = "float32") -> Params:
    """Random parameters: norms of one, matrices with a standard deviation of fan_in ** -0.5."""
    abstract = abstract_params(config, dtype)
    leaves, tree = jax.tree.flatten_with_path(abstract)

    def init(key: Array, path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if name == "embed":
            return (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
        fan_in = leaf.shape[0] * leaf.shape[1] if name == "o" else leaf.shape[0]
        return (fan_in**-0.5 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree, [init(key, path, leaf) for key, (path, leaf) in zip(keys, leaves, strict=True)]
    )


def init_cache(
    config: DecoderConfig,
    *,
    num_pages: int,
    page_size: int,
    dtype: jax.typing.DTypeLike,
    kv_scales: KVScales | None = None,
) -> Cache:
    """An empty paged cache, one entry per layer; all layers share one page table.

    Args:
        config: The decoder.
        num_pages: Physical pages.
        page_size: Tokens per page.
        dtype: Element type of keys and values.
        kv_scales: Of a quantised cache, and of no other, its scales `[L, K]`.

    Raises:
        ValueError: If scales and dtype disagree, or a slot would not be an int32.
    """
    return tuple(
        init_layer_cache(
            num_pages=num_pages,
            page_size=page_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            k_scale=None if kv_scales is None else kv_scales.k[i],
            v_scale=None if kv_scales is None else kv_scales.v[i],
        )
        for i in range(config.num_layers)
    )


def check_cache_dtype(dtype: jax.typing.DTypeLike | None, params_dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The element type of a cache that goes with these parameters.

    Args:
        dtype: What is asked for; None for that of the parameters.
        params_dtype: That of the parameters.

    Raises:
        ValueError: If it is neither that of the parameters nor one of a quantised cache.
    """
    params_dtype = jnp.dtype(params_dtype)
    try:
        found = params_dtype if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not (found == params_dtype or is_quantized(found)):
        raise ValueError(
            f"cache_dtype={dtype if found is None else found.name} cannot be served; use the dtype of the "
            f"parameters, {params_dtype.name}, or a quantised one: {', '.join(QUANTIZED_DTYPES)}"
        )
    return found


def check_kv_scales(kv_scales: KVScales | None, config: DecoderConfig, cache_dtype: jnp.dtype) -> None:
    """Check scales that were given for a cache; None where none were.

    Args:
        kv_scales: Scales `[L, K]` of keys and values, with values that can be read.
        config: The decoder.
        cache_dtype: Element type of the cache.

    Raises:
        ValueError: If there are scales and the cache is not quantised, a shape is wrong, or a scale not
            positive and finite.
    """
    if kv_scales is None:
        return
    if not is_quantized(cache_dtype):
        raise ValueError(
            f"kv_scales was given, and cache_dtype={cache_dtype.name} is not quantised; leave it out, or ask "
            f"for a cache of {', '.join(QUANTIZED_DTYPES)}"
        )
    for name, scale in kv_scales._asdict().items():
        array, expected = np.asarray(scale, np.float32), (config.num_layers, config.num_kv_heads)
        if array.shape != expected:
            raise ValueError(
                f"kv_scales.{name} has shape {array.shape}; give one scale per layer and key head, "
                f"{expected}, as calibrate_kv_scales does"
            )
        bad = np.argwhere(~(np.isfinite(array) & (array > 0)))
        if bad.size:
            layer, head = bad[0].tolist()
            raise ValueError(
                f"kv_scales.{name}[{layer}, {head}]={array[layer, head]} must be positive and finite; "
                f"measure scales with calibrate_kv_scales on prompts whose keys and values are finite"
            )


@overload
def forward(
    params: Params,
    config: DecoderConfig,
    token_ids: Int32[Array, " T"],
    metadata: AttentionMetadata,
    cache: None = None,
    *,
    implementation: str = "auto",
) -> tuple[Array, PackedKV]: ...


@overload
def forward(
    params: Params,
    config: DecoderConfig,
    token_ids: Int32[Array, " T"],
    metadata: AttentionMetadata,
    cache: Cache,
    *,
    implementation: str = "auto",
) -> tuple[Array, Cache]: ...


def forward(
    params: Params,
    config: DecoderConfig,
    token_ids: Int32[Array, " T"],
    metadata: AttentionMetadata,
    cache: Cache | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Float[Array, "T D"], Cache | PackedKV]:
    """Run the decoder over a ragged batch.

    Args:
        params: The parameters.
        config: The configuration.
        token_ids: Packed query tokens.
        metadata: Prepared for `config.layer_specs()`; shared by all layers.
        cache: The paged cache, or None to attend among the packed tokens alone.
        implementation: Of the attention.

    Returns:
        Final hidden states, after the last norm, and the cache with this step's keys written; without a
            cache, this step's keys and values.
    """
    x = params["embed"][token_ids]
    written = []
    for i, (layer, spec) in enumerate(zip(params["layers"], config.layer_specs(), strict=True)):
        h = rms_norm(x, layer["attention_norm"], config.rms_norm_eps)
        q = _project("td,dnh->tnh", h, layer["q"])
        k = _project("td,dkh->tkh", h, layer["k"])
        v = _project("td,dkh->tkh", h, layer["v"])
        layer_cache = None if cache is None else cache[i]
        out, layer_written = attend_layer(q, k, v, metadata, spec, layer_cache, implementation=implementation)
        written.append(layer_written)
        x = x + _project("tnh,nhd->td", out, layer["o"])
        h = rms_norm(x, layer["mlp_norm"], config.rms_norm_eps)
        gated = jax.nn.silu(_project("td,df->tf", h, layer["gate"])) * _project("td,df->tf", h, layer["up"])
        x = x + _project("tf,fd->td", gated, layer["down"])
    hidden = rms_norm(x, params["final_norm"], config.rms_norm_eps)
    return hidden, tuple(written)


def unembed(params: Params, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
    """Logits of hidden states, in float32."""
    head = params["head"] if "head" in params else params["embed"].T
    return _project("td,dv->tv", hidden, head, preferred_element_type=jnp.float32)


def rms_norm(x: Float[Array, "T D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "T D"]:
    """Root-mean-square norm, x / √(mean(x²) + ε) · scale, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale[None, :]


def _project(equation: str, x: Array, weight: Array, **kwargs: Any) -> Array:
    # Full float32 products: on a GPU the default for float32 rounds to 10 bits of mantissa.
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision, **kwargs)
