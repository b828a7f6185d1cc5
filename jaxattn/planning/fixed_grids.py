"""Grids that are in use, which know nothing of a trace, to compare plans with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from jaxattn.batch.bucket import Bucket, BucketPlan, powers_of_two, quarter_steps
from jaxattn.batch.trace import Trace
from jaxattn.planning.cost import DEFAULT_COST, Cost
from jaxattn.planning.distinct import DistinctBatches
from jaxattn.planning.planner import cheapest_first, cheapest_so_far


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
        trace: Sizes of batches.
        max_compiles: The most programs.
        cost: What a step in a bucket costs.
        limits: The largest batch that can come.

    Returns:
        The buckets that are used, for each number of programs.
    """
    batches = DistinctBatches.of(trace, limits)
    found: list[list[BucketPlan]] = [[] for _ in range(max_compiles)]
    for buckets in _grids(sizes, batches):
        if len(buckets) <= max_compiles:
            found[len(buckets) - 1].append(cheapest_first(buckets, cost))
    best = [sorted(plans, key=lambda plan: batches.cost_in(plan, cost))[:1] for plans in found]
    return cheapest_so_far(best, batches, cost)


def _grids(sizes: Callable[[int, int], tuple[int, ...]], batches: DistinctBatches) -> Iterator[list[Bucket]]:
    """The buckets that batches use of a grid, in all the ways in which `grid_curve` may use it."""
    largest, most = int(batches.tokens.max()), int(batches.pages.max())
    token_axis = np.array(sizes(min(16, largest), largest))
    for page_axis in (np.array(powers_of_two(min(16, most), most) if most else (0,)), np.array([most])):
        page_at = np.searchsorted(page_axis, batches.pages)
        for own_decodes in sorted({bool(batches.is_decode.any()), False}):
            for smallest in range(token_axis.size):
                token_at = np.maximum(np.searchsorted(token_axis, batches.tokens), smallest)
                is_used = np.zeros((token_axis.size, page_axis.size, 2), bool)
                is_used[token_at, page_at, (batches.is_decode & own_decodes).astype(int)] = True
                yield [
                    bucket.decode() if is_decode else bucket
                    for token, page, is_decode in np.argwhere(is_used).tolist()
                    for bucket in [batches.bucket(int(token_axis[token]), int(page_axis[page]))]
                ]
