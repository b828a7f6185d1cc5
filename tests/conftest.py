"""Strict settings for every test: no silent dtype or rank promotion."""

import os

# Each warpgroup that is simulated occupies a thread of XLA, whose pool is as large as the machine has
# cores: with fewer threads than warpgroups, a program may wait for one that never gets a thread.
os.environ.setdefault("NPROC", "8")

import hypothesis
import jax
import pytest
from effort import EXAMPLES

# A program is compiled for a few small runs: most of the compiler's time would go into speed that no test
# needs. `make test-slow` compiles as users do, and so does what compiles for a GPU (compile/deviceless.py).
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# How long an example takes says nothing of its correctness: machines are noisy, and some compile.
hypothesis.settings.register_profile(
    "jaxattn", max_examples=EXAMPLES, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("jaxattn")


@pytest.fixture
def no_races(capsys):
    """The simulator of GPUs reported no race (see `simulator.py`)."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out
