"""Compilations: count them, forbid them, and keep their results in a folder.

    with count_compiles() as compiles:
        run()
    compiles.names                       # ["jit(score)", …], one per program

    with forbid_compiles():              # whatever would compile here raises, before the compiler starts
        run()

    with compile_cache("path/to/folder"):  # programs are kept there, and found there by the next process
        run()

JAX tells of a compilation when it begins and when it ends (`jax.monitoring`), also of one whose result it
then finds in the persistent cache, and of the small programs that operations outside any `jax.jit` are.
Tracing and lowering come before; they are not counted, and `forbid_compiles` raises after them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_COMPILE = "/jax/core/compile/backend_compile_duration"
_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"

_forbidden: ContextVar[bool] = ContextVar("jaxattn_compiles_forbidden", default=False)


class CompilationForbiddenError(RuntimeError):
    """A program would have been compiled within `forbid_compiles`."""


@dataclass(slots=True)
class Compiles:
    """What was compiled while it was counted, by all threads of the process.

    Attributes:
        names: Of the programs, in the order in which they were ready, as JAX calls them: "jit(score)".
        seconds: Spent in the compiler, or reading what the persistent cache had; in several threads at once,
            the sum of theirs.
        cache_requests: How often the persistent cache was asked.
        cache_hits: How often it had the program, which was then read and not compiled.
    """

    names: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cache_requests: int = 0
    cache_hits: int = 0

    @property
    def count(self) -> int:
        """Programs made, those that the persistent cache had included."""
        return len(self.names)

    @property
    def cache_misses(self) -> int:
        """Programs that the persistent cache was asked for, and did not have."""
        return self.cache_requests - self.cache_hits


@contextlib.contextmanager
def count_compiles() -> Iterator[Compiles]:
    """Count what is compiled meanwhile, by whatever thread of this process. May be nested."""
    compiles, lock = Compiles(), threading.Lock()

    def on_event(event: str, **_: Any) -> None:
        with lock:
            compiles.cache_requests += event == _REQUEST
            compiles.cache_hits += event == _HIT

    def on_duration(event: str, duration_secs: float, **of: Any) -> None:
        if event == _COMPILE:
            with lock:
                compiles.names.append(str(of.get("fun_name")))
                compiles.seconds += duration_secs

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_listener(on_event)
        jax.monitoring.unregister_event_duration_listener(on_duration)


@contextlib.contextmanager
def forbid_compiles() -> Iterator[None]:
    """Raise where a program would be compiled: nobody then waits for a compiler unawares. May be nested.

    It holds for the thread (or asynchronous task) that enters it, so that others may go on compiling. A
    program that the persistent cache has is refused as well: this process has not read it yet. `warmup`
    compiles beforehand what serving and generating need.

    Raises:
        CompilationForbiddenError: At the compilation, naming the function; its compiler has not started.
    """

    def on_start(event: str, value: float, **of: Any) -> None:
        if event == _COMPILE and _forbidden.get():
            raise CompilationForbiddenError(
                f"{of.get('fun_name')} would be compiled, which forbid_compiles() forbids; compile it "
                f"before, for instance by warmup(model, buckets), or find out why its shapes are new"
            )

    before = _forbidden.set(True)
    jax.monitoring.register_scalar_listener(on_start)
    try:
        yield
    finally:
        jax.monitoring.unregister_scalar_listener(on_start)
        _forbidden.reset(before)


@contextlib.contextmanager
def compile_cache(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Keep every program that is compiled meanwhile in a folder, however fast it compiles.

    A program that the folder has already is read, not compiled. The folder may be shared by processes, and is
    made if there is none; programs are found again by the same versions of JAX on the same kind of device.
    For a whole process, JAX's own setting does the same: `JAX_COMPILATION_CACHE_DIR`, with
    `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0`.

    JAX has one such setting for all threads; it is as before when the last thread has left. Threads with the
    same folder go on side by side. One with another folder waits until they have left: do not wait for such a
    thread in here. What a thread without a folder compiles meanwhile is kept too. Of nested folders the
    innermost counts.

    Args:
        folder: The folder; None changes nothing.
    """
    if folder is None:
        yield
        return
    entry = [os.fspath(folder)]
    _thread.entries.append(entry)
    try:
        _thread.follow()
        yield
    finally:
        # By identity: asynchronous tasks of one thread need not leave in the order in which they entered.
        _thread.entries = [other for other in _thread.entries if other is not entry]
        _thread.follow()


class _CacheSetting:
    """JAX's setting of the persistent cache, which threads with different folders have in turn."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._folder: str | None = None
        self._num_threads = 0
        self._before: dict[str, Any] = {}

    def join(self, folder: str) -> None:
        """Wait until no thread has another folder, and keep programs in this one from then on."""
        with self._turn:
            self._turn.wait_for(lambda: self._num_threads == 0 or self._folder == folder)
            if self._num_threads == 0:
                self._folder = folder
                self._before = _configure(
                    {
                        "jax_compilation_cache_dir": folder,
                        "jax_persistent_cache_min_compile_time_secs": 0.0,
                        "jax_persistent_cache_min_entry_size_bytes": -1,
                    }
                )
            self._num_threads += 1

    def leave(self) -> None:
        """Put the process's own setting back when no thread has this folder any more, for others to join."""
        with self._turn:
            self._num_threads -= 1
            if self._num_threads == 0:
                _configure(self._before)
                self._turn.notify_all()


class _ThreadFolders(threading.local):
    """The folders that a thread has entered; it has a part in the turn of the innermost alone.

    So no thread waits for its turn while others wait for it to leave.
    """

    def __init__(self) -> None:
        self.entries: list[list[str]] = []
        self._joined: str | None = None

    def follow(self) -> None:
        """Join the innermost folder, after leaving the one that was joined."""
        innermost = self.entries[-1][0] if self.entries else None
        if self._joined == innermost:
            return
        if self._joined is not None:
            self._joined = None
            _setting.leave()
        if innermost is not None:
            _setting.join(innermost)
            self._joined = innermost


_setting, _thread = _CacheSetting(), _ThreadFolders()


def _configure(wanted: dict[str, Any]) -> dict[str, Any]:
    """Set what is wanted of JAX, and return what was set before."""
    before = {name: getattr(jax.config, name) for name in wanted}
    if before != wanted:
        for name, value in wanted.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it has opened its folder once and for all otherwise
    return before
