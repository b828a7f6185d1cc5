"""Parameters that are being filled in, each leaf straight into its final place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxattn.checkpoints.layouts.mapping import leaf_name
from jaxattn.models.params import Params


class Filling:
    """Parameters that are being filled in, leaf by leaf.

    Args:
        abstract: Their shapes and places.
    """

    def __init__(self, abstract: Params) -> None:
        self._abstract = abstract
        self._places = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(abstract)}
        self._leaves: dict[str, jax.Array] = {}

    def put(self, name: str, leaf: jax.Array) -> None:
        """Put a leaf where it belongs, and wait until it is there.

        Args:
            name: As tables name it, with the number of its layer even where layers are stacked.
            leaf: Of one layer.
        """
        if name in self._places:
            self._leaves[name] = jax.device_put(leaf, self._places[name].sharding).block_until_ready()
            return
        layers, number, rest = name.split(".", 2)
        name = f"{layers}.{rest}"
        if name not in self._leaves:
            place = self._places[name]
            self._leaves[name] = jnp.zeros(place.shape, place.dtype, device=place.sharding)
        self._leaves[name] = _insert(self._leaves[name], leaf, int(number)).block_until_ready()

    def tree(self) -> Params:
        """The parameters, when all are there."""
        return jax.tree.map_with_path(lambda path, _: self._leaves[leaf_name(path)], self._abstract)


@functools.partial(jax.jit, donate_argnames="stack")
def _insert(stack: jax.Array, leaf: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, leaf, number, 0)
