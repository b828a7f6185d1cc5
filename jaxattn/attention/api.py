"""`attention()`: check the shapes, choose an implementation, call it."""

from __future__ import annotations

import functools
import os
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.attention.choice import Choice, choose, describe_device
from jaxattn.attention.choice_table import PHASES, ChoiceTable, Layer, tables
from jaxattn.attention.dispatch import attend_by_platform, names_by_platform
from jaxattn.attention.support import unsupported_reason
from jaxattn.batch.ragged import INT32_MAX
from jaxattn.cache.quantization import QUANTIZED_DTYPES, check_scales, is_quantized
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata


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
    implementation: str | ChoiceTable = "auto",
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
    implementation: str | ChoiceTable = "auto",
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
    implementation: str | ChoiceTable = "auto",
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
        implementation: One of:
            "auto", for each platform that a program is lowered for what `choose_implementation` names there;
            a table of choices (`read_table`), the same, its facts before those that come with jaxattn;
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
    names = names_by_platform(implementation, q, k, metadata, spec)
    out, lse = attend_by_platform(names, spec, q, k, v, metadata, sinks, scales)
    return (out, lse) if return_lse else out


def choose_implementation(
    spec: AttentionSpec,
    *,
    dtype: jax.typing.DTypeLike = "float32",
    kv_dtype: jax.typing.DTypeLike | None = None,
    page_size: int | None = None,
    phase: str = "prefill",
    platform: str | None = None,
    table: ChoiceTable | str | os.PathLike[str] | None = None,
) -> Choice:
    """Which implementation "auto" stands for on a platform, and why.

    The first measured fact that matches the layer and the device is followed, if what it names can serve
    the layer: facts of the user's table first, then those that come with jaxattn. Without one the default
    rule holds: on an NVIDIA GPU of compute capability 8.0 or later the Triton kernel, if it serves the
    layer's head size and dtype; everywhere else, XLA. Nothing is timed here; `jaxattn tune` writes a table.

    `attention` asks this for every platform, and a program takes the answer for the one that it is lowered
    for. A platform does not tell which GPU it will be: that is taken to be the first one of this process, and
    where it has none, as when a CPU exports for CUDA, an NVIDIA GPU that the Triton kernel serves.

    Args:
        spec: The layer.
        dtype: Element type of the queries.
        kv_dtype: That of keys and values, where they are quantised; that of the queries where None.
        page_size: Tokens per page; None for keys packed beside the queries.
        phase: "decode", of a batch whose bucket promises one query token per sequence, or "prefill", of any
            other: see `phase_of`.
        platform: "cpu", "gpu", "cuda", "rocm" or "tpu"; that of the default device where None.
        table: The user's table or its file, if there is one.

    Raises:
        ValueError: If the phase is unknown, or a table cannot be read.
    """
    if phase not in PHASES:
        raise ValueError(f"unknown phase={phase!r}; use {' or '.join(map(repr, PHASES))}")
    q_name = jnp.dtype(dtype).name
    kv_name = q_name if kv_dtype is None else jnp.dtype(kv_dtype).name
    layer = Layer(phase, q_name, kv_name, spec.head_dim, page_size)
    device = describe_device(platform)
    reason = functools.partial(unsupported_reason, spec=spec, layer=layer, device=device)
    return choose(layer, device, tables(table), reason)


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
