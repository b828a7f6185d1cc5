"""The definition of attention over a ragged batch: plain jax.numpy, float32, slow, obviously right.

Keys, wherever they lie, are a flat list in which each has an owner and a position. A token sees a
key if they belong to the same sequence and the key's position is in the token's visible range.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxattn.batch.segments import segment_of
from jaxattn.metadata.spec import AttentionSpec, softmax_dtype
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.arrays import KVScales


def attend(
    q: Float[Array, "T N H"],
    k: Shaped[Array, "..."],
    v: Shaped[Array, "..."],
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: KVScales | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attend by the definition, with every score of every token and key in memory.

    Computes in float32, or in float64 for float64 inputs. Differentiable,
    forward too.

    Args:
        q: Queries, packed.
        k: Keys, packed `[T, K, H]` or in pages `[pages, page_size, K, H]`.
        v: Values, like the keys.
        metadata: The batch's metadata.
        spec: The layer.
        sinks: Logits of the sinks, if the layer has them.
        kv_scales: What quantised keys and values stand for, if they are.

    Returns:
        Outputs in the dtype of `q`, and the natural logarithm of the softmax's denominator; 0 and
        -inf for padding.
    """
    visible = metadata.visible_keys(spec.window_class)
    if k.ndim == 4:
        k, v, owner, position = _live_pages(k, v, metadata)
    else:
        owner, position = metadata.token_to_seq, metadata.positions
    dtype, R = softmax_dtype(q.dtype), metadata.bucket.seqs
    is_live = (owner < R)[:, None, None]
    # What nobody owns may hold anything, NaN too, and 0 * NaN is NaN.
    k, v = (jnp.where(is_live, x.astype(dtype), 0) for x in (k, v))
    if kv_scales is not None:
        k, v = k * kv_scales.k.astype(dtype)[None, :, None], v * kv_scales.v.astype(dtype)[None, :, None]

    T, N, H = q.shape
    # Padding queries may hold anything too, and would poison gradients.
    q_live = jnp.where((metadata.token_to_seq < R)[:, None, None], q, 0)
    grouped = q_live.astype(dtype).reshape(T, spec.num_kv_heads, spec.group_size, H)
    scores = spec.softmax_scale * jnp.einsum("tkgh,skh->kgts", grouped, k, precision=lax.Precision.HIGHEST)
    if spec.logits_soft_cap is not None:
        scores = spec.logits_soft_cap * jnp.tanh(scores / spec.logits_soft_cap)
    sees = (
        (metadata.token_to_seq[:, None] == owner[None, :])
        & (visible.kv_start[:, None] <= position[None, :])
        & (position[None, :] < visible.kv_end[:, None])
    )
    # A finite minimum, not -inf: a padding token sees nothing, and -inf - -inf is NaN.
    scores = jnp.where(sees, scores, jnp.finfo(dtype).min)
    row_max = scores.max(axis=-1, keepdims=True)
    sink = None if sinks is None else sinks.astype(dtype).reshape(spec.num_kv_heads, spec.group_size, 1, 1)
    if sink is not None:
        row_max = jnp.maximum(row_max, sink)
    row_max = lax.stop_gradient(row_max)  # nothing depends on it but for rounding
    weights = jnp.where(sees, jnp.exp(scores - row_max), 0)
    total = weights.sum(axis=-1, keepdims=True)
    if sink is not None:  # a token that sees no key has no sink either
        total = jnp.where(sees.any(axis=-1, keepdims=True), total + jnp.exp(sink - row_max), 0)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    out = jnp.einsum("kgts,skh->tkgh", weights / total, v, precision=lax.Precision.HIGHEST)
    lse = jnp.where(seen, row_max + jnp.log(total), -jnp.inf)
    # Padding is 0 anyway; what it is handed as a gradient may be anything, too.
    out = jnp.where((metadata.token_to_seq < R)[:, None, None], out.reshape(T, N, H), 0)
    return out.astype(q.dtype), lse.transpose(2, 0, 1, 3).reshape(T, N)


def _live_pages(
    k_pages: Shaped[Array, "pages page_size K H"],
    v_pages: Shaped[Array, "pages page_size K H"],
    metadata: AttentionMetadata,
) -> tuple[Array, Array, Array, Array]:
    """Keys and values of the pages in use, with each one's owner (R for none) and position."""
    page_size, R = k_pages.shape[1], metadata.bucket.seqs
    num_listed = metadata.page_list.shape[0]
    seq = segment_of(metadata.page_indptr[1:], num_listed)
    logical_page = jnp.arange(num_listed, dtype=jnp.int32) - metadata.page_indptr[seq]
    position = logical_page[:, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)[None, :]
    kv_len = jnp.append(metadata.kv_lens, 0)[seq]
    owner = jnp.where(position < kv_len[:, None], seq[:, None], R)

    def flat(pages: Array) -> Array:
        return pages[metadata.page_list].reshape(num_listed * page_size, *pages.shape[2:])

    return flat(k_pages), flat(v_pages), owner.reshape(-1), position.reshape(-1)
