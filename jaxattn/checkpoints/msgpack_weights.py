"""Weights in the msgpack files of `flax.serialization`, as Hugging Face's Flax models are saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import serialization

from jaxattn.checkpoints.errors import CheckpointError, summarize
from jaxattn.checkpoints.mapping import Leaf
from jaxattn.checkpoints.weights import join, merge, shards, to_device, walk


@dataclass(frozen=True, slots=True)
class MsgpackWeights:
    """Arrays in host memory: a msgpack file says nothing of its shapes until it has been read.

    Its arrays lie in it as bytes, so reading takes no more memory than there are bytes in the file,
    whatever shapes it claims.

    Attributes:
        arrays: What was read, by name.
    """

    arrays: dict[str, object]

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """What is stored, weights or not."""
        return {name: _leaf(value) for name, value in self.arrays.items()}

    def read(self, names: set[str]) -> Iterator[tuple[str, jax.Array]]:
        """Bring arrays to the device, float64 as float32. Each is given up here as it arrives there."""
        for name in names:
            value = np.asarray(self.arrays.pop(name))
            yield name, to_device(value, _leaf(value))


def open_msgpack(file: Path) -> MsgpackWeights:
    """Read a `.msgpack` file, or all that a `.msgpack.index.json` file lists.

    Raises:
        CheckpointError: If a file is missing, damaged, or not a tree of named arrays.
    """
    files = shards(file) if file.suffix == ".json" else [file]
    return MsgpackWeights(merge({shard: _read_file(shard) for shard in files}))


def _leaf(value: object) -> Leaf:
    if isinstance(value, np.ndarray):
        return Leaf(value.shape, value.dtype.name)
    return Leaf((), type(value).__name__)


def _read_file(file: Path) -> dict[str, object]:
    try:
        tree = serialization.msgpack_restore(file.read_bytes())
        leaves = dict(walk(tree))
    # Damaged bytes surface as whatever Flax, msgpack or NumPy stumbles over first.
    except Exception as error:
        raise CheckpointError(f"{file} is truncated, or no Flax msgpack file: {summarize(error)}") from error
    if not isinstance(tree, dict) or not all(isinstance(key, str | int) for path in leaves for key in path):
        raise CheckpointError(f"{file} is not a tree of named arrays: its root is a {type(tree).__name__}")
    return {join(path): value for path, value in leaves.items()}
