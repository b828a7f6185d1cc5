"""Time a program: by the device's own clock where there is one."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Measured(NamedTuple):
    """Times of one program.

    Attributes:
        median_s: Median of the samples, in seconds.
        samples_s: Every sample, in seconds.
        clock: "device", the sum of its kernels' own times; or "host", from the call to its result, which
            includes what it takes to launch.
    """

    median_s: float
    samples_s: tuple[float, ...]
    clock: str


def measure(program: Callable[..., Any], *args: Any, repeats: int = 10) -> Measured:
    """Run a program several times, warm, and time each run.

    On an NVIDIA GPU the kernels' times are those of CUPTI, whose gaps are left out; elsewhere, or where
    another profiler holds CUPTI, the host's clock is read around each run. Results of all runs are
    kept until the last ends.

    Args:
        program: A function, compiled by `jax.jit` if it is not yet.
        *args: Its arguments; none is donated.
        repeats: Runs.

    Raises:
        ValueError: If `repeats` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    if not isinstance(program, jax.stages.Wrapped):
        program = jax.jit(program)
    jax.block_until_ready(program(*args))
    samples = _device_times(program, args, repeats) if jax.default_backend() == "gpu" else None
    if samples is not None:
        return Measured(statistics.median(samples), samples, "device")
    samples = tuple(_host_time(program, args) for _ in range(repeats))
    return Measured(statistics.median(samples), samples, "host")


def _device_times(program: Callable[..., Any], args: tuple, repeats: int) -> tuple[float, ...] | None:
    """Seconds of each run by CUPTI, or None where it is not to be had."""
    # A part of JAX that is not imported without need: it loads the compiler of Mosaic.
    from jax.experimental.mosaic.gpu import profiler

    try:
        _, milliseconds = profiler.measure(program, iterations=repeats)(*args)
    except RuntimeError as error:
        warnings.warn(f"no device clock, the host's is read: {error}", stacklevel=3)
        return None
    if milliseconds is None:  # nothing ran on the device
        return None
    each = milliseconds if isinstance(milliseconds, list) else [milliseconds]  # of one run, a number
    return tuple(1e-3 * value for value in each)


def _host_time(program: Callable[..., Any], args: tuple) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - start
