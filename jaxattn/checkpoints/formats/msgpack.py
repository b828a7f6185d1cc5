"""Weights in the msgpack files of `flax.serialization`, as Hugging Face's Flax models are saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.checkpoints.errors import CheckpointError, summarize
from jaxattn.checkpoints.formats.msgpack_index import Stored, index
from jaxattn.checkpoints.formats.weights import join, merge, shards, to_device
from jaxattn.checkpoints.layouts.mapping import Leaf


@dataclass(frozen=True, slots=True)
class MsgpackWeights:
    """Arrays that are still on disk.

    Attributes:
        files: Where in each file its arrays lie.
    """

    files: Mapping[Path, Mapping[str, Stored]]

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """What is stored, weights or not."""
        return {name: stored.leaf for name, stored in merge(self.files).items()}

    def read(self, names: set[str]) -> Iterator[tuple[str, jax.Array]]:
        """Bring arrays to the device one after the other, float64 as float32.

        Raises:
            CheckpointError: If a file has gone, or is shorter than it was.
        """
        for file, stored in self.files.items():
            for name in (name for name in stored if name in names):
                yield name, to_device(_read_array(file, stored[name]), stored[name].leaf)


def open_msgpack(file: Path) -> MsgpackWeights:
    """Read what a `.msgpack` file, or all that a `.msgpack.index.json` file lists, says of its arrays.

    Raises:
        CheckpointError: If a file is missing, damaged, or not a tree of named arrays.
    """
    files = shards(file) if file.suffix == ".json" else [file]
    weights = MsgpackWeights({shard: _read_index(shard) for shard in files})
    merge(weights.files)  # raises for names that are there twice
    return weights


def _read_index(file: Path) -> dict[str, Stored]:
    try:
        return {join(path): stored for path, stored in index(file).items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated, or no Flax msgpack file: {summarize(error)}") from error


def _read_array(file: Path, stored: Stored) -> np.ndarray:
    array = np.empty(stored.leaf.shape, jnp.dtype(stored.leaf.dtype))
    room = memoryview(array.reshape(-1).view(np.uint8))
    try:
        with file.open("rb") as opened:
            for offset, length in stored.spans:
                opened.seek(offset)
                if opened.readinto(room[:length]) != length:
                    raise CheckpointError(f"{file} is shorter than it was when it was opened")
                room = room[length:]
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {summarize(error)}") from error
    return array
