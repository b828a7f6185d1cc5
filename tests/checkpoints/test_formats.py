"""Layouts of other libraries than Hugging Face's: logits, mistakes made on purpose, configs from shapes."""

import functools
import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dense_decoder
import jax
import numpy as np
import pytest
import tiny_checkpoints as tiny
import tiny_layouts as layouts

from jaxattn import compute_logits
from jaxattn.batch.bucket import BucketGrid
from jaxattn.checkpoints import CheckpointError, config_from_dict, load_params, opening
from jaxattn.checkpoints.families import without_config
from jaxattn.checkpoints.families.without_config import VARIANTS, config_of_variant
from jaxattn.checkpoints.formats.weights import Leaf
from jaxattn.checkpoints.layouts.match import match
from jaxattn.checkpoints.layouts.names import choose_table, spelled_shapes
from jaxattn.checkpoints.layouts.rows import Layout, LeafRow
from jaxattn.checkpoints.reading import read_params
from jaxattn.models import CompiledSteps, DecoderConfig, Model, abstract_params

PROMPTS = [[3], [8, 7, 6, 5, 4], [17, 0, 3] * 7]
GRID = BucketGrid(tokens=(48,), max_seqs=8)
ATOL = 1e-4

LeafRows = tuple[LeafRow, ...]
TINY = config_from_dict(tiny.LLAMA)


def write_orbax(folder: Path, config: dict[str, Any], tree: Any) -> Path:
    tiny.save_standard(tiny.write_config(folder, config) / "params", tree)
    return folder


def write_layout(layout: str, folder: Path, config: dict[str, Any], tensors: tiny.Tensors) -> Path:
    nested = functools.partial(layouts.gemma_nested, tensors, config)
    trees: dict[str, Callable[[], Any]] = {
        "nested": lambda: layouts.nest(nested(transposed=False)),
        "flat": lambda: layouts.gemma_flat(nested(padding=3)),
        "stacked": lambda: layouts.gemma_stacked(layouts.gemma_flat(nested()), 2),
        "images": lambda: layouts.gemma_flat(layouts.gemma_multimodal(nested())),
        "kauldron": lambda: layouts.kauldron(layouts.nest(layouts.gemma_multimodal(nested()))),
        "MaxText": lambda: layouts.maxtext(tensors, config, scanned=False),
        "scanned": lambda: layouts.maxtext(tensors, config, scanned=True),
    }
    return write_orbax(folder, config, trees[layout]())


@functools.cache
def tensors_of(family: str) -> tiny.Tensors:
    return tiny.random_tensors(tiny.FAMILIES[family], seed=1)


@functools.cache
def steps_of(config: DecoderConfig) -> CompiledSteps:
    """Compiled once for all layouts of a family."""
    return CompiledSteps(config, np.dtype("float32"))


def distance(folder: Path, family: str) -> float:
    """How far logits are from those of the dense decoder, for all prompts in one batch."""
    checkpoint = opening.open_checkpoint(folder)
    config = checkpoint.plan.config
    model = Model(config, read_params(checkpoint), steps_of(config))
    got = compute_logits(model, PROMPTS, grid=GRID)
    wanted = [dense_decoder.logits(tensors_of(family), tiny.FAMILIES[family], prompt) for prompt in PROMPTS]
    return max(np.abs(g - w).max() for g, w in zip(got, wanted, strict=True))


def without_op(name: str, leaf: str = "") -> Callable[[LeafRow], LeafRow]:
    def change(row: LeafRow) -> LeafRow:
        ops = tuple(op for op in row.ops if op[0] != name or not row.destination.endswith(leaf))
        return row._replace(ops=ops)

    return change


def swapped(first: str, second: str) -> Callable[[LeafRow], LeafRow]:
    """Of all sources whose names have one of two parts, the other."""

    def change(row: LeafRow) -> LeafRow:
        parts = (first, second) if first in row.source else (second, first)
        return row._replace(source=row.source.replace(*parts))

    return change


SWAPPED_LAYERS = str.maketrans("02", "20")
"""The layers that share a stack of three layers in pairs."""

RIGHT = [
    ("nested", "Gemma 1"),
    ("flat", "Gemma 2"),
    ("stacked", "Gemma 3"),
    ("images", "Gemma 3"),
    ("kauldron", "Gemma 3"),
    ("scanned", "Llama 2"),
    ("scanned", "Llama 3"),
    ("MaxText", "Llama 3"),
    ("scanned", "Qwen 2"),
    ("scanned", "Gemma 2"),
    ("scanned", "Gemma 3"),
]
WRONG = [
    ("nested", "Gemma 1", swapped("gating_einsum[0]", "gating_einsum[1]")),
    ("flat", "Gemma 2", swapped("kv_einsum/w[0]", "kv_einsum/w[1]")),
    ("stacked", "Gemma 3", lambda row: row._replace(destination=row.destination.translate(SWAPPED_LAYERS))),
    ("scanned", "Llama 3", without_op("rope_deinterleave")),
    ("MaxText", "Llama 3", without_op("rope_deinterleave", ".k")),
    ("scanned", "Llama 2", without_op("scale")),
    ("scanned", "Gemma 2", without_op("scale", ".q")),
    ("scanned", "Gemma 2", without_op("scale", "embed")),
    ("scanned", "Gemma 2", without_op("add")),
    ("scanned", "Gemma 2", without_op("add", "final_norm")),
    ("scanned", "Gemma 2", swapped("_local", "_global")),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "family"), RIGHT)
def test_logits_of_a_ragged_batch(layout, family, tmp_path):
    folder = write_layout(layout, tmp_path, tiny.FAMILIES[family], tensors_of(family))
    assert distance(folder, family) < ATOL


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("layout", "family", "change"), WRONG)
def test_a_mistake_in_a_table_would_be_noticed(layout, family, change, tmp_path, monkeypatch):
    choose = opening.choose_table

    def choose_wrongly(leaves: Mapping[str, Leaf], config: DecoderConfig) -> LeafRows:
        return tuple(map(change, choose(leaves, config)))

    monkeypatch.setattr(opening, "choose_table", choose_wrongly)
    folder = write_layout(layout, tmp_path, tiny.FAMILIES[family], tensors_of(family))
    assert distance(folder, family) > 100 * ATOL


def error_of(path: Path, config: DecoderConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_params(path, config)
    return str(caught.value)


def test_queries_keys_and_values_in_one_leaf(tmp_path):
    """As in Gemma 7B, which has as many heads of keys as of queries."""
    config = tiny.FAMILIES["Gemma 1"] | {"num_key_value_heads": 4}
    tensors = tiny.random_tensors(config)
    nested = layouts.gemma_nested(tensors, config)
    assert "layer_0/attn/qkv_einsum/w" in nested
    got = load_params(write_orbax(tmp_path / "a", config, layouts.nest(nested)))
    wanted = load_params(tiny.write_safetensors(tmp_path / "b", config, tensors))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_axes_that_shapes_do_not_tell_apart_are_refused(tmp_path):
    config = tiny.FAMILIES["Gemma 2"] | {"intermediate_size": 24}
    nested = layouts.gemma_nested(tiny.random_tensors(config), config)
    message = error_of(write_orbax(tmp_path, config, layouts.nest(nested)))
    assert "hidden_size and intermediate_size are both 24, so the shape of gating_einsum" in message


@pytest.mark.parametrize("layout", ["nested", "stacked", "MaxText", "scanned"])
def test_all_disagreements_with_a_layout_are_listed(layout, tmp_path):
    config = tiny.FAMILIES["Gemma 2"] | {"num_hidden_layers": 4}
    folder = write_layout(layout, tmp_path, config, tiny.random_tensors(config))
    tiny.write_config(folder, config | {"num_hidden_layers": 6, "head_dim": 4})
    message = error_of(folder)
    depth = {
        "nested": "the weights have 4 layers, num_hidden_layers=6",
        "MaxText": "the weights have 4 layers, num_hidden_layers=6",
        "stacked": "attn/q_einsum/w is stored as (2, 4, 24, 8), the config needs (3, 4, 24, 4)"
        " = (layers stacked, num_attention_heads, hidden_size, head_dim)",
        "scanned": "self_attention_local/query/kernel is stored as (24, 2, 4, 8), "
        "the config needs (24, 3, 4, 4)",
    }
    assert depth[layout] in message
    assert message.count("is stored as") > 4


def test_a_vocabulary_may_be_padded_but_is_no_other(tmp_path):
    config = tiny.FAMILIES["Gemma 2"]
    nested = layouts.gemma_nested(tensors_of("Gemma 2"), config, padding=1025)
    message = error_of(write_orbax(tmp_path, config, layouts.nest(nested)))
    assert "is stored as (1086, 24), the config needs (61, 24) = (vocab_size or a few more, hidden" in message


def gemma_shapes(sizes: tuple[int, ...], *, stacked: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes that a released Gemma of these sizes has."""
    L, D, F, N, K, H = sizes
    layer = {
        "attn/attn_vec_einsum/w": (N, H, D),
        "attn/qkv_einsum/w" if K == N else "attn/kv_einsum/w": ((3, N, D, H) if K == N else (2, K, D, H)),
        "mlp/linear": (F, D),
    }
    shapes = {"embedder/input_embedding": (256_128, D)}
    for i in range(6 if stacked else L):
        stack = (len(range(i, L, 6)),) if stacked else ()
        prefix = f"stacked_layers/attention_type_{i}/" if stacked else f"layer_{i}/"
        shapes |= {prefix + name: stack + shape for name, shape in layer.items()}
    return shapes


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_released_gemmas_are_known_by_their_shapes(variant, stacked):
    L, D, F, N, K, H = VARIANTS[variant][0]
    config = config_of_variant(gemma_shapes((L, D, F, N, K, H), stacked=stacked))
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (L, D, F)
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (N, K, H)
    assert (config.norm_offset, config.tie_embeddings, config.embedding_scale) == (True, True, D**0.5)
    assert config.post_norms == (variant[:6] in ("gemma2", "gemma3"))
    assert config.qk_norm == (variant[:6] == "gemma3")
    # Gemma 27B scales by the width of the model, not of its heads.
    scale = (D // N if variant.endswith("27b") else H) ** -0.5
    assert (config.attention_scale or H**-0.5) == pytest.approx(scale)
    caps = (config.logits_soft_cap, config.final_logits_soft_cap)
    assert caps == ((50.0, 30.0) if variant.startswith("gemma2") else (None, None))
    full = [i for i, window in enumerate(config.sliding_windows) if window is None]
    step = {"gemma ": 1, "gemma2": 2, "gemma3": 6}[variant[:6]]
    assert full == list(range(step - 1, L, step))
    if variant.startswith("gemma3"):
        large = D > 2000
        assert config.sliding_windows[0] == (1024 if large else 512)
        assert (config.ropes[0].theta, config.ropes[5].theta) == (1e4, 1e6)
        assert (config.ropes[0].factor, config.ropes[5].factor) == (1.0, 8.0 if large else 1.0)


def test_shapes_of_released_gemmas_in_the_gemma_library():
    """Those of images are there, too, where a model has them."""
    file = Path(__file__).parents[1] / "fixtures" / "gemma_library_shapes.json.gz"
    released = json.loads(gzip.decompress(file.read_bytes()))
    assert set(released) == set(VARIANTS) - {"gemma 2b", "gemma 7b"}
    for variant, shapes in released.items():
        leaves = {name: Leaf(tuple(shape), "bfloat16") for name, shape in shapes.items()}
        config = config_of_variant(spelled_shapes(leaves))
        assert config.num_layers == VARIANTS[variant][0][0]
        plan = match(leaves, config, choose_table(leaves, config))
        assert len(plan.layouts) == len(jax.tree.leaves(abstract_params(config, "bfloat16")))


def test_the_sizes_of_released_gemmas_are_unique():
    assert len({sizes for sizes, _ in VARIANTS.values()}) == len(VARIANTS) == 10


@pytest.mark.parametrize("layout", ["nested", "flat", "stacked", "kauldron"])
def test_a_config_from_shapes_alone_unless_there_is_another(layout, tmp_path, monkeypatch):
    config = tiny.FAMILIES["Gemma 3"]
    folder = write_layout(layout, tmp_path, config, tensors_of("Gemma 3"))
    wanted = load_params(folder)
    (folder / "config.json").unlink()
    message = error_of(folder)
    assert "have the sizes of none of gemma 2b, gemma 7b" in message
    assert "num_hidden_layers=3, hidden_size=24, intermediate_size=40, num_attention_heads=4" in message
    assert "give config=" in message
    keys = {key: value for key, value in config.items() if not key.startswith("num_")}
    monkeypatch.setitem(without_config.VARIANTS, "tiny", ((3, 24, 40, 4, 2, 8), keys))
    jax.tree.map(np.testing.assert_array_equal, load_params(folder), wanted)
    tiny.write_config(folder, config | {"sliding_window": 7})
    assert opening.open_checkpoint(folder).plan.config.sliding_windows == (7, 7, None)


def test_maxtext_needs_a_config(tmp_path):
    folder = write_layout("scanned", tmp_path, tiny.LLAMA, tiny.random_tensors(tiny.LLAMA))
    wanted = load_params(folder)
    config = opening.open_checkpoint(folder).plan.config
    (folder / "config.json").unlink()
    message = error_of(folder)
    assert "no config.json for the weights" in message
    assert "MaxText writes none" in message
    jax.tree.map(np.testing.assert_array_equal, load_params(folder, config), wanted)


def test_maxtext_steps(tmp_path):
    """As MaxText's CheckpointManager leaves them: `0/items`."""
    tree = layouts.maxtext(tiny.random_tensors(tiny.LLAMA), tiny.LLAMA, scanned=True)
    tiny.save_steps(tiny.write_config(tmp_path, tiny.LLAMA), {0: tree}, item="items")
    wanted = load_params(tiny.write_safetensors(tmp_path / "b", tiny.LLAMA, tiny.random_tensors(tiny.LLAMA)))
    got = load_params(tmp_path / "0")
    np.testing.assert_array_equal(got["head"], wanted["head"])


def test_a_table_that_is_not_of_the_decoder():
    table = (LeafRow("embed", "e", "v d -> d v"), LeafRow("final_norm", "n", "d -> d"))
    leaves = {"e": Leaf((61, 24), "float32"), "n": Leaf((24,), "float32")}
    with pytest.raises(CheckpointError) as caught:
        match(leaves, TINY, table)
    assert "embed is (61, 24) in the decoder, (24, 61) in the table" in str(caught.value)
    assert "the config asks for layers.1.down, which no row of the table is for" in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        LeafRow("q", "w", "d (n h) -> n h d", (("scale", 0.3), ("rope_deinterleave", "h"), ("add", 2.0))),
        LeafRow("q", "w", "h n d -> d n h", (("rope_deinterleave", "n"), ("rope_deinterleave", "h"))),
    ],
)
def test_what_a_row_does_can_be_undone(row):
    layout = Layout.of(row, TINY)
    stored = np.random.default_rng(0).standard_normal(layout.stored_shape).astype(np.float32)
    decoded = layout.to_decoder(jax.numpy.asarray(stored))
    assert decoded.shape == layout.decoder_shape
    np.testing.assert_allclose(layout.to_stored(decoded), stored, rtol=1e-5, atol=1e-5)
