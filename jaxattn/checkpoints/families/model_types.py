"""What each model type of config.json means, as data: defaults, and how its decoder differs from a Llama.

Defaults are those of transformers, which writes a key of a nested `text_config`, and `tie_word_embeddings`
of every Gemma, only where it differs from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

FULL, SLIDING = "full_attention", "sliding_attention"


class Family(NamedTuple):
    """A model type.

    Attributes:
        architecture: The class of its causal language model.
        defaults: The values of keys that a config leaves out, where they are not Llama's.
        windows: Which layers have `sliding_window` where no `layer_types` say so: "none"; "all"; "last",
            those from `max_window_layers` on, and only with `use_sliding_window`; or "pattern", all but each
            `sliding_window_pattern`th.
        rope_by_type: Whether each layer type has a rotary embedding of its own (Gemma 3).
        qkv_bias: Whether queries, keys and values have biases.
        qk_norm: Whether queries and keys go through norms.
        post_norms: Whether what attention and the MLP return goes through norms.
        norm_offset: Whether norms scale by 1 + weight.
        scaled_embedding: Whether embedded tokens are scaled by √hidden_size.
        activation_key: The key of the activation.
    """

    architecture: str
    defaults: Mapping[str, Any] = {}
    windows: str = "none"
    rope_by_type: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: bool = False
    scaled_embedding: bool = False
    activation_key: str = "hidden_act"


LLAMA_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

_GEMMA = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_GEMMA_2 = _GEMMA | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}, windows="all"
    ),
    "phi3": Family("Phi3ForCausalLM", {"rms_norm_eps": 1e-5}, windows="all"),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, windows="last", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, windows="last", qk_norm=True),
    "gemma": Family(
        "GemmaForCausalLM",
        _GEMMA | {"num_key_value_heads": 16},
        norm_offset=True,
        scaled_embedding=True,
        activation_key="hidden_activation",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA_2
        | {"sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        windows="pattern",
        post_norms=True,
        norm_offset=True,
        scaled_embedding=True,
        activation_key="hidden_activation",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA_2
        | {
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        windows="pattern",
        rope_by_type=True,
        qk_norm=True,
        post_norms=True,
        norm_offset=True,
        scaled_embedding=True,
        activation_key="hidden_activation",
    ),
}

MULTIMODAL = {"gemma3": "gemma3_text"}
"""Models of images and text, whose decoder's keys are nested in `text_config`: the decoder alone is read."""

ARCHITECTURES = {
    prefix + family.architecture: name for name, family in FAMILIES.items() for prefix in ("", "Flax")
} | {"Gemma3ForConditionalGeneration": "gemma3"}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
