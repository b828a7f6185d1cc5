"""What each implementation can serve: element types, sizes of heads and pages, devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxattn.attention.choice_table import Device, Layer
from jaxattn.cache.quantization import is_quantized
from jaxattn.metadata.spec import AttentionSpec
from jaxattn_kernels.arrays import TRITON_MAX_HEAD_DIM

_TRITON_DTYPES = ("float32", "bfloat16", "float16")
_TRITON_MIN_CAPABILITY = 8.0
_E4M3_MIN_CAPABILITY = 8.9


def unsupported_reason(
    implementation: str, spec: AttentionSpec, layer: Layer, device: Device, *, kv_elements: int = 0
) -> str | None:
    """Why an implementation cannot serve a layer on a device; None where it can.

    Args:
        implementation: Its name.
        spec: The layer.
        layer: Its element types and page size.
        device: The device.
        kv_elements: Numbers that the keys consist of; 0 where that is not known.
    """
    if implementation == "triton":
        found = triton_unsupported_reason(spec, layer.dtype, layer.kv_dtype, device, kv_elements=kv_elements)
        return found or _device_unsupported_reason(device)
    if implementation == "mosaic":
        capability = device.compute_capability or f"that of a {device.platform}"
        return mosaic_unsupported_reason(
            spec, layer.dtype, layer.kv_dtype, layer.page_size, capability=capability
        )
    return None


def triton_unsupported_reason(
    spec: AttentionSpec,
    dtype: jax.typing.DTypeLike,
    kv_dtype: jax.typing.DTypeLike,
    device: Device,
    *,
    kv_elements: int = 0,
) -> str | None:
    """Why the Triton kernel cannot serve a layer, be it compiled or interpreted; None where it can.

    Args:
        spec: The layer.
        dtype: Element type of the queries.
        kv_dtype: That of keys and values.
        device: Where it runs; of a GPU, what it can read.
        kv_elements: Numbers that the keys consist of; 0 where that is not known.
    """
    name = jnp.dtype(dtype).name
    if name not in _TRITON_DTYPES:
        return f"dtype {name} is not one of {', '.join(_TRITON_DTYPES)}"
    if spec.head_dim > TRITON_MAX_HEAD_DIM:
        return f"head_dim={spec.head_dim} exceeds {TRITON_MAX_HEAD_DIM}"
    if not is_quantized(kv_dtype):
        return None
    if (
        jnp.dtype(kv_dtype) == jnp.float8_e4m3fn
        and (capability := _capability(device) or 9.0) < _E4M3_MIN_CAPABILITY
    ):
        return f"compute capability {capability} cannot read float8_e4m3fn; store float8_e5m2 or int8"
    if 2**31 < kv_elements <= 2**32:
        # Pallas counts in 32 bits up to 2^32 bytes, signed.
        return f"its offsets into {kv_elements} numbers of one byte would overflow; use fewer pages"
    return None


def mosaic_unsupported_reason(
    spec: AttentionSpec,
    dtype: jax.typing.DTypeLike,
    kv_dtype: jax.typing.DTypeLike,
    page_size: int | None,
    *,
    capability: str | None,
) -> str | None:
    """Why the Mosaic kernels cannot serve a layer; None where they can.

    Args:
        spec: The layer.
        dtype: Element type of the queries.
        kv_dtype: That of keys and values.
        page_size: Tokens per page; None for packed keys.
        capability: Compute capability of the GPU; None where it is not known.
    """
    from jaxattn.attention import mosaic  # its compiler is loaded where somebody asks for it

    return mosaic.unsupported_reason(spec, dtype, kv_dtype, page_size, capability=capability)


def gradient_of(
    implementation: str,
    spec: AttentionSpec,
    dtype: jax.typing.DTypeLike,
    kv_dtype: jax.typing.DTypeLike,
    page_size: int | None,
    device: Device,
) -> str:
    """Which implementation goes backward through this one: itself, if its gradient can serve the layer.

    Triton's gradient stands in for Mosaic's, which is for Hopper, and for head dims up to 128.

    Args:
        implementation: Its name.
        spec: The layer.
        dtype: Element type of the queries.
        kv_dtype: That of keys and values.
        page_size: Tokens per page; None for packed keys.
        device: The device.
    """
    if implementation != "mosaic":
        return implementation
    from jaxattn.attention import mosaic_gradient  # as above

    capability = device.compute_capability
    found = mosaic_gradient.unsupported_reason(spec, dtype, kv_dtype, page_size, capability=capability)
    return "triton" if found else implementation


def _device_unsupported_reason(device: Device) -> str | None:
    """Why a GPU cannot run the Triton kernel; None where it can, and where nothing is known of it."""
    named = device.compute_capability
    if named is None:
        return None
    if (capability := _capability(device)) is None:
        return f"the GPU is a {named}, not one of NVIDIA's"
    too_old = capability < _TRITON_MIN_CAPABILITY
    return f"its compute capability {named} is below {_TRITON_MIN_CAPABILITY}" if too_old else None


def _capability(device: Device) -> float | None:
    """The compute capability of a device; None where it is no NVIDIA GPU, or not known."""
    try:
        return float(device.compute_capability or "none")
    except ValueError:  # another maker's GPU has a name in its place
        return None
