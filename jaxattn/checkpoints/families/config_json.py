"""Hugging Face's config.json, in the dialects of transformers 4 and 5, as a DecoderConfig.

A key means what Hugging Face's torch models make of it, and keys of other families are followed wherever
they stand: `layer_types` with `sliding_window`, `rope_parameters` by layer type, `query_pre_attn_scalar`, and
the soft caps. What the decoder does not compute is refused by name, never ignored. Of a model of images and
text, whose decoder's keys are nested in `text_config`, the decoder is read. In which dtype the weights are
stored, they say themselves, so `torch_dtype` and `dtype` are not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.families.model_types import (
    ACTIVATIONS,
    ARCHITECTURES,
    FAMILIES,
    FULL,
    LLAMA_DEFAULTS,
    MULTIMODAL,
    SLIDING,
    Family,
)
from jaxattn.checkpoints.families.rope import read_ropes, write_ropes
from jaxattn.checkpoints.families.values import count, flag, number, optional_count, optional_number
from jaxattn.models import DecoderConfig

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# Keys whose null is not their default, but says that there is no such thing.
_NULLABLE = (
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)

_NO_EXPERTS = "mixtures of experts are not supported; load a dense model"
# Keys that would change what the decoder computes: the values it can have besides null, and what else to do.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False,), "the output projection has no bias here; convert to a model without"),
    "mlp_bias": ((False,), "the MLP has no biases here; convert to a model without"),
    "partial_rotary_factor": ((1,), "whole heads are rotated here; load a model of this family that does so"),
    "num_local_experts": ((), _NO_EXPERTS),
    "num_experts": ((0,), _NO_EXPERTS),
    "quantization_config": ((), "quantized weights are not read; load the unquantized model"),
    "use_bidirectional_attention": ((False,), "this decoder is causal; load a causal model"),
}

# A layer costs memory before any weight has been seen; no decoder comes near this many.
_MAX_LAYERS = 10_000


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
    model_type, raw = _decoder_keys(raw)
    family = FAMILIES[model_type]
    values = {**LLAMA_DEFAULTS, **family.defaults}
    values |= {key: value for key, value in raw.items() if value is not None or key in _NULLABLE}
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise CheckpointError(f"the config lacks {', '.join(missing)}")
    _check_supported(values, family)
    num_layers, num_heads = count(values, "num_hidden_layers"), count(values, "num_attention_heads")
    if num_layers > _MAX_LAYERS:
        raise CheckpointError(f"num_hidden_layers={num_layers} is more than {_MAX_LAYERS}")
    layer_types, window = _layer_types(values, family, num_layers)
    query_scalar = optional_number(values, "query_pre_attn_scalar")
    try:
        return DecoderConfig(
            vocab_size=count(values, "vocab_size"),
            hidden_size=count(values, "hidden_size"),
            intermediate_size=count(values, "intermediate_size"),
            num_layers=num_layers,
            num_q_heads=num_heads,
            num_kv_heads=optional_count(values, "num_key_value_heads") or num_heads,
            head_dim=_head_dim(values),
            sliding_windows=tuple(window if layer == SLIDING else None for layer in layer_types),
            ropes=read_ropes(raw, family, layer_types),
            activation=_activation(raw, family),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            post_norms=family.post_norms,
            norm_offset=family.norm_offset,
            rms_norm_eps=number(values, "rms_norm_eps"),
            embedding_scale=count(values, "hidden_size") ** 0.5 if family.scaled_embedding else None,
            tie_embeddings=flag(values, "tie_word_embeddings"),
            attention_scale=None if query_scalar is None else query_scalar**-0.5,
            logits_soft_cap=optional_number(values, "attn_logit_softcapping"),
            final_logits_soft_cap=optional_number(values, "final_logit_softcapping"),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"the config describes no decoder: {error}") from error


def config_to_dict(config: DecoderConfig) -> dict[str, Any]:
    """Write a configuration in Hugging Face's terms; `config_from_dict` reads it back.

    The model type is the first that has what the decoder needs; of those that would do, one that has
    windows if the decoder has.

    Raises:
        CheckpointError: If these terms cannot say it: windows of several sizes, several rotary embeddings
            among layers of one type, or biases, norms and scales that no model type has together.
    """
    windows = sorted({window for window in config.sliding_windows if window is not None})
    if len(windows) > 1:
        raise CheckpointError(f"sliding_windows={config.sliding_windows}: config.json has room for one size")
    name = _model_type_for(config)
    family = FAMILIES[name]
    layer_types = [FULL if window is None else SLIDING for window in config.sliding_windows]
    activation = next(key for key, value in ACTIVATIONS.items() if value == config.activation)
    return {
        "architectures": [family.architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        family.activation_key: activation,
        "rms_norm_eps": config.rms_norm_eps,
        **write_ropes(config.ropes, family, layer_types),
        "sliding_window": windows[0] if windows else None,
        **({"use_sliding_window": bool(windows)} if family.windows == "last" else {}),
        "layer_types": layer_types,
        "tie_word_embeddings": config.tie_embeddings,
        "query_pre_attn_scalar": _query_scalar(config.attention_scale),
        "attn_logit_softcapping": config.logits_soft_cap,
        "final_logit_softcapping": config.final_logits_soft_cap,
    }


def _model_type_for(config: DecoderConfig) -> str:
    scaled = config.embedding_scale is not None
    needed = {name: getattr(config, name) for name in ("qkv_bias", "qk_norm", "post_norms", "norm_offset")}
    found = [
        name
        for name, family in FAMILIES.items()
        if all(getattr(family, key) == value for key, value in needed.items())
        and family.scaled_embedding == scaled
    ]
    if not found:
        what = ", ".join(f"{key}={value}" for key, value in needed.items())
        raise CheckpointError(f"no model type has {what}, embedding_scale={config.embedding_scale}")
    if scaled and config.embedding_scale != config.hidden_size**0.5:
        raise CheckpointError(
            f"embedding_scale={config.embedding_scale}: config.json has room for √hidden_size or none"
        )
    windowed = [name for name in found if FAMILIES[name].windows != "none"]
    return windowed[0] if windowed and any(config.sliding_windows) else found[0]


def _query_scalar(scale: float | None) -> int | float | None:
    """The number whose power of -1/2 is a scale; rounded like it, and a whole one if there is one."""
    if scale is None:
        return None

    def candidates() -> Iterator[int | float]:
        below = above = scale**-2
        yield round(above)
        for _ in range(8):  # the power of -1/2 halves relative distances: some neighbour is right
            yield from (below, above)
            below, above = math.nextafter(below, 0), math.nextafter(above, math.inf)

    for candidate in candidates():
        if candidate > 0 and float(candidate) ** -0.5 == scale:
            return candidate
    raise CheckpointError(f"attention_scale={scale}: config.json has room for x ** -0.5")


def _decoder_keys(raw: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The model type and keys of the decoder, which a multimodal config nests."""
    architectures = raw.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    model_type = raw.get("model_type") or (ARCHITECTURES.get(named) if isinstance(named, str) else None)
    nested = raw.get("text_config")
    if isinstance(model_type, str) and model_type in MULTIMODAL:
        if not isinstance(nested, Mapping):
            raise CheckpointError(
                f"model_type={model_type!r} needs text_config, an object of keys and values"
            )
        outer = {key: raw[key] for key in (*_ONLY, "tie_word_embeddings") if key in raw}
        return MULTIMODAL[model_type], {**outer, **nested}
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        what = (
            f"model_type={raw.get('model_type')!r}" if "model_type" in raw else "the config has no model_type"
        )
        supported = ", ".join(map(repr, (*FAMILIES, *MULTIMODAL)))
        raise CheckpointError(f"{what}; supported are {supported}")
    return model_type, raw


def _check_supported(values: Mapping[str, Any], family: Family) -> None:
    for key, (allowed, remedy) in _ONLY.items():
        if key == "attention_bias" and family.qkv_bias:
            continue  # Qwen 2 has no such key: its biases are always there, and never on the output
        if values.get(key) is not None and values[key] not in allowed:
            raise CheckpointError(f"{key}={values[key]!r} is not supported: {remedy}")


def _activation(raw: Mapping[str, Any], family: Family) -> str:
    key = family.activation_key
    name = raw.get(key)
    if name is None:
        name = {**LLAMA_DEFAULTS, **family.defaults}[key]
        # Gemma's older key: "gelu" in the first files of Gemma 1, which transformers 4 takes for the default.
        if key != "hidden_act" and raw.get("hidden_act") not in (None, "gelu", name):
            raise CheckpointError(
                f"hidden_act={raw['hidden_act']!r} contradicts {name!r}, and transformers 4 and 5 do not "
                f"follow the same of them; give {key}"
            )
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise CheckpointError(f"{key}={name!r} is not supported, only {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name]


def _head_dim(values: Mapping[str, Any]) -> int:
    hidden_size, num_heads = count(values, "hidden_size"), count(values, "num_attention_heads")
    if values.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"without head_dim, hidden_size={hidden_size} must be a multiple of "
            f"num_attention_heads={num_heads}"
        )
    return optional_count(values, "head_dim") or hidden_size // num_heads


def _layer_types(
    values: Mapping[str, Any], family: Family, num_layers: int
) -> tuple[Sequence[str], int | None]:
    """Per layer, whether it slides; and the window, in visible keys, the query's own included."""
    window = optional_count(values, "sliding_window")
    unused = family.windows == "last" and not flag(values, "use_sliding_window")
    if unused:
        window = None
    layer_types = values.get("layer_types")
    if layer_types is None:
        layer_types = _default_layer_types(values, family, num_layers, window)
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise CheckpointError(f"layer_types={layer_types!r} must list num_hidden_layers={num_layers} types")
    for layer_type in layer_types:
        if layer_type not in (FULL, SLIDING):
            raise CheckpointError(f"layer_types has {layer_type!r}; supported are {FULL!r} and {SLIDING!r}")
    if SLIDING in layer_types and window is None:
        which = "use_sliding_window is not true" if unused else "sliding_window is missing"
        raise CheckpointError(f"layer_types has {SLIDING!r}, but {which}")
    return layer_types, window


def _default_layer_types(
    values: Mapping[str, Any], family: Family, num_layers: int, window: int | None
) -> list[str]:
    match family.windows:
        case "none" if window is not None:
            raise CheckpointError(
                f"sliding_window={window} does not say which layers it is for: add layer_types, or use "
                "model_type 'mistral', where it is for all"
            )
        case "none":
            slides = [False] * num_layers
        case "all":
            slides = [window is not None] * num_layers
        case "last":
            first = values["max_window_layers"]
            if type(first) is not int or first < 0:
                raise CheckpointError(f"max_window_layers={first!r} must be a whole number of at least 0")
            slides = [window is not None and i >= first for i in range(num_layers)]
        case _:  # a pattern
            pattern = count(values, "sliding_window_pattern")
            slides = [(i + 1) % pattern != 0 for i in range(num_layers)]
    return [SLIDING if slide else FULL for slide in slides]
