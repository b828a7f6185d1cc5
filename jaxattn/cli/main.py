"""The command line: demo, generate, logits, inspect, buckets, info, tune.

An error is one line on standard error and exit status 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jaxattn
from jaxattn.cli.buckets import add_buckets_options, run_buckets
from jaxattn.cli.demo import run_demo
from jaxattn.cli.generate import add_generate_options, run_generate
from jaxattn.cli.info import add_info_options, run_info
from jaxattn.cli.inspect import add_inspect_options, run_inspect
from jaxattn.cli.load import add_checkpoint_options, add_load_options
from jaxattn.cli.logits import add_logits_options, run_logits
from jaxattn.cli.tune import add_tune_options, run_tune


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

    demo = _command(
        commands,
        "demo",
        lambda options: run_demo(options.out),
        "train, save, load and generate on every backend",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for checkpoint and picture"
    )

    generate_ = _command(commands, "generate", run_generate, "continue prompts with a checkpoint")
    add_load_options(generate_)
    add_generate_options(generate_)

    logits = _command(commands, "logits", run_logits, "write the logits of every token of every prompt")
    add_load_options(logits)
    add_logits_options(logits)

    inspect_ = _command(commands, "inspect", run_inspect, "what a checkpoint is and holds; reads no weight")
    add_checkpoint_options(inspect_)
    add_inspect_options(inspect_)

    add_buckets_options(
        _command(commands, "buckets", run_buckets, "which buckets suit a trace, against fixed grids")
    )
    add_info_options(_command(commands, "info", run_info, "versions, devices, what auto chooses, and why"))
    add_tune_options(
        _command(commands, "tune", run_tune, "measure what is fastest here, for auto to choose by")
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
