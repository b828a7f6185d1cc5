"""What a whole number that a caller gives must be."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def positive_int(name: str, value: Any, alternative: str = "") -> int:
    """`value` as an int of at least 1: a Python or NumPy integer, and no bool.

    Args:
        name: The argument's name, for the error.
        value: What was given.
        alternative: What else may be given, for the error, such as "or None for all".

    Raises:
        ValueError: If it is none, naming argument and value.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1:
        return int(value)
    asked = "an integer of at least 1" + (f", {alternative}" if alternative else "")
    raise ValueError(f"{name}={value!r} must be {asked}")
