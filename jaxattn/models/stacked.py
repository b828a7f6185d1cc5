"""Stacked layers: one dictionary of leaves with an axis of layers in front, run in a loop.

A program then holds the layers once, or as many of them as it takes until windows and ropes repeat: the time
to compile it does not grow with their number. The metadata are closed over, and prepared once as ever. In
return each round takes its weights out of the stack, which may copy them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxattn.cache.paged import PagedKVCache
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata

Params = dict[str, Any]


def is_stacked(params: Params) -> bool:
    """Whether the layers of parameters are stacked."""
    return isinstance(params["layers"], dict)


def stack_layers(params: Params) -> Params:
    """The same parameters with layers stacked. Copies them; `load_model` can stack them as it loads."""
    if is_stacked(params):
        return params
    return params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def unstack_layers(params: Params) -> Params:
    """The same parameters with one dictionary per layer."""
    if not is_stacked(params):
        return params
    num_layers = len(params["layers"]["q"])
    layers = (_layer_of(params["layers"], i) for i in range(num_layers))
    return params | {"layers": tuple(layers)}


def _layer_of(stacked: Params, i: int | Array) -> Params:
    """One of stacked layers."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), stacked)


def stacked_leaf(leaf: jax.ShapeDtypeStruct, num_layers: int) -> jax.ShapeDtypeStruct:
    """A leaf of all layers, placed as that of one."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.ShapeDtypeStruct((num_layers, *leaf.shape), leaf.dtype, sharding=sharding)


def scan_layers(
    layers: Params,
    x: Float[Array, "T D"],
    metadata: AttentionMetadata,
    cache: PagedKVCache | None,
    specs: tuple[AttentionSpec, ...],
    run: Callable[..., tuple[Array, Any]],
) -> tuple[Float[Array, "T D"], PagedKVCache | tuple[tuple[Array, Array], ...]]:
    """Run stacked layers in a loop; each round runs them until their specs repeat.

    The cache is carried, and written where it lies: a layer takes its part of the pages by their numbers.
    """
    L = len(specs)
    period = next(p for p in range(1, L + 1) if specs[p:] == specs[: L - p])
    pages_per_layer = 0 if cache is None else cache.k_pages.shape[0] // L

    def step(carry: tuple, i: int | Array, spec: AttentionSpec) -> tuple[tuple, Any]:
        x, cache = carry
        layer = _layer_of(layers, i)
        if cache is None:
            x, packed = run(x, layer, metadata, None, spec)
            return (x, None), packed
        x, written = run(x, layer, metadata.at_page(i * pages_per_layer), _scales_of(cache, i), spec)
        return (x, dataclasses.replace(written, k_scale=cache.k_scale, v_scale=cache.v_scale)), None

    def take_round(carry: tuple, first: Array) -> tuple[tuple, list]:
        packed = []
        for j in range(period):
            carry, of_layer = step(carry, first + j, specs[j])
            packed.append(of_layer)
        return carry, packed

    whole = L // period * period
    carry, packed = lax.scan(take_round, (x, cache), jnp.arange(0, whole, period, dtype=jnp.int32))
    rest = []
    for i in range(whole, L):
        carry, of_layer = step(carry, i, specs[i])
        rest.append(of_layer)
    x, cache = carry
    if cache is not None:
        return x, cache
    in_order = [jax.tree.map(lambda a, r=r: a[r], pair) for r in range(whole // period) for pair in packed]
    return x, (*in_order, *rest)


def _scales_of(cache: PagedKVCache, i: int | Array) -> PagedKVCache:
    """The cache of all layers with the scales of one."""
    k_scale, v_scale = jax.tree.map(
        lambda scale: lax.dynamic_index_in_dim(scale, i, keepdims=False), (cache.k_scale, cache.v_scale)
    )
    return dataclasses.replace(cache, k_scale=k_scale, v_scale=v_scale)
