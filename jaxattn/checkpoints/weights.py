"""Stored arrays, whatever the format: first their shapes, then, if asked, themselves on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from jaxattn.checkpoints.mapping import Leaf

Path = tuple[str | int, ...]


@runtime_checkable  # for the type checks of the tests
class Weights(Protocol):
    """A checkpoint's arrays. Names are the keys on the way to a leaf, joined by slashes."""

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """What is stored, weights or not."""
        ...

    def read(self, names: set[str]) -> dict[str, jax.Array]:
        """Bring arrays to the device, float64 as float32. This can be done once.

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
