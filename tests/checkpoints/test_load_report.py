"""Loading models: when programs compile, where leaves go, what is checked, and what is reported."""

import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_checkpoints as tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxattn import compute_logits, generate
from jaxattn.checkpoints import (
    MANIFEST,
    CheckpointError,
    abstract_params,
    config_from_dict,
    load_model,
    load_params,
    reading,
    save_params,
    write_manifest,
)
from jaxattn.cli.main import run
from jaxattn.models import CompiledSteps, init_params
from jaxattn.serving import plan_generation

TREE = tiny.random_tree(tiny.LLAMA)
NUM_PARAMS = sum(leaf.size for leaf in jax.tree.leaves(TREE))
CONFIG = config_from_dict(tiny.LLAMA)
PROMPTS = [[1, 5, 9], [7], [2] * 11]
PLAN = plan_generation([len(prompt) for prompt in PROMPTS], 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_msgpack(tmp_path_factory.mktemp("loaded"), tiny.LLAMA, TREE)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, buckets=[PLAN])


def test_the_report_of_an_overlapped_load(model):
    found = model.report
    assert found.format == "msgpack"
    assert found.num_params == NUM_PARAMS
    assert found.bytes_read == found.result_bytes == 4 * NUM_PARAMS
    assert found.programs == ("empty_cache", "prefill", "decode")
    assert 0 < found.reading_seconds < found.seconds
    assert 0 < found.compiling_seconds < found.seconds
    assert found.peak_host_bytes is None or found.peak_host_bytes > 0


@pytest.mark.smoke
def test_what_is_run_was_compiled_while_loading(model):
    compiled = dict(model.compiled.programs)
    assert len(compiled) == 3
    generate(model, PROMPTS, 4)
    assert model.compiled.programs == compiled


def test_lazy_programs_compile_when_they_are_used(folder, model):
    lazy = load_model(folder, buckets=[PLAN], compile="lazy", dtype="bfloat16")
    assert lazy.report.programs == ()
    assert lazy.report.compiling_seconds == 0
    assert lazy.report.bytes_read == 2 * lazy.report.result_bytes
    compute_logits(lazy, PROMPTS)
    assert lazy.compiled.names == ("score",)


def test_a_model_without_programs(folder, model):
    bare = load_model(folder, buckets=[PLAN], compile="none")
    assert bare.report.programs == ()
    jax.tree.map(np.testing.assert_array_equal, bare.params, model.params)
    with pytest.raises(ValueError, match="'score' is not compiled, and compile='none' was asked for"):
        compute_logits(bare, PROMPTS)


def test_a_mode_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match="unknown compile='eager'; use one of 'overlap', 'lazy', 'none'"):
        load_model(tmp_path, compile="eager")


def test_a_bucket_that_fails_ends_the_reading(folder, monkeypatch):
    read = []

    def slowly(self, names):
        for i in range(1000):
            read.append(i)
            time.sleep(0.01)
            yield "lm_head/kernel", jnp.zeros((24, 61))

    def fail(compiled: CompiledSteps) -> None:
        raise RuntimeError("no such backend")

    monkeypatch.setattr("jaxattn.checkpoints.formats.msgpack.MsgpackWeights.read", slowly)
    with pytest.raises(RuntimeError, match="no such backend"):
        load_model(folder, buckets=[fail])
    assert len(read) < 900


@pytest.mark.smoke
def test_a_second_start_compiles_nothing(folder, tmp_path):
    cache_dir = tmp_path / "compiled"
    before = {name: getattr(jax.config, name) for name in dir(jax.config) if "cache" in name}
    jax.clear_caches()
    first = load_model(folder, buckets=[PLAN], cache_dir=cache_dir)
    assert first.report.cache_hits == 0
    assert first.report.cache_misses >= 2 + 5  # two programs, and what converts leaves of five kinds
    jax.clear_caches()
    second = load_model(folder, buckets=[PLAN], cache_dir=cache_dir)
    assert second.report.cache_misses == 0
    assert second.report.cache_hits == first.report.cache_misses
    assert generate(second, PROMPTS, 4) == generate(first, PROMPTS, 4)
    assert before == {name: getattr(jax.config, name) for name in dir(jax.config) if "cache" in name}


def test_threads_may_load_with_different_folders(folder, tmp_path, model):
    """Each model's programs are in its folder, those that convert too, and JAX's setting is as before."""
    before = {name: getattr(jax.config, name) for name in dir(jax.config) if "cache" in name}
    folders = [tmp_path / name for name in ("one", "two")]
    dtypes = ("float32", "bfloat16")

    def load(i: int):
        return load_model(folder, dtype=dtypes[i], buckets=[PLAN], cache_dir=folders[i])

    jax.clear_caches()
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(load, range(2))
    assert before == {name: getattr(jax.config, name) for name in dir(jax.config) if "cache" in name}
    names = [sorted(file.name.split("-")[0] for file in kept.glob("*-cache")) for kept in folders]
    assert names[0] == names[1]
    assert {"jit_prefill", "jit_decode", "jit_convert"} <= set(names[0])
    assert generate(first, PROMPTS, 4) == generate(model, PROMPTS, 4)
    assert len(generate(second, PROMPTS, 4)) == len(PROMPTS)


def test_lazy_programs_are_cached_too(folder, tmp_path):
    def start():
        jax.clear_caches()
        model = load_model(folder, compile="lazy", cache_dir=tmp_path / "compiled")
        before = len(os.listdir(tmp_path / "compiled"))
        compute_logits(model, PROMPTS)
        return len(os.listdir(tmp_path / "compiled")) - before

    assert start() > 0
    assert start() == 0


def shardings(params):
    return jax.tree.map(lambda leaf: leaf.sharding, params)


@pytest.mark.smoke
def test_leaves_are_where_programs_expect_them(folder, model):
    assert shardings(model.params) == shardings(abstract_params(CONFIG, "float32"))
    assert set(jax.tree.leaves(shardings(model.params))) == {SingleDeviceSharding(jax.devices()[0])}
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    placed = load_model(folder, mesh=mesh, buckets=[PLAN])
    assert shardings(placed.params) == shardings(abstract_params(CONFIG, "float32", mesh))
    assert generate(placed, PROMPTS, 4) == generate(model, PROMPTS, 4)
    assert len(placed.compiled.programs) == 3


def test_heads_and_features_are_divided_and_nothing_else():
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = Mesh(devices, ("data", "model"))
    (layer, _), whole = abstract_params(CONFIG, "float32", mesh)["layers"], PartitionSpec()
    specs = {name: leaf.sharding.spec for name, leaf in layer.items()}
    heads = PartitionSpec(None, "model")
    assert specs == {
        "attention_norm": whole, "q": heads, "k": heads, "v": heads, "o": PartitionSpec("model"),
        "mlp_norm": whole, "gate": heads, "up": heads, "down": PartitionSpec("model"),
    }  # fmt: skip
    params = abstract_params(CONFIG, "float32", Mesh(devices, ("a", "b")))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(params))


TWO_DEVICES = """
import sys
import jax
import numpy as np
from jaxattn import generate, load_model, plan_generation
from jaxattn.models import Model

path, prompts = sys.argv[1], [[1, 5, 9], [7], [2] * 11]
plan = plan_generation([3, 1, 11], 6)
mesh = jax.make_mesh((2,), ("model",))
model = load_model(path, mesh=mesh, buckets=[plan], cache_dir=sys.argv[2])
layer = model.params["layers"][0]
assert layer["q"].addressable_shards[0].data.shape == (24, 2, 8), layer["q"].sharding
assert layer["down"].addressable_shards[1].data.shape == (20, 24), layer["down"].sharding
assert len(model.params["embed"].addressable_shards) == 2
expected = generate(load_model(path), prompts, 6)
assert generate(model, prompts, 6) == expected
assert generate(Model.from_params(model.config, model.params), prompts, 6) == expected
assert generate(model, prompts, 6, cache_dtype="int8", implementation="reference")
print(model.report.cache_hits, model.report.cache_misses)
"""


@pytest.mark.slow
def test_two_devices_and_two_processes(folder, tmp_path):
    """Divided among two devices the tokens are the same, and a second process compiles nothing."""
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TWO_DEVICES, str(folder), str(tmp_path / "compiled")]
    counts = [
        [
            int(word)
            for word in subprocess.run(command, env=flags, capture_output=True, check=True).stdout.split()
        ]
        for _ in range(2)
    ]
    (hits, misses), (hits_again, misses_again) = counts
    assert (hits, misses_again) == (0, 0)
    assert hits_again == misses > 7


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(bad, tmp_path):
    tree = jax.tree.map(np.copy, TREE)
    tree["model"]["layers"]["1"]["mlp"]["up_proj"]["kernel"][3, 5] = bad
    tree["lm_head"]["kernel"][0, 60] = bad
    folder = tiny.write_msgpack(tmp_path, tiny.LLAMA, tree)
    load_params(folder)
    with pytest.raises(CheckpointError) as caught:
        load_params(folder, check_finite=True)
    first, *named = str(caught.value).splitlines()
    assert first == "the weights have NaN or infinite numbers, as float32, in:"
    assert sorted(map(str.strip, named)) == [
        "head, from lm_head/kernel",
        "layers.1.up, from model/layers/1/mlp/up_proj/kernel",
    ]


def test_numbers_too_large_for_the_asked_dtype(tmp_path):
    tree = jax.tree.map(np.copy, TREE)
    tree["model"]["norm"]["weight"][7] = 1e6
    folder = tiny.write_msgpack(tmp_path, tiny.LLAMA, tree)
    load_params(folder, check_finite=True)
    with pytest.raises(CheckpointError, match=r"as float16, in:\n  final_norm, from model/norm/weight$"):
        load_params(folder, check_finite=True, dtype="float16")


@pytest.fixture
def saved(model, tmp_path):
    save_params(tmp_path / "saved", model.params, model.config)
    return tmp_path / "saved"


def error_of(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(path, verify=True)
    return str(caught.value)


def test_saved_parameters_verify_and_are_plain_orbax(saved, model):
    for path in (saved, saved / "params"):
        jax.tree.map(np.testing.assert_array_equal, load_params(path, verify=True), model.params)
    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(saved / "params")
    jax.tree.map(np.testing.assert_array_equal, plain, TREE)


def test_a_flipped_bit_is_found(saved):
    file = max(saved.glob("params/**/d/*"), key=lambda file: file.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert f"\n  changed: {file.relative_to(saved)}" in error_of(saved)


def test_files_that_are_missing_or_were_added(saved):
    (saved / "config.json").unlink()
    (saved / "params/added").write_bytes(b"")
    (saved / "notes.txt").write_text("no weights")
    message = error_of(saved)
    assert message.splitlines()[1:] == ["  not in the manifest: params/added", "  missing: config.json"]


def test_shards_that_were_added(tmp_path):
    tiny.write_sharded_safetensors(tmp_path, tiny.LLAMA, tiny.random_tensors(tiny.LLAMA))
    assert write_manifest(tmp_path) == tmp_path / MANIFEST
    load_params(tmp_path / "model.safetensors.index.json", verify=True)
    (tmp_path / "model-00004-of-00004.safetensors").write_bytes(b"")
    assert "not in the manifest: model-00004-of-00004.safetensors" in error_of(tmp_path)


def test_a_manifest_that_is_none(folder, tmp_path, capsys):
    assert f"no {MANIFEST} for" in error_of(folder)
    tiny.write_msgpack(tmp_path, tiny.LLAMA, TREE)
    for content in ("{", "[]", '{"files": 3}', '{"files": [1]}'):
        (tmp_path / MANIFEST).write_text(content)
        assert f"{MANIFEST} is no manifest" in error_of(tmp_path)
    for name in ("../x", "/etc/passwd", "a/../../x"):
        (tmp_path / MANIFEST).write_text(json.dumps({"files": {name: ""}}))
        assert "only files beside it are read" in error_of(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        write_manifest(tmp_path / MANIFEST)
    assert run(["logits", str(folder), "--prompt-ids", "1", "--out", str(tmp_path / "x"), "--verify"]) == 2
    assert f"no {MANIFEST} for" in capsys.readouterr().err


def test_parameters_that_do_not_fit_are_not_saved(model, tmp_path):
    other = init_params(jax.random.key(0), config_from_dict(tiny.LLAMA | {"head_dim": 16}))
    with pytest.raises(CheckpointError) as caught:
        save_params(tmp_path / "saved", other, model.config)
    assert "layers.0.q is (24, 4, 16), the config needs (24, 4, 8)" in str(caught.value)
    with pytest.raises(CheckpointError, match="head is None, the config needs"):
        save_params(tmp_path / "saved", {**model.params, "head": None}, model.config)
    assert not (tmp_path / "saved").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_shown_on_a_terminal_when_it_takes_long(folder, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    load_params(folder)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(reading, "_SHOWN_AFTER", 0.0)
    with reading.reading_bar(2_000_000) as advance:
        time.sleep(0.3)
        advance(1_000_000)
        time.sleep(0.3)
    assert "reading weights" in terminal.getvalue()
    assert "1.0/2.0 MB" in terminal.getvalue()


def test_no_bar_in_a_file(folder, monkeypatch, capsys):
    monkeypatch.setattr(reading, "_SHOWN_AFTER", 0.0)
    load_params(folder)
    assert capsys.readouterr().err == ""
