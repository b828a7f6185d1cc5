"""Training on packed documents: packs that fill a bucket, targets and loss."""

from jaxattn.training.losses import next_token_cross_entropy, next_token_targets
from jaxattn.training.packing import fit_documents, nest_batches, pack_best_fit, pack_first_fit_decreasing

__all__ = [
    "fit_documents",
    "nest_batches",
    "next_token_cross_entropy",
    "next_token_targets",
    "pack_best_fit",
    "pack_first_fit_decreasing",
]
