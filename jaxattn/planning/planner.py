"""Buckets fitted to a trace: the few shapes that cost least for the batches that were seen.

    trace = read_trace("batches.jsonl")
    plan = plan_buckets(trace, max_compiles=8)
    server = Server(model, num_pages=512, grid=plan)

Every bucket is a program that has to be compiled; every batch pays for the bucket it is padded to. With n
programs allowed, which n buckets cost the trace least? They are chosen along one axis:

- *The axis.* Batches stand in a line, by what a bucket of just their sizes would cost. A bucket holds all
  batches up to some place of the line, and is no larger than they need: its tokens are the most that any of
  them has, and so are its pages. Where batches have no pages, the line is that of their tokens. Where pages
  cost nothing, every bucket has the most that any batch needs.
- *Sequences* follow from tokens, `min(tokens, max_seqs)`, as in a `BucketGrid`. Their arrays are small, and a
  bucket then holds every batch of so many tokens.
- *Decode steps*, in which no query has more than one token, get buckets of their own or share those of other
  batches, whichever costs less. In the first case programs are shared out between the two kinds.

Among all sets of such buckets the cheapest is found, exactly (`partition.cut_line`). Of two buckets of a kind
one is always at least as large as the other in tokens and in pages: where batches have many tokens or many
pages but not both, a search along both axes finds cheaper sets, in more time (`experiments/nested_cuts.py`;
`experiments/bucket_policies.py` compares the two).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np

from jaxattn.batch.bucket import Bucket, BucketPlan, Buckets
from jaxattn.batch.numbers import positive_int
from jaxattn.batch.trace import BatchSizes, Trace
from jaxattn.planning.cost import DEFAULT_COST, Cost, costs_of
from jaxattn.planning.distinct import DistinctBatches, first_that_holds
from jaxattn.planning.partition import cut_line


class Fit(NamedTuple):
    """How well buckets suit a trace.

    Attributes:
        cost: The cost of all batches in their buckets.
        padding: Padding tokens over all tokens of the buckets.
        compiles: How many buckets the trace used: programs.
    """

    cost: float
    padding: float
    compiles: int


def plan_buckets(
    trace: Trace,
    max_compiles: int,
    *,
    cost: Cost = DEFAULT_COST,
    limits: Bucket | None = None,
    headroom: float = 0.0,
) -> BucketPlan:
    """The buckets that cost a trace least, exactly, among those that the module describes.

    Args:
        trace: Sizes of batches, as by `read_trace`.
        max_compiles: The most buckets, and so the most programs.
        cost: What a step in a bucket costs: a `LinearCost`, or any function of a `Bucket`. Where it falls as
            a bucket grows, the larger and cheaper bucket is taken.
        limits: The largest batch that can come, if the trace has none as large: some bucket holds it, and
            costs nothing as long as nothing comes. Without it, a batch with more tokens, sequences or pages
            than any of the trace may fit nowhere.
        headroom: How much larger than any of the trace batches may soon be: 0.25 for a quarter. The plan is
            then made as if there were, to a hundred batches, another one with so many more tokens and pages
            than any of its kind, to two hundred one with twice as many as that, and so on up to `limits`;
            without it, what is a little larger has only the bucket of `limits`.

    Returns:
        At most `max_compiles` buckets; fewer where more would save nothing.

    Raises:
        ValueError: If the trace is empty, an argument is not positive, or a cost is negative or not finite.
    """
    return plan_curve(trace, max_compiles, cost=cost, limits=limits, headroom=headroom)[-1]


def plan_curve(
    trace: Trace,
    max_compiles: int,
    *,
    cost: Cost = DEFAULT_COST,
    limits: Bucket | None = None,
    headroom: float = 0.0,
) -> list[BucketPlan]:
    """The plans of `plan_buckets` for 1, 2, … up to `max_compiles` programs, in the time of the last one.

    The cost of the trace never rises from one to the next.

    Args:
        trace: Sizes of batches, as by `read_trace`.
        max_compiles: The most programs of the last plan.
        cost: What a step in a bucket costs.
        limits: The largest batch that can come.
        headroom: How much larger batches may soon be.

    Raises:
        ValueError: As of `plan_buckets`.
    """
    positive_int("max_compiles", max_compiles)
    batches = DistinctBatches.of(trace, limits, headroom)
    _, together = _Line.of(batches, np.ones_like(batches.is_decode), cost).cut(max_compiles)
    candidates = [[buckets] for buckets in together]
    if batches.is_decode.any() and not batches.is_decode.all():
        decodes, others = (_Line.of(batches, kind, cost) for kind in (batches.is_decode, ~batches.is_decode))
        for k, buckets in enumerate(_best_apart(decodes, others, max_compiles), start=1):
            candidates[k].append(buckets)
    return cheapest_so_far([[cheapest_first(b, cost) for b in found] for found in candidates], batches, cost)


def fit_of(buckets: Buckets, trace: Trace, cost: Cost = DEFAULT_COST) -> Fit:
    """How well buckets suit a trace, also one that they were not planned for.

    Raises:
        ValueError: If a batch fits none of them.
    """
    sizes, weights = np.unique(trace.sizes, axis=0, return_counts=True)
    padded = _padded(buckets, sizes)
    used, which = np.unique(padded, axis=0, return_inverse=True)
    return Fit(
        cost=float(costs_of(cost, used)[which.reshape(-1)] @ weights),
        padding=1 - float(sizes[:, 0] @ weights) / float(padded[:, 0] @ weights),
        compiles=len(used),
    )


def unpadded_cost(trace: Trace, cost: Cost = DEFAULT_COST) -> float:
    """What a trace would cost if every batch had a bucket of just its sizes: no buckets cost less."""
    sizes, weights = np.unique(trace.sizes, axis=0, return_counts=True)
    return float(costs_of(cost, sizes) @ weights)


def cheapest_first(buckets: list[Bucket], cost: Cost) -> BucketPlan:
    """A plan of these buckets in which every batch finds the cheapest that holds it."""
    costs = costs_of(cost, np.array([astuple(bucket) for bucket in buckets]))
    order = sorted(range(len(buckets)), key=lambda i: (costs[i], buckets[i]))
    return BucketPlan(tuple(dict.fromkeys(buckets[i] for i in order)))


def cheapest_so_far(
    plans: Iterable[Iterable[BucketPlan]], batches: DistinctBatches, cost: Cost
) -> list[BucketPlan]:
    """The cheapest plan with at most 1, 2, … programs, of those that are given for each number of them.

    Of plans that cost the same, to within rounding, the first is taken: programs that save nothing are not
    compiled.
    """
    best: list[tuple[float, BucketPlan]] = []
    for found in plans:
        priced = [*best[-1:], *((batches.cost_in(plan, cost), plan) for plan in found)]
        least = min(total for total, _ in priced)
        best.append(next(pair for pair in priced if pair[0] <= least * (1 + 1e-12)))
    return [plan for _, plan in best]


@dataclass(frozen=True, slots=True)
class _Line:
    """The buckets to choose from for one kind of batches, each at least as large as those before.

    Attributes:
        buckets: `[n, 4]`
        costs: `[n]` The cost of each, never falling.
        weights: `[n]` How many batches stand at each place.
    """

    buckets: np.ndarray
    costs: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, batches: DistinctBatches, chosen: np.ndarray, cost: Cost) -> _Line:
        """The line of the chosen batches, `[n]`."""
        sizes, is_decode = batches.sizes[chosen, :2], bool(batches.is_decode[chosen].all())

        def priced(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            tokens, pages = sizes.T
            longest = np.ones_like(tokens) if is_decode else tokens
            buckets = np.stack([tokens, np.minimum(tokens, batches.max_seqs), pages, longest], axis=1)
            return buckets, costs_of(cost, buckets)

        fewest, most = sizes.copy(), sizes.copy()
        fewest[:, 1], most[:, 1] = sizes[:, 1].min(), batches.pages.max()
        if (priced(fewest)[1] == priced(most)[1]).all():  # pages cost nothing
            sizes = most
        sizes, which = np.unique(sizes, axis=0, return_inverse=True)
        order = np.argsort(priced(sizes)[1], kind="stable")
        weights = np.bincount(which.reshape(-1), batches.weights[chosen])[order]
        buckets, costs = priced(np.maximum.accumulate(sizes[order]))
        # Where a larger bucket is cheaper, it is taken instead: the next that no larger one undercuts.
        lasting = np.flatnonzero(costs == np.minimum.accumulate(costs[::-1])[::-1])
        taken = lasting[np.searchsorted(lasting, np.arange(costs.size))]
        return cls(buckets[taken], costs[taken], weights)

    def cut(self, max_groups: int) -> tuple[np.ndarray, list[list[Bucket]]]:
        """The least totals with at most 1, 2, … buckets, and these buckets."""
        cuts = cut_line(self.weights, self.costs, max_groups)
        ends = (cuts.ends(k) for k in range(1, max_groups + 1))
        return cuts.totals, [[Bucket(*row) for row in self.buckets[end].tolist()] for end in ends]


def _best_apart(decodes: _Line, others: _Line, max_groups: int) -> list[list[Bucket]]:
    """The best 2, 3, … buckets, at most, where the two kinds of batches share none."""
    own_totals, own = decodes.cut(max_groups)
    other_totals, other = others.cut(max_groups)
    found = []
    for k in range(2, max_groups + 1):
        num_own = 1 + int((own_totals[: k - 1] + other_totals[: k - 1][::-1]).argmin())
        found.append([*own[num_own - 1], *other[k - num_own - 1]])
    return found


def _padded(buckets: Buckets, sizes: np.ndarray) -> np.ndarray:
    """`[n, 4]` The sizes of the bucket that `pick` gives each batch.

    Raises:
        ValueError: As of `pick`.
    """
    if isinstance(buckets, BucketPlan):
        rows = np.array([astuple(bucket) for bucket in buckets.buckets])
        first = first_that_holds(rows, sizes)
        if (first >= 0).all():
            return rows[first]
    picks = (buckets.pick(**BatchSizes(*row)._asdict()) for row in sizes.tolist())
    return np.array([astuple(bucket) for bucket in picks])
