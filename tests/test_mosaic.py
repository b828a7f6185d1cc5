"""The Mosaic GPU kernel in the simulator of the GPU, its race detector always on.

A race, a wait that never ends and a read of what was never written all fail a test. What only the
hardware refuses is tested in `compile/test_mosaic_sass.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu
from oracle import Problem, attend_dense_with_lse
from tolerances import assert_as_good_as

from jaxattn import AttentionSpec, Bucket, attention, consumers, mosaic, prepare_metadata
from jaxattn.cases import ODD, Workload, nest_workload
from jaxattn.kernel_inputs import kernel_inputs
from jaxattn_kernels import mosaic as kernel
from jaxattn_kernels import mosaic_parts
from jaxattn_kernels.arrays import TileList

# Clocks of copies and products are kept per simulated engine, in turn: with the default of five, two
# warpgroups come to share one, which hides a race now and then.
SIMULATED = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)
# A race raises, or is logged if asked for; before jax 0.12 it was printed, and nothing else.
RAISES = hasattr(SIMULATED, "on_race")
REPORTED = dataclasses.replace(SIMULATED, **({"on_race": "warn"} if RAISES else {}))
# One bucket, hence one program per layer, for all small workloads.
SMALL, SLOTS = Bucket(160, 5), 640


@pytest.fixture(autouse=True)
def no_races(capsys):
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


@functools.lru_cache(maxsize=4)
def simulated(spec: AttentionSpec, interpret: plgpu.InterpretGPUParams = SIMULATED):
    return jax.jit(functools.partial(mosaic.attend, spec=spec, sinks=sinks_of(spec), interpret=interpret))


@functools.lru_cache(maxsize=4)
def plain(spec: AttentionSpec):
    return jax.jit(
        functools.partial(attention, spec=spec, sinks=sinks_of(spec), implementation="xla", return_lse=True)
    )


def sinks_of(spec: AttentionSpec) -> jax.Array | None:
    """Some below all logits, some above."""
    return jnp.linspace(-9, 9, spec.num_q_heads, dtype=jnp.float32) if spec.sinks else None


def inputs(problem: Problem, spec: AttentionSpec, page_size: int | None, dtype: str, bucket: Bucket = SMALL):
    """Queries, keys, values and metadata; whatever belongs to nobody is NaN."""
    if page_size is None:
        batch = nest_workload(problem.workload, bucket=bucket)
        k, v = (problem.packed(x, bucket.tokens) for x in (problem.k, problem.v))
    else:
        num_pages = max(SLOTS, sum(problem.workload.kv_lens)) // page_size + bucket.seqs
        tables, k, v = problem.pages(page_size, num_pages=num_pages)
        bucket = dataclasses.replace(bucket, pages=num_pages)
        batch = nest_workload(problem.workload, page_tables=tables, page_size=page_size, bucket=bucket)
    q, k, v = (jnp.asarray(x, dtype) for x in (problem.packed(problem.q, bucket.tokens), k, v))
    return q, k, v, prepare_metadata(batch, spec, consumers=("mosaic", "xla"))


def check(
    workload: Workload,
    spec: AttentionSpec,
    page_size: int | None,
    dtype: str = "bfloat16",
    bucket: Bucket = SMALL,
) -> None:
    """As precise as XLA; 0 and -inf in the padding."""
    problem = Problem.draw(workload, spec)
    # What the dtype can represent: rounding the inputs is no error of the kernel's.
    problem = dataclasses.replace(
        problem,
        **{x: [np.asarray(jnp.asarray(a, dtype), np.float32) for a in getattr(problem, x)] for x in "qkv"},
    )
    args = inputs(problem, spec, page_size, dtype, bucket)
    (got, got_lse), (out, lse) = (
        [np.asarray(x, np.float64) for x in f(spec)(*args)] for f in (simulated, plain)
    )
    sinks = None if not spec.sinks else np.asarray(sinks_of(spec))
    sequences = zip(problem.q, problem.k, problem.v, strict=True)
    exact, exact_lse = (
        np.concatenate(x)
        for x in zip(*(attend_dense_with_lse(*qkv, spec, sinks) for qkv in sequences), strict=True)
    )
    n = sum(workload.q_lens)
    assert_as_good_as(got[:n], out[:n], exact, jnp.dtype(dtype))
    assert_as_good_as(got_lse[:n], lse[:n], exact_lse, jnp.dtype("float32"))
    np.testing.assert_array_equal(got[n:], 0)
    np.testing.assert_array_equal(got_lse[n:], -np.inf)


def layer(num_q_heads: int, num_kv_heads: int, head_dim: int = 64, **options) -> AttentionSpec:
    return AttentionSpec(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)


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
def test_agrees_with_xla(name):
    check(ODD[3], *LAYERS[name])


def test_every_kind_of_batch():
    for workload in ODD[:3]:
        check(workload, layer(4, 1), 16)


def test_many_key_blocks():
    """More blocks than shared memory holds, for one consumer and for two."""
    workload = Workload("long", (1, 130), (699, 513), "several key blocks")
    check(workload, layer(1, 1, sliding_window=600), 16)


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


def split_at(split_keys: int, spec: AttentionSpec, monkeypatch) -> AttentionSpec:
    """A layer that no other test may use: what it asks of the metadata is remembered."""
    monkeypatch.setattr(consumers, "SPLIT_KEYS", split_keys)
    assert consumers.mosaic_tiling(spec).split_keys == split_keys
    return spec


@pytest.mark.parametrize("name", SPLITS)
def test_split_keys_are_merged(monkeypatch, name):
    split_keys, q_lens, context_lens, spec, page_size, bucket = SPLITS[name]
    spec = split_at(split_keys, spec, monkeypatch)
    check(Workload(name, q_lens, context_lens, "split keys"), spec, page_size, bucket=bucket)


def test_what_does_not_change_a_bit(monkeypatch):
    """A unit that is its whole tile, the order of tiles, and how many of them a program serves."""
    spec = layer(2, 2, sinks=True, sliding_window=600)
    problem = Problem.draw(Workload("mixed", (1, 70, 2), (20, 0, 1), ""), spec)
    q, k, v, metadata = inputs(problem, spec, 64, "bfloat16", Bucket(76, 3))
    visible, lookup, tile_lists = kernel_inputs(metadata, spec, consumers.mosaic_tiling(spec))
    short, long = tile_lists
    assert short.split is not None
    assert (np.diff(short.split.indptr) <= 1).all()

    def attend(*tile_lists: TileList):
        options = {"page_size": 64, "scale": 0.1, "logits_soft_cap": None, "windowed": True}
        k_flat, v_flat = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        return kernel.ragged_attention(
            q, k_flat, v_flat, visible, lookup, tile_lists,
            sinks=sinks_of(spec), interpret=SIMULATED, **options,
        )  # fmt: skip

    expected = attend(short._replace(split=None), long)
    monkeypatch.setattr(mosaic_parts, "MAX_PROGRAMS", 2)
    num_tiles = long.tiles.seq.shape[0]
    got = attend(short, long._replace(order=jnp.arange(num_tiles, dtype=jnp.int32)[::-1]))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", kernel.HEAD_DIMS)
@pytest.mark.parametrize("page_size", [8, 16, 64, None])
@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 8, 16])
def test_agrees_with_xla_everywhere(group_size, page_size, head_dim):
    for options in ({}, {"sliding_window": 33}, {"logits_soft_cap": 30.0}):
        for workload in ODD if page_size else ODD[:1]:
            check(workload, layer(group_size, 1, head_dim, **options), page_size)


def test_a_number_of_tokens_that_no_tile_divides():
    spec = layer(2, 1)
    problem = Problem.draw(Workload("odd", (5, 6), (0, 0), ""), spec)
    got, _ = simulated(spec)(*inputs(problem, spec, None, "float16", Bucket(11, 2)))
    np.testing.assert_allclose(np.asarray(got, np.float64), problem.expected(spec), atol=5e-3)


class _Marked:
    """A barrier, or one of several, that the functions below recognise."""

    def __init__(self, real):
        self.real = real

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return _Marked(self.real.at[index])


def forget_to_wait(monkeypatch, role: str, barrier: str) -> None:
    """One role does not wait for a barrier."""
    real_role, real_wait, real_arrive = getattr(kernel, role), plgpu.barrier_wait, plgpu.barrier_arrive

    def act(*args):
        *others, barriers = args
        real_role(*others, barriers._replace(**{barrier: _Marked(getattr(barriers, barrier))}))

    monkeypatch.setattr(kernel, role, act)
    monkeypatch.setattr(plgpu, "barrier_wait", lambda b: None if isinstance(b, _Marked) else real_wait(b))
    monkeypatch.setattr(
        plgpu, "barrier_arrive", lambda b: real_arrive(b.real if isinstance(b, _Marked) else b)
    )


def release_too_early(monkeypatch, ready: str, free: str) -> None:
    """Consumers release a stage when it has arrived, before they have read it."""
    real_consume: Any = kernel._consume
    real_wait, real_arrive = plgpu.barrier_wait, plgpu.barrier_arrive
    free_of = {}

    def consume(*args):
        *others, barriers = args
        marks = {name: _Marked(getattr(barriers, name)) for name in (ready, free)}
        free_of["stage"] = getattr(barriers, free)
        real_consume(*others, barriers._replace(**marks))

    def wait(barrier):
        if not isinstance(barrier, _Marked):
            return real_wait(barrier)
        real_wait(barrier.real)
        (index,) = barrier.real.transforms[-1].indices
        return real_arrive(free_of["stage"].at[index])

    monkeypatch.setattr(kernel, "_consume", consume)
    monkeypatch.setattr(plgpu, "barrier_wait", wait)
    monkeypatch.setattr(plgpu, "barrier_arrive", lambda b: None if isinstance(b, _Marked) else real_arrive(b))


def forget_to_commit(monkeypatch) -> None:
    """What the threads wrote is not made visible to the copy engine and the tensor cores."""
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)


def forget_to_wait_for_copies(monkeypatch) -> None:
    """The second half of a partial result is written while the first may be on its way out."""
    real_copy, real_wait, copies = mosaic_parts.copy_tokens, plgpu.wait_smem_to_gmem, itertools.count()

    def copy(*args):
        forgets = next(copies) == 1  # of a result, and of two halves
        monkeypatch.setattr(plgpu, "wait_smem_to_gmem", (lambda n: None) if forgets else real_wait)
        real_copy(*args)

    monkeypatch.setattr(mosaic_parts, "copy_tokens", copy)


# Each with the queries and keys that show it: a stage is used twice, or once. A single query's are split.
MISTAKES = {
    "none": (lambda monkeypatch: None, 70, 320),
    "keys are released before they are read": (
        functools.partial(release_too_early, ready="k_ready", free="k_free"),
        70,
        320,
    ),
    "values are released before they are read": (
        functools.partial(release_too_early, ready="v_ready", free="v_free"),
        70,
        320,
    ),
    "keys are read before they arrive": (
        functools.partial(forget_to_wait, role="_consume", barrier="k_ready"),
        70,
        170,
    ),
    "values are read before they arrive": (
        functools.partial(forget_to_wait, role="_consume", barrier="v_ready"),
        70,
        170,
    ),
    "writes are not committed": (forget_to_commit, 70, 170),
    "none, with split keys": (lambda monkeypatch: None, 1, 90),
    "partial results are overwritten": (forget_to_wait_for_copies, 1, 90),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_race_detector_sees_mistakes(mistake, monkeypatch, caplog, capsys):
    make, num_tokens, num_keys = MISTAKES[mistake]
    make(monkeypatch)
    spec = layer(1, 1)
    if num_tokens == 1:
        spec = split_at(64, layer(1, 1, scale=0.5), monkeypatch)
    problem = Problem.draw(Workload("one tile", (num_tokens,), (num_keys - num_tokens,), ""), spec)
    args = inputs(problem, spec, 64, "bfloat16", Bucket(num_tokens, 1))
    jax.block_until_ready(mosaic.attend(*args, spec, interpret=REPORTED)[0])
    report = caplog.text + capsys.readouterr().out
    assert ("RACE DETECTED" in report) == (not mistake.startswith("none"))


TARGET = {"platforms": ["cuda"], "disabled_checks": [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]}


def count_kernels(spec: AttentionSpec, page_size: int | None) -> int:
    """Kernels in the program that is exported for a GPU."""
    args = inputs(Problem.draw(ODD[0], spec), spec, page_size, "bfloat16")
    attend = jax.jit(functools.partial(attention, spec=spec, sinks=sinks_of(spec), implementation="mosaic"))
    return export.export(attend, **TARGET)(*args).mlir_module().count("custom_call @mosaic_gpu_v2")


@pytest.mark.parametrize(
    ("head_dim", "page_size", "window"),
    [(64, 8, None), (80, 128, None), (96, None, None), (128, 128, 40), (128, 8, 600), (256, None, 40)],
)
def test_is_exported_for_cuda_from_anywhere(head_dim, page_size, window):
    spec = layer(10, 2, head_dim, sliding_window=window, logits_soft_cap=5.0, sinks=True)
    # For short queries, to merge them if they are split, and for long ones. Neither the keys of a short
    # window are split, nor those of a batch that has no more than one unit.
    assert count_kernels(spec, page_size) == (2 if window == 40 or page_size is None else 3)


def test_is_exported_with_64_bit_types_enabled(monkeypatch):
    monkeypatch.setattr(mosaic_parts, "MAX_PROGRAMS", 2)
    with jax.enable_x64(True):
        assert count_kernels(layer(2, 1), 16) == 3


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
    assert kernel.obstacle(**possible) is None
    assert reason in kernel.obstacle(**(possible | options))


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
