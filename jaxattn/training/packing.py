"""Packing: documents of different lengths into training batches of one bucket, few tokens of them padding.

    documents -- pack_best_fit, or pack_first_fit_decreasing --> packs -- nest_batches --> RaggedBatch

A pack is a list of whole documents that fit one bucket, whose `tokens` and `seqs` no pack exceeds; what
is longer than the bucket's `max_q_len` is refused, cut or left out, as the caller says. One bucket is one
compiled program. Everything here is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxattn.batch.bucket import Bucket
from jaxattn.batch.nest import nest_sequences
from jaxattn.batch.ragged import RaggedBatch

TOO_LONG = ("raise", "split", "drop")


def pack_first_fit_decreasing(lengths: Sequence[int] | np.ndarray, bucket: Bucket) -> list[np.ndarray]:
    """Pack documents of known lengths: longest first, each into the first pack that has room for it.

    O(n log n) for n documents. Where `bucket.seqs` does not bind, there are at most 11/9 · OPT + 2/3 packs,
    OPT being the fewest possible. The first packs hold the longest documents: train on them in random order.

    Args:
        lengths: Tokens of each document, at least 1 and at most `bucket.max_q_len`.
        bucket: What a pack has to fit.

    Returns:
        The packs, each an array of places in `lengths`, in order of falling length. Every document stands
        in exactly one.

    Raises:
        ValueError: If a document is empty or too long; `fit_documents` cuts or drops long ones.
        TypeError: If lengths are not integers.

    References:
        Dósa, "The tight bound of first fit decreasing bin-packing algorithm is
        FFD(I) ≤ 11/9 OPT(I) + 6/9", 2007.
    """
    lengths = _checked_lengths(lengths, bucket)
    # A segment tree. Leaf `num_leaves + p` is the room of pack p, and of every node above that of the
    # roomiest pack below it. There is a pack for each document, so that one always has room.
    num_leaves = 1 << max(lengths.size - 1, 0).bit_length()
    room = [bucket.tokens] * (2 * num_leaves)
    packs: list[list[int]] = []
    order = np.argsort(-lengths, kind="stable")
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        node = 1
        while node < num_leaves:
            node *= 2
            node += room[node] < length
        if node - num_leaves == len(packs):
            packs.append([])
        pack = packs[node - num_leaves]
        pack.append(i)
        room[node] = room[node] - length if len(pack) < bucket.seqs else 0
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [np.array(pack) for pack in packs]


def pack_best_fit(
    documents: Iterable[Any], bucket: Bucket, *, max_open: int = 16, too_long: str = "raise"
) -> Iterator[list[Any]]:
    """Pack a stream of documents: each into the open pack that it leaves the least room in.

    A pack is given out once it is full. A document that fits no open pack opens one; if `max_open` are open
    already, the fullest is given out first. At the end come the open ones, the oldest first. So no more
    than `max_open` packs, and the document at hand, are held at a time. `max_open=1` is next-fit.

    n documents of S tokens make fewer than 2 · S / tokens + n / seqs + max_open packs.

    Args:
        documents: Token ids of each document: lists or 1-D integer arrays. The stream may be endless.
        bucket: What a pack has to fit.
        max_open: How many packs are open at most.
        too_long: What is done with documents of more than `bucket.max_q_len` tokens; see `fit_documents`.

    Returns:
        The packs, each a list of documents in their order of arrival.

    Raises:
        ValueError: If `max_open` or `too_long` cannot be; while iterating, as `fit_documents` does.

    References:
        Csirik and Johnson, "Bounded space on-line bin packing: best is better than first", 2001.
    """
    if max_open < 1:
        raise ValueError(f"max_open={max_open} must be at least 1")
    return _best_fit(fit_documents(documents, bucket, too_long=too_long), bucket, max_open)


def fit_documents(documents: Iterable[Any], bucket: Bucket, *, too_long: str = "raise") -> Iterator[Any]:
    """The documents, none of them longer than a sequence of the bucket may be.

    Args:
        documents: Token ids of each document.
        bucket: Its `max_q_len` is the limit.
        too_long: What is done with a longer document: "raise" an error, "split" it into documents of
            `max_q_len` tokens and a shorter one, which do not see each other, or "drop" it.

    Raises:
        ValueError: If `too_long` is unknown; while iterating, if a document is empty, or too long and to be
            raised for.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"unknown too_long={too_long!r}; use {' or '.join(map(repr, TOO_LONG))}")
    return _fit(documents, bucket.max_q_len, too_long)


def nest_batches(packs: Iterable[Sequence[Any]], bucket: Bucket) -> Iterator[RaggedBatch]:
    """Nest each pack into a batch of the bucket, so that one compiled program serves all of them.

    Args:
        packs: Packs of documents, such as those of `pack_best_fit`, or `[documents[i] for i in pack]` for
            those of `pack_first_fit_decreasing`.
        bucket: The bucket that they were packed for.

    Raises:
        ValueError: While iterating, as `nest_sequences` does.
    """
    return (nest_sequences(pack, bucket=bucket) for pack in packs)


@dataclass(eq=False, slots=True)
class _OpenPack:
    """A pack that is being filled: its documents, and the tokens that it has room for."""

    room: int
    documents: list[Any] = field(default_factory=list)


def _best_fit(documents: Iterable[Any], bucket: Bucket, max_open: int) -> Iterator[list[Any]]:
    packs: list[_OpenPack] = []  # the oldest first, which wins where several leave the same room

    def close(pack: _OpenPack) -> list[Any]:
        packs.remove(pack)
        return pack.documents

    for document in documents:
        fitting = [pack for pack in packs if len(document) <= pack.room]
        if not fitting:
            if len(packs) == max_open:
                yield close(min(packs, key=lambda pack: pack.room))
            fitting = [_OpenPack(bucket.tokens)]
            packs += fitting
        best = min(fitting, key=lambda pack: pack.room)
        best.documents.append(document)
        best.room -= len(document)
        if best.room == 0 or len(best.documents) == bucket.seqs:
            yield close(best)
    while packs:
        yield close(packs[0])


def _fit(documents: Iterable[Any], limit: int, too_long: str) -> Iterator[Any]:
    for i, document in enumerate(documents):
        length = len(document)
        if length == 0:
            raise ValueError(f"documents[{i}] is empty; drop it")
        if length > limit and too_long == "raise":
            raise ValueError(
                f"documents[{i}] has {length} tokens, more than bucket.max_q_len={limit}; use a larger "
                "bucket, too_long='split' or too_long='drop'"
            )
        if length <= limit:
            yield document
        elif too_long == "split":
            yield from (document[start : start + limit] for start in range(0, length, limit))


def _checked_lengths(lengths: Sequence[int] | np.ndarray, bucket: Bucket) -> np.ndarray:
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(
            f"lengths has dtype {array.dtype} and shape {array.shape}; expected one integer per document"
        )
    if array.size and array.min() < 1:
        i = int(array.argmin())
        raise ValueError(f"lengths[{i}]={array[i]} must be at least 1; drop the document")
    if array.size and array.max() > bucket.max_q_len:
        i = int(array.argmax())
        raise ValueError(
            f"lengths[{i}]={array[i]} exceeds bucket.max_q_len={bucket.max_q_len}; use a larger bucket, or "
            "split or drop the document (fit_documents)"
        )
    return array.astype(np.int64)
