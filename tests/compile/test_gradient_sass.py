"""Every shipped kernel of the gradient compiles to machine code that keeps its state in registers.

As `test_sass.py` has it for the forward pass, whose measure and cases these are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from abstract_lists import abstract_key_tiles, abstract_tiles
from deviceless import H200, OPTIMISED, TARGETS, Kernel, compile_for, lower_for
from resources import check
from test_sass import MAIN, PRODUCTS, Case, resources_by_key, stays_in_registers

from jaxattn.attention.api import attention
from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import abstract_batch
from jaxattn.metadata.consumers import KEY_BLOCK, triton_tiling
from jaxattn.metadata.prepare import prepare_metadata
from jaxattn.metadata.spec import AttentionSpec
from jaxattn_kernels.arrays import (
    Attended,
    GradientInputs,
    KeyLookup,
    VisibleRange,
)
from jaxattn_kernels.triton.gradient import keys_gradient, queries_gradient

pytestmark = pytest.mark.compile


def every_pair() -> list[Case]:
    """25 cases in which every pair of values of any two factors occurs (see `test_sass.every_pair`)."""

    def pick(values: tuple, number: int):
        return values[number % 5 % len(values)]

    return [
        Case(
            group_size=pick((1, 3, 4, 8, 32), i),
            head_dim=pick((16, 64, 80, 128, 256), j),
            page_size=pick((None, 1, 12, 16, 128), i + j),
            target=pick(TARGETS, i + 2 * j),
            dtype=pick(("bfloat16", "float16", "float32"), i + 3 * j),
            windowed=pick((True, False, True, False), i + 4 * j),
            capped=pick((False, True, True, False), i + 4 * j),
        )
        for i in range(5)
        for j in range(5)
    ]


def compile_case(case: Case) -> list[Kernel]:
    """The kernels of a case: two for queries, of short and of long tiles, and one for keys and values."""
    return [k for k in compile_for(case.target, *program_of(case)) if "_gradient" in k.name]


def program_of(case: Case) -> tuple[Any, ...]:
    """A function that computes the gradients of a case, and its arguments."""

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens, rows, pages, K, tiles = 1024, 16, 512, 4, 640
    N, H = K * case.group_size, case.head_dim
    spec = AttentionSpec(num_q_heads=N, num_kv_heads=K, head_dim=H)
    tiling = triton_tiling(spec)
    options = {
        "page_size": case.page_size,
        "scale": spec.softmax_scale,
        "logits_soft_cap": 30.0 if case.capped else None,
        "interpret": False,
    }

    def go_back(visible, start, page_list, q, k, results, lists, keys):
        lookup = KeyLookup(start, page_list if case.page_size else None)
        inputs = GradientInputs(visible, lookup, q, k, k, results, results)
        dq, delta = queries_gradient(inputs, lists, windowed=case.windowed, **options)
        dtype = q.dtype if case.page_size is None else jnp.float32
        return dq, keys_gradient(inputs, delta, keys, k.shape[0], dtype, **options)

    q = array(tokens, N, H, dtype=case.dtype)
    k = array(pages * (case.page_size or 16), K, H, dtype=case.dtype)
    visible = VisibleRange(array(tokens), array(tokens))
    results = Attended(q, array(tokens, N, dtype=jnp.float32))
    # More tiles than a launch has programs: each loops over its share, and needs registers for that too.
    lists = abstract_tiles(tiles, tiling.short_q), abstract_tiles(tiles, tiling.long_q, has_order=True)
    keys = abstract_key_tiles(tiles, KEY_BLOCK)
    return go_back, visible, array(rows + 1), array(pages), q, k, results, lists, keys


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", every_pair(), ids=str)
def test_kernels_stay_in_registers(case):
    kernels = compile_case(case)
    assert len(kernels) == 3 or (len(kernels) == 2 and case.dtype == "float32")
    assert [(k.name, k.registers, k.spilled) for k in kernels if not stays_in_registers(k)] == []


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_main_configurations_use_the_hardware(case):
    kernels = compile_case(case)
    assert [(k.name, k.spilled) for k in kernels if k.spilled] == []
    found = resources_by_key(case, kernels)
    takes = {key.kernel: value.instructions for key, value in found.items()}
    assert takes.keys() >= {
        "queries_gradient_q16",
        "keys_gradient_k64" if case.head_dim < 256 else "keys_gradient_k32",
    }
    for name, instructions in takes.items():
        assert "mma.sync" in instructions or PRODUCTS[case.target] in instructions, name
        assert "16-byte cp.async" in instructions, name
    check(found)


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_peak_memory_grows_linearly(implementation):
    """Four times the tokens take four times the memory, there and back: no [T, S] array."""
    spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64)

    def peak(tokens: int) -> int:
        def go_back(q, k, v, batch):
            def loss(q, k, v):
                metadata = prepare_metadata(batch, spec)
                out = attention(q, k, v, metadata, spec, implementation=implementation)
                return out.astype(jnp.float32).sum()

            return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

        q, k = (jax.ShapeDtypeStruct((tokens, n, 64), jnp.bfloat16) for n in (8, 2))
        batch = abstract_batch(Bucket(tokens=tokens, seqs=4))
        program = lower_for(H200, go_back, q, k, k, batch).compile(compiler_options=OPTIMISED)
        return program.memory_analysis().temp_size_in_bytes

    small, large = peak(2048), peak(8192)
    assert large < 4.2 * small
    assert large < 8192 * 8192  # one byte per score of one head
