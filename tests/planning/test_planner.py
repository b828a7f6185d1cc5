"""Plans: no set of buckets is cheaper, every batch has one, and more programs never cost more."""

import itertools
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxattn import Bucket, BucketGrid
from jaxattn.batch import Trace
from jaxattn.planning import LinearCost, fit_cost, fit_of, plan_buckets, plan_curve
from jaxattn.planning.cost import costs_of
from jaxattn.planning.fixed_grids import FIXED_GRIDS, fifths, grid_curve, half_steps
from jaxattn.planning.planner import unpadded_cost

PER_TOKEN = LinearCost(per_step=3.0, per_long_step=2.0, per_page=0.0)


@st.composite
def traces(draw, paged=True, largest=40, most=12):
    batches = []
    for _ in range(draw(st.integers(1, most))):
        seqs = draw(st.integers(1, 6))
        longest = draw(st.sampled_from([1, 1, draw(st.integers(1, largest))]))
        tokens = seqs if longest == 1 else draw(st.integers(longest + seqs - 1, longest * seqs))
        batches.append((tokens, seqs, draw(st.integers(0, 9)) if paged else 0, longest))
    return Trace(np.array(batches))  # not Trace.of, whose checks in tests draw at random


def full(tokens: int, trace: Trace, pages: int = 0) -> Bucket:
    return Bucket(tokens, min(tokens, int(trace.seqs.max())), pages)


def subsets(values, most):
    return [s for k in range(1, most + 1) for s in itertools.combinations(values, k)]


def total(buckets, trace, cost):
    """The cost of a trace in some buckets, each batch in the cheapest that holds it; inf where none does."""
    return sum(
        min(
            (cost(b) for b in buckets if np.all(np.array(batch) <= np.array(astuple(b)))),
            default=np.inf,
        )
        for batch in trace
    )


@given(trace=traces(paged=False, largest=9, most=7), count=st.integers(1, 3))
def test_no_set_of_buckets_is_cheaper_along_one_axis(trace, count):
    """Among all that all batches share, and all in which decode steps have buckets of their own."""
    is_decode = trace.max_q_len == 1
    shared = [full(n, trace) for n in np.unique(trace.tokens).tolist()]
    decode = [full(n, trace).decode(n) for n in np.unique(trace.tokens[is_decode]).tolist()]
    least = min(total(buckets, trace, PER_TOKEN) for buckets in subsets(shared, count))
    for k in range(min(count, len(decode)) + 1):
        for own in itertools.combinations(decode, k):
            for others in itertools.combinations(shared, min(count - k, len(shared))):
                apart = total(own, Trace(trace.sizes[is_decode]), PER_TOKEN)
                apart += total(others, Trace(trace.sizes[~is_decode]), PER_TOKEN)
                least = min(least, apart)
    found = fit_of(plan_buckets(trace, count, cost=PER_TOKEN), trace, PER_TOKEN).cost
    any_set = min(total(buckets, trace, PER_TOKEN) for buckets in subsets(shared + decode, count))
    assert any_set * (1 - 1e-9) <= found <= least * (1 + 1e-9)
    if is_decode.all() or not is_decode.any():
        assert found == pytest.approx(any_set)


@given(trace=traces(), count=st.integers(1, 7), page=st.sampled_from([0.0, 1 / 64, 3.0]))
def test_every_batch_has_a_bucket(trace, count, page):
    cost = LinearCost(per_page=page)
    limits = Bucket(50, 8, 12)
    curve = plan_curve(trace, count, cost=cost, limits=limits)
    assert len(curve) == count
    costs = []
    for k, plan in enumerate(curve, start=1):
        assert 1 <= len(plan.buckets) <= k
        for batch in trace:
            plan.pick(**batch._asdict())  # raises where there is none
        assert plan.holds(tokens=50, seqs=8, pages=12)
        costs.append(fit_of(plan, trace, cost).cost)
        assert costs[-1] >= unpadded_cost(trace, cost) * (1 - 1e-9)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(costs))


@given(trace=traces(paged=False, largest=200, most=30), count=st.integers(1, 9))
def test_no_fixed_grid_is_cheaper_with_as_many_programs(trace, count):
    for sizes in FIXED_GRIDS.values():
        fixed = grid_curve(sizes, trace, count, cost=PER_TOKEN)
        plans = plan_curve(trace, count, cost=PER_TOKEN)
        for plan, grid in zip(plans, fixed, strict=True):
            assert fit_of(grid, trace, PER_TOKEN).compiles <= len(grid.buckets) <= count
            found, other = (fit_of(b, trace, PER_TOKEN).cost for b in (plan, grid))
            assert found <= other * (1 + 1e-9)


@given(trace=traces(largest=9, most=7), count=st.integers(1, 3))
def test_a_bucket_holds_all_batches_up_to_some_place_and_no_set_of_those_is_cheaper(trace, count):
    """Of one kind of batches. The line is that of what they cost unpadded."""
    cost = LinearCost(per_page=0.5)
    trace = Trace(trace.sizes[trace.max_q_len > 1]) if (trace.max_q_len > 1).any() else trace
    is_decode = bool((trace.max_q_len == 1).all())

    def holding(batches) -> Bucket:
        tokens, pages = (max(axis) for axis in zip(*batches, strict=True))
        bucket = full(tokens, trace, pages)
        return bucket.decode(tokens) if is_decode else bucket

    line = sorted({(b.tokens, b.pages) for b in trace}, key=lambda sizes: (cost(holding([sizes])), sizes))
    upto = [holding(line[: n + 1]) for n in range(len(line))]
    placed = [line.index((batch.tokens, batch.pages)) for batch in trace]
    least = min(
        sum(cost(upto[min(end for end in ends if end >= place)]) for place in placed)
        for ends in subsets(range(len(line)), count)
        if ends[-1] == len(line) - 1
    )
    plan = plan_buckets(trace, count, cost=cost)
    assert set(plan.buckets) <= set(upto)
    assert fit_of(plan, trace, cost).cost <= least * (1 + 1e-9)


def test_tokens_and_pages_of_a_bucket():
    """Unpadded, the three batches cost 16.2, 26 and 25: in this order they stand in the line."""
    trace = Trace.of([(8, 8, 10, 1), (8, 8, 640, 1), (12, 12, 320, 1)])
    assert plan_buckets(trace, 3).buckets == (
        Bucket(8, 8, 10, max_q_len=1),
        Bucket(12, 12, 320, max_q_len=1),
        Bucket(12, 12, 640, max_q_len=1),
    )


def test_a_bucket_for_the_largest_batch_costs_nothing_by_itself():
    trace = Trace.of([(16, 1, 0, 16)] * 9 + [(20, 1, 0, 20)])
    plan = plan_buckets(trace, 2, cost=PER_TOKEN, limits=Bucket(4096, 32, 100))
    assert plan.buckets == (Bucket(20, 20, 100), Bucket(4096, 32, 100))
    assert plan_buckets(trace, 1, limits=Bucket(4096, 32)).buckets == (Bucket(4096, 32),)


@pytest.mark.parametrize("limits", [None, Bucket(70, 5, 900), Bucket(4096, 32, 900)])
def test_headroom(limits):
    """Batches that are a quarter larger than any have a bucket that is not that of the largest."""
    trace = Trace.of([(4, 4, 10, 1)] * 100 + [(64, 4, 20, 61)] * 100)
    plan = plan_buckets(trace, 12, limits=limits, headroom=0.25)
    most = (80, 5) if limits is None else (min(80, limits.tokens), 5)
    for batch in trace:
        assert plan.pick(**batch._asdict()).tokens <= 5 if batch.tokens == 4 else 80
    assert plan.pick(tokens=most[0], seqs=4, pages=25).pages == 25
    assert plan.pick(tokens=most[1], seqs=most[1], pages=13, max_q_len=1).tokens <= 10
    assert plan_buckets(trace, 12, limits=limits).pick(tokens=64, seqs=4, pages=20).pages == 20


def test_headroom_ends_where_nothing_grows():
    """With a limit that the trace exceeds, and with pages that nobody has."""
    trace = Trace.of([(8, 1, 0, 8), (4, 1, 0, 4)])
    assert plan_buckets(trace, 9, limits=Bucket(6, 1, 5), headroom=1.0).holds(tokens=6, seqs=1, pages=5)
    assert plan_buckets(trace, 9, limits=Bucket(60, 1, 5), headroom=1.0).holds(tokens=60, seqs=1, pages=5)


def test_decode_steps_have_buckets_of_their_own_where_that_is_cheaper():
    trace = Trace.of([(4, 4, 0, 1)] * 100 + [(64, 4, 0, 61)])
    cheaper = plan_buckets(trace, 2, cost=LinearCost(per_long_step=1.0))
    assert cheaper.buckets == (Bucket(4, 4, max_q_len=1), Bucket(64, 4))
    same = plan_buckets(trace, 2, cost=LinearCost(per_long_step=0.0))
    assert same.buckets[0] in (Bucket(4, 4), Bucket(4, 4, max_q_len=1))
    assert plan_buckets(trace, 1).buckets == (Bucket(64, 4),)


def test_programs_that_save_nothing_are_not_planned():
    trace = Trace.of([(16, 1, 0, 16), (32, 1, 0, 32)])
    assert len(plan_buckets(trace, 9).buckets) == 2


@pytest.mark.parametrize("as_function", [False, True])
def test_a_larger_bucket_that_is_cheaper_is_taken(as_function):
    """Multiples of 16 are quick here: a bucket of 15 tokens is never made."""

    def cost(bucket: Bucket) -> float:
        return bucket.tokens * (1 if bucket.tokens % 16 == 0 else 2)

    class Vectorised:
        def of_sizes(self, sizes):
            return sizes[:, 0] * np.where(sizes[:, 0] % 16 == 0, 1, 2)

    trace = Trace.of([(n, 1, 0, n) for n in (5, 15, 16, 33, 47, 48)])
    plan = plan_buckets(trace, 3, cost=cost if as_function else Vectorised())
    assert [bucket.tokens for bucket in plan.buckets] == [5, 16, 48]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_compiles": 0}, "max_compiles=0 must be an integer of at least 1"),
        ({"headroom": -0.5}, "headroom=-0.5 must be finite, and not negative"),
        (
            {"cost": lambda bucket: -1.0},
            "cost=-1.0 of Bucket.* must be finite, and not neg",
        ),
        ({"cost": lambda bucket: float("nan")}, "cost=nan of Bucket"),
        ({"trace": Trace.of([])}, "trace is empty; log batches by nest_sequences"),
    ],
)
def test_refuses(options, message):
    arguments = {"trace": Trace.of([(3, 1, 0, 3)]), "max_compiles": 2, **options}
    with pytest.raises(ValueError, match=message):
        plan_buckets(**arguments)


def test_a_trace_in_a_grid():
    """Padding and programs counted by hand."""
    trace = Trace.of([(3, 3, 5, 1), (10, 2, 5, 9), (16, 2, 20, 15)])
    grid = BucketGrid(tokens=(4, 16), pages=(8, 32), max_seqs=4)
    fit = fit_of(grid, trace, LinearCost(per_step=0.0, per_long_step=0.0, per_page=0.0))
    assert fit == (36.0, 1 - 29 / 36, 3)
    with pytest.raises(ValueError, match="exceeds the grid's largest size 16"):
        fit_of(grid, Trace.of([(17, 1, 0, 17)]))
    with pytest.raises(ValueError, match="no bucket of the plan holds tokens=17"):
        fit_of(plan_buckets(trace, 2), Trace.of([(3, 1, 0, 3), (17, 1, 0, 17)]))


def test_fixed_grids():
    assert half_steps(16, 40) == (16, 24, 32, 40)
    assert fifths(16, 64) == (16, 24, 32, 40, 56, 64)
    counts = {name: len(sizes(16, 32768)) for name, sizes in FIXED_GRIDS.items()}
    assert counts["powers of two"] == 12
    assert counts["1, 1.5, 2"] == 23
    assert counts["quarter steps"] == 45


@given(
    numbers=st.tuples(*[st.floats(0.01, 100)] * 4),
    sizes=st.lists(st.tuples(st.integers(1, 999), st.integers(0, 99), st.booleans()), min_size=12),
)
def test_a_fitted_cost_tells_what_was_measured(numbers, sizes):
    true = LinearCost.of(np.array(numbers))
    buckets = [Bucket(n, 1, pages, max_q_len=1 if is_decode else n) for n, pages, is_decode in sizes]
    fitted = fit_cost(buckets, [true(bucket) for bucket in buckets])
    for bucket in buckets:
        assert fitted(bucket) == pytest.approx(true(bucket), rel=1e-4)


def test_a_fitted_cost_is_not_negative():
    """Times that fall as buckets grow, which is noise, make no negative number."""
    buckets = [Bucket(n, 1, 0) for n in (8, 16, 32)]
    fitted = fit_cost(buckets, [3.0, 2.0, 1.0])
    assert fitted.per_token == 0
    assert fitted(buckets[0]) > 0


@pytest.mark.parametrize("seconds", [[1.0], [1.0, 0.0], [1.0, float("nan")]])
def test_times_that_are_none(seconds):
    with pytest.raises(ValueError, match=r"must be one positive time per bucket; there are 2"):
        fit_cost([Bucket(1, 1), Bucket(2, 1)], seconds)


def test_costs_are_not_negative():
    with pytest.raises(ValueError, match=r"per_page=-1.0 must be finite, and not negative"):
        LinearCost(per_page=-1.0)


@given(
    st.lists(st.tuples(st.integers(1, 99), st.integers(0, 9), st.booleans()), min_size=1, max_size=8),
    st.data(),
)
def test_no_cost_beside_a_fitted_one_is_nearer(sizes, data):
    """In relative errors, among those without negative numbers."""
    buckets = [Bucket(n, 1, pages, max_q_len=1 if is_decode else n) for n, pages, is_decode in sizes]
    seconds = np.array(data.draw(st.lists(st.floats(0.1, 9), min_size=len(buckets), max_size=len(buckets))))

    def error(numbers: np.ndarray) -> float:
        cost = LinearCost.of(numbers)
        return float(np.sum((np.array([cost(bucket) for bucket in buckets]) / seconds - 1) ** 2))

    fitted = np.array(astuple(fit_cost(buckets, seconds)))
    for step in itertools.product((-0.01, 0.0, 0.01), repeat=4):
        assert error(fitted) <= error(np.maximum(fitted + step, 0)) + 1e-6


def test_one_cost_in_two_ways():
    cost = LinearCost()
    sizes = np.array([[8, 4, 16, 8], [4, 4, 16, 1]])
    np.testing.assert_array_equal(costs_of(cost, sizes), costs_of(lambda bucket: cost(bucket), sizes))
