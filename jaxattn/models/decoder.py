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

import dataclasses
import functools
from typing import Any, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int32

from jaxattn.cache import QUANTIZED_DTYPES, PagedKVCache, is_quantized
from jaxattn.cache import init_cache as init_layer_cache
from jaxattn.layer import attend_layer
from jaxattn.metadata import AttentionMetadata
from jaxattn.models.config import DecoderConfig
from jaxattn.models.stacked import is_stacked, scan_layers, stacked_leaf
from jaxattn.spec import AttentionSpec
from jaxattn_kernels.arrays import KVScales

Params = dict[str, Any]
Cache = tuple[PagedKVCache, ...] | PagedKVCache
"""One per layer; of stacked layers a single one, with all pages of a layer after all of the layer before, and
scales `[L, K]`."""
PackedKV = tuple[tuple[Array, Array], ...]
"""Keys and values `[T, K, H]` of each layer."""


# Of a leaf that is divided among the devices of a mesh: which of its axes.
MODEL_AXIS = "model"
_DIVIDED = {
    "q": 1,
    "k": 1,
    "v": 1,
    "o": 0,
    "q_bias": 0,
    "k_bias": 0,
    "v_bias": 0,
    "gate": 1,
    "up": 1,
    "down": 0,
}


def abstract_params(
    config: DecoderConfig,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None = None,
    *,
    stack_layers: bool = False,
) -> Params:
    """Shapes, dtypes and shardings of the parameters, without any memory behind them.

    What is compiled from these leaves serves arrays that are loaded into them, and is found again in JAX's
    persistent compilation cache, whose keys depend on how arguments are placed.

    Args:
        config: The decoder.
        dtype: Of every leaf.
        mesh: The devices. If it has an axis named "model", heads and the features of the MLP are divided
            along it, where it divides their number; all else is on every device. None for the first device
            alone.
        stack_layers: Whether layers are stacked.
    """
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
    if config.qkv_bias:
        layer |= {"q_bias": leaf(N, H), "k_bias": leaf(K, H), "v_bias": leaf(K, H)}
    if config.qk_norm:
        layer |= {"q_norm": leaf(H), "k_norm": leaf(H)}
    if config.post_norms:
        layer |= {"post_attention_norm": leaf(D), "post_mlp_norm": leaf(D)}
    params: Params = {
        "embed": leaf(V, D),
        "layers": tuple(dict(layer) for _ in range(config.num_layers)),
        "final_norm": leaf(D),
    }
    if not config.tie_embeddings:
        params["head"] = leaf(D, V)
    params = jax.tree.map_with_path(
        lambda path, leaf: leaf.update(sharding=_sharding(path[-1].key, leaf.shape, mesh)), params
    )
    if stack_layers:
        first, *_ = params["layers"]
        params["layers"] = jax.tree.map(lambda leaf: stacked_leaf(leaf, config.num_layers), first)
    return params


def replicated(mesh: Mesh | None) -> Sharding:
    """The sharding of what lies whole on every device of a mesh; without one, on the first device."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    # What is divided is the compiler's business, also in meshes whose axes would have it in the types.
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names, axis_types=automatic), PartitionSpec())


def _sharding(name: str, shape: tuple[int, ...], mesh: Mesh | None) -> Sharding:
    whole = replicated(mesh)
    axis = _DIVIDED.get(name)
    if axis is None or not isinstance(whole, NamedSharding) or MODEL_AXIS not in whole.mesh.axis_names:
        return whole
    if shape[axis] % whole.mesh.shape[MODEL_AXIS]:
        return whole
    return NamedSharding(whole.mesh, PartitionSpec(*[None] * axis, MODEL_AXIS))


def init_params(key: Array, config: DecoderConfig, dtype: jax.typing.DTypeLike = "float32") -> Params:
    """Random parameters: norms by one, no biases, matrices with a standard deviation of fan_in ** -0.5."""
    abstract = abstract_params(config, dtype)
    leaves, tree = jax.tree.flatten_with_path(abstract)

    def init(key: Array, path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.full(leaf.shape, 0 if config.norm_offset else 1, leaf.dtype)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
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
    stack_layers: bool = False,
) -> Cache:
    """An empty paged cache of all layers, which share one page table.

    Args:
        config: The decoder.
        num_pages: Physical pages.
        page_size: Tokens per page.
        dtype: Element type of keys and values.
        kv_scales: Of a quantised cache, and of no other, its scales `[L, K]`.
        stack_layers: Whether it is for stacked layers.

    Raises:
        ValueError: If scales and dtype disagree, or a slot would not be an int32; of stacked layers those of
            all layers are numbered together.
    """

    def layer(i: int, num_pages: int) -> PagedKVCache:
        return init_layer_cache(
            num_pages=num_pages,
            page_size=page_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            k_scale=None if kv_scales is None else kv_scales.k[i],
            v_scale=None if kv_scales is None else kv_scales.v[i],
        )

    if not stack_layers:
        return tuple(layer(i, num_pages) for i in range(config.num_layers))
    cache = layer(0, num_pages * config.num_layers)
    if kv_scales is None:
        return cache
    k_scale, v_scale = (jnp.array(scale, jnp.float32) for scale in kv_scales)
    return dataclasses.replace(cache, k_scale=k_scale, v_scale=v_scale)


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

    Raises:
        ValueError: If layers are stacked in the parameters and not in the cache, or the other way round.
    """
    if cache is not None and isinstance(cache, PagedKVCache) != is_stacked(params):
        raise ValueError(
            f"layers are stacked in {'params' if is_stacked(params) else 'cache'} alone; "
            f"make the cache by init_cache(..., stack_layers={is_stacked(params)})"
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
    implementation: str,
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
