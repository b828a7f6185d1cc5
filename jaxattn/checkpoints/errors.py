"""The one error of this package."""

from __future__ import annotations

import re

# Where TensorStore goes on to print its whole specification: kilobytes, and no news.
_DUMP = re.compile(r"\[tensorstore_spec|See full TensorStore|\n")


class CheckpointError(ValueError):
    """A checkpoint, or its config, that cannot be loaded as it is."""


def summarize(error: BaseException) -> str:
    """An error of another library in one line, down to what caused it."""
    first_line = _DUMP.split(str(error), maxsplit=1)[0].strip().rstrip(".:")
    text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return text if error.__cause__ is None else f"{text} ({summarize(error.__cause__)})"
