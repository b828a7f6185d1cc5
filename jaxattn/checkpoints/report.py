"""What loading a model took, and a bar on the terminal while it takes long."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

_STATUS = Path("/proc/self/status")
_SHOWN_AFTER = 1.0
"""Seconds before there is a bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What loading a model took.

    Attributes:
        format: Of the weights: "safetensors", "msgpack" or "orbax".
        seconds: From beginning to end.
        reading_seconds: Reading and converting weights.
        compiling_seconds: Compiling programs; with compile="overlap", during that.
        bytes_read: Of the leaves that were read, as they are stored.
        result_bytes: Of the parameters.
        num_params: Numbers in them.
        peak_host_bytes: The most memory that the process had resident, beyond what it had before. It counts
            pages of mapped files, and on a CPU the result. None where the system does not tell, or the
            process had more at some time before.
        programs: Names of the compiled programs.
        cache_hits: Programs, also those that convert, that JAX's persistent compilation cache had. Those of
            other threads of the process are counted too.
        cache_misses: Those that it was asked for, and did not have.
    """

    format: str
    seconds: float
    reading_seconds: float
    compiling_seconds: float
    bytes_read: int
    result_bytes: int
    num_params: int
    peak_host_bytes: int | None
    programs: tuple[str, ...]
    cache_hits: int
    cache_misses: int


class HostMemory:
    """The memory of this process, watched from now on."""

    def __init__(self) -> None:
        self._resident, self._peak = _memory()

    def extra(self) -> int | None:
        """The most that was resident since then beyond what was then; None where that is not known."""
        _, peak = _memory()
        if self._resident is None or self._peak is None or peak is None or peak <= self._peak:
            return None
        return peak - self._resident


def _memory() -> tuple[int | None, int | None]:
    """Bytes resident now, and the most there ever were."""
    if not _STATUS.exists():
        return None, None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
    resident, most = (lines.get(name) for name in ("VmRSS", "VmHWM"))
    if resident is None or most is None:  # as in some sandboxes
        return None, None
    return 1024 * int(resident.split()[0]), 1024 * int(most.split()[0])


@contextlib.contextmanager
def reading_bar(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes that have been read; a bar shows them after a while.

    There is none where standard error is no terminal.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("reading weights", total=num_bytes)
    timer = threading.Timer(_SHOWN_AFTER, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda read: bar.advance(task, read)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
