"""Tuning on the device at hand, with small batches, and with candidates that fail."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import choose_implementation
from jaxattn.attention import mosaic
from jaxattn.attention.choice import describe_device
from jaxattn.attention.choice_table import Device, Layer, parse_table
from jaxattn.measuring import tune as module
from jaxattn.measuring.timing import Measured
from jaxattn.measuring.tune import TunePlan, default_plan, tune
from jaxattn.measuring.workloads import GPU_TUNING, ODD, TUNING, Workload

PLAN = TunePlan(
    dtypes=("float32",),
    head_dims=(16,),
    page_sizes=(16,),
    num_q_heads=2,
    num_kv_heads=1,
    implementations=("xla", "reference"),
    workloads={"decode": (ODD[2],), "prefill": ()},
    repeats=2,
)
TINY = Workload("tiny", (1,), (4,), "")
LAYER = Layer("decode", "float32", "float32", 16, 16)


def rows_of(plan: TunePlan) -> list[dict]:
    return tune(plan).document["runs"][0]["rows"]


def test_a_table_that_can_be_followed():
    announced = []
    tuned = tune(PLAN, announce=announced.append)
    assert announced == [f"{LAYER}: decode: xla", f"{LAYER}: decode: reference"]
    assert tuned.unserved == {}
    table = parse_table(json.dumps(tuned.document), "own.json")
    (fact,) = table.facts
    assert fact.matches(LAYER, describe_device())
    assert fact.medians_ms["decode"].keys() == {"xla", "reference"}
    assert fact.provenance["clock"] == "host"
    assert fact.provenance["heads"] == "2/1"
    choice = choose_implementation(PLAN.spec(LAYER), page_size=16, phase="decode", table=table)
    assert choice.implementation == fact.implementation
    assert "own.json runs[0].rows[0]" in choice.reason


@pytest.fixture
def fake(monkeypatch):
    """Replaces how long candidates take, and what they compute: a constant, or an error."""

    def replace(times: dict[str, float], outputs: dict[str, float | Exception] | None = None):
        traced = []

        def attend(q, *args, implementation, **scales):
            traced.append(implementation)
            out = (outputs or {}).get(implementation, 1.0)
            if isinstance(out, Exception):
                raise out
            return jnp.full_like(q, out)

        def measure(program, *args, repeats):
            return Measured(1e-3 * times[traced[-1]], (), "device")

        monkeypatch.setattr(module, "attention", attend)
        monkeypatch.setattr(module, "measure", measure)

    return replace


def test_the_fastest_is_chosen(fake):
    fake({"xla": 3.0, "reference": 1.0})
    (row,) = rows_of(PLAN)
    assert row["implementation"] == "reference"
    assert row["medians_ms"] == {"decode": {"xla": 3.0, "reference": 1.0}}
    assert "left_out" not in row


def test_of_equals_the_first_in_the_order_is_chosen(fake):
    fake({"xla": 1.02, "reference": 1.0})
    (row,) = rows_of(PLAN)
    assert row["implementation"] == "xla"


@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_a_candidate_that_disagrees_with_the_definition_is_left_out(fake, wrong):
    fake({"xla": 1.0, "reference": 3.0}, {"xla": wrong})
    (row,) = rows_of(PLAN)
    assert row["implementation"] == "reference"
    assert row["medians_ms"] == {"decode": {"reference": 3.0}}
    assert row["left_out"]["xla"].startswith("decode: its outputs differ from those of reference by ")


def test_rounding_is_no_disagreement(fake):
    fake({"xla": 1.0, "reference": 3.0}, {"xla": 1.0001})
    (row,) = rows_of(PLAN)
    assert row["implementation"] == "xla"


def test_a_candidate_that_fails_is_left_out(fake):
    fake({"xla": 1.0}, {"reference": MemoryError("70 GB\nand a long tale")})
    (row,) = rows_of(PLAN)
    assert row["implementation"] == "xla"
    assert row["left_out"] == {"reference": "decode: MemoryError: 70 GB"}


def test_failing_on_one_workload_is_failing(fake):
    """Candidates are compared on all workloads of a phase, or not at all."""
    fake({"xla": 1.0, "reference": 3.0}, {"xla": 1.5})
    plan = dataclasses.replace(PLAN, workloads={"decode": (ODD[2], TINY), "prefill": ()})
    (row,) = rows_of(plan)
    assert row["medians_ms"] == {"decode": {"reference": 3.0}, "tiny": {"reference": 3.0}}


def test_a_candidate_with_an_obstacle_is_not_run(fake):
    fake({"xla": 1.0})
    (row,) = rows_of(dataclasses.replace(PLAN, implementations=("mosaic", "xla")))
    assert row["left_out"] == {"mosaic": "dtype float32 is not one of bfloat16, float16"}
    assert row["implementation"] == "xla"


def test_layers_that_nothing_serves_have_no_row(fake):
    fake({})
    tuned = tune(dataclasses.replace(PLAN, implementations=("mosaic",)))
    assert tuned.document["runs"][0]["rows"] == []
    assert list(tuned.unserved) == [LAYER]


def test_packed_keys_have_no_decode_and_no_context():
    plan = dataclasses.replace(PLAN, page_sizes=(None, 8), workloads=TUNING)
    layers = {(layer.phase, layer.page_size): workloads for layer, workloads in plan.layers().items()}
    assert set(layers) == {("prefill", None), ("prefill", 8), ("decode", 8)}
    assert not any(any(w.context_lens) for w in layers["prefill", None])
    assert any(any(w.context_lens) for w in layers["prefill", 8])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_quantised_cache_is_measured_too(dtype):
    plan = dataclasses.replace(PLAN, cache_dtypes=(dtype,), page_sizes=(16, None))
    table = parse_table(json.dumps(tune(plan).document), "own.json")
    assert [fact.kv_dtype for fact in table.facts] == [("float32",), (dtype,)]
    quantised = LAYER._replace(kv_dtype=dtype)
    assert [fact.matches(quantised, describe_device()) for fact in table.facts] == [False, True]
    assert table.facts[1].medians_ms["decode"].keys() == {"xla", "reference"}, "they agree"
    choice = choose_implementation(
        plan.spec(quantised), kv_dtype=dtype, page_size=16, phase="decode", table=table
    )
    assert choice.implementation == table.facts[1].implementation
    assert "own.json runs[0].rows[1]" in choice.reason


def test_what_is_measured_of_a_quantised_cache():
    """Pages of the cache's type whose largest number is the largest there is, in every head."""
    layer = LAYER._replace(kv_dtype="int8")
    q, k, v, _, scales = module._draw(ODD[2], PLAN.spec(layer), layer, ("xla",))
    assert (q.dtype, k.dtype, v.dtype) == ("float32", "int8", "int8")
    assert int(jnp.abs(k.astype("float32")).max()) == 127
    assert scales["k_scale"].shape == scales["v_scale"].shape == (1,)


def test_a_kernel_that_cannot_read_a_quantised_cache_is_left_out(fake):
    fake({"xla": 1.0})
    plan = dataclasses.replace(
        PLAN, dtypes=("bfloat16",), cache_dtypes=("int8",), implementations=("mosaic", "xla")
    )
    row = rows_of(plan)[1]
    assert row["left_out"] == {"mosaic": mosaic.unsupported_reason(
        plan.spec(LAYER), "bfloat16", "int8", 16, capability="that of a cpu"
    )}  # fmt: skip
    assert row["implementation"] == "xla"


def test_only_pages_are_quantised():
    plan = dataclasses.replace(PLAN, cache_dtypes=("int8",), page_sizes=(None, 8), workloads=TUNING)
    assert {(layer.kv_dtype, layer.page_size) for layer in plan.layers()} == {
        ("float32", None),
        ("float32", 8),
        ("int8", 8),
    }


@pytest.mark.parametrize("workloads", [TUNING, GPU_TUNING], ids=["cpu", "gpu"])
def test_decode_workloads_decode(workloads):
    assert all(set(w.q_lens) == {1} for w in workloads["decode"])
    assert all(max(w.q_lens) > 1 for w in workloads["prefill"])


def test_candidates_by_device():
    hopper = default_plan(Device("gpu", "NVIDIA H200", "9.0"))
    assert hopper.implementations == ("triton", "mosaic", "xla")
    assert hopper.dtypes == ("bfloat16",)
    assert default_plan(Device("gpu", "NVIDIA B200", "10.0")).implementations == hopper.implementations
    assert default_plan(Device("gpu", "NVIDIA A100", "8.0")).implementations == ("triton", "xla")
    assert default_plan(Device("cpu")).implementations == ("xla", "reference")


def test_provenance_of_a_gpu(monkeypatch):
    client = types.SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    device = types.SimpleNamespace(platform="gpu", client=client)
    monkeypatch.setattr(module, "default_device", lambda: device)
    monkeypatch.setattr(module, "_output", lambda *command: "999.1\n999.1" if "smi" in command[0] else None)
    facts = module._provenance()
    assert (facts["driver"], facts["runtime"], facts["commit"]) == ("999.1", "PJRT C API cuda 13000", None)
