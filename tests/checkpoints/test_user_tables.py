"""A user's own table of names: followed to the bit, or refused with the row and the remedy."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as tiny

from jaxattn import generate
from jaxattn.checkpoints import (
    CheckpointError,
    LeafRow,
    config_from_dict,
    inspect,
    load_model,
    load_params,
    read_table,
    save_params,
)
from jaxattn.cli.main import run
from jaxattn.models import Model, init_params

# Keys and values in one leaf, one over the other; queries scaled; a norm counted from 0.
TABLE = (
    LeafRow("embed", "words", "d v -> v d"),
    LeafRow("layers.{i}.attention_norm", "block{i}/n1", "d -> d", (("add", 1.0),)),
    LeafRow("layers.{i}.q", "block{i}/att/q", "n h d -> d n h", (("scale", 0.125),)),
    LeafRow("layers.{i}.k", "block{i}/att/kv[0]", "2 k d h -> d k h"),
    LeafRow("layers.{i}.v", "block{i}/att/kv[1]", "2 k d h -> d k h"),
    LeafRow("layers.{i}.o", "block{i}/att/out", "d (n h) -> n h d"),
    LeafRow("layers.{i}.mlp_norm", "block{i}/n2", "d -> d"),
    LeafRow("layers.{i}.gate", "block{i}/wide[0]", "(f + f) d -> d f"),
    LeafRow("layers.{i}.up", "block{i}/wide[1]", "(f + f) d -> d f"),
    LeafRow("layers.{i}.down", "block{i}/narrow", "f d -> f d"),
    LeafRow("final_norm", "last", "d -> d"),
    LeafRow("head", "out", "d v -> d v"),
)
CONFIG = config_from_dict(tiny.LLAMA)
PROMPTS = [[1, 5, 9], [7], [2] * 11]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 1.5 * x, init_params(jax.random.key(0), CONFIG))


@pytest.fixture(scope="module")
def tree(params) -> dict:
    """The same weights as somebody else names and lays them out; NumPy, by hand."""
    tree = {"words": np.asarray(params["embed"]).T, "last": params["final_norm"], "out": params["head"]}
    for i, layer in enumerate(params["layers"]):
        leaf = {name: np.asarray(value) for name, value in layer.items()}
        tree[f"block{i}"] = {
            "n1": leaf["attention_norm"] - 1,
            "n2": leaf["mlp_norm"],
            "att": {
                "q": 8 * leaf["q"].transpose(1, 2, 0),
                "kv": np.stack([leaf["k"].transpose(1, 0, 2), leaf["v"].transpose(1, 0, 2)]),
                "out": leaf["o"].reshape(32, 24).T,
            },
            "wide": np.concatenate([leaf["gate"].T, leaf["up"].T]),
            "narrow": leaf["down"],
        }
    return jax.tree.map(np.array, tree)


@pytest.fixture(scope="module")
def folder(tree, tmp_path_factory) -> Path:
    """The tree in Orbax, without a config.json."""
    folder = tmp_path_factory.mktemp("own") / "weights"
    tiny.save_standard(folder, tree)
    return folder


def as_json(rows) -> str:
    return json.dumps({"rows": [row._asdict() for row in rows]})


def changed(leaf: str, **new) -> list[LeafRow]:
    return [row._replace(**new) if row.destination == leaf else row for row in TABLE]


def error_of(path, table, config=CONFIG) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(path, config, table=table)
    return str(caught.value)


def test_rows_in_python_and_in_json(folder, params, tmp_path):
    file = tmp_path / "table.json"
    file.write_text(as_json(TABLE))
    assert read_table(file) == TABLE
    for table in (TABLE, list(TABLE), file, str(file)):
        got = load_params(folder, CONFIG, table=table)
        jax.tree.map(np.testing.assert_array_equal, got, params)


def test_generating_on_the_command_line(folder, params, tmp_path, capsys):
    table, config = tmp_path / "table.json", tmp_path / "decoder.json"
    table.write_text(as_json(TABLE))
    config.write_text(json.dumps(tiny.LLAMA))
    files = ["--table", str(table), "--config", str(config)]
    prompts = [word for prompt in PROMPTS for word in ("--prompt-ids", " ".join(map(str, prompt)))]
    assert run(["generate", str(folder), *files, *prompts, "--max-new-tokens", "5", "--json"]) == 0
    expected = generate(Model.from_params(CONFIG, params), PROMPTS, 5)
    assert json.loads(capsys.readouterr().out) == {"tokens": expected}
    assert run(["inspect", str(folder), *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_inspecting_without_the_table_says_what_is_missing(folder):
    found = inspect(folder, CONFIG)
    assert found.layout == "own names"
    assert "missing: model.embed_tokens.weight" in found.problems[0]
    assert "unused: block0/att/kv" in found.problems[0]
    assert inspect(folder, CONFIG, table=TABLE).problems == ()


def test_shapes_are_compared_by_the_letters(folder):
    message = error_of(folder, changed("layers.{i}.q", axes="n d h -> d n h"))
    assert "block0/att/q is stored as (4, 8, 24)" in message
    assert "(4, 24, 8) = (num_attention_heads, hidden_size, head_dim)" in message
    assert "block1/att/q" in message


def test_leaves_that_no_row_reads_and_rows_that_nothing_is_stored_for(folder):
    message = error_of(folder, changed("layers.{i}.down", source="block{i}/shrink"))
    for i in range(2):
        assert f"missing: block{i}/shrink" in message
        assert f"unused: block{i}/narrow" in message


def test_a_tied_head_needs_no_row(tree, params, tmp_path):
    config = config_from_dict(tiny.LLAMA | {"tie_word_embeddings": True})
    tiny.save_standard(tmp_path / "tied", {name: leaf for name, leaf in tree.items() if name != "out"})
    got = load_params(tmp_path / "tied", config, table=TABLE[:-1])
    jax.tree.map(np.testing.assert_array_equal, got | {"head": params["head"]}, params)


@pytest.mark.parametrize(
    ("destination", "new", "message"),
    [
        ("embed", {"destination": "embedding"}, "unknown destination 'embedding'; the decoder's leaves are"),
        ("embed", {"axes": "d w -> w d"}, "have unknown 'w'; use v vocab_size, d hidden_size"),
        ("embed", {"axes": "d v"}, "axes 'd v' must be stored axes -> the decoder's, such as"),
        ("embed", {"axes": "(d v -> v d"}, "must be stored axes -> the decoder's"),
        ("embed", {"axes": "d v -> d v"}, "end in 'd v'; 'embed' has 'v d'"),
        ("embed", {"axes": "d f -> v d"}, "begin with d, f and end with other letters; use the same"),
        ("embed", {"axes": "d d v -> v d"}, "begin with d, d, v and end with other letters"),
        ("embed", {"source": "words[1]"}, "source 'words[1]' has no part 1; axes 'd v -> v d' have 1"),
        ("embed", {"source": "words[x]"}, "source 'words[x]' must be a name"),
        ("embed", {"source": "words{j}"}, "source 'words{j}' has braces that are not {i}"),
        ("embed", {"source": "words{i}"}, "write {i}, the layer, in both or in neither"),
        ("layers.{i}.k", {"source": "block{i}/att/kv"}, "2 parts; say which, such as 'block{i}/att/kv[0]'"),
        ("layers.{i}.k", {"source": "block{i}/att/kv[2]"}, "has no part 2"),
        ("layers.{i}.q", {"ops": (("sqrt", 1.0),)}, "unknown op 'sqrt'; use one of 'scale', 'add'"),
        ("layers.{i}.q", {"ops": (("scale", 0.0),)}, "op 'scale' with 0.0: give a finite number, not 0"),
        ("layers.{i}.q", {"ops": (("add", float("inf")),)}, "op 'add' with inf: give a finite number"),
        ("layers.{i}.q", {"ops": (("scale", "h"),)}, "op 'scale' with 'h': give a finite number"),
        ("layers.{i}.o", {"ops": (("unpad", "h"),)}, "op 'unpad' needs one of the axes d, not 'h'"),
        ("layers.{i}.q", {"ops": (("rope_deinterleave", "v"),)}, "needs one of the axes n h d, not 'v'"),
        ("layers.{i}.k", {"axes": "2 k d (h + h) -> d k h"}, "have parts on more than one axis"),
        ("layers.{i}.q", {"source": "att/q"}, "or have layers stacked on an axis l"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_followed(destination, new, message, tmp_path, folder):
    number = next(i for i, row in enumerate(TABLE) if row.destination == destination)
    rows = changed(destination, **new)
    assert re.search(rf"rows\[{number}\]: .*{re.escape(message)}", error_of(folder, rows))
    file = tmp_path / "table.json"
    file.write_text(as_json(rows))
    assert re.search(
        rf"{re.escape(str(file))} .*\n  rows\[{number}\]: .*{re.escape(message)}", error_of(folder, file)
    )


def test_all_bad_rows_are_listed(folder):
    rows = [row._replace(axes="x -> x") for row in TABLE]
    message = error_of(folder, rows)
    assert all(f"rows[{i}]: " in message for i in range(len(rows)))


def test_two_rows_for_one_leaf(folder):
    assert "2 rows are for 'final_norm'; keep one" in error_of(folder, [*TABLE, TABLE[-2]])


def test_a_leaf_without_a_row(folder):
    message = error_of(folder, [row for row in TABLE if row.destination not in ("layers.{i}.up", "head")])
    assert "no row for 'layers.{i}.up', which the config asks for; add one" in message
    assert "no row for 'head', which the config asks for; add one, or set tie_word_embeddings" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "must be {\"rows\": [...]}"),
        ('{"rows": 3}', "must be {\"rows\": [...]}"),
        ('{"rows": [], "more": 1}', "must be {\"rows\": [...]}"),
        ('{"rows": [3]}', "rows[0]: 3 must be an object with destination, source and axes"),
        ('{"rows": [{"destination": "embed", "source": "a"}]}', "rows[0]: axes is missing"),
        ('{"rows": [{"destination": 1, "source": "a", "axes": "d"}]}', "destination=1 must be a string"),
        (
            '{"rows": [{"destination": "embed", "source": "a", "axes": "v d -> v d", "op": []}]}',
            "rows[0]: unknown key 'op'; a row has destination, source, axes, ops",
        ),
        (
            '{"rows": [{"destination": "embed", "source": "a", "axes": "v d -> v d", "ops": ["scale", 2]}]}',
            "rows[0]: op 'scale' must be [name, number] or [name, axis], such as ['scale', 0.125]",
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_table(content, message, folder, tmp_path):
    file = tmp_path / "table.json"
    file.write_text(content)
    assert message in error_of(folder, file)
    assert str(file) in error_of(folder, file)


def test_a_file_that_is_not_there(folder, tmp_path):
    assert "none.json cannot be read as JSON: FileNotFoundError" in error_of(folder, tmp_path / "none.json")


def test_a_table_is_refused_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr("jaxattn.checkpoints.opening.open_weights", None)
    assert "cannot be followed" in error_of(folder, [])


def test_a_table_of_our_own_names_again(params, tmp_path):
    """What `save_params` writes, read by rows; as bfloat16, too."""
    save_params(tmp_path / "a", params, CONFIG)
    rows = [
        LeafRow("embed", "model/embed_tokens/embedding", "v d -> v d"),
        LeafRow("layers.{i}.attention_norm", "model/layers/{i}/input_layernorm/weight", "d -> d"),
        *(
            LeafRow(
                f"layers.{{i}}.{q}", f"model/layers/{{i}}/self_attn/{q}_proj/kernel", f"d ({n} h) -> d {n} h"
            )
            for q, n in ("qn", "kk", "vk")
        ),
        LeafRow("layers.{i}.o", "model/layers/{i}/self_attn/o_proj/kernel", "(n h) d -> n h d"),
        LeafRow("layers.{i}.mlp_norm", "model/layers/{i}/post_attention_layernorm/weight", "d -> d"),
        LeafRow("layers.{i}.gate", "model/layers/{i}/mlp/gate_proj/kernel", "d f -> d f"),
        LeafRow("layers.{i}.up", "model/layers/{i}/mlp/up_proj/kernel", "d f -> d f"),
        LeafRow("layers.{i}.down", "model/layers/{i}/mlp/down_proj/kernel", "f d -> f d"),
        LeafRow("final_norm", "model/norm/weight", "d -> d"),
        LeafRow("head", "lm_head/kernel", "d v -> d v"),
    ]  # fmt: skip
    model = load_model(tmp_path / "a", table=rows, dtype="bfloat16")
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, model.params, wanted)
