"""The decoder's caches, one per layer, or one array for stacked layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.cache.paged import PagedKVCache, init_cache
from jaxattn.cache.quantization import QUANTIZED_DTYPES, is_quantized
from jaxattn.models.config import DecoderConfig
from jaxattn_kernels.arrays import KVScales

Cache = tuple[PagedKVCache, ...] | PagedKVCache
"""One cache per layer; or a single one for stacked layers, which holds the pages of layer 0, then those of
layer 1, and so on, with scales `[L, K]`."""


def init_model_cache(
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
        kv_scales: The scales `[L, K]` of a quantised cache; None for any other.
        stack_layers: Whether the parameters have stacked layers.

    Returns:
        One cache per layer, or a single one for stacked layers.

    Raises:
        ValueError: If scales and dtype disagree, or the number of a slot exceeds int32, where the slots of
            stacked layers are numbered together.
    """

    def layer(i: int, num_pages: int) -> PagedKVCache:
        return init_cache(
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
        dtype: The element type that is asked for; None for that of the parameters.
        params_dtype: The element type of the parameters.

    Raises:
        ValueError: If it is neither the parameters' own nor one of a quantised cache.
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
    """Check the scales given for a cache; None passes.

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
