"""The command line: demo, generate, logits, inspect, buckets, info, tune.

An error is one line on standard error and exit status 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import jaxattn
from jaxattn.attention.api import IMPLEMENTATIONS, choose_implementation
from jaxattn.attention.choice import describe_device
from jaxattn.attention.choice_table import PHASES, VARIABLE, tables
from jaxattn.cache.quantization import QUANTIZED_DTYPES
from jaxattn.checkpoints import Inspection, inspect
from jaxattn.checkpoints.inspection import fold_layers
from jaxattn.cli.buckets import add_buckets_options, run_buckets
from jaxattn.cli.demo import run_demo
from jaxattn.cli.generate import add_generate_options, parse_prompt_ids, run_generate
from jaxattn.cli.load import add_checkpoint_options, add_load_options, config_of, load
from jaxattn.measuring.tune import default_plan, run_tune
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.models import DecoderConfig
from jaxattn.serving.score import compute_logits


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name.

    Returns:
        The exit status: 0, or 2 after an error.
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except Exception as error:
        if options.debug:
            raise
        _print_error(error)
        return 2
    return 0


def _print_error(error: Exception) -> None:
    message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if not isinstance(error, ValueError | NotImplementedError | ModuleNotFoundError) or not message:
        message = f"{type(error).__name__}: {message} (--debug shows the traceback)"
    print(f"jaxattn: error: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Wrong usage, like any other error, is one line and status 2."""
        self.exit(2, f"jaxattn: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxattn", description="Attention over ragged, paged batches in JAX.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"jaxattn {jaxattn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "train, save, load and generate on every backend")
    demo.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for checkpoint and picture"
    )

    generate_ = _command(commands, "generate", run_generate, "continue prompts with a checkpoint")
    add_load_options(generate_)
    add_generate_options(generate_)

    logits = _command(commands, "logits", _logits, "write the logits of every token of every prompt")
    add_load_options(logits)
    logits.add_argument(
        "--prompt-ids",
        action="append",
        required=True,
        metavar="IDS",
        help='token ids of one prompt, such as "1 5 9"; once per prompt',
    )
    logits.add_argument(
        "--out", type=Path, required=True, metavar="FILE.npz", help="arrays logits_0, logits_1, …"
    )

    inspect_ = _command(commands, "inspect", _inspect, "what a checkpoint is and holds; reads no weight")
    add_checkpoint_options(inspect_)
    inspect_.add_argument("--all-leaves", action="store_true", help="one line per leaf, not per kind")
    inspect_.add_argument("--json", action="store_true", help="print one JSON object")

    add_buckets_options(
        _command(commands, "buckets", run_buckets, "which buckets suit a trace, against fixed grids")
    )

    info = _command(commands, "info", _info, "versions, devices, what auto chooses, and why")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    _add_tune_options(
        _command(commands, "tune", _tune, "measure what is fastest here, for auto to choose by")
    )
    return parser


def _command(commands, name: str, function, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary)
    # Before or after the command: without a default here, the one given before is kept.
    command.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    command.set_defaults(command=function)
    return command


def _add_tune_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"auto chooses by the table that {VARIABLE} names. Times are taken when this is run only."
    parser.add_argument(
        "--out", type=Path, default=Path("jaxattn-choices.json"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    several: dict = {"action": "append", "help": "once per value; default: by device"}
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), **several)
    parser.add_argument("--cache-dtype", choices=QUANTIZED_DTYPES, action="append",
                        help="measure a quantised cache too; once per value")  # fmt: skip
    parser.add_argument("--head-dim", type=int, action="append", help="once per value; default: 64 and 128")
    parser.add_argument("--page-size", type=_page_size, metavar="TOKENS", action="append",
                        help="once per value, 'none' for packed keys; default: 16 and none")  # fmt: skip
    parser.add_argument("--heads", type=_heads, metavar="N/K", help="query and key/value heads, such as 32/8")
    parser.add_argument("--implementation", choices=tuple(IMPLEMENTATIONS), **several)
    parser.add_argument("--quick", action="store_true", help="small batches and few runs: does it work?")


def _page_size(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1, or 'none'")
    return int(text)


def _heads(text: str) -> tuple[int, int]:
    query, _, key = text.partition("/")
    if not query.isdecimal() or not key.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be query heads/key heads, such as 32/8")
    return int(query), int(key)


def _demo(options: argparse.Namespace) -> None:
    run_demo(options.out)


def _logits(options: argparse.Namespace) -> None:
    prompts = [parse_prompt_ids(text, i) for i, text in enumerate(options.prompt_ids)]
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; name a file in it")
    if not options.out.parent.is_dir():
        raise ValueError(f"--out {options.out}: the folder {options.out.parent} does not exist; create it")
    model = load(options)
    logits = compute_logits(model, prompts, implementation=options.implementation)
    with options.out.open("wb") as file:  # an open file, since savez would append to the name
        np.savez(file, allow_pickle=False, **{f"logits_{i}": array for i, array in enumerate(logits)})
    print(f"wrote {len(logits)} arrays to {options.out}")


def _inspect(options: argparse.Namespace) -> None:
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


def _info(options: argparse.Namespace) -> None:
    spec = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
    choices = {
        phase: choose_implementation(spec, dtype="bfloat16", page_size=16, phase=phase)._asdict()
        for phase in PHASES
    }
    facts = {
        "jaxattn": jaxattn.__version__,
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "python": platform.python_version(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        VARIABLE: os.environ.get(VARIABLE) or "not set",
        "tables": [f"{table.name}, {len(table.rows)} rows" for table in tables()],
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


def _tune(options: argparse.Namespace) -> None:
    plan = default_plan(describe_device(), quick=options.quick)
    named = {
        "dtypes": options.dtype,
        "cache_dtypes": options.cache_dtype,
        "head_dims": options.head_dim,
        "page_sizes": options.page_size,
        "implementations": options.implementation,
    }
    given = {name: tuple(dict.fromkeys(values)) for name, values in named.items() if values}
    if options.heads:
        given["num_q_heads"], given["num_kv_heads"] = options.heads
    run_tune(dataclasses.replace(plan, **given), options.out, force=options.force)
    if options.quick:
        print("small batches and few runs show that it works, not what is fastest: measure without --quick")
