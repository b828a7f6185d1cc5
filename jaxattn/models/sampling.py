"""Choosing the next token from logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def sample(
    logits: Float[Array, "R V"],
    key: Array,
    temperature: Float[Array, ""],
    *,
    greedy: bool,
    top_k: int | None,
) -> Int32[Array, " R"]:
    """One token per row: the likeliest, or a draw from softmax(logits / temperature).

    A row's draw depends on the key and its row number, not on how many rows there are.

    Args:
        logits: One row per sequence.
        key: Of this step.
        temperature: Divides the logits; unread when greedy.
        greedy: Take the likeliest token.
        top_k: Draw among this many likeliest tokens only, or None for all.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k is not None:
        smallest_kept = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    rows = jnp.arange(logits.shape[0], dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    return jax.vmap(jax.random.categorical)(keys, logits / temperature).astype(jnp.int32)
