"""Quantised caches: which element types there are, and what a stored 1 counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn_kernels.arrays import KVScales

QUANTIZED_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
"""Element types of a quantised cache: a stored number counts times the scale of its head."""


def check_scales(
    dtype: jax.typing.DTypeLike,
    num_kv_heads: int,
    k_scale: jax.typing.ArrayLike | None,
    v_scale: jax.typing.ArrayLike | None,
) -> KVScales | None:
    """The scales of keys and values as arrays `[K]`, float32; None where nothing is quantised.

    Args:
        dtype: Element type of keys and values.
        num_kv_heads: Key/value heads, K.
        k_scale: One number, or one per head.
        v_scale: The same for values.

    Raises:
        ValueError: If there are scales and nothing is quantised, or the other way round, or their shape
            is wrong.
    """
    name = jnp.dtype(dtype).name
    for argument, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is None) == is_quantized(dtype):
            given = "was not given" if scale is None else "was given"
            raise ValueError(
                f"{argument} {given}, and keys and values are stored as {name}; give scales exactly where "
                f"they are stored as {', '.join(QUANTIZED_DTYPES)}"
            )
        if scale is not None and jnp.shape(scale) not in ((), (num_kv_heads,)):
            raise ValueError(
                f"{argument} has shape {jnp.shape(scale)}; give one number, or one per key head, "
                f"({num_kv_heads},)"
            )
    if k_scale is None or v_scale is None:
        return None
    k_scale, v_scale = (jnp.asarray(scale, jnp.float32) for scale in (k_scale, v_scale))
    return KVScales(jnp.broadcast_to(k_scale, num_kv_heads), jnp.broadcast_to(v_scale, num_kv_heads))


def quantization_scale(x: Float[Array, "T K H"], dtype: jax.typing.DTypeLike) -> Float[Array, " K"]:
    """The scale of each head with which the largest of its numbers is the largest that can be stored.

    Args:
        x: Keys or values of some tokens that stand for all, such as those of a few prompts.
        dtype: Element type of the quantised cache.

    Returns:
        Scales, float32. They are positive for a head of zeros, and not finite where a number of the head is
        not.

    Raises:
        ValueError: If the dtype is not one of `QUANTIZED_DTYPES`.
    """
    largest = jnp.abs(x.astype(jnp.float32)).max(axis=(0, 2))
    return jnp.where(largest == 0, 1.0, largest) / _largest(dtype)


def is_quantized(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a cache of this element type is a quantised one."""
    return jnp.dtype(dtype).name in QUANTIZED_DTYPES


def _largest(dtype: jax.typing.DTypeLike) -> float:
    """The largest number that a quantised cache can store; its negative too."""
    name = jnp.dtype(dtype).name
    if not is_quantized(dtype):
        raise ValueError(f"dtype={name} is not one of {', '.join(QUANTIZED_DTYPES)}")
    return 127.0 if name == "int8" else float(jnp.finfo(dtype).max)


def quantized(rows: Array, scale: Array, dtype: jnp.dtype) -> Array:
    """Rows in units of their head's scale, rounded to the nearest; what is too large becomes the largest."""
    largest = _largest(dtype)
    rows = jnp.clip(rows.astype(jnp.float32) / scale[None, :, None], -largest, largest)
    return (jnp.round(rows) if dtype == jnp.int8 else rows).astype(dtype)
