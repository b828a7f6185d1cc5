"""Stored arrays, whatever the format: first their shapes, then, if asked, themselves on the device."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.checkpoints.errors import CheckpointError, summarize

Path = tuple[str | int, ...]

_SMALL_CHUNK = 2**20
"""Numbers of a chunk that may be larger than its array."""


class Leaf(NamedTuple):
    """What a checkpoint says of one of its arrays, before any of it is read."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Its size in memory; 0 of what is no number NumPy or JAX knows."""
        try:
            return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize
        except TypeError:
            return 0

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """The array as it is brought to the device.

        float64 comes as float32, as JAX has none by default; and all comes to one device, as where
        an array was when it was stored says nothing about here.
        """
        dtype = "float32" if self.dtype == "float64" else self.dtype
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(dtype), sharding=device)


@runtime_checkable  # for the type checks of the tests
class Weights(Protocol):
    """A checkpoint's arrays. Names are the keys on the way to a leaf, joined by slashes."""

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """What is stored, weights or not."""
        ...

    def read(self, names: set[str]) -> Iterator[tuple[str, jax.Array]]:
        """Bring arrays to the device one after the other, float64 as float32. This can be done once.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        ...


def walk(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of nested dictionaries and lists with the keys that lead to it."""
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from walk(child, (*path, key))
    elif isinstance(tree, list | tuple):
        for index, child in enumerate(tree):
            yield from walk(child, (*path, index))
    else:
        yield path, tree


def join(path: Path) -> str:
    """A leaf's name."""
    return "/".join(map(str, path))


def leads_outside(name: str) -> bool:
    """Whether the name of an array, as a path in a checkpoint's folder, leads out of it."""
    return pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/") or "\0" in name


def check_chunks(name: str, shape: Sequence[int], chunks: Sequence[int]) -> None:
    """Refuse chunks that are much larger than their array: reading one would take as much memory as it says.

    Raises:
        CheckpointError: If they are.
    """
    if math.prod(chunks) > max(2 * math.prod(shape), _SMALL_CHUNK):
        raise CheckpointError(
            f"{name} of shape {tuple(shape)} is stored in chunks of {tuple(chunks)}, by its metadata; it is "
            "damaged, or was changed: copy the checkpoint again"
        )


def to_device(array: np.ndarray, leaf: Leaf) -> jax.Array:
    """An array of the host's on the device, without sharing its memory."""
    wanted = leaf.abstract
    return jax.device_put(array.astype(wanted.dtype, copy=False), wanted.sharding, may_alias=False)


def shards(index: pathlib.Path) -> list[pathlib.Path]:
    """The files that a `.index.json` lists, each beside it.

    Raises:
        CheckpointError: If it is no index, a file is missing, or a name leads out of the folder.
    """
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index with a weight_map: {summarize(error)}") from error
    for name in names:
        # An index comes from somewhere else; it must not choose files outside its folder.
        if (
            not isinstance(name, str)
            or pathlib.Path(name).name != name
            or "\\" in name
            or name in ("", ".", "..")
        ):
            raise CheckpointError(f"{index} names {name!r}; only files beside it are read")
    beside = {child.name for child in index.parent.iterdir() if child.is_file()}
    missing = [name for name in names if name not in beside]
    if missing or not names:
        raise CheckpointError(f"{index}: {', '.join(missing) or 'no file'} is missing beside it")
    return [index.parent / name for name in names]


def merge[T](files: Mapping[pathlib.Path, Mapping[str, T]]) -> dict[str, T]:
    """What several files hold, by name.

    Raises:
        CheckpointError: If two hold the same name.
    """
    merged: dict[str, T] = {}
    for file, held in files.items():
        twice = sorted(merged.keys() & held.keys())
        if twice:
            raise CheckpointError(f"{file} holds again what an earlier file held: {', '.join(twice)}")
        merged |= held
    return merged
