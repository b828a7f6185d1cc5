"""The Blackwell kernel in the simulator of the GPU, its race detector always on.

A race, a wait that never ends and a read of what was never written all fail a test. What only the
hardware refuses is tested in `compile/test_blackwell_sass.py`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu
from oracle import Problem, attend_dense_with_lse
from tolerances import assert_as_good_as

from jaxattn import AttentionSpec, Bucket, attention, mosaic, prepare_metadata
from jaxattn.cases import ODD, Workload, nest_workload
from jaxattn.consumers import mosaic_tiling
from jaxattn.kernel_inputs import kernel_inputs
from jaxattn_kernels import blackwell as kernel
from jaxattn_kernels.arrays import TileList
from jaxattn_kernels.mosaic_parts import KernelConfig

BLACKWELL = "10.0"
# Clocks of copies and products are kept per simulated engine, in turn: with the default of five, two
# warpgroups come to share one, which hides a race now and then.
SIMULATED = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)
# A race raises, or is logged if asked for; before jax 0.12 it was printed, and nothing else.
RAISES = hasattr(SIMULATED, "on_race")
REPORTED = dataclasses.replace(SIMULATED, **({"on_race": "warn"} if RAISES else {}))


@pytest.fixture(autouse=True)
def no_races(request, capsys):
    yield
    if "mistake" not in request.fixturenames:
        assert "RACE DETECTED" not in capsys.readouterr().out


def layer(num_q_heads: int, num_kv_heads: int, head_dim: int = 64, **options) -> AttentionSpec:
    return AttentionSpec(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)


def inputs(problem: Problem, spec: AttentionSpec, page_size: int | None, dtype: str, bucket: Bucket):
    """Queries, keys, values and metadata; whatever belongs to nobody is NaN."""
    if page_size is None:
        batch = nest_workload(problem.workload, bucket=bucket)
        k, v = (problem.packed(x, bucket.tokens) for x in (problem.k, problem.v))
    else:
        tables, k, v = problem.pages(page_size)
        bucket = dataclasses.replace(bucket, pages=len(k))
        batch = nest_workload(problem.workload, page_tables=tables, page_size=page_size, bucket=bucket)
    q, k, v = (jnp.asarray(x, dtype) for x in (problem.packed(problem.q, bucket.tokens), k, v))
    return q, k, v, prepare_metadata(batch, spec, consumers=("mosaic", "xla"))


def check(
    workload: Workload, spec: AttentionSpec, page_size: int | None, dtype: str = "bfloat16", growth: float = 1
):
    """As precise as XLA, and zero in the padding; the last keys are longer than the first by a factor."""
    problem = Problem.draw(workload, spec)
    for k in problem.k:
        k *= np.linspace(1, growth, len(k), dtype=np.float32)[:, None, None]
    n = sum(workload.q_lens)
    args = inputs(problem, spec, page_size, dtype, Bucket(n + 2, len(workload.q_lens)))
    logits = np.linspace(-2, 5, spec.num_q_heads, dtype=np.float32) if spec.sinks else None
    sinks = None if logits is None else jnp.asarray(logits)
    simulated = functools.partial(mosaic.attend, capability=BLACKWELL, interpret=SIMULATED)
    plain = functools.partial(attention, implementation="xla", return_lse=True)
    (got, got_lse), (expected, expected_lse) = (
        [np.asarray(x, np.float64) for x in jax.jit(functools.partial(f, spec=spec, sinks=sinks))(*args)]
        for f in (simulated, plain)
    )
    exact = [
        attend_dense_with_lse(*qkv, spec, logits) for qkv in zip(problem.q, problem.k, problem.v, strict=True)
    ]
    assert_as_good_as(got[:n], expected[:n], np.concatenate([out for out, _ in exact]), jnp.dtype(dtype))
    exact_lse = np.concatenate([lse for _, lse in exact])
    assert_as_good_as(got_lse[:n], expected_lse[:n], exact_lse, jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(got[n:], 0)
    np.testing.assert_array_equal(got_lse[n:], -np.inf)


MIXED = Workload("mixed", (1, 34), (33, 40), "a decode, and a chunk of more than one tile")
SHORT = Workload("short", (1, 5), (33, 0), "queries that all go to one list")

LAYERS = {
    "two heads per group, window and cap, small pages": (
        layer(2, 1, sliding_window=7, logits_soft_cap=5.0),
        MIXED,
        8,
        "float16",
    ),
    "four heads per group, window of several pages, sinks": (
        layer(4, 1, 128, sliding_window=40, sinks=True),
        MIXED,
        16,
        "bfloat16",
    ),
    "two key heads, rows that no head fills, pages larger than a block, sinks": (
        layer(6, 2, sinks=True),
        SHORT,
        256,
        "bfloat16",
    ),
    "a large head, packed": (
        layer(2, 1, 256),
        Workload("packed", (5, 11), (0, 0), ""),
        None,
        "bfloat16",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_xla(name):
    spec, workload, page_size, dtype = LAYERS[name]
    check(workload, spec, page_size, dtype)


@pytest.mark.parametrize("growth", [1, 40])
def test_more_key_blocks_than_shared_memory_holds(growth):
    """Outputs are rescaled where scores grow, and only there."""
    check(Workload("long", (1, 3), (699, 513), ""), layer(1, 1, sliding_window=600), 16, growth=growth)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
@pytest.mark.parametrize("page_size", [8, 16, 64, None])
@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 8, 16])
def test_agrees_with_xla_everywhere(group_size, page_size, head_dim):
    for options in ({"sliding_window": 33}, {"logits_soft_cap": 30.0, "sinks": True}):
        for workload in ODD if page_size else ODD[:1]:
            check(workload, layer(group_size, 1, head_dim, **options), page_size)


class _Marked:
    """A barrier, or one of several, that the functions below recognise."""

    def __init__(self, real):
        self.real = real

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return _Marked(self.real.at[index])


def mark(monkeypatch, role: str, barrier: str) -> None:
    """Let one role have a marked barrier."""
    real = getattr(kernel, role)

    def act(*args):
        *others, barriers = args
        real(*others, barriers._replace(**{barrier: _Marked(getattr(barriers, barrier))}))

    monkeypatch.setattr(kernel, role, act)


def forget_to_wait(role: str, barrier: str, monkeypatch) -> None:
    """One role does not wait for a barrier."""
    wait, copy = plgpu.barrier_wait, plgpu.copy_gmem_to_smem
    mark(monkeypatch, role, barrier)
    monkeypatch.setattr(plgpu, "barrier_wait", lambda b: None if isinstance(b, _Marked) else wait(b))
    monkeypatch.setattr(
        plgpu,
        "copy_gmem_to_smem",
        lambda source, place, b: copy(source, place, b.real if isinstance(b, _Marked) else b),
    )


def arrive_too_early(barrier: str, monkeypatch) -> None:
    """A barrier says that a product was issued, not that it is done."""
    commit, arrive = plgpu.tcgen05_commit_arrive, plgpu.barrier_arrive
    mark(monkeypatch, "_multiply", barrier)
    monkeypatch.setattr(
        plgpu, "tcgen05_commit_arrive", lambda b: arrive(b.real) if isinstance(b, _Marked) else commit(b)
    )


def forget_to_call(name: str, monkeypatch) -> None:
    """What was written or read is not settled before others hear of it."""
    monkeypatch.setattr(plgpu, name, lambda: None)


# Each with the keys that show it: a stage is used twice, or once.
WAITS = {
    f"{role} does not wait for {barrier}": (functools.partial(forget_to_wait, role, barrier), 20)
    for role, barriers in {
        "_multiply": ("weights_ready", "q_ready", "k_ready", "v_ready"),
        "_attend": ("scores_ready", "out_ready", "q_copied"),
    }.items()
    for barrier in barriers
}
ARRIVALS = {
    f"{barrier} is signalled before the product is done": (functools.partial(arrive_too_early, barrier), 149)
    for barrier in ("k_free", "v_free", "scores_ready", "out_ready")
}
CALLS = {
    f"no {name}": (functools.partial(forget_to_call, name), 149)
    for name in ("commit_smem", "commit_tmem", "wait_load_tmem")
}
MISTAKES = {"none": (lambda monkeypatch: None, 149)} | WAITS | ARRIVALS | CALLS
FEW = ("none", next(iter(WAITS)), next(iter(ARRIVALS)), *CALLS)


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in MISTAKES]
)
def test_the_race_detector_sees_mistakes(mistake, monkeypatch, caplog, capsys):
    make, num_keys = MISTAKES[mistake]
    make(monkeypatch)
    spec = layer(1, 1)
    problem = Problem.draw(Workload("one tile", (1,), (num_keys - 1,), ""), spec)
    q, k, v, metadata = inputs(problem, spec, 64, "bfloat16", Bucket(1, 1))
    k, v = (x.reshape(-1, 1, spec.head_dim) for x in (k, v))
    done = kernel.ragged_attention(
        q, k, v, *kernel_inputs(metadata, spec, mosaic_tiling(spec)), page_size=64, scale=0.1,
        logits_soft_cap=None, windowed=False, interpret=REPORTED,
        config=KernelConfig(block_k=64, num_stages=1),
    )  # fmt: skip
    jax.block_until_ready(done)
    report = caplog.text + capsys.readouterr().out
    assert ("RACE DETECTED" in report) == (mistake != "none")


def test_tiles_may_come_in_another_order():
    spec = layer(1, 1)
    problem = Problem.draw(Workload("two tiles", (1, 2), (0, 9), ""), spec)
    q, k, v, metadata = inputs(problem, spec, 16, "float16", Bucket(3, 2))
    visible, lookup, (short, *_) = kernel_inputs(metadata, spec, mosaic_tiling(spec))
    order = jnp.arange(short.tiles.seq.shape[0], dtype=jnp.int32)[::-1]
    out, _ = kernel.ragged_attention(
        q, k.reshape(-1, 1, 64), v.reshape(-1, 1, 64), visible, lookup,
        (TileList(short.tiles, short.block_q, None, order),), page_size=16, scale=spec.softmax_scale,
        logits_soft_cap=None, windowed=False, interpret=SIMULATED,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(out, np.float64), problem.expected(spec), atol=5e-3)


TARGET = {"platforms": ["cuda"], "disabled_checks": [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]}


@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 8), (128, 256), (256, None)])
def test_is_exported_for_cuda_from_anywhere(head_dim, page_size):
    spec = layer(6, 2, head_dim, sliding_window=40, logits_soft_cap=5.0, sinks=True)
    workload = Workload("", (70,), (0,), "")
    *args, metadata = inputs(Problem.draw(workload, spec), spec, page_size, "bfloat16", Bucket(70, 1))
    attend = functools.partial(mosaic.attend, spec=spec, sinks=jnp.zeros(6), capability=BLACKWELL)
    module = export.export(jax.jit(attend), **TARGET)(*args, metadata).mlir_module()
    assert module.count("custom_call @mosaic_gpu_v2") == 2, "one for short queries and one for long ones"


def test_the_compute_capability_chooses_the_kernel():
    spec = layer(2, 1)
    names = {
        capability: mosaic._kernel(capability).__name__.rpartition(".")[2]
        for capability in (None, "9.0", "10.0", "10.3")
    }
    assert names == {None: "mosaic", "9.0": "mosaic", "10.0": "blackwell", "10.3": "blackwell"}
    assert mosaic.obstacle(spec, "bfloat16", "bfloat16", 96, capability="9.0")
    assert "not 8.0" in str(mosaic.obstacle(spec, "bfloat16", "bfloat16", 16, capability="8.0"))
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
    assert kernel.obstacle(**possible) is None
    assert reason in kernel.obstacle(**(possible | options))


def test_refuses_what_does_not_fit():
    spec = layer(2, 1)
    problem = Problem.draw(Workload("", (3,), (0,), ""), spec)
    q, k, v, metadata = inputs(problem, spec, None, "float16", Bucket(3, 1))
    visible, lookup, (short, *_) = kernel_inputs(metadata, spec, mosaic_tiling(spec))
    options = {"page_size": None, "scale": 1.0, "logits_soft_cap": None, "windowed": False}
    with pytest.raises(ValueError, match="tiles of 65 tokens with 2 heads each exceed 128 rows"):
        kernel.ragged_attention(q, k, v, visible, lookup, (short._replace(block_q=65),), **options)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    with pytest.raises(NotImplementedError, match="float32"):
        kernel.ragged_attention(q, k, v, visible, lookup, (short,), **options)
