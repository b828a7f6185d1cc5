"""JAX's persistent compilation cache, for a while in a folder of one's own, and what it found there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"


@contextlib.contextmanager
def compile_cache(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Keep every program that is compiled meanwhile in a folder, however fast it compiles.

    JAX's settings hold for the whole process; they are as before afterwards. None changes nothing.
    """
    wanted = {} if folder is None else {
        "jax_compilation_cache_dir": os.fspath(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }  # fmt: skip
    before = {name: getattr(jax.config, name) for name in wanted}
    _configure(before, wanted)
    try:
        yield
    finally:
        _configure(wanted, before)


def _configure(before: dict[str, Any], wanted: dict[str, Any]) -> None:
    if before == wanted:
        return
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it has opened its folder once and for all otherwise


@dataclass(slots=True)
class CacheCounts:
    """How often the persistent compilation cache was asked, and had a program.

    Attributes:
        requests: Programs that were looked for.
        hits: Those that were there.
    """

    requests: int = 0
    hits: int = 0

    @property
    def misses(self) -> int:
        """Programs that had to be compiled."""
        return self.requests - self.hits


@contextlib.contextmanager
def count_cache() -> Iterator[CacheCounts]:
    """Count what the persistent cache is asked for meanwhile, by whatever thread of this process."""
    counts = CacheCounts()

    def listen(event: str, **_: Any) -> None:
        counts.requests += event == _REQUEST
        counts.hits += event == _HIT

    jax.monitoring.register_event_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(listen)
