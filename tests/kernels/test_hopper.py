"""The Hopper kernel in the simulator of the GPU, its race detector always on (`simulator.py`).

What only the hardware refuses is tested in `compile/test_mosaic_sass.py`.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from oracle import Problem
from simulator import (
    LAYERS,
    REPORTED,
    check,
    check_what_does_not_change_a_bit,
    count_kernels,
    forget_to_call,
    forget_to_wait,
    forget_to_wait_for_copies,
    inputs,
    layer,
    races,
    release_too_early,
    simulated,
    split_at,
)

from jaxattn import Bucket, attention
from jaxattn.attention import mosaic
from jaxattn.measuring.workloads import ODD, Workload
from jaxattn_kernels.mosaic_gpu import hopper as kernel
from jaxattn_kernels.mosaic_gpu import program

pytestmark = [pytest.mark.simulator, pytest.mark.usefixtures("no_races"), pytest.mark.thinned(2)]


@pytest.mark.smoke
@pytest.mark.thinned(4, "numbers")
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_xla(name):
    check(ODD[3], *LAYERS[name])


@pytest.mark.thinned(4, "numbers")
def test_every_kind_of_batch():
    for workload in ODD[:3]:
        check(workload, layer(4, 1), 16)


@pytest.mark.thinned(4, "numbers")
def test_many_key_blocks():
    """More blocks than shared memory holds, for one consumer and for two."""
    workload = Workload("long", (1, 130), (699, 513), "several key blocks")
    check(workload, layer(1, 1, sliding_window=600), 16)


@pytest.mark.thinned(4, "numbers")
@pytest.mark.parametrize("causal", [True, False])
def test_packed_keys(causal):
    check(ODD[0], layer(2, 1, causal=causal), None)


SPLITS = {
    # Sequences of one unit and of several; padding, hence a tile without keys.
    "sinks": (64, (1, 3, 2, 1), (190, 4, 66, 0), layer(8, 2, sinks=True), 16, Bucket(12, 4, max_q_len=3)),
    # A window that begins amid a unit, and units that some token does not see.
    "window": (64, (3, 1), (160, 30), layer(5, 1, 96, sliding_window=90), 8, Bucket(4, 2, max_q_len=3)),
    # Units that share a block of keys with others.
    "packed": (8, (15, 33, 2), (0, 0, 0), layer(1, 1, sinks=True), None, Bucket(56, 3, max_q_len=33)),
}


@pytest.mark.thinned(4, "numbers")
@pytest.mark.parametrize("name", SPLITS)
def test_split_keys_are_merged(monkeypatch, name):
    split_keys, q_lens, context_lens, spec, page_size, bucket = SPLITS[name]
    spec = split_at(split_keys, spec, monkeypatch)
    check(Workload(name, q_lens, context_lens, "split keys"), spec, page_size, bucket=bucket)


@pytest.mark.thinned(4, "numbers")
def test_what_does_not_change_a_bit(monkeypatch):
    check_what_does_not_change_a_bit(kernel, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
@pytest.mark.parametrize("page_size", [8, 16, 64, None])
@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 8, 16])
def test_agrees_with_xla_everywhere(group_size, page_size, head_dim):
    for options in ({}, {"sliding_window": 33}, {"logits_soft_cap": 30.0}):
        for workload in ODD if page_size else ODD[:1]:
            check(workload, layer(group_size, 1, head_dim, **options), page_size)


@pytest.mark.thinned(4, "numbers")
def test_a_number_of_tokens_that_no_tile_divides():
    spec = layer(2, 1)
    problem = Problem.draw(Workload("odd", (5, 6), (0, 0), ""), spec)
    got, _ = simulated(spec)(*inputs(problem, spec, None, "float16", Bucket(11, 2)))
    np.testing.assert_allclose(np.asarray(got, np.float64), problem.expected(spec), atol=5e-3)


# Each with the queries and keys that show it: a stage is used twice, or once. A single query's are split.
MISTAKES = {
    "none": (lambda monkeypatch: None, 70, 320),
    "keys are released before they are read": (
        functools.partial(release_too_early, kernel, "_consume", "k_ready", "k_free"),
        70,
        320,
    ),
    "values are released before they are read": (
        functools.partial(release_too_early, kernel, "_consume", "v_ready", "v_free"),
        70,
        320,
    ),
    "keys are read before they arrive": (
        functools.partial(forget_to_wait, kernel, "_consume", "k_ready"),
        70,
        170,
    ),
    "values are read before they arrive": (
        functools.partial(forget_to_wait, kernel, "_consume", "v_ready"),
        70,
        170,
    ),
    "writes are not committed": (functools.partial(forget_to_call, "commit_smem"), 70, 170),
    "none, with split keys": (lambda monkeypatch: None, 1, 90),
    "partial results are overwritten": (forget_to_wait_for_copies, 1, 90),
}


FEW = (*list(MISTAKES)[:2], *list(MISTAKES)[-3:])


@pytest.mark.smoke
@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in MISTAKES]
)
def test_the_race_detector_sees_mistakes(mistake, monkeypatch, caplog, capsys):
    make, num_tokens, num_keys = MISTAKES[mistake]
    make(monkeypatch)
    spec = layer(1, 1)
    if num_tokens == 1:
        spec = split_at(64, layer(1, 1, scale=0.5), monkeypatch)
    problem = Problem.draw(Workload("one tile", (num_tokens,), (num_keys - num_tokens,), ""), spec)
    args = inputs(problem, spec, 64, "bfloat16", Bucket(num_tokens, 1))
    found = races(lambda: mosaic.attend(*args, spec, interpret=REPORTED), caplog, capsys)
    assert found == (not mistake.startswith("none"))


HOPPER = functools.partial(attention, implementation="mosaic")


@pytest.mark.smoke
@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("head_dim", "page_size", "window"),
    [(64, 8, None), (80, 128, None), (96, None, None), (128, 128, 40), (128, 8, 600), (256, None, 40)],
)
def test_is_exported_for_cuda_from_anywhere(head_dim, page_size, window):
    spec = layer(10, 2, head_dim, sliding_window=window, logits_soft_cap=5.0, sinks=True)
    # For short queries, to merge them if they are split, and for long ones. Neither the keys of a short
    # window are split, nor those of a batch that has no more than one unit.
    assert count_kernels(HOPPER, spec, page_size) == (2 if window == 40 or page_size is None else 3)


@pytest.mark.smoke
def test_is_exported_with_64_bit_types_enabled(monkeypatch):
    monkeypatch.setattr(program, "MAX_MOSAIC_PROGRAMS", 2)
    with jax.enable_x64(True):
        assert count_kernels(HOPPER, layer(2, 1), 16) == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32 is not one of bfloat16, float16"),
        ({"kv_dtype": "float8_e4m3fn"}, "keys are float8_e4m3fn and queries bfloat16"),
        ({"head_dim": 72}, "head_dim=72 is not one of 64, 80, 96, 128, 256"),
        ({"head_dim": 96}, "63 rows of 96 numbers are no multiple of the 64 that a copy brings"),
        ({"group_size": 65}, "65 query heads per key head exceed the 64 rows"),
        ({"page_size": 12}, "page_size=12 is not a multiple of 8"),
        ({"page_size": 24}, "page_size=24 neither divides nor is a multiple"),
    ],
)
def test_what_the_kernel_cannot_serve_has_a_reason(options, reason):
    possible = {"dtype": "bfloat16", "head_dim": 64, "group_size": 3, "page_size": 16}
    assert kernel.unsupported_reason(**possible) is None
    assert reason in kernel.unsupported_reason(**(possible | options))


def test_attention_refuses_what_the_kernel_cannot_serve():
    spec = layer(2, 1)
    args = inputs(Problem.draw(ODD[0], spec), spec, 16, "float32")
    with pytest.raises(
        NotImplementedError, match=r"implementation=.mosaic. cannot serve .* float32.*; use 'triton'"
    ):
        attention(*args, spec, implementation="mosaic")


def test_does_not_run_elsewhere():
    spec = layer(2, 1)
    args = inputs(Problem.draw(ODD[0], spec), spec, 16, "bfloat16")
    with pytest.raises(ValueError, match=r"[Oo]nly interpret mode is supported on CPU"):
        attention(*args, spec, implementation="mosaic")
