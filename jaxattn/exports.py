"""Exports of a prepared batch to other systems' conventions, and imports back.

`to_*` functions turn `AttentionMetadata` into the arrays that another system's attention takes, and
`from_*` functions turn such arrays into a `RaggedBatch`. Both are pure and have static shapes, so
they run inside a jit, and what nobody reads of an export is not computed. A field whose description
ends in one of our names is that field, unchanged.

What a convention does not say is given beside it: the tokens always, and phases, state slots or
the number of sequences where they are missing (`Stated`). An import undoes an export, but for two
things:

- *Reserved pages*, beyond those that hold keys, are in no convention. A batch that comes back has
  the same metadata but for `page_indptr` and `page_list`, and no page to `advance` into.
- A sequence that outran its pages (`advance` went too far) has, in a rectangular page table, a
  page 0 that it never owned. `check_batch` finds it before the export.

Values are not checked here; `jaxattn.batch.check_batch` checks the imported batch on the device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, Unpack, no_type_check

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Bool, Int32

from jaxattn.batch import PAD_SLOT, RaggedBatch, pack_fields
from jaxattn.buckets import Bucket
from jaxattn.consumers import Consumer
from jaxattn.fields import described, fields_of
from jaxattn.metadata import METADATA_FIELDS, AttentionMetadata
from jaxattn.schedule import segment_of
from jaxattn.spec import AttentionSpec, WindowClass


def _constant(meaning: str) -> Any:
    """A static field: an int of the bucket, known while tracing."""
    return dataclasses.field(metadata={"static": True, "meaning": meaning, "also_called": ""})


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
    max_seqlen_q: int = _constant("bound on query lengths: the bucket's, not the batch's maximum")
    max_seqlen_k: int = _constant("bound on key counts: what the page table or the bucket can hold")


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class VllmMetadata:
    """vLLM's `CommonAttentionMetadata` (v1, backend.py at 0014ca6b).

    There `num_reqs` and `num_actual_tokens` are host ints, and `slot_mapping` is int64: x64 is off in
    JAX, so cast on the host, `np.asarray(slot_mapping, np.int64)`.
    """

    query_start_loc: Int32[Array, " R_plus_1"] = described(
        "prefix sums of query lengths; the tail repeats the last value", "cu_q_lens"
    )
    seq_lens: Int32[Array, " R"] = described(
        "keys per request, this step's included; `pad_seq_len` for padding"
    )
    num_computed_tokens: Int32[Array, " R"] = described(
        "keys cached before this step; 0 for padding", "context_lens"
    )
    block_table: Int32[Array, "R M"] = described("pages of each request; 0, the null block, past its keys")
    slot_mapping: Int32[Array, " T"] = described(
        "flat cache slot of each token; -1 where it has none, which wraps in JAX (`slots_from_vllm`)"
    )
    num_reqs: Int32[Array, ""] = described("requests", "num_seqs")
    num_actual_tokens: Int32[Array, ""] = described("query tokens", "num_tokens")
    logits_indices: Int32[Array, " R"] = described(
        "last token of each request; 0 where it has none", "logits_indices"
    )
    is_prefilling: Bool[Array, " R"] | None = described(
        "whether a request still prefills; False for padding; None in vLLM where nobody asks"
    )
    max_query_len: int = _constant("bound on query lengths: the bucket's, not the batch's maximum")
    max_seq_len: int = _constant("bound on key counts: what the block table can hold")


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


class Stated(TypedDict, total=False):
    """What an import may be told, because the convention does not say it.

    Attributes:
        is_decode: Whether each row decodes; never guessed from its length. Default: all rows in a
            bucket with `max_q_len=1`, none in any other.
        state_slots: Slot of each row's recurrent state. Default: the row.
        num_seqs: Sequences of the batch. Default, where the convention has no field for it: up to
            the last row that has keys.
    """

    is_decode: Bool[Array, " R"]
    state_slots: Int32[Array, " R"]
    num_seqs: Int32[Array, ""]


def page_indices(metadata: AttentionMetadata, max_pages_per_seq: int) -> Int32[Array, "R M"]:
    """The rectangular page table, of the pages that hold keys; 0 elsewhere.

    It is the only field of any convention that grows with sequences × context: 4 R M bytes, which
    is 32 MiB at 1,024 sequences of 128K tokens in pages of 16. Build it on the device, where it is
    used, and never send it from the host.

    Args:
        metadata: The metadata of a paged batch.
        max_pages_per_seq: Columns, M. The pages of a longer sequence are cut off, silently, since
            lengths are not known while tracing (`check_table_width`).

    Raises:
        ValueError: If the batch has no pages, or `max_pages_per_seq` is not positive.
    """
    if metadata.page_size is None:
        raise ValueError(
            "metadata is of an unpaged batch, and this convention needs a page table; "
            "give nest_sequences page_tables and page_size"
        )
    if max_pages_per_seq < 1:
        raise ValueError(
            f"max_pages_per_seq={max_pages_per_seq} must be at least 1: the pages of the longest sequence"
        )
    column = jnp.arange(max_pages_per_seq, dtype=jnp.int32)[None, :]
    start, end = metadata.kv_page_indptr[:-1, None], metadata.kv_page_indptr[1:, None]
    page = metadata.kv_page_list.at[start + column].get(mode="clip")
    return jnp.where(column < end - start, page, 0)


def check_table_width(metadata: AttentionMetadata, max_pages_per_seq: int) -> None:
    """Check that no sequence has more pages than a page table has columns: a `checkify.check`.

    Args:
        metadata: The metadata of a paged batch.
        max_pages_per_seq: Columns of the table.
    """
    pages = jnp.diff(metadata.kv_page_indptr).max()
    checkify.check(
        pages <= max_pages_per_seq,
        "a sequence has {pages} pages, more than max_pages_per_seq=" + str(max_pages_per_seq),
        pages=pages,
    )


def window_size(spec: AttentionSpec | WindowClass) -> tuple[int, int]:
    """The keys to the left and to the right that a token sees besides its own; -1 for all of them.

    The `window_size` of FlashAttention and Transformer Engine, `local_window_size` of `jax.nn`, and,
    its first part, FlashInfer's `window_left`. Ours counts the token's own key: W keys are
    `(W - 1, 0)`. The window is aligned to the end of the keys, as FlashAttention's is.

    Args:
        spec: The layer, or its window class.

    Raises:
        ValueError: If the window class is one of your own, which is no such pair.
    """
    window = spec.window_class if isinstance(spec, AttentionSpec) else spec
    if not isinstance(window, WindowClass) or window.prefix_lm:
        raise ValueError(f"window_class={window} is no (left, right) pair; export its visible ranges instead")
    left = -1 if window.sliding_window is None else window.sliding_window - 1
    return left, 0 if window.causal else -1


def slots_from_vllm(slot_mapping: Int32[Array, " T"]) -> Int32[Array, " T"]:
    """Slots of vLLM for a scatter in JAX with `mode="drop"`: its -1 would wrap to the last slot.

    Args:
        slot_mapping: Flat slots; negative where a token has none.
    """
    return jnp.where(slot_mapping < 0, PAD_SLOT, slot_mapping)


def to_flashinfer(metadata: AttentionMetadata) -> FlashInferMetadata:
    """Export to FlashInfer.

    Args:
        metadata: The metadata, with what `EXPORT_CONSUMERS["flashinfer"]` reads.
    """
    R = metadata.bucket.seqs
    return FlashInferMetadata(
        **_unchanged(FlashInferMetadata, metadata),
        batch_indices=jnp.where(metadata.token_to_seq == R, -1, metadata.token_to_seq),
    )


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
        **_unchanged(FlashAttentionMetadata, metadata),
        page_table=_optional_table(metadata, max_pages_per_seq),
        max_seqlen_q=metadata.bucket.max_q_len,
        max_seqlen_k=_max_keys(metadata, max_pages_per_seq),
    )


def to_vllm(metadata: AttentionMetadata, *, max_pages_per_seq: int, pad_seq_len: int = 0) -> VllmMetadata:
    """Export to vLLM.

    Args:
        metadata: The metadata of a paged batch, with what `EXPORT_CONSUMERS["vllm"]` reads.
        max_pages_per_seq: Columns of the block table.
        pad_seq_len: `seq_lens` of padding rows. vLLM pads with 0, at which some of its kernels divided
            by zero (its pull requests 38436 and 57094); 1 reads a key of the null block instead.

    Raises:
        ValueError: If the batch has no pages, or `max_pages_per_seq` is not positive.
    """
    table = page_indices(metadata, max_pages_per_seq)
    is_real = _is_real_row(metadata)
    slots = metadata.slot_mapping
    return VllmMetadata(
        **_unchanged(VllmMetadata, metadata),
        seq_lens=jnp.where(is_real, metadata.kv_lens, pad_seq_len),
        block_table=table,
        slot_mapping=jnp.where(slots == PAD_SLOT, -1, slots),
        is_prefilling=is_real & ~metadata.is_decode,
        max_query_len=metadata.bucket.max_q_len,
        max_seq_len=_max_keys(metadata, max_pages_per_seq),
    )


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
        **_unchanged(RaggedPagedAttentionMetadata, metadata),
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
    cu_q_lens = _prefix_sums(q_lens[row_order])
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
    is_real = _is_real_row(metadata)
    is_offset = jnp.arange(R + 1) <= metadata.num_seqs
    seq = metadata.token_to_seq
    table = _optional_table(metadata, max_pages_per_seq)
    return CudnnMetadata(
        q_seqlen=jnp.where(is_real, metadata.q_lens, pad_len)[None],
        kv_seqlen=jnp.where(is_real, metadata.kv_lens, pad_len)[None],
        q_offsets=jnp.where(is_offset, metadata.cu_q_lens, -1)[None],
        kv_offsets=jnp.where(is_offset, metadata.cu_kv_lens, -1)[None],
        segment_ids=jnp.where(seq == R, 0, seq + 1)[None],
        segment_pos=metadata.positions[None],
        page_table=None if table is None else table[:, None, :, None],
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

    Raises:
        ValueError: If an array does not have the bucket's size, or pages and `page_size` disagree.
    """
    _check_paged(exported.paged_kv_indices is not None, page_size)
    rows = _rows(jnp.diff(exported.qo_indptr), exported.kv_len_arr, None, stated)
    pages = None
    if exported.paged_kv_indptr is not None and exported.paged_kv_indices is not None:
        pages = _Pages(_live(jnp.diff(exported.paged_kv_indptr), rows.num_seqs), exported.paged_kv_indices)
    return _pack(token_ids, rows, pages, bucket, page_size)


def from_flash_attention(
    exported: FlashAttentionMetadata,
    token_ids: Int32[Array, " T"],
    *,
    bucket: Bucket,
    page_size: int | None,
    **stated: Unpack[Stated],
) -> RaggedBatch:
    """Import from FlashAttention. Pure; values are not checked (`check_batch`).

    Arguments and errors are those of `from_flashinfer`.
    """
    rows = _rows(jnp.diff(exported.cu_seqlens_q), exported.seqused_k, None, stated)
    return _pack_table(token_ids, rows, exported.page_table, bucket, page_size)


def from_vllm(
    exported: VllmMetadata,
    token_ids: Int32[Array, " T"],
    *,
    bucket: Bucket,
    page_size: int,
    **stated: Unpack[Stated],
) -> RaggedBatch:
    """Import from vLLM. Pure; values are not checked (`check_batch`).

    Slots are derived again from the block table. Phases are those of `is_prefilling`, where it is
    given.

    Arguments and errors are those of `from_flashinfer`.
    """
    if exported.is_prefilling is not None and "is_decode" not in stated:
        stated["is_decode"] = ~exported.is_prefilling
    rows = _rows(jnp.diff(exported.query_start_loc), exported.seq_lens, exported.num_reqs, stated)
    return _pack_table(token_ids, rows, exported.block_table, bucket, page_size)


def from_ragged_paged_attention(
    exported: RaggedPagedAttentionMetadata,
    token_ids: Int32[Array, " T"],
    *,
    bucket: Bucket,
    page_size: int,
    **stated: Unpack[Stated],
) -> RaggedBatch:
    """Import from JAX's ragged paged attention. Pure; values are not checked (`check_batch`).

    Arguments and errors are those of `from_flashinfer`.
    """
    rows = _rows(jnp.diff(exported.cu_q_lens), exported.kv_lens, exported.num_seqs[0], stated)
    return _pack_table(token_ids, rows, exported.page_indices, bucket, page_size)


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
    kernel's groups leave them out. Arguments and errors are otherwise those of `from_flashinfer`.
    """
    num_seqs = exported.distribution[2]
    rows = _rows(jnp.diff(exported.cu_q_lens), exported.kv_lens, num_seqs, stated)
    rank = exported.row_rank
    rows = rows._replace(
        q_lens=rows.q_lens[rank],
        kv_lens=rows.kv_lens[rank],
        is_decode=None if rows.is_decode is None else rows.is_decode[rank],
        state_slots=None if rows.state_slots is None else rows.state_slots[rank],
    )
    table = exported.page_indices.reshape(rank.shape[0], -1)[rank]
    return _pack_table(token_ids[exported.token_rank], rows, table, bucket, page_size)


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

    Arguments and errors are those of `from_flashinfer`.
    """
    num_seqs = (exported.q_offsets[0] >= 0).sum(dtype=jnp.int32) - 1
    rows = _rows(exported.q_seqlen[0], exported.kv_seqlen[0], num_seqs, stated)
    table = None if exported.page_table is None else exported.page_table[:, 0, :, 0]
    return _pack_table(token_ids, rows, table, bucket, page_size)


class _Rows(NamedTuple):
    """The sequences of an imported batch; lengths are 0 for padding rows."""

    num_seqs: Int32[Array, ""]
    q_lens: Int32[Array, " R"]
    kv_lens: Int32[Array, " R"]
    is_decode: Bool[Array, " R"] | None
    state_slots: Int32[Array, " R"] | None


class _Pages(NamedTuple):
    """The pages of an imported batch, as CSR."""

    counts: Int32[Array, " R"]
    page_list: Int32[Array, " P"]


def _rows(
    q_lens: Int32[Array, " R"],
    kv_lens: Int32[Array, " R"],
    num_seqs: Int32[Array, ""] | None,
    stated: Stated,
) -> _Rows:
    """The rows of a batch; what stands past `num_seqs` is ignored, for some systems leave it unset."""
    if num_seqs is None:
        row = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
        num_seqs = jnp.where(kv_lens > 0, row + 1, 0).max()
    num_seqs = stated.get("num_seqs", num_seqs)
    return _Rows(
        num_seqs=num_seqs,
        q_lens=_live(q_lens, num_seqs),
        kv_lens=_live(kv_lens, num_seqs),
        is_decode=stated.get("is_decode"),
        state_slots=stated.get("state_slots"),
    )


def _pack_table(
    token_ids: Int32[Array, " T"],
    rows: _Rows,
    table: Int32[Array, "R M"] | None,
    bucket: Bucket,
    page_size: int | None,
) -> RaggedBatch:
    """A batch from rows and a rectangular page table, of which each row uses what its keys need."""
    _check_paged(table is not None, page_size)
    if table is None or page_size is None:
        return _pack(token_ids, rows, None, bucket, page_size)
    if table.shape[0] != bucket.seqs:
        raise ValueError(f"the page table has {table.shape[0]} rows; {bucket} needs {bucket.seqs}")
    counts = (rows.kv_lens + (page_size - 1)) // page_size
    indptr = _prefix_sums(counts)
    row = jnp.minimum(segment_of(indptr[1:], bucket.pages), bucket.seqs - 1)
    column = jnp.arange(bucket.pages, dtype=jnp.int32) - indptr[row]
    return _pack(token_ids, rows, _Pages(counts, table.at[row, column].get(mode="clip")), bucket, page_size)


def _pack(
    token_ids: Int32[Array, " T"], rows: _Rows, pages: _Pages | None, bucket: Bucket, page_size: int | None
) -> RaggedBatch:
    R, P = bucket.seqs, bucket.pages
    row = jnp.arange(R, dtype=jnp.int32)
    is_real = row < rows.num_seqs
    is_decode = jnp.full(R, bucket.max_q_len == 1) if rows.is_decode is None else rows.is_decode
    state_slots = row if rows.state_slots is None else rows.state_slots
    if pages is None:
        pages = _Pages(jnp.zeros(R, jnp.int32), jnp.zeros(P, jnp.int32))
    if rows.kv_lens.shape[0] != R or pages.page_list.shape[0] != P:
        raise ValueError(
            f"{rows.kv_lens.shape[0]} rows and {pages.page_list.shape[0]} pages given; "
            f"{bucket} needs {R} and {P}"
        )
    return pack_fields(
        bucket,
        page_size,
        num_seqs=rows.num_seqs,
        token_ids=token_ids,
        cu_q_lens=_prefix_sums(rows.q_lens),
        kv_lens=rows.kv_lens,
        is_decode=is_real & is_decode,
        state_slots=jnp.where(is_real, state_slots, PAD_SLOT),
        prefix_lm_lens=jnp.zeros_like(state_slots),
        page_indptr=_prefix_sums(pages.counts),
        page_list=_live(pages.page_list, pages.counts.sum(dtype=jnp.int32)),
    )


def _unchanged(kind: type, metadata: AttentionMetadata) -> dict[str, Any]:
    """The fields of an export that are fields of ours under another name; None without pages."""
    definitions = fields_of(AttentionMetadata)
    unpaged = metadata.page_size is None
    return {
        theirs: None if unpaged and definitions[ours].needs else metadata[ours]
        for theirs, ours in _renamed(kind).items()
    }


def _renamed(kind: type) -> dict[str, str]:
    """Our name of each field of an export that is a field of ours."""
    names = {field.name: field.metadata["also_called"] for field in dataclasses.fields(kind)}
    return {theirs: ours for theirs, ours in names.items() if ours in METADATA_FIELDS}


_TABLE = ("kv_page_indptr", "kv_page_list")


def _consumer(name: str, kind: type, *also: str) -> Consumer:
    return Consumer(name, frozenset({*_renamed(kind).values(), *also}))


EXPORT_CONSUMERS = {
    consumer.name: consumer
    for consumer in (
        _consumer("flashinfer", FlashInferMetadata, "token_to_seq"),
        _consumer("flash_attention", FlashAttentionMetadata, *_TABLE),
        _consumer("vllm", VllmMetadata, "kv_lens", "slot_mapping", "is_decode", *_TABLE),
        _consumer("ragged_paged_attention", RaggedPagedAttentionMetadata, "num_seqs", *_TABLE),
        _consumer(
            "ragged_paged_attention_v3",
            RaggedPagedAttentionV3Metadata,
            *("q_lens", "cu_q_lens", "kv_lens", *_TABLE),
        ),
        _consumer(
            "cudnn",
            CudnnMetadata,
            *("num_seqs", "q_lens", "kv_lens", "cu_q_lens", "cu_kv_lens", "token_to_seq", "positions"),
            *_TABLE,
        ),
    )
}
"""What each export reads: `prepare_metadata(batch, consumers=EXPORT_CONSUMERS["vllm"])`."""


def _is_real_row(metadata: AttentionMetadata) -> Bool[Array, " R"]:
    return jnp.arange(metadata.bucket.seqs) < metadata.num_seqs


def _live(values: Int32[Array, " X"], count: Int32[Array, ""]) -> Int32[Array, " X"]:
    """The first `count` values, and zeros."""
    return jnp.where(jnp.arange(values.shape[0]) < count, values, 0)


def _optional_table(metadata: AttentionMetadata, max_pages_per_seq: int | None) -> Int32[Array, "R M"] | None:
    if metadata.page_size is None and max_pages_per_seq is None:
        return None
    if max_pages_per_seq is None:
        raise ValueError(
            "max_pages_per_seq=None, but the batch is paged; give the pages of the longest sequence"
        )
    return page_indices(metadata, max_pages_per_seq)


def _max_keys(metadata: AttentionMetadata, max_pages_per_seq: int | None) -> int:
    """The most keys a sequence can have, by its page table or, unpaged, beside its queries."""
    if metadata.page_size is None or max_pages_per_seq is None:
        return metadata.bucket.max_q_len
    return max_pages_per_seq * metadata.page_size


def _check_paged(has_pages: bool, page_size: int | None) -> None:
    if has_pages != (page_size is not None):
        raise ValueError(
            f"page_size={page_size} for an export {'with' if has_pages else 'without'} pages; "
            "give the page size of its cache, or None where it has no pages"
        )


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


def _prefix_sums(lens: Int32[Array, " R"]) -> Int32[Array, " R_plus_1"]:
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lens, dtype=jnp.int32)])
