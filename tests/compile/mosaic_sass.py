"""Compile a Mosaic GPU kernel to machine code and read what it takes.

One process per compilation: after one that fails, Mosaic GPU fails at the next ones too, and a wrong
architecture ends the process. What it makes of a kernel, it writes into a folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from deviceless import Target
from resources import Key, Resources, resources_of

PRELUDE = """
import importlib
import sys
import deviceless
import jax
import jax.numpy as jnp
from abstract_lists import abstract_key_tiles, abstract_tiles, ints
from jaxattn_kernels.arrays import *

target, module = sys.argv[1:3]
head_dim, group_size, page_size, is_long, masked, is_split = map(int, sys.argv[3:])
(target,) = (x for x in deviceless.TARGETS if x.architecture == target)
kernel = importlib.import_module(module)
tokens, rows, pages, num_kv_heads = 1024, 16, 512, 4
block_q = max(1, 64 // group_size) * (1 + is_long)

q = jax.ShapeDtypeStruct((tokens, num_kv_heads * group_size, head_dim), jnp.bfloat16)
k = jax.ShapeDtypeStruct((pages * page_size or tokens, num_kv_heads, head_dim), jnp.bfloat16)
num_tiles = 600 if masked else 64  # more than a launch has programs, and fewer
num_units = num_tiles + 100 if is_split else None
tiles = abstract_tiles(num_tiles, block_q, num_units=num_units)
visible = VisibleRange(ints(tokens), ints(tokens))
"""
"""The arguments, and arrays of which programs are made."""

FORWARD = """
def attend(q, k, v, visible, start, page_list, tiles, sinks):
    return kernel.ragged_attention(
        q, k, v, visible,
        KeyLookup(start, page_list if page_size else None),
        (tiles,),
        sinks=sinks if masked else None, page_size=page_size or None, scale=0.1,
        logits_soft_cap=30.0 if masked else None, windowed=bool(masked),
    )


sinks = jax.ShapeDtypeStruct((q.shape[1],), jnp.float32)
deviceless.compile_for(target, attend, q, k, k, visible, ints(rows + 1), ints(pages), tiles, sinks)
"""


class Case(NamedTuple):
    """What is compiled; flags are 0 or 1.

    Attributes:
        head_dim: Size of a head.
        group_size: Heads per group.
        page_size: Tokens per page; 0 for packed keys.
        is_long: Whether for the tiles of long queries.
        masked: With window, cap, sinks, and more tiles than a launch has programs.
        is_split: With split keys, hence with a merge.
    """

    head_dim: int
    group_size: int
    page_size: int
    is_long: int
    masked: int
    is_split: int


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


def compile_kernels(
    target: Target, module: str, case: Case, folder: Path, program: str = FORWARD
) -> list[Compiled]:
    """In the order of their launches.

    Args:
        target: The GPU.
        module: Where the kernel is.
        case: What to compile.
        folder: An empty one.
        program: What calls `kernel`, the module, after `PRELUDE`.
    """
    environment = os.environ | {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", PRELUDE + program, target.architecture, module, *map(str, case)]
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
            tensor_memory=number(r"tmem_scratch_cols=(\d+)", path.with_suffix(".resources.txt")),
            ptx=path.read_text(),
        )
        for path in sorted(folder.glob("*.ptx"))
    ]


def resources_by_key(target: Target, case: Case, kernels: list[Compiled]) -> dict[Key, Resources]:
    """What the kernels of a case take, as the table has it."""
    keys = keys_of(target, case)
    return dict(zip(keys, map(resources_of, kernels), strict=True))


def keys_of(target: Target, case: Case) -> list[Key]:
    """The kernels of a case, in the order of their launches."""
    name = f"{sizes_of(case)}{'-window-cap-sinks' * case.masked}{'-split' * case.is_split}"
    kernels = ["long" if case.is_long else "short", *["merge"] * case.is_split]
    return [Key("mosaic", name, kernel, target.architecture) for kernel in kernels]


def sizes_of(case: Case) -> str:
    """The beginning of a case's name."""
    paging = f"p{case.page_size}" if case.page_size else "packed"
    return f"g{case.group_size}-d{case.head_dim}-bfloat16-{paging}"


def check_registers(target: Target, kernel: Compiled) -> None:
    """A kernel's state stays in registers, and it fits."""
    assert kernel.spilled == 0
    assert kernel.shared_memory <= target.shared_memory
    assert not re.search(r"(ld|st)\.local", kernel.ptx)


def check_all(target: Target, case: Case, kernels: list[Compiled]) -> None:
    """What holds on any GPU: no kernel spills, and copies are wide."""
    for kernel in kernels:
        check_registers(target, kernel)
    attend, *merge = kernels
    assert "cp.async.bulk.tensor" in attend.ptx, "keys and values come through the copy engine"
    assert len(merge) == case.is_split
    width = 2 if case.head_dim == 80 else 4  # numbers of 4 bytes
    for kernel in merge:
        assert re.search(rf"ld\.\S*v{width}\.", kernel.ptx), "a thread loads neighbours at once"
