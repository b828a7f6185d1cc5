"""Every family in every format against a dense NumPy decoder that reads the same weights and config.json."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dense_decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as tiny
import tiny_layouts as layouts
from checkpoint_matrix import CASES, EVERYDAY, FAMILIES
from dense_decoder import NONE, Mistakes

from jaxattn import Model, compute_logits, generate
from jaxattn.batch.bucket import BucketGrid
from jaxattn.checkpoints import config_from_dict, load_model, load_params

# Lengths on both sides of the window, 5 keys, and of twice the window; all run in one bucket.
PROMPTS = [[3], [1, 60, 2, 9], [8, 7, 6, 5, 4], list(range(20, 31)), [17, 0, 3] * 7]
GRID = BucketGrid(tokens=(48,), max_seqs=8)
ATOL = 1e-4


@functools.cache
def tensors_of(family: str) -> tiny.Tensors:
    return tiny.random_tensors(tiny.FAMILIES[family])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Callable[[str], Model]:
    """The model of a family, loaded once, and with its compiled programs."""

    @functools.cache
    def load(family: str) -> Model:
        folder = tmp_path_factory.mktemp("families")
        return load_model(tiny.write_safetensors(folder, tiny.FAMILIES[family], tensors_of(family)))

    return load


@pytest.fixture(scope="module")
def logits(loaded) -> Callable[[str], list[np.ndarray]]:
    """The logits of all prompts in one batch."""
    return functools.cache(lambda family: compute_logits(loaded(family), PROMPTS, grid=GRID))


def distance(got: list[np.ndarray], tensors: tiny.Tensors, config: dict, mistakes: Mistakes = NONE) -> float:
    wanted = [dense_decoder.logits(tensors, config, prompt, mistakes) for prompt in PROMPTS]
    return max(np.abs(g - w).max() for g, w in zip(got, wanted, strict=True))


@pytest.mark.smoke
@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_together_and_one_by_one(family, loaded, logits):
    config = tiny.FAMILIES[family]
    assert distance(logits(family), tensors_of(family), config) < ATOL
    alone = [compute_logits(loaded(family), [prompt], grid=GRID)[0] for prompt in PROMPTS]
    assert distance(alone, tensors_of(family), config) < ATOL


DECODED = ("Llama 3", "Phi-3", "Gemma 2", "Gemma 3")
"""Families that differ in what decoding reads; the others are tested under `slow`."""


@pytest.mark.smoke
@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "family", [f if f in DECODED else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_greedy_tokens_through_the_paged_decode(family, loaded):
    config = tiny.FAMILIES[family]
    wanted = [dense_decoder.greedy(tensors_of(family), config, prompt, 16) for prompt in PROMPTS]
    assert generate(loaded(family), PROMPTS, 16, page_size=4) == wanted


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "family", [f if f in DECODED else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_bfloat16_throughout(family, tmp_path):
    """Stored, loaded and computed so, against the exact decoder on the same rounded weights."""
    config, tensors = tiny.FAMILIES[family], tensors_of(family)
    rounded = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    model = load_model(tiny.write_safetensors(tmp_path, config, rounded))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    exact_weights = {name: tensor.astype(np.float32) for name, tensor in rounded.items()}
    for prompt, got in zip(PROMPTS, compute_logits(model, PROMPTS, grid=GRID), strict=True):
        wanted = dense_decoder.logits(exact_weights, config, prompt)
        assert np.abs(got - wanted).max() <= 0.25 * wanted.std()
        p, q = (jax.nn.log_softmax(x.astype(np.float32)) for x in (wanted, got))
        assert float((jnp.exp(p) * (p - q)).sum(-1).mean()) <= 0.01


GATE, UP, Q = (
    f"model.layers.1.{name}.weight" for name in ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj")
)
QKV, GATE_UP = (f"model.layers.1.{name}.weight" for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
GEMMAS = ("Gemma 1", "Gemma 2", "Gemma 3")
WINDOWED = ("Mistral", "Phi-3", "Qwen 2", *GEMMAS[1:])


def swap_gate_and_up(tensors: tiny.Tensors) -> tiny.Tensors:
    if GATE_UP in tensors:
        return tensors | {GATE_UP: np.roll(tensors[GATE_UP], 40, axis=0)}
    return tensors | {GATE: tensors[UP], UP: tensors[GATE]}


WRONG_CONFIGS = [
    *((family, {"sliding_window": window}) for family in WINDOWED for window in (4, 6)),
    ("Llama 2", {"rope_theta": 10_100.0}),
    ("Llama 3", {"rope_scaling": tiny.LLAMA3_SCALING | {"high_freq_factor": 3.0}}),
    ("Llama 3", {"rms_norm_eps": 1e-2}),
    ("Phi-3", {"sliding_window": None}),
    ("Qwen 2", {"max_window_layers": 0}),
    ("Qwen 2", {"use_sliding_window": False}),
    ("Qwen 3", {"use_sliding_window": True, "max_window_layers": 1}),
    ("Gemma 2", {"attn_logit_softcapping": None}),
    ("Gemma 2", {"final_logit_softcapping": None}),
    ("Gemma 2", {"query_pre_attn_scalar": 8}),
    ("Gemma 2", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("Gemma 3", {"query_pre_attn_scalar": 8}),
    ("Gemma 3", {"sliding_window_pattern": 2}),
    ("Gemma 3", {"rope_local_base_freq": 500.0}),
    ("Gemma 3", {"rope_scaling": None}),
]  # fmt: skip
WRONG_DECODERS = [
    *((family, Mistakes(interleaved_rope=True)) for family in FAMILIES),
    *((family, Mistakes(norm_without_one=True)) for family in GEMMAS),
    *((family, Mistakes(no_embedding_scale=True)) for family in GEMMAS),
    *((family, Mistakes(post_norms_skipped=True)) for family in GEMMAS[1:]),
    *((family, Mistakes(no_qk_norm=True)) for family in ("Qwen 3", "Gemma 3")),
    ("Gemma 3", Mistakes(one_rope_base=True)),
]
WRONG_WEIGHTS: list[tuple[str, str, Callable[[tiny.Tensors], tiny.Tensors]]] = [
    *((family, "gate and up swapped", swap_gate_and_up) for family in FAMILIES),
    ("Phi-3", "keys and values swapped", lambda t: t | {QKV: t[QKV][np.r_[:24, 36:48, 24:36]]}),
    ("Llama 2", "a square matrix transposed", lambda t: t | {Q: t[Q].T}),
    ("Qwen 2", "no biases", lambda t: {name: t[name] for name in t if not name.endswith("bias")}),
]  # fmt: skip


@pytest.mark.thinned(8)
@pytest.mark.parametrize(("family", "keys"), WRONG_CONFIGS)
def test_a_key_of_the_config_misread_would_be_noticed(family, keys, logits):
    config = tiny.FAMILIES[family] | keys
    assert distance(logits(family), tensors_of(family), config) > 100 * ATOL


@pytest.mark.slow
def test_another_epsilon_would_be_noticed(tmp_path):
    """It moves logits the least of all mistakes, where embeddings are as small as those of trained models."""
    config, tensors = tiny.FAMILIES["Llama 2"], dict(tensors_of("Llama 2"))
    tensors["model.embed_tokens.weight"] = 0.02 * tensors["model.embed_tokens.weight"]
    got = compute_logits(load_model(tiny.write_safetensors(tmp_path, config, tensors)), PROMPTS, grid=GRID)
    assert distance(got, tensors, config) < ATOL
    assert distance(got, tensors, config | {"rms_norm_eps": 1e-6}) > 10 * ATOL


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", ["Llama 2", "Gemma 3"])
def test_rounded_weights_would_be_noticed(family, logits):
    tensors = {name: x.astype(jnp.bfloat16).astype(np.float32) for name, x in tensors_of(family).items()}
    assert distance(logits(family), tensors, tiny.FAMILIES[family]) > 100 * ATOL


@pytest.mark.thinned(8)
@pytest.mark.parametrize(("family", "mistakes"), WRONG_DECODERS)
def test_a_step_of_the_decoder_done_wrong_would_be_noticed(family, mistakes, logits):
    assert distance(logits(family), tensors_of(family), tiny.FAMILIES[family], mistakes) > 100 * ATOL


@pytest.mark.thinned(8)
@pytest.mark.parametrize(("family", "what", "change"), WRONG_WEIGHTS)
def test_weights_taken_for_others_would_be_noticed(family, what, change, logits):
    config = tiny.FAMILIES[family]
    assert distance(logits(family), change(tensors_of(family)), config) > 100 * ATOL, what


def write(format_name: str, folder: Path, config: dict, tensors: tiny.Tensors) -> Path:
    """Write weights in one of the formats of the matrix."""
    match format_name:
        case "safetensors":
            return tiny.write_safetensors(folder, config, tensors)
        case "safetensors, sharded":
            return tiny.write_sharded_safetensors(folder, config, tensors)
        case "safetensors of Flax":
            return tiny.write_flax_safetensors(folder, config, tiny.flax_tree(tensors))
        case "msgpack":
            return tiny.write_msgpack(folder, config, tiny.flax_tree(tensors))
        case "msgpack, sharded":
            return tiny.write_sharded(folder, config, tiny.flax_tree(tensors))
    tiny.save_standard(tiny.write_config(folder, config) / "params", orbax_tree(format_name, config, tensors))
    return folder


def orbax_tree(format_name: str, config: dict, tensors: tiny.Tensors) -> Any:
    """What an Orbax folder holds in one of the formats of the matrix."""
    match format_name:
        case "Orbax, Linen tree":
            return {"params": tiny.flax_tree(tensors)}
        case "Orbax, Linen tree, scanned":
            return {"params": layouts.scanned(tiny.flax_tree(tensors))}
        case "Orbax, NNX state":
            return layouts.nnx_state(tiny.flax_tree(tensors))
        case "gemma library, nested":
            return layouts.nest(layouts.gemma_nested(tensors, config, transposed=False))
        case "gemma library, flat":
            return layouts.gemma_flat(layouts.gemma_nested(tensors, config, padding=3))
        case "gemma library, stacked":
            return layouts.gemma_stacked(layouts.gemma_flat(layouts.gemma_nested(tensors, config)), 2)
        case _:
            dtype = tensors["model.norm.weight"].dtype
            wide = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
            tree = layouts.maxtext(wide, config, scanned="scanned" in format_name)
            return jax.tree.map(lambda x: x.astype(dtype) if x.ndim else x, tree)


@pytest.mark.parametrize(
    ("format_name", "family", "stored", "dialect"),
    [case if case in EVERYDAY else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_every_cell_loads_the_same_parameters(format_name, family, stored, dialect, loaded, tmp_path):
    written = tiny.FAMILIES[family]
    tensors = {name: tensor.astype(jnp.dtype(stored)) for name, tensor in tensors_of(family).items()}
    folder = write(format_name, tmp_path, written, tensors)
    tiny.write_config(folder, written if dialect == 4 else tiny.as_transformers_5(family))
    model = load_model(folder, dtype="float32")
    wanted = loaded(family)
    assert model.config == wanted.config
    rounded = jax.tree.map(lambda x: x.astype(stored).astype("float32"), wanted.params)
    # MaxText stores other numbers, which round otherwise; all others store these.
    error = float(jnp.finfo(stored).eps) if "MaxText" in format_name else 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=error, atol=error), model.params, rounded)


@pytest.mark.parametrize(
    ("decoder", "head", "tower"),
    [
        ("language_model.model.", "language_model.lm_head.weight", "vision_tower.x.weight"),
        ("model.language_model.", "lm_head.weight", "model.vision_tower.x.weight"),
    ],
)
def test_gemma_3_with_images(decoder, head, tower, loaded, tmp_path):
    """The decoder alone is read, as transformers 4 and 5 name it; what sees images is left alone."""
    tensors = {name.replace("model.", decoder, 1): value for name, value in tensors_of("Gemma 3").items()}
    tensors[head] = tensors_of("Gemma 3")["model.embed_tokens.weight"]
    tensors |= dict.fromkeys((tower, "multi_modal_projector.x"), np.ones((2, 2), np.float32))
    params = load_params(tiny.write_safetensors(tmp_path, tiny.FAMILIES["Gemma 3 with images"], tensors))
    np.testing.assert_array_equal(params.pop("head"), params["embed"].T)
    jax.tree.map(np.testing.assert_array_equal, params, loaded("Gemma 3").params)


@pytest.mark.smoke
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_dialects_mean_the_same(family):
    assert config_from_dict(tiny.FAMILIES[family]) == config_from_dict(tiny.as_transformers_5(family))
