"""Weights in the msgpack files of `flax.serialization`, as Hugging Face's Flax models are saved.

A file is one msgpack value, a tree of maps. An array is an extension of type 1 that holds another value,
`[shape, dtype, bytes]`; one larger than 1 GiB is a map of flat pieces. Where each array lies is found from
the heads of values alone, whatever the size of the file; then arrays are read one by one.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.checkpoints.errors import CheckpointError, summarize
from jaxattn.checkpoints.formats.weights import Leaf, join, merge, shards, to_device, walk

_NDARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_MAX_DEPTH = 100
_MAX_VALUES = 1_000_000

# By first byte: the kind of a value, and how its length is written behind that byte.
_LENGTHS = {
    0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"),
    0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I"),
    0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"),
    0xDC: ("list", ">H"), 0xDD: ("list", ">I"),
    0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
_SHORT = (("map", 0x80, 0x8F), ("list", 0x90, 0x9F), ("str", 0xA0, 0xBF))
_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d",
    0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclass(frozen=True, slots=True)
class Stored:
    """An array in a file.

    Attributes:
        leaf: Its shape and dtype; of anything else, what it is.
        spans: Offset and length, in bytes, of its pieces in order; none of anything else.
        text: Of text, itself.
    """

    leaf: Leaf
    spans: tuple[tuple[int, int], ...] = ()
    text: str | None = None


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


def index(file: Path) -> dict[tuple[str | int, ...], Stored]:
    """Every leaf of a file, by the keys that lead to it.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not one such tree from its first byte to its last.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        tree = cursor.value()
        if cursor.offset != len(data):
            raise ValueError(f"{len(data) - cursor.offset} bytes follow its end")
    if not isinstance(tree, dict):
        raise ValueError(f"its root is no map but a {type(tree).__name__}")
    return {path: leaf if isinstance(leaf, Stored) else _other(leaf) for path, leaf in walk(tree)}


class _Cursor:
    """Reads values one after the other; of arrays only what they say of themselves."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._num_values = 0
        self.offset = 0

    def value(self, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise ValueError(f"it has more than {_MAX_VALUES} values")
        kind, size = self._head()
        match kind:
            case "map":
                return self._map(size, depth)
            case "list":
                return [self.value(depth + 1) for _ in range(size)]
            case "str":
                return self._take(size).decode()
            case "bin":
                self._skip(size)
                return b""
            case "ext":
                return self._extension(size)
        return size  # a number or a constant

    def _map(self, size: int, depth: int) -> Any:
        tree: dict[str | int, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if type(key) not in (str, int) or key in tree:
                raise ValueError(f"a key is {key!r}: no name, or one that is there twice")
            tree[key] = self.value(depth + 1)
        return _joined(tree) if _CHUNKED in tree else tree

    def _extension(self, size: int) -> Any:
        code = struct.unpack(">b", self._take(1))[0]
        end = self.offset + size
        if end > len(self._data):
            raise ValueError("it ends in the middle of an array")
        if code not in (_NDARRAY, _SCALAR):
            self.offset = end
            return Stored(Leaf((), f"extension {code}"))
        if self._head() != ("list", 3):
            raise ValueError("an array is not written as shape, dtype and bytes")
        shape, dtype = self.value(_MAX_DEPTH - 1), self.value(_MAX_DEPTH)
        kind, length = self._head()
        start = self.offset
        self._skip(length if kind == "bin" else 0)
        leaf = _leaf(shape, dtype)
        if kind != "bin" or self.offset != end or leaf.num_bytes != length:
            raise ValueError(f"an array {leaf.dtype}{list(leaf.shape)} is not as long as it says")
        return Stored(leaf, ((start, length),) if code == _NDARRAY else ())

    def _head(self) -> tuple[str, Any]:
        """Kind and size of the next value, or of a number or constant, itself."""
        first = self._take(1)[0]
        if first in _LENGTHS:
            kind, form = _LENGTHS[first]
            return kind, self._number(form)
        if first in _NUMBERS:
            return "number", self._number(_NUMBERS[first])
        if first in _CONSTANTS:
            return "constant", _CONSTANTS[first]
        if first in _EXTENSIONS:
            return "ext", _EXTENSIONS[first]
        if first < 0x80 or first >= 0xE0:
            return "number", first if first < 0x80 else first - 256
        for kind, low, high in _SHORT:
            if low <= first <= high:
                return kind, first - low
        raise ValueError(f"the byte {first:#x} at {self.offset - 1} begins nothing")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, size: int) -> bytes:
        start = self.offset
        self._skip(size)
        return self._data[start : self.offset]

    def _skip(self, size: int) -> None:
        self.offset += size
        if self.offset > len(self._data):
            raise ValueError("it ends in the middle of a value")


def _leaf(shape: Any, dtype: Any) -> Leaf:
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array's shape is {shape!r}")
    try:
        known = jnp.dtype(dtype) if isinstance(dtype, str) else None
    except TypeError:
        known = None
    if known is None or not (jnp.issubdtype(known, jnp.number) or known == jnp.bool):
        raise ValueError(f"an array's dtype is {dtype!r}")
    return Leaf(tuple(shape), known.name)


def _joined(tree: dict[str | int, Any]) -> Stored:
    """The array of which a map has the pieces."""
    shape, pieces = tree.get("shape"), tree.get("chunks")
    if not isinstance(shape, dict) or not isinstance(pieces, dict):
        raise ValueError("an array in pieces has no shape, or no pieces")
    parts = [pieces.get(str(i)) for i in range(len(pieces))]
    arrays = [part for part in parts if isinstance(part, Stored) and part.spans]
    if not arrays or len(arrays) != len(parts) or len({part.leaf.dtype for part in arrays}) > 1:
        raise ValueError("an array in pieces lacks some, or has them in several dtypes")
    leaf = _leaf([shape.get(str(i)) for i in range(len(shape))], arrays[0].leaf.dtype)
    if math.prod(leaf.shape) != sum(math.prod(part.leaf.shape) for part in arrays):
        raise ValueError(f"an array {leaf.dtype}{list(leaf.shape)} has pieces of another size")
    return Stored(leaf, tuple(span for part in arrays for span in part.spans))


def _other(value: Any) -> Stored:
    return Stored(Leaf((), type(value).__name__), text=value if isinstance(value, str) else None)
