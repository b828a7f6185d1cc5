"""Matching what is stored with what a config asks for, leaf by leaf, as a table names them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.formats.weights import Leaf
from jaxattn.checkpoints.layouts.names import normalize, weights_among
from jaxattn.checkpoints.layouts.rows import HEAD, Layout, LeafRow, leaf_name
from jaxattn.models import DecoderConfig, abstract_params

_LAYER = re.compile(r"^(?:decoder/)?layers?[/_](\d+)/")

FLOATS = ("float16", "bfloat16", "float32", "float64")


class LoadPlan(NamedTuple):
    """Which stored leaf becomes which of the decoder's.

    Attributes:
        config: The decoder; with a head of its own if one is stored.
        overrules_tie: Whether that head is stored against the word of the config.
        sources: Name of the stored leaf, by the name of the decoder's leaf.
        layouts: Its axes, by the same name.
        layers: Where the decoder's leaf is in a stack of layers, by the same name; 0 where there is none.
    """

    config: DecoderConfig
    overrules_tie: bool
    sources: dict[str, str]
    layouts: dict[str, Layout]
    layers: dict[str, int]


def expand(table: tuple[LeafRow, ...], config: DecoderConfig) -> dict[str, LeafRow]:
    """The rows of all leaves that the decoder has, by leaf, with layers filled in."""
    wanted = _parameters(config)
    rows = {}
    for row in table:
        for i in range(config.num_layers if "{i}" in row.destination else 1):
            filled = row._replace(destination=row.destination.format(i=i), source=row.source.format(i=i))
            if filled.destination in wanted:
                rows[filled.destination] = filled
    return rows


def _parameters(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves that the decoder has."""
    leaves = jax.tree.leaves_with_path(abstract_params(config, jnp.float32))
    return {leaf_name(path): leaf.shape for path, leaf in leaves}


def match(leaves: Mapping[str, Leaf], config: DecoderConfig, table: tuple[LeafRow, ...]) -> LoadPlan:
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
    heads = {normalize(row.name) for row in table if row.destination == HEAD}
    overrules_tie = config.tie_embeddings and not heads.isdisjoint(stored)
    if overrules_tie:
        config = dataclasses.replace(config, tie_embeddings=False)
    rows = expand(table, config)
    counts = Counter(row.source for row in rows.values())
    layouts = {name: Layout.of(row, config, num_layers=counts[row.source]) for name, row in rows.items()}
    sources = {name: stored.get(normalize(row.name)) for name, row in rows.items()}
    found = {name: source for name, source in sources.items() if source is not None}
    problems = [
        *_not_the_decoders(layouts, config),
        *_wrong_depth(stored, rows, config),
        *_doubled(names),
        *_unused(stored, rows),
        *(_missing(rows[name], layouts[name]) for name in rows if name not in found),
        *(problem for name in found for problem in _misfits(found[name], leaves[found[name]], layouts[name])),
    ]  # fmt: skip
    if problems:
        # Several rows read one fused leaf, and complain of the same.
        raise CheckpointError("the weights do not fit the config:\n  " + "\n  ".join(dict.fromkeys(problems)))
    return LoadPlan(config, overrules_tie, found, layouts, _places(rows))


def _places(rows: Mapping[str, LeafRow]) -> dict[str, int]:
    """The place of each leaf among those whose rows name the same source."""
    before: Counter[str] = Counter()
    places = {}
    for name, row in rows.items():
        places[name] = before[row.source]
        before[row.source] += 1
    return places


def _not_the_decoders(layouts: Mapping[str, Layout], config: DecoderConfig) -> list[str]:
    """What a table says of the decoder that is not so."""
    wanted = _parameters(config)
    uncovered = [name for name in wanted if name not in layouts]
    others = [name for name in layouts if layouts[name].decoder_shape != wanted[name]]
    return [
        *(f"the config asks for {name}, which no row of the table is for" for name in uncovered),
        *(
            f"{name} is {wanted[name]} in the decoder, {layouts[name].decoder_shape} in the table"
            for name in others
        ),
    ]


def _wrong_depth(stored: Mapping[str, str], rows: Mapping[str, LeafRow], config: DecoderConfig) -> list[str]:
    has, wants = _depth(stored), _depth(normalize(row.name) for row in rows.values())
    if has in (0, wants) or wants == 0:
        return []
    per_block = config.num_layers // wants  # MaxText stores Gemma 2 in pairs
    return [f"the weights have {has * per_block} layers, num_hidden_layers={config.num_layers}"]


def _depth(names: Iterable[str]) -> int:
    """How many layers, counted one by one, names speak of."""
    return max((int(layer[1]) + 1 for name in names if (layer := _LAYER.match(name))), default=0)


def _doubled(names: list[str]) -> list[str]:
    counts = Counter(normalize(name) for name in names)
    return [
        f"more than one {spelling}: {', '.join(name for name in names if normalize(name) == spelling)}"
        for spelling, count in counts.items()
        if count > 1
    ]


def _unused(stored: Mapping[str, str], rows: Mapping[str, LeafRow]) -> list[str]:
    wanted = {normalize(row.name) for row in rows.values()}
    return [f"unused: {name}" for spelling, name in stored.items() if spelling not in wanted]


def _missing(row: LeafRow, layout: Layout) -> str:
    untied = ", as tie_word_embeddings is false" if row.destination == HEAD else ""
    return f"missing: {row.name} {layout.describe()}{untied}"


def _misfits(source: str, leaf: Leaf, layout: Layout) -> list[str]:
    problems = []
    if not layout.fits(leaf.shape):
        transposed = " (transposed?)" if layout.fits(leaf.shape[::-1]) else ""
        problems.append(
            f"shape: {source} is stored as {leaf.shape}{transposed}, the config needs {layout.describe()}"
        )
    if leaf.dtype not in FLOATS:
        problems.append(
            f"dtype: {source} is stored as {leaf.dtype}; integer or quantized weights are not supported"
        )
    return problems
