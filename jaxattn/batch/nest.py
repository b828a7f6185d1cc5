"""`nest_sequences`: sequences of different lengths become one packed batch, once, on the host.

The only place where the *values* of a batch are checked. Everything after it is pure and works on static
shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxattn.batch.bucket import Bucket, BucketGrid, Buckets
from jaxattn.batch.checks import (
    check_coverage,
    check_kv_lens,
    check_pages,
    check_prefix_lm_lens,
    check_state_slots,
    check_tokens,
)
from jaxattn.batch.ragged import PAD_SLOT, RaggedBatch, field_slices
from jaxattn.batch.rows import page_rows, per_sequence, row_numbers, rows_of
from jaxattn.batch.trace import BatchLog

DEFAULT_GRID = BucketGrid()


def nest_sequences(
    sequences: Sequence[Any] | np.ndarray,
    *,
    q_lens: Any = None,
    context_lens: Any = None,
    page_tables: Sequence[Any] | np.ndarray | None = None,
    page_counts: Any = None,
    page_size: int | None = None,
    num_pages: int | None = None,
    vocab_size: int | None = None,
    is_decode: Any = None,
    state_slots: Any = None,
    prefix_lm_lens: Any = None,
    share_prefixes: bool = False,
    bucket: Bucket | Buckets = DEFAULT_GRID,
    validate: bool = True,
    transfer: bool = True,
    log: BatchLog | None = None,
) -> RaggedBatch:
    """Nest sequences of different lengths into one packed batch on the device.

    Host code in vectorised NumPy; one int32 buffer is filled and transferred. All values are
    checked here, before anything is written. Fastest from flat integer arrays with `q_lens` and
    `page_counts`: nothing then loops over sequences.

    Args:
        sequences: Token ids: one list or 1-D integer array per sequence, or one flat 1-D array
            together with `q_lens`.
        q_lens: Query tokens per sequence, for a flat `sequences` only.
        context_lens: Tokens of each sequence that the cache holds already; default none.
        page_tables: Physical pages of each sequence in logical order: one list or 1-D array per
            sequence, a 2-D array with one row per sequence, or one flat 1-D array together with
            `page_counts`. They must cover `context_lens + q_lens` tokens and may reserve more for
            later steps. None where keys are not paged.
        page_counts: Pages per sequence, for a flat `page_tables` only.
        page_size: Tokens per page; given exactly when `page_tables` is.
        num_pages: Pages of the cache, to check the tables against. Without it a page that the cache
            does not have goes unnoticed: its keys are dropped when written.
        vocab_size: Number of token ids, to check the tokens against.
        is_decode: Whether each sequence decodes. It cannot be told from the lengths: the last
            chunk of a prompt, or a prompt of one token, looks the same. Default: all in a bucket that is
            given and has `max_q_len=1`, none in any other.
        state_slots: Slot of each sequence's recurrent state, for layers that keep one (state-space
            models, convolutions); default the sequence's row.
        prefix_lm_lens: How many leading tokens of each sequence all of its tokens see, also those that
            come before them (prefix-LM: an image, a question); read by layers with `prefix_lm`. A prefix
            is prefilled in one step: it lies within the context, or within a query without one.
        share_prefixes: Whether a page may stand in several tables. Where it does, it must be at the
            same place in each and lie within every owner's `context_lens`: shared pages are read
            and never written.
        bucket: The bucket to pad to, or a grid to pick the smallest fitting one from, or a plan. A grid gives
            buckets for queries of any length; a plan also those that it has for decode steps, where no query
            has more than one token.
        validate: Whether to check values (token ids, contexts, pages, slots). Types, lengths and
            the fit into the bucket are always checked.
        transfer: Whether to move the buffer to the default device. False leaves it in host memory:
            cheapest where one compiled program takes the batch, and transfers it itself. (The first
            transfer of each size compiles a small program, which `forbid_compiles` notices.)
        log: Where to write the sizes of the batch and its bucket: a trace, from which `plan_buckets` fits
            buckets. A batch that is refused is not written.

    Returns:
        The batch.

    Raises:
        ValueError: If a value is out of range, a page is owned twice, or the batch does not fit;
            the message names the argument, the value and the remedy.
        TypeError: If token ids, lengths or pages are not integers, or phases no booleans.
    """
    for name, value in (("page_size", page_size), ("num_pages", num_pages), ("vocab_size", vocab_size)):
        if type(value) not in _INTEGERS_OR_NONE:
            raise TypeError(f"{name}={value!r} must be an int, or None")
    token_ids, lens, q_ends, shortest, longest = rows_of("sequences", sequences, "q_lens", q_lens)
    n = lens.size
    if shortest == 0:
        i = int(lens.argmin())
        raise ValueError(f"sequences[{i}] has length 0; every sequence needs at least one token, drop it")
    contexts = None if context_lens is None else per_sequence("context_lens", context_lens, n)
    kv_lens = lens if contexts is None else contexts + lens
    pages, counts, page_ends, *_ = page_rows(page_tables, page_counts, page_size, contexts, n)
    if state_slots is not None:
        state_slots = per_sequence("state_slots", state_slots, n)
    if prefix_lm_lens is not None:
        prefix_lm_lens = per_sequence("prefix_lm_lens", prefix_lm_lens, n)
    if is_decode is not None and (is_decode := np.asarray(is_decode)).dtype != bool:
        raise TypeError(f"is_decode has dtype {is_decode.dtype}; expected one bool per sequence")
    if is_decode is not None and is_decode.shape != (n,):
        raise ValueError(f"is_decode has shape {is_decode.shape} for {n} sequences")
    if validate:
        check_tokens(token_ids, lens, vocab_size)
        check_kv_lens(lens, contexts, longest)
        if page_size is not None:
            check_coverage(kv_lens, counts, page_size)
            check_pages(pages, counts, contexts, page_size, num_pages, share_prefixes)
        if state_slots is not None:
            check_state_slots(state_slots)
        if prefix_lm_lens is not None:
            check_prefix_lm_lens(prefix_lm_lens, lens, contexts)

    decodes: Any = is_decode
    if isinstance(bucket, BucketGrid):
        bucket = bucket.pick(tokens=token_ids.size, seqs=n, pages=pages.size)
    elif not isinstance(bucket, Bucket):
        decodes = False if is_decode is None else is_decode
        bucket = bucket.pick(tokens=token_ids.size, seqs=n, pages=pages.size, max_q_len=longest)
    bucket.require(tokens=token_ids.size, seqs=n, pages=pages.size, max_q_len=longest)

    at = field_slices(bucket)
    packed = np.zeros(at["page_list"].stop, np.int32)  # the padding of most fields
    packed[0] = n
    packed[at["token_ids"]][: token_ids.size] = token_ids
    _write_prefix_sums(packed[at["cu_q_lens"]], q_ends)
    packed[at["kv_lens"]][:n] = kv_lens
    packed[at["is_decode"]][:n] = bucket.max_q_len == 1 if decodes is None else decodes
    slots = packed[at["state_slots"]]
    slots[:n] = row_numbers(n) if state_slots is None else state_slots
    slots[n:] = PAD_SLOT
    if prefix_lm_lens is not None:
        packed[at["prefix_lm_lens"]][:n] = prefix_lm_lens
    if page_size is not None:
        _write_prefix_sums(packed[at["page_indptr"]], page_ends)
        packed[at["page_list"]][: pages.size] = pages
    buffer: Any = jnp.asarray(packed) if transfer else packed
    if log is not None:
        log.write(tokens=token_ids.size, seqs=n, pages=pages.size, max_q_len=longest, bucket=bucket)
    return RaggedBatch(packed=buffer, bucket=bucket, page_size=page_size)


def _write_prefix_sums(out: np.ndarray, ends: np.ndarray) -> None:
    """Fill `out`, zeros and longer than `ends`, from its second entry; the tail repeats the last."""
    n = ends.size
    out[1 : n + 1] = ends
    if n + 1 < out.size:
        out[n + 1 :] = ends[-1]


_INTEGERS_OR_NONE = {int, type(None), np.int32, np.int64}
