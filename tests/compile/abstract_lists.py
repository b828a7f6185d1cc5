"""Work lists without values: the shapes from which kernels are compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxattn_kernels.arrays import KeyTiles, SplitPlan, Tiles


def ints(*shape: int) -> Any:  # stands for an array
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def abstract_tiles(
    num_tiles: int, block_q: int, *, num_units: int | None = None, has_order: bool = False
) -> Tiles:
    """A list of tiles.

    Args:
        num_tiles: Room for tiles.
        block_q: Tokens per tile, at most.
        num_units: Room for units where their keys are split; None where they are not.
        has_order: Whether they are also ordered.
    """
    split = None
    if num_units is not None:
        split = SplitPlan(
            tile=ints(num_units), kv_start=ints(num_units), kv_end=ints(num_units),
            indptr=ints(num_tiles + 1), split_keys=512,
        )  # fmt: skip
    return Tiles(
        seq=ints(num_tiles), q_start=ints(num_tiles), q_len=ints(num_tiles), kv_start=ints(num_tiles),
        kv_end=ints(num_tiles), num_attending=ints(), num_live=ints(),
        order=ints(num_tiles) if has_order else None, split=split, block_q=block_q,
    )  # fmt: skip


def abstract_key_tiles(num_tiles: int, block_k: int) -> KeyTiles:
    """A list of tiles of at most `block_k` keys."""
    return KeyTiles(
        seq=ints(num_tiles), kv_start=ints(num_tiles), kv_end=ints(num_tiles), q_start=ints(num_tiles),
        q_end=ints(num_tiles), num_live=ints(), block_k=block_k,
    )  # fmt: skip
