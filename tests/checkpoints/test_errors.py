"""Bad checkpoints: one error that says everything, and nothing else."""

import copy
import json

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import tiny_checkpoints as tiny
from fixtures.archive import read_archive
from flax import serialization

from jaxattn.checkpoints import CheckpointError, load_config, load_model, load_params
from jaxattn.checkpoints.errors import summarize

TREE = tiny.random_tree(tiny.LLAMA)


@pytest.fixture
def tree():
    return copy.deepcopy(TREE)


@pytest.fixture(params=["msgpack", "orbax"])
def write(request, tmp_path):
    """Writes a tree in one of the formats and returns the folder."""

    def write(tree, config=tiny.LLAMA):
        if request.param == "msgpack":
            return tiny.write_msgpack(tmp_path, config, tree)
        tiny.save_standard(tiny.write_config(tmp_path, config) / "params", tree)
        return tmp_path

    return write


def error_of(path, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(path, **kwargs)
    return str(caught.value)


def test_all_disagreements_are_listed_at_once(write, tree):
    layer = tree["model"]["layers"]["1"]
    del layer["self_attn"]["q_proj"]
    layer["self_attn"]["k_proj"]["bias"] = np.zeros(16, np.float32)
    layer["mlp"]["up_proj"]["kernel"] = layer["mlp"]["up_proj"]["kernel"].T
    tree["model"]["norm"]["weight"] = np.ones(24, np.int8)
    del tree["lm_head"]
    message = error_of(write(tree))
    for part in (
        "missing: model/layers/1/self_attn/q_proj/kernel (24, 32)"
        " = (hidden_size, num_attention_heads*head_dim)",
        "missing: lm_head/kernel (24, 61) = (hidden_size, vocab_size), as tie_word_embeddings is false",
        "unused: model/layers/1/self_attn/k_proj/bias",
        "shape: model/layers/1/mlp/up_proj/kernel is stored as (40, 24) (transposed?)"
        ", the config needs (24, 40)",
        "dtype: model/norm/weight is stored as int8",
    ):
        assert part in message
    assert len(message.splitlines()) == 6


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers(layers, write, tree):
    message = error_of(write(tree, tiny.LLAMA | {"num_hidden_layers": layers}))
    assert f"the weights have 2 layers, num_hidden_layers={layers}" in message


def test_claims_of_the_config_cost_nothing(write, tree):
    """Shapes are compared before anything of the claimed size exists."""
    message = error_of(write(tree, tiny.LLAMA | {"vocab_size": 10**12}))
    assert "embedding is stored as (61, 24), the config needs (1000000000000, 24)" in message


def test_two_spellings_of_one_leaf(write, tree):
    tree["model"]["norm"]["scale"] = tree["model"]["norm"]["weight"]
    assert "more than one norm/weight: model/norm/" in error_of(write(tree))


def test_a_leaf_that_is_no_array(write, tree):
    tree["model"]["norm"]["weight"] = 1
    assert "shape: model/norm/weight is stored as ()" in error_of(write(tree))


def test_a_dtype_that_cannot_be_loaded_in(write, tree):
    folder = write(tree)
    for dtype in ("int8", "float64", "bf16", jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match="use one of 'float32', 'bfloat16', 'float16'"):
            load_model(folder, dtype=dtype)


def test_float64_needs_a_dtype(write):
    folder = write(jax.tree.map(lambda x: x.astype(np.float64), TREE))
    assert "stored as float64; give dtype='float32'" in error_of(folder)
    np.testing.assert_array_equal(load_params(folder, dtype="float32")["head"], TREE["lm_head"]["kernel"])


def test_nothing_there(tmp_path):
    assert "does not exist" in error_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is an empty folder" in error_of(tmp_path / "empty")
    assert "no checkpoint at" in error_of(tiny.write_config(tmp_path, tiny.LLAMA))
    assert "no checkpoint at" in error_of(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model-00001-of-00002.bin", "pickle, which runs code"),
        ("model.pt", "pickle, which runs code"),
    ],
)
def test_other_formats_are_refused_unopened(name, message, tmp_path):
    file = tiny.write_config(tmp_path, tiny.LLAMA) / name
    file.write_bytes(b"never opened")
    assert message in error_of(tmp_path)
    assert message in error_of(file)


def test_two_checkpoints_in_a_folder(tmp_path):
    tiny.write_msgpack(tmp_path, tiny.LLAMA, TREE)
    tiny.save_standard(tmp_path / "params", TREE)
    tiny.save_standard(tmp_path / "best", TREE)
    message = error_of(tmp_path)
    assert "more than one checkpoint; give the path of one" in message
    assert [line.rpartition("/")[2] for line in message.splitlines()[1:]] == [
        "best",
        "params",
        "flax_model.msgpack",
    ]


def test_no_config(tmp_path):
    tiny.save_standard(tmp_path / "a/b/params", TREE)
    message = error_of(tmp_path / "a/b")
    assert all(
        f"{folder}" in message for folder in (tmp_path / "a/b", tmp_path / "a/b/params", tmp_path / "a")
    )
    tiny.write_config(tmp_path, tiny.LLAMA)
    assert f"holds a config.json: give '{tmp_path}'" in error_of(tmp_path / "a/b")


def test_the_item_of_a_step_instead_of_its_run(tmp_path):
    tiny.save_steps(tiny.write_config(tmp_path / "run", tiny.LLAMA), {10: TREE})
    message = error_of(tmp_path / "run/10/default")
    assert f"run/10 is a step folder; its parent holds a config.json: give '{tmp_path / 'run'}'" in message
    with pytest.raises(CheckpointError, match="is a step folder"):
        load_config(tmp_path / "run/10/default")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00garbage",
        serialization.msgpack_serialize(TREE)[:-1000],
        serialization.msgpack_serialize(TREE) + b"more",
        serialization.msgpack_serialize([TREE["lm_head"]["kernel"]]),
        b"\x81\xa1a" * 2000,
    ],
)
def test_damaged_msgpack(content, tmp_path):
    folder = tiny.write_config(tmp_path, tiny.LLAMA)
    (folder / "flax_model.msgpack").write_bytes(content)
    assert "flax_model.msgpack is " in error_of(folder)


pack = msgpack.Packer().pack


def ndarray(*content, after: bytes = b"") -> bytes:
    """A file of one array that is written in any way."""
    return pack({"a": msgpack.ExtType(1, pack(content) + after)})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ndarray([-1, 4], "float32", b""), "an array's shape is [-1, 4]"),
        (ndarray(["2"], "float32", b""), "an array's shape is ['2']"),
        (ndarray([1], "U4", bytes(16)), "an array's dtype is 'U4'"),
        (ndarray([1], "object", bytes(8)), "an array's dtype is 'object'"),
        (ndarray([2**40], "float32", bytes(8)), "is not as long as it says"),
        (ndarray([2], "float32", bytes(4)), "is not as long as it says"),
        (ndarray([2], "float32", bytes(8), after=b"x"), "is not as long as it says"),
        (ndarray([2], "float32"), "is not written as shape, dtype and bytes"),
        (b"\xdf\xff\xff\xff\xff", "ends in the middle of a value"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "ends in the middle of an array"),
        (b"\x82\xa1a\x01\xa1a\x01", "a key is 'a': no name, or one that is there twice"),
        (b"\x81\xc3\x01", "a key is True: no name"),
        (b"\xc1", "the byte 0xc1 at 0 begins nothing"),
        (pack({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}}}), "no pieces"),
        (
            pack({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": 1}}}),
            "lacks some",
        ),
    ],
)
def test_msgpack_that_says_what_cannot_be(content, reason, tmp_path):
    (tiny.write_config(tmp_path, tiny.LLAMA) / "flax_model.msgpack").write_bytes(content)
    message = error_of(tmp_path)
    assert "flax_model.msgpack is truncated, or no Flax msgpack file: " in message
    assert reason in message


@pytest.mark.parametrize("name", ["../secret.msgpack", "/etc/passwd", "sub/shard.msgpack", "..", "", 3])
def test_an_index_chooses_no_file_elsewhere(name, tmp_path):
    folder = tiny.write_sharded(tmp_path, tiny.LLAMA, TREE)
    (folder / "flax_model.msgpack.index.json").write_text(
        json.dumps({"weight_map": {"lm_head/kernel": name}})
    )
    assert "only files beside it are read" in error_of(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": {}}}'])
def test_a_damaged_index(content, tmp_path):
    folder = tiny.write_sharded(tmp_path, tiny.LLAMA, TREE)
    (folder / "flax_model.msgpack.index.json").write_text(content)
    assert "is not an index with a weight_map" in error_of(folder)


def test_shards_that_are_missing_or_overlap(tmp_path):
    folder = tiny.write_sharded(tmp_path, tiny.LLAMA, TREE)
    first, second = (folder / f"flax_model-0000{i}-of-00002.msgpack" for i in (1, 2))
    second.write_bytes(first.read_bytes())
    assert "holds again what an earlier file held: model/" in error_of(folder)
    second.unlink()
    assert f"{second.name} is missing beside it" in error_of(folder)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [truncate, lambda file: file.unlink()])
@pytest.mark.parametrize("pattern", ["_METADATA", "manifest.ocdbt", "d/*", "ocdbt.process_0/d/*"])
def test_damaged_ocdbt(pattern, damage, tmp_path):
    folder = tiny.write_config(tmp_path, tiny.LLAMA) / "params"
    tiny.save_standard(folder, TREE)
    for file in [file for file in folder.glob(pattern) if file.stat().st_size]:
        damage(file)
    message = error_of(tmp_path)
    assert str(folder) in message
    assert len(message) < 1000


@pytest.mark.parametrize("damage", [truncate, lambda file: file.unlink()])
@pytest.mark.parametrize("file", [".zarray", "0.0"])
def test_damaged_zarr(file, damage, tmp_path):
    folder = tiny.write_config(tmp_path, tiny.LLAMA) / "params"
    tiny.save_no_ocdbt(folder, TREE)
    damage(folder / "lm_head.kernel" / file)
    message = error_of(tmp_path)
    assert str(folder) in message
    assert len(message) < 1000


@pytest.mark.parametrize("key", ["/tmp/elsewhere", "../elsewhere", "a\0b"])
def test_an_array_outside_the_folder_is_not_followed(key, tmp_path):
    folder = tiny.write_config(tmp_path, tiny.LLAMA) / "params"
    tiny.save_no_ocdbt(folder, TREE)
    metadata = json.loads((folder / "_METADATA").read_text())
    entry = next(entry for entry in metadata["tree_metadata"].values() if len(entry["key_metadata"]) == 2)
    entry["key_metadata"] = [{"key": key, "key_type": 2}]
    (folder / "_METADATA").write_text(json.dumps(metadata))
    assert "names an array outside its folder" in error_of(tmp_path)


def test_a_shape_claimed_by_the_metadata_is_compared_first(tmp_path):
    folder = tiny.write_config(tmp_path, tiny.LLAMA) / "params"
    tiny.save_no_ocdbt(folder, TREE)
    file = folder / "lm_head.kernel" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [2**20, 2**23]}))
    assert "lm_head/kernel is stored as (1048576, 8388608), the config needs (24, 61)" in error_of(tmp_path)


def test_errors_of_libraries_are_kept_short():
    dump = ValueError('NOT_FOUND: no "x" [tensorstore_spec=' + "x" * 5000)
    outer = RuntimeError("first line\nsecond line")
    outer.__cause__ = dump
    assert summarize(outer) == 'RuntimeError: first line (ValueError: NOT_FOUND: no "x")'


def claim_huge_chunks(file):
    """In zarr 2 and in zarr 3, the chunks of an array a million times as long as it is."""
    metadata = json.loads(file.read_bytes())
    chunks = metadata["chunk_grid"]["configuration"] if "chunk_grid" in metadata else metadata
    name = "chunk_shape" if "chunk_grid" in metadata else "chunks"
    chunks[name][0] *= 10**6
    file.write_text(json.dumps(metadata))


def test_chunks_far_larger_than_their_array_are_refused_before_they_are_read(tree, tmp_path):
    """A chunk takes as much memory as it claims, and the process ends where there is not so much."""
    tiny.save_no_ocdbt(tiny.write_config(tmp_path / "zarr", tiny.LLAMA) / "params", tree)
    claim_huge_chunks(tmp_path / "zarr" / "params" / "lm_head.kernel" / ".zarray")
    read_archive("orbax_0_2_manager", tmp_path / "old")
    claim_huge_chunks(tmp_path / "old" / "7" / "state" / "params.lm_head.kernel" / ".zarray")
    for folder in ("zarr", "old"):
        message = error_of(tmp_path / folder)
        assert "lm_head" in message
        assert "is stored in chunks of" in message
