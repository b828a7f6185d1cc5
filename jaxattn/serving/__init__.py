"""From prompts to tokens: one batch, continuous batches, scores, text."""

from jaxattn.serving.generate import generate
from jaxattn.serving.records import Finished, ScheduledStep, SchedulerStats
from jaxattn.serving.scheduler import Scheduler
from jaxattn.serving.score import calibrate_kv_scales, compute_logits
from jaxattn.serving.server import Server, serve
from jaxattn.serving.sizes import (
    GenerationPlan,
    compile_generation,
    fits_one_batch,
    largest_step,
    plan_generation,
)
from jaxattn.serving.text import Tokenizer, load_tokenizer

__all__ = [
    "Finished",
    "GenerationPlan",
    "ScheduledStep",
    "Scheduler",
    "SchedulerStats",
    "Server",
    "Tokenizer",
    "calibrate_kv_scales",
    "compile_generation",
    "compute_logits",
    "fits_one_batch",
    "generate",
    "largest_step",
    "load_tokenizer",
    "plan_generation",
    "serve",
]
