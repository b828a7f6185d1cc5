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
from simulator import (
    LAYERS,
    REPORTED,
    SIMULATED,
    SMALL,
    count_kernels,
    forget_to_call,
    forget_to_wait,
    inputs,
    layer,
    races,
    release_too_early,
    sinks_of,
)
from tolerances import assert_as_good_as

from jaxattn import AttentionSpec, Bucket, attention
from jaxattn.attention import mosaic_gradient, xla
from jaxattn.attention import vjp as gradients
from jaxattn.attention.choice_table import Device
from jaxattn.attention.support import gradient_of
from jaxattn.measuring.workloads import ODD, Workload
from jaxattn_kernels.arrays import Attended
from jaxattn_kernels.mosaic_gpu import hopper_gradient as kernel
from jaxattn_kernels.mosaic_gpu import hopper_gradient_keys as for_keys
from jaxattn_kernels.mosaic_gpu import hopper_gradient_queries as for_queries
from jaxattn_kernels.mosaic_gpu import program

pytestmark = [pytest.mark.simulator, pytest.mark.usefixtures("no_races"), pytest.mark.thinned(2)]


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


@pytest.mark.smoke
@pytest.mark.thinned(3, "numbers")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "group" in name else pytest.mark.slow) for name in LAYERS]
)
def test_agrees_with_the_definition(name):
    check(ODD[3], *LAYERS[name])


@pytest.mark.thinned(3, "numbers")
def test_many_blocks():
    """More blocks than shared memory holds, of keys and of rows of queries."""
    check(Workload("long", (1, 130), (250, 180), ""), layer(2, 1, sliding_window=290), 16)


@pytest.mark.thinned(3, "numbers")
@pytest.mark.parametrize("causal", [pytest.param(True, marks=pytest.mark.slow), False])
def test_packed_keys(causal):
    check(ODD[0], layer(2, 1, causal=causal), None)


@pytest.mark.thinned(3, "numbers")
def test_what_does_not_change_a_bit(monkeypatch):
    """How many tiles a program serves, and what stands beside a sequence, be it NaN."""
    spec = layer(2, 1, sliding_window=60)
    workload = Workload("mixed", (1, 70, 2), (20, 0, 1), "")
    q, k, v, metadata, d_out, d_lse = draw(workload, spec, 64, "bfloat16", Bucket(76, 3))
    expected = simulated(spec)(q, k, v, metadata, d_out, d_lse)
    monkeypatch.setattr(program, "MAX_MOSAIC_PROGRAMS", 2)
    q, d_out = (x.at[1:71].set(jnp.nan) for x in (q, d_out))
    simulated.cache_clear()
    got = simulated(spec)(q, k, v, metadata, d_out, d_lse)
    first, second = np.split(np.asarray(metadata.page_list), np.asarray(metadata.page_indptr)[1:-1])[::2]
    kept = [np.array([0, 71, 72]), *[np.concatenate([first, second[:1]])] * 2]
    for x, y, rows in zip(got, expected, kept, strict=True):
        x, y = (np.asarray(a, np.float32)[rows] for a in (x, y))
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
@pytest.mark.parametrize("page_size", [8, 16, 64, None])
@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 8, 16])
def test_agrees_with_the_definition_everywhere(group_size, page_size, head_dim):
    options: tuple[dict[str, Any], ...] = ({}, {"sliding_window": 33}, {"logits_soft_cap": 30.0})
    for some in options:
        for workload in ODD if page_size else ODD[:1]:
            check(workload, layer(group_size, 1, head_dim, **some), page_size)


# Each with the queries and keys that show it: a stage is used twice, or once.
MISTAKES = {
    "none": (lambda monkeypatch: None, 64, 256),
    "keys are released before they are read": (
        functools.partial(release_too_early, for_queries, "_consume_keys", "k_ready", "k_free"), 64, 256,
    ),
    "queries are released before they are read": (
        functools.partial(release_too_early, for_keys, "_consume_rows", "k_ready", "k_free"), 64, 256,
    ),
    "keys are read before they arrive": (
        functools.partial(forget_to_wait, for_queries, "_consume_keys", "k_ready"), 20, 40,
    ),
    "queries are read before they arrive": (
        functools.partial(forget_to_wait, for_keys, "_consume_rows", "k_ready"), 20, 40,
    ),
    "a consumer's own keys are read before they arrive": (
        functools.partial(forget_to_wait, for_keys, "_consume_rows", "rows_ready"), 20, 40,
    ),
    "queries are read before they are cleared": (
        functools.partial(forget_to_wait, for_keys, "_consume_rows", "cleared"), 20, 40,
    ),
    "writes are not committed": (functools.partial(forget_to_call, "commit_smem"), 20, 40),
}  # fmt: skip


@pytest.mark.parametrize(
    "mistake",
    [*list(MISTAKES)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in list(MISTAKES)[2:])],
)
def test_the_race_detector_sees_mistakes(mistake, monkeypatch, caplog, capsys):
    make, num_tokens, num_keys = MISTAKES[mistake]
    make(monkeypatch)
    spec, workload = layer(4, 1), Workload("one sequence", (num_tokens,), (num_keys - num_tokens,), "")
    q, k, v, metadata, d_out, d_lse = draw(workload, spec, 64, "bfloat16", Bucket(num_tokens, 1))
    back = functools.partial(mosaic_gradient.attend_backward, interpret=REPORTED)
    # Numbers are of no interest here, hence any results will do.
    found = races(
        lambda: back(q, k, v, Attended(q, d_lse), Attended(d_out, d_lse), metadata, spec), caplog, capsys
    )
    assert found == (mistake != "none")


@pytest.mark.smoke
@pytest.mark.parametrize(("head_dim", "page_size"), [(80, 128), (96, None)])
def test_is_exported_for_cuda_from_anywhere(head_dim, page_size):
    spec = layer(10, 2, head_dim, sliding_window=40, logits_soft_cap=5.0, sinks=True)

    def go_back(q, k, v, metadata, spec, sinks):
        attend = functools.partial(attention, metadata=metadata, spec=spec, implementation="mosaic")
        return jax.grad(lambda *args: attend(*args[:3], sinks=args[3]).astype("float32").sum(), range(4))(
            q, k, v, sinks
        )

    # Forward and backward for short and for long queries, and one kernel for keys.
    assert count_kernels(go_back, spec, page_size, ("mosaic", "mosaic_gradient")) == 5


HOPPER = Device("gpu", "NVIDIA H200", "9.0")


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({}, HOPPER, "mosaic"),
        ({}, Device("cpu"), "mosaic"),  # from where it can be exported
        ({}, Device("gpu", "NVIDIA B200", "10.0"), "triton"),
        ({"head_dim": 256}, HOPPER, "triton"),
        ({"page_size": 24}, HOPPER, "triton"),
    ],
)
def test_triton_goes_backward_where_mosaic_cannot(options, device, expected):
    spec, page_size = layer(4, 1, options.get("head_dim", 128)), options.get("page_size", 16)
    assert gradient_of("mosaic", spec, "bfloat16", "bfloat16", page_size, device) == expected
    assert gradient_of("xla", spec, "bfloat16", "bfloat16", page_size, device) == "xla"


def test_what_the_kernels_cannot_serve_has_a_reason():
    spec = layer(4, 1, 256)
    q, k, v, metadata, d_out, d_lse = draw(ODD[3], spec, 16, "bfloat16", SMALL)
    results = Attended(q, d_lse)
    with pytest.raises(NotImplementedError, match="head_dim=256 is not one of 64, 80, 96, 128"):
        mosaic_gradient.attend_backward(q, k, v, results, Attended(d_out, d_lse), metadata, spec)
