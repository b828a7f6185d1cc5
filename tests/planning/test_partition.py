"""Cuts against all cuts there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxattn.planning.partition import cut_line, cut_plane

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
def lines(draw):
    n = draw(st.integers(1, 8))
    costs = np.cumsum(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    return np.array(draw(st.lists(WEIGHTS, min_size=n, max_size=n)), float), costs.astype(float)


@given(line=lines(), max_groups=st.integers(1, 9))
def test_a_line_is_cut_at_least_cost(line, max_groups):
    weights, costs = line
    cuts = cut_line(weights, costs, max_groups)
    for k in range(1, max_groups + 1):
        least = min(line_total(weights, costs, ends) for ends in all_cuts(weights.size, k))
        ends = [end + 1 for end in cuts.ends(k)]
        assert cuts.totals[k - 1] == least
        assert len(ends) <= k
        assert ends[-1] == weights.size
        assert line_total(weights, costs, ends) == least


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


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 100, 257])
def test_as_many_groups_as_sizes_cost_nothing_more(n):
    rng = np.random.default_rng(n)
    weights, costs = rng.integers(1, 9, n).astype(float), np.sort(rng.random(n))
    cuts = cut_line(weights, costs, n)
    assert cuts.totals[-1] == pytest.approx(weights @ costs)
    assert (np.diff(cuts.totals) <= 1e-9).all()
