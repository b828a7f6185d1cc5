"""FlashInfer's convention: `BatchPrefillWithPagedKVCacheWrapper.plan` (fb28d724)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.interop.common import Pages, Stated, check_paged, live, pack, read_rows, unchanged
from jaxattn.metadata.fields import described
from jaxattn.metadata.superset import AttentionMetadata


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInferMetadata:
    """What FlashInfer's `plan`, `BatchAttention` and `append_paged_kv_cache` take (fb28d724).

    Its `window_left` is `window_size(spec)[0]`. The page fields are None for an unpaged batch, for
    its ragged wrappers. `get_seq_lens` must not be called on `paged_kv_last_page_len`: it sees one key
    in a row without pages; the lengths are `kv_len_arr`.
    """

    qo_indptr: Int32[Array, " R_plus_1"] = described(
        "prefix sums of query lengths; the tail repeats the last value", "cu_q_lens"
    )
    kv_indptr: Int32[Array, " R_plus_1"] = described(
        "prefix sums of key counts, of ragged keys; the tail repeats the last value", "cu_kv_lens"
    )
    kv_len_arr: Int32[Array, " R"] = described(
        "keys per request, this step's included; 0 for padding", "kv_lens"
    )
    paged_kv_indptr: Int32[Array, " R_plus_1"] | None = described(
        "prefix sums of page counts; the tail repeats the last value", "kv_page_indptr"
    )
    paged_kv_indices: Int32[Array, " P"] | None = described(
        "pages, request after request; 0 past the end", "kv_page_list"
    )
    paged_kv_last_page_len: Int32[Array, " R"] | None = described(
        "keys in the last page, 1 to the page size; 1, since 0 is not allowed, for padding",
        "kv_last_page_lens",
    )
    batch_indices: Int32[Array, " T"] = described("request of each token; -1, which is skipped, for padding")
    positions: Int32[Array, " T"] = described("position of each token; 0 for padding", "positions")


def to_flashinfer(metadata: AttentionMetadata) -> FlashInferMetadata:
    """Export to FlashInfer.

    Args:
        metadata: The metadata, with what `EXPORT_CONSUMERS["flashinfer"]` reads.
    """
    R = metadata.bucket.seqs
    return FlashInferMetadata(
        **unchanged(FlashInferMetadata, metadata),
        batch_indices=jnp.where(metadata.token_to_seq == R, -1, metadata.token_to_seq),
    )


def from_flashinfer(
    exported: FlashInferMetadata,
    token_ids: Int32[Array, " T"],
    *,
    bucket: Bucket,
    page_size: int | None,
    **stated: Unpack[Stated],
) -> RaggedBatch:
    """Import from FlashInfer. Pure; values are not checked (`check_batch`).

    Args:
        exported: The arrays.
        token_ids: Query tokens; 0 in the padding.
        bucket: The bucket, of the arrays' sizes.
        page_size: Tokens per page, or None for a batch without pages.
        **stated: What the convention does not say (`Stated`).

    Returns:
        The batch.

    Raises:
        ValueError: If an array does not have the bucket's size, or pages and `page_size` disagree.
    """
    check_paged(exported.paged_kv_indices is not None, page_size)
    rows = read_rows(jnp.diff(exported.qo_indptr), exported.kv_len_arr, None, stated)
    pages = None
    if exported.paged_kv_indptr is not None and exported.paged_kv_indices is not None:
        pages = Pages(live(jnp.diff(exported.paged_kv_indptr), rows.num_seqs), exported.paged_kv_indices)
    return pack(token_ids, rows, pages, bucket, page_size)
