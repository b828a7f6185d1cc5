"""Where the decoder rounds, and what it begins with: what logits within a tolerance do not show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Bucket, DecoderConfig, RopeConfig, nest_sequences, prepare_metadata
from jaxattn.models import abstract_params, forward, init_params
from jaxattn.models.decoder import rms_norm

pytestmark = pytest.mark.smoke

CONFIG = DecoderConfig(
    vocab_size=19,
    hidden_size=24,
    intermediate_size=8,
    num_layers=2,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=8,
)
GEMMA = dataclasses.replace(
    CONFIG, norm_offset=True, embedding_scale=24**0.5, qk_norm=True, post_norms=True, activation="gelu_tanh"
)
X = 3 * jax.random.normal(jax.random.key(0), (5, 24), jnp.bfloat16)
WEIGHT = jax.random.normal(jax.random.key(1), (24,), jnp.bfloat16)


def norm_of(x) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def test_norms_round_where_their_family_does():
    """Llama rounds what is normed and multiplies then; Gemma multiplies by 1 + weight and rounds then."""
    llama = jnp.asarray(norm_of(X)).astype(jnp.bfloat16) * WEIGHT[None]
    gemma = jnp.asarray(norm_of(X) * (1 + np.asarray(WEIGHT, np.float32))).astype(jnp.bfloat16)
    one_place = 2.0**-7  # the last bit of the float32 norm may tip a rounding
    np.testing.assert_allclose(*_wide(rms_norm(X, WEIGHT, CONFIG), llama), rtol=one_place)
    np.testing.assert_allclose(*_wide(rms_norm(X, WEIGHT, GEMMA), gemma), rtol=one_place)
    assert np.mean(rms_norm(X, WEIGHT, CONFIG) == llama) > 0.95
    assert np.mean(rms_norm(X, WEIGHT, GEMMA) == gemma) > 0.95


def _wide(*arrays) -> list[np.ndarray]:
    return [np.asarray(array, np.float32) for array in arrays]


def test_the_embedding_scale_is_rounded_to_the_dtype_of_the_parameters():
    params = init_params(jax.random.key(0), GEMMA, "bfloat16")
    for layer in params["layers"]:  # nothing is added to the residual stream
        layer["o"], layer["down"] = jnp.zeros_like(layer["o"]), jnp.zeros_like(layer["down"])
    batch = nest_sequences([[3, 1, 4, 1, 5]], bucket=Bucket(8, 1))
    metadata = prepare_metadata(batch, GEMMA.layer_specs())
    run = jax.jit(forward, static_argnames=("config", "implementation"))
    hidden, _ = run(params, GEMMA, batch.token_ids, metadata, implementation="reference")
    scaled = params["embed"][batch.token_ids] * jnp.bfloat16(24**0.5)
    np.testing.assert_array_equal(hidden, rms_norm(scaled, params["final_norm"], GEMMA))


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, qkv_bias=True), GEMMA])
def test_random_parameters_norm_by_one_and_have_no_biases(config):
    params = init_params(jax.random.key(0), config, "bfloat16")
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config, "bfloat16"))
    one = 0 if config.norm_offset else 1
    for layer in params["layers"]:
        assert all((leaf == one).all() for name, leaf in layer.items() if name.endswith("norm"))
        assert not any(leaf.any() for name, leaf in layer.items() if name.endswith("bias"))


def test_metadata_are_derived_once_per_rope_and_window():
    ropes = (RopeConfig(), RopeConfig(theta=500.0))
    config = dataclasses.replace(GEMMA, num_layers=6, ropes=ropes * 3, sliding_windows=(None, 5) * 3)
    metadata = prepare_metadata(nest_sequences([[3, 1]], bucket=Bucket(8, 1)), config.layer_specs())
    assert [tables.config for tables in metadata.rope_tables] == list(ropes)
    assert len(metadata.visible) == 2


def test_one_window_and_one_rope_stand_for_all_layers():
    config = dataclasses.replace(CONFIG, sliding_windows=(7,))
    assert config.sliding_windows == (7, 7)
    assert len(config.ropes) == 2
    assert hash(config) == hash(dataclasses.replace(CONFIG, sliding_windows=(7, 7)))
