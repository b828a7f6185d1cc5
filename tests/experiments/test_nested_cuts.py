"""Cuts along two axes against all nested cuts there are, and what they save over cuts along one."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from nested_cuts import cut_plane, plan_curve_with_pages

from jaxattn import Bucket
from jaxattn.batch import Trace
from jaxattn.planning import LinearCost, fit_of, plan_curve

WEIGHTS = st.integers(0, 5)


def all_cuts(n: int, max_groups: int):
    """Every way to cut n things into at most so many groups, as ends of the groups."""
    for k in range(1, min(n, max_groups) + 1):
        for inner in itertools.combinations(range(1, n), k - 1):
            yield [*inner, n]


def line_total(weights, costs, ends):
    starts = [0, *ends[:-1]]
    return sum(weights[a:b].sum() * costs[b - 1] for a, b in zip(starts, ends, strict=True))


@st.composite
def planes(draw):
    m, n = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    weights = np.array(draw(st.lists(WEIGHTS, min_size=m * n, max_size=m * n)), float).reshape(m, n)
    rises = np.array(draw(st.lists(st.integers(0, 3), min_size=m * n, max_size=m * n)), float)
    is_present = weights > 0
    is_present[:, draw(st.integers(0, n - 1))] = True  # some without weight
    return weights, rises.reshape(m, n).cumsum(axis=0).cumsum(axis=1), is_present


def nested_totals(weights, costs, is_present, max_groups):
    """The least total of every number of groups, by all nested cuts."""
    least = np.full(max_groups + 1, np.inf)
    for strips in all_cuts(weights.shape[0], max_groups):
        choices = []
        for start, end in zip([0, *strips[:-1]], strips, strict=True):
            width = int(np.flatnonzero(is_present[start:end].any(axis=0))[-1]) + 1
            row = weights[start:end, :width].sum(axis=0)
            choices.append(
                [(len(ends), line_total(row, costs[end - 1], ends)) for ends in all_cuts(width, max_groups)]
            )
        for combination in itertools.product(*choices):
            count = sum(groups for groups, _ in combination)
            if count <= max_groups:
                least[count] = min(least[count], sum(total for _, total in combination))
    return np.minimum.accumulate(least)[1:]


@given(plane=planes(), max_groups=st.integers(1, 6))
def test_a_plane_is_cut_at_least_cost_among_nested_cuts(plane, max_groups):
    weights, costs, is_present = plane
    cuts = cut_plane(weights, costs, is_present, max_groups)
    np.testing.assert_allclose(cuts.totals, nested_totals(weights, costs, is_present, max_groups), rtol=1e-12)
    for k in range(1, max_groups + 1):
        ends = cuts.ends(k)
        assert 1 <= len(ends) <= k
        # Each member goes to the cheapest group that holds it: no dearer than where it was put.
        total = 0.0
        for row, column in np.argwhere(is_present):
            holding = [costs[end] for end in ends if end[0] >= row and end[1] >= column]
            total += weights[row, column] * min(holding)
        assert total <= cuts.totals[k - 1] * (1 + 1e-12)


@st.composite
def traces(draw, most=8):
    batches = []
    for _ in range(draw(st.integers(1, most))):
        seqs = draw(st.integers(1, 4))
        longest = draw(st.sampled_from([1, draw(st.integers(1, 30))]))
        tokens = seqs if longest == 1 else draw(st.integers(longest + seqs - 1, longest * seqs))
        batches.append((tokens, seqs, draw(st.integers(0, 9)), longest))
    return Trace(np.array(batches))  # not Trace.of, whose checks in tests draw at random


def subsets(values, most):
    return [s for k in range(1, most + 1) for s in itertools.combinations(values, k)]


@given(trace=traces(), count=st.integers(1, 4))
def test_tokens_and_pages_against_all_nested_cuts(trace, count):
    """Of one kind of batches: strips of tokens, each with its cuts of pages, however they are chosen."""
    trace = Trace(trace.sizes[trace.max_q_len > 1]) if (trace.max_q_len > 1).any() else trace
    cost = LinearCost(per_page=2.0)
    decode = bool((trace.max_q_len == 1).all())
    tokens, pages = (sorted(set(axis.tolist())) for axis in (trace.tokens, trace.pages))
    least = np.inf
    for num_strips in range(1, min(count, len(tokens)) + 1):
        for inner in itertools.combinations(tokens[:-1], num_strips - 1):
            ends = [*inner, tokens[-1]]
            for widths in itertools.product(subsets(pages, count), repeat=num_strips):
                if sum(map(len, widths)) > count:
                    continue
                placed = 0.0
                for batch in trace:
                    strip = next(i for i, end in enumerate(ends) if batch.tokens <= end)
                    width = next((p for p in widths[strip] if batch.pages <= p), None)
                    if width is None:
                        placed = np.inf
                        break
                    bucket = Bucket(ends[strip], min(ends[strip], int(trace.seqs.max())), width)
                    placed += cost(bucket.decode(ends[strip]) if decode else bucket)
                least = min(least, placed)
    (*_, plan) = plan_curve_with_pages(trace, count, cost=cost)
    assert fit_of(plan, trace, cost).cost <= least * (1 + 1e-9)


@given(trace=traces(), count=st.integers(1, 5))
def test_where_pages_cost_nothing_both_searches_cost_the_same(trace, count):
    cost = LinearCost(per_page=0.0)
    both = (plan_curve_with_pages(trace, count, cost=cost), plan_curve(trace, count, cost=cost))
    two_axes, one_axis = ([fit_of(plan, trace, cost).cost for plan in curve] for curve in both)
    np.testing.assert_allclose(two_axes, one_axis)


def test_two_axes_tell_many_tokens_from_many_pages():
    trace = Trace.of([(8, 8, 1000, 8), (16, 8, 1, 16)])
    (*_, with_pages) = plan_curve_with_pages(trace, 2)
    (*_, along_a_line) = plan_curve(trace, 2)
    assert set(with_pages.buckets) == {Bucket(8, 8, 1000), Bucket(16, 8, 1)}
    assert set(along_a_line.buckets) == {Bucket(16, 8, 1000), Bucket(16, 8, 1)}


def test_few_candidates_still_hold_everything():
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 5000, 400)
    trace = Trace.of([(int(n), 1, int(rng.integers(1, 900)), int(n)) for n in tokens])
    coarse, fine = (plan_curve_with_pages(trace, 12, candidates=n)[-1] for n in (5, 40))
    assert fit_of(fine, trace).cost < fit_of(coarse, trace).cost
