"""Indices are int32; numbers of elements are not. What is larger works, or is refused when built.

Nothing here allocates: programs are traced and lowered from shapes. A cache of 2^18 pages of 16
tokens, 8 heads and 128 dims has 2^32 elements, 8 GiB in bfloat16: some GPUs hold several.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect

from jaxattn import (
    AttentionSpec,
    Bucket,
    attention,
    init_cache,
    nest_sequences,
    prepare_metadata,
    write_cache,
)
from jaxattn.batch.ragged import abstract_batch

SPEC = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
BUCKET = Bucket(tokens=8, seqs=8, pages=64, max_q_len=1)
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
PAGE_SIZE = 16
SMALL, LARGE, TOO_LARGE = 64, 1 << 18, 1 << 27


def abstract_cache(num_pages: int) -> Any:
    return jax.eval_shape(
        lambda: init_cache(
            num_pages=num_pages, page_size=PAGE_SIZE, num_kv_heads=8, head_dim=128, dtype="bfloat16"
        )
    )


def attend(q, cache, batch, implementation):
    metadata = prepare_metadata(batch, SPEC)
    cache = write_cache(cache, q[:, :8], q[:, :8], metadata.slot_mapping)
    return attention(q, cache.k_pages, cache.v_pages, metadata, SPEC, implementation=implementation)


def arguments(num_pages: int) -> tuple:
    q = jax.ShapeDtypeStruct((BUCKET.tokens, 32, 128), jnp.bfloat16)
    return q, abstract_cache(num_pages), abstract_batch(BUCKET, PAGE_SIZE)


def kernel_code(num_pages: int) -> str:
    """The kernel's program as Triton sees it, from the lowered module, where it stands as bytes."""
    exporting = export.export(
        jax.jit(lambda q, cache, batch: attend(q, cache, batch, "triton")),
        platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(plgpu.CUSTOM_CALL_TARGET_NAME)],
    )
    with (
        use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)),
        pytest.warns(DeprecationWarning, match="Pallas Triton backend is deprecated"),
    ):
        module = exporting(*arguments(num_pages)).mlir_module()
    quoted = re.search(r'ir = "((?:[^"\\]|\\.)*)"', module)
    assert quoted is not None
    code = re.sub(
        rb'\\([0-9A-F]{2}|\\|")',
        lambda found: bytes.fromhex(found[1].decode()) if len(found[1]) == 2 else found[1],
        quoted[1].encode("latin1"),
    )
    with ir.Context() as context:
        triton_dialect.register_dialect(context)
        return str(ir.Module.parse(code))


@pytest.mark.smoke
def test_the_kernel_addresses_large_caches_in_64_bits():
    assert "xi64>" not in kernel_code(SMALL)
    pointers = [line for line in kernel_code(LARGE).splitlines() if "tt.addptr" in line]
    assert sum("xi64>" in line for line in pointers) >= 4  # keys and values, masked and not


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_large_caches_lower_everywhere(implementation):
    lowered = jax.jit(attend, static_argnums=3).lower(*arguments(LARGE), implementation)
    (out,) = jax.tree.leaves(lowered.out_info)
    assert out.shape == (8, 32, 128)


@pytest.mark.parametrize(
    ("num_pages", "served"), [(1 << 17, True), ((1 << 17) + 1, False), ((1 << 18) + 1, True)]
)
def test_one_byte_caches_whose_offsets_would_overflow_are_refused(num_pages, served):
    """Up to 2^32 bytes Pallas counts in 32 bits, signed: right for numbers of two bytes and more."""
    pages = jax.ShapeDtypeStruct((num_pages, PAGE_SIZE, 8, 128), jnp.int8)
    metadata = jax.eval_shape(lambda b: prepare_metadata(b, SPEC), abstract_batch(BUCKET, PAGE_SIZE))

    def attend(q, k, m):
        return attention(q, k, k, m, SPEC, k_scale=1.0, v_scale=1.0, implementation="triton")

    if served:
        jax.eval_shape(attend, arguments(SMALL)[0], pages, metadata)
    else:
        with pytest.raises(NotImplementedError, match="numbers of one byte would overflow; use fewer pages"):
            jax.eval_shape(attend, arguments(SMALL)[0], pages, metadata)


def test_more_slots_than_int32_are_refused_when_the_cache_is_built():
    with pytest.raises(ValueError, match=f"num_pages={TOO_LARGE} of page_size=16 tokens make {2**31} slots"):
        abstract_cache(TOO_LARGE)
    assert abstract_cache(TOO_LARGE - 1).k_pages.shape[0] == TOO_LARGE - 1


def test_pages_beyond_int32_slots_are_refused_by_attention():
    pages = jax.ShapeDtypeStruct((TOO_LARGE, PAGE_SIZE, 8, 128), jnp.bfloat16)
    metadata = jax.eval_shape(lambda b: prepare_metadata(b, SPEC), abstract_batch(BUCKET, PAGE_SIZE))
    with pytest.raises(ValueError, match=f"k has {2**31} slots, more than an int32 can number"):
        jax.eval_shape(lambda q, k, m: attention(q, k, k, m, SPEC), arguments(SMALL)[0], pages, metadata)


def test_a_page_whose_slots_exceed_int32_is_refused_when_nested():
    tables = {"page_tables": [[TOO_LARGE - 1]], "page_size": PAGE_SIZE}
    with pytest.raises(ValueError, match=f"names page {TOO_LARGE - 1}, out of range"):
        nest_sequences([[1]], **tables)
    nest_sequences([[1]], page_tables=[[TOO_LARGE - 2]], page_size=PAGE_SIZE)


def test_the_last_slot_is_not_the_padding_one():
    batch = nest_sequences(
        [[1] * 16], page_tables=[[TOO_LARGE - 2]], page_size=PAGE_SIZE, bucket=Bucket(20, 1, 1)
    )
    slots = prepare_metadata(batch).slot_mapping
    assert int(slots[15]) == (TOO_LARGE - 2) * PAGE_SIZE + 15 < int(slots[16])
