"""Stacked layers: the same numbers from a program that holds each layer once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as tiny

from jaxattn import (
    Bucket,
    DecoderConfig,
    RopeConfig,
    compute_logits,
    generate,
    nest_sequences,
    prepare_metadata,
)
from jaxattn.batch.ragged import PAD_SLOT
from jaxattn.checkpoints import abstract_params, load_model, load_params, save_params
from jaxattn.models import Model, forward, init_model_cache, init_params, stack_layers, unstack_layers
from jaxattn.models.steps import score
from jaxattn.serving import calibrate_kv_scales, serve

LOCAL, GLOBAL = RopeConfig(theta=20.0), RopeConfig(theta=500.0)
CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=5,  # two rounds of two, and one layer more
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    sliding_windows=(5, None, 5, None, 5),
    ropes=(LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL),
    qk_norm=True,
)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [35, 8, 9, 7, 9, 3, 2, 3, 8, 46, 2, 6]]


@pytest.fixture(scope="module")
def models():
    params = jax.tree.map(lambda x: 2 * x, init_params(jax.random.key(0), CONFIG))
    return Model.from_params(CONFIG, params), Model.from_params(CONFIG, stack_layers(params))


@pytest.mark.thinned(2)
def test_logits_and_tokens_are_those_of_layers_apart(models):
    apart, stacked = models
    for a, b in zip(compute_logits(stacked, PROMPTS), compute_logits(apart, PROMPTS), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    tokens = generate(apart, PROMPTS, 9, page_size=4)
    assert generate(stacked, PROMPTS, 9, page_size=4) == tokens
    assert serve(stacked, PROMPTS, 9, num_pages=16, page_size=4, token_budget=8, max_seqs=2) == tokens


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [pytest.param("reference", marks=pytest.mark.slow), "triton"])
def test_every_implementation(models, implementation):
    apart, stacked = models
    expected = generate(apart, PROMPTS, 5, page_size=4)
    assert generate(stacked, PROMPTS, 5, page_size=4, implementation=implementation) == expected


@pytest.mark.slow
def test_quantised_cache(models):
    apart, stacked = models
    scales = calibrate_kv_scales(apart, PROMPTS, "int8")
    for a, b in zip(calibrate_kv_scales(stacked, PROMPTS, "int8"), scales, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    options = {"cache_dtype": "int8", "kv_scales": scales, "page_size": 4}
    assert generate(stacked, PROMPTS, 5, **options) == generate(apart, PROMPTS, 5, **options)


def test_a_cache_of_the_other_kind_is_refused(models):
    batch = nest_sequences([[1, 2, 3]], page_tables=[[1, 2]], page_size=2, bucket=Bucket(5, 2, 4))
    metadata = prepare_metadata(batch, CONFIG.layer_specs())
    for model, other in zip(models, (True, False), strict=True):
        cache = init_model_cache(CONFIG, num_pages=4, page_size=2, dtype="float32", stack_layers=other)
        with pytest.raises(ValueError, match=f"make the cache by init_model_cache.*stack_layers={not other}"):
            forward(model.params, CONFIG, batch.token_ids, metadata, cache)


def test_a_program_does_not_grow_with_the_number_of_layers(models):
    """Nor is the metadata derived again in the loop, which would be longer then."""

    def size(rounds: int) -> int:
        config = dataclasses.replace(
            CONFIG, num_layers=2 * rounds, sliding_windows=(5, None) * rounds, ropes=(LOCAL, GLOBAL) * rounds
        )
        params = abstract_params(config, "float32", stack_layers=True)
        batch = nest_sequences(PROMPTS, bucket=Bucket(32, 4))
        program = jax.jit(score, static_argnames=("config", "implementation"))
        return len(program.lower(params, batch, config=config, implementation="xla").as_text().splitlines())

    assert size(2) == size(20)


def test_a_part_of_a_cache():
    batch = nest_sequences([[1, 2, 3]], page_tables=[[1, 2]], page_size=2, bucket=Bucket(5, 2, 4))
    metadata = prepare_metadata(batch, CONFIG.layer_specs())
    moved = metadata.at_page(10)
    np.testing.assert_array_equal(moved.slot_mapping, [22, 23, 24, PAD_SLOT, PAD_SLOT])
    np.testing.assert_array_equal(moved.page_list[:2], [11, 12])
    np.testing.assert_array_equal(moved.kv_lens, metadata.kv_lens)


@pytest.mark.smoke
@pytest.mark.parametrize("write", [tiny.write_safetensors, tiny.write_sharded_safetensors])
def test_loaded_stacked_is_stacked_after_loading(tmp_path, write):
    folder = write(tmp_path, tiny.LLAMA, tiny.random_tensors(tiny.LLAMA))
    params, stacked = load_params(folder), load_params(folder, stack_layers=True)
    expected = stack_layers(params)
    jax.tree.map(np.testing.assert_array_equal, stacked, expected)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)
    apart, model = load_model(folder), load_model(folder, stack_layers=True)
    shapes = jax.tree.map(lambda x: (x.shape, x.sharding), model.params)
    wanted = abstract_params(model.config, "float32", stack_layers=True)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.sharding), wanted)
    assert generate(model, PROMPTS, 4) == generate(apart, PROMPTS, 4)


def test_saved_as_layers_apart(tmp_path, models):
    apart, stacked = models
    save_params(tmp_path / "checkpoint", stacked.params, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "checkpoint"), apart.params)


def test_gradients_are_those_of_layers_apart(models):
    batch = nest_sequences(PROMPTS, bucket=Bucket(24, 4))

    def loss(params):
        logits = score(params, batch, config=CONFIG, implementation="xla")
        return jnp.where((jnp.arange(24) < 21)[:, None], logits, 0).std()

    apart, stacked = (jax.jit(jax.grad(loss))(model.params) for model in models)
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(stack_layers(apart)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
