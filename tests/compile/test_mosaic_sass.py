"""Every shipped Mosaic GPU kernel compiles to Hopper's machine code and keeps its state in registers."""

from __future__ import annotations

import itertools

import pytest
from deviceless import H200
from mosaic_sass import Case, check_all, compile_kernels, resources_by_key
from resources import check

from jaxattn_kernels.mosaic_gpu.hopper import HEAD_DIMS

pytestmark = pytest.mark.compile

MODULE = "jaxattn_kernels.mosaic_gpu.hopper"
CASES = [
    *(Case(head_dim, 4, 16, long, 1, 1 - long) for head_dim, long in itertools.product(HEAD_DIMS, (0, 1))),
    *(Case(head_dim, 1, 64, long, 0, 0) for head_dim, long in ((64, 1), (128, 0), (256, 1))),
    Case(128, 7, 0, 1, 0, 0),
    Case(64, 7, 64, 0, 0, 1),
    Case(128, 1, 0, 0, 0, 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_stay_in_registers(case, tmp_path):
    kernels = compile_kernels(H200, MODULE, case, tmp_path)
    check_all(H200, case, kernels)
    assert "wgmma.mma_async" in kernels[0].ptx, "products run on the tensor cores"
    assert ("setmaxnreg" in kernels[0].ptx) == case.is_long, (
        "the producer leaves its registers to two consumers"
    )
    check(resources_by_key(H200, case, kernels))
