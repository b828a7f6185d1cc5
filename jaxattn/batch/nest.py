"""`nest_sequences`: sequences of different lengths become one packed batch, once, on the host.

The only place where the *values* of a batch are checked. Everything after it is pure and works on static
shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
from jaxattn.batch.rows import Rows, page_rows, per_sequence, row_numbers, rows_of
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
    _check_sizes(("page_size", page_size), ("num_pages", num_pages), ("vocab_size", vocab_size))
    given = _read(
        sequences,
        q_lens,
        context_lens,
        page_tables,
        page_counts,
        page_size,
        state_slots,
        prefix_lm_lens,
        is_decode,
    )
    if validate:
        _check(given, num_pages, vocab_size, share_prefixes)
    chosen = _pick(bucket, given)
    packed = _fill(given, chosen, _decodes(given.is_decode, bucket, chosen))
    buffer: Any = jnp.asarray(packed) if transfer else packed
    if log is not None:
        flat, lens, _, _, longest = given.tokens
        log.write(
            tokens=flat.size, seqs=lens.size, pages=given.pages.flat.size, max_q_len=longest, bucket=chosen
        )
    return RaggedBatch(packed=buffer, bucket=chosen, page_size=page_size)


class _Given(NamedTuple):
    """What was given for a batch of n sequences, as arrays of integers; None where nothing was."""

    tokens: Rows  # token ids of each sequence
    contexts: np.ndarray | None  # [n] tokens that the cache holds
    kv_lens: np.ndarray  # [n] those and this step's
    pages: Rows  # pages of each sequence; no row where keys are not paged
    page_size: int | None
    state_slots: np.ndarray | None  # [n]
    prefix_lm_lens: np.ndarray | None  # [n]
    is_decode: np.ndarray | None  # [n] bools


_INTEGERS_OR_NONE = {int, type(None), np.int32, np.int64}


def _check_sizes(*sizes: tuple[str, Any]) -> None:
    """Whether named sizes are integers, or None where they were not given."""
    for name, value in sizes:
        if type(value) not in _INTEGERS_OR_NONE:
            raise TypeError(f"{name}={value!r} must be an int, or None")


def _read(
    sequences: Any,
    q_lens: Any,
    context_lens: Any,
    page_tables: Any,
    page_counts: Any,
    page_size: int | None,
    state_slots: Any,
    prefix_lm_lens: Any,
    is_decode: Any,
) -> _Given:
    """The arguments of `nest_sequences` as arrays, whose types and lengths are right."""
    tokens = rows_of("sequences", sequences, "q_lens", q_lens)
    n = tokens.lens.size
    if tokens.shortest == 0:
        i = int(tokens.lens.argmin())
        raise ValueError(f"sequences[{i}] has length 0; every sequence needs at least one token, drop it")
    contexts = None if context_lens is None else per_sequence("context_lens", context_lens, n)
    kv_lens = tokens.lens if contexts is None else contexts + tokens.lens
    pages = page_rows(page_tables, page_counts, page_size, contexts, n)
    if state_slots is not None:
        state_slots = per_sequence("state_slots", state_slots, n)
    if prefix_lm_lens is not None:
        prefix_lm_lens = per_sequence("prefix_lm_lens", prefix_lm_lens, n)
    if is_decode is not None:
        is_decode = _phases(is_decode, n)
    return _Given(tokens, contexts, kv_lens, pages, page_size, state_slots, prefix_lm_lens, is_decode)


def _phases(is_decode: Any, n: int) -> np.ndarray:
    found = np.asarray(is_decode)
    if found.dtype != bool:
        raise TypeError(f"is_decode has dtype {found.dtype}; expected one bool per sequence")
    if found.shape != (n,):
        raise ValueError(f"is_decode has shape {found.shape} for {n} sequences")
    return found


def _check(given: _Given, num_pages: int | None, vocab_size: int | None, share_prefixes: bool) -> None:
    """Whether the values make sense."""
    tokens, contexts, kv_lens, pages, page_size, state_slots, prefix_lm_lens, _ = given
    check_tokens(tokens.flat, tokens.lens, vocab_size)
    check_kv_lens(tokens.lens, contexts, tokens.longest)
    if page_size is not None:
        check_coverage(kv_lens, pages.lens, page_size)
        check_pages(pages.flat, pages.lens, contexts, page_size, num_pages, share_prefixes)
    if state_slots is not None:
        check_state_slots(state_slots)
    if prefix_lm_lens is not None:
        check_prefix_lm_lens(prefix_lm_lens, tokens.lens, contexts)


def _pick(asked: Bucket | Buckets, given: _Given) -> Bucket:
    """A bucket that holds the batch. Of a grid it is one for queries of any length, never a decode bucket."""
    flat, lens, _, _, longest = given.tokens
    tokens, seqs, pages = flat.size, lens.size, given.pages.flat.size
    if isinstance(asked, BucketGrid):
        return asked.pick(tokens=tokens, seqs=seqs, pages=pages)
    if isinstance(asked, Bucket):
        asked.require(tokens=tokens, seqs=seqs, pages=pages, max_q_len=longest)
        return asked
    return asked.pick(tokens=tokens, seqs=seqs, pages=pages, max_q_len=longest)


def _decodes(is_decode: np.ndarray | None, asked: Bucket | Buckets, chosen: Bucket) -> np.ndarray | bool:
    """Which sequences decode: as it was said, or all in a bucket that was given for single tokens.

    A plan chooses such a bucket by lengths, which tell nothing.
    """
    if is_decode is not None:
        return is_decode
    return isinstance(asked, (Bucket, BucketGrid)) and chosen.max_q_len == 1


def _fill(given: _Given, bucket: Bucket, decodes: np.ndarray | bool) -> np.ndarray:
    """The packed buffer of a bucket that holds what was given."""
    token_ids, lens, q_ends, *_ = given.tokens
    pages, n = given.pages, lens.size
    at = field_slices(bucket)
    packed = np.zeros(at["page_list"].stop, np.int32)  # the padding of most fields
    packed[0] = n
    packed[at["token_ids"]][: token_ids.size] = token_ids
    _write_prefix_sums(packed[at["cu_q_lens"]], q_ends)
    packed[at["kv_lens"]][:n] = given.kv_lens
    packed[at["is_decode"]][:n] = decodes
    slots = packed[at["state_slots"]]
    slots[:n] = row_numbers(n) if given.state_slots is None else given.state_slots
    slots[n:] = PAD_SLOT
    if given.prefix_lm_lens is not None:
        packed[at["prefix_lm_lens"]][:n] = given.prefix_lm_lens
    if given.page_size is not None:
        _write_prefix_sums(packed[at["page_indptr"]], pages.ends)
        packed[at["page_list"]][: pages.flat.size] = pages.flat
    return packed


def _write_prefix_sums(out: np.ndarray, ends: np.ndarray) -> None:
    """Fill `out`, zeros and longer than `ends`, from its second entry; the tail repeats the last."""
    n = ends.size
    out[1 : n + 1] = ends
    if n + 1 < out.size:
        out[n + 1 :] = ends[-1]
