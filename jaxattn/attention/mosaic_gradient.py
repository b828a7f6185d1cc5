"""The gradient of attention by the Pallas Mosaic GPU kernels: the metadata's part for them, as arrays."""

from __future__ import annotations

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxattn.attention.kernel_inputs import gradient_work
from jaxattn.attention.mosaic import HOPPER
from jaxattn.attention.vjp import Gradients
from jaxattn.metadata.consumers import MOSAIC_KEY_BLOCK, mosaic_tiling
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.arrays import Attended
from jaxattn_kernels.mosaic_gpu import hopper_gradient
from jaxattn_kernels.mosaic_gpu.hopper_gradient_keys import keys_gradient
from jaxattn_kernels.mosaic_gpu.hopper_gradient_queries import queries_gradient


def attend_backward(
    q: Float[Array, "T N H"],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    results: Attended,
    d_results: Attended,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Gradients:
    """Gradients of queries, keys and values (see `vjp.Backward`), compiled for a Hopper GPU.

    Args:
        q: Queries, packed.
        k: Keys, packed `[T, K, H]` or in pages `[pages, page_size, K, H]`.
        v: Values, like the keys.
        results: Outputs and log-sum-exp.
        d_results: Their gradients.
        metadata: The batch's metadata, with the tiles of this implementation's gradient.
        spec: The layer.
        interpret: How to simulate the GPU on a CPU; None to compile (see `mosaic.attend`).
    """
    work = gradient_work(
        q, k, v, results, d_results, metadata, spec, mosaic_tiling(spec), MOSAIC_KEY_BLOCK
    )  # fmt: skip
    options = {
        "page_size": metadata.page_size,
        "scale": spec.softmax_scale,
        "logits_soft_cap": spec.logits_soft_cap,
        "windowed": spec.window_class.span is not None,
        "interpret": interpret,
    }
    dq, delta = queries_gradient(work.inputs, work.tile_lists, **options)
    dk, dv = keys_gradient(
        work.inputs, delta, work.key_tiles, work.num_rows, work.key_dtype, **options
    )  # fmt: skip
    return Gradients(dq, dk, dv, delta)


def unsupported_reason(
    spec: AttentionSpec,
    dtype: jax.typing.DTypeLike,
    kv_dtype: jax.typing.DTypeLike,
    page_size: int | None,
    *,
    capability: str | None = None,
) -> str | None:
    """Why the kernels cannot serve a layer over such pages on a GPU; None where they can."""
    if (capability or HOPPER) != HOPPER:
        return f"it needs an NVIDIA GPU of compute capability {HOPPER}, not {capability}"
    return hopper_gradient.unsupported_reason(
        dtype=dtype,
        kv_dtype=kv_dtype,
        head_dim=spec.head_dim,
        group_size=spec.group_size,
        page_size=page_size,
    )
