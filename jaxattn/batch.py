"""Ragged batches: `nest_sequences` packs them once on the host, `advance` moves them on the device.

This is the only module with host-side code on the path of a step, and the only place where the
*values* of a batch are checked. Everything after it is pure and works on static shapes.
"""

from __future__ import annotations

import array
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Int32

from jaxattn.buckets import Bucket, BucketGrid, Buckets
from jaxattn.cards import batch_card
from jaxattn.trace import BatchLog

INT32_MAX = int(np.iinfo(np.int32).max)
INT64_MAX = int(np.iinfo(np.int64).max)
DEFAULT_GRID = BucketGrid()

PAD_SLOT = INT32_MAX
"""A slot that does not exist: out of range and *positive*, so that a scatter with `mode="drop"` skips it. A
negative one would wrap around and overwrite a live slot."""


@functools.lru_cache(maxsize=1024)
def field_slices(bucket: Bucket) -> dict[str, slice]:
    """Where each primary field lies in the packed buffer of a bucket.

    The order of this table is the layout; there is no other.
    """
    sizes = {
        "num_seqs": 1,
        "token_ids": bucket.tokens,
        "cu_q_lens": bucket.seqs + 1,
        "kv_lens": bucket.seqs,
        "is_decode": bucket.seqs,
        "state_slots": bucket.seqs,
        "prefix_lm_lens": bucket.seqs,
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
    def is_decode(self) -> Bool[Array, " R"]:
        """Whether a row decodes, as opposed to prefilling; stated by the caller, never guessed."""
        return self._get("is_decode") != 0

    @property
    def state_slots(self) -> Int32[Array, " R"]:
        """Slot of each sequence's recurrent state; `PAD_SLOT` for a padding row."""
        return self._get("state_slots")

    @property
    def prefix_lm_lens(self) -> Int32[Array, " R"]:
        """Leading keys of each sequence that all its tokens see, in layers with `prefix_lm`; 0 for none."""
        return self._get("prefix_lm_lens")

    @property
    def page_indptr(self) -> Int32[Array, " R_plus_1"]:
        """Prefix sums of the number of pages that each sequence holds, reserved ones included."""
        return self._get("page_indptr")

    @property
    def page_list(self) -> Int32[Array, " P"]:
        """Physical pages, sequence after sequence, in logical order."""
        return self._get("page_list")

    def _repr_html_(self) -> str:
        return batch_card(self, size=field_slices(self.bucket)["page_list"].stop)


def abstract_batch(bucket: Bucket, page_size: int | None = None) -> RaggedBatch:
    """The shapes of a batch in a bucket, without data: what a program is compiled from."""
    size = field_slices(bucket)["page_list"].stop
    packed: Any = jax.ShapeDtypeStruct((size,), jnp.int32)
    return RaggedBatch(packed=packed, bucket=bucket, page_size=page_size)


def pack_fields(bucket: Bucket, page_size: int | None, **fields: Array) -> RaggedBatch:
    """A batch from its primary fields, on the device. Pure; values are not checked (`check_batch`).

    Args:
        bucket: The bucket.
        page_size: Tokens per page, or None for an unpaged batch.
        **fields: Every field of `field_slices`, of the bucket's sizes.

    Raises:
        ValueError: If a field is missing, unknown or of another size.
    """
    slices = field_slices(bucket)
    if fields.keys() != slices.keys():
        raise ValueError(f"fields {sorted(fields)} given; a batch has {sorted(slices)}")
    for name, place in slices.items():
        size = place.stop - place.start
        if jnp.size(fields[name]) != size:
            raise ValueError(f"{name} has {jnp.size(fields[name])} entries; {bucket} needs {size}")
    parts = [jnp.asarray(fields[name], jnp.int32).reshape(-1) for name in slices]
    return RaggedBatch(packed=jnp.concatenate(parts), bucket=bucket, page_size=page_size)


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
    token_ids, lens, q_ends, shortest, longest = _rows("sequences", sequences, "q_lens", q_lens)
    n = lens.size
    if shortest == 0:
        i = int(lens.argmin())
        raise ValueError(f"sequences[{i}] has length 0; every sequence needs at least one token, drop it")
    contexts = None if context_lens is None else _per_sequence("context_lens", context_lens, n)
    kv_lens = lens if contexts is None else contexts + lens
    pages, counts, page_ends, *_ = _page_rows(page_tables, page_counts, page_size, contexts, n)
    if state_slots is not None:
        state_slots = _per_sequence("state_slots", state_slots, n)
    if prefix_lm_lens is not None:
        prefix_lm_lens = _per_sequence("prefix_lm_lens", prefix_lm_lens, n)
    if is_decode is not None and (is_decode := np.asarray(is_decode)).dtype != bool:
        raise TypeError(f"is_decode has dtype {is_decode.dtype}; expected one bool per sequence")
    if is_decode is not None and is_decode.shape != (n,):
        raise ValueError(f"is_decode has shape {is_decode.shape} for {n} sequences")
    if validate:
        _check_tokens(token_ids, lens, vocab_size)
        _check_kv_lens(lens, contexts, longest)
        if page_size is not None:
            _check_coverage(kv_lens, counts, page_size)
            _check_pages(pages, counts, contexts, page_size, num_pages, share_prefixes)
        if state_slots is not None:
            _check_state_slots(state_slots)
        if prefix_lm_lens is not None:
            _check_prefix_lm_lens(prefix_lm_lens, lens, contexts)

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
    slots[:n] = _row_numbers(n) if state_slots is None else state_slots
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
        q_lens: How many of its tokens each row appends, from 0 to Q. A row that appends none stays
            quiet: no query token, its keys kept. Default: Q.
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
    cu_q_lens = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new_lens, dtype=jnp.int32)])
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


def check_batch(batch: RaggedBatch, *, num_pages: int | None = None, share_prefixes: bool = False) -> None:
    """The checks of `nest_sequences`, for a batch that was built on the device.

    Every check is a `checkify.check`: use it inside a function transformed by
    `jax.experimental.checkify.checkify`, and throw the error on the host.

    Args:
        batch: The batch.
        num_pages: Pages of the cache.
        share_prefixes: As of `nest_sequences`.
    """
    R, T, P = batch.bucket.seqs, batch.bucket.tokens, batch.bucket.pages
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
    slots = jnp.sort(jnp.where(is_real, batch.state_slots, PAD_SLOT))
    twice = (slots[1:] == slots[:-1]) & (slots[1:] != PAD_SLOT)
    checkify.check(
        (slots >= 0).all() & ~twice.any() & ((slots != PAD_SLOT).sum() == n),
        "state_slots={s} must be distinct, not negative, and below " + str(PAD_SLOT),
        s=batch.state_slots,
    )
    contexts = kv_lens - q_lens
    room = jnp.where(contexts > 0, contexts, kv_lens)
    checkify.check(
        ((batch.prefix_lm_lens >= 0) & (batch.prefix_lm_lens <= room)).all(),
        "prefix_lm_lens={p} must lie within the contexts, or within queries without one",
        p=batch.prefix_lm_lens,
    )
    if batch.page_size is None:
        checkify.check((kv_lens == q_lens).all(), "kv_lens={k} count keys that no page holds", k=kv_lens)
        return
    page_size, indptr, pages = batch.page_size, batch.page_indptr, batch.page_list
    counts = jnp.diff(indptr)
    checkify.check(
        (indptr[0] == 0) & (indptr[1:] >= indptr[:-1]).all() & (indptr[-1] <= P),
        "page_indptr={i} must begin with 0, never decrease, and end at or before bucket.pages=" + str(P),
        i=indptr,
    )
    needed = (kv_lens - 1) // page_size + 1
    checkify.check((counts >= needed).all(), "page_indptr={i} holds too few pages for kv_lens", i=indptr)
    limit = INT32_MAX // page_size if num_pages is None else min(num_pages, INT32_MAX // page_size)
    listed = jnp.arange(P) < indptr[-1]
    in_range = (pages >= 0) & (pages < limit)
    checkify.check(
        jnp.where(listed, in_range, True).all(), "page_list={p} must lie below " + str(limit), p=pages
    )
    row = jnp.searchsorted(indptr[1:], jnp.arange(P, dtype=jnp.int32), side="right")
    row = jnp.minimum(row, R - 1).astype(jnp.int32)
    logical = jnp.arange(P, dtype=jnp.int32) - indptr[row]
    context_pages = (kv_lens - q_lens) // page_size
    may_share = (logical < context_pages[row]) if share_prefixes else jnp.zeros(P, bool)
    # Pages in order, so that owners of one page stand side by side; unlisted entries come last.
    order = jnp.argsort(jnp.where(listed, pages, INT32_MAX), stable=True)
    same = (pages[order[1:]] == pages[order[:-1]]) & listed[order[1:]] & listed[order[:-1]]
    both = may_share[order[1:]] & may_share[order[:-1]] & (logical[order[1:]] == logical[order[:-1]])
    checkify.check(~(same & ~both).any(), "page_list={p} gives a page to two sequences", p=pages)


@functools.lru_cache(maxsize=1024)
def _row_numbers(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int32)


def _write_prefix_sums(out: np.ndarray, ends: np.ndarray) -> None:
    """Fill `out`, zeros and longer than `ends`, from its second entry; the tail repeats the last."""
    n = ends.size
    out[1 : n + 1] = ends
    if n + 1 < out.size:
        out[n + 1 :] = ends[-1]


_INTEGERS_OR_NONE = {int, type(None), np.int32, np.int64}
_UNSIGNED = {np.dtype(np.int32): np.dtype(np.uint32), np.dtype(np.int64): np.dtype(np.uint64)}


def _largest(values: np.ndarray) -> int:
    """The largest value, where a negative one counts as larger than all others."""
    return int(np.maximum.reduce(values.view(_UNSIGNED[values.dtype]))) if values.size else 0


def _integers(name: str, values: Any) -> np.ndarray:
    """`values` as a 1-D array of int32 or int64."""
    try:
        found = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} holds rows of different lengths; expected one axis") from None
    if found.ndim != 1:
        raise ValueError(f"{name} has shape {found.shape}; expected one axis")
    if found.dtype in _UNSIGNED:
        return found
    if found.size == 0:
        return found.astype(np.int64)
    beyond = found.dtype == np.uint64 and found.max() > INT64_MAX
    if beyond or (found.dtype == object and all(isinstance(value, int) for value in found)):
        raise ValueError(f"{name} holds {found.max()}, which is outside the range of int64")
    if found.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {found.dtype}; expected integers")
    return found.astype(np.int64)


def _per_sequence(name: str, values: Any, n: int) -> np.ndarray:
    found = _integers(name, values)
    if found.size != n:
        raise ValueError(f"{name} has {found.size} entries for {n} sequences")
    return found


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
        return _flatten_lists(name, filled), lens
    arrays = [_integers(f"{name}[{i}]", row) for i, row in enumerate(rows) if len(row)]
    return np.concatenate(arrays), lens


def _flatten_lists(name: str, rows: list[list]) -> np.ndarray:
    """The values of Python lists, in half the time that NumPy takes and as strictly."""
    values = array.array("q")
    try:
        if any(isinstance(row[0], bool) for row in rows):
            raise TypeError
        for row in rows:
            values.fromlist(row)
    except (TypeError, OverflowError):  # NumPy says what is wrong
        return _integers(name, np.array(list(itertools.chain.from_iterable(rows))))
    return np.frombuffer(values, np.int64)


class _Rows(NamedTuple):
    """Rows of different lengths: their values one after the other, and where each row ends."""

    flat: np.ndarray
    lens: np.ndarray
    ends: np.ndarray
    shortest: int
    longest: int


def _rows(name: str, rows: Any, lens_name: str, lens: Any) -> _Rows:
    """Rows of a batch, from one list or array each, or from flat values with lengths."""
    if lens is None:
        if isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype != object:
            raise ValueError(f"{name} is one flat array; give the length of each sequence as {lens_name}")
        flat, lens = flatten_rows(name, rows)
    else:
        flat, lens = _integers(name, rows), _integers(lens_name, lens)
    if lens.size == 0:
        raise ValueError(f"{name} is empty; a batch needs at least one sequence")
    shortest, longest = int(np.minimum.reduce(lens)), int(np.maximum.reduce(lens))
    if shortest < 0:
        i = int(lens.argmin())
        raise ValueError(f"{name}[{i}] has length {lens[i]}; {lens_name} must not be negative")
    if shortest == longest == 1:
        ends = _row_numbers(lens.size + 1)[1:]  # a sum takes longer, and every decode step comes here
    else:
        ends = np.add.accumulate(lens, dtype=np.int64)
    # A sum that wraps around may be right by chance: no length may exceed the whole.
    if longest > flat.size or ends[-1] != flat.size:
        raise ValueError(f"{lens_name} sum to {sum(lens.tolist())}, but {name} holds {flat.size} entries")
    return _Rows(flat, lens, ends, shortest, longest)


_UNPAGED = _Rows(*(np.empty(0, np.int32),) * 3, shortest=0, longest=0)


def _page_rows(
    page_tables: Any, page_counts: Any, page_size: int | None, contexts: np.ndarray | None, n: int
) -> _Rows:
    """The physical pages of each sequence; no row where keys are not paged."""
    if (page_tables is None) != (page_size is None):
        raise ValueError("page_tables and page_size belong together; give both, or neither for unpaged keys")
    if page_tables is None or page_size is None:
        if page_counts is not None:
            raise ValueError("page_counts was given without page_tables; give both, or neither")
        if contexts is not None and contexts.any():
            i = int(contexts.argmax())
            raise ValueError(
                f"context_lens[{i}]={contexts[i]} needs a paged cache; give page_tables and page_size"
            )
        return _UNPAGED
    if not 1 <= page_size <= INT32_MAX:
        raise ValueError(f"page_size={page_size} must be at least 1, and an int32")
    pages = _rows("page_tables", page_tables, "page_counts", page_counts)
    if pages.lens.size != n:
        raise ValueError(f"page_tables has {pages.lens.size} rows for {n} sequences")
    return pages


def _check_tokens(token_ids: np.ndarray, lens: np.ndarray, vocab_size: int | None) -> None:
    limit = INT32_MAX + 1 if vocab_size is None else vocab_size
    if _largest(token_ids) < limit:
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


def _check_kv_lens(lens: np.ndarray, contexts: np.ndarray | None, longest: int) -> None:
    # No sum can overflow, by a bound that costs little; else the exact sums decide.
    if ((0 if contexts is None else _largest(contexts)) + longest) * lens.size <= INT32_MAX:
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


def _check_coverage(kv_lens: np.ndarray, counts: np.ndarray, page_size: int) -> None:
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


def _check_pages(
    pages: np.ndarray,
    counts: np.ndarray,
    contexts: np.ndarray | None,
    page_size: int,
    num_pages: int | None,
    share_prefixes: bool,
) -> None:
    # Slots are int32 and the largest one marks padding.
    limit = INT32_MAX // page_size
    if num_pages is not None:
        limit = min(num_pages, limit)
    highest = _largest(pages)
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


def _check_prefix_lm_lens(prefixes: np.ndarray, lens: np.ndarray, contexts: np.ndarray | None) -> None:
    room = lens if contexts is None else np.where(contexts > 0, contexts, lens)
    wrong = (prefixes < 0) | (prefixes > room)
    if wrong.any():
        i = int(wrong.argmax())
        context = 0 if contexts is None else contexts[i]
        raise ValueError(
            f"prefix_lm_lens[{i}]={prefixes[i]} must lie between 0 and {room[i]}: sequence {i} has {context} "
            f"tokens of context and {lens[i]} of query, and a prefix is prefilled in one step"
        )


def _check_state_slots(slots: np.ndarray) -> None:
    if (highest := _largest(slots)) >= PAD_SLOT:
        i = int(((slots < 0) | (slots >= PAD_SLOT)).argmax())
        raise ValueError(f"state_slots[{i}]={slots[i]} must lie between 0 and {PAD_SLOT - 1}")
    if not _all_distinct(slots, highest):
        slot = next(slot for slot in slots if np.count_nonzero(slots == slot) > 1)
        raise ValueError(f"state_slots names slot {slot} twice; every sequence needs a state of its own")
