"""`jaxattn info`: versions, devices, and what `auto` chooses here, and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata

import jax

import jaxattn
from jaxattn.attention.api import choose_implementation
from jaxattn.attention.choice_table import PHASES, tables
from jaxattn.cli.choices import VARIABLE, own_table
from jaxattn.metadata.spec import AttentionSpec


def add_info_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_info(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: What was parsed.

    Raises:
        ValueError: If the user's table of choices cannot be read.
    """
    own = own_table()
    spec = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
    choices = {
        phase: choose_implementation(spec, dtype="bfloat16", page_size=16, phase=phase, table=own)._asdict()
        for phase in PHASES
    }
    facts = {
        "jaxattn": jaxattn.__version__,
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "python": platform.python_version(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        VARIABLE: os.environ.get(VARIABLE) or "not set",
        "tables": [f"{table.name}, {len(table.facts)} rows" for table in tables(own)],
        "layer": "bfloat16, 32 query heads, 8 key/value heads, head dim 128, page size 16",
        **choices,
    }
    if options.json:
        print(json.dumps(facts))
        return
    for phase, choice in choices.items():
        facts[phase] = f"{choice['implementation']}: {choice['reason']}"
    for name, value in facts.items():
        print(f"{name:15} {'; '.join(value) if isinstance(value, list) else value}")
