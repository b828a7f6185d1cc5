"""Next-token targets and loss of packed documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxattn.batch.ragged import RaggedBatch
from jaxattn.metadata.spec import softmax_dtype


def next_token_targets(batch: RaggedBatch) -> tuple[Int32[Array, " T"], Bool[Array, " T"]]:
    """What each token of a batch should predict, and which tokens have something to predict. Pure.

    The target of a token is its successor in its own document. The last token of a document has none, and
    neither has padding: there the target is 0, and a loss leaves it out, as `next_token_cross_entropy` does.

    Args:
        batch: A batch without cached context: every token's successor stands beside it.

    Returns:
        `targets`, and `has_target`, the loss mask.
    """
    token = jnp.arange(batch.bucket.tokens, dtype=jnp.int32)
    # Rows without tokens repeat the end of the row before them, or, at 0, name the last token of all.
    ends_document = jnp.zeros(token.shape, bool).at[batch.cu_q_lens[1:] - 1].set(True)
    has_target = (token < batch.cu_q_lens[-1]) & ~ends_document
    return jnp.where(has_target, jnp.roll(batch.token_ids, -1), 0), has_target


def next_token_cross_entropy(logits: Float[Array, "T V"], batch: RaggedBatch) -> Float[Array, ""]:
    """Mean of -log softmax(logits)[target], in nats, over the tokens that have a target; 0 if none has.

    Computed in float32, or in float64 for float64 logits.

    Args:
        logits: What is predicted at each token.
        batch: The batch, as for `next_token_targets`.
    """
    targets, has_target = next_token_targets(batch)
    logits = logits.astype(softmax_dtype(logits.dtype))
    of_target = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=1) - of_target
    # Not `mean(where=...)`: a batch of documents of one token would be 0 / 0, and so would its gradients.
    count = jnp.maximum(has_target.sum(), 1).astype(losses.dtype)
    return losses.sum(where=has_target) / count
