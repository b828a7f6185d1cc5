"""Times of programs, on the host's clock and on a device's that is made up."""

import jax
import jax.numpy as jnp
import pytest

from jaxattn.measuring import timing


@pytest.mark.smoke
def test_the_host_clock_where_there_is_no_gpu():
    measured = timing.measure(lambda x: jnp.cumsum(x), jnp.ones(100_000), repeats=3)
    assert measured.clock == "host"
    assert len(measured.samples_s) == 3
    assert min(measured.samples_s) > 0
    assert measured.median_s == sorted(measured.samples_s)[1]


@pytest.mark.smoke
def test_a_program_is_traced_once():
    """So compiling, which comes with it, is no part of any sample but the first run, which is not timed."""
    traced = []

    def program(x):
        traced.append(x)
        return x + 1

    assert len(timing.measure(program, jnp.ones(3), repeats=2).samples_s) == 2
    assert len(traced) == 1


def test_a_compiled_program_is_not_compiled_again(monkeypatch):
    program = jax.jit(lambda x: x + 1)
    monkeypatch.setattr(jax, "jit", None)
    assert timing.measure(program, jnp.ones(3), repeats=1).clock == "host"


def test_the_device_clock_where_there_is_a_gpu(monkeypatch):
    profiler = pytest.importorskip("jax.experimental.mosaic.gpu.profiler")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(profiler, "measure", lambda f, iterations: lambda *args: (f(*args), [3.0, 1.0, 2.0]))
    measured = timing.measure(lambda x: x + 1, jnp.ones(3), repeats=3)
    assert measured == timing.Measured(2e-3, (3e-3, 1e-3, 2e-3), "device")


def test_without_cupti_the_host_clock_is_read(monkeypatch):
    profiler = pytest.importorskip("jax.experimental.mosaic.gpu.profiler")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def refuse(f, iterations):
        raise RuntimeError("another profiler has subscribed")

    monkeypatch.setattr(profiler, "measure", refuse)
    with pytest.warns(UserWarning, match="the host's is read: another profiler"):
        assert timing.measure(lambda x: x + 1, jnp.ones(3)).clock == "host"


@pytest.mark.smoke
def test_repeats():
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        timing.measure(lambda x: x, 1, repeats=0)
