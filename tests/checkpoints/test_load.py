"""Loading and saving, over formats, places and ways to write a tree."""

import asyncio
import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator

import dense_decoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny_checkpoints as tiny
import tiny_layouts as layouts
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

from jaxattn import Model, compute_logits
from jaxattn.checkpoints import CheckpointError, load_config, load_model, load_params, save_params
from jaxattn.checkpoints.formats.msgpack import MsgpackWeights
from jaxattn.models import CompiledSteps, abstract_params

PROMPT = [17, 0, 3] * 7
TIED = tiny.LLAMA | {"tie_word_embeddings": True}


@pytest.fixture(scope="module")
def tensors():
    return tiny.random_tensors(tiny.LLAMA)


@pytest.fixture(scope="module")
def tree(tensors):
    return tiny.flax_tree(tensors)


@pytest.fixture(scope="module")
def expected(tree, tmp_path_factory):
    """The parameters of `tree`."""
    return load_params(tiny.write_msgpack(tmp_path_factory.mktemp("expected"), tiny.LLAMA, tree))


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("save", "child"),
    [
        (tiny.save_standard, ""),
        (tiny.save_standard, "anything"),
        (tiny.save_pytree, "params"),
        (tiny.save_no_ocdbt, ""),
        (tiny.save_no_ocdbt, "checkpoint"),
        (tiny.save_zarr3, "model"),
    ],
)
def test_orbax_savers_and_places(save, child, tree, expected, tmp_path):
    save(tmp_path / "checkpoint" / child, tree)
    tiny.write_config(tmp_path / "checkpoint", tiny.LLAMA)
    assert_same(load_params(tmp_path / "checkpoint"), expected)


@pytest.mark.parametrize("item", [None, "state", "params"])
def test_the_newest_step_is_taken(item, tree, expected, tmp_path):
    older = jax.tree.map(np.zeros_like, tree)
    tiny.save_steps(tmp_path / "run", {9: older, 10: tiny.train_state(tree)}, item=item)
    tiny.write_config(tmp_path / "run", tiny.LLAMA)
    for path in (tmp_path / "run", tmp_path / "run" / "10"):
        assert_same(load_params(path), expected)


@pytest.mark.parametrize("where", ["run/10", "run/10/default", "."])
def test_a_config_may_lie_on_the_way(where, tree, expected, tmp_path):
    tiny.save_steps(tmp_path / "run", {10: tree})
    tiny.write_config(tmp_path / where, tiny.LLAMA)
    assert_same(load_params(tmp_path / "run"), expected)
    assert load_config(tmp_path / "run").vocab_size == 61


def test_plain_step_folders(tree, expected, tmp_path):
    tiny.save_standard(tmp_path / "9", jax.tree.map(np.zeros_like, tree))
    tiny.save_standard(tmp_path / "10", {"params": tree})
    assert_same(load_params(tiny.write_config(tmp_path, tiny.LLAMA)), expected)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "wrap", [dict, lambda t: {"params": t}, lambda t: {"params": {"params": t}}, tiny.train_state]
)
@pytest.mark.parametrize("write", ["msgpack", "orbax"])
def test_trees_as_linen_users_write_them(wrap, write, tree, expected, tmp_path):
    own = wrap(tiny.as_linen_users_write_it(tree, tiny.LLAMA))
    if write == "msgpack":
        tiny.write_msgpack(tmp_path, tiny.LLAMA, own | ({"opt_state": {}} if "opt_state" in own else {}))
    else:
        tiny.save_standard(tiny.write_config(tmp_path, tiny.LLAMA) / "params", own)
    assert_same(load_params(tmp_path), expected)


def test_a_train_state_of_real_classes_beside_other_things(tree, expected, tmp_path):
    state = TrainState.create(apply_fn=lambda: None, params=freeze(tree), tx=optax.adamw(1e-3))
    tiny.save_standard(tiny.write_config(tmp_path / "a", tiny.LLAMA) / "state", state)
    assert_same(load_params(tmp_path / "a"), expected)
    beside = {"params": tree, "rng": jax.random.key(0), "note": "a string"}
    tiny.save_pytree(tiny.write_config(tmp_path / "b", tiny.LLAMA) / "state", beside)
    assert_same(load_params(tmp_path / "b"), expected)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "wrap",
    [
        lambda pure: jax.tree.map(lambda leaf: {"raw_value": leaf}, pure),  # NNX before 0.10
        lambda pure: {"model": pure, "optimizer": {"step": {"value": 1}, "opt_state": {"mu": np.ones(3)}}},
        lambda pure: pure | {"opt_state": {"mu": np.ones(3)}, "step": 3},
        lambda pure: {"state": {"params": pure, "opt_state": [np.ones(3)], "step": 3}, "data": [np.ones(3)]},
    ],
)
def test_trees_as_nnx_users_write_them(wrap, tree, expected, tmp_path):
    pure = nnx.to_pure_dict(layouts.nnx_state(tree))
    tiny.save_standard(tiny.write_config(tmp_path, tiny.LLAMA) / "state", wrap(pure))
    assert_same(load_params(tmp_path), expected)


def test_a_model_and_an_optimizer_in_a_step(tree, expected, tmp_path):
    items = {"model": layouts.nnx_state(tree), "optimizer": {"mu": np.ones(3)}}
    with ocp.CheckpointManager(tmp_path) as manager:
        saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        manager.save(3, args=ocp.args.Composite(**saved))
    assert_same(load_params(tiny.write_config(tmp_path, tiny.LLAMA)), expected)


@pytest.mark.parametrize("save", [tiny.save_no_ocdbt, tiny.save_zarr3])
@pytest.mark.parametrize(
    "lay_out",
    [
        layouts.scanned,
        lambda tree: jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), layouts.scanned(tree)),
    ],
)
def test_stacked_layers_in_other_arrays(lay_out, save, tree, expected, tmp_path):
    save(tiny.write_config(tmp_path, tiny.LLAMA) / "params", {"params": lay_out(tree)})
    assert_same(load_params(tmp_path), expected)


def test_layers_in_a_list(tree, expected, tmp_path):
    layers = [tree["model"]["layers"][str(i)] for i in range(2)]
    listed = tree | {"model": tree["model"] | {"layers": layers}}
    tiny.save_pytree(tiny.write_config(tmp_path, tiny.LLAMA) / "params", listed)
    assert_same(load_params(tmp_path), expected)


def test_under_a_running_event_loop(tree, expected, tmp_path):
    """As in a notebook."""
    tiny.save_standard(tiny.write_config(tmp_path, tiny.LLAMA) / "params", tree)

    async def cell():
        return load_params(tmp_path)

    assert_same(asyncio.run(cell()), expected)


def test_boxed_leaves(tree, expected, tmp_path):
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), tree)
    tiny.save_standard(tiny.write_config(tmp_path, tiny.LLAMA) / "params", {"params": boxed})
    assert_same(load_params(tmp_path), expected)


def test_orbax_in_several_groups(tree, expected, tmp_path, monkeypatch):
    """As of a large checkpoint, of which a part is read at a time; some leaves are larger than that."""
    monkeypatch.setattr("jaxattn.checkpoints.formats.orbax._GROUP_BYTES", 4000)
    tiny.save_standard(tiny.write_config(tmp_path, tiny.LLAMA) / "state", tiny.train_state(tree))
    assert_same(load_params(tmp_path), expected)


def test_msgpack_of_arrays_in_pieces(tree, expected, tmp_path, monkeypatch):
    """As Flax writes what is larger than 1 GiB."""
    monkeypatch.setattr("flax.serialization.MAX_CHUNK_SIZE", 2000)
    file = tiny.write_msgpack(tmp_path, tiny.LLAMA, tree) / "flax_model.msgpack"
    assert file.read_bytes().count(b"__msgpack_chunked_array__") > 5
    assert_same(load_params(tmp_path), expected)


def test_sharded_msgpack(tree, expected, tmp_path):
    folder = tiny.write_sharded(tmp_path, tiny.LLAMA, tree)
    assert_same(load_params(folder), expected)
    assert_same(load_params(folder / "flax_model.msgpack.index.json"), expected)


def test_the_very_file_among_others(tree, expected, tmp_path):
    tiny.write_msgpack(tmp_path, tiny.LLAMA, tree)
    tiny.save_standard(tmp_path / "params", jax.tree.map(np.zeros_like, tree))
    assert_same(load_params(tmp_path / "flax_model.msgpack"), expected)
    assert not load_params(str(tmp_path / "params"))["embed"].any()


def test_weights_equal_a_numpy_reshape(tree, expected):
    attn = tree["model"]["layers"]["1"]["self_attn"]
    layer = expected["layers"][1]
    np.testing.assert_array_equal(layer["q"], attn["q_proj"]["kernel"].reshape(24, 4, 8))
    np.testing.assert_array_equal(layer["v"], attn["v_proj"]["kernel"].reshape(24, 2, 8))
    np.testing.assert_array_equal(layer["o"], attn["o_proj"]["kernel"].reshape(4, 8, 24))


@pytest.mark.smoke
@pytest.mark.parametrize("write", ["msgpack", "orbax"])
@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16, np.float32])
def test_casting(write, dtype, tree, expected, tmp_path):
    if write == "msgpack":
        tiny.write_msgpack(tmp_path, tiny.LLAMA, tree)
    else:
        tiny.save_standard(tiny.write_config(tmp_path, tiny.LLAMA) / "params", tree)
    assert_same(load_params(tmp_path, dtype=dtype), jax.tree.map(lambda x: x.astype(dtype), expected))


@pytest.mark.parametrize("write", ["msgpack", "orbax"])
def test_the_stored_dtype_is_kept(write, tree, tmp_path):
    """That of the embedding, where dtypes are mixed; float64 has no place in JAX by default."""
    mixed = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    mixed["model"]["norm"]["weight"] = tree["model"]["norm"]["weight"].astype(np.float64)
    if write == "msgpack":
        tiny.write_msgpack(tmp_path, tiny.LLAMA, mixed)
    else:
        tiny.save_standard(tiny.write_config(tmp_path, tiny.LLAMA) / "params", mixed)
    model = load_model(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert model.compiled.dtype == jnp.bfloat16


def test_bfloat16_logits_stay_close(tree, tensors, tmp_path):
    model = load_model(tiny.write_msgpack(tmp_path, tiny.LLAMA, tree), dtype="bfloat16")
    (got,) = compute_logits(model, [PROMPT])
    wanted = dense_decoder.logits(tensors, tiny.LLAMA, PROMPT)
    assert np.abs(got - wanted).max() < 0.25 * wanted.std()


def test_a_stored_head_wins_over_a_tie(tmp_path):
    tree = tiny.random_tree(TIED, head=True)
    tiny.write_msgpack(tmp_path, TIED, tree)
    with pytest.warns(UserWarning, match="a head that is not the embedding"):
        model = load_model(tmp_path)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(model.params["head"], tree["lm_head"]["kernel"])


def test_a_stored_head_that_is_the_embedding_is_no_news(tmp_path):
    tree = tiny.random_tree(TIED)
    tree["lm_head"] = {"kernel": tree["model"]["embed_tokens"]["embedding"].T.copy()}
    model = load_model(tiny.write_msgpack(tmp_path, TIED, tree))  # warnings are errors here
    assert not model.config.tie_embeddings


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "dtype"),
    list(zip(tiny.FAMILIES, itertools.cycle(["float32", "bfloat16", "float16"]), strict=False)),
)
def test_saving_and_loading_changes_no_bit(name, dtype, tmp_path):
    config = tiny.FAMILIES[name]
    folder = tiny.write_safetensors(tmp_path / "a", config, tiny.random_tensors(config))
    model = load_model(folder, dtype=dtype)
    save_params(tmp_path / "b", model.params, model.config)
    again = load_model(tmp_path / "b")
    assert again.config == model.config
    assert_same(again.params, model.params)


def test_saved_names_are_those_of_hugging_face(tree, expected, tmp_path):
    config = load_config(tiny.write_config(tmp_path / "a", tiny.LLAMA))
    save_params(tmp_path / "b", expected, config)
    metadata = json.loads((tmp_path / "b/params/_METADATA").read_text())["tree_metadata"]
    saved = {"/".join(key["key"] for key in entry["key_metadata"]) for entry in metadata.values()}
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    assert saved == {jax.tree_util.keystr(path, simple=True, separator="/") for path in paths}


def test_nothing_is_written_over(expected, tmp_path):
    config = load_config(tiny.write_config(tmp_path, tiny.LLAMA))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        save_params(tmp_path, expected, config)
    assert sorted(tmp_path.iterdir()) == before
    unequal = dataclasses.replace(config, sliding_windows=(3, 4))
    with pytest.raises(CheckpointError, match="room for one size"):
        save_params(tmp_path / "new", expected, unequal)
    assert not (tmp_path / "new").exists()


def test_programs_compile_before_the_weights_are_there(tree, tensors, tmp_path, monkeypatch):
    tiny.write_msgpack(tmp_path, tiny.LLAMA, tree)
    ready = threading.Event()
    read = MsgpackWeights.read

    def read_last(self: MsgpackWeights, names: set[str]) -> Iterator[tuple[str, jax.Array]]:
        assert ready.wait(timeout=60), "compilation waits for the weights"
        yield from read(self, names)

    def score(compiled: CompiledSteps) -> None:
        blank = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(compiled.config, compiled.dtype)
        )
        compute_logits(Model(compiled.config, blank, compiled), [PROMPT])
        ready.set()

    monkeypatch.setattr(MsgpackWeights, "read", read_last)
    model = load_model(tmp_path, buckets=[score])
    assert len(model.compiled.programs) == 1
    (logits,) = compute_logits(model, [PROMPT])
    np.testing.assert_allclose(logits, dense_decoder.logits(tensors, tiny.LLAMA, PROMPT), atol=1e-4, rtol=0)
    assert len(model.compiled.programs) == 1


def test_errors_while_compiling_are_raised(tree, tmp_path):
    def score(compiled: CompiledSteps) -> None:
        raise RuntimeError("no such backend")

    with pytest.raises(RuntimeError, match="no such backend"):
        load_model(tiny.write_msgpack(tmp_path, tiny.LLAMA, tree), buckets=[score])
