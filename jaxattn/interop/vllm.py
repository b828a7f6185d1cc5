"""vLLM's convention: `CommonAttentionMetadata` of v1 (0014ca6b)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import PAD_SLOT, RaggedBatch
from jaxattn.interop.common import (
    Stated,
    constant,
    is_real_row,
    max_keys,
    pack_table,
    page_indices,
    read_rows,
    unchanged,
)
from jaxattn.metadata.fields import described
from jaxattn.metadata.superset import AttentionMetadata


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
    max_query_len: int = constant("bound on query lengths: the bucket's, not the batch's maximum")
    max_seq_len: int = constant("bound on key counts: what the block table can hold")


def slots_from_vllm(slot_mapping: Int32[Array, " T"]) -> Int32[Array, " T"]:
    """Slots of vLLM for a scatter in JAX with `mode="drop"`: its -1 would wrap to the last slot.

    Args:
        slot_mapping: Flat slots; negative where a token has none.
    """
    return jnp.where(slot_mapping < 0, PAD_SLOT, slot_mapping)


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
    is_real = is_real_row(metadata)
    slots = metadata.slot_mapping
    return VllmMetadata(
        **unchanged(VllmMetadata, metadata),
        seq_lens=jnp.where(is_real, metadata.kv_lens, pad_seq_len),
        block_table=table,
        slot_mapping=jnp.where(slots == PAD_SLOT, -1, slots),
        is_prefilling=is_real & ~metadata.is_decode,
        max_query_len=metadata.bucket.max_q_len,
        max_seq_len=max_keys(metadata, max_pages_per_seq),
    )


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
    if exported.is_prefilling is not None and "is_decode" not in stated:
        stated["is_decode"] = ~exported.is_prefilling
    rows = read_rows(jnp.diff(exported.query_start_loc), exported.seq_lens, exported.num_reqs, stated)
    return pack_table(token_ids, rows, exported.block_table, bucket, page_size)
