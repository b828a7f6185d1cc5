"""The Mosaic GPU kernels in the simulator of the GPU: inputs, comparisons, and mistakes to be seen.

A race, a wait that never ends and a read of what was never written all fail a test.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu
from oracle import Problem, attend_dense_with_lse
from tolerances import assert_as_good_as

from jaxattn import AttentionSpec, Bucket, attention, prepare_metadata
from jaxattn.attention import mosaic
from jaxattn.attention.kernel_inputs import kernel_inputs
from jaxattn.measuring.workloads import ODD, Workload, nest_workload
from jaxattn.metadata import consumers
from jaxattn_kernels.arrays import Tiles
from jaxattn_kernels.mosaic_gpu import plain_rows, program

# Clocks of copies and products are kept per simulated engine, in turn: with the default of five, two
# warpgroups come to share one, which hides a race now and then.
SIMULATED = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)
# A race raises, or is logged if asked for; before jax 0.12 it was printed, and nothing else.
RAISES = hasattr(SIMULATED, "on_race")
REPORTED = dataclasses.replace(SIMULATED, **({"on_race": "warn"} if RAISES else {}))
# One bucket, hence one program per layer, for all small workloads.
SMALL, SLOTS = Bucket(160, 5), 640


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
"""Layers by what is particular about them, with a page size and a dtype: for Hopper, there and back."""


def sinks_of(spec: AttentionSpec) -> jax.Array | None:
    """Some below all logits, some above."""
    return jnp.linspace(-9, 9, spec.num_q_heads, dtype=jnp.float32) if spec.sinks else None


def inputs(
    problem: Problem,
    spec: AttentionSpec,
    page_size: int | None,
    dtype: str,
    bucket: Bucket = SMALL,
    *,
    slots: int | None = SLOTS,
    readers: tuple[str, ...] = ("mosaic", "xla"),
):
    """Queries, keys, values and metadata; whatever belongs to nobody is NaN."""
    if page_size is None:
        batch = nest_workload(problem.workload, bucket=bucket)
        k, v = (problem.packed(x, bucket.tokens) for x in (problem.k, problem.v))
    else:
        num_pages = slots and max(slots, sum(problem.workload.kv_lens)) // page_size + bucket.seqs
        tables, k, v = problem.pages(page_size, num_pages=num_pages)
        bucket = dataclasses.replace(bucket, pages=len(k))
        batch = nest_workload(problem.workload, page_tables=tables, page_size=page_size, bucket=bucket)
    q, k, v = (jnp.asarray(x, dtype) for x in (problem.packed(problem.q, bucket.tokens), k, v))
    return q, k, v, prepare_metadata(batch, spec, consumers=readers)


@functools.lru_cache(maxsize=4)
def simulated(spec: AttentionSpec, capability: str | None = None):
    return jax.jit(
        functools.partial(
            mosaic.attend, spec=spec, sinks=sinks_of(spec), interpret=SIMULATED, capability=capability
        )
    )


@functools.lru_cache(maxsize=4)
def plain(spec: AttentionSpec):
    return jax.jit(
        functools.partial(attention, spec=spec, sinks=sinks_of(spec), implementation="xla", return_lse=True)
    )


def check(
    workload: Workload,
    spec: AttentionSpec,
    page_size: int | None,
    dtype: str = "bfloat16",
    bucket: Bucket = SMALL,
    *,
    slots: int | None = SLOTS,
    capability: str | None = None,
    growth: float = 1,
) -> None:
    """As precise as XLA; 0 and -inf in the padding.

    Args:
        workload: Lengths of the sequences.
        spec: The layer.
        page_size: Tokens per page, or None for packed keys.
        dtype: Element type.
        bucket: Room for them.
        slots: Room for keys in pages, at least; None for as much as they need.
        capability: Compute capability of the GPU.
        growth: How much longer the last keys are than the first.
    """
    problem = Problem.draw(workload, spec)
    for k in problem.k:
        k *= np.linspace(1, growth, len(k), dtype=np.float32)[:, None, None]
    # What the dtype can represent: rounding the inputs is no error of the kernel's.
    problem = dataclasses.replace(
        problem,
        **{x: [np.asarray(jnp.asarray(a, dtype), np.float32) for a in getattr(problem, x)] for x in "qkv"},
    )
    args = inputs(problem, spec, page_size, dtype, bucket, slots=slots)
    (got, got_lse), (out, lse) = (
        [np.asarray(x, np.float64) for x in f(*args)] for f in (simulated(spec, capability), plain(spec))
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


def split_at(split_keys: int, spec: AttentionSpec, monkeypatch) -> AttentionSpec:
    """A layer that no other test may use: what it asks of the metadata is remembered."""
    monkeypatch.setattr(consumers, "SPLIT_KEYS", split_keys)
    assert consumers.mosaic_tiling(spec).split_keys == split_keys
    return spec


def check_what_does_not_change_a_bit(kernel: Any, monkeypatch) -> None:
    """A unit that is its whole tile, the order of tiles, and how many of them a program serves."""
    spec = layer(2, 1, sinks=True, sliding_window=600)
    problem = Problem.draw(Workload("mixed", (1, 70, 2), (20, 0, 1), ""), spec)
    q, k, v, metadata = inputs(problem, spec, 64, "bfloat16", Bucket(76, 3))
    visible, lookup, tile_lists = kernel_inputs(metadata, spec, consumers.mosaic_tiling(spec))
    short, long = tile_lists
    assert short.split is not None
    assert (np.diff(short.split.indptr) <= 1).all()

    def attend(*tile_lists: Tiles):
        options = {"page_size": 64, "scale": 0.1, "logits_soft_cap": None, "windowed": True}
        k_flat, v_flat = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        return kernel.ragged_attention(
            q, k_flat, v_flat, visible, lookup, tile_lists,
            sinks=sinks_of(spec), interpret=SIMULATED, **options,
        )  # fmt: skip

    expected = attend(dataclasses.replace(short, split=None), long)
    monkeypatch.setattr(program, "MAX_MOSAIC_PROGRAMS", 2)
    backwards = jnp.arange(long.seq.shape[0], dtype=jnp.int32)[::-1]
    got = attend(short, dataclasses.replace(long, order=backwards))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


# Mistakes, which the race detector has to see.


class Marked:
    """A barrier, or one of several, that the functions below recognise."""

    def __init__(self, real):
        self.real = real

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return Marked(self.real.at[index])


def mark(kernel: Any, role: str, barriers: tuple[str, ...], monkeypatch) -> None:
    """Let one role of a kernel have marked barriers."""
    real_role = getattr(kernel, role)

    def act(*args, **options):
        *others, real = args
        marked = real._replace(**{name: Marked(getattr(real, name)) for name in barriers})
        real_role(*others, marked, **options)

    monkeypatch.setattr(kernel, role, act)


def forget_to_wait(kernel: Any, role: str, barrier: str, monkeypatch) -> None:
    """One role does not wait for a barrier."""
    wait, arrive, copy = plgpu.barrier_wait, plgpu.barrier_arrive, plgpu.copy_gmem_to_smem

    def real(barrier):
        return barrier.real if isinstance(barrier, Marked) else barrier

    mark(kernel, role, (barrier,), monkeypatch)
    monkeypatch.setattr(plgpu, "barrier_wait", lambda b: None if isinstance(b, Marked) else wait(b))
    monkeypatch.setattr(plgpu, "barrier_arrive", lambda b: arrive(real(b)))
    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", lambda source, place, b: copy(source, place, real(b)))


def release_too_early(kernel: Any, role: str, ready: str, free: str, monkeypatch) -> None:
    """Consumers release a stage when it has arrived, before they have read it."""
    real_wait, real_arrive = plgpu.barrier_wait, plgpu.barrier_arrive
    real_consume = getattr(kernel, role)
    free_of = {}

    def consume(*args, **options):
        free_of["stage"] = getattr(args[-1], free).real
        real_consume(*args, **options)

    def wait(barrier):
        if not isinstance(barrier, Marked):
            return real_wait(barrier)
        real_wait(barrier.real)
        (index,) = barrier.real.transforms[-1].indices
        return real_arrive(free_of["stage"].at[index])

    monkeypatch.setattr(kernel, role, consume)
    mark(kernel, role, (ready, free), monkeypatch)
    monkeypatch.setattr(plgpu, "barrier_wait", wait)
    monkeypatch.setattr(plgpu, "barrier_arrive", lambda b: None if isinstance(b, Marked) else real_arrive(b))


def forget_to_call(name: str, monkeypatch) -> None:
    """What was written or read is not settled before others hear of it."""
    monkeypatch.setattr(plgpu, name, lambda: None)


def forget_to_wait_for_copies(monkeypatch) -> None:
    """The second half of a partial result is written while the first may be on its way out."""
    real_copy, real_wait, copies = plain_rows.copy_tokens, plgpu.wait_smem_to_gmem, itertools.count()

    def copy(*args):
        forgets = next(copies) == 1  # of a result, and of two halves
        monkeypatch.setattr(plgpu, "wait_smem_to_gmem", (lambda n: None) if forgets else real_wait)
        real_copy(*args)

    monkeypatch.setattr(plain_rows, "copy_tokens", copy)


def races(attend: Callable[[], Any], caplog, capsys) -> bool:
    """Whether races are reported of what is attended with `REPORTED`."""
    jax.block_until_ready(attend())
    return "RACE DETECTED" in caplog.text + capsys.readouterr().out


def count_kernels(
    attend: Callable[..., Any],
    spec: AttentionSpec,
    page_size: int | None,
    readers: tuple[str, ...] = ("mosaic",),
) -> int:
    """Kernels in the program that is exported for a GPU."""
    args = inputs(Problem.draw(ODD[0], spec), spec, page_size, "bfloat16", readers=readers)
    function = jax.jit(functools.partial(attend, spec=spec, sinks=sinks_of(spec)))
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(function, platforms=["cuda"], disabled_checks=checks)(*args)
    return exported.mlir_module().count("custom_call @mosaic_gpu_v2")
