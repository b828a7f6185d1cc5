"""Cuts against all cuts there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxattn.planning.partition import cut_line

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


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 100, 257])
def test_as_many_groups_as_sizes_cost_nothing_more(n):
    rng = np.random.default_rng(n)
    weights, costs = rng.integers(1, 9, n).astype(float), np.sort(rng.random(n))
    cuts = cut_line(weights, costs, n)
    assert cuts.totals[-1] == pytest.approx(weights @ costs)
    assert (np.diff(cuts.totals) <= 1e-9).all()
