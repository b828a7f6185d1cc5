"""Attention by the Pallas Mosaic GPU kernels: the metadata's part for them, as arrays."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxattn.attention.kernel_inputs import kernel_inputs
from jaxattn.metadata.consumers import mosaic_tiling
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.mosaic_gpu import blackwell, hopper

HOPPER = "9.0"


def attend(
    q: Float[Array, "T N H"],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    sinks: Float[Array, " N"] | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
    capability: str | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attend with the kernel, compiled for a Hopper or a Blackwell GPU.

    Interpreting is a choice of the caller. The interpreter works by ordered callbacks, and JAX cannot
    lower a program for one platform whose branch for another has them, so the platform cannot choose.

    Args:
        q: Queries, packed.
        k: Keys, packed `[T, K, H]` or in pages `[pages, page_size, K, H]`.
        v: Values, like the keys.
        metadata: The batch's metadata, with the schedule of this implementation.
        spec: The layer.
        sinks: Logits of the sinks, if the layer has them.
        interpret: How to simulate the GPU on a CPU; None to compile.
        capability: Compute capability of the GPU, such as "10.0"; Hopper's where None.

    Returns:
        Outputs in the dtype of `q`, and the natural logarithm of the softmax's denominator; 0 and
        -inf for padding.
    """
    return _kernel(capability).ragged_attention(
        q,
        k.reshape(-1, *k.shape[-2:]),
        v.reshape(-1, *v.shape[-2:]),
        *kernel_inputs(metadata, spec, mosaic_tiling(spec)),
        sinks=sinks,
        page_size=k.shape[1] if k.ndim == 4 else None,
        scale=spec.softmax_scale,
        logits_soft_cap=spec.logits_soft_cap,
        windowed=spec.window_class.span is not None,
        interpret=interpret,
    )


def unsupported_reason(
    spec: AttentionSpec,
    dtype: jax.typing.DTypeLike,
    kv_dtype: jax.typing.DTypeLike,
    page_size: int | None,
    *,
    capability: str | None = None,
) -> str | None:
    """Why the kernel for a compute capability cannot serve a layer over such pages; None where it can."""
    found = _kernel(capability).unsupported_reason(
        dtype=dtype,
        kv_dtype=kv_dtype,
        head_dim=spec.head_dim,
        group_size=spec.group_size,
        page_size=page_size,
    )
    if found is None and not serves(capability or HOPPER):
        return f"it needs an NVIDIA GPU of compute capability {HOPPER} or 10.x, not {capability}"
    return found


def serves(capability: str | None) -> bool:
    """Whether there is a kernel for GPUs of a compute capability."""
    return capability == HOPPER or _is_blackwell(capability)


def _is_blackwell(capability: str | None) -> bool:
    return capability is not None and capability.startswith("10.")


def _kernel(capability: str | None) -> Any:
    """The kernel for a compute capability: each uses instructions that the other's GPUs do not have."""
    return blackwell if _is_blackwell(capability) else hopper
