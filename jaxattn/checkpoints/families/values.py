"""Values of a config, checked one by one; an error names key, value and what it must be."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from jaxattn.checkpoints.errors import CheckpointError


def count(raw: Mapping[str, Any], key: str, *, owner: str = "") -> int:
    """A whole number of at least 1."""
    value = raw.get(key)
    # Not isinstance: a bool is an int, and "num_hidden_layers": true is no number of layers.
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{_name(key, owner)}={_shown(value)} must be a whole number of at least 1")
    return value


def optional_count(raw: Mapping[str, Any], key: str) -> int | None:
    """A whole number of at least 1; None where the key is missing or null."""
    return None if raw.get(key) is None else count(raw, key)


def number(raw: Mapping[str, Any], key: str, *, owner: str = "") -> float:
    """A positive number."""
    value: Any = raw.get(key)
    # NaN compares false and is refused; so is an integer that no float can hold.
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{_name(key, owner)}={_shown(value)} must be a positive number")
    return float(value)


def optional_number(raw: Mapping[str, Any], key: str) -> float | None:
    """A positive number; None where the key is missing or null."""
    return None if raw.get(key) is None else number(raw, key)


def flag(raw: Mapping[str, Any], key: str) -> bool:
    """True or false; false where the key is missing or null."""
    value = raw.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise CheckpointError(f"{key}={value!r} must be true or false")


def _name(key: str, owner: str) -> str:
    return f"{owner}.{key}" if owner else key


def _shown(value: Any) -> str:
    return "(missing)" if value is None else repr(value)
