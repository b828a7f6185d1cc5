"""Traces: the sizes of batches that were really nested, as JSON Lines.

    with BatchLog("batches.jsonl") as log:
        serve(model, prompts, 64, num_pages=512, log=log)
    trace = read_trace("batches.jsonl")

A line is an object with the sizes of a batch and of the bucket that it was padded to:

    {"tokens": 37, "seqs": 5, "pages": 12, "max_q_len": 20, "bucket": [48, 32, 16, 48]}

The bucket's sizes have the same order. They are for people; `read_trace` reads the batch, and needs no
bucket, so that a trace may come from anywhere. Files can be joined by `cat`.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from jaxattn.batch.bucket import Bucket


class BatchSizes(NamedTuple):
    """The sizes of one batch.

    Attributes:
        tokens: Query tokens.
        seqs: Sequences.
        pages: Entries of the page list; 0 where keys are not paged.
        max_q_len: The longest query of one sequence, in tokens; 1 in a decode step.
    """

    tokens: int
    seqs: int
    pages: int
    max_q_len: int


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The sizes of many batches, in the order in which they were nested.

    Attributes:
        sizes: `[n, 4]` int64: tokens, sequences, pages and the longest query of each batch.

    Raises:
        ValueError: If the shape is another, or a batch is impossible.
    """

    sizes: np.ndarray

    def __post_init__(self) -> None:
        sizes = np.asarray(self.sizes)
        if sizes.ndim != 2 or sizes.shape[1] != len(BatchSizes._fields) or sizes.dtype.kind not in "iu":
            raise ValueError(
                f"sizes has shape {sizes.shape} and dtype {sizes.dtype}; give integers, "
                f"{', '.join(BatchSizes._fields)} of each batch"
            )
        tokens, seqs, pages, longest = sizes.T
        bad = (seqs < 1) | (seqs > tokens) | (longest < 1) | (longest > tokens) | (pages < 0)
        if bad.any():
            i = int(bad.argmax())
            raise ValueError(f"batch {i} is impossible: {_complaint(BatchSizes(*sizes[i].tolist()))}")
        object.__setattr__(self, "sizes", sizes.astype(np.int64))

    @classmethod
    def of(cls, batches: Iterable[tuple[int, int, int, int]]) -> Trace:
        """The trace of some batches, each with its tokens, sequences, pages and longest query."""
        return cls(np.array(list(batches), np.int64).reshape(-1, len(BatchSizes._fields)))

    @property
    def tokens(self) -> np.ndarray:
        """Query tokens of each batch."""
        return self.sizes[:, 0]

    @property
    def seqs(self) -> np.ndarray:
        """Sequences of each batch."""
        return self.sizes[:, 1]

    @property
    def pages(self) -> np.ndarray:
        """Entries of the page list of each batch."""
        return self.sizes[:, 2]

    @property
    def max_q_len(self) -> np.ndarray:
        """The longest query of each batch, in tokens."""
        return self.sizes[:, 3]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[BatchSizes]:
        return (BatchSizes(*row) for row in self.sizes.tolist())

    def __getitem__(self, part: slice) -> Trace:
        return Trace(self.sizes[part])


class BatchLog:
    """A file to which nested batches are written, a line each. A context manager, or closed by `close`.

    Lines are added to a file that is there; half a line at its end, as a crash leaves it, is dropped first.
    They are written in blocks of 64 KiB, and may come from several threads.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        _drop_half_a_line(self.path)
        self._file = self.path.open("a", buffering=1 << 16, encoding="utf-8")

    def write(self, *, tokens: int, seqs: int, pages: int, max_q_len: int, bucket: Bucket) -> None:
        """Write a line; `nest_sequences` calls it.

        Raises:
            ValueError: If the log is closed.
        """
        line = (
            f'{{"tokens": {tokens}, "seqs": {seqs}, "pages": {pages}, "max_q_len": {max_q_len}, "bucket": '
            f"[{bucket.tokens}, {bucket.seqs}, {bucket.pages}, {bucket.max_q_len}]}}\n"
        )
        with self._lock:
            if self._file.closed:
                raise ValueError(f"the log {self.path} is closed; nest within its `with` block")
            self._file.write(line)

    def close(self) -> None:
        """Write what is held back, and close the file."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> BatchLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a log of batches.

    Args:
        path: The file; blank lines are passed over.

    Raises:
        ValueError: If a line is no batch, naming file, line and what is wrong, or there is none.
        OSError: If the file cannot be read.

    Warns:
        UserWarning: If the last line is cut off, as a crash leaves it; it is left out.
    """
    lines = Path(path).read_bytes().split(b"\n")
    batches = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            batches.append(_parse(line))
        except ValueError as error:
            if number == len(lines) and _is_cut_off(line):
                warnings.warn(f"{path}:{number}: the last line is cut off, and left out", stacklevel=2)
                continue
            raise ValueError(f"{path}:{number}: {error}") from None
    if not batches:
        raise ValueError(f"{path} holds no batch; log some by nest_sequences(..., log=BatchLog(path))")
    return Trace.of(batches)


def _parse(line: bytes) -> BatchSizes:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{line.decode(errors='replace').strip()[:40]} is no object; write one per batch")
    for name in BatchSizes._fields:
        if name not in found:
            raise ValueError(f"there is no {name!r}; a batch has {', '.join(BatchSizes._fields)}")
        if type(found[name]) is not int or abs(found[name]) >= 2**63:
            raise ValueError(f"{name}={found[name]!r} must be an integer")
    sizes = BatchSizes(*(found[name] for name in BatchSizes._fields))
    if complaint := _complaint(sizes):
        raise ValueError(complaint)
    return sizes


def _complaint(sizes: BatchSizes) -> str:
    """What is impossible about the sizes of a batch; empty if nothing is."""
    try:
        Bucket(sizes.tokens, sizes.seqs, sizes.pages, max_q_len=sizes.max_q_len)
    except ValueError as error:
        return str(error)
    return "" if sizes.max_q_len else "max_q_len=0 must be at least 1"


def _is_cut_off(line: bytes) -> bool:
    """Whether a line that has no end may be the beginning of one."""
    return line.lstrip().startswith(b"{") and not line.rstrip().endswith(b"}")


def _drop_half_a_line(path: Path) -> None:
    """Cut off what stands behind the last end of a line, unless it is a whole line without its end."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(size - 4096, 0)  # longer than any line
        file.seek(start)
        rest = file.read().rpartition(b"\n")[2]
        if rest and _is_cut_off(rest):
            file.truncate(size - len(rest))
        elif rest:
            file.write(b"\n")
