"""FlashAttention's convention: `flash_attn_varlen_func` and `flash_attn_with_kvcache`, at 0251105a."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.interop.common import (
    Stated,
    constant,
    max_keys,
    optional_table,
    pack_table,
    read_rows,
    unchanged,
)
from jaxattn.metadata.fields import described
from jaxattn.metadata.superset import AttentionMetadata


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class FlashAttentionMetadata:
    """What FlashAttention 2 and 3 take, varlen or paged (0251105a). Its window is `window_size(spec)`.

    Unpaged keys are found by `cu_seqlens_k`, paged ones by `page_table` and `seqused_k`. The latter is
    `cache_seqlens` to `flash_attn_with_kvcache` where the new keys are in the cache already; where
    that function appends them (`k=`, `v=`), it wants the lengths before, `seqused_k - seqused_q`.
    Output rows past `cu_seqlens_q[-1]` are left unwritten by it: mask them.
    """

    cu_seqlens_q: Int32[Array, " R_plus_1"] = described(
        "prefix sums of query lengths; the tail repeats the last value", "cu_q_lens"
    )
    cu_seqlens_k: Int32[Array, " R_plus_1"] = described(
        "prefix sums of key counts; the tail repeats the last value", "cu_kv_lens"
    )
    seqused_q: Int32[Array, " R"] = described("query tokens per sequence; 0 for padding", "q_lens")
    seqused_k: Int32[Array, " R"] = described(
        "keys per sequence, this step's included; 0 for padding", "kv_lens"
    )
    page_table: Int32[Array, "R M"] | None = described(
        "pages of each sequence; 0 past its keys; None for an unpaged batch"
    )
    max_seqlen_q: int = constant("bound on query lengths: the bucket's, not the batch's maximum")
    max_seqlen_k: int = constant("bound on key counts: what the page table or the bucket can hold")


def to_flash_attention(
    metadata: AttentionMetadata, *, max_pages_per_seq: int | None = None
) -> FlashAttentionMetadata:
    """Export to FlashAttention.

    Args:
        metadata: The metadata, with what `EXPORT_CONSUMERS["flash_attention"]` reads.
        max_pages_per_seq: Columns of the page table; for a paged batch, and only there.

    Raises:
        ValueError: If `max_pages_per_seq` does not fit the batch.
    """
    return FlashAttentionMetadata(
        **unchanged(FlashAttentionMetadata, metadata),
        page_table=optional_table(metadata, max_pages_per_seq),
        max_seqlen_q=metadata.bucket.max_q_len,
        max_seqlen_k=max_keys(metadata, max_pages_per_seq),
    )


def from_flash_attention(
    exported: FlashAttentionMetadata,
    token_ids: Int32[Array, " T"],
    *,
    bucket: Bucket,
    page_size: int | None,
    **stated: Unpack[Stated],
) -> RaggedBatch:
    """Import from FlashAttention. Pure; values are not checked (`check_batch`).

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
    rows = read_rows(jnp.diff(exported.cu_seqlens_q), exported.seqused_k, None, stated)
    return pack_table(token_ids, rows, exported.page_table, bucket, page_size)
