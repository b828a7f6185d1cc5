"""The gradient of attention by the Pallas Triton kernels: the metadata's part for them, as arrays."""

from __future__ import annotations

from jax import lax
from jaxtyping import Array, Float

from jaxattn.attention.kernel_inputs import gradient_work
from jaxattn.attention.vjp import Gradients
from jaxattn.metadata.consumers import KEY_BLOCK, triton_tiling
from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn_kernels.arrays import Attended
from jaxattn_kernels.triton import gradient as kernel


def attend_backward(
    q: Float[Array, "T N H"],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    results: Attended,
    d_results: Attended,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
) -> Gradients:
    """Gradients of queries, keys and values (see `vjp.Backward`).

    Compiled where the program is lowered for CUDA, interpreted elsewhere.

    Args:
        q: Queries, packed.
        k: Keys, packed `[T, K, H]` or in pages `[pages, page_size, K, H]`.
        v: Values, like the keys.
        results: Outputs and log-sum-exp.
        d_results: Their gradients.
        metadata: The batch's metadata, with the tiles of this implementation's gradient.
        spec: The layer.
    """

    def run(q: Array, k: Array, v: Array, *, interpret: bool) -> Gradients:
        work = gradient_work(
            q, k, v, results, d_results, metadata, spec, triton_tiling(spec), KEY_BLOCK
        )  # fmt: skip
        options = {
            "page_size": metadata.page_size,
            "scale": spec.softmax_scale,
            "logits_soft_cap": spec.logits_soft_cap,
            "interpret": interpret,
        }
        windowed = spec.window_class.span is not None
        dq, delta = kernel.queries_gradient(work.inputs, work.tile_lists, windowed=windowed, **options)
        dk, dv = kernel.keys_gradient(
            work.inputs, delta, work.key_tiles, work.num_rows, work.key_dtype, **options
        )
        return Gradients(dq, dk, dv, delta)

    return lax.platform_dependent(
        q,
        k,
        v,
        cuda=lambda *args: run(*args, interpret=False),
        default=lambda *args: run(*args, interpret=True),
    )
