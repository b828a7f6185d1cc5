"""From prompts to tokens: one batch, continuous batches, scores, text."""

from jaxattn.serving.generate import compile_generation, fits_one_batch, generate, plan_generation
from jaxattn.serving.scheduler import Finished, ScheduledStep, Scheduler
from jaxattn.serving.score import calibrate_kv_scales, compute_logits
from jaxattn.serving.server import Server, largest_step, serve
from jaxattn.serving.text import Tokenizer, load_tokenizer

__all__ = [
    "Finished",
    "ScheduledStep",
    "Scheduler",
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
