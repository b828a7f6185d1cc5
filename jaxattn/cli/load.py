"""What all commands share that look at a checkpoint, or load one: their options, and what these mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxattn.attention.implementations import IMPLEMENTATIONS
from jaxattn.checkpoints import MANIFEST, load_config, load_model
from jaxattn.models import CompiledSteps, DecoderConfig, Model


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and what is to be known of it."""
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint, or its very file")
    parser.add_argument("--config", type=Path, metavar="FILE.json", help="default: the config.json with it")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="names of leaves that are your own")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """The same, how to load it, and what it runs on."""
    add_checkpoint_options(parser)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as stored")
    parser.add_argument("--compile-cache", type=Path, metavar="FOLDER", help="keep compiled programs there")
    parser.add_argument("--stack-layers", action="store_true", help="compile one layer and run it in a loop")
    parser.add_argument("--check-finite", action="store_true", help="refuse weights with NaN or infinity")
    parser.add_argument("--verify", action="store_true", help=f"compare files with {MANIFEST} first")
    parser.add_argument("--implementation", default="auto", choices=("auto", *IMPLEMENTATIONS))


def config_of(options: argparse.Namespace) -> DecoderConfig | None:
    """The config of `--config`, if one was given."""
    return None if options.config is None else load_config(options.config)


def load(options: argparse.Namespace, *buckets: Callable[[CompiledSteps], object]) -> Model:
    """The model that the options ask for; what the buckets ask for compiles meanwhile."""
    return load_model(
        options.path,
        config_of(options),
        dtype=options.dtype,
        table=options.table,
        buckets=buckets,
        cache_dir=options.compile_cache,
        stack_layers=options.stack_layers,
        check_finite=options.check_finite,
        verify=options.verify,
    )
