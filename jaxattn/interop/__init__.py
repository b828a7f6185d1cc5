"""Other systems' conventions, a file each: metadata to theirs and a batch from theirs."""

from jaxattn.interop.common import check_table_width, page_indices, window_size
from jaxattn.interop.cudnn import CudnnMetadata, from_cudnn, to_cudnn
from jaxattn.interop.flash_attention import FlashAttentionMetadata, from_flash_attention, to_flash_attention
from jaxattn.interop.flashinfer import FlashInferMetadata, from_flashinfer, to_flashinfer
from jaxattn.interop.ragged_paged_attention import (
    RaggedPagedAttentionMetadata,
    RaggedPagedAttentionV3Metadata,
    from_ragged_paged_attention,
    from_ragged_paged_attention_v3,
    to_ragged_paged_attention,
    to_ragged_paged_attention_v3,
)
from jaxattn.interop.readers import EXPORT_CONSUMERS
from jaxattn.interop.vllm import VllmMetadata, from_vllm, slots_from_vllm, to_vllm

__all__ = [
    "EXPORT_CONSUMERS",
    "CudnnMetadata",
    "FlashAttentionMetadata",
    "FlashInferMetadata",
    "RaggedPagedAttentionMetadata",
    "RaggedPagedAttentionV3Metadata",
    "VllmMetadata",
    "check_table_width",
    "from_cudnn",
    "from_flash_attention",
    "from_flashinfer",
    "from_ragged_paged_attention",
    "from_ragged_paged_attention_v3",
    "from_vllm",
    "page_indices",
    "slots_from_vllm",
    "to_cudnn",
    "to_flash_attention",
    "to_flashinfer",
    "to_ragged_paged_attention",
    "to_ragged_paged_attention_v3",
    "to_vllm",
    "window_size",
]
