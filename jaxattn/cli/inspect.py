"""`jaxattn inspect`: what a checkpoint is and holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jaxattn.checkpoints import Inspection, inspect
from jaxattn.checkpoints.inspection import fold_layers
from jaxattn.cli.load import config_of
from jaxattn.models import DecoderConfig


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command, besides which checkpoint."""
    parser.add_argument("--all-leaves", action="store_true", help="one line per leaf, not per kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_inspect(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: What was parsed.

    Raises:
        CheckpointError: If it is no checkpoint.
    """
    found = inspect(options.path, config_of(options), table=options.table)
    if options.json:
        print(json.dumps(_as_json(found)))
        return
    config = {} if found.config is None else _differences(found.config)
    facts = {
        "weights": str(found.path),
        "format": found.format,
        "names": found.layout,
        "family": found.family or "not known",
        "config": ", ".join(f"{name}={value}" for name, value in config.items()) or "none",
        "parameters": f"{found.num_params:,}",
        "leaves": ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items()),
        "bytes": f"{found.num_bytes:,}",
        "can be loaded": "no" if found.problems else "yes",
    }
    for name, value in facts.items():
        print(f"{name:15} {value}")
    leaves = Table(Column("leaf", overflow="fold"), "shape", "dtype", Column("×", justify="right"), box=None)
    kinds = dict.fromkeys(found.leaves.items(), 1) if options.all_leaves else fold_layers(found.leaves)
    for (name, leaf), count in kinds.items():
        leaves.add_row(Text(name), str(list(leaf.shape)), leaf.dtype, str(count))
    console = Console(width=None if sys.stdout.isatty() else 10_000)  # a file has room for whole lines
    console.print(leaves)
    for problem in found.problems:
        print(problem)


def _as_json(found: Inspection) -> dict[str, Any]:
    leaves = {name: {"shape": leaf.shape, "dtype": leaf.dtype} for name, leaf in found.leaves.items()}
    return {
        "path": str(found.path),
        "format": found.format,
        "layout": found.layout,
        "family": found.family,
        "config": None if found.config is None else dataclasses.asdict(found.config),
        "num_params": found.num_params,
        "num_bytes": found.num_bytes,
        "dtypes": found.dtypes,
        "problems": found.problems,
        "leaves": leaves,
    }


def _differences(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a config that are not their default; of what all layers have alike, one entry."""
    fields = dataclasses.fields(config)
    values = {field.name: getattr(config, field.name) for field in fields}
    values["ropes"] = tuple(f"{rope.kind}/{rope.theta:g}" for rope in config.ropes)
    defaults = {field.name: field.default for field in fields} | {
        "sliding_windows": (None,) * config.num_layers
    }
    return {
        name: "|".join(map(str, dict.fromkeys(value) if len(set(value)) == 1 else value))
        if isinstance(value, tuple)
        else value
        for name, value in values.items()
        if value != defaults[name]
    }
