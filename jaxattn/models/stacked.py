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
from jaxtyping import Array, Float

from jaxattn.cache.paged import PagedKVCache
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.models.params import Params

type PackedKV = tuple[tuple[Array, Array], ...]
"""Keys and values `[T, K, H]` of each layer."""

type RunLayer = Callable[..., tuple[Array, Any]]
"""Runs one layer: `(x, layer, metadata, cache, spec) -> (x, written)`."""

type Carry = tuple[Array, PagedKVCache | None]
"""What goes from layer to layer: hidden states `[T, D]`, and the cache of all layers."""


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


def scan_layers(
    layers: Params,
    x: Float[Array, "T D"],
    metadata: AttentionMetadata,
    cache: PagedKVCache | None,
    specs: tuple[AttentionSpec, ...],
    run: RunLayer,
) -> tuple[Float[Array, "T D"], PagedKVCache | PackedKV]:
    """Run stacked layers in a loop.

    Each round of the loop runs as many layers as it takes until their specs repeat, say a layer with a window
    and one without; layers that fill no round follow after the loop. The cache is carried through it, and
    written where it lies.

    Args:
        layers: Stacked leaves, `[L, …]` each.
        x: Hidden states.
        metadata: The metadata of the step, for all specs.
        cache: The cache of all layers; None to attend among the packed tokens alone.
        specs: The attention of each layer.
        run: Runs one layer: `(x, layer, metadata, cache, spec) -> (x, written)`.

    Returns:
        Hidden states, and the cache with this step's keys; without a cache, keys and values of each layer.
    """
    L, period = len(specs), _period(specs)
    num_rounds = L // period
    pages_per_layer = 0 if cache is None else cache.k_pages.shape[0] // L

    def run_layer(carry: Carry, i: int | Array, spec: AttentionSpec) -> tuple[Carry, Any]:
        x, cache = carry
        layer = _layer_of(layers, i)
        if cache is None:
            x, packed = run(x, layer, metadata, None, spec)
            return (x, None), packed
        # A layer finds its part of the pages by their numbers.
        x, written = run(x, layer, metadata.at_page(i * pages_per_layer), _scales_of(cache, i), spec)
        return (x, dataclasses.replace(written, k_scale=cache.k_scale, v_scale=cache.v_scale)), None

    def run_round(carry: Carry, first: Array) -> tuple[Carry, list]:
        packed = []
        for j in range(period):
            carry, of_layer = run_layer(carry, first + j, specs[j])
            packed.append(of_layer)
        return carry, packed

    firsts = jnp.arange(0, num_rounds * period, period, dtype=jnp.int32)
    carry, packed_rounds = lax.scan(run_round, (x, cache), firsts)
    rest = []
    for i in range(num_rounds * period, L):
        carry, of_layer = run_layer(carry, i, specs[i])
        rest.append(of_layer)
    x, cache = carry
    return x, (*_in_order(packed_rounds, num_rounds), *rest) if cache is None else cache


def _period(specs: tuple[AttentionSpec, ...]) -> int:
    """The smallest number of layers after which the specs repeat, as far as there are layers."""
    L = len(specs)
    return next(period for period in range(1, L + 1) if specs[period:] == specs[: L - period])


def _in_order(packed_rounds: list, num_rounds: int) -> PackedKV:
    """Keys and values layer by layer, from those of each layer of a round, with the rounds in front."""
    return tuple(
        jax.tree.map(lambda leaf, r=r: leaf[r], pair) for r in range(num_rounds) for pair in packed_rounds
    )


def _scales_of(cache: PagedKVCache, i: int | Array) -> PagedKVCache:
    """The cache of all layers with the scales of one."""
    k_scale, v_scale = jax.tree.map(
        lambda scale: lax.dynamic_index_in_dim(scale, i, keepdims=False), (cache.k_scale, cache.v_scale)
    )
    return dataclasses.replace(cache, k_scale=k_scale, v_scale=v_scale)
