"""Arithmetic of a packed axis, on which segments lie one after the other: tokens, pages or tiles of each row.

Pure, on the device; sizes are static.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int32


def prefix_sums(lens: Int32[Array, " S"]) -> Int32[Array, " S_plus_1"]:
    """Offsets from lengths: 0, lens[0], lens[0] + lens[1], and so on; the last one is the sum of all."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lens, dtype=jnp.int32)])


def segment_of(ends: Int32[Array, " S"], length: int) -> Int32[Array, " length"]:
    """The segment of each index 0..length-1, given ascending segment ends; S past the last end.

    It is the number of ends at or before the index: a histogram of the ends, summed up. Linear;
    a binary search per index costs log(S) gathers, and unrolled takes seconds to compile.
    """
    ends_at = jnp.zeros(length, jnp.int32).at[ends].add(1, mode="drop")
    return jnp.cumsum(ends_at, dtype=jnp.int32)


def padded_rows(
    values: Int32[Array, " P"], starts: Int32[Array, " S"], lens: Int32[Array, " S"], width: int
) -> Int32[Array, "S width"]:
    """The rectangle whose row s begins with segment s of `values`, and is 0 from there on.

    Args:
        values: The packed axis.
        starts: Where each segment begins on it.
        lens: Entries of each segment; those past `width` are cut off.
        width: Columns.
    """
    column = jnp.arange(width, dtype=jnp.int32)[None, :]
    entry = starts[:, None] + column
    return jnp.where(column < lens[:, None], values.at[entry].get(mode="clip"), 0)
