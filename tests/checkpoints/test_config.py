"""What config.json means, in both dialects, and what of it is refused."""

import json

import hypothesis.strategies as st
import pytest
import tiny_checkpoints as tiny
from hypothesis import given

from jaxattn import DecoderConfig, RopeConfig
from jaxattn.checkpoints import CheckpointError, config_from_dict, config_to_dict, load_config

MISTRAL = tiny.LLAMA | {"model_type": "mistral"}
FOREIGN = {"final_logit_softcapping": 20, "query_pre_attn_scalar": 16}
MIXED = {"layer_types": ["full_attention", "sliding_attention"]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


def test_every_key_arrives():
    config = config_from_dict(
        tiny.LLAMA | {"tie_word_embeddings": True, "attn_logit_softcapping": 30} | FOREIGN
    )
    assert config == DecoderConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ropes=(RopeConfig(theta=500.0),),
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        logits_soft_cap=30.0,
        final_logits_soft_cap=20.0,
        attention_scale=0.25,
    )


@pytest.mark.parametrize(
    "absent", [lambda c, *keys: without(c, *keys), lambda c, *keys: c | dict.fromkeys(keys)]
)
def test_defaults_of_missing_and_null_keys(absent):
    config = config_from_dict(
        absent(
            tiny.LLAMA, "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings"
        )
    )
    assert (config.num_kv_heads, config.head_dim) == (4, 6)
    assert (config.ropes, config.rms_norm_eps, config.tie_embeddings) == ((RopeConfig(),) * 2, 1e-6, False)


def test_what_mistral_leaves_out():
    heads = {"num_attention_heads": 16}
    assert config_from_dict(without(MISTRAL | heads, "num_key_value_heads")).num_kv_heads == 8
    assert config_from_dict(MISTRAL | heads | {"num_key_value_heads": None}).num_kv_heads == 16
    assert config_from_dict(MISTRAL).sliding_windows == (4096, 4096)
    assert config_from_dict(MISTRAL | {"sliding_window": None}).sliding_windows == (None, None)


@pytest.mark.parametrize("config", [tiny.LLAMA, MISTRAL])
def test_windows(config):
    assert config_from_dict(config | MIXED | {"sliding_window": 5}).sliding_windows == (None, 5)
    full = {"layer_types": ["full_attention"] * 2, "sliding_window": 5}
    assert config_from_dict(config | full).sliding_windows == (None, None)


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_scaling": None}, RopeConfig(theta=500.0)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            RopeConfig(theta=500.0, kind="linear", factor=2.0),
        ),
        ({"rope_scaling": {"rope_type": "default"}}, RopeConfig(theta=500.0)),
        ({"rope_scaling": LLAMA3}, RopeConfig(theta=500.0, kind="llama3", factor=8.0)),
        ({"rope_scaling": LLAMA3 | {"type": "llama3"}}, RopeConfig(theta=500.0, kind="llama3", factor=8.0)),
        ({"rope_parameters": {"rope_theta": 500.0}}, RopeConfig(theta=500.0)),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7.0}}, RopeConfig(theta=7.0)),
        (
            {"rope_parameters": LLAMA3 | {"rope_theta": 500}},
            RopeConfig(theta=500.0, kind="llama3", factor=8.0),
        ),
    ],
)
def test_both_dialects_of_rope(keys, rope):
    assert config_from_dict(tiny.LLAMA | keys).ropes == (rope, rope)


def test_the_architecture_stands_in_for_a_missing_model_type():
    config = without(tiny.LLAMA, "model_type") | {"architectures": ["MistralForCausalLM"]}
    assert config_from_dict(config).sliding_windows == (4096, 4096)


def test_what_gemma_leaves_out():
    """The released Gemma 3 4B, whose text_config holds what differs from the defaults."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = config_from_dict(
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    )
    assert (config.vocab_size, config.num_q_heads, config.num_kv_heads, config.head_dim) == (
        262208,
        8,
        4,
        256,
    )
    assert config.sliding_windows == tuple(None if i % 6 == 5 else 1024 for i in range(34))
    assert config.ropes[0] == RopeConfig(theta=1e4)
    assert config.ropes[5] == RopeConfig(theta=1e6, kind="linear", factor=8.0)
    assert (config.tie_embeddings, config.qk_norm, config.post_norms, config.norm_offset) == (True,) * 4
    assert (config.attention_scale, config.embedding_scale) == (1 / 16, 2560**0.5)
    gemma2 = config_from_dict(tiny.SIZES | {"model_type": "gemma2"})
    assert (gemma2.logits_soft_cap, gemma2.final_logits_soft_cap) == (50.0, 30.0)
    assert gemma2.sliding_windows == (4096, None)
    assert gemma2.activation == "gelu_tanh"


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_of_qwen_count_only_if_they_are_used(model_type):
    config = tiny.SIZES | {"model_type": model_type, "sliding_window": 7, "max_window_layers": 1}
    assert config_from_dict(config).sliding_windows == (None, None)
    assert config_from_dict(config | {"use_sliding_window": True}).sliding_windows == (None, 7)
    with pytest.raises(CheckpointError, match="use_sliding_window is not true"):
        config_from_dict(config | MIXED)


@pytest.mark.parametrize(
    ("keys", "activation"),
    [
        ({}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "silu"}, "silu"),
    ],
)
def test_activations_of_gemma(keys, activation):
    assert config_from_dict(tiny.SIZES | {"model_type": "gemma"} | keys).activation == activation


def test_ropes_by_type_of_layer():
    by_type = {"sliding_attention": {"rope_theta": 7.0}, "full_attention": LLAMA3 | {"rope_theta": 500.0}}
    keys = MIXED | {"sliding_window": 5, "rope_parameters": by_type}
    config = config_from_dict(without(tiny.LLAMA, "rope_theta") | keys)
    assert config.ropes == (RopeConfig(theta=500.0, kind="llama3", factor=8.0), RopeConfig(theta=7.0))


ROPES = st.builds(
    RopeConfig,
    theta=st.floats(1, 1e7),
    kind=st.just("linear"),
    factor=st.floats(1, 64),
) | st.builds(
    RopeConfig,
    theta=st.floats(1, 1e7),
    kind=st.just("llama3"),
    factor=st.floats(1, 64),
    low_freq_factor=st.floats(0.1, 2),
    high_freq_factor=st.floats(2.1, 9),
    original_max_position=st.integers(1, 9999),
)
POSITIVE = st.floats(1e-6, 1e6)


@st.composite
def fields_of_decoders(draw) -> dict:
    """Of any decoder, also such as no model type has."""
    num_layers = draw(st.integers(1, 4))
    hidden_size = draw(st.integers(1, 99))
    kinds = draw(st.lists(st.booleans(), min_size=num_layers, max_size=num_layers))
    by_kind = {slides: draw(ROPES) for slides in (True, False)}
    window = draw(st.integers(1, 9))
    gemma = draw(st.booleans())
    return {
        "vocab_size": 7,
        "hidden_size": hidden_size,
        "intermediate_size": 5,
        "num_layers": num_layers,
        "num_q_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 4,
        "sliding_windows": tuple(window if slides else None for slides in kinds),
        "ropes": tuple(by_kind[slides] for slides in kinds) if draw(st.booleans()) else (draw(ROPES),),
        "activation": draw(st.sampled_from(["silu", "gelu_tanh"])),
        "qkv_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "post_norms": gemma and draw(st.booleans()),
        "norm_offset": gemma,
        "rms_norm_eps": draw(POSITIVE),
        "embedding_scale": hidden_size**0.5 if gemma else draw(st.none() | POSITIVE),
        "tie_embeddings": draw(st.booleans()),
        "attention_scale": draw(st.none() | POSITIVE),
        "logits_soft_cap": draw(st.none() | POSITIVE),
        "final_logits_soft_cap": draw(st.none() | POSITIVE),
    }


@given(fields_of_decoders())
def test_what_can_be_written_is_read_back(fields):
    config = DecoderConfig(**fields)
    differences = (config.qkv_bias, config.qk_norm, config.post_norms)
    if config.norm_offset:
        known = differences in [(False, False, False), (False, False, True), (False, True, True)]
    else:
        known = differences.count(True) <= 1 and config.embedding_scale is None
    if known:
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    else:
        with pytest.raises(CheckpointError, match="no model type has"):
            config_to_dict(config)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_can_be_written(name):
    config = config_from_dict(tiny.FAMILIES[name])
    written = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(written))) == config
    wanted = tiny.FAMILIES[name]["model_type"]
    assert written["model_type"] == {"gemma3": "gemma3_text", "phi3": "mistral"}.get(wanted, wanted)


SIZES = {
    "vocab_size": 7,
    "hidden_size": 12,
    "intermediate_size": 5,
    "num_layers": 3,
    "num_q_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 4,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_windows": (1, 2, None)}, "room for one size"),
        ({"ropes": (RopeConfig(), RopeConfig(theta=2.0), RopeConfig())}, "one per type of layer"),
        ({"embedding_scale": 2.0}, "no model type has .* embedding_scale=2.0"),
        ({"norm_offset": True, "embedding_scale": 2.0}, "room for √hidden_size or none"),
        ({"qkv_bias": True, "qk_norm": True}, "no model type has qkv_bias=True, qk_norm=True"),
    ],
)
def test_what_cannot_be_written_is_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        config_to_dict(DecoderConfig(**SIZES, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_windows": (1, 2)}, "one entry, or one per layer: num_layers=3"),
        ({"ropes": ()}, "one entry, or one per layer"),
        ({"activation": "gelu"}, "unknown activation='gelu'"),
        ({"embedding_scale": 0.0}, "embedding_scale=0.0 must be positive"),
        ({"final_logits_soft_cap": -1.0}, "final_logits_soft_cap=-1.0 must be positive"),
    ],
)
def test_what_is_no_decoder_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**SIZES, **fields)


REFUSED = [
    ({"model_type": "gpt2"}, "model_type='gpt2'; supported are 'llama', 'mistral', 'phi3'"),
    ({"model_type": None}, "supported are 'llama', 'mistral'"),
    ({"vocab_size": None, "intermediate_size": None}, "lacks vocab_size, intermediate_size"),
    ({"hidden_size": True}, "hidden_size=True must be a whole number"),
    ({"hidden_size": "24"}, "hidden_size='24' must be a whole number"),
    ({"vocab_size": 61.0}, "vocab_size=61.0 must be a whole number"),
    ({"num_hidden_layers": -2}, "num_hidden_layers=-2 must be a whole number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be"),
    ({"num_key_value_heads": 3}, "num_q_heads=4 must be a multiple of num_kv_heads=3"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"head_dim": None, "hidden_size": 22}, "hidden_size=22 must be a multiple"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be a positive number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be"),
    ({"rope_theta": False}, "rope_theta=False must be"),
    ({"rope_theta": 10**400}, "must be a positive number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
    ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0 must be"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu', 'swish', 'gelu_pytorch_tanh'"),
    (
        {"attention_bias": True},
        "attention_bias=True is not supported: the output projection has no bias here",
    ),
    ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    (
        {"num_local_experts": 8},
        "num_local_experts=8 is not supported: mixtures of experts .* load a dense model",
    ),
    ({"quantization_config": {"bits": 4}}, "quantization_config=.* load the unquantized model"),
    ({"use_bidirectional_attention": True}, "load a causal model"),
    ({"hidden_act": ["silu"]}, "is not supported, only"),
    (
        {"model_type": "gemma", "hidden_act": "silu"},
        "hidden_act='silu' contradicts .*; give hidden_activation",
    ),
    ({"model_type": "gemma3", "text_config": None}, "needs text_config"),
    ({"model_type": "gemma3", "text_config": {}, "quantization_config": {"bits": 4}}, "load the unquantized"),
    ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 7.0}}, "an object for 'full_attention'"),
    ({"model_type": "gemma2", "sliding_window": None}, "sliding_window is missing"),
    ({"model_type": "gemma2", "sliding_window_pattern": 0}, "sliding_window_pattern=0 must be"),
    ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window=1 must be true or false"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1}, "max_window_layers=-1"),
    ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "long_factor": []}}, "rope_type 'longrope'"),
    ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75 is not supported"),
    ({"sliding_window": 5}, "add layer_types, or use model_type 'mistral'"),
    (MIXED, "layer_types has 'sliding_attention', but sliding_window is missing"),
    ({"layer_types": ["full_attention"]}, "must list num_hidden_layers=2 types"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types has 'linear_attention'"),
    ({"layer_types": ["full_attention", None]}, "layer_types has None"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'; supported are"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    ({"rope_scaling": {"factor": 2.0}}, "must name one rope_type"),
    ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "must name one rope_type"),
    ({"rope_scaling": {"type": "linear"}}, r"rope_scaling.factor=\(missing\) must be a positive number"),
    (
        {"rope_scaling": without(LLAMA3, "original_max_position_embeddings")},
        "original_max_position_embeddings",
    ),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor must be above"),
    ({"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "attention_factor"),
    ({"rope_scaling": "linear"}, "must be an object"),
    ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3}, "both rope_parameters and rope_scaling"),
    (
        {"rope_parameters": {"rope_theta": 7.0}},
        "two values of rope_theta, 500.0 and, in rope_parameters, 7.0",
    ),
    ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "in rope_parameters.full_attention, 7.0"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_what_the_decoder_does_not_compute_is_refused(keys, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_dict(tiny.LLAMA | keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{nope", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "must hold keys and values, not a list"),
        (b"{}", "no model_type; supported are"),
    ],
)
def test_broken_files_are_named(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
        load_config(tmp_path)


def test_a_config_is_read_by_its_own_name(tmp_path):
    file = tiny.write_config(tmp_path, tiny.LLAMA) / "config.json"
    assert load_config(file) == load_config(str(tmp_path)) == config_from_dict(tiny.LLAMA)
