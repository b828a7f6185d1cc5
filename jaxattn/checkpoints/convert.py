"""From stored arrays to the decoder's parameters, in one compiled program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxattn.checkpoints.mapping import Leaf, Plan, leaf_name
from jaxattn.models import abstract_params
from jaxattn.models.decoder import Params


def lower_converter(plan: Plan, leaves: Mapping[str, Leaf], dtype: jnp.dtype) -> jax.stages.Lowered:
    """The program that reshapes, transposes and casts all weights, before there are any.

    It takes the stored arrays by name, and their memory with them.

    Args:
        plan: Which stored leaf becomes which of the decoder's.
        leaves: The stored leaves.
        dtype: Of the parameters.
    """
    parameters = abstract_params(plan.config, dtype)

    def convert(stored: dict[str, jax.Array]) -> Params:
        def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = leaf_name(path)
            return plan.layouts[name].to_decoder(stored[plan.sources[name]]).astype(leaf.dtype)

        return jax.tree.map_with_path(fill, parameters)

    stored = {source: leaves[source].abstract for source in plan.sources.values()}
    with warnings.catch_warnings():
        # A buffer is reused for a parameter of the same shape and dtype; of the others JAX warns
        # that they are not. They are freed all the same, and no caller can do anything about it.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return jax.jit(convert, donate_argnums=0).lower(stored)
