"""What "auto" stands for: the first fact that is measured for a layer on a device, else one rule."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxattn.attention.choice_table import PREFERENCE, ChoiceTable, Device, Fact, Layer

TIE = 0.03
"""Candidates whose times differ by no more than this share count as equal, so that noise decides nothing."""

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""The platforms that programs are lowered for."""

Medians = Mapping[str, Mapping[str, float]]
"""By workload, the median time of every candidate."""


class Choice(NamedTuple):
    """An implementation and why it was chosen."""

    implementation: str
    reason: str


def choose(
    layer: Layer,
    device: Device,
    tables: Sequence[ChoiceTable],
    unsupported_reason: Callable[[str], str | None],
) -> Choice:
    """Choose an implementation.

    The first fact that matches, and whose implementation can serve the layer, is taken; where there is none,
    the default rule: `triton` on an NVIDIA GPU of compute capability 8.0 or later if it serves the layer,
    `xla` everywhere else.

    Args:
        layer: What is to be computed.
        device: Where.
        tables: Measured facts, the most important table first.
        unsupported_reason: Why an implementation cannot serve the layer there; None where it can.
    """
    refused: list[str] = []
    for table in tables:
        for fact in table.facts:
            if not fact.matches(layer, device):
                continue
            if found := unsupported_reason(fact.implementation):
                refused.append(
                    f"{fact.implementation}, which {_place(table, fact)} names, cannot serve: {found}"
                )
                continue
            return Choice(fact.implementation, "; ".join((_describe(table, fact), *refused)))
    if refused:
        why = "; ".join(refused)
    elif any(device.is_one_of(fact.device) for table in tables for fact in table.facts):
        why = f"no measurement for {layer} on this device"
    else:
        why = "no measurement for this device"
    implementation, reason = _default_rule(device, unsupported_reason)
    return Choice(implementation, f"{why}: the default rule takes {implementation}, since {reason}")


def _default_rule(device: Device, unsupported_reason: Callable[[str], str | None]) -> Choice:
    if device.platform != "gpu":
        return Choice("xla", f"the platform is {device.platform}, and the Triton kernel needs an NVIDIA GPU")
    if found := unsupported_reason("triton"):
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


def _place(table: ChoiceTable, fact: Fact) -> str:
    return f"{table.name} {fact.where}"


def _describe(table: ChoiceTable, fact: Fact) -> str:
    """What was measured, where, and when."""
    run = fact.provenance
    machine = [fact.device.kind or fact.device.platform]
    machine += [text.format(run[name]) for name, text in _MACHINE.items() if run.get(name) is not None]
    commit = run.get("commit")
    workloads = ", ".join(fact.medians_ms)
    return (
        f"{_comparison(fact)} in {fact.phase} ({workloads}), measured on {', '.join(machine)} "
        f"on {run['date']} at {f'commit {str(commit)[:12]}' if commit else 'an unknown commit'}, "
        f"jaxattn {run['jaxattn']}, jax {run['jax']}: {_place(table, fact)}"
    )


_MACHINE = {"processor": "{}", "cores": "{} cores", "driver": "driver {}", "heads": "{} heads"}
"""What a reason tells of a run, where the table has it."""


def _comparison(fact: Fact) -> str:
    times = _typical_times(fact.medians_ms)
    order = ", ".join(name for name in PREFERENCE if name in times)
    mine = times.pop(fact.implementation)
    if not times:
        return f"{fact.implementation} was the only candidate"
    runner_up = min(times, key=times.__getitem__)
    ratio = times[runner_up] / mine
    if abs(ratio - 1) <= TIE:
        return f"{fact.implementation} is as fast as {runner_up} within {TIE:.0%}, and the first of {order},"
    where = " (interpreted)" if runner_up == "triton" and fact.device.platform != "gpu" else ""
    return f"{fact.implementation} is {ratio:.3g} times as fast as {runner_up}{where}, the runner-up,"


def default_device() -> Any:
    """The device that programs run on unless they are told otherwise."""
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.devices()[0]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen


def first_device(platform: str) -> Any | None:
    """The first device of a platform that this process has; None where it has none."""
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return None


def describe_device(platform: str | None = None) -> Device:
    """What is known of the device that a program runs on.

    A program that is lowered for a platform runs, as far as can be known, on the first device that the
    process has of it. Where it has none, as when a CPU exports for a GPU, only the platform is known.

    Args:
        platform: "cpu", "gpu", "cuda", "rocm" or "tpu"; the default device itself where None.
    """
    device = default_device() if platform is None else first_device(platform)
    if device is None:
        return _UNSEEN.get(str(platform), Device(str(platform)))
    capability = getattr(device, "compute_capability", None)
    return Device(
        device.platform,
        getattr(device, "device_kind", None),
        None if capability is None else str(capability),
    )


_UNSEEN = {"cuda": Device("gpu"), "rocm": Device("gpu", compute_capability="rocm")}
"""What is known without a device: that a GPU is, or is not, one of NVIDIA's."""
