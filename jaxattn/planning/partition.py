"""Cut sizes into few groups, each of which is padded to its largest member, at the least total cost.

`cut_line` does so along one axis, `cut_plane` in two. Both are exact dynamic programmes; they know nothing of
buckets. In both a cost must not fall as a size grows, and weights must not be negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LineCuts:
    """The best cuts of n ascending sizes into at most 1, 2, …, K groups.

    Attributes:
        totals: `[K]` The least total of at most k + 1 groups.
        starts: `[K, n + 1]` Of the last of at most k + 1 groups of the first j sizes: its first size.
    """

    totals: np.ndarray
    starts: np.ndarray

    def ends(self, num_groups: int) -> list[int]:
        """The last size of each group, ascending, where there are at most so many groups."""
        ends, end = [], self.starts.shape[1] - 1
        for k in range(num_groups - 1, -1, -1):
            if end == 0:
                break
            ends.append(end - 1)
            end = int(self.starts[k, end])
        return ends[::-1]


def cut_line(weights: np.ndarray, costs: np.ndarray, max_groups: int) -> LineCuts:
    """Cut a line of sizes into groups; a member of a group costs what its largest member does.

    With W the prefix sums of the weights, the least total D_k(j) of the first j sizes in at most k groups is

        D_k(j) = min over i < j of D_(k-1)(i) + (W(j) - W(i)) * cost(j)

    Since costs do not fall, the best i does not fall as j grows (the summand is a Monge array), so a group of
    sizes is solved by its middle one, which divides the search of both halves: O(n log n) per k. All middles
    of a level are solved at once, in NumPy.

    Args:
        weights: `[n]` How many there are of each size.
        costs: `[n]` What one of this size costs, never falling.
        max_groups: K.

    References:
        Aggarwal et al., "Geometric applications of a matrix-searching algorithm", 1987, for Monge arrays.
    """
    sums = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
    costs = np.concatenate([[0.0], costs])
    best = sums * costs  # in one group
    starts = np.zeros((max_groups, sums.size), np.int32)
    totals = np.empty(max_groups)
    totals[0] = best[-1]
    for k in range(1, max_groups):
        best, starts[k] = _one_group_more(best, sums, costs)
        totals[k] = best[-1]
    return LineCuts(totals, starts)


def _one_group_more(fewer: np.ndarray, sums: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """D_k of D_(k-1), for all j, and the i of each."""
    best, starts = np.zeros_like(fewer), np.zeros(fewer.size, np.int32)
    # Of every stretch of j that is open at this level: its ends, and between which i its best ones lie.
    low, high = np.array([1]), np.array([fewer.size - 1])
    first, last = np.array([0]), np.array([fewer.size - 2])
    while low.size:
        middle = (low + high) // 2
        counts = np.minimum(middle - 1, last) - first + 1
        offsets = np.cumsum(counts) - counts
        owner = np.repeat(np.arange(middle.size), counts)
        i = np.arange(owner.size) - (offsets - first)[owner]
        j = middle[owner]
        totals = fewer[i] + (sums[j] - sums[i]) * costs[j]
        best[middle] = np.minimum.reduceat(totals, offsets)
        is_best = np.flatnonzero(totals == best[j])
        at, where = np.unique(owner[is_best], return_index=True)  # of equal ones the first
        starts[middle[at]] = found = i[is_best[where]]
        left, right = low < middle, middle < high
        low, high, first, last = (
            np.concatenate([a[left], b[right]])
            for a, b in ((low, middle + 1), (middle - 1, high), (first, found), (found, last))
        )
    return best, starts


@dataclass(frozen=True, slots=True)
class PlaneCuts:
    """The best nested cuts of a plane of sizes into at most 1, 2, …, K groups.

    Attributes:
        totals: `[K]` The least total of at most k + 1 groups.
        weights: As given.
        costs: As given.
        is_present: As given.
        starts: `[K, m + 1]` Of the last strip of the first j rows, if there are at most k + 1 groups: its
            first row.
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
