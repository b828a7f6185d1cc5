"""Whether the values of a batch make sense, checked on the host, for `nest_sequences`.

Every check is quick where all is well; only where it is not, it looks for the first wrong value and its name.
`device_checks.py` holds the same for a batch on the device.
"""

from __future__ import annotations

import numpy as np

from jaxattn.batch.ragged import INT32_MAX, PAD_SLOT
from jaxattn.batch.rows import largest


def check_tokens(token_ids: np.ndarray, lens: np.ndarray, vocab_size: int | None) -> None:
    """Whether every token id is in the vocabulary, or in int32 where none is given."""
    limit = INT32_MAX + 1 if vocab_size is None else vocab_size
    if largest(token_ids) < limit:
        return
    at = int(np.flatnonzero((token_ids < 0) | (token_ids >= limit))[0])
    ends = np.cumsum(lens)
    row = int(np.searchsorted(ends, at, side="right"))
    what = (
        "the range of int32"
        if vocab_size is None
        else f"the vocabulary: expected 0 <= id < vocab_size={limit}"
    )
    raise ValueError(
        f"sequences[{row}][{at - int(ends[row] - lens[row])}]={token_ids[at]} is a token id outside {what}"
    )


def check_kv_lens(lens: np.ndarray, contexts: np.ndarray | None, longest: int) -> None:
    """Whether contexts are not negative, and keys fit int32, of each sequence and in all."""
    # No sum can overflow, by a bound that costs little; else the exact sums decide.
    if ((0 if contexts is None else largest(contexts)) + longest) * lens.size <= INT32_MAX:
        return
    contexts = np.zeros_like(lens) if contexts is None else contexts
    kv_lens = np.add(contexts, lens, dtype=np.int64)
    if contexts.min() < 0:
        i = int(contexts.argmin())
        raise ValueError(f"context_lens[{i}]={contexts[i]} must not be negative")
    if max(kv_lens.max(), contexts.max()) > INT32_MAX:
        i = int(contexts.argmax() if contexts.max() > INT32_MAX else kv_lens.argmax())
        raise ValueError(
            f"context_lens[{i}]={contexts[i]} plus {lens[i]} tokens exceeds int32; split the sequence"
        )
    if kv_lens.sum() > INT32_MAX:
        raise ValueError(f"{kv_lens.sum()} keys in all exceed int32; split the batch")


def check_coverage(kv_lens: np.ndarray, counts: np.ndarray, page_size: int) -> None:
    """Whether every sequence has pages for all of its keys."""
    # Where a product wraps around, it covers every length, and the exact one below says so.
    if int(np.minimum.reduce(counts * page_size - kv_lens)) >= 0:
        return
    short = counts * float(page_size) < kv_lens
    if short.any():
        i = int(short.argmax())
        raise ValueError(
            f"page_tables[{i}] holds {counts[i]} pages of {page_size} tokens, but sequence {i} has "
            f"{kv_lens[i]} keys; it needs {-(-int(kv_lens[i]) // page_size)} pages"
        )


def check_pages(
    pages: np.ndarray,
    counts: np.ndarray,
    contexts: np.ndarray | None,
    page_size: int,
    num_pages: int | None,
    share_prefixes: bool,
) -> None:
    """Whether pages exist, and whether each has one owner, or owners that only read it."""
    # Slots are int32 and the largest one marks padding.
    limit = INT32_MAX // page_size
    if num_pages is not None:
        limit = min(num_pages, limit)
    highest = largest(pages)
    if highest >= limit:
        at = int(((pages < 0) | (pages >= limit)).argmax())
        raise ValueError(
            f"page_tables[{_row_of(at, counts)}] names page {pages[at]}, out of range: "
            f"expected 0 <= page < num_pages={limit}"
        )
    if _all_distinct(pages, highest):
        return
    order = np.argsort(pages, kind="stable")
    first, second = order[:-1], order[1:]
    twice = pages[first] == pages[second]
    if share_prefixes:
        starts = np.cumsum(counts) - counts
        logical = np.arange(pages.size) - np.repeat(starts, counts)
        context_pages = np.zeros_like(counts) if contexts is None else contexts // page_size
        is_read_only = logical < np.repeat(context_pages, counts)
        twice &= ~(is_read_only[first] & is_read_only[second] & (logical[first] == logical[second]))
    if twice.any():
        at, again = int(first[twice][0]), int(second[twice][0])
        remedy = (
            "only whole pages of context, at the same place in each table, can be shared"
            if share_prefixes
            else "give every sequence pages of its own, or set share_prefixes for common prefixes"
        )
        raise ValueError(
            f"page {pages[at]} is owned twice, by page_tables[{_row_of(at, counts)}] and "
            f"page_tables[{_row_of(again, counts)}]; {remedy}"
        )


def _all_distinct(values: np.ndarray, highest: int) -> bool:
    # A mark per value is faster than sorting where there are many, and memory for the marks.
    if values.size > 2048 and highest < 1 << 20:
        seen = np.zeros(highest + 1, bool)
        seen[values.astype(np.intp)] = True
        return int(np.count_nonzero(seen)) == values.size
    ordered = np.sort(values)
    return not np.count_nonzero(ordered[1:] == ordered[:-1])


def _row_of(entry: int, counts: np.ndarray) -> int:
    return int(np.searchsorted(np.cumsum(counts), entry, side="right"))


def check_prefix_lm_lens(prefixes: np.ndarray, lens: np.ndarray, contexts: np.ndarray | None) -> None:
    """Whether each prefix lies within the context, or within a query without one."""
    room = lens if contexts is None else np.where(contexts > 0, contexts, lens)
    wrong = (prefixes < 0) | (prefixes > room)
    if wrong.any():
        i = int(wrong.argmax())
        context = 0 if contexts is None else contexts[i]
        raise ValueError(
            f"prefix_lm_lens[{i}]={prefixes[i]} must lie between 0 and {room[i]}: sequence {i} has {context} "
            f"tokens of context and {lens[i]} of query, and a prefix is prefilled in one step"
        )


def check_state_slots(slots: np.ndarray) -> None:
    """Whether slots are in range and distinct."""
    if (highest := largest(slots)) >= PAD_SLOT:
        i = int(((slots < 0) | (slots >= PAD_SLOT)).argmax())
        raise ValueError(f"state_slots[{i}]={slots[i]} must lie between 0 and {PAD_SLOT - 1}")
    if not _all_distinct(slots, highest):
        slot = next(slot for slot in slots if np.count_nonzero(slots == slot) > 1)
        raise ValueError(f"state_slots names slot {slot} twice; every sequence needs a state of its own")
