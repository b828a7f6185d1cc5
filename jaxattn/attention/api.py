"""`attention()`: check the shapes, choose an implementation, call it."""

from __future__ import annotations

import functools
import os
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.attention import mosaic, mosaic_gradient, reference, triton, triton_gradient, xla, xla_gradient
from jaxattn.attention import vjp as gradients
from jaxattn.attention.choice import Choice, choose, describe_device
from jaxattn.attention.choice_table import PHASES, Device, Layer, Table, tables
from jaxattn.batch.ragged import INT32_MAX
from jaxattn.cache.quantization import QUANTIZED_DTYPES, check_scales, is_quantized
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.triton.parts import MAX_HEAD_DIM

IMPLEMENTATIONS = {
    "reference": reference.attend,
    "xla": xla.attend,
    "triton": triton.attend,
    "mosaic": mosaic.attend,
}

GRADIENTS: dict[str, gradients.Backward] = {
    "xla": xla_gradient.attend_backward,
    "triton": triton_gradient.attend_backward,
    "mosaic": mosaic_gradient.attend_backward,
}
"""What goes backward through an implementation that JAX cannot differentiate, if it can serve the layer."""

_TRITON_DTYPES = ("float32", "bfloat16", "float16")
_TRITON_MIN_CAPABILITY = 8.0
_E4M3_MIN_CAPABILITY = 8.9


@overload
def attention(
    q: Array | np.ndarray,
    k: Array | np.ndarray,
    v: Array | np.ndarray,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    sinks: Array | np.ndarray | None = None,
    k_scale: jax.typing.ArrayLike | None = None,
    v_scale: jax.typing.ArrayLike | None = None,
    return_lse: Literal[False] = False,
    implementation: str = "auto",
) -> Array: ...


@overload
def attention(
    q: Array | np.ndarray,
    k: Array | np.ndarray,
    v: Array | np.ndarray,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    sinks: Array | np.ndarray | None = None,
    k_scale: jax.typing.ArrayLike | None = None,
    v_scale: jax.typing.ArrayLike | None = None,
    return_lse: Literal[True],
    implementation: str = "auto",
) -> tuple[Array, Array]: ...


def attention(
    q: Array | np.ndarray,
    k: Array | np.ndarray,
    v: Array | np.ndarray,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    sinks: Array | np.ndarray | None = None,
    k_scale: jax.typing.ArrayLike | None = None,
    v_scale: jax.typing.ArrayLike | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Float[Array, "T N H"] | tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of a ragged batch over keys in a paged cache, or packed beside the queries.

    Differentiable in reverse mode with respect to `q`, `k`, `v` and `sinks`; of metadata that were prepared
    for `consumers`, the Triton kernels' gradient reads those of "triton_gradient", and Mosaic's those of
    "mosaic_gradient". Where Mosaic has no gradient for a layer or a GPU, Triton's kernels go backward (see
    `gradient_of`). `reference` is also differentiable forward, and twice.

    Args:
        q: `[T, N, H]` Queries of all sequences, packed along one axis.
        k: Keys: for a batch nested with page tables, the pages `[pages, page_size, K, H]` of the
            cache, this step's keys written already; for one without, `[T, K, H]`, one per token. In the
            dtype of `q`, or quantised: int8, float8_e4m3fn or float8_e5m2.
        v: Values, like the keys.
        metadata: From `prepare_metadata`, given this layer's spec.
        spec: The layer.
        sinks: `[N]` Logits of the sinks, exactly where the spec has them.
        k_scale: Of quantised keys, and of no others, what a stored 1 counts: one number, or `[K]`, one
            per key head; `cache.k_scale` of a cache that `write_cache` filled.
        v_scale: The same for values.
        return_lse: Whether to return the logarithm of the softmax's denominator too.
        implementation: "auto" (see `choose_implementation`), or one of:
            "reference", the plain definition in float32;
            "xla", pure XLA over the tile schedule;
            "triton", the Pallas kernel, which runs in the interpreter where there is no NVIDIA GPU;
            "mosaic", the Pallas kernels for Hopper and Blackwell GPUs, and for them alone; "auto" chooses
            it by a table of the user's own only.

    Returns:
        One output per query token, in the dtype of `q`; zero for padding. With `return_lse`, also
        `[T, N]` the natural logarithm of the softmax's denominator, sinks included, in float32 (float64
        for float64); -inf for padding. With it, attention over parts of the keys can be merged.

    Raises:
        ValueError: If shapes, dtypes, spec and metadata disagree, the metadata was not prepared for
            this layer, or the implementation is unknown.
        NotImplementedError: If the implementation cannot serve this head size or dtype.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    sinks = None if sinks is None else jnp.asarray(sinks)
    _validate(q, k, v, metadata, spec)
    _validate_sinks(sinks, spec)
    scales = check_scales(k.dtype, spec.num_kv_heads, k_scale, v_scale)
    device = describe_device()
    if implementation == "auto":
        layer = Layer(phase_of(metadata), q.dtype.name, k.dtype.name, spec.head_dim, metadata.page_size)
        obstacle_here = functools.partial(
            obstacle_to, spec=spec, layer=layer, device=device, kv_elements=k.size
        )
        implementation = choose(layer, device, tables(), obstacle_here).implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation={implementation!r}; use 'auto', {_names()}")
    if implementation == "triton" and (obstacle := _triton_obstacle(spec, q.dtype, k.dtype, device, k.size)):
        raise NotImplementedError(f"implementation='triton' cannot serve this layer: {obstacle}; use 'xla'")
    attend = IMPLEMENTATIONS[implementation]
    if implementation == "mosaic":  # without a GPU it can still be exported
        capability = device.compute_capability
        if found := mosaic.obstacle(spec, q.dtype, k.dtype, metadata.page_size, capability=capability):
            raise NotImplementedError(
                f"implementation='mosaic' cannot serve this layer: {found}; use 'triton'"
            )
        attend = functools.partial(attend, capability=capability)
    if implementation in GRADIENTS:
        backward = GRADIENTS[gradient_of(implementation, spec, q.dtype, k.dtype, metadata.page_size, device)]
        out, lse = gradients.attend(attend, backward, spec, q, k, v, metadata, sinks, scales)
    else:  # JAX differentiates it
        out, lse = attend(q, k, v, metadata, spec, sinks=sinks, kv_scales=scales)
    return (out, lse) if return_lse else out


def choose_implementation(
    spec: AttentionSpec,
    *,
    dtype: jax.typing.DTypeLike = "float32",
    kv_dtype: jax.typing.DTypeLike | None = None,
    page_size: int | None = None,
    phase: str = "prefill",
    platform: str | None = None,
    table: Table | str | os.PathLike[str] | None = None,
) -> Choice:
    """Which implementation "auto" stands for, and why.

    The first measured fact that matches the layer and the device is followed, if what it names can serve
    the layer: facts of the user's table first, then those that come with jaxattn. Without one the default
    rule holds: on an NVIDIA GPU of compute capability 8.0 or later the Triton kernel, if it serves the
    layer's head size and dtype; everywhere else, XLA. Nothing is timed here; `jaxattn tune` writes a table.

    Args:
        spec: The layer.
        dtype: Element type of the queries.
        kv_dtype: That of keys and values, where they are quantised; that of the queries where None.
        page_size: Tokens per page; None for keys packed beside the queries.
        phase: "decode", of a batch whose bucket promises one query token per sequence, or "prefill", of any
            other: see `phase_of`.
        platform: "cpu", "gpu" or "tpu"; that of the default device where None.
        table: The user's table or its file; where None, the file that the environment variable
            `JAXATTN_CHOICES` names, if it is set.

    Raises:
        ValueError: If the phase is unknown, or a table cannot be read.
    """
    if phase not in PHASES:
        raise ValueError(f"unknown phase={phase!r}; use {' or '.join(map(repr, PHASES))}")
    q_name = jnp.dtype(dtype).name
    kv_name = q_name if kv_dtype is None else jnp.dtype(kv_dtype).name
    layer = Layer(phase, q_name, kv_name, spec.head_dim, page_size)
    device = describe_device(platform)
    obstacle_there = functools.partial(obstacle_to, spec=spec, layer=layer, device=device)
    return choose(layer, device, tables(table), obstacle_there)


def phase_of(metadata: AttentionMetadata) -> str:
    """A batch's phase: "decode" where its bucket promises one query token per sequence, else "prefill"."""
    return "decode" if metadata.bucket.max_q_len == 1 else "prefill"


def obstacle_to(
    implementation: str,
    spec: AttentionSpec,
    layer: Layer,
    device: Device,
    *,
    kv_elements: int = 0,
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
        found = _triton_obstacle(spec, layer.dtype, layer.kv_dtype, device, kv_elements)
        return found or _device_obstacle(device)
    if implementation == "mosaic":
        capability = device.compute_capability or f"that of a {device.platform}"
        return mosaic.obstacle(spec, layer.dtype, layer.kv_dtype, layer.page_size, capability=capability)
    return None


def gradient_of(
    implementation: str,
    spec: AttentionSpec,
    dtype: jax.typing.DTypeLike,
    kv_dtype: jax.typing.DTypeLike,
    page_size: int | None,
    device: Device,
) -> str:
    """Which of `GRADIENTS` goes backward through an implementation: its own, if that can serve the layer.

    Triton's stands in for Mosaic's, which is for Hopper, and for head dims up to 128.

    Args:
        implementation: Its name.
        spec: The layer.
        dtype: Element type of the queries.
        kv_dtype: That of keys and values.
        page_size: Tokens per page; None for packed keys.
        device: The device.
    """
    capability = device.compute_capability
    if implementation == "mosaic" and mosaic_gradient.obstacle(
        spec, dtype, kv_dtype, page_size, capability=capability
    ):
        return "triton"
    return implementation


def _names() -> str:
    *most, last = (repr(name) for name in IMPLEMENTATIONS)
    return f"{', '.join(most)} or {last}"


def _triton_obstacle(
    spec: AttentionSpec,
    dtype: jax.typing.DTypeLike,
    kv_dtype: jax.typing.DTypeLike,
    device: Device,
    kv_elements: int,
) -> str | None:
    name = jnp.dtype(dtype).name
    if name not in _TRITON_DTYPES:
        return f"dtype {name} is not one of {', '.join(_TRITON_DTYPES)}"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"head_dim={spec.head_dim} exceeds {MAX_HEAD_DIM}"
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


def _device_obstacle(device: Device) -> str | None:
    """Why a GPU cannot run the Triton kernel; None where it can, and where none is known."""
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


def _validate_sinks(sinks: Array | None, spec: AttentionSpec) -> None:
    if (sinks is None) == spec.sinks:
        given = "was not given" if sinks is None else "was given"
        raise ValueError(
            f"sinks {given}, and spec.sinks={spec.sinks}; give them exactly where the spec has them"
        )
    if sinks is not None and sinks.shape != (spec.num_q_heads,):
        raise ValueError(f"sinks.shape={sinks.shape}; this spec needs {(spec.num_q_heads,)}")
    if sinks is not None and not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(f"sinks have dtype {sinks.dtype}; expected floating-point numbers")


def _validate(q: Array, k: Array, v: Array, metadata: AttentionMetadata, spec: AttentionSpec) -> None:
    """Check everything that is known at trace time."""
    T = metadata.bucket.tokens
    if q.shape != (T, spec.num_q_heads, spec.head_dim):
        raise ValueError(
            f"q.shape={q.shape}; this batch and spec need {(T, spec.num_q_heads, spec.head_dim)}"
        )
    if k.shape != v.shape:
        raise ValueError(f"k.shape={k.shape} and v.shape={v.shape} must be equal")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q has dtype {q.dtype}; expected floating-point numbers")
    if k.dtype != v.dtype or (k.dtype != q.dtype and not is_quantized(k.dtype)):
        raise ValueError(
            f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them "
            f"(k and v may be quantised: {', '.join(QUANTIZED_DTYPES)})"
        )
    heads = (spec.num_kv_heads, spec.head_dim)
    if metadata.page_size is None:
        if k.shape != (T, *heads):
            raise ValueError(
                f"k.shape={k.shape}; a batch without page tables needs packed keys {(T, *heads)}"
            )
    elif k.ndim != 4 or k.shape[1:] != (metadata.page_size, *heads):
        raise ValueError(f"k.shape={k.shape}; this batch needs pages of shape {(metadata.page_size, *heads)}")
    elif (num_slots := k.shape[0] * k.shape[1]) > INT32_MAX:
        raise ValueError(
            f"k has {num_slots} slots, more than an int32 can number ({INT32_MAX}); use fewer pages"
        )
