"""A batch of sequences: buckets, packing on the host, the next step on the device, traces of sizes."""

from jaxattn.batch.advance import advance
from jaxattn.batch.bucket import Bucket, BucketGrid, BucketPlan, powers_of_two, quarter_steps
from jaxattn.batch.device_checks import check_batch
from jaxattn.batch.nest import nest_sequences
from jaxattn.batch.ragged import PAD_SLOT, RaggedBatch, abstract_batch
from jaxattn.batch.trace import BatchLog, Trace, read_trace

__all__ = [
    "PAD_SLOT",
    "BatchLog",
    "Bucket",
    "BucketGrid",
    "BucketPlan",
    "RaggedBatch",
    "Trace",
    "abstract_batch",
    "advance",
    "check_batch",
    "nest_sequences",
    "powers_of_two",
    "quarter_steps",
    "read_trace",
]
