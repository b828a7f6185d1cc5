"""Measured facts that `auto` chooses by: the format of a table of choices, read and checked.

A table is a JSON file that `jaxattn tune` writes:

    {"jaxattn_choices": 1,
     "runs": [{"device": {"platform": "gpu", "kind": …, "compute_capability": "9.0"},
               "provenance": {"date": "2026-11-25", "jaxattn": …, "jax": …, "commit": …, …},
               "rows": [{"phase": "decode", "dtype": "bfloat16", "kv_dtype": "bfloat16",
                         "head_dim": 128, "page_size": 16, "implementation": "triton",
                         "medians_ms": {"decode 64 x 4k": {"triton": …, "xla": …}},
                         "left_out": {"mosaic": "why it was not measured"}}]}]}

`kind` and `compute_capability` may be null: any. `dtype`, `kv_dtype`, `head_dim` and `page_size` may be
lists: any of them; `page_size` null stands for keys packed beside the queries.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

VERSION = 1
PREFERENCE = ("triton", "xla", "mosaic", "reference")
"""All implementations. Of several that are as fast as each other, the first is taken: those of the default
rule, then the kernel with fewer options, then the definition."""
PHASES = ("decode", "prefill")
"""Of a batch: "decode" where its bucket promises one query token per sequence, "prefill" for all others."""


class Device(NamedTuple):
    """What is known of a device; None for what is not, or, in a table, for any.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: As `jax.Device.device_kind`, such as "NVIDIA H200".
        compute_capability: Such as "9.0"; of another maker's GPU, a name.
    """

    platform: str
    kind: str | None = None
    compute_capability: str | None = None

    def is_one_of(self, stated: Device) -> bool:
        """Whether it has all that a table states."""
        return all(wanted is None or wanted == mine for wanted, mine in zip(stated, self, strict=True))


class Layer(NamedTuple):
    """What a choice depends on, apart from the device.

    Attributes:
        phase: Of `PHASES`.
        dtype: Name of the queries' element type.
        kv_dtype: Name of the keys' and values'.
        head_dim: Size of a head.
        page_size: Tokens per page; None for packed keys.
    """

    phase: str
    dtype: str
    kv_dtype: str
    head_dim: int
    page_size: int | None

    def __str__(self) -> str:
        keys = "packed keys" if self.page_size is None else f"page size {self.page_size}"
        dtype = self.dtype if self.kv_dtype == self.dtype else f"{self.dtype} over {self.kv_dtype}"
        return f"{self.phase} in {dtype}, head dim {self.head_dim}, {keys}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What is fastest, for which layers on which device: a row of a table.

    Attributes:
        where: Its place in the file.
        device: The device on which it was measured, or those it stands for.
        provenance: Facts of its run by name: date, versions, commit and more.
        phase: Of `PHASES`.
        dtype: Element types of the queries it stands for.
        kv_dtype: Those of keys and values.
        head_dim: Sizes of a head.
        page_size: Tokens per page; None for packed keys.
        implementation: The one to take.
        medians_ms: By workload, the median milliseconds of every candidate.
    """

    where: str
    device: Device
    provenance: Mapping[str, Any]
    phase: str
    dtype: tuple[str, ...]
    kv_dtype: tuple[str, ...]
    head_dim: tuple[int, ...]
    page_size: tuple[int | None, ...]
    implementation: str
    medians_ms: Mapping[str, Mapping[str, float]]

    def matches(self, layer: Layer, device: Device) -> bool:
        """Whether it is a fact about this layer on this device."""
        return (
            device.is_one_of(self.device)
            and layer.phase == self.phase
            and layer.dtype in self.dtype
            and layer.kv_dtype in self.kv_dtype
            and layer.head_dim in self.head_dim
            and layer.page_size in self.page_size
        )


@dataclass(frozen=True, slots=True)
class ChoiceTable:
    """A table of choices. Hashable, as programs are compiled for it (`attention(implementation=table)`).

    Attributes:
        name: The file, for people.
        facts: What was measured, of which the first that matches counts.
    """

    name: str
    facts: tuple[Fact, ...]

    def __hash__(self) -> int:
        return hash((self.name, len(self.facts)))

    def __repr__(self) -> str:
        return f"ChoiceTable({self.name!r}, {len(self.facts)} facts)"


def read_table(path: str | os.PathLike[str]) -> ChoiceTable:
    """Read and check a table.

    Raises:
        ValueError: If the file cannot be read or is no such table, naming the file, the row, the field, its
            value and the remedy.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text in UTF-8 ({error.reason}); {_REMEDY}") from error
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); name a table that 'jaxattn tune' wrote"
        ) from error
    return parse_table(text, str(path))


@functools.lru_cache(maxsize=1)
def packaged_table() -> ChoiceTable:
    """The facts that come with jaxattn."""
    text = resources.files("jaxattn.attention").joinpath("choices.json").read_text(encoding="utf-8")
    return parse_table(text, "jaxattn/choices.json")


def tables(own: ChoiceTable | str | os.PathLike[str] | None = None) -> tuple[ChoiceTable, ...]:
    """The tables to choose by, the user's before the packaged one.

    Args:
        own: The user's table or its file, if there is one.

    Raises:
        ValueError: If a table cannot be read.
    """
    if own is None:
        return (packaged_table(),)
    return (own if isinstance(own, ChoiceTable) else read_table(own), packaged_table())


def parse_table(text: str, name: str) -> ChoiceTable:
    """Check the text of a table.

    Args:
        text: JSON.
        name: The file, for errors.

    Raises:
        ValueError: Naming the row, the field, its value and the remedy.
    """
    try:
        document = _fields("", json.loads(text), ("jaxattn_choices", "runs"))
        if (version := document["jaxattn_choices"]) != VERSION:
            raise _WrongError(f"jaxattn_choices={version!r} is not {VERSION}")
        runs = _items("runs", document["runs"])
        return ChoiceTable(name, tuple(fact for where, run in runs for fact in _facts(where, run)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: is not JSON ({error}); {_REMEDY}") from error
    except _WrongError as error:
        raise ValueError(f"{name}: {error}; {_REMEDY}") from None


def format_table(document: dict[str, Any]) -> str:
    """A table as text, a line per row.

    Args:
        document: The table as JSON takes it.
    """
    runs = []
    for run in document["runs"]:
        facts = (f'"{name}": {json.dumps(run[name])}' for name in ("device", "provenance"))
        rows = ",\n   ".join(json.dumps(row) for row in run["rows"])
        runs.append(" {" + ",\n  ".join((*facts, f'"rows": [\n   {rows}]')) + "}")
    return f'{{"jaxattn_choices": {VERSION}, "runs": [\n' + ",\n".join(runs) + "]}\n"


_REMEDY = "correct it, or write a table with 'jaxattn tune'"


class _WrongError(Exception):
    """What is wrong with a table, and where."""


_ROW = ("phase", "dtype", "kv_dtype", "head_dim", "page_size", "implementation", "medians_ms")


def _facts(where: str, run: Any) -> Iterator[Fact]:
    """The rows of a run."""
    run = _fields(where, run, ("device", "provenance", "rows"))
    device = _fields(f"{where}.device", run["device"], ("platform",), optional=Device._fields)
    _one_of(f"{where}.device.platform", device["platform"], ("cpu", "gpu", "tpu"))
    provenance = _fields(f"{where}.provenance", run["provenance"], ("date", "jaxattn", "jax"), optional=None)
    for place, row in _items(f"{where}.rows", run["rows"]):
        row = _fields(place, row, _ROW, optional=("left_out",))
        several = {name: _several(row[name]) for name in ("dtype", "kv_dtype", "head_dim", "page_size")}
        for name in ("dtype", "kv_dtype"):
            _check_dtypes(f"{place}.{name}", several[name])
        yield Fact(
            where=place,
            device=Device(**device),
            provenance=provenance,
            phase=_one_of(f"{place}.phase", row["phase"], PHASES),
            implementation=_one_of(f"{place}.implementation", row["implementation"], PREFERENCE),
            medians_ms=_medians(f"{place}.medians_ms", row["medians_ms"], row["implementation"]),
            **several,
        )


def _medians(where: str, value: Any, implementation: str) -> dict[str, dict[str, float]]:
    """Times by workload: of the same candidates in each, the chosen one among them."""
    workloads = _fields(where, value, optional=None)
    if not workloads:
        raise _WrongError(f"{where} names no workload")
    medians: dict[str, dict[str, float]] = {}
    for name, times in workloads.items():
        fields = _fields(f"{where}.{name}", times, (implementation,), optional=PREFERENCE)
        for candidate, ms in fields.items():
            if not isinstance(ms, int | float) or ms <= 0:
                raise _WrongError(
                    f"{where}.{name}.{candidate}={ms!r} is not a positive number of milliseconds"
                )
        medians[name] = {candidate: float(ms) for candidate, ms in fields.items()}
        first = next(iter(medians.values()))
        if fields.keys() != first.keys():
            raise _WrongError(
                f"{where}.{name} has the candidates {sorted(fields)}, another workload has {sorted(first)}"
            )
    return medians


def _fields(
    where: str, value: Any, required: Sequence[str] = (), *, optional: Sequence[str] | None = ()
) -> dict[str, Any]:
    """An object that has the required fields, and besides only optional ones (None: any)."""
    if not isinstance(value, dict):
        raise _WrongError(f"{where}={value!r} is not an object" if where else "is not a JSON object")
    at = f"{where} " if where else ""
    if missing := [name for name in required if name not in value]:
        raise _WrongError(f"{at}has no {', '.join(map(repr, missing))}")
    if optional is not None and (unknown := value.keys() - {*required, *optional}):
        known = ", ".join(dict.fromkeys((*required, *optional)))
        raise _WrongError(f"{at}has unknown {', '.join(map(repr, sorted(unknown)))} beside {known}")
    return value


def _items(where: str, value: Any) -> list[tuple[str, Any]]:
    """The items of a list, each with its place."""
    if not isinstance(value, list):
        raise _WrongError(f"{where}={value!r} is not a list")
    return [(f"{where}[{i}]", item) for i, item in enumerate(value)]


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def _one_of(where: str, value: Any, allowed: Sequence[Any]) -> Any:
    if value not in allowed:
        raise _WrongError(f"{where}={value!r} is not one of {', '.join(map(repr, allowed))}")
    return value


def _check_dtypes(where: str, names: tuple[Any, ...]) -> None:
    for name in names:
        try:
            is_name = isinstance(name, str) and jnp.dtype(name).name == name
        except TypeError:
            is_name = False
        if not is_name:
            raise _WrongError(f"{where}={name!r} is not the name of an element type, such as 'bfloat16'")
