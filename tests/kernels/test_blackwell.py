"""The Blackwell kernel in the simulator of the GPU, its race detector always on (`simulator.py`).

What only the hardware refuses is tested in `compile/test_blackwell_sass.py`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from oracle import Problem
from simulator import (
    REPORTED,
    Marked,
    check,
    check_what_does_not_change_a_bit,
    count_kernels,
    forget_to_call,
    forget_to_wait,
    forget_to_wait_for_copies,
    inputs,
    layer,
    mark,
    races,
    split_at,
)

from jaxattn import AttentionSpec, Bucket
from jaxattn.attention import mosaic
from jaxattn.attention.kernel_inputs import kernel_inputs
from jaxattn.measuring.workloads import ODD, Workload
from jaxattn.metadata.consumers import mosaic_tiling
from jaxattn_kernels.mosaic_gpu import blackwell as kernel
from jaxattn_kernels.mosaic_gpu import program
from jaxattn_kernels.mosaic_gpu.program import KernelConfig

pytestmark = [pytest.mark.simulator, pytest.mark.usefixtures("no_races"), pytest.mark.thinned(2)]

BLACKWELL = "10.0"


ATTEND = functools.partial(mosaic.attend, capability=BLACKWELL)


def check_here(
    workload: Workload,
    spec: AttentionSpec,
    page_size: int | None,
    dtype: str = "bfloat16",
    max_q_len: int = 0,
    growth: float = 1,
) -> None:
    """As precise as XLA, with room for two tokens more."""
    bucket = Bucket(sum(workload.q_lens) + 2, len(workload.q_lens), max_q_len=max_q_len)
    check(workload, spec, page_size, dtype, bucket, slots=None, capability=BLACKWELL, growth=growth)


MIXED = Workload("mixed", (1, 34), (33, 40), "a decode, and a chunk of more than one tile")

LAYERS = {
    "two heads per group, window and cap, small pages": (
        layer(2, 1, 80, sliding_window=7, logits_soft_cap=5.0),
        MIXED,
        8,
        "float16",
    ),
    "four heads per group, window of several pages, sinks": (
        layer(4, 1, 96, sliding_window=40, sinks=True),
        MIXED,
        16,
        "bfloat16",
    ),
    "a large head, packed": (
        layer(2, 1, 256),
        Workload("packed", (5, 11), (0, 0), ""),
        None,
        "bfloat16",
    ),
}


@pytest.mark.smoke
@pytest.mark.thinned(4, "numbers")
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_xla(name):
    spec, workload, page_size, dtype = LAYERS[name]
    check_here(workload, spec, page_size, dtype)


@pytest.mark.thinned(4, "numbers")
@pytest.mark.parametrize("growth", [1, 40])
def test_more_key_blocks_than_shared_memory_holds(growth):
    """Outputs are rescaled where scores grow, and only there."""
    check_here(Workload("long", (1, 3), (699, 513), ""), layer(1, 1, sliding_window=600), 16, growth=growth)


SPLITS = {
    # Sequences of one unit and of several, a window that begins amid one, and padding; two key heads, rows
    # that no head fills, and pages larger than a block.
    "window, sinks": (128, (1, 3), (300, 30), layer(6, 2, sliding_window=190, sinks=True), 256, 3),
    # Units that share a block of keys with others.
    "packed": (8, (15, 33, 2), (0, 0, 0), layer(1, 1, sinks=True), None, 33),
}


@pytest.mark.thinned(4, "numbers")
@pytest.mark.parametrize("name", SPLITS)
def test_split_keys_are_merged(name, monkeypatch):
    split_keys, q_lens, context_lens, spec, page_size, max_q_len = SPLITS[name]
    spec = split_at(split_keys, spec, monkeypatch)
    check_here(Workload(name, q_lens, context_lens, ""), spec, page_size, max_q_len=max_q_len)


@pytest.mark.thinned(4, "numbers")
def test_what_does_not_change_a_bit(monkeypatch):
    check_what_does_not_change_a_bit(kernel, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
@pytest.mark.parametrize("page_size", [8, 16, 64, None])
@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 8, 16])
def test_agrees_with_xla_everywhere(group_size, page_size, head_dim):
    for options in ({"sliding_window": 33}, {"logits_soft_cap": 30.0, "sinks": True}):
        for workload in ODD if page_size else ODD[:1]:
            check_here(workload, layer(group_size, 1, head_dim, **options), page_size)


def arrive_too_early(barrier: str, monkeypatch) -> None:
    """A barrier says that a product was issued, not that it is done."""
    commit, arrive = plgpu.tcgen05_commit_arrive, plgpu.barrier_arrive
    mark(kernel, "_multiply", (barrier,), monkeypatch)
    monkeypatch.setattr(
        plgpu, "tcgen05_commit_arrive", lambda b: arrive(b.real) if isinstance(b, Marked) else commit(b)
    )


# Each with the keys that show it: a stage is used twice, or once; and whether they are split.
WAITS = {
    f"{role} does not wait for {barrier}": (
        functools.partial(forget_to_wait, kernel, role, barrier),
        20,
        False,
    )
    for role, barriers in {
        "_multiply": ("weights_ready", "q_ready", "k_ready", "v_ready"),
        "_attend": ("scores_ready", "out_ready", "q_copied"),
    }.items()
    for barrier in barriers
}
ARRIVALS = {
    f"{barrier} is signalled before the product is done": (
        functools.partial(arrive_too_early, barrier),
        149,
        False,
    )
    for barrier in ("k_free", "v_free", "scores_ready", "out_ready")
}
CALLS = {
    f"no {name}": (functools.partial(forget_to_call, name), 149, False)
    for name in ("commit_smem", "commit_tmem", "wait_load_tmem")
}
SPLIT = {
    "none, with split keys": (lambda monkeypatch: None, 90, True),
    "partial results are overwritten": (forget_to_wait_for_copies, 90, True),
}
MISTAKES = {"none": (lambda monkeypatch: None, 149, False)} | WAITS | ARRIVALS | CALLS | SPLIT
FEW = ("none", next(iter(WAITS)), next(iter(ARRIVALS)), *CALLS, *SPLIT)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in MISTAKES]
)
def test_the_race_detector_sees_mistakes(mistake, monkeypatch, caplog, capsys):
    make, num_keys, is_split = MISTAKES[mistake]
    make(monkeypatch)
    spec = split_at(64, layer(1, 1, scale=0.5), monkeypatch) if is_split else layer(1, 1)
    problem = Problem.draw(Workload("one tile", (1,), (num_keys - 1,), ""), spec)
    q, k, v, metadata = inputs(problem, spec, 64, "bfloat16", Bucket(1, 1), slots=None)
    k, v = (x.reshape(-1, 1, spec.head_dim) for x in (k, v))
    attend = functools.partial(
        kernel.ragged_attention,
        q, k, v, *kernel_inputs(metadata, spec, mosaic_tiling(spec)), page_size=64, scale=0.1,
        logits_soft_cap=None, windowed=False, interpret=REPORTED,
        config=KernelConfig(block_k=64, num_stages=1),
    )  # fmt: skip
    assert races(attend, caplog, capsys) == (not mistake.startswith("none"))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("head_dim", "page_size", "window", "kernels"),
    [(80, 128, 40, 2), (128, 8, 600, 3), (256, None, None, 2)],
)
def test_is_exported_for_cuda_from_anywhere(head_dim, page_size, window, kernels):
    """For short queries, to merge them if they are split, and for long ones."""
    spec = layer(10, 2, head_dim, sliding_window=window, logits_soft_cap=5.0, sinks=True)
    assert count_kernels(ATTEND, spec, page_size) == kernels


def test_is_exported_with_64_bit_types_enabled(monkeypatch):
    monkeypatch.setattr(program, "MAX_MOSAIC_PROGRAMS", 2)
    with jax.enable_x64(True):
        assert count_kernels(ATTEND, layer(2, 1), 16) == 3


@pytest.mark.smoke
def test_the_compute_capability_chooses_the_kernel():
    spec = layer(2, 1)
    names = {
        capability: mosaic._kernel(capability).__name__.rpartition(".")[2]
        for capability in (None, "9.0", "10.0", "10.3")
    }
    assert names == {None: "hopper", "9.0": "hopper", "10.0": "blackwell", "10.3": "blackwell"}
    assert mosaic.unsupported_reason(spec, "bfloat16", "bfloat16", 96, capability="9.0")
    assert "not 8.0" in str(mosaic.unsupported_reason(spec, "bfloat16", "bfloat16", 16, capability="8.0"))
    assert [mosaic.serves(x) for x in (None, "8.0", "9.0", "10.3", "12.0")] == [
        False,
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32 is not one of bfloat16, float16"),
        ({"kv_dtype": "int8"}, "keys are int8 and queries bfloat16"),
        ({"head_dim": 72}, "head_dim=72 is not one of 64, 80, 96, 128, 256"),
        ({"head_dim": 96}, "63 rows of 96 numbers are no multiple of the 64 that a copy brings"),
        ({"group_size": 65}, "two tokens' 65 query heads per key head exceed the 128 rows"),
        ({"page_size": 12}, "page_size=12 is not a multiple of 8"),
        ({"page_size": 24}, "page_size=24 neither divides nor is a multiple"),
    ],
)
def test_what_the_kernel_cannot_serve_has_a_reason(options, reason):
    possible = {"dtype": "bfloat16", "head_dim": 64, "group_size": 3, "page_size": 16}
    assert kernel.unsupported_reason(**possible) is None
    assert reason in kernel.unsupported_reason(**(possible | options))


def test_refuses_what_does_not_fit():
    spec = layer(2, 1)
    problem = Problem.draw(Workload("", (3,), (0,), ""), spec)
    q, k, v, metadata = inputs(problem, spec, None, "float16", Bucket(3, 1))
    visible, lookup, (short, *_) = kernel_inputs(metadata, spec, mosaic_tiling(spec))
    options = {"page_size": None, "scale": 1.0, "logits_soft_cap": None, "windowed": False}
    long = dataclasses.replace(short, block_q=65)
    with pytest.raises(ValueError, match="tiles of 65 tokens with 2 heads each exceed 128 rows"):
        kernel.ragged_attention(q, k, v, visible, lookup, (long,), **options)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    with pytest.raises(NotImplementedError, match="float32"):
        kernel.ragged_attention(q, k, v, visible, lookup, (short,), **options)
