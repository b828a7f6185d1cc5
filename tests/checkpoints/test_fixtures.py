"""Checkpoints of other libraries and of old versions, written by those, against the logits beside them."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from fixtures.archive import PROMPTS, read_archive
from flax import serialization

from jaxattn import compute_logits
from jaxattn.batch.bucket import BucketGrid
from jaxattn.checkpoints import CheckpointError, load_params
from jaxattn.checkpoints.opening import open_checkpoint
from jaxattn.checkpoints.reading import read_params
from jaxattn.models import CompiledSteps, DecoderConfig, Model

GRID = BucketGrid(tokens=(32,), max_seqs=8)
NAMES = sorted(file.stem for file in (Path(__file__).parents[1] / "fixtures").glob("*.zip"))
SELDOM = {f"transformers_5_{family}" for family in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")}
"""What others of the same config, or of tests/dense_decoder.py, check every day."""


@functools.cache
def steps_of(config: DecoderConfig) -> CompiledSteps:
    """Compiled once for all checkpoints of a config."""
    return CompiledSteps(config, np.dtype("float32"))


@pytest.mark.smoke
@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in NAMES]
)
def test_logits(name, tmp_path):
    expected = read_archive(name, tmp_path)
    checkpoint = open_checkpoint(tmp_path, dtype="float32")
    config = checkpoint.plan.config
    model = Model(config, read_params(checkpoint), steps_of(config))
    got = compute_logits(model, [list(prompt) for prompt in PROMPTS], grid=GRID)
    for ours, theirs in zip(got, expected, strict=True):
        assert theirs.std() > 0.5
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(folder)
    return str(caught.value)


ZARR = "7/state/params.lm_head.kernel"


@pytest.mark.parametrize("file", [".zarray", "0.0"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:20])])
def test_a_damaged_array_of_an_old_orbax(file, damage, tmp_path):
    read_archive("orbax_0_2_manager", tmp_path)
    damage(tmp_path / ZARR / file)
    message = error_of(tmp_path)
    assert "lm_head" in message
    assert "is missing or damaged" in message
    assert len(message) < 1000


@pytest.mark.parametrize("name", ["orbax_0_3_ocdbt", "orbax_0_2_aggregated", "flax_training"])
def test_a_truncated_file_of_an_old_version(name, tmp_path):
    read_archive(name, tmp_path)
    file = max((f for f in tmp_path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:3000])
    message = error_of(tmp_path)
    assert "is missing or damaged" in message or "is truncated" in message
    assert len(message) < 1000


@pytest.mark.parametrize("place", ["/tmp/elsewhere", "../elsewhere", "a\0b"])
def test_an_old_orbax_leads_nowhere_else(place, tmp_path):
    read_archive("orbax_0_2_manager", tmp_path)
    tree = tmp_path / "7/state/checkpoint"
    damaged = serialization.msgpack_restore(tree.read_bytes())
    damaged["params"]["lm_head"]["kernel"] = f"PLACEHOLDER://{place}"
    tree.write_bytes(serialization.msgpack_serialize(damaged))
    assert "names an array outside its folder" in error_of(tmp_path)


def test_a_shape_that_an_old_orbax_claims_is_compared_first(tmp_path):
    read_archive("orbax_0_2_manager", tmp_path)
    file = tmp_path / ZARR / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [2**20, 2**23]}))
    assert "params/lm_head/kernel is stored as (1048576, 8388608), the config needs (8, 37)" in error_of(
        tmp_path
    )


def test_a_file_checkpoint_of_something_else(tmp_path):
    """TensorFlow has one, too."""
    read_archive("orbax_0_2_aggregated", tmp_path)
    (tmp_path / "state/checkpoint").write_text('model_checkpoint_path: "model.ckpt-7"')
    assert "state/checkpoint is truncated, or no Flax msgpack file" in error_of(tmp_path)


def test_the_newest_of_flax_training(tmp_path):
    read_archive("flax_training", tmp_path)
    wanted = load_params(tmp_path)
    (tmp_path / "checkpoint_10").write_bytes((tmp_path / "checkpoint_7").read_bytes())
    (tmp_path / "checkpoint_7").write_bytes(b"")
    for path in (tmp_path, tmp_path / "checkpoint_10"):
        jax.tree.map(np.testing.assert_array_equal, load_params(path), wanted)
    assert "checkpoint_7 is truncated" in error_of(tmp_path / "checkpoint_7")


def test_leaves_in_chunks(tmp_path, monkeypatch):
    """As flax.serialization cuts leaves of more than 1 GiB."""
    read_archive("flax_training", tmp_path)
    wanted = load_params(tmp_path)
    tree = serialization.msgpack_restore((tmp_path / "checkpoint_7").read_bytes())
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    written = serialization.msgpack_serialize(tree["params"])
    assert b"__msgpack_chunked_array__" in written
    (tmp_path / "a").mkdir()
    (tmp_path / "a/flax_model.msgpack").write_bytes(written)
    (tmp_path / "a/config.json").write_bytes((tmp_path / "config.json").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "a"), wanted)
