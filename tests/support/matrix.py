"""The layers that every implementation, and every gradient, is tested with."""

from __future__ import annotations

import itertools

from jaxattn import AttentionSpec

HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
WINDOWS = (None, 1, 7, 1000)
SOFT_CAPS = (None, 5.0)
PAGE_SIZES = (1, 8, 16, 64)
HEAD_DIMS = (64, 80, 128)
BACKENDS = ("xla", "triton")
"""Implementations that are tested against the reference."""

FACTORS = (tuple(HEADS), WINDOWS, SOFT_CAPS, PAGE_SIZES, HEAD_DIMS)
FULL_MATRIX = list(itertools.product(*FACTORS))


def _pairs_of(row: tuple) -> set:
    return {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(range(len(row)), 2)}


def covering_selection() -> list[tuple]:
    """Greedily, a few rows of the full matrix in which every pair of values stands at least once."""
    missing = set().union(*map(_pairs_of, FULL_MATRIX))
    selection = []
    while missing:
        best = max(FULL_MATRIX, key=lambda row: len(_pairs_of(row) & missing))
        selection.append(best)
        missing -= _pairs_of(best)
    return selection


def make_spec(heads: str, window: int | None, soft_cap: float | None, head_dim: int) -> AttentionSpec:
    num_q_heads, num_kv_heads = HEADS[heads]
    return AttentionSpec(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        sliding_window=window,
        logits_soft_cap=soft_cap,
    )
