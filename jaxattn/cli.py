"""The command line: demo, generate, logits, info, tune.

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
from typing import NoReturn

import jax
import numpy as np

import jaxattn
from jaxattn.attention import IMPLEMENTATIONS, choose_implementation
from jaxattn.cache import QUANTIZED_DTYPES
from jaxattn.checkpoints import load_model
from jaxattn.choice import describe_device
from jaxattn.choice_table import PHASES, VARIABLE, tables
from jaxattn.cli_generate import add_generate_options, parse_prompt_ids, run_generate
from jaxattn.demo import run_demo
from jaxattn.score import compute_logits
from jaxattn.spec import AttentionSpec
from jaxattn.tune import default_plan, run_tune


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
    _add_model_options(generate_)
    add_generate_options(generate_)

    logits = _command(commands, "logits", _logits, "write the logits of every token of every prompt")
    _add_model_options(logits)
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


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint with its config.json")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as stored")
    parser.add_argument("--implementation", default="auto", choices=("auto", *IMPLEMENTATIONS))


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
    model = load_model(options.path, dtype=options.dtype)
    logits = compute_logits(model, prompts, implementation=options.implementation)
    with options.out.open("wb") as file:  # an open file, since savez would append to the name
        np.savez(file, allow_pickle=False, **{f"logits_{i}": array for i, array in enumerate(logits)})
    print(f"wrote {len(logits)} arrays to {options.out}")


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
