"""The language of tables: a row says how one of the decoder's leaves is stored, a layout gives it sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
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

LAYERS = "l"
"""The axis of a stack: the layers whose rows name the same source, in their order."""

MAX_PADDING = 1024
"""Rows that a padded axis may have too many: more would be another model's vocabulary."""

_SOURCE = re.compile(r"[^\[\]]+(\[\d+\])?")
_AXES = re.compile(r"(\w+|\([\w +]+\))( (\w+|\([\w +]+\)))* -> \w+( \w+)*")

Part = tuple[str, ...]
"""Names of fused axes."""

Op = tuple[str, float | str]
"""A name, and a number or the letter of an axis."""


def _deinterleave(array: jax.Array, axis: int) -> jax.Array:
    """From x₀ y₀ x₁ y₁ to x₀ x₁ y₀ y₁, and so on along an axis."""
    pairs = array.reshape(*array.shape[:axis], -1, 2, *array.shape[axis + 1 :])
    return pairs.swapaxes(axis, axis + 1).reshape(array.shape)


def _interleave(array: jax.Array, axis: int) -> jax.Array:
    halves = array.reshape(*array.shape[:axis], 2, -1, *array.shape[axis + 1 :])
    return halves.swapaxes(axis, axis + 1).reshape(array.shape)


# What a row may do to numbers, or to the order along an axis, and what undoes it.
ARITHMETIC: dict[str, tuple[Callable, Callable]] = {
    "scale": (jnp.multiply, jnp.divide),
    "add": (jnp.add, jnp.subtract),
}
ORDERS: dict[str, tuple[Callable, Callable]] = {"rope_deinterleave": (_deinterleave, _interleave)}
UNPAD = "unpad"
"""The operation on a stored axis that is longer than it should be: its first entries are taken."""


class Row(NamedTuple):
    """One line of a table of names.

    Axes are letters of `AXES`. Of the stored ones, those in brackets are fused, `(n h)`, or one after the
    other, `(n h + k h + k h)`; a number, `2`, is a stack of so many. Of the latter two the source says with
    which part the row goes on: `qkv_proj.weight[0]`, `kv_einsum/w[1]`. And `l` is a stack of layers: of all
    whose rows name this source, in their order.

    Attributes:
        destination: Leaf of the decoder's parameters; `{i}` is the layer.
        source: Leaf of the checkpoint, with the index of a part if it has parts; `{i}` again.
        axes: Stored axes -> the decoder's axes. Fused ones may as well be stored apart.
        ops: What is done to the numbers, in order: `("scale", 0.125)` and `("add", 1.0)`, computed in
            float32; `("rope_deinterleave", "h")`, where the numbers that rotate together lie beside each
            other; `("unpad", "v")`, which takes the first of an axis that is stored too long.
    """

    destination: str
    source: str
    axes: str
    ops: tuple[Op, ...] = ()

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
        order: The decoder's axes, as positions among the names of that part, layers left out.
        sizes: Of each axis name.
        ops: As of `Row`.
        padded: Positions of the stored axes that may be too long.
    """

    axes: tuple[tuple[Part, ...], ...]
    part: int
    order: tuple[int, ...]
    sizes: tuple[tuple[str, int], ...]
    ops: tuple[Op, ...]
    padded: tuple[int, ...]

    @classmethod
    def of(cls, row: Row, config: DecoderConfig, *, num_layers: int = 1) -> Layout:
        """Read a row's axes, of a source that is a stack of so many layers."""
        axes = tuple(map(_parts, row.stored_axes))
        wanted = row.axes.partition(" -> ")[2].split()
        sizes = {
            name: num_layers if name == LAYERS else getattr(config, AXES[name].field)
            for parts in axes
            for part in parts
            for name in part
        }
        names = [name for name in _names(axes, row.part) if name != LAYERS]
        return cls(
            axes=axes,
            part=row.part,
            order=tuple(names.index(name) for name in wanted),
            sizes=tuple(sizes.items()),
            ops=row.ops,
            padded=tuple(axis for axis, parts in enumerate(axes) if (UNPAD, *parts[0]) in row.ops),
        )

    @property
    def decoded(self) -> tuple[int, ...]:
        """The shape that the decoder has."""
        sizes = dict(self.sizes)
        names = [name for name in _names(self.axes, self.part) if name != LAYERS]
        return tuple(sizes[names[position]] for position in self.order)

    @property
    def fused(self) -> tuple[int, ...]:
        """The stored shape, without padding."""
        return tuple(sum(map(self._size, parts)) for parts in self.axes)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array may be stored so: with axes fused or, of one without parts, apart."""
        if shape == self._apart and all(len(parts) == 1 for parts in self.axes):
            return True
        return len(shape) == len(self.axes) and all(
            0 <= size - wanted <= (MAX_PADDING if axis in self.padded else 0)
            for axis, (size, wanted) in enumerate(zip(shape, self.fused, strict=True))
        )

    def to_decoder(self, stored: jax.Array, layer: jax.typing.ArrayLike = 0) -> jax.Array:
        """A stored array, or that layer of it, as the decoder has it, but for its dtype."""
        for axis, parts in enumerate(self.axes):
            if len(parts) > 1 or axis in self.padded:
                part = self.part if len(parts) > 1 else 0
                start = sum(map(self._size, parts[:part]))
                stored = lax.slice_in_dim(stored, start, start + self._size(parts[part]), axis=axis)
        array = stored.reshape(self._apart)
        names = _names(self.axes, self.part)
        if LAYERS in names:
            array = lax.dynamic_index_in_dim(array, layer, names.index(LAYERS), keepdims=False)
        array = array.transpose(self.order)
        for op in self.ops:
            array = self._operate(op, 0, array)
        return array

    def to_stored(self, array: jax.Array) -> jax.Array:
        """One of the decoder's arrays as it is stored; undoes `to_decoder` of an array of its own."""
        for op in reversed(self.ops):
            array = self._operate(op, 1, array)
        back = tuple(self.order.index(position) for position in range(len(self.order)))
        return array.transpose(back).reshape(self.fused)

    def describe(self) -> str:
        """The stored shape and where it comes from: (8, 32) = (hidden_size, num_key_value_heads*head_dim)."""
        keys = ["+".join("*".join(map(_key, part)) or "1" for part in parts) for parts in self.axes]
        for axis in self.padded:
            keys[axis] += " or a few more"
        return f"{self.fused} = ({', '.join(keys)})"

    @property
    def _apart(self) -> tuple[int, ...]:
        sizes = dict(self.sizes)
        return tuple(sizes[name] for name in _names(self.axes, self.part))

    def _operate(self, op: Op, direction: int, array: jax.Array) -> jax.Array:
        """Do to one of the decoder's arrays what an operation says, or with direction 1 undo it."""
        name, value = op
        if name == UNPAD:  # done already, to the stored array
            return array
        if isinstance(value, str):
            names = [name for name in _names(self.axes, self.part) if name != LAYERS]
            return ORDERS[name][direction](array, self.order.index(names.index(value)))
        return ARITHMETIC[name][direction](array.astype(jnp.float32), jnp.float32(value))

    def _size(self, part: Part) -> int:
        sizes = dict(self.sizes)
        return math.prod(sizes[name] for name in part)


def _key(axis: str) -> str:
    return "layers stacked" if axis == LAYERS else AXES[axis].key


def _names(axes: tuple[tuple[Part, ...], ...], part: int) -> list[str]:
    """The names of all axes, of those with parts in that part."""
    return [name for parts in axes for name in parts[part if len(parts) > 1 else 0]]


def _parts(axis: str) -> tuple[Part, ...]:
    """What a stored axis consists of; a stack has parts of size 1, which have no names."""
    if axis.isdigit():
        return ((),) * int(axis)
    return tuple(tuple(part.split()) for part in axis.strip("()").split("+"))


def problems_of(row: Row) -> Iterator[str]:
    """What keeps a row from being one of this language."""
    if not _SOURCE.fullmatch(row.source):
        yield f"source {row.source!r} must be a name, and if it has parts an index behind it, as 'a/b[0]'"
    elif not _AXES.fullmatch(row.axes):
        yield f"axes {row.axes!r} must be stored axes -> the decoder's, such as '(n h) d -> d n h'"
    else:
        yield from _bad_axes(row) or _bad_ops(row)


def _bad_axes(row: Row) -> list[str]:
    wanted = row.axes.partition(" -> ")[2]
    axes = tuple(map(_parts, row.stored_axes))
    unknown = {name for parts in axes for part in parts for name in part} - {*AXES, LAYERS}
    if unknown:
        sizes = ", ".join(f"{letter} {axis.key}" for letter, axis in AXES.items())
        named = ", ".join(map(repr, sorted(unknown)))
        return [f"axes {row.axes!r} have unknown {named}; use {sizes}, {LAYERS} layers stacked"]
    several = [len(parts) for parts in axes if len(parts) > 1]
    if len(several) > 1:
        return [f"axes {row.axes!r} have parts on more than one axis; a source has one index"]
    num_parts = several[0] if several else 1
    if row.part >= num_parts:
        return [f"source {row.source!r} has no part {row.part}; axes {row.axes!r} have {num_parts}"]
    if several and "[" not in row.source:
        return [f"source {row.source!r} has {num_parts} parts; say which, such as '{row.source}[0]'"]
    kept = [name for name in _names(axes, row.part) if name != LAYERS]
    if sorted(kept) != sorted(wanted.split()):
        return [f"axes {row.axes!r} begin with {', '.join(kept)} and end with other letters; use the same"]
    return []


def _bad_ops(row: Row) -> list[str]:
    axes = tuple(map(_parts, row.stored_axes))
    names = [name for name in _names(axes, row.part) if name != LAYERS]
    lone = [parts[0][0] for parts in axes if len(parts) == len(parts[0]) == 1]
    axes_of = {UNPAD: lone, **dict.fromkeys(ORDERS, names)}
    problems = []
    for name, value in row.ops:
        if name in axes_of:
            if value not in axes_of[name]:
                problems.append(f"op {name!r} needs one of the axes {' '.join(axes_of[name])}, not {value!r}")
        elif name not in ARITHMETIC:
            known = ", ".join(map(repr, (*ARITHMETIC, *axes_of)))
            problems.append(f"unknown op {name!r}; use one of {known}")
        elif isinstance(value, str) or not math.isfinite(value) or (name == "scale" and value == 0):
            not_0 = ", not 0" if name == "scale" else ""
            problems.append(f"op {name!r} with {value!r}: give a finite number{not_0}")
    return problems
