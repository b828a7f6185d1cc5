"""Inspecting: everything that is known of a checkpoint, and no weight read."""

import json
from pathlib import Path

import jax
import msgpack
import pytest
import tiny_checkpoints as tiny

from jaxattn.checkpoints import CheckpointError, inspect, load_config
from jaxattn.checkpoints.formats.msgpack import MsgpackWeights
from jaxattn.checkpoints.formats.orbax import OrbaxWeights
from jaxattn.checkpoints.formats.safetensors import SafetensorsWeights
from jaxattn.checkpoints.formats.weights import Leaf
from jaxattn.checkpoints.inspection import fold_layers
from jaxattn.cli.main import run

TENSORS = tiny.random_tensors(tiny.LLAMA)
TREE = tiny.flax_tree(TENSORS)
NUM_PARAMS = sum(tensor.size for tensor in TENSORS.values())


def save_orbax(folder: Path, config: tiny.Config, tree: tiny.Tree) -> Path:
    tiny.save_standard(tiny.write_config(folder, config) / "params", tree)
    return folder


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch):
    def read(self, names: set[str]):
        raise AssertionError("a weight was read")

    for weights in (MsgpackWeights, OrbaxWeights, SafetensorsWeights):
        monkeypatch.setattr(weights, "read", read)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("write", "format_name", "layout", "held"),
    [
        (tiny.write_safetensors, "safetensors", "Hugging Face, torch", TENSORS),
        (tiny.write_sharded_safetensors, "safetensors", "Hugging Face, torch", TENSORS),
        (tiny.write_flax_safetensors, "safetensors", "Hugging Face, Flax", TREE),
        (tiny.write_msgpack, "msgpack", "Hugging Face, Flax", TREE),
        (tiny.write_sharded, "msgpack", "Hugging Face, Flax", TREE),
        (save_orbax, "orbax", "Hugging Face, Flax", TREE),
    ],
)
def test_what_is_known(write, format_name, layout, held, tmp_path):
    found = inspect(write(tmp_path, tiny.LLAMA, held))
    assert (found.format, found.layout, found.family) == (format_name, layout, "llama")
    assert found.config == load_config(tmp_path)
    assert found.problems == ()
    assert len(found.leaves) == len(TENSORS)
    assert found.num_params == NUM_PARAMS
    assert found.num_bytes == 4 * NUM_PARAMS
    assert found.dtypes == {"float32": len(TENSORS)}
    shapes = {leaf.shape for leaf in found.leaves.values()}
    assert shapes == {leaf.shape for leaf in jax.tree.leaves(held)}


def test_no_byte_of_an_array_is_looked_at(tmp_path):
    """2 GiB of a file are a hole: they take no room on disk, and none in memory."""
    size, pack = 2**31, msgpack.Packer().pack
    inner = b"\x93" + pack([2, 2**28]) + pack("float32") + b"\xc6" + size.to_bytes(4, "big")
    array = b"\xc9" + (len(inner) + size).to_bytes(4, "big") + b"\x01" + inner
    head = b"\x81" + pack("lm_head") + b"\x81" + pack("kernel") + array
    with (tmp_path / "flax_model.msgpack").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    found = inspect(tmp_path)
    assert found.leaves == {"lm_head/kernel": Leaf((2, 2**28), "float32")}
    assert found.num_bytes == size


def test_an_optimizer_is_no_parameter(tmp_path):
    found = inspect(save_orbax(tmp_path, tiny.LLAMA, tiny.train_state(TREE)))
    assert found.num_params == NUM_PARAMS
    assert found.num_bytes == 8 * NUM_PARAMS + 8  # twice as many numbers, and a step
    assert found.problems == ()


def test_without_a_config(tmp_path):
    tiny.save_standard(tmp_path / "params", TREE)
    found = inspect(tmp_path)
    assert found.family is None
    assert found.config is None
    assert found.num_params == NUM_PARAMS
    (problem,) = found.problems
    assert problem.startswith("no config.json for the weights")


def test_a_family_that_is_not_supported(tmp_path):
    found = inspect(tiny.write_safetensors(tmp_path, tiny.LLAMA | {"model_type": "mixtral"}, TENSORS))
    assert found.family == "mixtral"
    assert found.num_params == NUM_PARAMS
    (problem,) = found.problems
    assert "model_type='mixtral'; supported are" in problem


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": 3}'])
def test_a_config_that_is_none(content, tmp_path):
    tiny.write_safetensors(tmp_path, tiny.LLAMA, TENSORS)
    (tmp_path / "config.json").write_text(content)
    found = inspect(tmp_path)
    assert (found.family, found.config) == (None, None)
    assert len(found.problems) == 1


def test_weights_that_do_not_fit_the_config(tmp_path):
    found = inspect(tiny.write_safetensors(tmp_path, tiny.LLAMA | {"num_hidden_layers": 3}, TENSORS))
    (problem,) = found.problems
    assert "the weights have 2 layers, num_hidden_layers=3" in problem


def test_a_config_may_be_given(tmp_path):
    config = load_config(tiny.write_config(tmp_path / "elsewhere", tiny.LLAMA))
    tiny.save_standard(tmp_path / "run/params", TREE)
    found = inspect(tmp_path / "run", config)
    assert (found.config, found.problems) == (config, ())


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="is an empty folder"):
        inspect(tmp_path)


def test_bytes_of_numbers_that_cannot_be_loaded(tmp_path):
    header = {
        name: {"dtype": dtype, "shape": [24], "data_offsets": offsets}
        for name, dtype, offsets in (
            ("a", "F8_E4M3", [0, 24]),
            ("b", "I64", [24, 216]),
            ("c", "BOOL", [216, 240]),
        )
    }
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(240))
    found = inspect(tmp_path)
    assert found.num_bytes == 240
    assert found.layout == "own names"


def test_layers_are_folded():
    leaf, other = Leaf((2,), "float32"), Leaf((3,), "float32")
    names = {
        "layers.0.q": leaf,
        "layers.1.q": leaf,
        "layers.2.q": other,
        "layer_0/o": leaf,
        "layer_1/o": leaf,
    }
    names |= {"norm1/scale": leaf, "norm2/scale": leaf, "steps.7": leaf}
    assert fold_layers(names) == {
        ("layers.{i}.q", leaf): 2,
        ("layers.2.q", other): 1,
        ("layer_{i}/o", leaf): 2,
        ("norm1/scale", leaf): 1,
        ("norm2/scale", leaf): 1,
        ("steps.7", leaf): 1,
    }


def test_printed(tmp_path, capsys):
    save_orbax(tmp_path, tiny.LLAMA, TREE)
    assert run(["inspect", str(tmp_path)]) == 0
    folded = capsys.readouterr().out
    words = [line.split() for line in folded.splitlines()]
    assert ["family", "llama"] in words
    assert ["can", "be", "loaded", "yes"] in words
    assert ["model/layers/{i}/mlp/up_proj/kernel", "[24,", "40]", "float32", "2"] in words
    assert "vocab_size=61" in folded
    assert run(["inspect", str(tmp_path), "--all-leaves"]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    for layer in "01":
        assert [f"model/layers/{layer}/mlp/up_proj/kernel", "[24,", "40]", "float32", "1"] in words


def test_printed_as_json(tmp_path, capsys):
    tiny.write_msgpack(tmp_path, tiny.LLAMA | {"model_type": "mixtral"}, TREE)
    assert run(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["family"], found["config"]) == ("msgpack", "mixtral", None)
    assert found["leaves"]["lm_head/kernel"] == {"shape": [24, 61], "dtype": "float32"}
    assert "mixtral" in found["problems"][0]
    config = tiny.write_config(tmp_path / "own", tiny.LLAMA) / "config.json"
    assert run(["inspect", str(tmp_path), "--config", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["config"]["num_kv_heads"] == 2
