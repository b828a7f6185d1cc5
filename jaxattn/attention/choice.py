"""What "auto" stands for: the first fact that is measured for a layer on a device, else one rule."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxattn.attention.choice_table import PREFERENCE, Device, Layer, Row, Table

TIE = 0.03
"""Candidates whose times differ by no more than this share count as equal, so that noise decides nothing."""

Medians = Mapping[str, Mapping[str, float]]
"""By workload, the median time of every candidate."""


class Choice(NamedTuple):
    """An implementation and why it was chosen."""

    implementation: str
    reason: str


def choose(
    layer: Layer, device: Device, tables: Sequence[Table], obstacle: Callable[[str], str | None]
) -> Choice:
    """Choose an implementation.

    The first row that matches, and whose implementation can serve the layer, is taken; where there is none,
    the default rule: `triton` on an NVIDIA GPU of compute capability 8.0 or later if it serves the layer,
    `xla` everywhere else.

    Args:
        layer: What is to be computed.
        device: Where.
        tables: Measured facts, the most important table first.
        obstacle: Of an implementation, why it cannot serve the layer there; None where it can.
    """
    refused: list[str] = []
    for table in tables:
        for row in table.rows:
            if not row.matches(layer, device):
                continue
            if found := obstacle(row.implementation):
                refused.append(
                    f"{row.implementation}, which {_place(table, row)} names, cannot serve: {found}"
                )
                continue
            return Choice(row.implementation, "; ".join((_fact(table, row), *refused)))
    if refused:
        why = "; ".join(refused)
    elif any(device.is_one_of(row.device) for table in tables for row in table.rows):
        why = f"no measurement for {layer} on this device"
    else:
        why = "no measurement for this device"
    implementation, reason = _default_rule(device, obstacle)
    return Choice(implementation, f"{why}: the default rule takes {implementation}, since {reason}")


def _default_rule(device: Device, obstacle: Callable[[str], str | None]) -> Choice:
    if device.platform != "gpu":
        return Choice("xla", f"the platform is {device.platform}, and the Triton kernel needs an NVIDIA GPU")
    if found := obstacle("triton"):
        return Choice("xla", f"the Triton kernel cannot serve this layer: {found}")
    return Choice("triton", "the Triton kernel serves this layer on an NVIDIA GPU")


def fastest(medians: Medians) -> str:
    """The candidate that takes the least time, or the first of `PREFERENCE` among those within `TIE` of it.

    Args:
        medians: By workload, the time of every candidate; workloads count alike, whatever they take.
    """
    times = _typical_times(medians)
    least = min(times.values())
    return next(name for name in PREFERENCE if name in times and times[name] <= (1 + TIE) * least)


def _typical_times(medians: Medians) -> dict[str, float]:
    """The geometric mean over workloads of each candidate's times."""
    candidates = next(iter(medians.values()))
    return {name: statistics.geometric_mean(m[name] for m in medians.values()) for name in candidates}


def _place(table: Table, row: Row) -> str:
    return f"{table.name} {row.where}"


def _fact(table: Table, row: Row) -> str:
    """What was measured, where, and when."""
    facts = row.provenance
    machine = [row.device.kind or row.device.platform]
    machine += [text.format(facts[name]) for name, text in _MACHINE.items() if facts.get(name) is not None]
    commit = facts.get("commit")
    return (
        f"{_comparison(row)} in {row.phase} ({', '.join(row.medians_ms)}), measured on {', '.join(machine)} "
        f"on {facts['date']} at {f'commit {str(commit)[:12]}' if commit else 'an unknown commit'}, "
        f"jaxattn {facts['jaxattn']}, jax {facts['jax']}: {_place(table, row)}"
    )


_MACHINE = {"processor": "{}", "cores": "{} cores", "driver": "driver {}", "heads": "{} heads"}
"""What a reason tells of a run, where the table has it."""


def _comparison(row: Row) -> str:
    times = _typical_times(row.medians_ms)
    order = ", ".join(name for name in PREFERENCE if name in times)
    mine = times.pop(row.implementation)
    if not times:
        return f"{row.implementation} was the only candidate"
    runner_up = min(times, key=times.__getitem__)
    ratio = times[runner_up] / mine
    if abs(ratio - 1) <= TIE:
        return f"{row.implementation} is as fast as {runner_up} within {TIE:.0%}, and the first of {order},"
    where = " (interpreted)" if runner_up == "triton" and row.device.platform != "gpu" else ""
    return f"{row.implementation} is {ratio:.3g} times as fast as {runner_up}{where}, the runner-up,"


def default_device() -> Any:
    """The device that programs run on unless they are told otherwise."""
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.devices()[0]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen


def describe_device(platform: str | None = None) -> Device:
    """What is known of the default device, or, where that is of another platform, of a device of this one.

    Args:
        platform: "cpu", "gpu", "cuda" or "tpu"; that of the default device where None.
    """
    default = default_device()
    platform = "gpu" if platform == "cuda" else platform
    if platform is not None and platform != default.platform:
        return Device(platform)
    capability = getattr(default, "compute_capability", None)
    return Device(
        default.platform,
        getattr(default, "device_kind", None),
        None if capability is None else str(capability),
    )
