"""safetensors: what is read, and bad files, which are refused before anything is allocated."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as tiny
from safetensors.numpy import save_file

from jaxattn.checkpoints import CheckpointError, load_model, load_params
from jaxattn.checkpoints.layouts.rows import Layout, LeafRow
from jaxattn.checkpoints.opening import open_checkpoint
from jaxattn.checkpoints.reading import read_params
from jaxattn.models import DecoderConfig

TENSORS = tiny.random_tensors(tiny.LLAMA)
FUSED = tiny.random_tensors(tiny.FAMILIES["Phi-3"])


def error_of(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(path)
    return str(caught.value)


def file_of(header, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape, offsets, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        file_of({"a": entry([2], [0, 8])}, bytes(4)),
        file_of({"a": entry([2], [0, 8])}, bytes(12)),
        file_of({"a": entry([2], [0, 8])}, bytes(8), length=2**60),
        file_of({"a": entry([2], [0, 8])}, bytes(8), length=10**6),
        file_of({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, bytes(12)),
        file_of({"a": entry([2], [0, 8]), "b": entry([2], [12, 20])}, bytes(20)),
        file_of({"a": entry([2], [8, 0])}, bytes(8)),
        file_of({"a": entry([-2], [0, 8])}, bytes(8)),
        file_of({"a": entry([3], [0, 8])}, bytes(8)),
        file_of({"a": entry([2**62, 8], [0, 8])}, bytes(8)),
        file_of({"a": entry([2**40], [0, 2**42])}, bytes(8)),
        file_of({"a": entry([2], [0, 8], "X32")}, bytes(8)),
        file_of({"a": entry([2], None)}, bytes(8)),
        file_of([1]),
        file_of(b"{nope"),
        file_of(b"[" * 100_000),
    ],
)
def test_damaged_files_are_named(content, tmp_path):
    (tiny.write_config(tmp_path, tiny.LLAMA) / "model.safetensors").write_bytes(content)
    message = error_of(tmp_path)
    assert f"{tmp_path / 'model.safetensors'} is truncated, or no safetensors file: " in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("dtype", "size"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("I8", 1), ("I64", 8), ("BOOL", 1)]
)
def test_other_numbers_are_refused_by_name(dtype, size, tmp_path):
    tiny.write_config(tmp_path, tiny.LLAMA)
    header = {"model.norm.weight": entry([24], [0, 24 * size], dtype)}
    (tmp_path / "model.safetensors").write_bytes(file_of(header, bytes(24 * size)))
    assert f"dtype: model.norm.weight is stored as {dtype}; integer or quantized" in error_of(tmp_path)


def test_all_disagreements_are_listed_at_once(tmp_path):
    tensors = dict(TENSORS)
    del tensors["model.layers.1.self_attn.q_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].T.copy()
    message = error_of(tiny.write_safetensors(tmp_path, tiny.LLAMA, tensors))
    for part in (
        "missing: model.layers.1.self_attn.q_proj.weight (32, 24)"
        " = (num_attention_heads*head_dim, hidden_size)",
        "missing: lm_head.weight (61, 24) = (vocab_size, hidden_size), as tie_word_embeddings is false",
        "unused: model.layers.0.self_attn.q_norm.weight",
        "shape: model.layers.1.mlp.up_proj.weight is stored as (24, 40) (transposed?)"
        ", the config needs (40, 24)",
    ):
        assert part in message
    assert len(message.splitlines()) == 5


def test_fused_leaves_are_checked_as_a_whole_and_named_once(tmp_path):
    config = tiny.FAMILIES["Phi-3"] | {"num_key_value_heads": 4}
    message = error_of(tiny.write_safetensors(tmp_path, config, FUSED))
    wanted = (
        "num_attention_heads*head_dim+num_key_value_heads*head_dim+num_key_value_heads*head_dim, hidden_size"
    )
    lines = [line for line in message.splitlines() if "layers.0.self_attn.qkv_proj.weight" in line]
    assert lines == [
        "  shape: model.layers.0.self_attn.qkv_proj.weight is stored as (48, 24), "
        f"the config needs (72, 24) = ({wanted})"
    ]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/shard.safetensors"])
def test_an_index_chooses_no_file_elsewhere(name, tmp_path):
    folder = tiny.write_sharded_safetensors(tmp_path, tiny.LLAMA, TENSORS)
    index = json.dumps({"weight_map": {"lm_head.weight": name}})
    (folder / "model.safetensors.index.json").write_text(index)
    assert "only files beside it are read" in error_of(folder)


def test_shards_that_are_missing_overlap_or_have_no_index(tmp_path):
    folder = tiny.write_sharded_safetensors(tmp_path, tiny.LLAMA, TENSORS)
    first, second = (folder / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert "holds again what an earlier file held: " in error_of(folder)
    second.unlink()
    assert f"{second.name} is missing beside it" in error_of(folder)
    second.write_bytes(kept)
    (folder / "model.safetensors.index.json").unlink()
    assert "nor a model.safetensors.index.json that lists them" in error_of(folder)


def test_a_link_to_a_shard_is_followed(tmp_path):
    """As the cache of Hugging Face's hub stores files."""
    folder = tiny.write_safetensors(tmp_path / "a", tiny.LLAMA, TENSORS)
    file = folder / "model.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    np.testing.assert_array_equal(load_params(folder)["embed"], TENSORS["model.embed_tokens.weight"])


def test_a_file_that_changes_before_it_is_read(tmp_path):
    folder = tiny.write_safetensors(tmp_path, tiny.LLAMA, TENSORS)
    checkpoint = open_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        read_params(checkpoint)


def test_mixed_dtypes_in_one_file(tmp_path):
    """Each array by its own dtype, whatever the others have."""
    dtypes = ("float16", "bfloat16", "float32", "float64")
    tensors = {name: t.astype(jnp.dtype(dtypes[i % 4])) for i, (name, t) in enumerate(TENSORS.items())}
    params = load_params(tiny.write_safetensors(tmp_path, tiny.LLAMA, tensors), dtype="float32")
    q = tensors["model.layers.1.self_attn.q_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["layers"][1]["q"], q.T.reshape(24, 4, 8))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_any_file_by_its_own_name(tmp_path):
    tiny.write_config(tmp_path, tiny.LLAMA)
    save_file(TENSORS, tmp_path / "best.safetensors")
    assert load_model(tmp_path / "best.safetensors").compiled.dtype == jnp.float32
    assert "give the path of the one to load" in error_of(tmp_path)


CONFIG = DecoderConfig(
    vocab_size=7, hidden_size=6, intermediate_size=5, num_layers=1, num_q_heads=4, num_kv_heads=2, head_dim=2
)

HALVED_PLUS_1 = (("scale", 0.5), ("add", 1.0))


@pytest.mark.parametrize(
    ("row", "stored", "wanted"),
    [
        (LeafRow("", "kv_einsum/w[1]", "2 k d h -> d k h"), (2, 2, 6, 2), lambda x: x[1].transpose(1, 0, 2)),
        (LeafRow("", "gating_einsum[0]", "2 f d -> d f"), (2, 5, 6), lambda x: x[0].T),
        (LeafRow("", "qkv[1]", "(n h + k h + k h) d -> d k h"), (16, 6),
         lambda x: x[8:12].T.reshape(6, 2, 2)),
        (LeafRow("", "qkv[2]", "d (n h + k h + k h) -> d k h"), (6, 16),
         lambda x: x[:, 12:].reshape(6, 2, 2)),
        (LeafRow("", "w", "(n h) -> n h", HALVED_PLUS_1), (8,), lambda x: x.reshape(4, 2) / 2 + 1),
    ],
)  # fmt: skip
def test_what_tables_can_say(row, stored, wanted):
    layout = Layout.of(row, CONFIG)
    assert layout.stored_shape == stored
    array = jnp.arange(np.prod(stored), dtype=jnp.float32).reshape(stored)
    np.testing.assert_array_equal(layout.to_decoder(array), wanted(np.asarray(array)))
    if "[" not in row.source:
        np.testing.assert_array_equal(layout.to_stored(layout.to_decoder(array)), array)
