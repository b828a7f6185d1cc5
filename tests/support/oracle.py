"""Independent oracle: attention of one sequence at a time, in NumPy float64, from raw arrays.

Nothing here knows of metadata, tiles or buckets. `Problem` draws the keys of every sequence and
lays them out as pages or packed, everything that nobody owns filled with NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxattn.measuring.workloads import Workload, random_page_tables
from jaxattn.metadata.spec import AttentionSpec


def attend_dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    """Attention of one sequence's last `len(q)` tokens over all its keys. `[q_len, N, H]`."""
    return attend_dense_with_lse(q, k, v, spec)[0]


def attend_dense_with_lse(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: AttentionSpec, sinks: np.ndarray | None = None,
    dtype: type = np.float64, prefix: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The same, and the logarithm of the softmax's denominator `[q_len, N]`.

    Sinks are keys of value 0. All tokens see the keys of the prefix.
    """
    q, k, v = (np.asarray(x, dtype) for x in (q, k, v))
    k, v = np.repeat(k, spec.group_size, axis=1), np.repeat(v, spec.group_size, axis=1)
    scores = np.einsum("qnh,knh->nqk", q, k) * dtype(spec.scale or q.shape[-1] ** -0.5)
    if spec.logits_soft_cap is not None:
        scores = spec.logits_soft_cap * np.tanh(scores / spec.logits_soft_cap)
    position = len(k) - len(q) + np.arange(len(q))[:, None]
    key = np.arange(len(k))[None, :]
    sees = key <= position if spec.causal else np.ones_like(key <= position)
    if spec.sliding_window is not None:
        sees &= key > position - spec.sliding_window
    sees |= key < prefix
    scores = np.where(sees, scores, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(np.asarray(sinks, dtype)[:, None, None], (*scores.shape[:2], 1))
        scores, v = np.concatenate([scores, sink], axis=-1), np.concatenate([v, np.zeros_like(v[:1])])
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("nqk,knh->qnh", weights / total, v)
    return out, (largest + np.log(total))[..., 0].T


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values of a workload, sequence by sequence, float32."""

    workload: Workload
    q: list[np.ndarray]
    k: list[np.ndarray]
    v: list[np.ndarray]

    @classmethod
    def draw(cls, workload: Workload, spec: AttentionSpec, seed: int = 0) -> Problem:
        rng = np.random.default_rng(seed)

        def normal(tokens: int, heads: int) -> np.ndarray:
            return rng.standard_normal((tokens, heads, spec.head_dim)).astype(np.float32)

        return cls(
            workload,
            [normal(n, spec.num_q_heads) for n in workload.q_lens],
            [normal(n, spec.num_kv_heads) for n in workload.kv_lens],
            [normal(n, spec.num_kv_heads) for n in workload.kv_lens],
        )

    def expected(self, spec: AttentionSpec) -> np.ndarray:
        """The outputs, packed, float64."""
        return np.concatenate([attend_dense(*qkv, spec) for qkv in zip(self.q, self.k, self.v, strict=True)])

    def packed(self, rows: list[np.ndarray], tokens: int) -> np.ndarray:
        """Rows of all sequences on one axis of `tokens`, the padding NaN."""
        flat = np.concatenate(rows)
        out = np.full((tokens, *flat.shape[1:]), np.nan, np.float32)
        out[: len(flat)] = flat
        return out

    def pages(
        self, page_size: int, *, num_pages: int | None = None, seed: int = 0
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Page tables in random order, key pages and value pages; all slots that hold no key are NaN."""
        rng = np.random.default_rng(seed)
        tables, needed = random_page_tables(self.workload, page_size, rng)
        num_pages = needed if num_pages is None else num_pages
        shape = (num_pages, page_size, *self.k[0].shape[1:])
        k_pages, v_pages = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        for table, k, v in zip(tables, self.k, self.v, strict=True):
            for i, page in enumerate(table):
                chunk = slice(i * page_size, (i + 1) * page_size)
                k_pages[page, : len(k[chunk])] = k[chunk]
                v_pages[page, : len(v[chunk])] = v[chunk]
        return tables, k_pages, v_pages
