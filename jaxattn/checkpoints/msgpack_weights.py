"""Weights in the msgpack files of `flax.serialization`, as Hugging Face's Flax models are saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import serialization

from jaxattn.checkpoints.errors import CheckpointError, summarize
from jaxattn.checkpoints.mapping import Leaf
from jaxattn.checkpoints.weights import join, walk


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

    def read(self, names: set[str]) -> dict[str, jax.Array]:
        """Bring arrays to the device, float64 as float32. Each is given up here as it arrives there."""
        read = {}
        for name in names:
            value = np.asarray(self.arrays.pop(name))
            wanted = _leaf(value).abstract
            # The converter may overwrite its arguments, so they may not share memory with the host's.
            read[name] = jax.device_put(
                value.astype(wanted.dtype, copy=False), wanted.sharding, may_alias=False
            )
        return read


def open_msgpack(file: Path) -> MsgpackWeights:
    """Read a `.msgpack` file, or all that a `.msgpack.index.json` file lists.

    Raises:
        CheckpointError: If a file is missing, damaged, or not a tree of named arrays.
    """
    files = _shards(file) if file.suffix == ".json" else [file]
    arrays: dict[str, object] = {}
    for shard in files:
        read = _read_file(shard)
        twice = sorted(arrays.keys() & read.keys())
        if twice:
            raise CheckpointError(f"{shard} holds again what an earlier file held: {', '.join(twice)}")
        arrays |= read
    return MsgpackWeights(arrays)


def _leaf(value: object) -> Leaf:
    if isinstance(value, np.ndarray):
        return Leaf(value.shape, value.dtype.name)
    return Leaf((), type(value).__name__)


def _shards(index: Path) -> list[Path]:
    """The files that an index lists, each beside it."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index with a weight_map: {summarize(error)}") from error
    for name in names:
        # An index comes from somewhere else; it must not choose files outside its folder.
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names {name!r}; only files beside it are read")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(f"{index}: {', '.join(missing) or 'no file'} is missing beside it")
    return [index.parent / name for name in names]


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
