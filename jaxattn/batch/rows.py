"""Rows of different lengths, given as lists, arrays or flat values: read as arrays of integers."""

from __future__ import annotations

import array
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxattn.batch.ragged import INT32_MAX

INT64_MAX = int(np.iinfo(np.int64).max)


@functools.lru_cache(maxsize=1024)
def row_numbers(n: int) -> np.ndarray:
    """The numbers 0 to n - 1. Cached, since every step asks for them."""
    return np.arange(n, dtype=np.int32)


_UNSIGNED = {np.dtype(np.int32): np.dtype(np.uint32), np.dtype(np.int64): np.dtype(np.uint64)}


def largest(values: np.ndarray) -> int:
    """The largest value, where a negative one counts as larger than all others."""
    return int(np.maximum.reduce(values.view(_UNSIGNED[values.dtype]))) if values.size else 0


def integers(name: str, values: Any) -> np.ndarray:
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


def per_sequence(name: str, values: Any, n: int) -> np.ndarray:
    """`values` as an array of integers, one per sequence."""
    found = integers(name, values)
    if found.size != n:
        raise ValueError(f"{name} has {found.size} entries for {n} sequences")
    return found


def flatten_rows(name: str, rows: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate rows of different lengths; returns the values and the length of each row."""
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        return integers(name, rows.reshape(-1)), np.full(rows.shape[0], rows.shape[1], np.int64)
    try:
        lens = np.fromiter(map(len, rows), np.int64, len(rows))
    except TypeError:
        raise TypeError(f"{name} must hold one list or 1-D array per sequence") from None
    filled = [row for row in rows if len(row)]  # an empty list would be an array of floats
    if all(isinstance(row, list) for row in filled):
        return _flatten_lists(name, filled), lens
    arrays = [integers(f"{name}[{i}]", row) for i, row in enumerate(rows) if len(row)]
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
        return integers(name, np.array(list(itertools.chain.from_iterable(rows))))
    return np.frombuffer(values, np.int64)


class Rows(NamedTuple):
    """Rows of different lengths: their values one after the other, and where each row ends."""

    flat: np.ndarray
    lens: np.ndarray
    ends: np.ndarray
    shortest: int
    longest: int


def rows_of(name: str, rows: Any, lens_name: str, lens: Any) -> Rows:
    """Rows of a batch, from one list or array each, or from flat values with lengths."""
    if lens is None:
        if isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype != object:
            raise ValueError(f"{name} is one flat array; give the length of each sequence as {lens_name}")
        flat, lens = flatten_rows(name, rows)
    else:
        flat, lens = integers(name, rows), integers(lens_name, lens)
    if lens.size == 0:
        raise ValueError(f"{name} is empty; a batch needs at least one sequence")
    shortest, longest = int(np.minimum.reduce(lens)), int(np.maximum.reduce(lens))
    if shortest < 0:
        i = int(lens.argmin())
        raise ValueError(f"{name}[{i}] has length {lens[i]}; {lens_name} must not be negative")
    if shortest == longest == 1:
        ends = row_numbers(lens.size + 1)[1:]  # a sum takes longer, and every decode step comes here
    else:
        ends = np.add.accumulate(lens, dtype=np.int64)
    # A sum that wraps around may be right by chance: no length may exceed the whole.
    if longest > flat.size or ends[-1] != flat.size:
        raise ValueError(f"{lens_name} sum to {sum(lens.tolist())}, but {name} holds {flat.size} entries")
    return Rows(flat, lens, ends, shortest, longest)


_UNPAGED = Rows(*(np.empty(0, np.int32),) * 3, shortest=0, longest=0)


def page_rows(
    page_tables: Any, page_counts: Any, page_size: int | None, contexts: np.ndarray | None, n: int
) -> Rows:
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
    pages = rows_of("page_tables", page_tables, "page_counts", page_counts)
    if pages.lens.size != n:
        raise ValueError(f"page_tables has {pages.lens.size} rows for {n} sequences")
    return pages
