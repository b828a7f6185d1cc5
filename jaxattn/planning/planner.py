"""Buckets fitted to a trace: the few shapes that cost least for the batches that were seen.

    trace = read_trace("batches.jsonl")
    plan = plan_buckets(trace, max_compiles=8)
    server = Server(model, num_pages=512, grid=plan)

Every bucket is a program that has to be compiled; every batch pays for the bucket it is padded to. With n
programs allowed, which n buckets cost the trace least? Batches have tokens, pages, and either decode (no
query of more than one token) or not; each of these makes programs of its own. What is searched, and exactly:

- *One axis.* Where pages cost nothing, or there are none: all sets of buckets. Sizes are cut into groups,
  each padded to its largest size (`partition.cut_line`), over all distinct sizes of the trace.
- *Tokens and pages.* All nested cuts: tokens are cut into intervals, and the pages of each interval once more
  (`partition.cut_plane`). Where there are more distinct sizes than `candidates`, they are first rounded up to
  that many, those that would be chosen along this axis alone. `experiments/bucket_policies.py` measures what
  this costs.
- *Decode steps* get buckets of their own or share those of other batches, whichever costs less; in the first
  case programs are shared out between the two kinds.

The sequence axis follows the token axis, `seqs = min(tokens, max_seqs)`, as in a `BucketGrid`: its arrays
are small, and a bucket then holds every batch of so many tokens. `pick` may find a batch a cheaper bucket
than the search gave it, never a dearer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from jaxattn.batch.bucket import Bucket, BucketPlan, Buckets, powers_of_two, quarter_steps
from jaxattn.batch.trace import BatchSizes, Trace
from jaxattn.planning.cost import DEFAULT_COST, Cost, costs_of
from jaxattn.planning.partition import cut_line, cut_plane

CANDIDATES = 64
"""Sizes per axis that are considered where batches have tokens and pages."""


_LARGER = 0.01
"""Larger batches that are planned for where there is headroom, to one batch of the trace."""


class Fit(NamedTuple):
    """How well buckets suit a trace.

    Attributes:
        cost: Of all batches in their buckets, by the cost that was asked for.
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
    candidates: int = CANDIDATES,
) -> BucketPlan:
    """The buckets that cost a trace least, exactly, among those that the module describes.

    Args:
        trace: Sizes of batches, as by `read_trace`.
        max_compiles: The most buckets, and so the most programs.
        cost: Of a step in a bucket: a `LinearCost`, or any function of a `Bucket`. Where it falls as a size
            grows, the larger and cheaper bucket is taken.
        limits: The largest batch that can come, if the trace has none as large: some bucket holds it, and
            costs nothing as long as nothing comes. Without it, a batch with more tokens, sequences or pages
            than any of the trace may fit nowhere.
        headroom: How much larger than any of the trace batches may soon be: 0.25 for a quarter. The plan is
            then made as if there were, to a hundred batches, another one with so many more tokens and pages
            than any of its kind, to two hundred one with twice as many as that, and so on up to `limits`;
            without it, what is a little larger has only the bucket of `limits`.
        candidates: Sizes per axis to choose from where batches have tokens and pages; more are finer, and
            take longer.

    Returns:
        At most `max_compiles` buckets; fewer where more would save nothing.

    Raises:
        ValueError: If the trace is empty, an argument is not positive, or a cost is negative or not finite.
    """
    options: dict[str, Any] = {"cost": cost, "limits": limits, "headroom": headroom, "candidates": candidates}
    return plan_curve(trace, max_compiles, **options)[-1]


def plan_curve(
    trace: Trace,
    max_compiles: int,
    *,
    cost: Cost = DEFAULT_COST,
    limits: Bucket | None = None,
    headroom: float = 0.0,
    candidates: int = CANDIDATES,
) -> list[BucketPlan]:
    """The plans of `plan_buckets` for 1, 2, … up to `max_compiles` programs, in the time of the last one.

    The cost of the trace never rises from one to the next.

    Args:
        trace: As of `plan_buckets`, like all arguments.
        max_compiles: The most programs of the last plan.
        cost: Of a step in a bucket.
        limits: The largest batch that can come.
        headroom: How much larger batches may soon be.
        candidates: Sizes per axis to choose from.

    Raises:
        ValueError: As of `plan_buckets`.
    """
    for name, value in (("max_compiles", max_compiles), ("candidates", candidates)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    if not 0 <= headroom < np.inf:
        raise ValueError(f"headroom={headroom} must be finite, and not negative; 0.25 is a quarter more")
    batches = _Batches.of(trace, limits)
    if headroom:
        batches = batches.with_larger(1 + headroom, limits)
    searches = [_search_together(batches, max_compiles, cost, candidates)]
    if batches.is_decode.any() and not batches.is_decode.all():
        searches.append(_search_apart(batches, max_compiles, cost, candidates))
    curve: list[tuple[float, BucketPlan]] = []
    for k in range(1, max_compiles + 1):
        plans = [cheapest_first(buckets, cost) for search in searches if (buckets := search(k))]
        curve.append(_best([*curve[-1:], *((batches.cost_in(plan, cost), plan) for plan in plans)]))
    return [plan for _, plan in curve]


def grid_curve(
    sizes: Callable[[int, int], tuple[int, ...]],
    trace: Trace,
    max_compiles: int,
    *,
    cost: Cost = DEFAULT_COST,
    limits: Bucket | None = None,
) -> list[BucketPlan]:
    """What a fixed grid makes of a trace with 1, 2, … up to `max_compiles` programs, to compare plans with.

    It is treated generously. Its smallest sizes are left out until the programs that the trace uses are few
    enough; pages are padded to powers of two or to the largest number, and decode steps have programs of
    their own or not: whichever costs least.

    Args:
        sizes: The grid: its sizes of tokens from a smallest to a largest one, such as `powers_of_two`.
        trace: As of `plan_curve`, like all further arguments.
        max_compiles: The most programs.
        cost: Of a step in a bucket.
        limits: The largest batch that can come.

    Returns:
        The buckets that are used, for each number of programs.
    """
    batches = _Batches.of(trace, limits)
    found: dict[int, tuple[float, BucketPlan]] = {}
    for buckets in _grids(sizes, batches):
        if (count := len(buckets)) <= max_compiles:
            plan = cheapest_first(buckets, cost)
            total = batches.cost_in(plan, cost)
            if count not in found or total < found[count][0]:
                found[count] = total, plan
    curve: list[tuple[float, BucketPlan]] = []
    for k in range(1, max_compiles + 1):
        curve.append(_best([*curve[-1:], *([found[k]] if k in found else [])]))
    return [plan for _, plan in curve]


def _best(plans: list[tuple[float, BucketPlan]]) -> tuple[float, BucketPlan]:
    """The first of the cheapest: programs that save nothing are not compiled. Rounding saves nothing."""
    least = min(total for total, _ in plans)
    return next(pair for pair in plans if pair[0] <= least * (1 + 1e-12))


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


def half_steps(smallest: int, largest: int) -> tuple[int, ...]:
    """Sizes 1 and 1.5 times each power of two, from `smallest` to `largest`, and `largest` itself."""
    octaves = powers_of_two(1, largest)
    sizes = {largest, *octaves, *(n * 3 // 2 for n in octaves if n > 1)}
    return tuple(sorted(n for n in sizes if smallest <= n <= largest))


def fifths(smallest: int, largest: int) -> tuple[int, ...]:
    """Sizes 1.25 times as large each, rounded up to a multiple of 8, up to `largest` inclusive."""
    sizes, size = {largest}, float(smallest)
    while size < largest:
        sizes.add(min(-(-int(np.ceil(size)) // 8) * 8, largest))
        size *= 1.25
    return tuple(sorted(sizes))


FIXED_GRIDS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "powers of two": powers_of_two,
    "1, 1.5, 2": half_steps,
    "1.25×": fifths,
    "quarter steps": quarter_steps,
}
"""Grids that are in use, as functions of the smallest and the largest size."""


@dataclass(frozen=True, slots=True)
class _Batches:
    """What makes a difference to a plan: the distinct tokens and pages of a trace, by kind.

    Attributes:
        tokens: `[n]`
        pages: `[n]`
        is_decode: `[n]` Whether no query has more than one token.
        weights: `[n]` How many batches are so; 0 where there may be one.
        max_seqs: The most sequences of a batch.
    """

    tokens: np.ndarray
    pages: np.ndarray
    is_decode: np.ndarray
    weights: np.ndarray
    max_seqs: int

    @classmethod
    def of(cls, trace: Trace, limits: Bucket | None) -> _Batches:
        if not len(trace):
            raise ValueError("trace is empty; log batches by nest_sequences(..., log=BatchLog(path))")
        kinds = np.stack([trace.tokens, trace.pages, trace.max_q_len == 1], axis=1)
        kinds, weights = np.unique(kinds, axis=0, return_counts=True)
        max_seqs = int(trace.seqs.max())
        if limits is not None:
            kinds = np.concatenate([kinds, [[limits.tokens, limits.pages, limits.max_q_len == 1]]])
            weights, max_seqs = np.append(weights, 0), max(max_seqs, limits.seqs)
        return cls(kinds[:, 0], kinds[:, 1], kinds[:, 2] == 1, weights.astype(np.float64), max_seqs)

    def with_larger(self, factor: float, limits: Bucket | None) -> _Batches:
        """The same, and some of each kind that are larger than all that were seen, but within the limits."""
        batches, part, previous = self, _LARGER, None
        while True:
            larger = self._scaled(factor, part, limits)
            if previous is not None and _same(larger, previous):
                return batches
            batches = batches._and(larger)
            if limits is None:
                return batches
            factor, part, previous = 2 * factor, part / 2, larger

    def _scaled(self, factor: float, part: float, limits: Bucket | None) -> _Batches:
        """A batch of each kind with so many times the most tokens and pages, for so large a part of them."""

        def scaled(most: int, limit: int | None) -> int:
            wanted = int(np.ceil(most * factor))
            return wanted if limit is None else max(min(wanted, limit), most)

        tokens, pages, weights = [], [], []
        kinds = np.unique(self.is_decode[self.weights > 0])
        for kind in kinds:
            mine = (self.is_decode == kind) & (self.weights > 0)
            limit = None if limits is None else limits.seqs if kind else limits.tokens
            tokens.append(scaled(int(self.tokens[mine].max()), limit))
            pages.append(scaled(int(self.pages[mine].max()), None if limits is None else limits.pages))
            weights.append(part * float(self.weights[mine].sum()))
        max_seqs = scaled(self.max_seqs, None if limits is None else limits.seqs)
        return _Batches(np.array(tokens), np.array(pages), kinds, np.array(weights), max_seqs)

    def _and(self, other: _Batches) -> _Batches:
        return _Batches(
            np.append(self.tokens, other.tokens),
            np.append(self.pages, other.pages),
            np.append(self.is_decode, other.is_decode),
            np.append(self.weights, other.weights),
            max(self.max_seqs, other.max_seqs),
        )

    def cost_in(self, plan: BucketPlan, cost: Cost) -> float:
        """Of all batches, each in the first bucket that holds it."""
        sizes = np.stack([self.tokens, self.pages, np.where(self.is_decode, 1, self.tokens)], axis=1)
        buckets = np.array([astuple(bucket) for bucket in plan.buckets])
        first = _first_that_holds(buckets[:, [0, 2, 3]], sizes)  # each has room for as many sequences
        return float(costs_of(cost, buckets)[first] @ self.weights)


def _same(a: _Batches, b: _Batches) -> bool:
    return bool((a.tokens == b.tokens).all() and (a.pages == b.pages).all())


type _Search = Callable[[int], list[Bucket] | None]
"""The best buckets, at most so many; None where so few do not do."""


def _search_together(batches: _Batches, max_groups: int, cost: Cost, candidates: int) -> _Search:
    """All batches share the same buckets."""
    everything = np.ones(batches.tokens.size, bool)
    decode = bool(batches.is_decode.all())
    return _Axes.of(batches, everything, decode, cost, candidates).cut(max_groups)[1]


def _search_apart(batches: _Batches, max_groups: int, cost: Cost, candidates: int) -> _Search:
    """Decode steps have buckets of their own; the two kinds share the number of programs out."""
    decode = _Axes.of(batches, batches.is_decode, True, cost, candidates).cut(max_groups)
    others = _Axes.of(batches, ~batches.is_decode, False, cost, candidates).cut(max_groups)

    def search(k: int) -> list[Bucket] | None:
        if k < 2:
            return None
        totals = decode[0][: k - 1] + others[0][: k - 1][::-1]
        num_decode = int(totals.argmin()) + 1
        return [*decode[1](num_decode), *others[1](k - num_decode)]

    return search


@dataclass(frozen=True, slots=True)
class _Axes:
    """The sizes among which one kind of buckets is chosen, and what each pair of them costs.

    Attributes:
        tokens: `[m]` Ascending.
        pages: `[n]` Ascending; one size where pages cost nothing.
        weights: `[m, n]` Batches of each pair.
        is_present: `[m, n]` Whether there are any, or may be.
        sizes: `[m, n, 4]` The bucket of each pair.
        costs: `[m, n]` Of this bucket.
    """

    tokens: np.ndarray
    pages: np.ndarray
    weights: np.ndarray
    is_present: np.ndarray
    sizes: np.ndarray
    costs: np.ndarray

    @classmethod
    def of(cls, batches: _Batches, chosen: np.ndarray, decode: bool, cost: Cost, candidates: int) -> _Axes:
        of_tokens, of_pages = batches.tokens[chosen], batches.pages[chosen]
        weights = batches.weights[chosen]

        def buckets(tokens: Any, pages: Any) -> np.ndarray:
            tokens, pages = np.broadcast_arrays(tokens, pages)
            seqs = np.minimum(tokens, batches.max_seqs)
            return np.stack([tokens, seqs, pages, np.ones_like(tokens) if decode else tokens], axis=-1)

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
        grid = buckets(tokens[:, None], pages[None, :])
        costs = costs_of(cost, grid.reshape(-1, 4)).reshape(table.shape)
        return cls(tokens, pages, table, is_present, grid, costs)

    def cut(self, max_groups: int) -> tuple[np.ndarray, Callable[[int], list[Bucket]]]:
        """The least totals for 1, 2, … groups, and the buckets of so many."""
        # Where a larger bucket is cheaper, it is what a smaller one stands for.
        costs = np.minimum.accumulate(self.costs[::-1, ::-1], axis=0)
        costs = np.minimum.accumulate(costs, axis=1)[::-1, ::-1]
        if self.pages.size == 1:
            line = cut_line(self.weights[:, 0], costs[:, 0], max_groups)
            return line.totals, lambda k: [self._bucket(costs, end, 0) for end in line.ends(k)]
        plane = cut_plane(self.weights, costs, self.is_present, max_groups)
        return plane.totals, lambda k: [self._bucket(costs, *end) for end in plane.ends(k)]

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


def _padded(buckets: Buckets, sizes: np.ndarray) -> np.ndarray:
    """`[n, 4]` The sizes of the bucket that `pick` gives each batch.

    Raises:
        ValueError: As of `pick`.
    """
    if isinstance(buckets, BucketPlan):
        rows = np.array([astuple(bucket) for bucket in buckets.buckets])
        first = _first_that_holds(rows, sizes)
        if (first < 0).any():
            buckets.pick(**dict(zip(BatchSizes._fields, sizes[int(first.argmin())].tolist(), strict=True)))
        return rows[first]
    picked = [
        buckets.pick(tokens=tokens, seqs=seqs, pages=pages, max_q_len=max_q_len)
        for tokens, seqs, pages, max_q_len in sizes.tolist()
    ]
    return np.array([astuple(bucket) for bucket in picked])


def _first_that_holds(buckets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`[n]` Which of the buckets `[k, d]` is the first that no size of a batch `[n, d]` exceeds, or -1."""
    first = np.full(len(sizes), -1)
    left = np.arange(len(sizes))
    columns = [np.ascontiguousarray(column) for column in sizes.T]
    for number, bucket in enumerate(buckets):
        fits = np.logical_and.reduce([c <= size for c, size in zip(columns, bucket, strict=True)])
        first[left[fits]] = number
        left = left[~fits]
        columns = [column[~fits] for column in columns]
    return first


def _grids(sizes: Callable[[int, int], tuple[int, ...]], batches: _Batches) -> Iterator[list[Bucket]]:
    """The buckets that batches use of a grid, in all the ways in which `grid_curve` may use it."""
    largest, most = int(batches.tokens.max()), int(batches.pages.max())
    axis = np.array(sizes(min(16, largest), largest))
    for page_axis in (np.array(powers_of_two(min(16, most), most) if most else (0,)), np.array([most])):
        page_at = np.searchsorted(page_axis, batches.pages)
        for decodes in {batches.is_decode.any(), False}:
            for smallest in range(axis.size):
                token_at = np.maximum(np.searchsorted(axis, batches.tokens), smallest)
                code = (token_at * page_axis.size + page_at) * 2 + (batches.is_decode & decodes)
                yield [
                    _grid_bucket(int(axis[i // 2 // page_axis.size]), int(page_axis[i // 2 % page_axis.size]),
                                 bool(i % 2), batches.max_seqs)
                    for i in np.flatnonzero(np.bincount(code)).tolist()
                ]  # fmt: skip


def _grid_bucket(tokens: int, pages: int, decode: bool, max_seqs: int) -> Bucket:
    bucket = Bucket(tokens, min(tokens, max_seqs), pages)
    return bucket.decode() if decode else bucket
