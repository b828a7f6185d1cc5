"""What the Pallas kernels take of the metadata, as arrays: they know nothing of its classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.metadata.schedule import SplitPlan, Tiles, Tiling
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.arrays import (
    Attended,
    GradientInputs,
    KeyLookup,
    KeyTileArrays,
    SplitArrays,
    TileArrays,
    TileList,
    VisibleRange,
)


class KernelInputs(NamedTuple):
    """The metadata's part for one layer.

    Attributes:
        visible: Which keys each token sees.
        lookup: Where a sequence's keys lie.
        tile_lists: The tiles.
    """

    visible: VisibleRange
    lookup: KeyLookup
    tile_lists: tuple[TileList, ...]


def kernel_inputs(metadata: AttentionMetadata, spec: AttentionSpec, tiling: Tiling) -> KernelInputs:
    """The part of the metadata that a kernel reads.

    Args:
        metadata: The batch's metadata.
        spec: The layer.
        tiling: How the kernel wants the query axis cut.

    Raises:
        MissingFieldError: If `prepare_metadata` was not asked for it.
    """
    visible = metadata.visible_keys(spec.window_class)
    if metadata.page_size is None:
        lookup = KeyLookup(metadata.cu_kv_lens, None)
    else:
        lookup = KeyLookup(metadata.page_indptr, metadata.page_list)
    return KernelInputs(
        visible=VisibleRange(visible.kv_start, visible.kv_end),
        lookup=lookup,
        tile_lists=tuple(_tile_list(tiles) for tiles in visible.schedule(tiling).lists),
    )


class GradientWork(NamedTuple):
    """What the kernels of a gradient take.

    Attributes:
        inputs: What they read.
        tile_lists: Tiles of queries.
        key_tiles: Tiles of keys.
        num_rows: Rows of the gradients of keys and values (see `gradients.Gradients`).
        key_dtype: Their dtype.
    """

    inputs: GradientInputs
    tile_lists: tuple[TileList, ...]
    key_tiles: KeyTileArrays
    num_rows: int
    key_dtype: Any


def gradient_work(
    q: Float[Array, "T N H"],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    results: Attended,
    d_results: Attended,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    tiling: Tiling,
    key_block: int,
) -> GradientWork:
    """What the kernels of a gradient take of a backward pass.

    Args:
        q: Queries, packed.
        k: Keys, packed `[T, K, H]` or in pages `[pages, page_size, K, H]`.
        v: Values, like the keys.
        results: Outputs and log-sum-exp.
        d_results: Their gradients.
        metadata: The batch's metadata.
        spec: The layer.
        tiling: How the kernel wants the query axis cut.
        key_block: Keys per tile of keys.

    Raises:
        MissingFieldError: If `prepare_metadata` was not asked for the tiles.
    """
    visible, lookup, tile_lists = kernel_inputs(metadata, spec, tiling)
    found = metadata.visible_keys(spec.window_class).key_tiles_of(key_block)
    flat_k, flat_v = (x.reshape(-1, *x.shape[-2:]) for x in (k, v))
    page_size = metadata.page_size
    return GradientWork(
        GradientInputs(visible, lookup, q, flat_k, flat_v, results, d_results),
        tile_lists,
        KeyTileArrays(
            found.seq, found.kv_start, found.kv_end, found.q_start, found.q_end, found.num_live[None]
        ),
        num_rows=k.shape[0] if page_size is None else metadata.page_list.shape[0] * page_size,
        # Sums over sequences that share a page are still to come.
        key_dtype=k.dtype if page_size is None else jnp.float32,
    )


def _tile_list(tiles: Tiles) -> TileList:
    return TileList(
        tiles=TileArrays(tiles.seq, tiles.q_start, tiles.q_len, tiles.kv_start, tiles.kv_end),
        block_q=tiles.block_q,
        split=None if tiles.split is None else _split_arrays(tiles.split),
        order=tiles.order,
        num_live=tiles.num_live[None],
    )


def _split_arrays(split: SplitPlan) -> SplitArrays:
    return SplitArrays(split.tile, split.kv_start, split.kv_end, split.indptr)
