"""Attention by the Pallas Triton kernel: the metadata's part for it, as arrays."""

from __future__ import annotations

from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxattn.attention.kernel_inputs import kernel_inputs
from jaxattn.metadata.consumers import triton_tiling
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.arrays import KVScales
from jaxattn_kernels.triton import forward as kernel


def attend(
    q: Float[Array, "T N H"],
    k: Shaped[Array, "..."],
    v: Shaped[Array, "..."],
    metadata: AttentionMetadata,
    spec: AttentionSpec,
    *,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: KVScales | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attend with the kernel: compiled where the program is lowered for CUDA, interpreted elsewhere.

    Args:
        q: Queries, packed.
        k: Keys, packed `[T, K, H]` or in pages `[pages, page_size, K, H]`.
        v: Values, like the keys.
        metadata: The batch's metadata, with the schedule of this implementation.
        spec: The layer.
        sinks: Logits of the sinks, if the layer has them.
        kv_scales: What quantised keys and values stand for, if they are.

    Returns:
        Outputs in the dtype of `q`, and the natural logarithm of the softmax's denominator; 0 and
        -inf for padding.
    """
    inputs = kernel_inputs(metadata, spec, triton_tiling(spec))
    page_size = k.shape[1] if k.ndim == 4 else None

    def run(q: Array, k: Array, v: Array, *, interpret: bool) -> tuple[Array, Array]:
        return kernel.ragged_attention(
            q,
            k.reshape(-1, *k.shape[-2:]),
            v.reshape(-1, *v.shape[-2:]),
            *inputs,
            sinks=sinks,
            kv_scales=kv_scales,
            page_size=page_size,
            scale=spec.softmax_scale,
            logits_soft_cap=spec.logits_soft_cap,
            windowed=spec.window_class.span is not None,
            interpret=interpret,
        )

    # Decided where the program is lowered, not where it is traced: a CPU can export for CUDA.
    return lax.platform_dependent(
        q,
        k,
        v,
        cuda=lambda *args: run(*args, interpret=False),
        default=lambda *args: run(*args, interpret=True),
    )
