"""What the Pallas kernels take of the metadata, as arrays: they know nothing of its classes."""

from __future__ import annotations

from typing import NamedTuple

from jaxattn.metadata import AttentionMetadata
from jaxattn.schedule import SplitPlan, Tiles, Tiling
from jaxattn.spec import AttentionSpec
from jaxattn_kernels.arrays import KeyLookup, SplitArrays, TileArrays, TileList, VisibleRange


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
