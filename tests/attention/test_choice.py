"""What `auto` stands for: tables of measured facts, read, matched and followed, on made-up devices."""

import copy
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import AttentionSpec, Bucket, attention, choose_implementation, prepare_metadata
from jaxattn.attention import choice as choice_module
from jaxattn.attention import reference as reference_module
from jaxattn.attention import xla as xla_module
from jaxattn.attention.choice import TIE, describe_device, fastest
from jaxattn.attention.choice_table import (
    PREFERENCE,
    Device,
    Layer,
    format_table,
    packaged_table,
    parse_table,
    read_table,
)
from jaxattn.attention.dispatch import phase_of
from jaxattn.attention.implementations import IMPLEMENTATIONS
from jaxattn.attention.support import unsupported_reason
from jaxattn.measuring.workloads import ODD, nest_workload, random_page_tables

SPEC = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
H200 = {"platform": "gpu", "kind": "NVIDIA H200", "compute_capability": "9.0"}
FACTS = {
    "date": "2031-05-06",
    "jaxattn": "7.8.9",
    "jax": "1.2.3",
    "commit": "0123456789abcdef",
    "driver": "999.88",
    "heads": "32/8",
}
ROW = {
    "phase": "decode",
    "dtype": "bfloat16",
    "kv_dtype": "bfloat16",
    "head_dim": 128,
    "page_size": 16,
    "implementation": "xla",
    "medians_ms": {"a": {"xla": 1.0, "triton": 2.0}, "b": {"xla": 3.0, "triton": 24.0}},
}
DECODE = {"dtype": "bfloat16", "page_size": 16, "phase": "decode"}
"""The call that `ROW` answers. Made-up figures, of no device."""


def document(*rows: dict, device: dict = H200) -> dict:
    return {"jaxattn_choices": 1, "runs": [{"device": device, "provenance": FACTS, "rows": list(rows)}]}


def table_of(*rows: dict, device: dict = H200):
    return parse_table(json.dumps(document(*rows, device=device)), "own.json")


def mosaic_row(**changes) -> dict:
    return {**ROW, "implementation": "mosaic", "medians_ms": {"a": {"mosaic": 1.0, "triton": 2.0}}, **changes}


@pytest.fixture
def on(monkeypatch):
    """Pretends that the default device is another one, the first of its platform."""

    def pretend(platform="gpu", kind="NVIDIA H200", capability: str | None = "9.0"):
        device = types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
        monkeypatch.setattr(choice_module, "default_device", lambda: device)
        names = ("gpu", "cuda") if platform == "gpu" else (platform,)
        monkeypatch.setattr(choice_module, "first_device", lambda name: device if name in names else None)

    return pretend


@pytest.mark.smoke
class TestChoose:
    def test_the_reason_cites_the_fact(self, on):
        on()
        choice = choose_implementation(SPEC, **DECODE, table=table_of(ROW))
        assert choice.implementation == "xla"
        assert choice.reason == (
            "xla is 4 times as fast as triton, the runner-up, in decode (a, b), measured on NVIDIA H200, "
            "driver 999.88, 32/8 heads on 2031-05-06 at commit 0123456789ab, jaxattn 7.8.9, jax 1.2.3: "
            "own.json runs[0].rows[0]"
        )

    @pytest.mark.parametrize(
        "changes",
        [
            {"phase": "prefill"},
            {"dtype": "float16", "kv_dtype": "bfloat16"},
            {"kv_dtype": "int8"},
            {"page_size": 32},
            {"page_size": None},
        ],
        ids=str,
    )
    def test_another_layer_follows_the_default_rule(self, on, changes):
        on()
        choice = choose_implementation(SPEC, **{**DECODE, **changes}, table=table_of(ROW))
        assert choice.implementation == "triton"
        assert choice.reason.startswith(f"no measurement for {changes.get('phase', 'decode')} in ")
        assert "on this device: the default rule takes triton, since" in choice.reason

    def test_another_head_dim(self, on):
        on()
        spec = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=64)
        choice = choose_implementation(spec, **DECODE, table=table_of(ROW))
        assert "no measurement for decode in bfloat16, head dim 64, page size 16" in choice.reason

    @pytest.mark.parametrize(
        "other", [("gpu", "NVIDIA H200", "9.1"), ("gpu", "NVIDIA H100", "9.0"), ("gpu", "NVIDIA H200", None)]
    )
    def test_another_device(self, on, other):
        on(*other)
        choice = choose_implementation(SPEC, **DECODE, table=table_of(ROW))
        assert choice.implementation == "triton"
        assert choice.reason.startswith("no measurement for this device: the default rule takes triton")

    def test_without_a_measurement_on_an_old_gpu(self, on):
        on(capability="7.5")
        choice = choose_implementation(SPEC, **DECODE)
        assert choice.implementation == "xla"
        assert "the default rule takes xla, since the Triton kernel cannot serve this layer" in choice.reason
        assert "7.5 is below 8.0" in choice.reason

    def test_a_row_may_stand_for_any_kind(self, on):
        on(kind="NVIDIA H100")
        table = table_of(ROW, device={"platform": "gpu", "kind": None, "compute_capability": "9.0"})
        assert choose_implementation(SPEC, **DECODE, table=table).implementation == "xla"

    def test_a_row_may_stand_for_several_layers(self, on):
        on()
        table = table_of({**ROW, "head_dim": [64, 128], "page_size": [None, 16], "dtype": ["bfloat16"]})
        assert choose_implementation(SPEC, **DECODE, table=table).implementation == "xla"
        assert (
            choose_implementation(SPEC, dtype="bfloat16", phase="decode", table=table).implementation == "xla"
        )

    def test_the_first_row_counts(self, on):
        on()
        reference = {**ROW, "implementation": "reference", "medians_ms": {"a": {"reference": 1}}}
        choice = choose_implementation(SPEC, **DECODE, table=table_of(reference, ROW))
        assert choice.implementation == "reference"
        assert choice.reason.startswith("reference was the only candidate in decode (a), measured on")

    def test_mosaic_by_a_table_of_the_users(self, on):
        on()
        assert choose_implementation(SPEC, **DECODE).implementation == "triton"
        choice = choose_implementation(SPEC, **DECODE, table=table_of(mosaic_row()))
        assert choice.implementation == "mosaic"

    def test_what_cannot_serve_is_skipped_and_told(self, on):
        on()
        page_12 = {**DECODE, "page_size": 12}
        rows = [mosaic_row(page_size=12), {**ROW, "page_size": 12}]
        choice = choose_implementation(SPEC, **page_12, table=table_of(*rows))
        assert choice.implementation == "xla"
        assert "; mosaic, which own.json runs[0].rows[0] names, cannot serve: page_size=12" in choice.reason
        choice = choose_implementation(SPEC, **page_12, table=table_of(rows[0]))
        assert choice.implementation == "triton"
        assert choice.reason.startswith("mosaic, which own.json runs[0].rows[0] names, cannot serve: page_s")
        assert ": the default rule takes triton, since" in choice.reason

    def test_a_kernel_that_the_device_lacks_is_skipped(self, on):
        on(kind="NVIDIA A100", capability="8.0")
        table = table_of(mosaic_row(), device={"platform": "gpu"})
        choice = choose_implementation(SPEC, **DECODE, table=table)
        assert choice.implementation == "triton"
        assert "it needs an NVIDIA GPU of compute capability 9.0 or 10.x, not 8.0" in choice.reason
        on(kind="NVIDIA B200", capability="10.0")
        assert choose_implementation(SPEC, **DECODE, table=table).implementation == "mosaic"

    def test_times_that_are_equal(self, on):
        on()
        row = {**ROW, "implementation": "triton", "medians_ms": {"a": {"triton": 1.01, "xla": 1.0}}}
        choice = choose_implementation(SPEC, **DECODE, table=table_of(row))
        assert choice.reason.startswith(
            "triton is as fast as xla within 3%, and the first of triton, xla, in"
        )

    def test_another_platform_than_the_default_device_has_no_known_kind(self, on):
        on("cpu", "cpu", None)
        assert describe_device("cuda") == Device("gpu")
        choice = choose_implementation(SPEC, **DECODE, platform="gpu", table=table_of(ROW))
        assert choice.reason.startswith("no measurement for this device")

    def test_unknown_phase(self):
        with pytest.raises(ValueError, match="unknown phase='decoding'; use 'decode' or 'prefill'"):
            choose_implementation(SPEC, phase="decoding")

    def test_quantised_keys_are_another_layer(self, on):
        on()
        int8 = {
            **ROW,
            "kv_dtype": "int8",
            "implementation": "reference",
            "medians_ms": {"a": {"reference": 1}},
        }
        table = table_of(ROW, int8)
        assert choose_implementation(SPEC, **DECODE, table=table).implementation == "xla"
        choice = choose_implementation(SPEC, **DECODE, kv_dtype="int8", table=table)
        assert choice.implementation == "reference"
        choice = choose_implementation(SPEC, **DECODE, kv_dtype="float8_e5m2", table=table)
        assert "no measurement for decode in bfloat16 over float8_e5m2, head dim 128" in choice.reason

    def test_keys_that_are_too_many_for_a_kernel(self):
        layer, device = Layer("decode", "bfloat16", "int8", 128, 16), Device(**H200)
        assert unsupported_reason("triton", SPEC, layer, device) is None
        assert "would overflow" in str(
            unsupported_reason("triton", SPEC, layer, device, kv_elements=2**31 + 1)
        )


class TestTables:
    def test_the_users_stands_before_the_packaged_one(self, tmp_path):
        fact = packaged_table().facts[0]
        layer = {"dtype": fact.dtype[0], "page_size": fact.page_size[0], "phase": fact.phase}
        spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=fact.head_dim[0])
        assert "jaxattn/choices.json" in choose_implementation(spec, **layer, platform="cpu").reason
        row = {**ROW, **layer, "kv_dtype": layer["dtype"], "head_dim": spec.head_dim}
        path = tmp_path / "own.json"
        path.write_text(json.dumps(document(row, device=fact.device._asdict())))
        for table in (path, read_table(path)):
            assert str(path) in choose_implementation(spec, **layer, platform="cpu", table=table).reason

    def test_the_environment_says_nothing(self, tmp_path, monkeypatch):
        """The command line alone reads it (see `tests/cli`)."""
        monkeypatch.setenv("JAXATTN_CHOICES", str(tmp_path / "none.json"))
        assert choose_implementation(SPEC, platform="tpu").implementation == "xla"

    def test_equal_tables_are_one_program(self):
        assert table_of(ROW) == table_of(ROW)
        assert hash(table_of(ROW)) == hash(table_of(ROW))
        assert table_of(ROW) != table_of(mosaic_row())

    @pytest.mark.parametrize(
        ("max_q_len", "page_size", "chosen"), [(1, 16, "reference"), (8, 16, "xla"), (1, 8, "xla")]
    )
    def test_attention_follows_it(self, monkeypatch, max_q_len, page_size, chosen):
        """The phase is the bucket's promise: the very same lengths under another bucket are a prefill."""
        spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=16)
        reference = {"implementation": "reference", "medians_ms": {"a": {"reference": 1.0}}}
        row = {**ROW, **reference, "dtype": "float32", "kv_dtype": "float32", "head_dim": 16}
        numbers = {"reference": 1.0, "xla": 2.0}
        for name, module in (("reference", reference_module), ("xla", xla_module)):
            results = jnp.full((8, 2, 16), numbers[name]), jnp.zeros((8, 2))
            monkeypatch.setattr(module, "attend", lambda *_, results=results, **_options: results)
        page_tables, num_pages = random_page_tables(ODD[2], page_size, np.random.default_rng(0))
        bucket = Bucket(8, 8, num_pages, max_q_len=max_q_len)
        batch = nest_workload(ODD[2], page_tables=page_tables, page_size=page_size, bucket=bucket)
        metadata = prepare_metadata(batch, spec, consumers=("reference", "xla", "triton"))
        assert phase_of(metadata) == ("decode" if max_q_len == 1 else "prefill")
        table = table_of(row, device={"platform": "cpu"})
        q, k = jnp.zeros((8, 2, 16)), jnp.zeros((num_pages, page_size, 1, 16))
        out = jax.jit(lambda q, k: attention(q, k, k, metadata, spec, implementation=table))(q, k)
        assert float(out[0, 0, 0]) == numbers[chosen]


def test_a_table_is_written_with_a_line_per_row():
    content = {"jaxattn_choices": 1, "runs": 2 * document(ROW, mosaic_row())["runs"]}
    text = format_table(content)
    assert json.loads(text) == content
    assert [line.strip()[:8] for line in text.splitlines()].count('{"phase"') == 4


BAD = {
    "top": ([], "is not a JSON object"),
    "version": (("jaxattn_choices", 2), "jaxattn_choices=2 is not 1"),
    "no runs": (("runs", ...), "has no 'runs'"),
    "runs": (("runs", {}), r"runs=\{\} is not a list"),
    "run": (("runs", 0, 3), r"runs\[0\]=3 is not an object"),
    "platform": (
        ("runs", 0, "device", "platform", "cuda"),
        r"runs\[0\].device.platform='cuda' is not one of 'cpu', 'gpu', 'tpu'",
    ),
    "no date": (("runs", 0, "provenance", "date", ...), r"runs\[0\].provenance has no 'date'"),
    "no phase": (("runs", 0, "rows", 0, "phase", ...), r"runs\[0\].rows\[0\] has no 'phase'"),
    "phase": (
        ("runs", 0, "rows", 0, "phase", "mixed"),
        r"runs\[0\].rows\[0\].phase='mixed' is not one of 'decode', 'prefill'",
    ),
    "unknown": (("runs", 0, "rows", 0, "heads", 8), r"rows\[0\] has unknown 'heads' beside phase, dtype"),
    "dtype": (("runs", 0, "rows", 0, "dtype", "float31"), "dtype='float31' is not the name of an element"),
    "dtypes": (("runs", 0, "rows", 0, "dtype", ["bf16"]), r"dtype='bf16' is not the name of an elem"),
    "implementation": (
        ("runs", 0, "rows", 0, "implementation", "flash"),
        r"implementation='flash' is not one of 'triton', 'xla', 'mosaic', 'reference'",
    ),
    "not measured": (("runs", 0, "rows", 0, "implementation", "mosaic"), r"medians_ms.a has no 'mosaic'"),
    "no medians": (("runs", 0, "rows", 0, "medians_ms", {}), "medians_ms names no workload"),
    "candidates": (
        ("runs", 0, "rows", 0, "medians_ms", "b", "triton", ...),
        r"medians_ms.b has the candidates \['xla'\], another workload has \['triton', 'xla'\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_table_that_is_wrong(tmp_path, change, message):
    """Every error names the file, the place, the value and the remedy."""
    content = copy.deepcopy(document(ROW))
    if not change:
        content = change
    else:
        *way, last, value = change
        parent = content
        for step in way:
            parent = parent[step]
        if value is ...:
            del parent[last]
        else:
            parent[last] = value
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"own.json: .*{message}.*; correct it, or write a table with 'jaxa"
    ):
        read_table(path)


@pytest.mark.parametrize(("content", "message"), [(b"{", "is not JSON"), (b"\xff", "is not text in UTF-8")])
def test_a_file_that_is_no_table(tmp_path, content, message):
    path = tmp_path / "own.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"own.json: {message}"):
        read_table(path)


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read.*name a table that 'jaxattn tune' wrote"):
        read_table(tmp_path)


class TestFastest:
    def test_noise_decides_nothing(self):
        just_within, beyond = 1 + TIE, 1 + 1.01 * TIE
        assert fastest({"a": {"xla": 1.0, "triton": just_within}}) == "triton"
        assert fastest({"a": {"xla": 1.0, "triton": beyond}}) == "xla"
        assert fastest({"a": {"mosaic": 1.0, "reference": 1.0}}) == "mosaic"

    def test_workloads_count_alike(self):
        assert fastest({"a": {"xla": 1.0, "triton": 3.0}, "b": {"xla": 2000.0, "triton": 1000.0}}) == "xla"


def test_every_implementation_has_a_place_in_the_order():
    assert set(PREFERENCE) == set(IMPLEMENTATIONS)


class TestPackaged:
    def test_it_claims_no_gpu(self):
        """Until a kernel has run on one. Nor does it name what only a user's own table may choose."""
        facts = packaged_table().facts
        assert facts
        assert {fact.device.platform for fact in facts} == {"cpu"}
        assert "mosaic" not in {fact.implementation for fact in facts}

    def test_it_follows_from_its_figures(self):
        for fact in packaged_table().facts:
            assert fact.implementation == fastest(fact.medians_ms), fact.where

    def test_every_row_is_of_a_commit(self):
        for fact in packaged_table().facts:
            assert len(fact.provenance["commit"]) == 40, fact.where
