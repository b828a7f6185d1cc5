"""The gradient's Mosaic GPU kernels compile to Hopper's machine code and keep their state in registers."""

from __future__ import annotations

from pathlib import Path

import pytest
from deviceless import H200
from mosaic_sass import Case, Compiled, check_registers, compile_kernels, sizes_of
from resources import Key, Resources, check, resources_of

from jaxattn_kernels.mosaic_gpu.hopper_gradient import HEAD_DIMS

pytestmark = pytest.mark.compile

PROGRAM = """
from jaxattn_kernels.mosaic_gpu.hopper_gradient_keys import keys_gradient
from jaxattn_kernels.mosaic_gpu.hopper_gradient_queries import queries_gradient


def go_back(q, k, results, visible, start, page_list, lists, key_tiles):
    inputs = GradientInputs(
        visible, KeyLookup(start, page_list if page_size else None), q, k, k, results, results
    )
    options = {
        "page_size": page_size or None, "scale": 0.1, "logits_soft_cap": 30.0 if masked else None,
        "windowed": bool(masked),
    }
    dq, delta = queries_gradient(inputs, lists, **options)
    dtype = jnp.float32 if page_size else q.dtype
    return dq, keys_gradient(inputs, delta, key_tiles, k.shape[0], dtype, **options)


results = Attended(q, jax.ShapeDtypeStruct(q.shape[:2], jnp.float32))
lists = tiles, abstract_tiles(num_tiles, 2 * block_q)
key_tiles = abstract_key_tiles(num_tiles, 128)
deviceless.compile_for(
    target, go_back, q, k, results, visible, ints(rows + 1), ints(pages), lists, key_tiles
)
"""
KERNELS = ("queries_gradient_short", "queries_gradient_long", "keys_gradient")
CASES = [
    *(Case(head_dim, 4, 16, 0, masked, 0) for head_dim in HEAD_DIMS for masked in (0, 1)),
    Case(128, 8, 8, 0, 1, 0),
    Case(128, 7, 0, 0, 1, 0),
    Case(128, 1, 0, 0, 0, 0),
    Case(64, 1, 64, 0, 1, 0),
]


def compile_case(case: Case, folder: Path) -> list[Compiled]:
    """The kernels of a case, in the order of `KERNELS`."""
    return compile_kernels(H200, "jaxattn_kernels.mosaic_gpu.hopper_gradient", case, folder, PROGRAM)


def keys_of(case: Case) -> list[Key]:
    """The same kernels, as the table names them."""
    name = sizes_of(case) + "-window-cap" * case.masked
    return [Key("mosaic", name, kernel, H200.architecture) for kernel in KERNELS]


def resources_by_key(case: Case, kernels: list[Compiled]) -> dict[Key, Resources]:
    """What the kernels of a case take, as the table has it."""
    return dict(zip(keys_of(case), map(resources_of, kernels), strict=True))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_stay_in_registers(case, tmp_path):
    kernels = compile_case(case, tmp_path)
    for name, kernel in zip(KERNELS, kernels, strict=True):
        check_registers(H200, kernel)
        assert "wgmma.mma_async" in kernel.ptx, "products run on the tensor cores"
        assert "cp.async.bulk.tensor" in kernel.ptx, "blocks come through the copy engine"
        assert ("setmaxnreg" in kernel.ptx) == (name != "queries_gradient_short"), (
            "the producer leaves its registers to two consumers"
        )
    check(resources_by_key(case, kernels))
