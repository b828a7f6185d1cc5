"""The convention of cuDNN, in JAX (`dot_product_attention`) and Transformer Engine (`SequenceDescriptor`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.interop.common import Stated, is_real_row, optional_table, pack_table, read_rows
from jaxattn.metadata.fields import described
from jaxattn.metadata.superset import AttentionMetadata


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class CudnnMetadata:
    """What cuDNN takes in JAX (0.12) and Transformer Engine (2.x): one packed row of R segments.

    For `SequenceDescriptor.from_seqlens_and_offsets` with `max_segments_per_seq=R`, or
    `from_segment_ids_and_pos`; the latter for unpaged batches, where keys lie beside the queries.
    A row without query tokens is a segment of length 0, on which neither says a word: leave none.

    The window is `window_size(spec)` in Transformer Engine; cuDNN's `sliding_window_length` counts
    the query's own key, as ours. JAX's `paged_attention` takes lengths of shape `[R]`, queries of
    shape `[R, ...]` and a cache of exactly R × M pages.
    """

    q_seqlen: Int32[Array, "1 R"] = described("query tokens per segment; `pad_len` for padding")
    kv_seqlen: Int32[Array, "1 R"] = described(
        "keys per segment, this step's included; `pad_len` for padding"
    )
    q_offsets: Int32[Array, "1 R_plus_1"] = described(
        "first query token of each segment, and the end of the last; -1 for padding"
    )
    kv_offsets: Int32[Array, "1 R_plus_1"] = described("the same of keys that lie one after the other")
    segment_ids: Int32[Array, "1 T"] = described("segment of each token, from 1; 0 for padding")
    segment_pos: Int32[Array, "1 T"] = described("position of each token in its sequence; 0 for padding")
    page_table: Int32[Array, "R 1 M 1"] | None = described(
        "pages of each segment; 0 past its keys; None for an unpaged batch"
    )


def to_cudnn(
    metadata: AttentionMetadata, *, max_pages_per_seq: int | None = None, pad_len: int = -1
) -> CudnnMetadata:
    """Export to cuDNN, as JAX and Transformer Engine call it.

    Args:
        metadata: The metadata, with what `EXPORT_CONSUMERS["cudnn"]` reads.
        max_pages_per_seq: Columns of the page table; for a paged batch, and only there.
        pad_len: Lengths of padding rows. -1 is what both document; cuDNN itself wants 0, and JAX
            makes it so (its pull request 30023).

    Raises:
        ValueError: If `max_pages_per_seq` does not fit the batch.
    """
    R = metadata.bucket.seqs
    is_real = is_real_row(metadata)
    is_offset = jnp.arange(R + 1) <= metadata.num_seqs
    seq = metadata.token_to_seq
    table = optional_table(metadata, max_pages_per_seq)
    return CudnnMetadata(
        q_seqlen=jnp.where(is_real, metadata.q_lens, pad_len)[None],
        kv_seqlen=jnp.where(is_real, metadata.kv_lens, pad_len)[None],
        q_offsets=jnp.where(is_offset, metadata.cu_q_lens, -1)[None],
        kv_offsets=jnp.where(is_offset, metadata.cu_kv_lens, -1)[None],
        segment_ids=jnp.where(seq == R, 0, seq + 1)[None],
        segment_pos=metadata.positions[None],
        page_table=None if table is None else table[:, None, :, None],
    )


def from_cudnn(
    exported: CudnnMetadata,
    token_ids: Int32[Array, " T"],
    *,
    bucket: Bucket,
    page_size: int | None,
    **stated: Unpack[Stated],
) -> RaggedBatch:
    """Import from cuDNN's packed form. Pure; values are not checked (`check_batch`).

    Segments must lie one after the other, without gaps between their queries.

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
    num_seqs = (exported.q_offsets[0] >= 0).sum(dtype=jnp.int32) - 1
    rows = read_rows(exported.q_seqlen[0], exported.kv_seqlen[0], num_seqs, stated)
    table = None if exported.page_table is None else exported.page_table[:, 0, :, 0]
    return pack_table(token_ids, rows, table, bucket, page_size)
