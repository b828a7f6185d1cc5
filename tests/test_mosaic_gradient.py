"""The Mosaic GPU kernels of the gradient in the simulator of the GPU, its race detector always on.

What only the hardware refuses is tested in `compile/test_mosaic_gradient_sass.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Problem
from simulator import SIMULATED, SMALL, inputs, layer, sinks_of
from tolerances import assert_as_good_as

from jaxattn import AttentionSpec, Bucket, attention, gradients, mosaic_gradient, xla
from jaxattn.cases import ODD, Workload

pytestmark = pytest.mark.usefixtures("no_races")


def gradients_by(attend: Any, spec: AttentionSpec):
    """A program: the gradients of queries, keys, values and sinks."""

    def go_back(q, k, v, metadata, d_out, d_lse):
        sinks = sinks_of(spec)
        _, back = jax.vjp(lambda *args: attend(*args[:3], metadata, args[3]), q, k, v, sinks)
        return [x for x in back((d_out.astype(q.dtype), d_lse)) if x is not None]

    return jax.jit(go_back)


@functools.lru_cache(maxsize=4)
def simulated(spec: AttentionSpec):
    """With the forward pass of XLA."""
    backward = functools.partial(mosaic_gradient.attend_backward, interpret=SIMULATED)
    return gradients_by(
        lambda q, k, v, metadata, sinks: gradients.attend(
            xla.attend, backward, spec, q, k, v, metadata, sinks, None
        ),
        spec,
    )


@functools.lru_cache(maxsize=8)
def plain(spec: AttentionSpec, implementation: str = "reference"):
    return gradients_by(
        lambda q, k, v, metadata, sinks: attention(
            q, k, v, metadata, spec, sinks=sinks, return_lse=True, implementation=implementation
        ),
        spec,
    )


def draw(workload: Workload, spec: AttentionSpec, page_size: int | None, dtype: str, bucket: Bucket):
    """Queries, keys, values, metadata, and gradients of the results; what belongs to nobody is NaN."""
    problem = Problem.draw(workload, spec)
    readers = ("reference", "xla", "mosaic_gradient")
    q, k, v, metadata = inputs(problem, spec, page_size, dtype, bucket, readers=readers)
    rng, num_tokens = np.random.default_rng(9), sum(workload.q_lens)
    d_out, d_lse = (rng.standard_normal(x).astype(np.float32) for x in (q.shape, q.shape[:2]))
    d_out[num_tokens:] = d_lse[num_tokens:] = np.nan
    return q, k, v, metadata, jnp.asarray(d_out, dtype), jnp.asarray(d_lse)


def check(
    workload: Workload,
    spec: AttentionSpec,
    page_size: int | None,
    dtype: str = "bfloat16",
    bucket: Bucket = SMALL,
) -> None:
    """As precise as the definition on numbers of that type, and exactly 0 wherever the gradient is."""
    q, k, v, metadata, d_out, d_lse = draw(workload, spec, page_size, dtype, bucket)

    def found(program, dtype=dtype):
        arrays = (x.astype(dtype) for x in (q, k, v))
        return [np.asarray(x, np.float64) for x in program(*arrays, metadata, d_out, d_lse)]

    got, rounded = found(simulated(spec)), found(plain(spec))
    with jax.enable_x64(True):
        exact = [
            np.asarray(x, np.float64)
            for x in plain(dataclasses.replace(spec))(
                *(x.astype("float64") for x in (q, k, v)), metadata, d_out, d_lse.astype("float64")
            )
        ]
    for g, p, e in zip(got, rounded, exact, strict=True):
        assert_as_good_as(g, p, e, jnp.dtype(dtype))
        np.testing.assert_array_equal(g[e == 0], 0)


LAYERS = {
    "mha, sinks": (layer(2, 2, sinks=True), 16, "bfloat16"),
    "two heads per group, window and cap, small pages": (
        layer(2, 1, sliding_window=7, logits_soft_cap=5.0),
        8,
        "float16",
    ),
    "four heads per group, window of several pages": (
        layer(4, 1, 128, sliding_window=40, sinks=True),
        64,
        "bfloat16",
    ),
    "eight heads per group, cap": (layer(8, 1, 80, logits_soft_cap=5.0), 16, "bfloat16"),
    "rows that no head fills, pages larger than a block": (layer(3, 1), 256, "float16"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_the_definition(name):
    check(ODD[3], *LAYERS[name])


def test_many_blocks():
    """More blocks than shared memory holds, of keys and of rows of queries."""
    check(Workload("long", (1, 130), (250, 180), ""), layer(2, 1, sliding_window=290), 16)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_keys(causal):
    check(ODD[0], layer(2, 1, causal=causal), None)
