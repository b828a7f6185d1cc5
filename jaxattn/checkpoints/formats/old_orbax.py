"""Weights in an Orbax folder of before version 0.4: a msgpack file `checkpoint`, and arrays beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tensorstore as ts

from jaxattn.checkpoints.errors import CheckpointError, summarize
from jaxattn.checkpoints.formats.msgpack import MsgpackWeights, open_msgpack
from jaxattn.checkpoints.formats.weights import Leaf, check_chunks, leads_outside, to_device
from jaxattn.checkpoints.locate import OCDBT_MANIFEST, OLD_ORBAX_TREE

PLACEHOLDER = "PLACEHOLDER://"


@dataclass(frozen=True, slots=True)
class OldOrbaxWeights:
    """Arrays that are still on disk, some of them in the msgpack file.

    Attributes:
        inside: Those of the msgpack file.
        beside: The others.
    """

    inside: MsgpackWeights
    beside: Mapping[str, Any]

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """What is stored, weights or not."""
        stored = {name: Leaf(tuple(x.shape), jnp.dtype(x.dtype.type).name) for name, x in self.beside.items()}
        return {**self.inside.leaves, **stored}

    def read(self, names: set[str]) -> Iterator[tuple[str, jax.Array]]:
        """Bring arrays to the device one after the other, float64 as float32.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        yield from self.inside.read(names - self.beside.keys())
        leaves = self.leaves
        for name in names & self.beside.keys():
            try:
                array = self.beside[name].read().result()
            except ValueError as error:
                raise CheckpointError(
                    f"cannot read {name}, a file is missing or damaged: {summarize(error)}"
                ) from error
            yield name, to_device(array, leaves[name])


def open_old_orbax(folder: Path) -> OldOrbaxWeights:
    """Read the tree of a folder, and what it says of its arrays.

    Raises:
        CheckpointError: If a file is missing or damaged, or leads outside the folder.
    """
    file = folder / OLD_ORBAX_TREE
    stored = open_msgpack(file).files[file]
    places = {
        name: leaf.text.removeprefix(PLACEHOLDER)
        for name, leaf in stored.items()
        if leaf.text is not None and leaf.text.startswith(PLACEHOLDER)
    }
    for place in places.values():
        if leads_outside(place):
            raise CheckpointError(f"{file} names an array outside its folder: {place!r}")
    inside = MsgpackWeights({file: {name: leaf for name, leaf in stored.items() if name not in places}})
    return OldOrbaxWeights(inside, {name: _open_array(folder, place) for name, place in places.items()})


def _open_array(folder: Path, place: str) -> Any:
    """An array whose shape and dtype are known, and whose numbers are not read yet."""
    files: dict[str, Any] = {"driver": "file", "path": f"{folder / place}/"}
    if (folder / OCDBT_MANIFEST).is_file():
        files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{place}/"}
    spec = {"driver": "zarr", "kvstore": files, "fill_missing_data_reads": False}
    try:
        array = ts.open(ts.Spec(spec), open=True, read=True).result()
    except ValueError as error:
        raise CheckpointError(
            f"cannot read {place} in {folder}, a file is missing or damaged: {summarize(error)}"
        ) from error
    check_chunks(place, array.shape, [size or 1 for size in array.chunk_layout.read_chunk.shape or ()])
    return array
