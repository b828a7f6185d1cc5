"""Named workloads, shared by tests, benchmarks and notebooks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxattn.batch.bucket import Bucket, BucketGrid
from jaxattn.batch.nest import DEFAULT_GRID, nest_sequences
from jaxattn.batch.ragged import RaggedBatch


@dataclass(frozen=True, slots=True)
class Workload:
    """The lengths of a batch.

    Attributes:
        name: Short and unique.
        q_lens: Query tokens per sequence.
        context_lens: Tokens cached before, per sequence.
        source: Where the shape comes from.
    """

    name: str
    q_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    source: str

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Keys per sequence, this step's included."""
        return tuple(q + c for q, c in zip(self.q_lens, self.context_lens, strict=True))


def _decode(name: str, kv_lens: tuple[int, ...], source: str) -> Workload:
    return Workload(name, (1,) * len(kv_lens), tuple(n - 1 for n in kv_lens), source)


_SERVING = "a serving step: decode, prefill or a mixture, of equal and of very different lengths"
_ODD = "odd lengths on purpose: one token, page and tile edges, one more and one less"

SERVING = (
    _decode("decode 16 x 1k", (1024,) * 16, _SERVING),
    _decode("decode 64 x 512", (512,) * 64, _SERVING),
    Workload("prefill 1024", (1024,), (0,), _SERVING),
    Workload("ragged 700/300/24", (700, 300, 24), (0, 0, 0), _SERVING),
    Workload("mixed 15 decode + 512", (1,) * 15 + (512,), (1023,) * 15 + (0,), _SERVING),
    Workload("chunk of 256 at 4k", (256,), (3840,), _SERVING),
    _decode("skewed decode 4096 + 15 x 64", (4096,) + (64,) * 15, _SERVING),
)
"""Workloads for timing."""

ODD = (
    Workload("prefill", (1, 63, 65, 17, 2), (0, 0, 0, 0, 0), _ODD),
    Workload("chunked", (31, 1, 66, 5), (7, 0, 129, 64), _ODD),
    _decode("decode", (1, 64, 65, 130, 17), _ODD),
    Workload("mixed", (1, 70, 1, 3, 33), (99, 0, 15, 128, 1), _ODD),
)
"""Small workloads for tests of numerics."""


_GPU = "a step that fills a GPU, over more keys than its cache holds"

TUNING = {
    "decode": (SERVING[0], SERVING[6]),
    "prefill": (SERVING[2], SERVING[3], SERVING[4]),
}
"""Workloads by phase, for choosing an implementation on a CPU."""

GPU_TUNING = {
    "decode": (
        _decode("decode 64 x 4k", (4096,) * 64, _GPU),
        _decode("skewed decode 64k + 63 x 1k", (65536,) + (1024,) * 63, _GPU),
    ),
    "prefill": (
        Workload("prefill 8 x 2k", (2048,) * 8, (0,) * 8, _GPU),
        Workload("ragged 7k/3k/240", (7000, 3000, 240), (0, 0, 0), _GPU),
        Workload("mixed 62 decode at 4k + 2 x 512", (1,) * 62 + (512,) * 2, (4095,) * 62 + (0,) * 2, _GPU),
    ),
}
"""The same on a GPU."""

QUICK_TUNING = {"decode": (ODD[2],), "prefill": (ODD[0],)}
"""Small ones, which show that everything runs and little else."""


def random_page_tables(
    workload: Workload, page_size: int, rng: np.random.Generator, *, reserve: int = 0, unused: int = 3
) -> tuple[list[np.ndarray], int]:
    """Page tables in random physical order.

    Args:
        workload: The lengths to cover.
        page_size: Tokens per page.
        rng: Source of the order.
        reserve: Further tokens to reserve pages for, per sequence.
        unused: Pages of the cache that nobody owns.

    Returns:
        One table per sequence, and the number of pages of the cache.
    """
    counts = [-(-(n + reserve) // page_size) for n in workload.kv_lens]
    num_pages = sum(counts) + unused
    shuffled = rng.permutation(num_pages)[: sum(counts)]
    return np.split(shuffled, np.cumsum(counts)[:-1]), num_pages


def nest_workload(
    workload: Workload,
    *,
    page_tables: list[np.ndarray] | None = None,
    page_size: int | None = None,
    bucket: Bucket | BucketGrid = DEFAULT_GRID,
    vocab_size: int = 100,
    seed: int = 0,
) -> RaggedBatch:
    """Nest a workload with random tokens; paged where tables are given."""
    rng = np.random.default_rng(seed)
    return nest_sequences(
        rng.integers(0, vocab_size, sum(workload.q_lens)),
        q_lens=workload.q_lens,
        context_lens=workload.context_lens if page_tables is not None else None,
        page_tables=page_tables,
        page_size=page_size,
        bucket=bucket,
    )
