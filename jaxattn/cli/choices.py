"""The user's own table of choices: the environment variable that names it, read by the commands alone."""

from __future__ import annotations

import argparse
import os

from jaxattn.attention.choice_table import ChoiceTable, read_table

VARIABLE = "JAXATTN_CHOICES"
"""The environment variable that names a user's own table."""


def own_table() -> ChoiceTable | None:
    """The table that the variable names, if it does.

    Raises:
        ValueError: If it cannot be read.
    """
    if not (named := os.environ.get(VARIABLE)):
        return None
    try:
        return read_table(named)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={named}: {error}") from error


def implementation_of(options: argparse.Namespace) -> str | ChoiceTable:
    """What `--implementation` stands for: "auto" for the user's table, if there is one.

    Raises:
        ValueError: If the table cannot be read.
    """
    return own_table() or "auto" if options.implementation == "auto" else options.implementation
