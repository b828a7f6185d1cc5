"""A user's own table of names: rows as data, from Python or a JSON file, checked before anything is read.

    {
      "rows": [
        {"destination": "embed", "source": "embed/embedding", "axes": "v d -> v d"},
        {"destination": "layers.{i}.q", "source": "layers_{i}/attn/query/kernel", "axes": "d n h -> d n h"},
        {"destination": "layers.{i}.k", "source": "layers_{i}/attn/kv[0]", "axes": "2 k d h -> d k h",
         "ops": [["scale", 0.125]]}
      ]
    }

What the words of a row mean is said by `Row`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.checkpoints.errors import CheckpointError, summarize
from jaxattn.checkpoints.layouts.hugging_face import POST_NORMS, TORCH
from jaxattn.checkpoints.layouts.mapping import HEAD, leaf_name
from jaxattn.checkpoints.layouts.rows import LAYERS, Row, problems_of
from jaxattn.models import DecoderConfig, abstract_params

Table = Sequence[Row] | str | os.PathLike[str]
"""Rows, or a JSON file of rows."""

DESTINATIONS = {row.destination: row.axes.partition(" -> ")[2] for row in (*TORCH, *POST_NORMS)}
"""Every leaf that a decoder may have, with its axes."""

_KEYS = {"destination": str, "source": str, "axes": str, "ops": list}


def read_table(file: str | os.PathLike[str]) -> tuple[Row, ...]:
    """Read a table of names from a JSON file.

    Raises:
        CheckpointError: If there is no such file, or it is no table; every bad row is listed.
    """
    try:
        raw = json.loads(Path(file).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"table {file} cannot be read as JSON: {summarize(error)}") from error
    if not isinstance(raw, dict) or set(raw) != {"rows"} or not isinstance(raw["rows"], list):
        raise CheckpointError(f'table {file} must be {{"rows": [...]}}, an object with a list of rows')
    problems = [f"rows[{i}]: {what}" for i, entry in enumerate(raw["rows"]) for what in _misspelled(entry)]
    _raise_for(problems, f"table {file}")
    return tuple(Row(**{**entry, "ops": tuple(map(tuple, entry.get("ops", ())))}) for entry in raw["rows"])


def resolve_table(table: Table, config: DecoderConfig) -> tuple[Row, ...]:
    """The rows of a user's table, each of them sound, and one for every leaf of the decoder.

    Args:
        table: Rows, or a JSON file of them.
        config: The decoder.

    Raises:
        CheckpointError: If it is no table, or not one for this decoder. Every bad row is listed.
    """
    is_file = isinstance(table, str | os.PathLike)
    rows = read_table(table) if is_file else tuple(table)
    problems = [f"rows[{i}]: {what}" for i, row in enumerate(rows) for what in _unsound(row)]
    counts = Counter(row.destination for row in rows)
    problems += [f"{n} rows are for {leaf!r}; keep one" for leaf, n in counts.items() if n > 1]
    if not problems:
        problems = list(_without_row(rows, config))
    _raise_for(problems, f"table {table}" if is_file else "table")
    return rows


def _raise_for(problems: list[str], what: str) -> None:
    if problems:
        raise CheckpointError("\n  ".join([f"{what} cannot be followed:", *problems]))


def _misspelled(entry: Any) -> Iterator[str]:
    """What keeps an entry of a JSON file from being a row at all."""
    if not isinstance(entry, Mapping):
        yield f"{entry!r} must be an object with destination, source and axes"
        return
    for key in sorted(entry.keys() - _KEYS.keys()):
        yield f"unknown key {key!r}; a row has {', '.join(_KEYS)}"
    for key, kind in _KEYS.items():
        if key not in entry:
            if key != "ops":
                yield f"{key} is missing"
        elif not isinstance(entry[key], kind):
            yield f"{key}={entry[key]!r} must be a {'string' if kind is str else 'list of [name, number]'}"
    ops = entry.get("ops")
    for op in ops if isinstance(ops, list) else ():
        named = isinstance(op, list) and len(op) == 2 and type(op[0]) is str
        if not (named and type(op[1]) in (int, float, str)):
            yield f"op {op!r} must be [name, number] or [name, axis], such as ['scale', 0.125]"


def _unsound(row: Row) -> Iterator[str]:
    """What is wrong with a row, whatever the decoder."""
    leaf = row.destination
    if leaf not in DESTINATIONS:
        yield f"unknown destination {leaf!r}; the decoder's leaves are {', '.join(DESTINATIONS)}"
        return
    problems = list(problems_of(row))
    yield from problems
    is_stack = LAYERS in re.findall(r"\w+", row.axes)
    if ("{i}" in leaf) != ("{i}" in row.source or is_stack):
        yield (
            f"{leaf!r} comes from {row.source!r}; write {{i}}, the layer, in both or in neither, "
            f"or have layers stacked on an axis {LAYERS}"
        )
    if re.search("[{}]", row.source.replace("{i}", "")):
        yield f"source {row.source!r} has braces that are not {{i}}, the number of the layer"
    wanted, own = row.axes.partition(" -> ")[2], DESTINATIONS[leaf]
    if wanted != own and not problems:
        yield f"axes {row.axes!r} end in {wanted!r}; {leaf!r} has {own!r}"


def _without_row(rows: Sequence[Row], config: DecoderConfig) -> Iterator[str]:
    leaves = jax.tree.leaves_with_path(abstract_params(config, jnp.float32))
    wanted = {re.sub(r"^layers\.\d+", "layers.{i}", leaf_name(path)): None for path, _ in leaves}
    for leaf in wanted.keys() - {row.destination for row in rows}:
        untied = ", or set tie_word_embeddings in the config" if leaf == HEAD else ""
        yield f"no row for {leaf!r}, which the config asks for; add one{untied}"
