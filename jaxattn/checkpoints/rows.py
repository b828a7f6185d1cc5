"""The language of tables: a row says how one of the decoder's leaves is stored, a layout gives it sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.models import DecoderConfig


class Axis(NamedTuple):
    """Size of an axis: the field of DecoderConfig, and its key in config.json."""

    field: str
    key: str


AXES = {
    "v": Axis("vocab_size", "vocab_size"),
    "d": Axis("hidden_size", "hidden_size"),
    "f": Axis("intermediate_size", "intermediate_size"),
    "n": Axis("num_q_heads", "num_attention_heads"),
    "k": Axis("num_kv_heads", "num_key_value_heads"),
    "h": Axis("head_dim", "head_dim"),
}

Part = tuple[str, ...]
"""Names of fused axes."""

# What a row may do to numbers, and what undoes it.
OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "scale": (jnp.multiply, jnp.divide),
    "add": (jnp.add, jnp.subtract),
}


class Row(NamedTuple):
    """One line of a table of names.

    Axes are letters of `AXES`. Of the stored ones, those in brackets are fused, `(n h)`, or one after the
    other, `(n h + k h + k h)`; a number, `2`, is a stack of so many. Of the latter two the source says with
    which part the row goes on: `qkv_proj.weight[0]`, `kv_einsum/w[1]`.

    Attributes:
        destination: Leaf of the decoder's parameters; `{i}` is the layer.
        source: Leaf of the checkpoint, with the index of a part if it has parts.
        axes: Stored axes -> the decoder's axes. Fused ones may as well be stored apart.
        ops: Names of `OPERATIONS` with their number, in order: `(("scale", 0.125), ("add", 1.0))`. They are
            computed in float32.
    """

    destination: str
    source: str
    axes: str
    ops: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """The source without an index."""
        return self.source.partition("[")[0]

    @property
    def part(self) -> int:
        """The index of the source; 0 where it has none."""
        return int(self.source.partition("[")[2].rstrip("]") or 0)

    @property
    def stored_axes(self) -> list[str]:
        """The stored axes, one by one."""
        return re.findall(r"\(.*?\)|\w+", self.axes.partition(" -> ")[0])


class Layout(NamedTuple):
    """A row's axes, with their sizes.

    Attributes:
        axes: The stored axes: each the names in its parts, one after the other.
        part: The part of those that have several.
        order: The decoder's axes, as positions among the names of that part.
        sizes: Of each axis name.
        ops: As of `Row`.
    """

    axes: tuple[tuple[Part, ...], ...]
    part: int
    order: tuple[int, ...]
    sizes: tuple[tuple[str, int], ...]
    ops: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, row: Row, config: DecoderConfig) -> Layout:
        """Read a row's axes."""
        axes = tuple(map(_parts, row.stored_axes))
        names = [name for parts in axes for name in parts[row.part if len(parts) > 1 else 0]]
        sizes = {name: getattr(config, AXES[name].field) for parts in axes for part in parts for name in part}
        order = tuple(names.index(name) for name in row.axes.partition(" -> ")[2].split())
        return cls(axes, row.part, order, tuple(sizes.items()), row.ops)

    @property
    def fused(self) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(sum(map(self._size, parts)) for parts in self.axes)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that may be stored: with axes fused or, of an array without parts, apart."""
        has_parts = any(len(parts) > 1 for parts in self.axes)
        return (self.fused,) if has_parts else (self.fused, self._apart)

    def to_decoder(self, stored: jax.Array) -> jax.Array:
        """A stored array as the decoder has it, but for its dtype."""
        for axis, parts in enumerate(self.axes):
            if len(parts) > 1:
                start = sum(map(self._size, parts[: self.part]))
                size = self._size(parts[self.part])
                stored = lax.slice_in_dim(stored, start, start + size, axis=axis)
        array = stored.reshape(self._apart).transpose(self.order)
        for name, value in self.ops:
            array = OPERATIONS[name][0](array.astype(jnp.float32), jnp.float32(value))
        return array

    def to_stored(self, array: jax.Array) -> jax.Array:
        """One of the decoder's arrays as it is stored; undoes `to_decoder` of an array without parts."""
        for name, value in reversed(self.ops):
            array = OPERATIONS[name][1](array.astype(jnp.float32), jnp.float32(value))
        back = tuple(self.order.index(position) for position in range(len(self.order)))
        return array.transpose(back).reshape(self.fused)

    def describe(self) -> str:
        """The stored shape and where it comes from: (8, 32) = (hidden_size, num_key_value_heads*head_dim)."""
        keys = [
            "+".join("*".join(AXES[name].key for name in part) or "1" for part in parts)
            for parts in self.axes
        ]
        return f"{self.fused} = ({', '.join(keys)})"

    @property
    def _apart(self) -> tuple[int, ...]:
        sizes = dict(self.sizes)
        return tuple(sizes[name] for parts in self.axes for name in parts[self.part if len(parts) > 1 else 0])

    def _size(self, part: Part) -> int:
        sizes = dict(self.sizes)
        return math.prod(sizes[name] for name in part)


def _parts(axis: str) -> tuple[Part, ...]:
    """What a stored axis consists of; a stack has parts of size 1, which have no names."""
    if axis.isdigit():
        return ((),) * int(axis)
    return tuple(tuple(part.split()) for part in axis.strip("()").split("+"))
