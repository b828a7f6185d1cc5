"""Ragged batches: `nest_sequences` packs them once on the host, `advance` moves them on the device.

This is the only module with host-side code on the path of a step, and the only place where the
*values* of a batch are checked. Everything after it is pure and works on static shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from jaxattn.buckets import Bucket, BucketGrid

INT32_MAX = int(np.iinfo(np.int32).max)
INT64_MAX = int(np.iinfo(np.int64).max)
DEFAULT_GRID = BucketGrid()


def field_slices(bucket: Bucket) -> dict[str, slice]:
    """Where each primary field lies in the packed buffer of a bucket.

    The order of this table is the layout; there is no other.
    """
    sizes = {
        "num_seqs": 1,
        "token_ids": bucket.tokens,
        "cu_q_lens": bucket.seqs + 1,
        "kv_lens": bucket.seqs,
        "page_indptr": bucket.seqs + 1,
        "page_list": bucket.pages,
    }
    ends = itertools.accumulate(sizes.values())
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class RaggedBatch:
    """A batch of sequences of different lengths, padded to a bucket. A pytree of one leaf.

    The batch *is* its packed int32 buffer: one transfer brings it to the device, and the fields
    below are slices of it, free inside a jitted program.

    Attributes:
        packed: All primary fields, one after the other (`field_slices`).
        bucket: The static sizes T, R and P.
        page_size: Tokens per page, or None where keys lie beside the queries and are not paged.
    """

    packed: Int32[Array, " packed"]
    bucket: Bucket = field(metadata={"static": True})
    page_size: int | None = field(metadata={"static": True})

    def _get(self, name: str) -> Array:
        return self.packed[field_slices(self.bucket)[name]]

    @property
    def num_seqs(self) -> Int32[Array, ""]:
        """Sequences of the batch; rows past it are padding."""
        return self._get("num_seqs")[0]

    @property
    def token_ids(self) -> Int32[Array, " T"]:
        """Query tokens, sequence after sequence; 0 in the padding."""
        return self._get("token_ids")

    @property
    def cu_q_lens(self) -> Int32[Array, " R_plus_1"]:
        """Prefix sums of query lengths, in tokens; the tail repeats the last value."""
        return self._get("cu_q_lens")

    @property
    def kv_lens(self) -> Int32[Array, " R"]:
        """Keys per sequence, this step's included; 0 for a padding row."""
        return self._get("kv_lens")

    @property
    def page_indptr(self) -> Int32[Array, " R_plus_1"]:
        """Prefix sums of the number of pages that each sequence holds, reserved ones included."""
        return self._get("page_indptr")

    @property
    def page_list(self) -> Int32[Array, " P"]:
        """Physical pages, sequence after sequence, in logical order."""
        return self._get("page_list")


def abstract_batch(bucket: Bucket, page_size: int | None = None) -> RaggedBatch:
    """The shapes of a batch in a bucket, without data: what a program is compiled from."""
    size = field_slices(bucket)["page_list"].stop
    packed: Any = jax.ShapeDtypeStruct((size,), jnp.int32)
    return RaggedBatch(packed=packed, bucket=bucket, page_size=page_size)


def nest_sequences(
    sequences: Sequence[Any] | np.ndarray,
    *,
    q_lens: Any = None,
    context_lens: Any = None,
    page_tables: Sequence[Any] | np.ndarray | None = None,
    page_size: int | None = None,
    num_pages: int | None = None,
    vocab_size: int | None = None,
    bucket: Bucket | BucketGrid = DEFAULT_GRID,
) -> RaggedBatch:
    """Nest sequences of different lengths into one packed batch on the device.

    Host code in vectorised NumPy; one int32 buffer is filled and transferred. All values are
    checked here, before anything is written.

    Args:
        sequences: Token ids: one list or 1-D integer array per sequence, or one flat 1-D array
            together with `q_lens`.
        q_lens: Query tokens per sequence, for a flat `sequences` only.
        context_lens: Tokens of each sequence that the cache holds already; default none.
        page_tables: Physical pages of each sequence in logical order, one list or 1-D array per
            sequence (or a 2-D array, one row per sequence). They must cover
            `context_lens + q_lens` tokens and may reserve more for later steps.
            None where keys are not paged.
        page_size: Tokens per page; given exactly when `page_tables` is.
        num_pages: Pages of the cache, to check the tables against. Without it a page that the cache
            does not have goes unnoticed: its keys are dropped when written.
        vocab_size: Number of token ids, to check the tokens against.
        bucket: The bucket to pad to, or a grid to pick the smallest fitting one from.

    Returns:
        The batch, on the default device.

    Raises:
        ValueError: If a value is out of range, a page is owned twice, or the batch does not fit;
            the message names the argument, the value and the remedy.
        TypeError: If token ids, lengths or pages are not integers.
    """
    token_ids, lens = _tokens_and_lens(sequences, q_lens)
    _check_tokens(token_ids, lens, vocab_size)
    contexts = _context_lens(context_lens, lens)
    kv_lens = contexts + lens
    pages, page_counts = _pages(page_tables, page_size, num_pages, kv_lens, contexts)

    sizes = {"tokens": token_ids.size, "seqs": lens.size, "pages": pages.size}
    if isinstance(bucket, BucketGrid):
        bucket = bucket.pick(**sizes)
    bucket.require(**sizes, max_q_len=int(lens.max()))

    packed = _pack(
        bucket,
        {
            "num_seqs": np.array([lens.size]),
            "token_ids": token_ids,
            "cu_q_lens": _prefix_sums(lens, bucket.seqs),
            "kv_lens": kv_lens,
            "page_indptr": _prefix_sums(page_counts, bucket.seqs),
            "page_list": pages,
        },
    )
    return RaggedBatch(packed=jax.device_put(packed), bucket=bucket, page_size=page_size)


def advance(
    batch: RaggedBatch,
    token_ids: Int32[Array, " R"],
    *,
    active: Bool[Array, " R"] | None = None,
    bucket: Bucket | None = None,
) -> RaggedBatch:
    """The next decode step's batch: every active sequence appends one token. Pure, on the device.

    Pages are not allocated here: the tables of `nest_sequences` must have reserved enough for all
    steps to come. A token past its sequence's pages is not written to the cache and not seen.

    Args:
        batch: The last step's batch.
        token_ids: The token that each row appends; rows past `num_seqs` are ignored.
        active: Which rows go on; a row that does not stays quiet: no query token, its keys kept.
            Default: all.
        bucket: The next step's bucket, with as many pages; default `batch.bucket.decode()`. It
            may have fewer rows than the batch, where the rows left out are padding.

    Returns:
        The batch of the next step.

    Raises:
        ValueError: If the batch has no pages, or `bucket` more rows or other pages than the batch.
    """
    if batch.page_size is None:
        raise ValueError("batch was nested without page_tables: there is no cache to advance in")
    bucket = batch.bucket.decode() if bucket is None else bucket
    if bucket.seqs > batch.bucket.seqs or bucket.pages != batch.bucket.pages:
        raise ValueError(
            f"bucket={bucket} must have at most the rows and exactly the pages of {batch.bucket}"
        )
    R = bucket.seqs
    old_kv_lens = batch.kv_lens[:R]
    goes_on = jnp.arange(R) < batch.num_seqs
    if active is not None:
        goes_on &= active[:R]
    q_lens = goes_on.astype(jnp.int32)
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(q_lens, dtype=jnp.int32)])
    # Quiet rows send their token out of range, where the scatter drops it.
    place = jnp.where(goes_on, cu_q_lens[:-1], bucket.tokens)
    packed = jnp.concatenate(
        [
            batch.num_seqs[None],
            jnp.zeros(bucket.tokens, jnp.int32).at[place].set(token_ids[:R], mode="drop"),
            cu_q_lens,
            old_kv_lens + q_lens,
            batch.page_indptr[: R + 1],
            batch.page_list,
        ]
    )
    return RaggedBatch(packed=packed, bucket=bucket, page_size=batch.page_size)


def _pack(bucket: Bucket, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    slices = field_slices(bucket)
    packed = np.zeros(slices["page_list"].stop, np.int32)
    for name, values in fields.items():
        start = slices[name].start
        packed[start : start + values.size] = values
    return packed


def _prefix_sums(lens: np.ndarray, rows: int) -> np.ndarray:
    sums = np.empty(rows + 1, np.int32)
    sums[0] = 0
    np.cumsum(lens, out=sums[1 : lens.size + 1])
    sums[lens.size + 1 :] = sums[lens.size]
    return sums


def _integers(name: str, values: Any) -> np.ndarray:
    """`values` as a 1-D array of signed integers."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} holds rows of different lengths; expected one axis") from None
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; expected one axis")
    if array.size == 0:
        return array.astype(np.int64)
    beyond = array.dtype == np.uint64 and array.max() > INT64_MAX
    if beyond or (array.dtype == object and all(isinstance(value, int) for value in array)):
        raise ValueError(f"{name} holds {array.max()}, which is outside the range of int64")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}; expected integers")
    return array.astype(np.int64) if array.dtype == np.uint64 else array


def flatten_rows(name: str, rows: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate rows of different lengths; returns the values and the length of each row."""
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        return _integers(name, rows.reshape(-1)), np.full(rows.shape[0], rows.shape[1], np.int64)
    try:
        lens = np.fromiter(map(len, rows), np.int64, len(rows))
    except TypeError:
        raise TypeError(f"{name} must hold one list or 1-D array per sequence") from None
    filled = [row for row in rows if len(row)]  # an empty list would be an array of floats
    if all(isinstance(row, list) for row in filled):
        # One conversion for all rows: much faster than one per row for Python lists.
        return _integers(name, np.array(list(itertools.chain.from_iterable(filled)))), lens
    arrays = [_integers(f"{name}[{i}]", row) for i, row in enumerate(rows) if len(row)]
    return np.concatenate(arrays), lens


def _tokens_and_lens(sequences: Any, q_lens: Any) -> tuple[np.ndarray, np.ndarray]:
    if q_lens is None:
        if isinstance(sequences, np.ndarray) and sequences.ndim == 1 and sequences.dtype != object:
            raise ValueError("sequences is one flat array; give the length of each sequence as q_lens")
        token_ids, lens = flatten_rows("sequences", sequences)
    else:
        token_ids = _integers("sequences", sequences)
        lens = _integers("q_lens", q_lens).astype(np.int64)
        if lens.sum() != token_ids.size:
            raise ValueError(f"q_lens sum to {lens.sum()}, but sequences holds {token_ids.size} tokens")
    if lens.size == 0:
        raise ValueError("sequences is empty; a batch needs at least one sequence")
    if lens.min() < 1:
        i = int(lens.argmin())
        raise ValueError(
            f"sequences[{i}] has length {lens[i]}; every sequence needs at least one token, drop it"
        )
    return token_ids, lens


def _check_tokens(token_ids: np.ndarray, lens: np.ndarray, vocab_size: int | None) -> None:
    limit = INT32_MAX + 1 if vocab_size is None else vocab_size
    if token_ids.min() >= 0 and token_ids.max() < limit:
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


def _context_lens(context_lens: Any, lens: np.ndarray) -> np.ndarray:
    if context_lens is None:
        contexts = np.zeros_like(lens)
    else:
        contexts = _integers("context_lens", context_lens).astype(np.int64)
    if contexts.size != lens.size:
        raise ValueError(f"context_lens has {contexts.size} entries for {lens.size} sequences")
    if contexts.min() < 0:
        i = int(contexts.argmin())
        raise ValueError(f"context_lens[{i}]={contexts[i]} must not be negative")
    if (contexts + lens).max() > INT32_MAX:
        i = int((contexts + lens).argmax())
        raise ValueError(
            f"context_lens[{i}]={contexts[i]} plus {lens[i]} tokens exceeds int32; split the sequence"
        )
    if (contexts + lens).sum() > INT32_MAX:
        raise ValueError(f"{(contexts + lens).sum()} keys in all exceed int32; split the batch")
    return contexts


def _pages(
    page_tables: Any, page_size: int | None, num_pages: int | None, kv_lens: np.ndarray, contexts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The flat page list and the number of pages of each sequence, both checked."""
    if (page_tables is None) != (page_size is None):
        raise ValueError("page_tables and page_size belong together; give both, or neither for unpaged keys")
    if page_tables is None or page_size is None:
        if contexts.any():
            i = int(contexts.argmax())
            raise ValueError(
                f"context_lens[{i}]={contexts[i]} needs a paged cache; give page_tables and page_size"
            )
        return np.empty(0, np.int64), np.zeros_like(kv_lens)
    if page_size < 1:
        raise ValueError(f"page_size={page_size} must be at least 1")
    pages, counts = flatten_rows("page_tables", page_tables)
    if counts.size != kv_lens.size:
        raise ValueError(f"page_tables has {counts.size} rows for {kv_lens.size} sequences")
    short = counts * page_size < kv_lens
    if short.any():
        i = int(short.argmax())
        raise ValueError(
            f"page_tables[{i}] holds {counts[i]} pages of {page_size} tokens, but sequence {i} has "
            f"{kv_lens[i]} keys; it needs {-(-int(kv_lens[i]) // page_size)} pages"
        )
    _check_pages(pages, counts, page_size, num_pages)
    return pages, counts


def _check_pages(pages: np.ndarray, counts: np.ndarray, page_size: int, num_pages: int | None) -> None:
    rows = np.repeat(np.arange(counts.size), counts)
    # Slots are int32 and the largest one marks padding.
    limit = INT32_MAX // page_size
    if num_pages is not None:
        limit = min(num_pages, limit)
    bad = (pages < 0) | (pages >= limit)
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(
            f"page_tables[{rows[at]}] names page {pages[at]}, out of range: "
            f"expected 0 <= page < num_pages={limit}"
        )
    order = np.argsort(pages, kind="stable")
    twice = np.flatnonzero(pages[order[1:]] == pages[order[:-1]])
    if twice.size:
        first, second = order[twice[0]], order[twice[0] + 1]
        raise ValueError(
            f"page {pages[first]} is owned twice, by page_tables[{rows[first]}] and "
            f"page_tables[{rows[second]}]; give every sequence pages of its own"
        )
