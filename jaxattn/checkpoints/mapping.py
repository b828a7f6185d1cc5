"""From a checkpoint's names and shapes to the decoder's: one function that follows a table."""

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
from jaxattn.checkpoints.rows import Layout, Row
from jaxattn.models import DecoderConfig, abstract_params

HEAD = "head"

# What Linen users and multimodal models write otherwise, brought to one spelling, in this order.
SPELLINGS = (
    (r"\.", "/"),  # torch
    (r"^(params/){1,2}", ""),  # the variable collection
    (r"/value$", ""),  # a boxed leaf: nn.with_partitioning
    (r"^(model/)?language_model/", ""),  # Gemma 3 with a tower of vision: two spellings
    (r"^model/", ""),
    (r"^layers_(\d+)/", r"layers/\1/"),
    (r"/scale$", "/weight"),
)

# Leaves without use here: rotary embedding is computed from the config, and images are not read.
IGNORED = re.compile(r"(^|/)(rotary_emb|vision_tower|multi_modal_projector)/")

# Formats whose names are not read yet, by what tells them.
OTHERS = {
    "MaxText": re.compile(r"^(decoder/layers|decoder/decoder_norm|token_embedder)(/|$)"),
    "the gemma library": re.compile(r"(^|/)(q_einsum|qkv_einsum|kv_einsum|input_embedding)(/|$)"),
}

_LAYER = re.compile(r"^layers/(\d+)/")

FLOATS = ("float16", "bfloat16", "float32", "float64")


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
            filled = row._replace(destination=row.destination.format(i=i), source=row.source.format(i=i))
            if filled.destination in wanted:
                rows[filled.destination] = filled
    return rows


def normalize(name: str) -> str:
    """A stored leaf's name in the one spelling that names are compared in."""
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def match(leaves: Mapping[str, Leaf], config: DecoderConfig, table: tuple[Row, ...]) -> Plan:
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
    names = weights_among(leaves)
    stored = {normalize(name): name for name in names}
    head = next((normalize(row.name) for row in table if row.destination == HEAD), None)
    overrules_tie = config.tie_embeddings and head in stored
    if overrules_tie:
        config = dataclasses.replace(config, tie_embeddings=False)
    rows = expand(table, config)
    layouts = {name: Layout.of(row, config) for name, row in rows.items()}
    sources = {name: stored.get(normalize(row.name)) for name, row in rows.items()}
    found = {name: source for name, source in sources.items() if source is not None}
    problems = [
        *_other_format(stored),
        *_wrong_depth(stored, config),
        *_doubled(names),
        *_unused(stored, rows),
        *(_missing(rows[name], layouts[name]) for name in rows if name not in found),
        *(problem for name in found for problem in _misfits(found[name], leaves[found[name]], layouts[name])),
    ]  # fmt: skip
    if problems:
        # Several rows read one fused leaf, and complain of the same.
        raise CheckpointError("the weights do not fit the config:\n  " + "\n  ".join(dict.fromkeys(problems)))
    return Plan(config, overrules_tie, found, layouts)


def weights_among(leaves: Mapping[str, Leaf]) -> list[str]:
    """Names of the parameters, without an optimizer's state beside them, or what has no use here."""
    of_params = [name for name in leaves if name.startswith("params/")]
    return [name for name in of_params or leaves if not IGNORED.search(name.replace(".", "/"))]


def _other_format(stored: Mapping[str, str]) -> list[str]:
    for format_name, pattern in OTHERS.items():
        named = next((name for spelling, name in stored.items() if pattern.search(spelling)), None)
        if named is not None:
            return [f"{named} is named as by {format_name}, whose checkpoints are not read yet"]
    return []


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
    wanted = {normalize(row.name) for row in rows.values()}
    return [f"unused: {name}" for spelling, name in stored.items() if spelling not in wanted]


def _missing(row: Row, layout: Layout) -> str:
    untied = ", as tie_word_embeddings is false" if row.destination == HEAD else ""
    return f"missing: {row.name} {layout.describe()}{untied}"


def _misfits(source: str, leaf: Leaf, layout: Layout) -> list[str]:
    problems = []
    if leaf.shape not in layout.shapes:
        transposed = " (transposed?)" if leaf.shape[::-1] in layout.shapes else ""
        problems.append(
            f"shape: {source} is stored as {leaf.shape}{transposed}, the config needs {layout.describe()}"
        )
    if leaf.dtype not in FLOATS:
        problems.append(
            f"dtype: {source} is stored as {leaf.dtype}; integer or quantized weights are not supported"
        )
    return problems
