"""Measure which implementation is fastest on the device at hand, and write it down as a table of choices."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata as installed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.attention import mosaic
from jaxattn.attention.api import attention
from jaxattn.attention.choice import default_device, describe_device, fastest
from jaxattn.attention.choice_table import PHASES, VERSION, Device, Layer
from jaxattn.attention.support import unsupported_reason
from jaxattn.batch.bucket import Bucket
from jaxattn.cache.paged import PagedKVCache, init_cache, write_cache
from jaxattn.cache.quantization import quantization_scale
from jaxattn.measuring.timing import measure
from jaxattn.measuring.workloads import (
    GPU_TUNING,
    QUICK_TUNING,
    TUNING,
    Workload,
    nest_workload,
    random_page_tables,
)
from jaxattn.metadata.prepare import prepare_metadata
from jaxattn.metadata.spec import AttentionSpec

_ARBITERS = ("reference", "xla", "triton", "mosaic")
"""Candidates must agree with the first of these that is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePlan:
    """What to measure: every combination of element types, head dim, page size and phase.

    Attributes:
        dtypes: Names of element types, of queries, keys and values alike.
        cache_dtypes: Names of element types of quantised caches, measured besides with paged keys.
        head_dims: Sizes of a head.
        page_sizes: Tokens per page; None for packed keys, of which there is no decode.
        num_q_heads: Query heads.
        num_kv_heads: Key/value heads.
        implementations: The candidates; one that cannot serve a layer is left out there, with the reason.
        workloads: By phase, the batches; those over packed keys are the ones without cached context.
        repeats: Timed runs of each.
    """

    dtypes: tuple[str, ...]
    cache_dtypes: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = (64, 128)
    page_sizes: tuple[int | None, ...] = (16, None)
    num_q_heads: int
    num_kv_heads: int
    implementations: tuple[str, ...]
    workloads: Mapping[str, Sequence[Workload]]
    repeats: int = 10

    def spec(self, layer: Layer) -> AttentionSpec:
        """The layer as attention takes it."""
        return AttentionSpec(
            num_q_heads=self.num_q_heads, num_kv_heads=self.num_kv_heads, head_dim=layer.head_dim
        )

    def layers(self) -> dict[Layer, list[Workload]]:
        """The layers with their workloads, in the order of the rows."""
        layers = {
            Layer(phase, dtype, kv_dtype, head_dim, page_size): [
                w for w in self.workloads[phase] if page_size is not None or w.q_lens == w.kv_lens
            ]
            for dtype in self.dtypes
            for kv_dtype in (dtype, *self.cache_dtypes)
            for head_dim in self.head_dims
            for page_size in self.page_sizes
            if page_size is not None or kv_dtype == dtype
            for phase in PHASES
        }
        return {layer: workloads for layer, workloads in layers.items() if workloads}


def default_plan(device: Device, *, quick: bool = False) -> TunePlan:
    """What to measure on a device unless told otherwise.

    On a GPU, bfloat16, 32/8 heads, and the kernels that its kind has beside `xla`; elsewhere float32, 8/2
    heads, `xla` and `reference`: interpreted kernels are slow, and measured if they are named.

    Args:
        device: The device.
        quick: Whether to take small workloads and few runs, to see whether all works.
    """
    if device.platform == "gpu":
        kernels = ("triton", "mosaic") if mosaic.serves(device.compute_capability) else ("triton",)
        plan = TunePlan(
            dtypes=("bfloat16",),
            num_q_heads=32,
            num_kv_heads=8,
            implementations=(*kernels, "xla"),
            workloads=GPU_TUNING,
        )
    else:
        plan = TunePlan(
            dtypes=("float32",),
            num_q_heads=8,
            num_kv_heads=2,
            implementations=("xla", "reference"),
            workloads=TUNING,
        )
    return dataclasses.replace(plan, workloads=QUICK_TUNING, repeats=3) if quick else plan


class Tuned(NamedTuple):
    """What was measured.

    Attributes:
        document: A table of choices, as JSON takes it.
        unserved: Layers for which there is no row, since every candidate was left out, and why.
    """

    document: dict[str, Any]
    unserved: dict[Layer, dict[str, str]]


def tune(plan: TunePlan, *, announce: Callable[[str], None] = lambda _: None) -> Tuned:
    """Measure on the default device.

    Args:
        plan: What to measure.
        announce: Told what is measured next, once per layer, workload and candidate.
    """
    device, rows, unserved, clocks = describe_device(), [], {}, set()
    for layer, workloads in plan.layers().items():
        measured = _tune_layer(layer, workloads, plan, device, announce)
        clocks |= measured.clocks
        if measured.candidates:
            rows.append(measured.row(layer))
        else:
            unserved[layer] = measured.left_out
    facts = _provenance() | {
        "clock": ", ".join(sorted(clocks)),
        "heads": f"{plan.num_q_heads}/{plan.num_kv_heads}",
        "repeats": plan.repeats,
    }
    run = {"device": device._asdict(), "provenance": facts, "rows": rows}
    return Tuned({"jaxattn_choices": VERSION, "runs": [run]}, unserved)


class _LayerTimes(NamedTuple):
    """Times of one layer.

    Attributes:
        medians_ms: By workload and candidate.
        left_out: By candidate that has no times everywhere, why.
        clocks: Those that were read.
    """

    medians_ms: dict[str, dict[str, float]]
    left_out: dict[str, str]
    clocks: set[str]

    @property
    def candidates(self) -> list[str]:
        """Those that were measured on every workload, and agree."""
        names = next(iter(self.medians_ms.values()))
        return [name for name in names if name not in self.left_out]

    def row(self, layer: Layer) -> dict[str, Any]:
        """The row of a table."""
        medians = {
            workload: {name: float(f"{times[name]:.4g}") for name in self.candidates}
            for workload, times in self.medians_ms.items()
        }
        row = layer._asdict() | {"implementation": fastest(medians), "medians_ms": medians}
        return row | ({"left_out": self.left_out} if self.left_out else {})


def _tune_layer(
    layer: Layer,
    workloads: Sequence[Workload],
    plan: TunePlan,
    device: Device,
    announce: Callable[[str], None],
) -> _LayerTimes:
    spec = plan.spec(layer)
    found = {name: unsupported_reason(name, spec, layer, device) for name in plan.implementations}
    left_out = {name: why for name, why in found.items() if why is not None}
    medians: dict[str, dict[str, float]] = {}
    clocks = set()
    for workload in workloads:
        inputs = _draw(workload, spec, layer, plan.implementations) if len(left_out) < len(found) else ()
        times, outputs = medians.setdefault(workload.name, {}), {}
        for name in plan.implementations:
            announce(f"{layer}: {workload.name}: {name}")
            if name in left_out:
                continue
            try:
                # Compiled once, for the outputs and for the times.
                program = jax.jit(
                    lambda q, k, v, m, scales, name=name: attention(
                        q, k, v, m, spec, **scales, implementation=name
                    )
                )
                outputs[name] = np.asarray(program(*inputs), np.float32)
                measured = measure(program, *inputs, repeats=plan.repeats)
            except Exception as error:  # out of memory, or a compiler's; the others can still be measured
                left_out[name] = (
                    f"{workload.name}: {type(error).__name__}: {str(error).partition('\n')[0][:200]}"
                )
                continue
            times[name] = 1e3 * measured.median_s
            clocks.add(measured.clock)
        left_out |= {
            name: f"{workload.name}: {why}" for name, why in _disagreeing(outputs, layer.dtype).items()
        }
    return _LayerTimes(medians, left_out, clocks)


def _draw(
    workload: Workload, spec: AttentionSpec, layer: Layer, implementations: tuple[str, ...]
) -> tuple[Any, ...]:
    """Random queries, keys and values of a batch in the smallest bucket, its metadata, and scales by name."""
    page_size, longest = layer.page_size, max(workload.q_lens)
    if page_size is None:
        tables, num_pages = None, 0
        shape = (sum(workload.q_lens),)
    else:
        tables, num_pages = random_page_tables(workload, page_size, np.random.default_rng(0), unused=0)
        shape = (num_pages, page_size)
    bucket = Bucket(sum(workload.q_lens), len(workload.q_lens), num_pages, max_q_len=longest)
    batch = nest_workload(workload, page_tables=tables, page_size=page_size, bucket=bucket)
    heads = ((bucket.tokens, spec.num_q_heads), *2 * [(*shape, spec.num_kv_heads)])
    q, k, v = (
        jax.random.normal(key, (*lead, spec.head_dim), layer.dtype)
        for key, lead in zip(jax.random.split(jax.random.key(0), 3), heads, strict=True)
    )
    scales = {}
    if layer.kv_dtype != layer.dtype:
        cache = _quantized(k, v, layer.kv_dtype)
        k, v, scales = cache.k_pages, cache.v_pages, {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    return q, k, v, prepare_metadata(batch, spec, consumers=implementations), scales


@functools.partial(jax.jit, static_argnames="dtype")
def _quantized(
    k: Float[Array, "pages page_size K H"], v: Float[Array, "pages page_size K H"], dtype: str
) -> PagedKVCache:
    """A quantised cache of these pages, its scales those of the largest numbers."""
    num_pages, page_size, num_kv_heads, head_dim = k.shape
    k, v = (x.reshape(-1, num_kv_heads, head_dim) for x in (k, v))
    cache = init_cache(
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        k_scale=quantization_scale(k, dtype),
        v_scale=quantization_scale(v, dtype),
    )
    return write_cache(cache, k, v, jnp.arange(num_pages * page_size, dtype=jnp.int32))


def _disagreeing(outputs: Mapping[str, np.ndarray], dtype: str) -> dict[str, str]:
    """The candidates that differ from the arbiter by more than half of the digits of the dtype, and how."""
    if not outputs:
        return {}
    arbiter = next(name for name in _ARBITERS if name in outputs)
    expected = outputs[arbiter]
    allowed = float(jnp.finfo(dtype).eps) ** 0.5 * float(np.abs(expected).max())
    errors = {name: float(np.abs(out - expected).max()) for name, out in outputs.items() if name != arbiter}
    return {
        name: f"its outputs differ from those of {arbiter} by {error:.2g}, more than {allowed:.2g}"
        for name, error in errors.items()
        if not error <= allowed  # NaN is not
    }


def _provenance() -> dict[str, Any]:
    """When, where and with what; a commit ending in `-dirty` had changes beside it."""
    folder = Path(__file__).parent
    # Not the commit of whatever repository jaxattn is installed within.
    is_tracked = _output("git", "-C", str(folder), "ls-files", "--error-unmatch", "tune.py") is not None
    describe = ("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _output(*describe) if is_tracked else None,
        "jaxattn": installed.version("jaxattn"),
        "jax": jax.__version__,
        "jaxlib": installed.version("jaxlib"),
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "driver": _driver(),
        "runtime": " ".join(str(default_device().client.platform_version).split()),
    }


def _driver() -> str | None:
    if default_device().platform != "gpu":
        return None
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there, or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
