"""The kernel lowers for CUDA from shapes alone, on a machine without a GPU.

Interpret mode accepts programs that the Triton backend refuses; lowering does not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxattn.attention.api import attention
from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import abstract_batch
from jaxattn.cache.quantization import QUANTIZED_DTYPES
from jaxattn.metadata.prepare import prepare_metadata
from jaxattn.metadata.spec import AttentionSpec
from jaxattn_kernels.arrays import KeyLookup, Tiles, VisibleRange
from jaxattn_kernels.triton.forward import KernelConfig, ragged_attention

pytestmark = pytest.mark.smoke

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
PREFILL = Bucket(tokens=256, seqs=8, pages=64)
DECODE = Bucket(tokens=8, seqs=8, pages=64, max_q_len=1)


def export_for_cuda(function, *args) -> str:
    """The StableHLO of a function, lowered for an H100. The backend's deprecation is expected."""
    exporting = export.export(
        jax.jit(function),
        platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(plgpu.CUSTOM_CALL_TARGET_NAME)],
    )
    with (
        use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)),
        pytest.warns(DeprecationWarning, match="Pallas Triton backend is deprecated"),
    ):
        return exporting(*args).mlir_module()


def attention_program(
    spec: AttentionSpec, bucket: Bucket, page_size: int | None, dtype: str, kv_dtype: str | None = None
) -> tuple:
    """`attention` by the kernel as a function, and the shapes of its arguments."""
    q = jax.ShapeDtypeStruct((bucket.tokens, spec.num_q_heads, spec.head_dim), dtype)
    place = (bucket.tokens,) if page_size is None else (bucket.pages, page_size)
    k = jax.ShapeDtypeStruct((*place, spec.num_kv_heads, spec.head_dim), kv_dtype or dtype)
    scale = 0.01 if kv_dtype else None
    sinks = jnp.zeros(spec.num_q_heads) if spec.sinks else None

    def attend(q, k, v, batch):
        metadata = prepare_metadata(batch, spec)
        return attention(
            q, k, v, metadata, spec, sinks=sinks, k_scale=scale, v_scale=scale, implementation="triton"
        )

    return attend, q, k, k, abstract_batch(bucket, page_size)


@pytest.mark.parametrize("bucket", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("spec", "page_size", "dtype", "is_split"),
    [
        (AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128), 16, "bfloat16", True),
        (AttentionSpec(num_q_heads=6, num_kv_heads=2, head_dim=80, sliding_window=100), 12, "float16", False),
        (
            AttentionSpec(num_q_heads=32, num_kv_heads=1, head_dim=256, logits_soft_cap=30.0, sinks=True),
            128, "float32", True,
        ),
        (AttentionSpec(num_q_heads=4, num_kv_heads=4, head_dim=16, causal=False), None, "bfloat16", False),
    ],
    ids=["gqa", "window", "mqa-cap-sinks", "packed"],
)  # fmt: skip
def test_exports_a_kernel_for_each_tile_list_and_each_merge(spec, page_size, dtype, is_split, bucket):
    module = export_for_cuda(*attention_program(spec, bucket, page_size, dtype))
    lists = 1 if bucket.max_q_len == 1 else 2
    assert module.count(f"@{plgpu.CUSTOM_CALL_TARGET_NAME}(") == lists + is_split


@pytest.mark.parametrize("page_size", [16, None])
def test_exports_the_kernels_of_the_gradient(page_size):
    """Beside those of the forward pass: for queries, per list of tiles, and for keys and values."""
    spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128, logits_soft_cap=30.0)
    attend, *arguments = attention_program(spec, PREFILL, page_size, "bfloat16")

    def go_back(q, k, v, batch):
        return jax.grad(lambda *x: attend(*x, batch).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    module = export_for_cuda(go_back, *arguments)
    forward = 3 if page_size else 2  # 256 packed keys make one unit
    assert module.count(f"@{plgpu.CUSTOM_CALL_TARGET_NAME}(") == forward + 3


@pytest.mark.parametrize("kv_dtype", QUANTIZED_DTYPES)
def test_exports_kernels_for_quantised_caches(kv_dtype):
    spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
    module = export_for_cuda(*attention_program(spec, DECODE, 16, "bfloat16", kv_dtype))
    assert module.count(f"@{plgpu.CUSTOM_CALL_TARGET_NAME}(") == 2


@pytest.mark.parametrize(
    ("head_dim", "dtype", "obstacle"),
    [(264, "bfloat16", "head_dim=264"), (64, "float8_e4m3b11fnuz", "dtype float8_e4m3b11fnuz")],
)
def test_what_the_kernel_cannot_serve_is_refused(head_dim, dtype, obstacle):
    spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=head_dim)
    with pytest.raises(NotImplementedError, match=obstacle):
        jax.eval_shape(*attention_program(spec, DECODE, 16, dtype))


def test_a_block_that_is_no_power_of_two_does_not_lower():
    def ints(*shape: int) -> Any:  # stands for an array
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def attend(q, k, per_token, start, tiles):
        return ragged_attention(
            q, k, k, VisibleRange(per_token, per_token), KeyLookup(start, None), (tiles,),
            page_size=None, scale=1.0, logits_soft_cap=None, windowed=False, interpret=False,
            config=KernelConfig(block_k=48, num_warps=4, num_stages=2),
        )  # fmt: skip

    q = jax.ShapeDtypeStruct((8, 8, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((100, 2, 64), jnp.bfloat16)
    tiles = Tiles(
        seq=ints(4), q_start=ints(4), q_len=ints(4), kv_start=ints(4), kv_end=ints(4), num_attending=ints(),
        num_live=ints(), order=None, split=None, block_q=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="power of 2"):
        export_for_cuda(attend, q, k, ints(8), ints(3), tiles)
