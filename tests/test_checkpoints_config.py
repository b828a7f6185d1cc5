"""What config.json means, in both dialects, and what of it is refused."""

import json

import pytest
import tiny_checkpoints as tiny

from jaxattn import DecoderConfig, RopeConfig
from jaxattn.checkpoints import CheckpointError, config_from_dict, config_to_dict, load_config

MISTRAL = tiny.LLAMA | {"model_type": "mistral"}
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
    config = config_from_dict(tiny.LLAMA | {"tie_word_embeddings": True, "attn_logit_softcapping": 30})
    assert config == DecoderConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope=RopeConfig(theta=500.0),
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        logits_soft_cap=30.0,
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
    assert (config.rope, config.rms_norm_eps, config.tie_embeddings) == (RopeConfig(), 1e-6, False)


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
    assert config_from_dict(tiny.LLAMA | keys).rope == rope


def test_the_architecture_stands_in_for_a_missing_model_type():
    config = without(tiny.LLAMA, "model_type") | {"architectures": ["MistralForCausalLM"]}
    assert config_from_dict(config).sliding_windows == (4096, 4096)


@pytest.mark.parametrize("windows", [(), (3, 3), (None, 9)])
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=5e5),
        RopeConfig(kind="linear", factor=3.0),
        RopeConfig(kind="llama3", factor=8.0, low_freq_factor=2.0, original_max_position=99),
    ],
)
def test_writing_and_reading_is_the_identity(windows, rope):
    config = DecoderConfig(
        vocab_size=7, hidden_size=12, intermediate_size=5, num_layers=2,
        num_q_heads=6, num_kv_heads=3, head_dim=4,
        sliding_windows=windows, rope=rope, rms_norm_eps=3e-6, tie_embeddings=True, logits_soft_cap=9.0,
    )  # fmt: skip
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


REFUSED = [
    ({"model_type": "gemma2"}, "model_type='gemma2'; supported are 'llama', 'mistral'"),
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
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    ({"attention_bias": True}, "attention_bias=True is not supported"),
    ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ({"num_local_experts": 8}, "num_local_experts=8 is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
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
    ({"rope_parameters": {"rope_theta": 7.0}}, "two values of rope_theta, 500.0 and 7.0"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "full_attention"),
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
