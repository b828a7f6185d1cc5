"""The distinct batches of a trace, and those that may come besides: what buckets are planned for."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from jaxattn.batch.bucket import Bucket, BucketPlan
from jaxattn.batch.trace import Trace
from jaxattn.planning.cost import Cost, costs_of

_LARGER = 0.01
"""Larger batches that are planned for where there is headroom, to one batch of the trace."""


@dataclass(frozen=True, slots=True)
class DistinctBatches:
    """The distinct batches of a trace, as far as they make a difference to a plan.

    Attributes:
        sizes: `[n, 3]` Tokens, pages, and whether no query has more than one token.
        weights: `[n]` How many batches are so; 0 where there may be one.
        max_seqs: The most sequences of a batch.
    """

    sizes: np.ndarray
    weights: np.ndarray
    max_seqs: int

    @classmethod
    def of(cls, trace: Trace, limits: Bucket | None, headroom: float = 0.0) -> DistinctBatches:
        """The batches of a trace, the largest that can come, and others up to it where there is headroom.

        Args:
            trace: Sizes of batches.
            limits: The largest batch that can come.
            headroom: How much larger batches may soon be.

        Raises:
            ValueError: If the trace is empty, or the headroom negative or not finite.
        """
        if not 0 <= headroom < np.inf:
            raise ValueError(f"headroom={headroom} must be finite, and not negative; 0.25 is a quarter more")
        if not len(trace):
            raise ValueError("trace is empty; log batches by nest_sequences(..., log=BatchLog(path))")
        sizes = np.stack([trace.tokens, trace.pages, trace.max_q_len == 1], axis=1)
        sizes, counts = np.unique(sizes, axis=0, return_counts=True)
        seen = cls(sizes, counts.astype(np.float64), int(trace.seqs.max()))
        parts: list[DistinctBatches] = [seen]
        if limits is not None:
            largest = np.array([[limits.tokens, limits.pages, limits.max_q_len == 1]])
            parts.append(cls(largest, np.zeros(1), limits.seqs))
        if headroom:
            parts.extend(seen._larger(1 + headroom, limits, max(part.max_seqs for part in parts)))
        return cls(
            np.concatenate([part.sizes for part in parts]),
            np.concatenate([part.weights for part in parts]),
            max(part.max_seqs for part in parts),
        )

    @property
    def tokens(self) -> np.ndarray:
        """`[n]` Tokens of each batch."""
        return self.sizes[:, 0]

    @property
    def pages(self) -> np.ndarray:
        """`[n]` Pages of each batch."""
        return self.sizes[:, 1]

    @property
    def is_decode(self) -> np.ndarray:
        """`[n]` Whether no query of a batch has more than one token."""
        return self.sizes[:, 2] == 1

    def bucket(self, tokens: int, pages: int) -> Bucket:
        """The bucket with so many tokens and pages, and room for as many sequences as can come."""
        return Bucket(tokens, min(tokens, self.max_seqs), pages)

    def cost_in(self, plan: BucketPlan, cost: Cost) -> float:
        """The cost of all batches, each in the first bucket that holds it."""
        sizes = np.stack([self.tokens, self.pages, np.where(self.is_decode, 1, self.tokens)], axis=1)
        buckets = np.array([astuple(bucket) for bucket in plan.buckets])
        first = first_that_holds(buckets[:, [0, 2, 3]], sizes)  # each has room for as many sequences
        return float(costs_of(cost, buckets)[first] @ self.weights)

    def _larger(self, factor: float, limits: Bucket | None, max_seqs: int) -> list[DistinctBatches]:
        """Few batches so many times as large as the largest, fewer twice as large, … up to the limits."""
        found, part = [self._scaled(factor, _LARGER, limits, max_seqs)], _LARGER
        while limits is not None:
            factor, part = 2 * factor, part / 2
            larger = self._scaled(factor, part, limits, max_seqs)
            if np.array_equal(larger.sizes, found[-1].sizes):
                break
            found.append(larger)
        return found

    def _scaled(self, factor: float, part: float, limits: Bucket | None, max_seqs: int) -> DistinctBatches:
        """Of each kind a batch with so many times the most tokens and pages, for so large a part of all."""

        def scaled(most: int, limit: int | None) -> int:
            wanted = int(np.ceil(most * factor))
            return wanted if limit is None else max(min(wanted, limit), most)

        tokens_limit = pages_limit = seqs_limit = None
        if limits is not None:
            tokens_limit, seqs_limit, pages_limit = limits.tokens, limits.seqs, limits.pages
        sizes, weights = [], []
        for kind in np.unique(self.is_decode):
            mine = self.is_decode == kind
            tokens = scaled(int(self.tokens[mine].max()), seqs_limit if kind else tokens_limit)
            sizes.append([tokens, scaled(int(self.pages[mine].max()), pages_limit), int(kind)])
            weights.append(part * float(self.weights[mine].sum()))
        return DistinctBatches(np.array(sizes), np.array(weights), scaled(max_seqs, seqs_limit))


def first_that_holds(buckets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`[n]` Which of the buckets `[k, d]` is the first that no size of a batch `[n, d]` exceeds, or -1."""
    axes = zip(buckets.T[:, :, None], sizes.T[:, None, :], strict=True)
    fits = np.logical_and.reduce([wanted <= room for room, wanted in axes])  # [k, n]
    return np.where(fits.any(axis=0), fits.argmax(axis=0), -1)
