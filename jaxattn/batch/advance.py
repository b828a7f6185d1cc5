"""`advance`: the next decode step's batch, on the device."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import RaggedBatch, pack_fields
from jaxattn.batch.segments import prefix_sums


def advance(
    batch: RaggedBatch,
    token_ids: Int32[Array, "..."],
    *,
    q_lens: Int32[Array, " R"] | None = None,
    accepted: Int32[Array, " R"] | None = None,
    bucket: Bucket | None = None,
) -> RaggedBatch:
    """The batch of the next decode step. Pure, on the device.

    Each row keeps the accepted part of its last query and appends new tokens. Pages are not
    allocated here: the tables of `nest_sequences` must have reserved enough for all steps to come.
    A token past its sequence's pages is not written to the cache and not seen.

    Args:
        batch: The last step's batch.
        token_ids: `[R]` The token that each row appends, or `[R, Q]` up to Q of them, as in
            speculative decoding. Rows past `num_seqs` are ignored.
        q_lens: How many of its tokens each row appends, from 0 to Q. A row that appends none has no
            query token in the next step, and keeps its keys. Default: Q.
        accepted: How many of its last query tokens each row keeps, from 0 to its query length; the
            keys of the others are overwritten by the new tokens. Default: all.
        bucket: The next step's bucket, with as many pages and room for Q tokens in each of its
            rows; default: the batch's rows with Q tokens each. It may have fewer rows than the
            batch, where the rows left out are padding.

    Returns:
        The batch of the next step, every row of which decodes.

    Raises:
        ValueError: If the batch has no pages, or `bucket` more rows, other pages or too few tokens.
    """
    if batch.page_size is None:
        raise ValueError("batch was nested without page_tables: there is no cache to advance in")
    token_ids = token_ids[:, None] if token_ids.ndim == 1 else token_ids
    Q = token_ids.shape[1]
    if bucket is None:
        bucket = Bucket(batch.bucket.seqs * Q, batch.bucket.seqs, batch.bucket.pages, max_q_len=Q)
    if bucket.seqs > batch.bucket.seqs or bucket.pages != batch.bucket.pages:
        raise ValueError(
            f"bucket={bucket} must have at most the rows and exactly the pages of {batch.bucket}"
        )
    if bucket.tokens < bucket.seqs * Q or bucket.max_q_len < Q:
        raise ValueError(f"bucket={bucket} has no room for {Q} tokens in each of its {bucket.seqs} rows")
    R = bucket.seqs
    is_real = jnp.arange(R) < batch.num_seqs
    new_lens = jnp.full(R, Q, jnp.int32) if q_lens is None else jnp.clip(q_lens[:R], 0, Q)
    new_lens = jnp.where(is_real, new_lens, 0)
    old_lens, kv_lens = jnp.diff(batch.cu_q_lens)[:R], batch.kv_lens[:R]
    if accepted is not None:
        kv_lens = kv_lens - old_lens + jnp.clip(accepted[:R], 0, old_lens)
    cu_q_lens = prefix_sums(new_lens)
    # Tokens that are not appended go out of range, where the scatter drops them.
    offset = jnp.arange(Q, dtype=jnp.int32)[None, :]
    place = jnp.where(offset < new_lens[:, None], cu_q_lens[:-1, None] + offset, bucket.tokens)
    return pack_fields(
        bucket,
        batch.page_size,
        num_seqs=batch.num_seqs,
        token_ids=jnp.zeros(bucket.tokens, jnp.int32).at[place].set(token_ids[:R], mode="drop"),
        cu_q_lens=cu_q_lens,
        kv_lens=kv_lens + new_lens,
        is_decode=is_real,
        state_slots=batch.state_slots[:R],
        prefix_lm_lens=batch.prefix_lm_lens[:R],
        page_indptr=batch.page_indptr[: R + 1],
        page_list=batch.page_list,
    )
