"""The folder in which the programs that tests compile are kept from one run to the next.

Most of the suite's time would go into compiling what was compiled yesterday. A program is found again by all
that went into it: its code after lowering, the versions of JAX and of its compiler, flags, the processor. The
folder is `.jax_cache` of the checkout, or `$JAX_COMPILATION_CACHE_DIR`; `make clean` removes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = Path(__file__).parents[2] / ".jax_cache"
MIN_SECONDS = 0.05
"""What compiles faster than this is not worth a file."""
MAX_BYTES = 2 << 30
"""JAX's own bound (`jax_compilation_cache_max_size`) reads all files' times whenever it writes one."""


def keep() -> None:
    """Keep programs from now on, in this process and those that tests start."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(FOLDER))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(MIN_SECONDS))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs",
        float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
    )


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
    """Neither write programs nor read them meanwhile."""
    before = jax.config.jax_enable_compilation_cache
    _enable(False)
    try:
        yield
    finally:
        _enable(before)


def _enable(value: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", value)
    compilation_cache.reset_cache()  # whether it is used was decided once and for all otherwise


def remove_the_oldest(folder: Path = FOLDER, max_bytes: int = MAX_BYTES) -> None:
    """Remove the programs that were not read for longest until the others take no more than so much."""
    files = [(file, file.stat()) for file in folder.glob("*-cache")]
    size = sum(stat.st_size for _, stat in files)
    for file, stat in sorted(files, key=lambda pair: pair[1].st_atime):
        if size <= max_bytes:
            return
        file.unlink(missing_ok=True)
        size -= stat.st_size
