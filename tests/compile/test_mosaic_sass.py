"""Every shipped Mosaic GPU kernel compiles to Hopper's machine code and keeps its state in registers.

One process per compilation: after one that fails, Mosaic GPU fails at the next ones too, and a wrong
architecture ends the process. What it makes of a kernel, it writes into a folder.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from deviceless import H200
from resources import Key, Resources, check, resources_of

from jaxattn_kernels.mosaic import HEAD_DIMS

pytestmark = pytest.mark.compile

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from deviceless import H200, compile_for
from jaxattn_kernels.arrays import KeyLookup, SplitArrays, TileArrays, TileList, VisibleRange
from jaxattn_kernels.mosaic import ragged_attention, tokens_per_consumer

head_dim, group_size, page_size, num_consumers, masked, is_split = map(int, sys.argv[1:])
tokens, rows, pages, num_kv_heads = 1024, 16, 512, 4


def ints(n):
    return jax.ShapeDtypeStruct((n,), jnp.int32)


def attend(q, k, v, visible, start, page_list, tiles, split, sinks):
    return ragged_attention(
        q, k, v, visible,
        KeyLookup(start, page_list if page_size else None),
        (TileList(tiles, num_consumers * tokens_per_consumer(group_size), split),),
        sinks=sinks if masked else None, page_size=page_size or None, scale=0.1,
        logits_soft_cap=30.0 if masked else None, windowed=bool(masked),
    )


q = jax.ShapeDtypeStruct((tokens, num_kv_heads * group_size, head_dim), jnp.bfloat16)
k = jax.ShapeDtypeStruct((pages * page_size or tokens, num_kv_heads, head_dim), jnp.bfloat16)
num_tiles = 600 if masked else 64  # more than a launch has programs, and fewer
tiles = TileArrays(*[ints(num_tiles)] * 5)
units = ints(num_tiles + 100)
split = SplitArrays(units, units, units, ints(num_tiles + 1)) if is_split else None
sinks = jax.ShapeDtypeStruct((q.shape[1],), jnp.float32)
visible = VisibleRange(ints(tokens), ints(tokens))
compile_for(H200, attend, q, k, k, visible, ints(rows + 1), ints(pages), tiles, split, sinks)
"""


class Compiled(NamedTuple):
    """A compiled kernel: registers per thread, bytes spilled, bytes of shared memory, and its PTX."""

    registers: int
    spilled: int
    shared_memory: int
    ptx: str


def compile_kernels(folder: Path, *arguments: int) -> list[Compiled]:
    """In the order of their launches."""
    environment = os.environ | {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]

    def number(pattern: str, path: Path) -> int:
        found = re.search(pattern, path.read_text())
        assert found, f"no {pattern} in {path.read_text()}"
        return int(found[1])

    return [
        Compiled(
            registers=number(r"Used (\d+) registers", path.with_suffix(".ptxas")),
            spilled=number(r"(\d+) bytes spill stores", path.with_suffix(".ptxas")),
            shared_memory=number(r"smem_scratch_bytes=(\d+)", path.with_suffix(".resources.txt")),
            ptx=path.read_text(),
        )
        for path in sorted(folder.glob("*.ptx"))
    ]


# Head dim, heads per group, page size (0: packed), consumers; window, cap, sinks and many tiles; split keys.
CASES = [
    *((head_dim, 4, 16, n, 1, int(n == 1)) for head_dim, n in itertools.product(HEAD_DIMS, (1, 2))),
    *((head_dim, 1, 64, n, 0, 0) for head_dim, n in ((64, 2), (128, 1), (256, 2))),
    (128, 7, 0, 2, 0, 0),
    (64, 7, 64, 1, 0, 1),
    (128, 1, 0, 1, 0, 1),
]


def resources_by_key(case: tuple[int, ...], kernels: list[Compiled]) -> dict[Key, Resources]:
    """What the kernels of a case take, as the table has it."""
    head_dim, group_size, page_size, consumers, masked, is_split = case
    paging = f"p{page_size}" if page_size else "packed"
    name = f"g{group_size}-d{head_dim}-bfloat16-{paging}" + "-window-cap-sinks" * masked + "-split" * is_split
    names = (f"consumers_{consumers}", "merge")[: 1 + is_split]
    keys = [Key("mosaic", name, kernel, H200.architecture) for kernel in names]
    return dict(zip(keys, map(resources_of, kernels), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_stay_in_registers(case, tmp_path):
    kernels = compile_kernels(tmp_path, *case)
    for kernel in kernels:
        print(f"{case}: {kernel.registers} registers, {kernel.shared_memory} bytes of shared memory")
        assert kernel.spilled == 0
        assert kernel.shared_memory <= H200.shared_memory
        assert not re.search(r"(ld|st)\.local", kernel.ptx)
    attend, *merge = kernels
    assert "wgmma.mma_async" in attend.ptx, "products run on the tensor cores"
    assert "cp.async.bulk.tensor" in attend.ptx, "keys and values come through the copy engine"
    assert ("setmaxnreg" in attend.ptx) == (case[3] == 2), (
        "the producer leaves its registers to two consumers"
    )
    assert len(merge) == case[5]
    check(resources_by_key(case, kernels))
    width = 2 if case[0] == 80 else 4  # numbers of 4 bytes
    for kernel in merge:
        assert re.search(rf"ld\.\S*v{width}\.", kernel.ptx), "a thread loads neighbours at once"
