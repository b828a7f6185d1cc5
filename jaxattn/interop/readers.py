"""The fields that each export reads: consumers for `prepare_metadata`."""

from __future__ import annotations

from jaxattn.interop.common import renamed
from jaxattn.interop.cudnn import CudnnMetadata
from jaxattn.interop.flash_attention import FlashAttentionMetadata
from jaxattn.interop.flashinfer import FlashInferMetadata
from jaxattn.interop.ragged_paged_attention import (
    RaggedPagedAttentionMetadata,
    RaggedPagedAttentionV3Metadata,
)
from jaxattn.interop.vllm import VllmMetadata
from jaxattn.metadata.consumers import Consumer

_TABLE = ("kv_page_indptr", "kv_page_list")


def _consumer(name: str, kind: type, *also: str) -> Consumer:
    return Consumer(name, frozenset({*renamed(kind).values(), *also}))


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
