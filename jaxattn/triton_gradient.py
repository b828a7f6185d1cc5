"""The gradient of attention by the Pallas Triton kernels: the metadata's part for them, as arrays."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxattn.consumers import KEY_BLOCK, triton_tiling
from jaxattn.gradients import Gradients
from jaxattn.kernel_inputs import kernel_inputs
from jaxattn.metadata import AttentionMetadata
from jaxattn.spec import AttentionSpec
from jaxattn_kernels import triton_gradient as kernel
from jaxattn_kernels.arrays import Attended, KeyTileArrays


def attend_backward(
    q: Float[Array, "T N H"],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    results: Attended,
    d_results: Attended,
    metadata: AttentionMetadata,
    spec: AttentionSpec,
) -> Gradients:
    """Gradients of queries, keys and values (see `gradients.Backward`).

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
    visible, lookup, tile_lists = kernel_inputs(metadata, spec, triton_tiling(spec))
    found = metadata.visible_keys(spec.window_class).key_tiles_of(KEY_BLOCK)
    tiles = KeyTileArrays(
        found.seq, found.kv_start, found.kv_end, found.q_start, found.q_end, found.num_live[None]
    )
    page_size = metadata.page_size
    num_rows = k.shape[0] if page_size is None else metadata.page_list.shape[0] * page_size
    # Sums over sequences that share a page are still to come.
    key_dtype = k.dtype if page_size is None else jnp.float32

    def run(q: Array, k: Array, v: Array, *, interpret: bool) -> Gradients:
        flat_k, flat_v = (x.reshape(-1, *x.shape[-2:]) for x in (k, v))
        inputs = kernel.Inputs(visible, lookup, q, flat_k, flat_v, results, d_results)
        options = {
            "page_size": page_size,
            "scale": spec.softmax_scale,
            "logits_soft_cap": spec.logits_soft_cap,
            "interpret": interpret,
        }
        windowed = spec.window_class.span is not None
        dq, delta = kernel.queries_gradient(inputs, tile_lists, windowed=windowed, **options)
        dk, dv = kernel.keys_gradient(inputs, delta, tiles, KEY_BLOCK, num_rows, key_dtype, **options)
        return Gradients(dq, dk, dv, delta)

    return lax.platform_dependent(
        q,
        k,
        v,
        cuda=lambda *args: run(*args, interpret=False),
        default=lambda *args: run(*args, interpret=True),
    )
