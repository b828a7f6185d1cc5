"""A user's own table of names: rows as data, from Python or a JSON file, checked before anything is read.

    {
      "rows": [
        {"destination": "embed", "source": "embed/embedding", "axes": "v d -> v d"},
        {"destination": "layers.{i}.q", "source": "layers_{i}/attn/query/kernel", "axes": "d n h -> d n h"},
        {"destination": "layers.{i}.k", "source": "layers_{i}/attn/kv[0]", "axes": "2 k d h -> d k h",
         "ops": [["scale", 0.125]]}
      ]
    }

What the words of a row mean is said by `LeafRow`; here its words are checked.
"""

from __future__ import annotations

import json
import math
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
from jaxattn.checkpoints.layouts.rows import (
    ARITHMETIC,
    AXES,
    HEAD,
    LAYERS,
    ORDERS,
    UNPAD,
    LeafRow,
    leaf_name,
)
from jaxattn.models import DecoderConfig, abstract_params

LeafTable = Sequence[LeafRow] | str | os.PathLike[str]
"""Rows, or a JSON file of rows."""

DESTINATIONS = {row.destination: " ".join(row.decoder_letters) for row in (*TORCH, *POST_NORMS)}
"""Every leaf that a decoder may have, with its axes."""

_SOURCE = re.compile(r"[^\[\]]+(\[\d+\])?")
_AXES = re.compile(r"(\w+|\([\w +]+\))( (\w+|\([\w +]+\)))* -> \w+( \w+)*")

_KEYS = {"destination": str, "source": str, "axes": str, "ops": list}


def read_table(file: str | os.PathLike[str]) -> tuple[LeafRow, ...]:
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
    return tuple(
        LeafRow(**{**entry, "ops": tuple(map(tuple, entry.get("ops", ())))}) for entry in raw["rows"]
    )


def resolve_table(table: LeafTable, config: DecoderConfig) -> tuple[LeafRow, ...]:
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


def _unsound(row: LeafRow) -> Iterator[str]:
    """What is wrong with a row, whatever the decoder."""
    leaf = row.destination
    if leaf not in DESTINATIONS:
        yield f"unknown destination {leaf!r}; the decoder's leaves are {', '.join(DESTINATIONS)}"
        return
    problems = list(_unreadable(row))
    yield from problems
    is_stack = LAYERS in re.findall(r"\w+", row.axes)
    if ("{i}" in leaf) != ("{i}" in row.source or is_stack):
        yield (
            f"{leaf!r} comes from {row.source!r}; write {{i}}, the layer, in both or in neither, "
            f"or have layers stacked on an axis {LAYERS}"
        )
    if re.search("[{}]", row.source.replace("{i}", "")):
        yield f"source {row.source!r} has braces that are not {{i}}, the number of the layer"
    wanted, own = " ".join(row.decoder_letters), DESTINATIONS[leaf]
    if wanted != own and not problems:
        yield f"axes {row.axes!r} end in {wanted!r}; {leaf!r} has {own!r}"


def _unreadable(row: LeafRow) -> Iterator[str]:
    """What keeps the words of a row from having a meaning."""
    if not _SOURCE.fullmatch(row.source):
        yield f"source {row.source!r} must be a name, and if it has parts an index behind it, as 'a/b[0]'"
    elif not _AXES.fullmatch(row.axes):
        yield f"axes {row.axes!r} must be stored axes -> the decoder's, such as '(n h) d -> d n h'"
    else:
        yield from _bad_axes(row) or _bad_ops(row)


def _bad_axes(row: LeafRow) -> list[str]:
    axes = row.stored_axes
    unknown = {letter for axis in axes for part in axis for letter in part} - {*AXES, LAYERS}
    if unknown:
        sizes = ", ".join(f"{letter} {axis.key}" for letter, axis in AXES.items())
        named = ", ".join(map(repr, sorted(unknown)))
        return [f"axes {row.axes!r} have unknown {named}; use {sizes}, {LAYERS} layers stacked"]
    several = [len(axis) for axis in axes if len(axis) > 1]
    if len(several) > 1:
        return [f"axes {row.axes!r} have parts on more than one axis; a source has one index"]
    num_parts = several[0] if several else 1
    if row.part >= num_parts:
        return [f"source {row.source!r} has no part {row.part}; axes {row.axes!r} have {num_parts}"]
    if several and "[" not in row.source:
        return [f"source {row.source!r} has {num_parts} parts; say which, such as '{row.source}[0]'"]
    kept = [letter for letter in row.stored_letters if letter != LAYERS]
    if sorted(kept) != sorted(row.decoder_letters):
        return [f"axes {row.axes!r} begin with {', '.join(kept)} and end with other letters; use the same"]
    return []


def _bad_ops(row: LeafRow) -> list[str]:
    letters = [letter for letter in row.stored_letters if letter != LAYERS]
    lone = [axis[0][0] for axis in row.stored_axes if len(axis) == len(axis[0]) == 1]
    letters_of = {UNPAD: lone, **dict.fromkeys(ORDERS, letters)}
    problems = []
    for name, value in row.ops:
        if name in letters_of:
            if value not in letters_of[name]:
                problems.append(
                    f"op {name!r} needs one of the axes {' '.join(letters_of[name])}, not {value!r}"
                )
        elif name not in ARITHMETIC:
            known = ", ".join(map(repr, (*ARITHMETIC, *letters_of)))
            problems.append(f"unknown op {name!r}; use one of {known}")
        elif isinstance(value, str) or not math.isfinite(value) or (name == "scale" and value == 0):
            not_0 = ", not 0" if name == "scale" else ""
            problems.append(f"op {name!r} with {value!r}: give a finite number{not_0}")
    return problems


def _without_row(rows: Sequence[LeafRow], config: DecoderConfig) -> Iterator[str]:
    leaves = jax.tree.leaves_with_path(abstract_params(config, jnp.float32))
    wanted = {re.sub(r"^layers\.\d+", "layers.{i}", leaf_name(path)): None for path, _ in leaves}
    for leaf in wanted.keys() - {row.destination for row in rows}:
        untied = ", or set tie_word_embeddings in the config" if leaf == HEAD else ""
        yield f"no row for {leaf!r}, which the config asks for; add one{untied}"
