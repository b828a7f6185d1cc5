"""From a checkpoint's names and shapes to the decoder's: tables, and one function that follows them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.models import DecoderConfig, abstract_params


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


class Row(NamedTuple):
    """One line of a table of names.

    Attributes:
        destination: Leaf of the decoder's parameters; `{i}` is the layer.
        source: Leaf of the checkpoint.
        axes: Stored axes -> the decoder's axes. Those in brackets are stored fused, or each apart.
    """

    destination: str
    source: str
    axes: str


HEAD = "head"

# Hugging Face's FlaxLlama and FlaxMistral.
LLAMA = (
    Row("embed", "model/embed_tokens/embedding", "v d -> v d"),
    Row("layers.{i}.attention_norm", "model/layers/{i}/input_layernorm/weight", "d -> d"),
    Row("layers.{i}.q", "model/layers/{i}/self_attn/q_proj/kernel", "d (n h) -> d n h"),
    Row("layers.{i}.k", "model/layers/{i}/self_attn/k_proj/kernel", "d (k h) -> d k h"),
    Row("layers.{i}.v", "model/layers/{i}/self_attn/v_proj/kernel", "d (k h) -> d k h"),
    Row("layers.{i}.o", "model/layers/{i}/self_attn/o_proj/kernel", "(n h) d -> n h d"),
    Row("layers.{i}.mlp_norm", "model/layers/{i}/post_attention_layernorm/weight", "d -> d"),
    Row("layers.{i}.gate", "model/layers/{i}/mlp/gate_proj/kernel", "d f -> d f"),
    Row("layers.{i}.up", "model/layers/{i}/mlp/up_proj/kernel", "d f -> d f"),
    Row("layers.{i}.down", "model/layers/{i}/mlp/down_proj/kernel", "f d -> f d"),
    Row("final_norm", "model/norm/weight", "d -> d"),
    Row(HEAD, "lm_head/kernel", "d v -> d v"),
)

# What Linen users write otherwise, brought to one spelling, in this order.
SPELLINGS = (
    (r"^(params/){1,2}", ""),  # the variable collection
    (r"/value$", ""),  # a boxed leaf: nn.with_partitioning
    (r"^model/", ""),
    (r"^layers_(\d+)/", r"layers/\1/"),
    (r"/scale$", "/weight"),
)

# Leaves that hold no weights: rotary embedding is computed from the config.
IGNORED = re.compile(r"(^|/)rotary_emb/")

_LAYER = re.compile(r"^layers/(\d+)/")

FLOATS = ("float16", "bfloat16", "float32", "float64")


class Leaf(NamedTuple):
    """What a checkpoint says of one of its arrays, before any of it is read."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """The array as it is brought to the device.

        float64 comes as float32, as JAX has none by default; and all comes to one device, as where
        an array was when it was stored says nothing about here.
        """
        dtype = "float32" if self.dtype == "float64" else self.dtype
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(dtype), sharding=device)


class Layout(NamedTuple):
    """A row's axes, with their sizes.

    Attributes:
        groups: Names of the stored axes, fused ones together.
        order: The decoder's axes, as positions among the stored ones.
        sizes: Of each axis name.
    """

    groups: tuple[tuple[str, ...], ...]
    order: tuple[int, ...]
    sizes: dict[str, int]

    @classmethod
    def of(cls, row: Row, config: DecoderConfig) -> Layout:
        """Read a row's axes."""
        stored, wanted = row.axes.split(" -> ")
        groups = tuple(tuple(group.strip("()").split()) for group in re.findall(r"\(.*?\)|\w", stored))
        names = [name for group in groups for name in group]
        sizes = {name: getattr(config, AXES[name].field) for name in names}
        return cls(groups, tuple(names.index(name) for name in wanted.split()), sizes)

    @property
    def fused(self) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(math.prod(self.sizes[name] for name in group) for group in self.groups)

    @property
    def apart(self) -> tuple[int, ...]:
        """The stored shape where no axes are fused."""
        return tuple(self.sizes[name] for group in self.groups for name in group)

    def to_decoder(self, stored: jax.Array) -> jax.Array:
        """A stored array as the decoder has it."""
        return stored.reshape(self.apart).transpose(self.order)

    def to_stored(self, array: jax.Array) -> jax.Array:
        """One of the decoder's arrays as it is stored; undoes `to_decoder`."""
        back = tuple(self.order.index(position) for position in range(len(self.order)))
        return array.transpose(back).reshape(self.fused)

    def describe(self) -> str:
        """The stored shape and where it comes from: (8, 32) = (hidden_size, num_key_value_heads*head_dim)."""
        keys = ["*".join(AXES[name].key for name in group) for group in self.groups]
        return f"{self.fused} = ({', '.join(keys)})"


class Plan(NamedTuple):
    """Which stored leaf becomes which of the decoder's.

    Attributes:
        config: The decoder; with a head of its own if one is stored.
        overrules_tie: Whether that head is stored against the word of the config.
        sources: Name of the stored leaf, by the name of the decoder's leaf.
        layouts: Its axes, by the same name.
    """

    config: DecoderConfig
    overrules_tie: bool
    sources: dict[str, str]
    layouts: dict[str, Layout]


def leaf_name(path: tuple) -> str:
    """A leaf of the decoder's parameters, as tables name it: `layers.0.q`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def expand(table: tuple[Row, ...], config: DecoderConfig) -> dict[str, Row]:
    """The rows of all leaves that the decoder has, by leaf, with layers filled in."""
    leaves = jax.tree.leaves_with_path(abstract_params(config, jnp.float32))
    wanted = {leaf_name(path) for path, _ in leaves}
    rows = {}
    for row in table:
        for i in range(config.num_layers if "{i}" in row.destination else 1):
            filled = Row(row.destination.format(i=i), row.source.format(i=i), row.axes)
            if filled.destination in wanted:
                rows[filled.destination] = filled
    return rows


def normalize(name: str) -> str:
    """A stored leaf's name in the one spelling that names are compared in."""
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def match(leaves: Mapping[str, Leaf], config: DecoderConfig, *, table: tuple[Row, ...] = LLAMA) -> Plan:
    """Compare all that a checkpoint stores with all that a config asks for.

    Args:
        leaves: The stored leaves, by name.
        config: The decoder that the weights are for. Of a head and tied embeddings, the head wins.
        table: Names.

    Returns:
        What to read, and what becomes of it.

    Raises:
        CheckpointError: If leaves are missing, left over, doubled, misshaped or no floating-point
            numbers. All of them are listed.
    """
    names = _weights_among(leaves)
    stored = {normalize(name): name for name in names}
    head = next(normalize(row.source) for row in table if row.destination == HEAD)
    overrules_tie = config.tie_embeddings and head in stored
    if overrules_tie:
        config = dataclasses.replace(config, tie_embeddings=False)
    rows = expand(table, config)
    layouts = {name: Layout.of(row, config) for name, row in rows.items()}
    sources = {name: stored.get(normalize(row.source)) for name, row in rows.items()}
    found = {name: source for name, source in sources.items() if source is not None}
    problems = [
        *_wrong_depth(stored, config),
        *_doubled(names),
        *_unused(stored, rows),
        *(_missing(rows[name], layouts[name]) for name in rows if name not in found),
        *(problem for name in found for problem in _misfits(found[name], leaves[found[name]], layouts[name])),
    ]  # fmt: skip
    if problems:
        raise CheckpointError("the weights do not fit the config:\n  " + "\n  ".join(problems))
    return Plan(config, overrules_tie, found, layouts)


def _weights_among(leaves: Mapping[str, Leaf]) -> list[str]:
    """Names of the parameters, without the optimizer's state beside them or what holds no weights."""
    of_params = [name for name in leaves if name.startswith("params/")]
    return [name for name in of_params or leaves if not IGNORED.search(name)]


def _wrong_depth(stored: Mapping[str, str], config: DecoderConfig) -> list[str]:
    layers = {int(layer[1]) for name in stored if (layer := _LAYER.match(name))}
    if not layers or max(layers) + 1 == config.num_layers:
        return []
    return [f"the weights have {max(layers) + 1} layers, num_hidden_layers={config.num_layers}"]


def _doubled(names: list[str]) -> list[str]:
    counts = Counter(normalize(name) for name in names)
    return [
        f"more than one {spelling}: {', '.join(name for name in names if normalize(name) == spelling)}"
        for spelling, count in counts.items()
        if count > 1
    ]


def _unused(stored: Mapping[str, str], rows: Mapping[str, Row]) -> list[str]:
    wanted = {normalize(row.source) for row in rows.values()}
    return [f"unused: {name}" for spelling, name in stored.items() if spelling not in wanted]


def _missing(row: Row, layout: Layout) -> str:
    untied = ", as tie_word_embeddings is false" if row.destination == HEAD else ""
    return f"missing: {row.source} {layout.describe()}{untied}"


def _misfits(source: str, leaf: Leaf, layout: Layout) -> list[str]:
    problems = []
    if leaf.shape not in (layout.fused, layout.apart):
        problems.append(f"shape: {source} is stored as {leaf.shape}, the config needs {layout.describe()}")
    if leaf.dtype not in FLOATS:
        problems.append(
            f"dtype: {source} is stored as {leaf.dtype}; integer or quantized weights are not supported"
        )
    return problems
