"""The GPU harness where there is no GPU: its counts, and that it finds a kernel that is wrong."""

import importlib.util

import gpu
import jax.numpy as jnp
import numpy as np
import pytest
import torch_baselines

from jaxattn.measuring.workloads import ODD, Workload

OPTIONS = {
    "group": 2,
    "head_dim": 64,
    "page_size": 16,
    "dtype": "bfloat16",
    "sliding_window": None,
    "logits_soft_cap": None,
    "sinks": True,
    "causal": True,
}


def test_a_right_kernel_passes():
    results = list(gpu.check_options(OPTIONS, (ODD[2],)))
    assert [result["kind"] for result in results] == ["correctness", "gradient"] * len(gpu.KERNELS)
    assert all(result["ok"] for result in results)
    assert results[1]["error_over_bound"].keys() == {"q", "k", "v", "sinks"}


def test_a_wrong_gradient_fails(monkeypatch):
    right = gpu.go_back

    def wrong(problem, spec, implementation):
        gradients = right(problem, spec, implementation)
        return [*gradients[:3], gradients[3] * (1.1 if implementation in gpu.KERNELS else 1)]

    monkeypatch.setattr(gpu, "go_back", wrong)
    outcomes = {result["kind"]: result["ok"] for result in gpu.check_options(OPTIONS, (ODD[2],))}
    assert outcomes == {"correctness": True, "gradient": False}


@pytest.mark.parametrize("part", [0, 1])
def test_a_wrong_kernel_fails(monkeypatch, part):
    right = gpu.attend

    def wrong(problem, spec, implementation):
        results = list(right(problem, spec, implementation))
        if implementation in gpu.KERNELS:
            results[part] = results[part].at[3].multiply(1.1)
        return tuple(results)

    monkeypatch.setattr(gpu, "attend", wrong)
    results = gpu.check_options(OPTIONS, (ODD[2],))
    assert not any(result["ok"] for result in results if result["kind"] == "correctness")


def test_options_are_sampled_without_repeats():
    sample = gpu.sample_options(200)
    assert len({tuple(options.items()) for options in sample}) == 200
    for name, values in gpu.OPTIONS.items():
        assert {options[name] for options in sample} == set(values)


@pytest.mark.parametrize(("window", "causal"), [(None, True), (5, True), (None, False)])
def test_pairs_and_bytes(window, causal):
    workload = Workload("w", (3, 1, 9), (4, 20, 0), "")
    case = gpu.SpeedCase("c", workload, sliding_window=window, causal=causal)
    pairs, keys = 0, 0
    for q_len, kv_len in zip(workload.q_lens, workload.kv_lens, strict=True):
        position, key = np.arange(kv_len - q_len, kv_len)[:, None], np.arange(kv_len)
        sees = (key <= position) | (not causal)
        if window is not None:
            sees &= key > position - window
        pairs += sees.sum()
        keys += sees.any(axis=0).sum()
    assert gpu.pairs_of(case) == pairs
    assert gpu.bytes_of(case) == 2 * 128 * (2 * keys * 8 + 2 * 13 * 32)


def test_every_case_has_the_smallest_bucket():
    names = [case.name for case in gpu.speed_cases()]
    assert len(set(names)) == len(names)
    for case in gpu.speed_cases():
        assert gpu.bucket_of(case).tokens == sum(case.workload.q_lens)


def test_cases_cover_what_is_claimed():
    cases = gpu.speed_cases()
    equal = [(case, *case.shapes.equal_lens) for case in cases if case.shapes.equal_lens]
    prefill = [(n, case.causal) for case, q, n in equal if q == n and case.sliding_window is None]
    assert {(512 * 2**i, causal) for i in range(7) for causal in (True, False)} <= set(prefill)
    decode = {(len(case.workload.q_lens), n) for case, q, n in equal if q == 1}
    assert {(64, 8192), (1, 8192), (32, 4096), *((64, 32 * 2**i) for i in range(6))} <= decode
    for is_decode in True, False:
        sizes = {case.page_size for case, q, _ in equal if (q == 1) == is_decode}
        assert {8, 16, 32, 64, 128} <= sizes
        assert any(case.sliding_window for case, q, _ in equal if (q == 1) == is_decode)
    ragged = [case.workload for case in cases if not case.shapes.equal_lens]
    assert any(set(workload.q_lens) == {1} for workload in ragged)
    assert any(1 in workload.q_lens and max(workload.q_lens) > 1 for workload in ragged)
    assert any(min(workload.q_lens) > 1 for workload in ragged)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch_it_is_no_candidate():
    for case in gpu.quick_cases():
        assert list(torch_baselines.candidates(case.shapes, sets=1)) == []


@pytest.mark.slow
def test_a_candidate_that_fails_is_recorded(monkeypatch):
    def broken():
        raise ImportError("no kernel for this GPU")

    monkeypatch.setattr(torch_baselines, "candidates", lambda shapes, sets: [("broken", broken)])
    limits = {"bf16_flops_per_s": 1e12, "copy_bytes_per_s": 1e12}
    *_, result, metadata = gpu.time_case(gpu.quick_cases()[1], limits, repeats=1, rotated=False)
    assert result["error"] == "ImportError: no kernel for this GPU"
    assert metadata["kind"] == "metadata"


def test_what_no_sequence_owns_is_poisoned():
    case = gpu.quick_cases()[0]
    problem = gpu.draw(case.workload, case.spec, 16, "float32", gpu.bucket_of(case))
    assert int(jnp.isnan(problem.k[..., 0, 0]).sum()) == problem.k.shape[0] * 16 - 2 * 600
