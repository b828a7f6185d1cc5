"""Weights in safetensors files, with torch's names or Flax's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError, safe_open

from jaxattn.checkpoints.errors import CheckpointError, summarize
from jaxattn.checkpoints.formats.weights import Leaf, merge, shards, to_device

# The others, integers and floats of 8 bits and less, are refused by the name they have in the file.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class SafetensorsWeights:
    """Arrays that are still on disk.

    Attributes:
        files: What each file says that it holds.
    """

    files: Mapping[Path, Mapping[str, Leaf]]

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """What is stored, weights or not."""
        return merge(self.files)

    def read(self, names: set[str]) -> Iterator[tuple[str, jax.Array]]:
        """Bring arrays to the device one after the other, float64 as float32.

        Raises:
            CheckpointError: If a file has gone, or has changed.
        """
        for file, leaves in self.files.items():
            try:
                with safe_open(file, framework="numpy") as stored:
                    for name in (name for name in leaves if name in names):
                        yield name, to_device(stored.get_tensor(name), leaves[name])
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"cannot read {file}: {summarize(error)}") from error


def open_safetensors(file: Path) -> SafetensorsWeights:
    """Read the header of a `.safetensors` file, or of all that a `.safetensors.index.json` file lists.

    Raises:
        CheckpointError: If a file is missing or damaged, or its header makes no sense.
    """
    files = shards(file) if file.suffix == ".json" else [file]
    weights = SafetensorsWeights({shard: _read_header(shard) for shard in files})
    merge(weights.files)  # raises for names that are there twice
    return weights


def _leaf(entry: Any) -> Leaf:
    dtype = str(entry.get_dtype())
    return Leaf(tuple(entry.get_shape()), _DTYPES.get(dtype, dtype))


def _read_header(file: Path) -> dict[str, Leaf]:
    """Names, shapes and dtypes; no memory is allocated for any array."""
    try:
        with safe_open(file, framework="numpy") as stored:
            names = stored.keys()
            return {name: _leaf(stored.get_slice(name)) for name in names}
    # The library checks sizes, offsets, dtypes and the header's length, and that nothing overlaps.
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated, or no safetensors file: {summarize(error)}") from error
