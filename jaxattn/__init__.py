"""Attention over ragged, paged batches: nest once, prepare once, attend on every backend.

batch = nest_sequences(token_ids, page_tables=…, page_size=16)     # host, once per step
metadata = prepare_metadata(batch, specs)                          # device, once per step
out = attention(q, cache.k_pages, cache.v_pages, metadata, spec)   # per layer, any backend
"""

from jaxattn.attention import attention, choose_implementation
from jaxattn.batch import PAD_SLOT, RaggedBatch, abstract_batch, advance, check_batch, nest_sequences
from jaxattn.buckets import Bucket, BucketGrid, powers_of_two, quarter_steps
from jaxattn.cache import PagedKVCache, PagePool, init_cache, quantization_scale, write_cache
from jaxattn.checkpoints import CheckpointError, load_model, save_params
from jaxattn.consumers import CONSUMERS, Consumer
from jaxattn.fields import MissingFieldError
from jaxattn.generate import compile_generation, fits_one_batch, generate, plan_generation
from jaxattn.metadata import AttentionMetadata, prepare_metadata
from jaxattn.models import DecoderConfig, Model, RopeConfig, Sampling
from jaxattn.packing import (
    fit_documents,
    nest_batches,
    next_token_cross_entropy,
    next_token_targets,
    pack_best_fit,
    pack_first_fit_decreasing,
)
from jaxattn.scheduler import Finished, ScheduledStep, Scheduler
from jaxattn.score import calibrate_kv_scales, compute_logits
from jaxattn.serve import Server, serve
from jaxattn.spec import AttentionSpec, WindowClass
from jaxattn.text import Tokenizer, load_tokenizer
from jaxattn_kernels.arrays import KVScales

__version__ = "0.1.0"

__all__ = [
    "CONSUMERS",
    "PAD_SLOT",
    "AttentionMetadata",
    "AttentionSpec",
    "Bucket",
    "BucketGrid",
    "CheckpointError",
    "Consumer",
    "DecoderConfig",
    "Finished",
    "KVScales",
    "MissingFieldError",
    "Model",
    "PagePool",
    "PagedKVCache",
    "RaggedBatch",
    "RopeConfig",
    "Sampling",
    "ScheduledStep",
    "Scheduler",
    "Server",
    "Tokenizer",
    "WindowClass",
    "abstract_batch",
    "advance",
    "attention",
    "calibrate_kv_scales",
    "check_batch",
    "choose_implementation",
    "compile_generation",
    "compute_logits",
    "fit_documents",
    "fits_one_batch",
    "generate",
    "init_cache",
    "load_model",
    "load_tokenizer",
    "nest_batches",
    "nest_sequences",
    "next_token_cross_entropy",
    "next_token_targets",
    "pack_best_fit",
    "pack_first_fit_decreasing",
    "plan_generation",
    "powers_of_two",
    "prepare_metadata",
    "quantization_scale",
    "quarter_steps",
    "save_params",
    "serve",
    "write_cache",
]
