"""The model of how long a layer's programs take on a GPU: a library for experiments that time nothing.

A layer has 32 query heads, 8 key heads, head dim 128, bf16, pages of 16. `SLOTS` programs run at once, each
begins as soon as a slot is free, and a unit costs its rows times its keys, in whole blocks, plus a constant.
The model knows nothing of caches, of bandwidth that few programs share, or of launches; it says what a choice
can cost, not what it does.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from jaxattn import AttentionSpec, Bucket, prepare_metadata
from jaxattn.batch.nest import DEFAULT_GRID
from jaxattn.measuring.workloads import SERVING, Workload, nest_workload, random_page_tables
from jaxattn.metadata.consumers import triton_tiling
from jaxattn_kernels.arrays import Tiles
from jaxattn_kernels.triton.forward import config_for
from jaxattn_kernels.triton.parts import KernelConfig

SPEC = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
PAGE_SIZE = 16
SLOTS = 132 * 2
"""Programs that run at once: two on each multiprocessor of an H100."""
MERGED_KEYS = 8
"""What a piece's results cost that are written and read again, in keys: at 4 heads a group, 4 KiB."""


def _decode(name: str, *kv_lens: int) -> Workload:
    return Workload(name, (1,) * len(kv_lens), tuple(n - 1 for n in kv_lens), "a shape to time")


def _workloads() -> tuple[Workload, ...]:
    short = np.random.default_rng(0).integers(64, 2048, 63)
    return (
        *SERVING,
        _decode("decode 64 x 8k", *(8192,) * 64),
        _decode("decode 1 x 8k", 8192),
        _decode("decode 32 x 4k", *(4096,) * 32),
        _decode("skewed decode 64k + 63 short", 65536, *map(int, short)),
        Workload("prefill 4k", (4096,), (0,), "a shape to time"),
        Workload("prefill 32k", (32768,), (0,), "a shape to time"),
    )


WORKLOADS = {workload.name: workload for workload in _workloads()}
"""By name: the serving workloads, and the shapes that others publish figures for."""


def schedule_of(workload: Workload) -> tuple[Bucket, dict[str, Tiles]]:
    """The bucket that the default grid picks, and the tiles of short and of long queries in it."""
    tables, _ = random_page_tables(workload, PAGE_SIZE, np.random.default_rng(0))
    bucket = DEFAULT_GRID.pick(
        tokens=sum(workload.q_lens), seqs=len(workload.q_lens), pages=sum(len(table) for table in tables)
    )
    if set(workload.q_lens) == {1}:
        bucket = dataclasses.replace(bucket, max_q_len=1)
    batch = nest_workload(workload, page_tables=tables, page_size=PAGE_SIZE, bucket=bucket)
    visible = prepare_metadata(batch, SPEC, consumers="triton").visible_keys(SPEC.window_class)
    schedule = visible.schedule(triton_tiling(SPEC))
    return bucket, dict(zip(("short", "long"), schedule.lists, strict=False))


def programs_per_unit(tile_q: int) -> int:
    """One per key head and per part of a tile that is too tall for one program."""
    part_q = max(1, min(tile_q, config_of(tile_q).max_rows // SPEC.group_size))
    return SPEC.num_kv_heads * -(-tile_q // part_q)


def rows_of(tile_q: int) -> int:
    """Rows of a tile, heads of a group included, as the kernel pads them."""
    return max(16, 1 << (tile_q * SPEC.group_size - 1).bit_length())


def config_of(tile_q: int) -> KernelConfig:
    """How the kernel cuts a tile's rows and keys."""
    return config_for(block_rows=rows_of(tile_q), head_dim=SPEC.head_dim, itemsize=2)


def in_blocks(begin: np.ndarray, end: np.ndarray, block_k: int) -> np.ndarray:
    """Keys from `begin` to `end`, in whole blocks."""
    return (-(-end // block_k) - begin // block_k) * block_k


def makespan(costs: np.ndarray, slots: int = SLOTS) -> int:
    """When the last program ends, if each begins in the order given as soon as a slot is free."""
    free = [0] * slots
    for cost in costs.tolist():
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def longest_first(costs: np.ndarray) -> np.ndarray:
    """The same units, dearest first."""
    return -np.sort(-costs)
