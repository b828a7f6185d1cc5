"""Inspecting: what a checkpoint is and holds, and whether it can be loaded, without reading any weight."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.families.config_json import read_config
from jaxattn.checkpoints.families.without_config import infer_config
from jaxattn.checkpoints.formats.open import open_weights
from jaxattn.checkpoints.formats.weights import Leaf
from jaxattn.checkpoints.layouts.match import match
from jaxattn.checkpoints.layouts.names import choose_table, name_layout, weights_among
from jaxattn.checkpoints.layouts.user_tables import LeafTable, resolve_table
from jaxattn.checkpoints.locate import Location, locate
from jaxattn.models import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What is known of a checkpoint before any weight is read.

    Attributes:
        path: The weights: a file, the index of several, or an Orbax folder.
        format: How they are stored: "safetensors", "msgpack" or "orbax".
        layout: Whose names the leaves have; "own names" are for a table of one's own.
        family: The model type of its config.json, supported or not; None where there is no such word.
        config: The decoder, if there is a config that can be followed.
        leaves: All that is stored, by name: the shape and the dtype of each array.
        problems: What keeps it from being loaded: no config, one that is not supported, or weights that do
            not fit. Empty where `load_model` will go on to read.
    """

    path: Path
    format: str
    layout: str
    family: str | None
    config: DecoderConfig | None
    leaves: Mapping[str, Leaf]
    problems: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of all leaves, as numbers in memory."""
        return sum(math.prod(leaf.shape) * _bits(leaf.dtype) // 8 for leaf in self.leaves.values())

    @property
    def num_params(self) -> int:
        """The numbers in the parameters, without an optimizer's state beside them."""
        return sum(math.prod(self.leaves[name].shape) for name in weights_among(self.leaves))

    @property
    def dtypes(self) -> Mapping[str, int]:
        """How many leaves there are of each dtype, the most frequent first."""
        return dict(Counter(leaf.dtype for leaf in self.leaves.values()).most_common())


def inspect(
    path: str | os.PathLike[str], config: DecoderConfig | None = None, *, table: LeafTable | None = None
) -> Inspection:
    """Say what a checkpoint is and holds, without reading any weight.

    Args:
        path: A folder that holds a checkpoint, or the very file or Orbax folder.
        config: The decoder that the weights should fit; read from the checkpoint's config.json where None.
        table: What the leaves are called, for names that are not known here: rows, or a JSON file of them.

    Returns:
        What is known. What keeps the checkpoint from being loaded is listed as `problems`, and not raised.

    Raises:
        CheckpointError: If there is no one checkpoint at the path, or what describes its leaves is damaged.
    """
    location = locate(path)
    leaves = open_weights(location).leaves
    problems = []
    family, config_problem = None, None
    if config is None:
        family, config, config_problem = _find_config(location, leaves)
    if config_problem is not None:
        problems.append(config_problem)
    if config is not None:
        try:
            match(
                leaves,
                config,
                choose_table(leaves, config) if table is None else resolve_table(table, config),
            )
        except CheckpointError as error:
            problems.append(str(error))
    return Inspection(
        path=location.weights,
        format=location.format,
        layout=name_layout(leaves),
        family=family,
        config=config,
        leaves=leaves,
        problems=tuple(problems),
    )


def fold_layers(leaves: Mapping[str, Leaf]) -> dict[tuple[str, Leaf], int]:
    """Leaves that differ in the number of their layer alone, together: how many there are of each kind."""
    kinds: dict[tuple[str, Leaf], list[str]] = {}
    for name, leaf in leaves.items():
        kinds.setdefault((re.sub(r"(?<![^/._])\d+(?=[/.])", "{i}", name), leaf), []).append(name)
    return {(kind if len(names) > 1 else names[0], leaf): len(names) for (kind, leaf), names in kinds.items()}


def _find_config(
    location: Location, leaves: Mapping[str, Leaf]
) -> tuple[str | None, DecoderConfig | None, str | None]:
    """The family and the decoder, as far as they are known, and what is wrong with the config."""
    file = location.find_config()
    family = None if file is None else _family(file)
    try:
        return family, infer_config(location, leaves) if file is None else read_config(file), None
    except CheckpointError as error:
        return family, None, str(error)


def _family(file: Path) -> str | None:
    try:
        family = json.loads(file.read_bytes()).get("model_type")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None  # what is wrong with it, `read_config` says
    return family if isinstance(family, str) else None


def _bits(dtype: str) -> int:
    """The bits of a number, by the name of its dtype in any format; 0 for what is no number."""
    if dtype.lower() == "bool":
        return 8
    size = re.match(r"(?:b?float|u?int|complex|BF|F|I|U)(\d+)", dtype)
    return int(size[1]) if size else 0
