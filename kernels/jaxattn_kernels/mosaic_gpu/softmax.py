"""The softmax of a consumer's rows: the scores that it is made of, its end, its sink."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn_kernels.mosaic_gpu import plain_rows
from jaxattn_kernels.mosaic_gpu.program import LOG2E, NEG, Arguments, KernelProgram, Unit


def logits(program: KernelProgram, products: jax.Array) -> jax.Array:
    """Scaled, capped products in base 2."""
    if (cap := program.logits_soft_cap) is None:
        return products * (program.scale * LOG2E)
    # tanh(x) = 1 - 2 / (1 + exp(2x)). The GPU's own tanh has eleven bits: under a cap of 50, 2 % of a weight.
    exp_2x = jnp.exp2(products * (program.scale / cap * 2 * LOG2E))
    return cap * LOG2E - (2 * cap * LOG2E) / (1.0 + exp_2x)


def mask(
    program: KernelProgram, s: jax.Array, first_key, row_start, row_end, otherwise: float = NEG
) -> jax.Array:
    """Scores, those of keys that a row does not see replaced."""
    key = first_key + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=program.layout)
    sees = key < across(row_end, s.shape)
    if row_start is not None:
        sees &= across(row_start, s.shape) <= key
    return jnp.where(sees, s, otherwise)


def across(row_values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a number per row along the row."""
    return lax.broadcast_in_dim(row_values, shape, [0])


def finish(
    program: KernelProgram, unit: Unit, head, row_max: jax.Array, total: jax.Array, refs: Arguments
) -> tuple[jax.Array, jax.Array]:
    """`[rows]` twice: the factor on a row's sum of values, and its log-sum-exp in base 2, sink included.

    Args:
        program: What is static.
        unit: The unit.
        head: The key head.
        row_max: `[rows]` What weights are relative to.
        total: `[rows]` Their sum; 0 where no key was seen.
        refs: Arguments.
    """
    rescale = 1.0
    if refs.sinks is not None:  # a tile has its sink once: where it is split, the merge adds it
        num_kv_heads = refs.sinks.shape[0] - 1
        sink = plain_rows.load_numbers(
            program, refs.sinks.at[jnp.where(unit.is_whole == 1, head, num_kv_heads)]
        )
        rescale, row_max, total = add_sink(row_max, total, sink)
    lse = jnp.where(total > 0, row_max + jnp.log2(total), -jnp.inf)
    return rescale / jnp.where(total > 0, total, 1.0), lse


def add_sink(row_max: jax.Array, total: jax.Array, sink: jax.Array) -> tuple[jax.Array, ...]:
    """Add to a softmax a key whose value is 0. What has seen no key has no sink.

    Args:
        row_max: Largest logit, in base 2.
        total: Sum of weights; 0 where no key was seen.
        sink: Logit of the sink, in base 2.

    Returns:
        The factor on sums of weights, the new maximum and the new total.
    """
    new_max = jnp.maximum(row_max, sink)
    rescale = jnp.exp2(row_max - new_max)
    return rescale, new_max, jnp.where(total > 0, total * rescale + jnp.exp2(sink - new_max), total)
