"""Strict settings for every test: no silent dtype or rank promotion; compiled programs are kept."""

import os

# Each warpgroup that is simulated occupies a thread of XLA, whose pool is as large as the machine has
# cores: with fewer threads than warpgroups, a program may wait for one that never gets a thread.
os.environ.setdefault("NPROC", "8")

from pathlib import Path

import compiled_programs
import effort
import hypothesis
import jax
import pytest

# A program is compiled for a few small runs: most of the compiler's time would go into speed that no test
# needs. `make test-slow` compiles as users do, and so does what compiles for a GPU (compile/deviceless.py).
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
compiled_programs.keep()

# How long an example takes says nothing of its correctness: machines are noisy, and some compile.
hypothesis.settings.register_profile(
    "jaxattn",
    max_examples=effort.EXAMPLES,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxattn")


MEMORY_MAPS = Path("/proc/self/maps")
MAX_MEMORY_MAPS = 30_000
"""Every compiled program takes some; Linux gives a process 65,530, and XLA crashes when it gets no more."""


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let go of the programs of a file's tests before there are too many."""
    yield
    if MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > MAX_MEMORY_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def keep_no_programs_of_the_simulator(request):
    """A file marked `simulator` compiles anew: jaxlib once crashed there, in a thread, with the cache on."""
    if request.node.get_closest_marker("simulator") is None:
        yield
    else:
        with compiled_programs.not_kept():
            yield


@pytest.hookimpl(tryfirst=True)  # before `-m` takes its choice
def pytest_collection_modifyitems(config, items):
    """Mark what an everyday run leaves out as slow, and drop what another shard has."""
    effort.mark_slow(items)
    dropped = set(effort.of_other_shards(items))
    config.hook.pytest_deselected(items=[*dropped])
    items[:] = [item for item in items if item not in dropped]


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # once per run
        compiled_programs.remove_the_oldest()


def pytest_report_header():
    part, parts = effort.SHARD
    return f"rotation {effort.ROTATION or 'none'}, part {part} of {parts}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and effort.SHARD[1] > 1:
        session.exitstatus = pytest.ExitCode.OK  # a small part of few tests may be none


@pytest.fixture
def no_races(capsys):
    """The simulator of GPUs reported no race (see `simulator.py`)."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out
