"""Which implementation a call of `attention` runs on each platform, and the call of it, with its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jaxtyping import Array, Float, Shaped

from jaxattn.attention import vjp as gradients
from jaxattn.attention.choice import PLATFORMS, choose, describe_device
from jaxattn.attention.choice_table import ChoiceTable, Layer, tables
from jaxattn.attention.implementations import IMPLEMENTATIONS, Backward, Forward
from jaxattn.attention.support import (
    gradient_of,
    mosaic_unsupported_reason,
    triton_unsupported_reason,
    unsupported_reason,
)
from jaxattn.metadata.consumers import CONSUMERS, Consumer
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.arrays import KVScales


def phase_of(metadata: AttentionMetadata) -> str:
    """A batch's phase: "decode" where its bucket promises one query token per sequence, else "prefill"."""
    return "decode" if metadata.bucket.max_q_len == 1 else "prefill"


def names_by_platform(
    implementation: str | ChoiceTable,
    q: Float[Array, "T N H"],
    k: Shaped[Array, "..."],
    metadata: AttentionMetadata,
    spec: AttentionSpec,
) -> dict[str, str]:
    """The implementation for each of `PLATFORMS`.

    Args:
        implementation: Its name, "auto" or a table of choices.
        q: The queries.
        k: The keys.
        metadata: The batch's metadata.
        spec: The layer.

    Raises:
        ValueError: If the name is unknown.
        NotImplementedError: If the implementation that was named cannot serve the layer.
    """
    if implementation == "auto" or isinstance(implementation, ChoiceTable):
        facts = tables(implementation if isinstance(implementation, ChoiceTable) else None)
        layer = Layer(phase_of(metadata), q.dtype.name, k.dtype.name, spec.head_dim, metadata.page_size)
        names = {}
        for platform in PLATFORMS:
            device = describe_device(platform)
            reason = functools.partial(
                unsupported_reason, spec=spec, layer=layer, device=device, kv_elements=k.size
            )
            names[platform] = choose(layer, device, facts, reason).implementation
        return names
    if implementation not in IMPLEMENTATIONS:
        *most, last = map(repr, IMPLEMENTATIONS)
        raise ValueError(
            f"unknown implementation={implementation!r}; use 'auto', {', '.join(most)} or {last}"
        )
    gpu = describe_device("cuda")
    if implementation == "triton":
        found = triton_unsupported_reason(spec, q.dtype, k.dtype, gpu, kv_elements=k.size)
        instead = "xla"
    elif implementation == "mosaic":  # without a GPU it can still be exported
        found = mosaic_unsupported_reason(
            spec, q.dtype, k.dtype, metadata.page_size, capability=gpu.compute_capability
        )
        instead = "triton"
    else:
        found = instead = None
    if found:
        raise NotImplementedError(
            f"implementation={implementation!r} cannot serve this layer: {found}; use {instead!r}"
        )
    return dict.fromkeys(PLATFORMS, implementation)


def attend_by_platform(
    names: Mapping[str, str],
    spec: AttentionSpec,
    q: Float[Array, "T N H"],
    k: Shaped[Array, "..."],
    v: Shaped[Array, "..."],
    metadata: AttentionMetadata,
    sinks: Float[Array, " N"] | None,
    kv_scales: KVScales | None,
) -> gradients.Results:
    """Attend by the implementation of the platform that the program is lowered for.

    Args:
        names: By platform, the implementation.
        spec: The layer.
        q: Queries, packed.
        k: Keys, packed `[T, K, H]` or in pages `[pages, page_size, K, H]`.
        v: Values, like the keys.
        metadata: The batch's metadata.
        sinks: Logits of the sinks, if the layer has them.
        kv_scales: What quantised keys and values stand for, if they are.
    """
    distinct = set(names.values())
    if (
        "reference" in distinct and len(distinct) > 1
    ):  # JAX differentiates it: then whatever else there is, too
        bodies = {
            name: functools.partial(attend_by_platform, dict.fromkeys(names, name), spec) for name in distinct
        }
        branches = {platform: bodies[name] for platform, name in names.items()}
        return jax.lax.platform_dependent(q, k, v, metadata, sinks, kv_scales, **branches)
    if "reference" in distinct:
        return Forward("reference")(q, k, v, metadata, spec, sinks=sinks, kv_scales=kv_scales)
    gpu = describe_device("cuda")
    backward_names = {
        platform: gradient_of(name, spec, q.dtype, k.dtype, metadata.page_size, gpu)
        for platform, name in names.items()
    }
    forward = _per_platform(names, lambda name: Forward(name, gpu.compute_capability))
    backward = _per_platform(backward_names, Backward, suffix="_gradient")
    return gradients.attend(forward, backward, spec, q, k, v, metadata, sinks, kv_scales)


def _per_platform(names: Mapping[str, str], function_of: Callable[[str], Any], suffix: str = "") -> Any:
    """The function that is the platform's; where all have the same, that one."""
    default = names["cpu"]
    others = tuple((platform, function_of(name)) for platform, name in names.items() if name != default)
    if not others:
        return function_of(default)
    from jaxattn.attention.per_platform import PerPlatform  # see there

    function = PerPlatform(function_of(default), others)
    readers = [
        CONSUMERS.get(name + suffix, CONSUMERS[name]) for name in dict.fromkeys((default, *names.values()))
    ]

    def call(*args: Any, **options: Any) -> Any:
        *arrays, metadata, spec = args
        return function(*arrays, _part_read(metadata, spec, readers), spec, **options)

    return call


def _part_read(
    metadata: AttentionMetadata, spec: AttentionSpec, readers: Sequence[Consumer]
) -> AttentionMetadata:
    """The metadata that these read for a layer: a program takes what it is given, read or not.

    All of it where the first of them finds something missing, so that it can say what there is.
    """
    wanted = [reader.reads_of(metadata.page_size is not None) for reader in readers]
    ranges = [v for v in metadata.values.get("visible", ()) if v.window_class == spec.window_class]
    have = metadata.values.keys() | {name for visible in ranges for name in visible.values}
    if not ranges or wanted[0] - have:
        return metadata
    tilings = [reader.tiling(spec) for reader in readers if reader.tiling is not None]
    key_blocks = [reader.key_block for reader in readers]
    lists: dict[str, Callable[[Any], bool]] = {
        "schedules": lambda schedule: schedule.tiling in tilings,
        "key_tiles": lambda tiles: tiles.block_k in key_blocks,
    }
    names = frozenset[str]().union(*wanted)
    (visible,) = ranges
    kept = {
        name: tuple(filter(lists[name], value)) if name in lists else value
        for name, value in visible.values.items()
        if name in names
    }
    values = {name: value for name, value in metadata.values.items() if name in names}
    return replace(metadata, values=values | {"visible": (replace(visible, values=kept),)})
