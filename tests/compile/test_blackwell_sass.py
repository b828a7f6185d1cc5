"""Every shipped Blackwell kernel compiles to its machine code and keeps its state in registers."""

from __future__ import annotations

import itertools

import pytest
from deviceless import B200
from mosaic_sass import Case, check_all, compile_kernels, resources_by_key
from resources import check

from jaxattn_kernels.mosaic_gpu.blackwell import HEAD_DIMS

pytestmark = pytest.mark.compile

MODULE = "jaxattn_kernels.mosaic_gpu.blackwell"
CASES = [
    *(Case(head_dim, 4, 16, long, 1, 1 - long) for head_dim, long in itertools.product(HEAD_DIMS, (0, 1))),
    *(Case(head_dim, 1, 64, 1, 0, 0) for head_dim in HEAD_DIMS),
    *(Case(head_dim, 8, 8, 0, 1, 1) for head_dim in (80, 128)),  # sixteen copies per block of keys
    Case(256, 5, 8, 1, 0, 0),
    Case(128, 7, 0, 1, 0, 0),
    Case(128, 1, 0, 0, 0, 1),
    Case(64, 64, 256, 0, 1, 0),
]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_stay_in_registers(case, tmp_path):
    kernels = compile_kernels(B200, MODULE, case, tmp_path)
    check_all(B200, case, kernels)
    attend = kernels[0]
    assert attend.tensor_memory <= 512
    assert "tcgen05.mma" in attend.ptx, "products run on the tensor cores"
    assert "setmaxnreg" in attend.ptx, "the softmax has more registers than the rest"
    check(resources_by_key(B200, case, kernels))
