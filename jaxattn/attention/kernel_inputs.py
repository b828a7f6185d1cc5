"""The part of the metadata that the Pallas kernels read, selected for one layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.metadata.schedule import Tiling
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.arrays import Attended, GradientInputs, KeyLookup, KeyTiles, Tiles, VisibleRange


class KernelInputs(NamedTuple):
    """The metadata's part for one layer.

    Attributes:
        visible: Which keys each token sees.
        lookup: Where a sequence's keys lie.
        tile_lists: The tiles.
    """

    visible: VisibleRange
    lookup: KeyLookup
    tile_lists: tuple[Tiles, ...]


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
        tile_lists=visible.schedule(tiling).lists,
    )


class GradientWork(NamedTuple):
    """What the kernels of a gradient take.

    Attributes:
        inputs: What they read.
        tile_lists: Tiles of queries.
        key_tiles: Tiles of keys.
        num_rows: Rows of the gradients of keys and values (see `vjp.Gradients`).
        key_dtype: Their dtype.
    """

    inputs: GradientInputs
    tile_lists: tuple[Tiles, ...]
    key_tiles: KeyTiles
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
    flat_k, flat_v = (x.reshape(-1, *x.shape[-2:]) for x in (k, v))
    page_size = metadata.page_size
    return GradientWork(
        GradientInputs(visible, lookup, q, flat_k, flat_v, results, d_results),
        tile_lists,
        metadata.visible_keys(spec.window_class).key_tiles_of(key_block),
        num_rows=k.shape[0] if page_size is None else metadata.page_list.shape[0] * page_size,
        # Sums over sequences that share a page are still to come.
        key_dtype=k.dtype if page_size is None else jnp.float32,
    )
