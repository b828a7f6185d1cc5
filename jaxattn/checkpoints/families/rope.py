"""Rotary embeddings in config.json, in the dialects of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.families.model_types import FULL, LLAMA_DEFAULTS, SLIDING, Family
from jaxattn.checkpoints.families.values import count, number
from jaxattn.models import RopeConfig

_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_KEYS = {
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    *_NUMBERS["llama3"],
}  # fmt: skip


def read_ropes(raw: Mapping[str, Any], family: Family, layer_types: Sequence[str]) -> tuple[RopeConfig, ...]:
    """The rotary embedding of each layer.

    Transformers 4 writes `rope_theta`, `rope_scaling` and, for the sliding layers of Gemma 3, which have
    no scaling, `rope_local_base_freq`. Transformers 5 writes all into `rope_parameters`, for Gemma 3 by
    layer type.

    Args:
        raw: The config, without defaults.
        family: Its model type.
        layer_types: "full_attention" or "sliding_attention", per layer.

    Raises:
        CheckpointError: If keys are missing, contradictory, or ask for an embedding that is not computed.
    """
    if raw.get("rope_parameters") is not None and raw.get("rope_scaling") is not None:
        raise CheckpointError("the config has both rope_parameters and rope_scaling; keep one")
    key = "rope_scaling" if raw.get("rope_parameters") is None else "rope_parameters"
    scaling = {} if raw.get(key) is None else raw[key]
    _check_is_object(key, scaling)
    by_type = bool(scaling.keys() & {FULL, SLIDING})
    if family.rope_by_type and key == "rope_parameters" and not by_type:
        raise CheckpointError(
            f"{key}={dict(scaling)!r} must have an object for {FULL!r} and one for {SLIDING!r} here"
        )
    ropes = {}
    for layer_type in set(layer_types):
        owner, own = key, scaling
        if by_type:
            owner, own = f"{key}.{layer_type}", scaling.get(layer_type) or {}
        elif family.rope_by_type and layer_type == SLIDING:
            own = {}
        base = "rope_local_base_freq" if family.rope_by_type and layer_type == SLIDING else "rope_theta"
        default = family.defaults.get(base, LLAMA_DEFAULTS["rope_theta"])
        ropes[layer_type] = _read_rope(owner, own, _theta(raw, base, owner, own, default))
    return tuple(ropes[layer_type] for layer_type in layer_types)


def write_ropes(
    ropes: Sequence[RopeConfig], family: Family, layer_types: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The same as `rope_parameters`, by layer type where it must be; `read_ropes` reads it back.

    Raises:
        CheckpointError: If layers of one type have different embeddings, which these terms cannot say.
    """
    by_type = dict(zip(layer_types, ropes, strict=True))
    if any(by_type[layer_type] != rope for layer_type, rope in zip(layer_types, ropes, strict=True)):
        raise CheckpointError("ropes: config.json has room for one per type of layer, full and sliding")
    if family.rope_by_type or len(set(ropes)) > 1:
        return {"rope_parameters": {layer_type: _write_rope(rope) for layer_type, rope in by_type.items()}}
    return {"rope_parameters": _write_rope(ropes[0])}


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    numbers = {key: getattr(rope, key) for key in _NUMBERS[rope.kind]}
    if rope.kind == "llama3":
        numbers["original_max_position_embeddings"] = rope.original_max_position
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **numbers}


def _read_rope(owner: str, scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    _check_is_object(owner, scaling)
    kind = _kind(owner, scaling)
    unknown = sorted(set(scaling) - _KEYS)
    if unknown or scaling.get("partial_rotary_factor", 1) not in (1, None):
        raise CheckpointError(
            f"{owner}={dict(scaling)!r} is not supported: {unknown or 'partial_rotary_factor'}"
        )
    rope = RopeConfig(theta=theta, kind=kind)
    for name in _NUMBERS[kind]:
        rope = replace(rope, **{name: number(scaling, name, owner=owner)})
    if kind != "llama3":
        return rope
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise CheckpointError(f"{owner}={dict(scaling)!r}: high_freq_factor must be above low_freq_factor")
    return replace(
        rope, original_max_position=count(scaling, "original_max_position_embeddings", owner=owner)
    )


def _kind(owner: str, scaling: Mapping[str, Any]) -> str:
    kinds = {scaling[name] for name in ("rope_type", "type") if isinstance(scaling.get(name), str)}
    if not scaling or (not kinds and owner.startswith("rope_parameters")):
        return "default"
    if len(kinds) != 1:
        raise CheckpointError(f"{owner}={dict(scaling)!r} must name one rope_type")
    (kind,) = kinds
    if kind not in _NUMBERS:
        raise CheckpointError(
            f"{owner} has rope_type {kind!r}; supported are {', '.join(map(repr, _NUMBERS))}: load the "
            "variant of this model for shorter contexts, if there is one"
        )
    return kind


def _theta(
    raw: Mapping[str, Any], base: str, owner: str, scaling: Mapping[str, Any], default: float
) -> float:
    given = [number(raw, base)] if raw.get(base) is not None else []
    if scaling.get("rope_theta") is not None:
        given.append(number(scaling, "rope_theta", owner=owner))
    if len(set(given)) > 1:
        raise CheckpointError(f"the config has two values of {base}, {given[0]} and, in {owner}, {given[1]}")
    return given[0] if given else default


def _check_is_object(key: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{key}={value!r} must be an object of keys and values")
