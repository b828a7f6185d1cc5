"""Whether the values of a batch make sense, checked on the device (`checks.py` does it on the host)."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import checkify

from jaxattn.batch.ragged import INT32_MAX, PAD_SLOT, RaggedBatch


def check_batch(batch: RaggedBatch, *, num_pages: int | None = None, share_prefixes: bool = False) -> None:
    """The checks of `nest_sequences`, for a batch that was built on the device.

    Every check is a `checkify.check`: use it inside a function transformed by
    `jax.experimental.checkify.checkify`, and throw the error on the host.

    Args:
        batch: The batch.
        num_pages: Pages of the cache. Without it a page that the cache does not have goes unnoticed.
        share_prefixes: Whether a page may stand in several sequences' tables, at the same place in each and
            within the cached context of each.
    """
    _check_lengths(batch)
    _check_state_slots(batch)
    _check_prefix_lm_lens(batch)
    if batch.page_size is None:
        lens = jnp.diff(batch.cu_q_lens)
        kv_lens = batch.kv_lens
        checkify.check((kv_lens == lens).all(), "kv_lens={k} count keys that no page holds", k=kv_lens)
        return
    _check_page_counts(batch, batch.page_size)
    _check_pages(batch, batch.page_size, num_pages, share_prefixes)


def _check_lengths(batch: RaggedBatch) -> None:
    R, T = batch.bucket.seqs, batch.bucket.tokens
    n, cu_q_lens, kv_lens = batch.num_seqs, batch.cu_q_lens, batch.kv_lens
    q_lens, is_real = jnp.diff(cu_q_lens), jnp.arange(R) < n
    checkify.check((n >= 0) & (n <= R), "num_seqs={n} must lie between 0 and bucket.seqs=" + str(R), n=n)
    checkify.check(
        (cu_q_lens[0] == 0) & (cu_q_lens[1:] >= cu_q_lens[:-1]).all() & (cu_q_lens[-1] <= T),
        "cu_q_lens={c} must begin with 0, never decrease, and end at or before bucket.tokens=" + str(T),
        c=cu_q_lens,
    )
    checkify.check(
        (q_lens <= batch.bucket.max_q_len).all(),
        "cu_q_lens={c} holds a query longer than bucket.max_q_len=" + str(batch.bucket.max_q_len),
        c=cu_q_lens,
    )
    checkify.check((kv_lens >= q_lens).all(), "kv_lens={k} must count this step's tokens too", k=kv_lens)
    # The first sum beyond int32 wraps around to a negative one.
    checkify.check((jnp.cumsum(kv_lens) >= 0).all(), "kv_lens={k} exceed int32 in all", k=kv_lens)
    checkify.check(
        jnp.where(is_real, True, (q_lens == 0) & (kv_lens == 0)).all(),
        "rows past num_seqs={n} must have no query tokens and no keys",
        n=n,
    )
    checkify.check((batch.token_ids >= 0).all(), "token_ids={t} must not be negative", t=batch.token_ids)


def _check_state_slots(batch: RaggedBatch) -> None:
    is_real = jnp.arange(batch.bucket.seqs) < batch.num_seqs
    slots = jnp.sort(jnp.where(is_real, batch.state_slots, PAD_SLOT))
    twice = (slots[1:] == slots[:-1]) & (slots[1:] != PAD_SLOT)
    checkify.check(
        (slots >= 0).all() & ~twice.any() & ((slots != PAD_SLOT).sum() == batch.num_seqs),
        "state_slots={s} must be distinct, not negative, and below " + str(PAD_SLOT),
        s=batch.state_slots,
    )


def _check_prefix_lm_lens(batch: RaggedBatch) -> None:
    contexts = batch.kv_lens - jnp.diff(batch.cu_q_lens)
    room = jnp.where(contexts > 0, contexts, batch.kv_lens)
    checkify.check(
        ((batch.prefix_lm_lens >= 0) & (batch.prefix_lm_lens <= room)).all(),
        "prefix_lm_lens={p} must lie within the contexts, or within queries without one",
        p=batch.prefix_lm_lens,
    )


def _check_page_counts(batch: RaggedBatch, page_size: int) -> None:
    indptr, P = batch.page_indptr, batch.bucket.pages
    checkify.check(
        (indptr[0] == 0) & (indptr[1:] >= indptr[:-1]).all() & (indptr[-1] <= P),
        "page_indptr={i} must begin with 0, never decrease, and end at or before bucket.pages=" + str(P),
        i=indptr,
    )
    needed = (batch.kv_lens - 1) // page_size + 1
    enough = (jnp.diff(indptr) >= needed).all()
    checkify.check(enough, "page_indptr={i} holds too few pages for kv_lens", i=indptr)


def _check_pages(batch: RaggedBatch, page_size: int, num_pages: int | None, share_prefixes: bool) -> None:
    R, P = batch.bucket.seqs, batch.bucket.pages
    indptr, pages = batch.page_indptr, batch.page_list
    limit = INT32_MAX // page_size if num_pages is None else min(num_pages, INT32_MAX // page_size)
    listed = jnp.arange(P) < indptr[-1]
    in_range = (pages >= 0) & (pages < limit)
    checkify.check(
        jnp.where(listed, in_range, True).all(), "page_list={p} must lie below " + str(limit), p=pages
    )
    row = jnp.searchsorted(indptr[1:], jnp.arange(P, dtype=jnp.int32), side="right")
    row = jnp.minimum(row, R - 1).astype(jnp.int32)
    logical = jnp.arange(P, dtype=jnp.int32) - indptr[row]
    context_pages = (batch.kv_lens - jnp.diff(batch.cu_q_lens)) // page_size
    may_share = (logical < context_pages[row]) if share_prefixes else jnp.zeros(P, bool)
    # Pages in order, so that owners of one page stand side by side; unlisted entries come last.
    order = jnp.argsort(jnp.where(listed, pages, INT32_MAX), stable=True)
    same = (pages[order[1:]] == pages[order[:-1]]) & listed[order[1:]] & listed[order[:-1]]
    both = may_share[order[1:]] & may_share[order[:-1]] & (logical[order[1:]] == logical[order[:-1]])
    checkify.check(~(same & ~both).any(), "page_list={p} gives a page to two sequences", p=pages)
