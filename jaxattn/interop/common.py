"""What the conventions share: windows and page tables of exports, rows and pages of imports."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypedDict

import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Bool, Int32

from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import PAD_SLOT, RaggedBatch, pack_fields
from jaxattn.batch.segments import padded_rows, prefix_sums, segment_of
from jaxattn.metadata.fields import fields_of
from jaxattn.metadata.spec import AttentionSpec, WindowClass
from jaxattn.metadata.superset import METADATA_FIELDS, AttentionMetadata


def constant(meaning: str) -> Any:
    """A static field: an int of the bucket, known while tracing."""
    return dataclasses.field(metadata={"static": True, "meaning": meaning, "also_called": ""})


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
            lengths are not known while tracing; `check_table_width` finds them.

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
    indptr = metadata.kv_page_indptr
    return padded_rows(metadata.kv_page_list, indptr[:-1], jnp.diff(indptr), max_pages_per_seq)


def check_table_width(metadata: AttentionMetadata, max_pages_per_seq: int) -> None:
    """Check on the device that no sequence has more pages than a page table has columns.

    A `checkify.check`: use it inside a function transformed by `jax.experimental.checkify.checkify`,
    and throw the error on the host.

    Args:
        metadata: The metadata of a paged batch.
        max_pages_per_seq: Columns of the table, M.
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


class Rows(NamedTuple):
    """The sequences of an imported batch; lengths are 0 for padding rows."""

    num_seqs: Int32[Array, ""]
    q_lens: Int32[Array, " R"]
    kv_lens: Int32[Array, " R"]
    is_decode: Bool[Array, " R"] | None
    state_slots: Int32[Array, " R"] | None


class Pages(NamedTuple):
    """The pages of an imported batch, as CSR."""

    counts: Int32[Array, " R"]
    page_list: Int32[Array, " P"]


def read_rows(
    q_lens: Int32[Array, " R"],
    kv_lens: Int32[Array, " R"],
    num_seqs: Int32[Array, ""] | None,
    stated: Stated,
) -> Rows:
    """The rows of a batch; what stands past `num_seqs` is ignored, for some systems leave it unset."""
    if num_seqs is None:
        row = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
        num_seqs = jnp.where(kv_lens > 0, row + 1, 0).max()
    num_seqs = stated.get("num_seqs", num_seqs)
    return Rows(
        num_seqs=num_seqs,
        q_lens=live(q_lens, num_seqs),
        kv_lens=live(kv_lens, num_seqs),
        is_decode=stated.get("is_decode"),
        state_slots=stated.get("state_slots"),
    )


def pack_table(
    token_ids: Int32[Array, " T"],
    rows: Rows,
    table: Int32[Array, "R M"] | None,
    bucket: Bucket,
    page_size: int | None,
) -> RaggedBatch:
    """A batch from rows and a rectangular page table, of which each row uses what its keys need."""
    check_paged(table is not None, page_size)
    if table is None or page_size is None:
        return pack(token_ids, rows, None, bucket, page_size)
    if table.shape[0] != bucket.seqs:
        raise ValueError(f"the page table has {table.shape[0]} rows; {bucket} needs {bucket.seqs}")
    counts = (rows.kv_lens + (page_size - 1)) // page_size
    indptr = prefix_sums(counts)
    row = jnp.minimum(segment_of(indptr[1:], bucket.pages), bucket.seqs - 1)
    column = jnp.arange(bucket.pages, dtype=jnp.int32) - indptr[row]
    return pack(token_ids, rows, Pages(counts, table.at[row, column].get(mode="clip")), bucket, page_size)


def pack(
    token_ids: Int32[Array, " T"], rows: Rows, pages: Pages | None, bucket: Bucket, page_size: int | None
) -> RaggedBatch:
    """The batch of rows and pages, its phases and state slots filled in."""
    R, P = bucket.seqs, bucket.pages
    row = jnp.arange(R, dtype=jnp.int32)
    is_real = row < rows.num_seqs
    is_decode = jnp.full(R, bucket.max_q_len == 1) if rows.is_decode is None else rows.is_decode
    state_slots = row if rows.state_slots is None else rows.state_slots
    if pages is None:
        pages = Pages(jnp.zeros(R, jnp.int32), jnp.zeros(P, jnp.int32))
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
        cu_q_lens=prefix_sums(rows.q_lens),
        kv_lens=rows.kv_lens,
        is_decode=is_real & is_decode,
        state_slots=jnp.where(is_real, state_slots, PAD_SLOT),
        prefix_lm_lens=jnp.zeros_like(state_slots),
        page_indptr=prefix_sums(pages.counts),
        page_list=live(pages.page_list, pages.counts.sum(dtype=jnp.int32)),
    )


def unchanged(kind: type, metadata: AttentionMetadata) -> dict[str, Any]:
    """The fields of an export that are fields of ours under another name; None without pages."""
    definitions = fields_of(AttentionMetadata)
    unpaged = metadata.page_size is None
    return {
        theirs: None if unpaged and definitions[ours].needs else metadata[ours]
        for theirs, ours in renamed(kind).items()
    }


def renamed(kind: type) -> dict[str, str]:
    """Our name of each field of an export that is a field of ours."""
    names = {field.name: field.metadata["also_called"] for field in dataclasses.fields(kind)}
    return {theirs: ours for theirs, ours in names.items() if ours in METADATA_FIELDS}


def is_real_row(metadata: AttentionMetadata) -> Bool[Array, " R"]:
    """Which rows are no padding."""
    return jnp.arange(metadata.bucket.seqs) < metadata.num_seqs


def live(values: Int32[Array, " X"], count: Int32[Array, ""]) -> Int32[Array, " X"]:
    """The first `count` values, and zeros."""
    return jnp.where(jnp.arange(values.shape[0]) < count, values, 0)


def optional_table(metadata: AttentionMetadata, max_pages_per_seq: int | None) -> Int32[Array, "R M"] | None:
    """The page table; None for a batch without pages."""
    if metadata.page_size is None and max_pages_per_seq is None:
        return None
    if max_pages_per_seq is None:
        raise ValueError(
            "max_pages_per_seq=None, but the batch is paged; give the pages of the longest sequence"
        )
    return page_indices(metadata, max_pages_per_seq)


def max_keys(metadata: AttentionMetadata, max_pages_per_seq: int | None) -> int:
    """The most keys a sequence can have, by its page table or, unpaged, beside its queries."""
    if metadata.page_size is None or max_pages_per_seq is None:
        return metadata.bucket.max_q_len
    return max_pages_per_seq * metadata.page_size


def check_paged(has_pages: bool, page_size: int | None) -> None:
    """Whether a page size is given exactly where an export has pages."""
    if has_pages != (page_size is not None):
        raise ValueError(
            f"page_size={page_size} for an export {'with' if has_pages else 'without'} pages; "
            "give the page size of its cache, or None where it has no pages"
        )
