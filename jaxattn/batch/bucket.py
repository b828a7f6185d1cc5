"""Static shapes: a batch is padded to the smallest bucket of a grid, or of a plan, that holds it."""

from __future__ import annotations

import bisect
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The static sizes of a batch. Everything that is compiled is compiled once per bucket.

    Attributes:
        tokens: Query tokens, T.
        seqs: Sequences, R.
        pages: Entries of the page list, over all sequences; 0 where keys are not paged.
        max_q_len: The longest query of one sequence, in tokens. A decode bucket promises 1, and
            so holds no schedule for longer queries.

    Raises:
        ValueError: If a size is out of range.
    """

    tokens: int
    seqs: int
    pages: int = 0
    max_q_len: int = 0  # 0 stands for `tokens`, and is replaced by it

    def __post_init__(self) -> None:
        if self.max_q_len == 0:
            object.__setattr__(self, "max_q_len", self.tokens)
        if not 1 <= self.seqs <= self.tokens:
            raise ValueError(f"seqs={self.seqs} must lie between 1 and tokens={self.tokens}")
        if not 1 <= self.max_q_len <= self.tokens:
            raise ValueError(f"max_q_len={self.max_q_len} must lie between 1 and tokens={self.tokens}")
        if self.pages < 0:
            raise ValueError(f"pages={self.pages} must not be negative")

    def decode(self, seqs: int | None = None) -> Bucket:
        """The bucket of a step in which each of `seqs` sequences (default: all) adds one token."""
        seqs = self.seqs if seqs is None else seqs
        return Bucket(tokens=seqs, seqs=seqs, pages=self.pages, max_q_len=1)

    def max_keys(self, page_size: int | None) -> int:
        """The most keys that all sequences have together, in pages or packed beside their queries."""
        return self.tokens if page_size is None else self.pages * page_size

    def require(self, *, tokens: int, seqs: int, pages: int, max_q_len: int) -> None:
        """Check that a batch of these sizes fits.

        Raises:
            ValueError: Naming each size that is too large, with its limit.
        """
        if (
            tokens <= self.tokens
            and seqs <= self.seqs
            and pages <= self.pages
            and max_q_len <= self.max_q_len
        ):
            return
        sizes = {"tokens": tokens, "seqs": seqs, "pages": pages, "max_q_len": max_q_len}
        over = [
            f"{n}={v} exceeds bucket.{n}={getattr(self, n)}" for n, v in sizes.items() if v > getattr(self, n)
        ]
        raise ValueError("the batch does not fit: " + "; ".join(over) + ". Use a larger bucket or split it")

    def _repr_html_(self) -> str:
        from jaxattn.viz.cards import bucket_card  # when looked at

        return bucket_card(self)


def quarter_steps(smallest: int, largest: int) -> tuple[int, ...]:
    """Sizes 1, 1.25, 1.5, 1.75 times each power of two, from `smallest` to `largest` inclusive.

    From `smallest` on, padding is at most a quarter of the real size, 8 % of the padded one on average;
    smaller batches are padded to `smallest`.

    Raises:
        ValueError: If not 1 <= smallest <= largest.
    """
    if not 1 <= smallest <= largest:
        raise ValueError(f"smallest={smallest} and largest={largest} must satisfy 1 <= smallest <= largest")
    sizes = {largest}
    octave = 1
    while octave <= largest:
        steps = (octave * quarters // 4 for quarters in (4, 5, 6, 7) if octave * quarters % 4 == 0)
        sizes.update(n for n in steps if smallest <= n <= largest)
        octave *= 2
    return tuple(sorted(sizes))


def powers_of_two(smallest: int, largest: int) -> tuple[int, ...]:
    """The powers of two from `smallest` to `largest`, and `largest` itself."""
    sizes = {largest} | {1 << i for i in range(largest.bit_length())}
    return tuple(sorted(n for n in sizes if smallest <= n <= largest))


@dataclass(frozen=True, slots=True)
class BucketGrid:
    """The sizes that batches are padded to.

    The sequence axis follows the token axis, `seqs = min(tokens, max_seqs)`, since two free axes
    would multiply the number of programs; its arrays are small. Pages are bucketed by their
    total, in powers of two: they pad a list of indices, and no work.

    Attributes:
        tokens: Ascending sizes of the token axis; quarter steps by default.
        pages: Ascending sizes of the page list.
        max_seqs: The largest number of sequences.
    """

    tokens: tuple[int, ...] = field(default_factory=lambda: quarter_steps(16, 32768))
    pages: tuple[int, ...] = field(default_factory=lambda: powers_of_two(16, 1 << 20))
    max_seqs: int = 1024

    def __post_init__(self) -> None:
        for name in ("tokens", "pages"):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ValueError(f"{name}={sizes} must be ascending, distinct and positive")
        if self.max_seqs < 1:
            raise ValueError(f"max_seqs={self.max_seqs} must be at least 1")

    def holds(self, *, tokens: int, seqs: int, pages: int = 0, max_q_len: int = 0) -> bool:
        """Whether a bucket is large enough for a batch of so many tokens, sequences and pages."""
        return max(tokens, seqs) <= self.tokens[-1] and seqs <= self.max_seqs and pages <= self.pages[-1]

    def pick(self, *, tokens: int, seqs: int, pages: int = 0, max_q_len: int = 0) -> Bucket:
        """The smallest bucket that holds a batch.

        Args:
            tokens: Query tokens of the batch.
            seqs: Its sequences.
            pages: Its page list's length; 0 where keys are not paged.
            max_q_len: Its longest query, in tokens, or 0 if that is to make no difference; 1 gives a decode
                bucket.

        Raises:
            ValueError: If no bucket of the grid is large enough, naming the limit and the value.
        """
        if seqs > self.max_seqs:
            raise ValueError(
                f"seqs={seqs} exceeds the grid's max_seqs={self.max_seqs}; raise it or split the batch"
            )
        # Every sequence has a token, so `seqs <= tokens` and the derived axis is wide enough.
        t = _round_up("tokens", max(tokens, seqs), self.tokens)
        p = _round_up("pages", pages, self.pages) if pages else 0
        bucket = _made_once(t, min(t, self.max_seqs), p)
        return bucket.decode() if max_q_len == 1 else bucket

    def _repr_html_(self) -> str:
        from jaxattn.viz.cards import grid_card  # when looked at

        return grid_card(self)


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """Buckets chosen one by one, such as `plan_buckets` fits to a trace. Used like a `BucketGrid`.

    Attributes:
        buckets: In the order in which they are tried, the cheapest first: a batch goes to the first that
            holds it.

    Raises:
        ValueError: If there is none, or one stands there twice.
    """

    buckets: tuple[Bucket, ...]

    def __post_init__(self) -> None:
        if not self.buckets or len(set(self.buckets)) < len(self.buckets):
            raise ValueError(f"buckets={self.buckets} must be one bucket at least, and no bucket twice")

    def holds(self, *, tokens: int, seqs: int, pages: int = 0, max_q_len: int = 0) -> bool:
        """Whether a bucket is large enough for a batch of such sizes; `max_q_len` 0: it is not known."""
        return self._first(tokens, seqs, pages, max_q_len or tokens) is not None

    def pick(self, *, tokens: int, seqs: int, pages: int = 0, max_q_len: int = 0) -> Bucket:
        """The first bucket that holds a batch.

        Args:
            tokens: Query tokens of the batch.
            seqs: Its sequences.
            pages: Its page list's length; 0 where keys are not paged.
            max_q_len: Its longest query, in tokens; 0 if it is not known, and then decode buckets are passed
                over.

        Raises:
            ValueError: If no bucket is large enough.
        """
        max_q_len = max_q_len or tokens
        bucket = self._first(tokens, seqs, pages, max_q_len)
        if bucket is None:
            raise ValueError(
                f"no bucket of the plan holds {tokens=}, {seqs=}, {pages=}, {max_q_len=}; the largest is "
                f"{max(self.buckets)}. Plan with limits= for the largest batch that can come, or split it"
            )
        return bucket

    def _first(self, tokens: int, seqs: int, pages: int, max_q_len: int) -> Bucket | None:
        for bucket in self.buckets:  # written out: every step comes here
            if (
                tokens <= bucket.tokens
                and seqs <= bucket.seqs
                and pages <= bucket.pages
                and max_q_len <= bucket.max_q_len
            ):
                return bucket
        return None

    def _repr_html_(self) -> str:
        from jaxattn.viz.cards import plan_card  # when looked at

        return plan_card(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file, which is replaced if there is one."""
        buckets = [dict(zip(_SIZES, astuple(bucket), strict=True)) for bucket in self.buckets]
        lines = ",\n  ".join(map(json.dumps, buckets))
        Path(path).write_text(f'{{"jaxattn_buckets": 1, "buckets": [\n  {lines}\n]}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BucketPlan:
        """Read a plan that `save` wrote.

        Raises:
            ValueError: If the file holds no plan, naming it and what is wrong.
            OSError: If it cannot be read.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["jaxattn_buckets"] != 1:
                raise ValueError(f"jaxattn_buckets={found['jaxattn_buckets']!r} must be 1")
            return cls(tuple(_bucket_from_json(sizes) for sizes in found["buckets"]))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} holds no plan of buckets: {reason}; write it by BucketPlan.save"
            ) from None


type Buckets = BucketGrid | BucketPlan
"""Where batches find their buckets."""

_SIZES = ("tokens", "seqs", "pages", "max_q_len")


def _bucket_from_json(sizes: Any) -> Bucket:
    for name in _SIZES:
        if type(sizes[name]) is not int:
            raise ValueError(f"{name}={sizes[name]!r} must be an integer")
    return Bucket(**sizes)


@functools.lru_cache(maxsize=1024)
def _made_once(tokens: int, seqs: int, pages: int) -> Bucket:
    """A bucket of a grid; kept, since every step asks for one, and making one takes longer."""
    return Bucket(tokens, seqs, pages)


def _round_up(name: str, value: int, sizes: Sequence[int]) -> int:
    i = bisect.bisect_left(sizes, value)
    if i == len(sizes):
        raise ValueError(
            f"{name}={value} exceeds the grid's largest size {sizes[-1]}; extend it or split the batch"
        )
    return sizes[i]
