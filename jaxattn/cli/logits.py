"""`jaxattn logits`: the logits of every token of every prompt, in a file."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from jaxattn.cli.choices import implementation_of
from jaxattn.cli.generate import parse_prompt_ids
from jaxattn.cli.load import load
from jaxattn.serving.score import compute_logits


def add_logits_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command, besides how a checkpoint is loaded."""
    parser.add_argument(
        "--prompt-ids",
        action="append",
        required=True,
        metavar="IDS",
        help='token ids of one prompt, such as "1 5 9"; once per prompt',
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.npz", help="arrays logits_0, logits_1, …"
    )


def run_logits(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: What was parsed.

    Raises:
        ValueError: If a prompt is out of range, or the file cannot be written.
        CheckpointError: If the checkpoint cannot be loaded.
    """
    prompts = [parse_prompt_ids(text, i) for i, text in enumerate(options.prompt_ids)]
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; name a file in it")
    if not options.out.parent.is_dir():
        raise ValueError(f"--out {options.out}: the folder {options.out.parent} does not exist; create it")
    model = load(options)
    logits = compute_logits(model, prompts, implementation=implementation_of(options))
    with options.out.open("wb") as file:  # an open file, since savez would append to the name
        np.savez(file, allow_pickle=False, **{f"logits_{i}": array for i, array in enumerate(logits)})
    print(f"wrote {len(logits)} arrays to {options.out}")
