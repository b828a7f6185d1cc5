"""Writing the cache is fused with what produces its numbers: rotary embedding, rounding, quantisation.

So no kernel of our own writes it, and none could write it with less traffic.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from deviceless import H200, OPTIMISED, lower_for

from jaxattn.cache.paged import PagedKVCache, write_cache
from jaxattn.metadata.rope import RopeConfig, RopeTables, rotate

pytestmark = pytest.mark.compile

NUM_PAGES, PAGE_SIZE, K, H = 1024, 16, 8, 128


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rope_quantisation_and_write_are_one_kernel_per_array(dtype):
    def abstract(*shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def step(cache, k, v, cos, sin, slot_mapping):
        k = rotate(k, RopeTables(cos=cos, sin=sin, config=RopeConfig(theta=1e4)))
        return write_cache(cache, k, v, slot_mapping)

    pages = abstract(NUM_PAGES, PAGE_SIZE, K, H, dtype=dtype)
    scale = abstract(K, dtype=jnp.float32) if dtype == "int8" else None
    cache = PagedKVCache(k_pages=pages, v_pages=pages, k_scale=scale, v_scale=scale)
    rows, table = abstract(64, K, H, dtype=jnp.bfloat16), abstract(64, H // 2, dtype=jnp.float32)
    slots = abstract(64, dtype=jnp.int32)
    lowered = lower_for(H200, step, cache, rows, rows, table, table, slots, donate_argnums=(0,))
    compiled = lowered.compile(compiler_options=OPTIMISED)
    entry = compiled.as_text().split("ENTRY", 1)[1]
    kernels = re.findall(r"= \S+ (fusion|copy|scatter|sort|custom-call)\(", entry)
    assert kernels == ["fusion", "fusion"]
    assert compiled.memory_analysis().temp_size_in_bytes == 0, "nothing is kept in between"
