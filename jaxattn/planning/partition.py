"""Cut sizes into few groups, each of which is padded to its largest member, at the least total cost.

`cut_line` is an exact dynamic programme, and knows nothing of buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LineCuts:
    """The best cuts of n ascending sizes into at most 1, 2, …, K groups.

    Attributes:
        totals: `[K]` The least total of at most k + 1 groups.
        starts: `[K, n + 1]` Where the last group begins, if the first j sizes are cut into at most k + 1
            groups: the index of its first size.
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

    Args:
        weights: `[n]` How many there are of each size; none is negative.
        costs: `[n]` What one of this size costs, never falling.
        max_groups: K.
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
    """D_k(j) for every j, made of D_(k-1), and the first i that gives it.

    Since costs do not fall, the best i does not fall as j grows (what is minimised is a Monge array). So the
    middle j of a stretch, once solved, bounds the i of all before it and of all behind it: O(n log n). The
    middles of all stretches are solved at once, then those of their halves, and so on.

    References:
        Aggarwal et al., "Geometric applications of a matrix-searching algorithm", 1987, for Monge arrays.
    """
    best, starts = np.zeros_like(fewer), np.zeros(fewer.size, np.int32)
    # Each column is a stretch: its first and its last j, and the first and the last i that may be theirs.
    stretches = np.array([[1], [fewer.size - 1], [0], [fewer.size - 2]])
    while stretches.size:
        low, high, first, last = stretches
        middle = (low + high) // 2
        counts = np.minimum(last, middle - 1) - first + 1
        i = _ranges(first, counts)
        j = np.repeat(middle, counts)
        totals = fewer[i] + (sums[j] - sums[i]) * costs[j]
        least = _first_least(totals, counts)
        best[middle], starts[middle] = totals[least], i[least]
        before = np.stack([low, middle - 1, first, i[least]])
        behind = np.stack([middle + 1, high, i[least], last])
        stretches = np.concatenate([before, behind], axis=1)
        stretches = stretches[:, stretches[0] <= stretches[1]]
    return best, starts


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The integers from each first one on, so many of them, one range after the other."""
    begins = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(first - begins, counts)


def _first_least(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Where the least of each run of so many values stands; of equal ones the first."""
    begins = np.cumsum(counts) - counts
    least = np.flatnonzero(values == np.repeat(np.minimum.reduceat(values, begins), counts))
    return least[np.searchsorted(least, begins)]
