"""Hugging Face's config.json, in the dialects of transformers 4 and 5, as a DecoderConfig.

A key means what Hugging Face's torch models make of it, and two keys of other families are followed
where a Llama has them: `layer_types` with `sliding_window`, and `attn_logit_softcapping`. What the
decoder does not compute is refused by name, never ignored.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.locate import CONFIG, as_path, locate
from jaxattn.models import DecoderConfig, RopeConfig


class Family(NamedTuple):
    """What a model type makes of keys that its config leaves out.

    Attributes:
        num_kv_heads: Default of `num_key_value_heads`; None for as many as query heads.
        sliding_window: Default of `sliding_window`.
        window_everywhere: Whether a window without `layer_types` is that of all layers.
    """

    num_kv_heads: int | None = None
    sliding_window: int | None = None
    window_everywhere: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(num_kv_heads=8, sliding_window=4096, window_everywhere=True),
}

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "FlaxLlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "FlaxMistralForCausalLM": "mistral",
}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# The only values of keys that would change what the decoder computes; the first is the default.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "num_local_experts": (None,),
    "quantization_config": (None,),
    "final_logit_softcapping": (None,),
}

_FULL, _SLIDING = "full_attention", "sliding_attention"

_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    *_ROPE_NUMBERS["llama3"],
}  # fmt: skip

# A layer costs memory before any weight has been seen; no decoder comes near this many.
_MAX_LAYERS = 10_000


def load_config(path: str | os.PathLike[str]) -> DecoderConfig:
    """Read the configuration of a checkpoint.

    Args:
        path: The checkpoint, or its config.json.

    Raises:
        CheckpointError: If there is no config, or it is not one that the decoder can follow.
    """
    given = as_path(path)
    if given.suffix == ".json" and not given.name.endswith(".index.json"):
        return read_config(given)
    if (given / CONFIG).is_file():
        return read_config(given / CONFIG)
    return read_config(locate(given).find_config())


def read_config(file: Path) -> DecoderConfig:
    """Read a config.json.

    Raises:
        CheckpointError: If it is not JSON, or not a config that the decoder can follow.
    """
    try:
        raw = json.loads(file.read_bytes())
    # Bytes that are no UTF-8 are a ValueError as well; deep nesting exhausts the parser's stack.
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} must hold keys and values, not a {type(raw).__name__}")
    try:
        return config_from_dict(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def config_from_dict(raw: Mapping[str, Any]) -> DecoderConfig:
    """Understand the contents of a config.json.

    Args:
        raw: Its keys and values.

    Returns:
        The configuration, with the defaults that Hugging Face has for this model type.

    Raises:
        CheckpointError: If keys are missing, mistyped or contradictory, or ask for something that
            the decoder does not compute.
    """
    family = FAMILIES[_model_type(raw)]
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise CheckpointError(f"the config lacks {', '.join(missing)}")
    _check_supported(raw)
    num_layers, num_heads = _count(raw, "num_hidden_layers"), _count(raw, "num_attention_heads")
    if num_layers > _MAX_LAYERS:
        raise CheckpointError(f"num_hidden_layers={num_layers} is more than {_MAX_LAYERS}")
    num_kv_heads = _optional_count(raw, "num_key_value_heads", family.num_kv_heads) or num_heads
    try:
        return DecoderConfig(
            vocab_size=_count(raw, "vocab_size"),
            hidden_size=_count(raw, "hidden_size"),
            intermediate_size=_count(raw, "intermediate_size"),
            num_layers=num_layers,
            num_q_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(raw),
            sliding_windows=_sliding_windows(raw, family, num_layers),
            rope=_rope(raw),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            tie_embeddings=_flag(raw, "tie_word_embeddings"),
            logits_soft_cap=_optional_number(raw, "attn_logit_softcapping"),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"the config describes no decoder: {error}") from error


def config_to_dict(config: DecoderConfig) -> dict[str, Any]:
    """Write a configuration in Hugging Face's terms; `config_from_dict` reads it back.

    Raises:
        CheckpointError: If layers have windows of different sizes, which these terms cannot say.
    """
    windows = sorted({window for window in config.sliding_windows if window is not None})
    if len(windows) > 1:
        raise CheckpointError(f"sliding_windows={config.sliding_windows}: config.json has room for one size")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "sliding_window": windows[0] if windows else None,
        "layer_types": [_FULL if window is None else _SLIDING for window in config.sliding_windows],
        "tie_word_embeddings": config.tie_embeddings,
        "attn_logit_softcapping": config.logits_soft_cap,
    }


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    numbers = {key: getattr(rope, key) for key in _ROPE_NUMBERS[rope.kind]}
    if rope.kind == "llama3":
        numbers["original_max_position_embeddings"] = rope.original_max_position
    return {"rope_type": rope.kind, **numbers}


def _model_type(raw: Mapping[str, Any]) -> str:
    architectures = raw.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    model_type = raw.get("model_type") or (_ARCHITECTURES.get(named) if isinstance(named, str) else None)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        what = (
            f"model_type={raw.get('model_type')!r}" if "model_type" in raw else "the config has no model_type"
        )
        raise CheckpointError(f"{what}; supported are {', '.join(map(repr, FAMILIES))}")
    return model_type


def _check_supported(raw: Mapping[str, Any]) -> None:
    for key, values in _ONLY.items():
        value = raw.get(key, values[0])
        if value not in values:
            raise CheckpointError(f"{key}={value!r} is not supported, only {values[0]!r}")


def _head_dim(raw: Mapping[str, Any]) -> int:
    hidden_size, num_heads = _count(raw, "hidden_size"), _count(raw, "num_attention_heads")
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"without head_dim, hidden_size={hidden_size} must be a multiple of "
            f"num_attention_heads={num_heads}"
        )
    return _optional_count(raw, "head_dim") or hidden_size // num_heads


def _sliding_windows(raw: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer, in visible keys, the query's own included."""
    window = _optional_count(raw, "sliding_window", family.sliding_window)
    layer_types = raw.get("layer_types")
    if layer_types is None:
        if window is not None and not family.window_everywhere:
            raise CheckpointError(
                f"sliding_window={window} does not say which layers it is for: add layer_types, or use "
                "model_type 'mistral', where it is for all"
            )
        return (window,) * num_layers
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise CheckpointError(f"layer_types={layer_types!r} must list num_hidden_layers={num_layers} types")
    for layer_type in layer_types:
        if layer_type not in (_FULL, _SLIDING):
            raise CheckpointError(f"layer_types has {layer_type!r}; supported are {_FULL!r} and {_SLIDING!r}")
    if _SLIDING in layer_types and window is None:
        raise CheckpointError(f"layer_types has {_SLIDING!r}, but sliding_window is missing")
    return tuple(window if layer_type == _SLIDING else None for layer_type in layer_types)


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Transformers 4 writes `rope_theta` and `rope_scaling`, 5 writes all into `rope_parameters`."""
    if raw.get("rope_parameters") is not None and raw.get("rope_scaling") is not None:
        raise CheckpointError("the config has both rope_parameters and rope_scaling; keep one")
    key = "rope_scaling" if raw.get("rope_parameters") is None else "rope_parameters"
    scaling = {} if raw.get(key) is None else raw[key]
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"{key}={scaling!r} must be an object of keys and values")
    kind = _rope_kind(key, scaling)
    unknown = sorted(set(scaling) - _ROPE_KEYS)
    if unknown or scaling.get("partial_rotary_factor", 1) not in _ONLY["partial_rotary_factor"]:
        raise CheckpointError(
            f"{key}={dict(scaling)!r} is not supported: {unknown or 'partial_rotary_factor'}"
        )
    rope = RopeConfig(theta=_rope_theta(raw, scaling), kind=kind)
    for name in _ROPE_NUMBERS[kind]:
        rope = replace(rope, **{name: _number(scaling, name, owner=key)})
    if kind != "llama3":
        return rope
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise CheckpointError(f"{key}={dict(scaling)!r}: high_freq_factor must be above low_freq_factor")
    return replace(rope, original_max_position=_count(scaling, "original_max_position_embeddings", owner=key))


def _rope_kind(key: str, scaling: Mapping[str, Any]) -> str:
    kinds = {scaling[name] for name in ("rope_type", "type") if isinstance(scaling.get(name), str)}
    if not scaling or (not kinds and key == "rope_parameters"):
        return "default"
    if len(kinds) != 1:
        raise CheckpointError(f"{key}={dict(scaling)!r} must name one rope_type")
    (kind,) = kinds
    if kind not in _ROPE_NUMBERS:
        raise CheckpointError(
            f"{key} has rope_type {kind!r}; supported are {', '.join(map(repr, _ROPE_NUMBERS))}"
        )
    return kind


def _rope_theta(raw: Mapping[str, Any], scaling: Mapping[str, Any]) -> float:
    outer = _number(raw, "rope_theta", 10000.0)
    inner = _number(scaling, "rope_theta", outer)
    if raw.get("rope_theta") is not None and inner != outer:
        raise CheckpointError(f"the config has two values of rope_theta, {outer} and {inner}")
    return inner


def _count(raw: Mapping[str, Any], key: str, *, owner: str = "") -> int:
    value = raw.get(key)
    # Not isinstance: a bool is an int, and "num_hidden_layers": true is no number of layers.
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{_name(key, owner)}={_shown(value)} must be a whole number of at least 1")
    return value


def _optional_count(raw: Mapping[str, Any], key: str, default: int | None = None) -> int | None:
    """The default where the key is missing, None where it is null."""
    value = raw.get(key, default)
    return None if value is None else _count({key: value}, key)


def _number(raw: Mapping[str, Any], key: str, default: float | None = None, *, owner: str = "") -> float:
    """A positive number; the default, if there is one, where the key is missing or null."""
    value: Any = default if raw.get(key) is None else raw[key]
    # NaN compares false and is refused; so is an integer that no float can hold.
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{_name(key, owner)}={_shown(value)} must be a positive number")
    return float(value)


def _optional_number(raw: Mapping[str, Any], key: str) -> float | None:
    return None if raw.get(key) is None else _number(raw, key)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key, False)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise CheckpointError(f"{key}={value!r} must be true or false")


def _name(key: str, owner: str) -> str:
    return f"{owner}.{key}" if owner else key


def _shown(value: Any) -> str:
    return "(missing)" if value is None else repr(value)
