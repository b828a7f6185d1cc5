"""Attention over ragged, paged batches: nest once, prepare once, attend on every backend.

batch = nest_sequences(token_ids, page_tables=…, page_size=16)     # host, once per step
metadata = prepare_metadata(batch, specs)                          # device, once per step
out = attention(q, cache.k_pages, cache.v_pages, metadata, spec)   # per layer, any backend
"""

from jaxattn.attention import attention, choose_implementation
from jaxattn.batch import PAD_SLOT, RaggedBatch, abstract_batch, advance, check_batch, nest_sequences
from jaxattn.bucket_cost import LinearCost, fit_cost
from jaxattn.buckets import Bucket, BucketGrid, BucketPlan, powers_of_two, quarter_steps
from jaxattn.cache import PagedKVCache, PagePool, init_cache, quantization_scale, write_cache
from jaxattn.checkpoints import CheckpointError, load_model, save_params
from jaxattn.compiles import (
    CompilationForbiddenError,
    Compiles,
    compile_cache,
    count_compiles,
    forbid_compiles,
)
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
from jaxattn.planner import fit_of, plan_buckets, plan_curve
from jaxattn.scheduler import Finished, ScheduledStep, Scheduler
from jaxattn.score import calibrate_kv_scales, compute_logits
from jaxattn.serve import Server, largest_step, serve
from jaxattn.spec import AttentionSpec, WindowClass
from jaxattn.text import Tokenizer, load_tokenizer
from jaxattn.trace import BatchLog, Trace, read_trace
from jaxattn.warmup import WarmupReport, measure_steps, warmup
from jaxattn_kernels.arrays import KVScales

__version__ = "0.1.0"

__all__ = [
    "CONSUMERS",
    "PAD_SLOT",
    "AttentionMetadata",
    "AttentionSpec",
    "BatchLog",
    "Bucket",
    "BucketGrid",
    "BucketPlan",
    "CheckpointError",
    "CompilationForbiddenError",
    "Compiles",
    "Consumer",
    "DecoderConfig",
    "Finished",
    "KVScales",
    "LinearCost",
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
    "Trace",
    "WarmupReport",
    "WindowClass",
    "abstract_batch",
    "advance",
    "attention",
    "calibrate_kv_scales",
    "check_batch",
    "choose_implementation",
    "compile_cache",
    "compile_generation",
    "compute_logits",
    "count_compiles",
    "fit_cost",
    "fit_documents",
    "fit_of",
    "fits_one_batch",
    "forbid_compiles",
    "generate",
    "init_cache",
    "largest_step",
    "load_model",
    "load_tokenizer",
    "measure_steps",
    "nest_batches",
    "nest_sequences",
    "next_token_cross_entropy",
    "next_token_targets",
    "pack_best_fit",
    "pack_first_fit_decreasing",
    "plan_buckets",
    "plan_curve",
    "plan_generation",
    "powers_of_two",
    "prepare_metadata",
    "quantization_scale",
    "quarter_steps",
    "read_trace",
    "save_params",
    "serve",
    "warmup",
    "write_cache",
]
