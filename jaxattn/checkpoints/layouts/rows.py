"""The language of tables: a row says how a leaf of the decoder is stored, a layout says it in numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn.models import DecoderConfig


class Axis(NamedTuple):
    """Where the size of an axis stands: the field of DecoderConfig, and the key in config.json."""

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

HEAD = "head"
"""The decoder's leaf that a tied head leaves out."""

MAX_PADDING = 1024
"""Rows that a padded axis may have too many: more would be another model's vocabulary."""

Part = tuple[str, ...]
"""Letters of axes that are stored as one: `(n h)` is ("n", "h")."""

StoredAxis = tuple[Part, ...]
"""The parts that lie one after the other on a stored axis; one of them alone where it is not divided."""

Op = tuple[str, float | str]
"""The name of an operation, and a number or the letter of an axis."""


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


class LeafRow(NamedTuple):
    """One line of a table of names: how one leaf of the decoder is stored.

    An axis is a letter: `v` vocabulary, `d` features, `f` features of the MLP, `n` query heads, `k` key/value
    heads, `h` numbers of a head, `l` layers. In the stored axes,

    - `(n h)` is one axis, stored as one of size n·h; it may as well be stored as two.
    - `(n h + k h + k h)` is one axis on which three parts lie one after the other.
    - `2` is an axis of two parts of size 1.
    - `l` is a stack of layers: of all whose rows name this source, in their order.

    Where an axis has parts, the source says with which of them the row goes on, counted from 0:

        LeafRow("layers.{i}.k", "layers.{i}.qkv_proj.weight[1]", "(n h + k h + k h) d -> d k h")
        LeafRow("layers.{i}.v", "layer_{i}/attn/kv_einsum/w[1]", "2 k d h -> d k h")

    Attributes:
        destination: Leaf of the decoder's parameters; `{i}` is the layer.
        source: Leaf of the checkpoint, with the index of a part if it has parts; `{i}` again.
        axes: Stored axes -> the decoder's axes.
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
    def stored_words(self) -> list[str]:
        """The stored axes as they are written: ["(n h)", "d"]."""
        return re.findall(r"\(.*?\)|\w+", self.axes.partition(" -> ")[0])

    @property
    def stored_axes(self) -> tuple[StoredAxis, ...]:
        """The stored axes: ((("n", "h"),), (("d",),))."""
        return tuple(map(_read_axis, self.stored_words))

    @property
    def stored_letters(self) -> list[str]:
        """The letters of the stored axes one by one, of an axis with parts those of the row's: [n, h, d]."""
        chosen = (axis[self.part if len(axis) > 1 else 0] for axis in self.stored_axes)
        return [letter for part in chosen for letter in part]

    @property
    def decoder_letters(self) -> list[str]:
        """The decoder's axes: [d, n, h]."""
        return self.axes.partition(" -> ")[2].split()


def _read_axis(word: str) -> StoredAxis:
    """The parts of a stored axis; those that a number stands for have size 1, and no letters."""
    if word.isdigit():
        return ((),) * int(word)
    return tuple(tuple(part.split()) for part in word.strip("()").split("+"))


def leaf_name(path: tuple) -> str:
    """A leaf of the decoder's parameters, as tables name it: `layers.0.q`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


class Cut(NamedTuple):
    """What is taken of a stored axis: `size` entries from `start`."""

    axis: int
    start: int
    size: int


class Layout(NamedTuple):
    """A row in numbers: the steps that lead from the stored array to the decoder's.

    `(n h + k h + k h) d -> d k h`, of part 1, with 4 query heads, 2 key/value heads of 8 and 32 features:

        stored_shape  (64, 32)
        cuts          axis 0, 16 from 32    (16, 32)
        split_shape   (2, 8, 32)            k h d
        order         (2, 0, 1)             d k h, (32, 2, 8)

    Attributes:
        stored_shape: The stored shape, without padding.
        stored_keys: What the sizes of those axes are, in the words of config.json.
        padded: Stored axes that may be too long.
        cuts: What is taken of the stored array.
        split_shape: The shape of that, with axes apart that are stored as one.
        layers_axis: Which of those axes is a stack of layers; None where none is.
        order: The decoder's axes, as positions among those axes, that of layers left out.
        ops: What is done then, in order: the name of an operation with a number, or with one of the decoder's
            axes.
    """

    stored_shape: tuple[int, ...]
    stored_keys: tuple[str, ...]
    padded: tuple[int, ...]
    cuts: tuple[Cut, ...]
    split_shape: tuple[int, ...]
    layers_axis: int | None
    order: tuple[int, ...]
    ops: tuple[tuple[str, float | int], ...]

    @classmethod
    def of(cls, row: LeafRow, config: DecoderConfig, *, num_layers: int = 1) -> Layout:
        """The layout of a row, whose source is a stack of so many layers if it is one."""
        sizes = {letter: getattr(config, axis.field) for letter, axis in AXES.items()} | {LAYERS: num_layers}
        axes, letters = row.stored_axes, row.stored_letters
        padded = tuple(i for i, axis in enumerate(axes) if (UNPAD, *axis[0]) in row.ops)
        own_letters = [letter for letter in letters if letter != LAYERS]
        return cls(
            stored_shape=tuple(sum(_size(part, sizes) for part in axis) for axis in axes),
            stored_keys=tuple(map(_describe_axis, axes)),
            padded=padded,
            cuts=tuple(
                _cut(i, axis, row.part if len(axis) > 1 else 0, sizes)
                for i, axis in enumerate(axes)
                if len(axis) > 1 or i in padded
            ),
            split_shape=tuple(sizes[letter] for letter in letters),
            layers_axis=letters.index(LAYERS) if LAYERS in letters else None,
            order=tuple(own_letters.index(letter) for letter in row.decoder_letters),
            ops=tuple(
                (name, row.decoder_letters.index(value) if isinstance(value, str) else value)
                for name, value in row.ops
                if name != UNPAD  # a cut
            ),
        )

    @property
    def decoder_shape(self) -> tuple[int, ...]:
        """The shape that the decoder has."""
        own_sizes = [size for axis, size in enumerate(self.split_shape) if axis != self.layers_axis]
        return tuple(own_sizes[position] for position in self.order)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array may be stored in this shape: as it should be, padded, or with axes apart."""
        if shape == self.split_shape and math.prod(shape) == math.prod(self.stored_shape):
            return True
        return len(shape) == len(self.stored_shape) and all(
            0 <= size - wanted <= (MAX_PADDING if axis in self.padded else 0)
            for axis, (size, wanted) in enumerate(zip(shape, self.stored_shape, strict=True))
        )

    def to_decoder(self, stored: jax.Array, layer: jax.typing.ArrayLike = 0) -> jax.Array:
        """The decoder's array, but for its dtype, from a stored array, or from a layer of it."""
        for axis, start, size in self.cuts:
            stored = lax.slice_in_dim(stored, start, start + size, axis=axis)
        array = stored.reshape(self.split_shape)
        if self.layers_axis is not None:
            array = lax.dynamic_index_in_dim(array, layer, self.layers_axis, keepdims=False)
        array = array.transpose(self.order)
        for op in self.ops:
            array = _operate(op, 0, array)
        return array

    def to_stored(self, array: jax.Array) -> jax.Array:
        """The stored array from the decoder's: undoes `to_decoder` where nothing is cut or stacked."""
        for op in reversed(self.ops):
            array = _operate(op, 1, array)
        back = tuple(self.order.index(position) for position in range(len(self.order)))
        return array.transpose(back).reshape(self.stored_shape)

    def describe(self) -> str:
        """The stored shape and where it comes from: (8, 32) = (hidden_size, num_key_value_heads*head_dim)."""
        keys = [f"{key} or a few more" if i in self.padded else key for i, key in enumerate(self.stored_keys)]
        return f"{self.stored_shape} = ({', '.join(keys)})"


def _size(part: Part, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[letter] for letter in part)


def _cut(i: int, axis: StoredAxis, part: int, sizes: Mapping[str, int]) -> Cut:
    """One part of a stored axis, the `i`th."""
    return Cut(i, sum(_size(before, sizes) for before in axis[:part]), _size(axis[part], sizes))


def _describe_axis(axis: StoredAxis) -> str:
    """The size of a stored axis in the words of config.json: num_attention_heads*head_dim."""
    keys = {letter: axis.key for letter, axis in AXES.items()} | {LAYERS: "layers stacked"}
    return "+".join("*".join(keys[letter] for letter in part) or "1" for part in axis)


def _operate(op: tuple[str, float | int], direction: int, array: jax.Array) -> jax.Array:
    """Do to one of the decoder's arrays what an operation says, or with direction 1 undo it."""
    name, value = op
    if name in ORDERS:
        return ORDERS[name][direction](array, value)
    return ARITHMETIC[name][direction](array.astype(jnp.float32), jnp.float32(value))
