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

import datetime
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp

VERSION = 1
PREFERENCE = ("triton", "xla", "mosaic", "reference")
"""All implementations. Of several that are as fast as each other, the first is taken: those of the default
rule, then the kernel with fewer options, then the definition."""
PHASES = ("decode", "prefill")
"""Of a batch: "decode" where its bucket promises one query token per sequence, "prefill" for all others."""
VARIABLE = "JAXATTN_CHOICES"
"""The environment variable that names a user's own table."""

_REQUIRED_PROVENANCE = ("date", "jaxattn", "jax")


class Device(NamedTuple):
    """What is known of a device; None for what is not, or, in a table, for any.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: As `jax.Device.device_kind`, such as "NVIDIA H200".
        compute_capability: Such as "9.0".
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
class Row:
    """One fact: what is fastest, for which layers on which device.

    Attributes:
        where: Its place in the file.
        device: On which it was measured, or those it stands for.
        provenance: Of its run: date, versions, commit and more, by name.
        phase: Of `PHASES`.
        dtype: Element types of the queries it stands for.
        kv_dtype: Those of keys and values.
        head_dim: Sizes of a head.
        page_size: Tokens per page; None for packed keys.
        implementation: The one to take.
        medians_ms: By workload, the median milliseconds of every candidate.
        left_out: By candidate that was not measured, why.
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
    left_out: Mapping[str, str]

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
class Table:
    """A table of choices.

    Attributes:
        name: The file, for people.
        rows: Its facts, of which the first that matches counts.
    """

    name: str
    rows: tuple[Row, ...]


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read and check a table.

    Raises:
        ValueError: If the file cannot be read or is no such table, naming the file, the row, the field, its
            value and the remedy.
    """
    path = Path(path)
    try:
        status = path.stat()
        return _read_version_of(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); name a table that 'jaxattn tune' wrote"
        ) from error


@functools.lru_cache(maxsize=8)  # every attention layer that is traced asks for it
def _read_version_of(path: Path, mtime_ns: int, size: int) -> Table:
    del mtime_ns, size
    try:
        return parse_table(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        _Place(str(path)).refuse(f"is not text in UTF-8 ({error.reason})")


@functools.lru_cache(maxsize=1)
def packaged_table() -> Table:
    """The facts that come with jaxattn."""
    text = resources.files("jaxattn.attention").joinpath("choices.json").read_text(encoding="utf-8")
    return parse_table(text, "jaxattn/choices.json")


def tables(own: Table | str | os.PathLike[str] | None = None) -> tuple[Table, ...]:
    """The tables to choose by, the user's before the packaged one.

    Args:
        own: The user's table or its file; where None, the file that `JAXATTN_CHOICES` names, if it does.

    Raises:
        ValueError: If a table cannot be read.
    """
    if own is None and (named := os.environ.get(VARIABLE)):
        try:
            own = read_table(named)
        except ValueError as error:
            raise ValueError(f"{VARIABLE}={named}: {error}") from error
    if own is not None and not isinstance(own, Table):
        own = read_table(own)
    return (packaged_table(),) if own is None else (own, packaged_table())


def parse_table(text: str, name: str) -> Table:
    """Check the text of a table.

    Args:
        text: JSON.
        name: The file, for errors.

    Raises:
        ValueError: Naming the row, the field, its value and the remedy.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        _Place(name).refuse(f"is not JSON ({error})")
    place = _Place(name)
    fields = place.fields(document, required=("jaxattn_choices", "runs"))
    if fields["jaxattn_choices"] != VERSION:
        place.at("jaxattn_choices").refuse(f"={fields['jaxattn_choices']!r} is not {VERSION}")
    runs = place.at("runs").items(fields["runs"])
    return Table(name, tuple(row for place, run in runs for row in _rows(place, run)))


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


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in a file, and how its content is checked."""

    file: str
    path: str = ""

    def at(self, key: str | int) -> _Place:
        step = f"[{key}]" if isinstance(key, int) else f".{key}" if self.path else key
        return _Place(self.file, self.path + step)

    def refuse(self, what: str) -> NoReturn:
        place = f"{self.path}{'' if what.startswith('=') else ' '}{what}" if self.path else what
        raise ValueError(f"{self.file}: {place}; correct it, or write a table with 'jaxattn tune'")

    def fields(
        self, value: Any, required: Sequence[str] = (), optional: Sequence[str] | None = ()
    ) -> dict[str, Any]:
        """An object that has the required fields, and besides only optional ones (None: any)."""
        if not isinstance(value, dict):
            self.refuse(f"={value!r} is not an object" if self.path else "is not a JSON object")
        if missing := [name for name in required if name not in value]:
            self.refuse(f"has no {', '.join(map(repr, missing))}")
        known = (*required, *(optional or ()))
        if optional is not None and (unknown := [name for name in value if name not in known]):
            self.refuse(f"has unknown {', '.join(map(repr, unknown))} beside {', '.join(known)}")
        return value

    def items(self, value: Any) -> list[tuple[_Place, Any]]:
        """The items of a list, each with its place."""
        if not isinstance(value, list):
            self.refuse(f"={value!r} is not a list")
        return [(self.at(i), item) for i, item in enumerate(value)]

    def one_of(self, value: Any, allowed: Sequence[str]) -> str:
        if value not in allowed:
            self.refuse(f"={value!r} is not one of {', '.join(map(repr, allowed))}")
        return value

    def text(self, value: Any) -> str:
        if not isinstance(value, str) or not value:
            self.refuse(f"={value!r} is not a text")
        return value

    def positive(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(f"={value!r} is not an integer of at least 1")
        return value

    def duration(self, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            self.refuse(f"={value!r} is not a positive number of milliseconds")
        return float(value)

    def dtype(self, value: Any) -> str:
        try:
            is_name = isinstance(value, str) and jnp.dtype(value).name == value
        except TypeError:
            is_name = False
        if not is_name:
            self.refuse(f"={value!r} is not the name of an element type, such as 'bfloat16'")
        return value


def _rows(place: _Place, run: Any) -> list[Row]:
    fields = place.fields(run, required=("device", "provenance", "rows"))
    device = _device(place.at("device"), fields["device"])
    provenance = _provenance(place.at("provenance"), fields["provenance"])
    return [_row(at, row, device, provenance) for at, row in place.at("rows").items(fields["rows"])]


def _device(place: _Place, value: Any) -> Device:
    optional = ("kind", "compute_capability")
    fields = place.fields(value, required=("platform",), optional=optional)
    platform = place.at("platform").one_of(fields["platform"], ("cpu", "gpu", "tpu"))
    rest = {name: fields.get(name) for name in optional}
    return Device(platform, **{n: None if x is None else place.at(n).text(x) for n, x in rest.items()})


def _provenance(place: _Place, value: Any) -> dict[str, Any]:
    fields = place.fields(value, _REQUIRED_PROVENANCE, optional=None)
    for name in _REQUIRED_PROVENANCE:
        place.at(name).text(fields[name])
    try:
        datetime.date.fromisoformat(fields["date"])
    except ValueError:
        place.at("date").refuse(f"={fields['date']!r} is not a date, such as '2026-11-25'")
    for name, fact in fields.items():
        if isinstance(fact, dict | list):
            place.at(name).refuse(f"={fact!r} is not a text, a number or null")
    return fields


def _row(place: _Place, value: Any, device: Device, provenance: Mapping[str, Any]) -> Row:
    required = ("phase", "dtype", "kv_dtype", "head_dim", "page_size", "implementation", "medians_ms")
    fields = place.fields(value, required, optional=("left_out",))

    def any_of(name: str, check: Any) -> tuple:
        at, values = place.at(name), fields[name]
        if not isinstance(values, list):
            return (check(at, values),)
        if not values:
            at.refuse("=[] stands for nothing")
        return tuple(check(*item) for item in at.items(values))

    implementation = place.at("implementation").one_of(fields["implementation"], PREFERENCE)
    left_out = place.at("left_out").fields(fields.get("left_out", {}), optional=PREFERENCE)
    return Row(
        where=place.path,
        device=device,
        provenance=provenance,
        phase=place.at("phase").one_of(fields["phase"], PHASES),
        dtype=any_of("dtype", _Place.dtype),
        kv_dtype=any_of("kv_dtype", _Place.dtype),
        head_dim=any_of("head_dim", _Place.positive),
        page_size=any_of("page_size", lambda at, size: None if size is None else at.positive(size)),
        implementation=implementation,
        medians_ms=_medians(place.at("medians_ms"), fields["medians_ms"], implementation),
        left_out={name: place.at("left_out").at(name).text(why) for name, why in left_out.items()},
    )


def _medians(place: _Place, value: Any, implementation: str) -> dict[str, dict[str, float]]:
    workloads = place.fields(value, optional=None)
    if not workloads:
        place.refuse("names no workload")
    checked: dict[str, dict[str, float]] = {}
    for workload, medians in workloads.items():
        at = place.at(workload)
        fields = at.fields(medians, (implementation,), optional=PREFERENCE)
        checked[workload] = {name: at.at(name).duration(ms) for name, ms in fields.items()}
        first = next(iter(checked.values()))
        if fields.keys() != first.keys():
            at.refuse(f"has the candidates {sorted(fields)}, another workload has {sorted(first)}")
    return checked
