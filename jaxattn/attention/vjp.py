"""Reverse-mode gradients of attention: recomputed from the log-sum-exp, over the same metadata.

An implementation whose loops JAX cannot differentiate brings a function of its own that goes backward.
What all of those share stands here: what is kept of the forward pass (its inputs, outputs and log-sum-exp;
no score), the part of the gradient that is a sum per row, and the way of the gradients of keys into their
pages. With p the weights of a row, do the gradient of its output and dl that of its log-sum-exp,

    dv = Σ p do,   ds = p (do·v - δ),   δ = do·out - dl,   dq = scale Σ ds k,   dk = scale Σ ds q,

each through the derivative of the cap; a sink is a key of value 0, so its gradient is -Σ p_sink δ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int32, Shaped

from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.arrays import Attended, KVScales

OUT_NAME, LSE_NAME = "attention_out", "attention_lse"
"""Names of what a `jax.checkpoint` policy may save, so that attention is not computed twice."""

Results = tuple[Float[Array, "T N H"], Float[Array, "T N"]]


class Gradients(NamedTuple):
    """What goes backward out of attention.

    Attributes:
        q: `[T, N, H]` Gradient of the queries, in their dtype.
        k: `[L, K, H]` That of the keys: a row per key where they are packed, and else one per slot of each
            entry of the page list, in that order. Rows that hold no key of a sequence are 0.
        v: `[L, K, H]` That of the values, like the keys.
        delta: `[T, N]` What the gradients of a row's weights are compared with; finite where it sees a key.
    """

    q: Float[Array, "T N H"]
    k: Float[Array, "L K H"]
    v: Float[Array, "L K H"]
    delta: Float[Array, "T N"]


Backward = Callable[..., Gradients]
"""The gradient of an implementation: `backward(q, k, v, results, d_results, metadata, spec)`, where results
are its outputs and log-sum-exp, and `d_results` their gradients, 0 for a token that sees no key."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    forward: Callable[..., Results],
    backward: Backward,
    spec: AttentionSpec,
    q: Float[Array, "T N H"],
    k: Shaped[Array, "..."],
    v: Shaped[Array, "..."],
    metadata: AttentionMetadata,
    sinks: Float[Array, " N"] | None,
    kv_scales: KVScales | None,
) -> Results:
    """`forward`, whose gradient `backward` computes.

    Args:
        forward: An implementation, called with the arguments below; without `kv_scales` where it is None.
        backward: Its gradient.
        spec: The layer.
        q: Queries, packed.
        k: Keys, packed `[T, K, H]` or in pages `[pages, page_size, K, H]`.
        v: Values, like the keys.
        metadata: The batch's metadata.
        sinks: Logits of the sinks, if the layer has them.
        kv_scales: What quantised keys and values stand for, if they are; they have no gradient.
    """
    options = {"sinks": sinks} if kv_scales is None else {"sinks": sinks, "kv_scales": kv_scales}
    out, lse = forward(q, k, v, metadata, spec, **options)
    return out, lse


def _attend_forward(forward, backward, spec, q, k, v, metadata, sinks, kv_scales) -> tuple[Results, Any]:
    out, lse = attend(forward, backward, spec, q, k, v, metadata, sinks, kv_scales)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return (out, lse), (q, k, v, metadata, sinks, kv_scales, out, lse)


def _attend_backward(forward, backward, spec, kept, gradients) -> tuple:
    del forward
    q, k, v, metadata, sinks, kv_scales, out, lse = kept
    if kv_scales is not None:
        raise NotImplementedError(
            f"k.dtype={k.dtype} is quantised, and has no gradient; train with keys and values in the dtype "
            f"of q, {q.dtype}, or differentiate implementation='reference'"
        )
    d_out, d_lse = gradients
    # Padding may be handed anything as a gradient, NaN too.
    sees = jnp.isfinite(lse)
    d_results = Attended(jnp.where(sees[..., None], d_out, 0), jnp.where(sees, d_lse, 0))
    dq, dk, dv, delta = backward(q, k, v, Attended(out, lse), d_results, metadata, spec)
    if metadata.page_size is not None:
        dk, dv = (into_pages(rows, metadata, k) for rows in (dk, dv))
    d_sinks = None
    if sinks is not None:
        weights = jnp.exp(jnp.where(sees, sinks.astype(lse.dtype)[None, :] - lse, -jnp.inf))
        d_sinks = -jnp.where(sees, weights * delta, 0).sum(axis=0).astype(sinks.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, d_sinks, None


attend.defvjp(_attend_forward, _attend_backward)


def listed_keys(pages: Shaped[Array, "..."], metadata: AttentionMetadata) -> Shaped[Array, "L K H"]:
    """Keys or values on one axis, where each sequence's stand one after the other.

    Packed ones do so; pages are copied in the order of the page list.
    """
    if metadata.page_size is None:
        return pages
    return pages.at[metadata.page_list].get(mode="clip").reshape(-1, *pages.shape[2:])


def first_listed(metadata: AttentionMetadata) -> Int32[Array, " R_plus_1"]:
    """The place of each sequence's first key on that axis."""
    if metadata.page_size is None:
        return metadata.cu_kv_lens
    return metadata.page_indptr * metadata.page_size


def into_pages(
    rows: Float[Array, "L K H"], metadata: AttentionMetadata, pages: Shaped[Array, "..."]
) -> Float[Array, "..."]:
    """Gradients in the order of the page list, summed into the pages that it names.

    A page that several sequences share takes the sum, in the order of the list: so the bits do not depend
    on the order in which a device happens to add.

    Args:
        rows: The gradients.
        metadata: The batch's metadata.
        pages: An array of the shape of the result.
    """
    P = metadata.page_list.shape[0]
    entries = rows.reshape(P, -1, *rows.shape[1:])
    entry = jnp.arange(P, dtype=jnp.int32)
    page = jnp.where(entry < metadata.page_indptr[-1], metadata.page_list, pages.shape[0])
    turn = _occurrence(page)
    num_turns = jnp.where(page < pages.shape[0], turn + 1, 0).max(initial=0)

    def add(i: Array, total: Array) -> Array:
        # Others go out of bounds, each to a place of its own: the indices are unique.
        place = jnp.where(turn == i, page, pages.shape[0] + entry)
        return total.at[place].add(entries, mode="drop", unique_indices=True)

    return lax.fori_loop(0, num_turns, add, jnp.zeros(pages.shape, rows.dtype))


def _occurrence(values: Int32[Array, " P"]) -> Int32[Array, " P"]:
    """How many equal values stand before each."""
    order = jnp.argsort(values, stable=True)
    place = jnp.arange(values.shape[0], dtype=jnp.int32)
    ascending = values[order]
    is_first: Bool[Array, " P"] = jnp.diff(ascending, prepend=ascending[:1] - 1) != 0
    count = place - lax.cummax(jnp.where(is_first, place, 0))
    return jnp.zeros_like(count).at[order].set(count)
