"""Plans along both axes, tokens and pages: the search that `plan_buckets` does not make.

The buckets of a plan of `jaxattn.planning` hold each other: one with more tokens has no fewer pages. Here
tokens are cut into intervals, and the pages of each interval once more. The result is exact among such nested
cuts. Where there are more distinct sizes than `candidates`, they are first rounded up
to that many, those that would be chosen along this axis alone. `bucket_policies.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxattn.batch import Bucket, BucketPlan, Trace
from jaxattn.planning.cost import DEFAULT_COST, Cost, costs_of
from jaxattn.planning.distinct import DistinctBatches
from jaxattn.planning.partition import cut_line
from jaxattn.planning.planner import cheapest_first, cheapest_so_far


def plan_curve_with_pages(
    trace: Trace,
    max_compiles: int,
    *,
    cost: Cost = DEFAULT_COST,
    limits: Bucket | None = None,
    headroom: float = 0.0,
    candidates: int = 64,
) -> list[BucketPlan]:
    """The plans for 1, 2, … up to `max_compiles` programs, as of `jaxattn.planning.plan_curve`.

    Args:
        trace: Sizes of batches.
        max_compiles: The most programs of the last plan.
        cost: What a step in a bucket costs.
        limits: The largest batch that can come.
        headroom: How much larger batches may soon be.
        candidates: Sizes per axis to choose from; more are finer, and take longer.
    """
    batches = DistinctBatches.of(trace, limits, headroom)
    totals, together = _Plane.of(batches, np.ones_like(batches.is_decode), cost, candidates).cut(max_compiles)
    found = [[together(k)] for k in range(1, max_compiles + 1)]
    if batches.is_decode.any() and not batches.is_decode.all():
        own_totals, own = _Plane.of(batches, batches.is_decode, cost, candidates).cut(max_compiles)
        totals, others = _Plane.of(batches, ~batches.is_decode, cost, candidates).cut(max_compiles)
        for k in range(2, max_compiles + 1):
            num_own = int((own_totals[: k - 1] + totals[: k - 1][::-1]).argmin()) + 1
            found[k - 1].append([*own(num_own), *others(k - num_own)])
    return cheapest_so_far([[cheapest_first(b, cost) for b in plans] for plans in found], batches, cost)


@dataclass(frozen=True, slots=True)
class PlaneCuts:
    """The best nested cuts of a plane of sizes into at most 1, 2, …, K groups.

    Attributes:
        totals: `[K]` The least total of at most k + 1 groups.
        weights: As given.
        costs: As given.
        is_present: As given.
        starts: `[K, m + 1]` Where the last strip of the first j rows begins, if there are at most k + 1
            groups: its first row.
        counts: `[K, m + 1]` How many groups this strip may have.
    """

    totals: np.ndarray
    weights: np.ndarray
    costs: np.ndarray
    is_present: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    def ends(self, num_groups: int) -> list[tuple[int, int]]:
        """The last row and the last column of each group, where there are at most so many groups."""
        ends, row = [], self.weights.shape[0]
        while row:
            start = int(self.starts[num_groups - 1, row])
            count = int(self.counts[num_groups - 1, row])
            strip = slice(start, row)
            width = np.flatnonzero(self.is_present[strip].any(axis=0))[-1] + 1
            line = cut_line(self.weights[strip, :width].sum(axis=0), self.costs[row - 1, :width], count)
            ends.extend((row - 1, column) for column in line.ends(count))
            row, num_groups = start, num_groups - count
        return ends[::-1]


def cut_plane(weights: np.ndarray, costs: np.ndarray, is_present: np.ndarray, max_groups: int) -> PlaneCuts:
    """Cut a plane of sizes into groups: its rows into strips, and the columns of each strip.

    A group is a rectangle: neighbouring rows of one strip, and neighbouring columns. Its members cost what
    its largest row and largest column together cost. The result is exact among such nested cuts. Strips are
    tried between all pairs of rows; of each, the columns are cut as `cut_line` does, for every number of
    groups; the numbers of groups are then shared out among strips. O(K m^2 (n^2 + K)), with n columns.

    Args:
        weights: `[m, n]` How many there are of each pair of sizes.
        costs: `[m, n]` What one of them costs, never falling along either axis.
        is_present: `[m, n]` Whether there are any; such a pair may have no weight, and is in a group all the
            same. Each row has one.
        max_groups: K.
    """
    m = weights.shape[0]
    best = np.full((max_groups + 1, m + 1), np.inf)
    best[:, 0] = 0.0
    starts = np.zeros((max_groups + 1, m + 1), np.int32)
    counts = np.zeros_like(starts)
    for row in range(1, m + 1):
        strips = _strips(weights[:row], costs[row - 1], is_present[:row], max_groups)
        for k in range(1, max_groups + 1):
            # [count, start]: a strip of at most `count` groups, after at most k - count others.
            totals = best[k - 1 :: -1, :row] + strips[:k]
            at = int(totals.argmin())
            counts[k, row], starts[k, row] = at // row + 1, at % row
            best[k, row] = totals.flat[at]
    return PlaneCuts(best[1:, m], weights, costs, is_present, starts[1:], counts[1:])


def _strips(weights: np.ndarray, costs: np.ndarray, is_present: np.ndarray, max_groups: int) -> np.ndarray:
    """`[K, rows]` The least total of the strip from each row to the last one, in at most k + 1 groups."""
    num_rows, n = weights.shape
    from_row = np.cumsum(weights[::-1], axis=0)[::-1]
    sums = np.concatenate([np.zeros((num_rows, 1)), np.cumsum(from_row, axis=1)], axis=1)
    costs = np.concatenate([[0.0], costs])
    # The last column of each strip.
    width = n - np.logical_or.accumulate(is_present[::-1], axis=0)[::-1, ::-1].argmax(axis=1)
    rows = np.arange(num_rows)
    totals = np.empty((max_groups, num_rows))
    best = sums * costs
    totals[0] = best[rows, width]
    for k in range(1, max_groups):
        # [row, j, i]. An i beyond j is never less: all between them cost at least cost(j) in D_(k-1)(i).
        saved = best[:, None, :] - sums[:, None, :] * costs[None, :, None]
        best = np.minimum(best, saved.min(axis=2) + sums * costs)
        totals[k] = best[rows, width]
        if k >= n:  # no strip has more groups than columns
            totals[k:] = totals[k]
            break
    return totals


@dataclass(frozen=True, slots=True)
class _Plane:
    """The sizes among which one kind of buckets is chosen, and what each pair of them costs.

    Attributes:
        weights: `[m, n]` Batches of each pair of m numbers of tokens and n numbers of pages.
        is_present: `[m, n]` Whether there are any, or may be.
        sizes: `[m, n, 4]` The bucket of each pair.
        costs: `[m, n]` The cost of this bucket.
    """

    weights: np.ndarray
    is_present: np.ndarray
    sizes: np.ndarray
    costs: np.ndarray

    @classmethod
    def of(cls, batches: DistinctBatches, chosen: np.ndarray, cost: Cost, candidates: int) -> _Plane:
        of_tokens, of_pages = batches.tokens[chosen], batches.pages[chosen]
        weights, is_decode = batches.weights[chosen], batches.is_decode[chosen].all()

        def buckets(tokens: Any, pages: Any) -> np.ndarray:
            tokens, pages = np.broadcast_arrays(tokens, pages)
            seqs = np.minimum(tokens, batches.max_seqs)
            return np.stack([tokens, seqs, pages, np.ones_like(tokens) if is_decode else tokens], axis=-1)

        tokens, pages = np.unique(of_tokens), np.unique(of_pages)
        ends = np.array([pages[0], batches.pages.max()])
        cheapest, dearest = (costs_of(cost, buckets(tokens, end)) for end in ends)
        if (cheapest == dearest).all():
            pages = ends[1:]
        else:
            tokens = _thin(tokens, of_tokens, weights, cheapest, candidates)
            dearest_row = costs_of(cost, buckets(tokens[-1], pages))
            pages = _thin(pages, of_pages, weights, dearest_row, candidates)
        at = np.searchsorted(tokens, of_tokens), np.searchsorted(pages, of_pages)
        table = np.zeros((tokens.size, pages.size))
        np.add.at(table, at, weights)
        is_present = np.zeros(table.shape, bool)
        is_present[at] = True
        sizes = buckets(tokens[:, None], pages[None, :])
        return cls(table, is_present, sizes, costs_of(cost, sizes.reshape(-1, 4)).reshape(table.shape))

    def cut(self, max_groups: int) -> tuple[np.ndarray, Callable[[int], list[Bucket]]]:
        """The least totals for 1, 2, … groups, and the buckets of so many."""
        # Where a larger bucket is cheaper, it is what a smaller one stands for.
        costs = np.minimum.accumulate(self.costs[::-1, ::-1], axis=0)
        costs = np.minimum.accumulate(costs, axis=1)[::-1, ::-1]
        if costs.shape[1] == 1:  # the same cuts in less time
            line = cut_line(self.weights[:, 0], costs[:, 0], max_groups)
            return line.totals, lambda k: [self._bucket(costs, end, 0) for end in line.ends(k)]
        cuts = cut_plane(self.weights, costs, self.is_present, max_groups)
        return cuts.totals, lambda k: [self._bucket(costs, *end) for end in cuts.ends(k)]

    def _bucket(self, costs: np.ndarray, row: int, column: int) -> Bucket:
        """The smallest bucket from these sizes on that costs what they are said to cost."""
        is_it = self.costs[row:, column:] == costs[row, column]
        below, right = divmod(int(is_it.argmax()), is_it.shape[1])
        return Bucket(*self.sizes[row + below, column + right].tolist())


def _thin(
    distinct: np.ndarray, values: np.ndarray, weights: np.ndarray, costs: np.ndarray, count: int
) -> np.ndarray:
    """At most so many of the distinct sizes, the largest included: those that alone would be chosen."""
    if distinct.size <= count:
        return distinct
    per_size = np.bincount(np.searchsorted(distinct, values), weights, distinct.size)
    rising = np.maximum.accumulate(costs)
    return distinct[cut_line(per_size, rising, count).ends(count)]
