"""Every shipped Blackwell kernel compiles to its machine code and keeps its state in registers.

One process per compilation, as for Hopper (`test_mosaic_sass.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from deviceless import B200

from jaxattn_kernels.blackwell import HEAD_DIMS, ROWS

pytestmark = pytest.mark.compile

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from deviceless import B200, compile_for
from jaxattn_kernels.arrays import KeyLookup, TileArrays, TileList, VisibleRange
from jaxattn_kernels.blackwell import ragged_attention

head_dim, group_size, page_size, block_q, masked = map(int, sys.argv[1:])
tokens, rows, pages, num_kv_heads = 1024, 16, 512, 4
num_q_heads = num_kv_heads * group_size


def ints(n):
    return jax.ShapeDtypeStruct((n,), jnp.int32)


def attend(q, k, v, visible, start, page_list, tiles, sinks):
    return ragged_attention(
        q, k, v, visible,
        KeyLookup(start, page_list if page_size else None),
        (TileList(tiles, block_q, None),),
        sinks=sinks if masked else None, page_size=page_size or None, scale=0.1,
        logits_soft_cap=30.0 if masked else None, windowed=bool(masked),
    )


q = jax.ShapeDtypeStruct((tokens, num_q_heads, head_dim), jnp.bfloat16)
k = jax.ShapeDtypeStruct((pages * page_size or tokens, num_kv_heads, head_dim), jnp.bfloat16)
tiles = TileArrays(*[ints(64)] * 5)
visible = VisibleRange(ints(tokens), ints(tokens))
sinks = jax.ShapeDtypeStruct((num_q_heads,), jnp.float32)
compile_for(B200, attend, q, k, k, visible, ints(rows + 1), ints(pages), tiles, sinks)
"""


class Compiled(NamedTuple):
    """A compiled kernel.

    Attributes:
        registers: Registers per thread at launch.
        spilled: Bytes per thread that do not fit in registers.
        shared_memory: Bytes of shared memory.
        tensor_memory: Columns of tensor memory that it uses; a power of two of them is allocated.
        ptx: Its program, before assembly.
    """

    registers: int
    spilled: int
    shared_memory: int
    tensor_memory: int
    ptx: str


def compile_kernel(folder: Path, *arguments: int) -> Compiled:
    environment = os.environ | {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (report,), (ptx,), (resources,) = (
        [path.read_text() for path in folder.glob(pattern)]
        for pattern in ("*.ptxas", "*.ptx", "*.resources.txt")
    )

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        assert found, f"no {pattern} in {text}"
        return int(found[1])

    return Compiled(
        registers=number(r"Used (\d+) registers", report),
        spilled=number(r"(\d+) bytes spill stores", report),
        shared_memory=number(r"smem_scratch_bytes=(\d+)", resources),
        tensor_memory=number(r"tmem_scratch_cols=(\d+)", resources),
        ptx=ptx,
    )


# Head dim, heads per group, page size (0: packed), tokens per tile, and whether with window, cap and sinks.
CASES = [
    *((head_dim, 4, 16, ROWS // 4, 1) for head_dim in HEAD_DIMS),
    *((head_dim, 1, 64, ROWS // 2, 0) for head_dim in HEAD_DIMS),
    (128, 8, 8, 8, 1),
    (256, 5, 8, 25, 0),
    (128, 7, 0, 18, 0),
    (64, 64, 256, 1, 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_stay_in_registers(case, tmp_path):
    kernel = compile_kernel(tmp_path, *case)
    print(
        f"{case}: {kernel.registers} registers, {kernel.shared_memory} bytes of shared memory, "
        f"{kernel.tensor_memory} columns of tensor memory"
    )
    assert kernel.spilled == 0
    assert kernel.shared_memory <= B200.shared_memory
    assert kernel.tensor_memory <= 512
    assert "tcgen05.mma" in kernel.ptx, "products run on the tensor cores"
    assert "cp.async.bulk.tensor" in kernel.ptx, "keys and values come through the copy engine"
    assert not re.search(r"(ld|st)\.local", kernel.ptx)
    assert "setmaxnreg" in kernel.ptx, "the softmax has more registers than the rest"
