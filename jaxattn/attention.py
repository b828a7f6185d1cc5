"""`attention()`: check the shapes, choose an implementation, call it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn import mosaic, reference, triton, xla
from jaxattn.batch import INT32_MAX
from jaxattn.metadata import AttentionMetadata
from jaxattn.spec import AttentionSpec
from jaxattn_kernels.triton import MAX_HEAD_DIM

IMPLEMENTATIONS = {
    "reference": reference.attend,
    "xla": xla.attend,
    "triton": triton.attend,
    "mosaic": mosaic.attend,
}

_TRITON_DTYPES = ("float32", "bfloat16", "float16")
_TRITON_MIN_CAPABILITY = 8.0


class Choice(NamedTuple):
    """An implementation and why it was chosen."""

    implementation: str
    reason: str


@overload
def attention(
    q: Array | np.ndarray,
    k: Array | np.ndarray,
    v: Array | np.ndarray,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    sinks: Array | np.ndarray | None = None,
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
    return_lse: bool = False,
    implementation: str = "auto",
) -> Float[Array, "T N H"] | tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of a ragged batch over keys in a paged cache, or packed beside the queries.

    Args:
        q: `[T, N, H]` Queries of all sequences, packed along one axis.
        k: Keys: for a batch nested with page tables, the pages `[pages, page_size, K, H]` of the
            cache, this step's keys written already; for one without, `[T, K, H]`, one per token.
        v: Values, like the keys.
        metadata: From `prepare_metadata`, given this layer's spec.
        spec: The layer.
        sinks: `[N]` Logits of the sinks, exactly where the spec has them.
        return_lse: Whether to return the logarithm of the softmax's denominator too.
        implementation: "auto" (see `choose_implementation`), or one of:
            "reference", the plain definition in float32;
            "xla", pure XLA over the tile schedule;
            "triton", the Pallas kernel, which runs in the interpreter where there is no NVIDIA GPU;
            "mosaic", the Pallas kernel for Hopper GPUs, and for them alone; "auto" does not choose it.

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
    if implementation == "auto":
        implementation = choose_implementation(spec, dtype=q.dtype).implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation={implementation!r}; use 'auto', {_names()}")
    if implementation == "triton" and (obstacle := _triton_obstacle(spec, q.dtype)):
        raise NotImplementedError(f"implementation='triton' cannot serve this layer: {obstacle}; use 'xla'")
    if implementation == "mosaic" and (obstacle := mosaic.obstacle(spec, q.dtype, metadata.page_size)):
        raise NotImplementedError(
            f"implementation='mosaic' cannot serve this layer: {obstacle}; use 'triton'"
        )
    out, lse = IMPLEMENTATIONS[implementation](q, k, v, metadata, spec, sinks=sinks)
    return (out, lse) if return_lse else out


def choose_implementation(
    spec: AttentionSpec, *, dtype: jax.typing.DTypeLike = "float32", platform: str | None = None
) -> Choice:
    """Which implementation "auto" stands for, and why.

    The rule: on an NVIDIA GPU of compute capability 8.0 or later the Triton kernel, if it serves
    the layer's head size and dtype; everywhere else, XLA.

    Args:
        spec: The layer.
        dtype: Element type of the queries.
        platform: "cpu", "gpu" or "tpu"; that of the default device where None.
    """
    platform = _default_device().platform if platform is None else platform
    if platform not in ("gpu", "cuda"):
        return Choice("xla", f"the platform is {platform}, and the Triton kernel needs an NVIDIA GPU")
    if obstacle := _triton_obstacle(spec, dtype) or _device_obstacle():
        return Choice("xla", f"the Triton kernel cannot serve this layer: {obstacle}")
    return Choice("triton", "an NVIDIA GPU that the Triton kernel serves")


def _names() -> str:
    *most, last = (repr(name) for name in IMPLEMENTATIONS)
    return f"{', '.join(most)} or {last}"


def _triton_obstacle(spec: AttentionSpec, dtype: jax.typing.DTypeLike) -> str | None:
    name = jax.numpy.dtype(dtype).name
    if name not in _TRITON_DTYPES:
        return f"dtype {name} is not one of {', '.join(_TRITON_DTYPES)}"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"head_dim={spec.head_dim} exceeds {MAX_HEAD_DIM}"
    return None


def _device_obstacle() -> str | None:
    """Why the present GPU cannot run the kernel; None where it can or where none is present."""
    capability = getattr(_default_device(), "compute_capability", None)
    if capability is None:
        return None
    try:
        too_old = float(capability) < _TRITON_MIN_CAPABILITY
    except ValueError:  # another maker's GPU
        return f"the GPU is a {capability}, not one of NVIDIA's"
    return f"its compute capability {capability} is below {_TRITON_MIN_CAPABILITY}" if too_old else None


def _default_device() -> Any:
    """The device that programs run on unless they are told otherwise."""
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.devices()[0]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen


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
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them")
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
