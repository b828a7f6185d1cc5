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
        top_k: Draw among exactly this many likeliest tokens, or None for all.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Among vocabulary entries or, in order of their logits, among the likeliest ones.
    likeliest, ids = (logits, None) if top_k is None else jax.lax.top_k(logits, top_k)
    scaled = (likeliest - likeliest.max(axis=-1, keepdims=True)) / temperature
    rows = jnp.arange(logits.shape[0], dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    return drawn if ids is None else jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
