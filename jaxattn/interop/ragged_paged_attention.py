"""Ragged paged attention on TPUs: `ragged_paged_attention` of JAX 0.12 and v3 of tpu-inference (001a7cd9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.batch.segments import prefix_sums, segment_of
from jaxattn.interop.common import Stated, pack_table, page_indices, read_rows, unchanged
from jaxattn.metadata.fields import described
from jaxattn.metadata.superset import AttentionMetadata


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class RaggedPagedAttentionMetadata:
    """What JAX's ragged paged attention for TPUs takes (jax 0.12; "v2").

    Its `sliding_window` counts the query's own key, as ours. Of what it is handed only the first
    `num_seqs` rows are valid.
    """

    kv_lens: Int32[Array, " R"] = described(
        "keys per sequence, this step's included; 0 for padding", "kv_lens"
    )
    page_indices: Int32[Array, "R M"] = described("pages of each sequence; 0 past its keys")
    cu_q_lens: Int32[Array, " R_plus_1"] = described(
        "prefix sums of query lengths; the tail repeats the last value", "cu_q_lens"
    )
    num_seqs: Int32[Array, " 1"] = described("sequences, as an array of one")


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class RaggedPagedAttentionV3Metadata:
    """What tpu-inference's ragged paged attention v3 takes (001a7cd9), and the order it wants.

    The groups of `distribution` go by query length, not by phase: the first has queries of exactly
    one token, the second of exactly `chunk_prefill_size`, which is skipped where the kernel is called
    without that size, and the third all others. They are not `metadata.request_distribution`. Rows
    without query tokens, which the kernel does not accept, stand past the groups.

    Queries, keys and values go in as `q[token_order]`; the output comes back as `out[token_rank]`.
    """

    kv_lens: Int32[Array, " R"] = described("keys per sequence, this step's included; 0 for padding")
    page_indices: Int32[Array, " R_times_M"] = described(
        "pages of each sequence, M per row, flat; 0 past its keys"
    )
    cu_q_lens: Int32[Array, " R_plus_1"] = described(
        "prefix sums of query lengths; the tail repeats the last value"
    )
    distribution: Int32[Array, " 3"] = described(
        "ends of the groups: one token, `chunk_prefill_size` tokens, any other number"
    )
    row_order: Int32[Array, " R"] = described("the batch's row at each place; padding rows last")
    row_rank: Int32[Array, " R"] = described("place of each of the batch's rows: its inverse")
    token_order: Int32[Array, " T"] = described(
        "the batch's token at each place; padding tokens stay where they are"
    )
    token_rank: Int32[Array, " T"] = described("place of each of the batch's tokens: its inverse")


def to_ragged_paged_attention(
    metadata: AttentionMetadata, *, max_pages_per_seq: int
) -> RaggedPagedAttentionMetadata:
    """Export to JAX's ragged paged attention.

    Args:
        metadata: The metadata of a paged batch, with what
            `EXPORT_CONSUMERS["ragged_paged_attention"]` reads.
        max_pages_per_seq: Columns of the page table.

    Raises:
        ValueError: If the batch has no pages, or `max_pages_per_seq` is not positive.
    """
    return RaggedPagedAttentionMetadata(
        **unchanged(RaggedPagedAttentionMetadata, metadata),
        page_indices=page_indices(metadata, max_pages_per_seq),
        num_seqs=metadata.num_seqs[None],
    )


def to_ragged_paged_attention_v3(
    metadata: AttentionMetadata, *, max_pages_per_seq: int, chunk_prefill_size: int | None = None
) -> RaggedPagedAttentionV3Metadata:
    """Export to tpu-inference's ragged paged attention v3.

    Args:
        metadata: The metadata of a paged batch, with what
            `EXPORT_CONSUMERS["ragged_paged_attention_v3"]` reads.
        max_pages_per_seq: Columns of the page table.
        chunk_prefill_size: What the kernel will be called with.

    Raises:
        ValueError: If the batch has no pages, or `max_pages_per_seq` is not positive.
    """
    table = page_indices(metadata, max_pages_per_seq)
    q_lens = metadata.q_lens
    is_chunk = q_lens == (1 if chunk_prefill_size is None else chunk_prefill_size)
    group = jnp.where(q_lens == 1, 0, jnp.where(is_chunk, 1, 2))
    group = jnp.where(q_lens > 0, group, 3)
    row_order = jnp.argsort(group, stable=True)
    cu_q_lens = prefix_sums(q_lens[row_order])
    token_order = _moved_tokens(metadata.cu_q_lens, cu_q_lens, row_order, metadata.bucket.tokens)
    return RaggedPagedAttentionV3Metadata(
        kv_lens=metadata.kv_lens[row_order],
        page_indices=table[row_order].reshape(-1),
        cu_q_lens=cu_q_lens,
        distribution=(group[:, None] <= jnp.arange(3)[None, :]).sum(axis=0, dtype=jnp.int32),
        row_order=row_order,
        row_rank=_inverse(row_order),
        token_order=token_order,
        token_rank=_inverse(token_order),
    )


def from_ragged_paged_attention(
    exported: RaggedPagedAttentionMetadata,
    token_ids: Int32[Array, " T"],
    *,
    bucket: Bucket,
    page_size: int,
    **stated: Unpack[Stated],
) -> RaggedBatch:
    """Import from JAX's ragged paged attention. Pure; values are not checked (`check_batch`).

    Args:
        exported: The arrays.
        token_ids: Query tokens; 0 in the padding.
        bucket: The bucket, of the arrays' sizes.
        page_size: Tokens per page.
        **stated: What the convention does not say (`Stated`).

    Returns:
        The batch.

    Raises:
        ValueError: If an array does not have the bucket's size.
    """
    rows = read_rows(jnp.diff(exported.cu_q_lens), exported.kv_lens, exported.num_seqs[0], stated)
    return pack_table(token_ids, rows, exported.page_indices, bucket, page_size)


def from_ragged_paged_attention_v3(
    exported: RaggedPagedAttentionV3Metadata,
    token_ids: Int32[Array, " T"],
    *,
    bucket: Bucket,
    page_size: int,
    **stated: Unpack[Stated],
) -> RaggedBatch:
    """Import from ragged paged attention v3. Pure; values are not checked (`check_batch`).

    Everything that is given, tokens and `stated`, is in the kernel's order, and comes back in that of
    `row_rank` and `token_rank`. State `num_seqs` where rows without query tokens are to come back: the
    kernel's groups leave them out.

    Args:
        exported: The arrays.
        token_ids: Query tokens; 0 in the padding.
        bucket: The bucket, of the arrays' sizes.
        page_size: Tokens per page.
        **stated: What the convention does not say (`Stated`).

    Returns:
        The batch.

    Raises:
        ValueError: If an array does not have the bucket's size.
    """
    num_seqs = exported.distribution[2]
    rows = read_rows(jnp.diff(exported.cu_q_lens), exported.kv_lens, num_seqs, stated)
    rank = exported.row_rank
    rows = rows._replace(
        q_lens=rows.q_lens[rank],
        kv_lens=rows.kv_lens[rank],
        is_decode=None if rows.is_decode is None else rows.is_decode[rank],
        state_slots=None if rows.state_slots is None else rows.state_slots[rank],
    )
    table = exported.page_indices.reshape(rank.shape[0], -1)[rank]
    return pack_table(token_ids[exported.token_rank], rows, table, bucket, page_size)


def _moved_tokens(
    cu_q_lens: Int32[Array, " R_plus_1"],
    moved_cu_q_lens: Int32[Array, " R_plus_1"],
    row_order: Int32[Array, " R"],
    tokens: int,
) -> Int32[Array, " T"]:
    """The token that stands at each place once the rows stand in another order."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    place = jnp.minimum(segment_of(moved_cu_q_lens[1:], tokens), row_order.shape[0] - 1)
    moved = cu_q_lens[row_order[place]] + token - moved_cu_q_lens[place]
    return jnp.where(token < moved_cu_q_lens[-1], moved, token)


def _inverse(order: Int32[Array, " X"]) -> Int32[Array, " X"]:
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
