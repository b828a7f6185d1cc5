"""Draws against the definition in NumPy, and what they may depend on."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxattn import Sampling
from jaxattn.models.options import options_per_prompt
from jaxattn.models.sampling import SamplingArrays, kept, sample

pytestmark = pytest.mark.smoke

V = 13
VALUES = [-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0]  # few, so that there are ties

kept = jax.jit(kept)
sample = jax.jit(sample, static_argnames="greedy")


def likeliest_first(logits: np.ndarray) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def kept_by_definition(logits: np.ndarray, sampling: Sampling) -> set[int]:
    """Token ids that may be drawn, in float64: temperature, then top-k, then the smallest set with top-p."""
    order = likeliest_first(logits)[: sampling.top_k]
    probabilities = np.exp((logits[order].astype(np.float64) - logits.max()) / sampling.temperature)
    reached = np.cumsum(probabilities / probabilities.sum())
    if sampling.top_p == 1:
        return set(order)
    return set(order[: int(np.searchsorted(reached, sampling.top_p - 1e-6)) + 1])


def probabilities_by_definition(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    keep = list(kept_by_definition(logits, sampling))
    probabilities = np.zeros(len(logits))
    probabilities[keep] = np.exp((logits[keep].astype(np.float64) - logits.max()) / sampling.temperature)
    return probabilities / probabilities.sum()


def draw(logits: np.ndarray, sampling: list[Sampling], positions: np.ndarray | None = None) -> list[int]:
    rows = len(sampling)
    positions = np.arange(rows) if positions is None else positions
    arrays = SamplingArrays.of(sampling, rows, logits.shape[-1])
    logits = np.broadcast_to(logits, (rows, logits.shape[-1]))
    return sample(jnp.asarray(logits), jnp.asarray(positions, jnp.int32), arrays).tolist()


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 5.0]),
    top_k=st.sampled_from([None, 1, 2, 5, V, 2 * V]),
    top_p=st.sampled_from([1e-6, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)


@given(
    st.lists(st.sampled_from(VALUES), min_size=V, max_size=V),
    st.lists(samplings, min_size=4, max_size=4),
)
def test_exactly_the_tokens_of_the_definition_are_kept(values, rows):
    logits = np.array(values, np.float32)
    order = likeliest_first(logits)
    scaled = np.stack([(logits[order] - logits.max()) / np.float32(row.temperature) for row in rows])
    arrays = SamplingArrays.of(rows, 4, V)
    keep = np.asarray(kept(jnp.asarray(scaled), arrays))
    for row, mask in zip(rows, keep, strict=True):
        assert {order[i] for i in np.flatnonzero(mask)} == kept_by_definition(logits, row)
    assert set(draw(logits, rows)) <= set.union(*(kept_by_definition(logits, row) for row in rows))


@pytest.mark.parametrize(
    ("top_p", "number"), [(0.1, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.999, 4), (1.0, 4)]
)
def test_the_smallest_set_that_reaches_p(top_p, number):
    """Of four equal logits the sums are exact; the first ids are taken."""
    keep = kept(jnp.zeros((1, 4)), SamplingArrays.of([Sampling(top_p=top_p)], 1, 4))
    assert np.asarray(keep).tolist() == [[i < number for i in range(4)]]


def test_top_p_is_of_what_top_k_leaves():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    for top_k, expected in ((None, {0, 1}), (2, {0, 1}), (1, {0})):
        sampling = Sampling(temperature=1.0, top_k=top_k, top_p=0.6)
        assert set(draw(logits, [sampling] * 200)) == expected
    # Of the two that are left, the first has 0.57.
    assert set(draw(logits, [Sampling(temperature=1.0, top_k=2, top_p=0.56)] * 200)) == {0}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.5, seed=4),
        Sampling(temperature=2.0, top_k=5, seed=5),
        Sampling(temperature=1.0, top_p=0.8, seed=6),
        Sampling(temperature=1.5, top_k=9, top_p=0.9, seed=7),
    ],
)
def test_draws_have_the_distribution(sampling):
    """Pearson's chi-square over positions, and over seeds, against the 1 - 1e-6 quantile."""
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32)
    expected = probabilities_by_definition(logits, sampling)
    number = 4000
    seeds = [dataclasses.replace(sampling, seed=seed) for seed in range(number)]
    positions, same = np.arange(number), np.full(number, 7)
    for tokens in (draw(logits, [sampling] * number, positions), draw(logits, seeds, same)):
        counts = np.bincount(tokens, minlength=V)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        wanted = number * expected[possible]
        statistic = ((counts[possible] - wanted) ** 2 / wanted).sum()
        degrees = possible.sum() - 1
        # Wilson and Hilferty's approximation of the quantile.
        assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.75 * np.sqrt(2 / (9 * degrees))) ** 3


def test_successive_draws_are_independent():
    """Pairs of neighbouring positions, and of neighbouring seeds."""
    logits, number = np.zeros(4, np.float32), 4000
    one = [Sampling(temperature=1.0, seed=11)] * number
    seeds = [Sampling(temperature=1.0, seed=seed) for seed in range(number)]
    for tokens in (draw(logits, one), draw(logits, seeds, np.zeros(number))):
        pairs = np.bincount(4 * np.array(tokens[:-1]) + np.array(tokens[1:]), minlength=16)
        assert ((pairs - number / 16) ** 2 / (number / 16)).sum() < 50  # 15 degrees: 1 in 100,000


@given(st.lists(samplings, min_size=4, max_size=4), st.permutations(range(4)), st.integers(0, 10_000))
def test_a_draw_depends_on_its_own_row_alone(rows, order, position):
    """Neither on its place, nor on how many rows there are, nor on how the others choose."""
    logits = np.random.default_rng(position).normal(size=(4, V)).astype(np.float32)
    positions = position + np.arange(4)
    together = draw(logits, rows, positions)
    moved = draw(logits[order], [rows[i] for i in order], positions[order])
    assert moved == [together[i] for i in order]
    for i, row in enumerate(rows):
        others = [row, *[Sampling()] * 3]
        assert draw(logits[[i] * 4], others, positions[[i] * 4])[0] == together[i]


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (9, 1.0), (None, 0.95)])
def test_rounding_changes_no_draw(top_k, top_p):
    """Nearly equal logits change places; the noise stays with its token."""
    rng, number = np.random.default_rng(5), 2000
    logits = np.repeat(rng.normal(size=(number, 5)), 3, axis=1).astype(np.float32)
    rows = [Sampling(temperature=1.0, top_k=top_k, top_p=top_p, seed=seed) for seed in range(number)]
    texts = [draw(logits + rng.normal(size=logits.shape).astype(np.float32) * 1e-6, rows) for _ in range(2)]
    # At an edge of what is kept, a token may take the place of its equal.
    assert np.mean(np.array(texts[0]) != np.array(texts[1])) < 0.05


@given(st.lists(st.sampled_from(VALUES), min_size=V, max_size=V))
def test_temperature_0_takes_the_first_of_the_likeliest(values):
    logits = np.array(values, np.float32)
    rows = [Sampling(), Sampling(temperature=0.0, top_k=3, top_p=0.1, seed=9)]
    assert draw(logits, rows) == [likeliest_first(logits)[0]] * 2
    assert draw(logits, [*rows, Sampling(temperature=3.0)])[:2] == [likeliest_first(logits)[0]] * 2
    arrays = SamplingArrays.of(rows, 2, V)
    greedy = sample(jnp.stack([jnp.asarray(logits)] * 2), jnp.zeros(2, jnp.int32), arrays, greedy=True)
    assert greedy.tolist() == [likeliest_first(logits)[0]] * 2


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (5, 1.0), (None, 0.99)])
def test_extreme_temperatures(top_k, top_p):
    logits = np.random.default_rng(1).normal(size=V).astype(np.float32)
    cold, hot = (Sampling(temperature=t, top_k=top_k, top_p=top_p) for t in (1e-37, 1e38))
    assert set(draw(logits, [cold] * 50)) == {logits.argmax()}
    assert len(set(draw(logits, [hot] * 50))) >= 5


def test_impossible_tokens_are_never_drawn():
    logits = np.full(V, -np.inf, np.float32)
    logits[[2, 7]] = 0
    for top_k, top_p in ((None, 1.0), (5, 1.0), (None, 0.999)):
        sampling = Sampling(temperature=1e3, top_k=top_k, top_p=top_p)
        assert set(draw(logits, [sampling] * 100)) == {2, 7}


def test_other_generators_change_nothing():
    logits = np.random.default_rng(2).normal(size=V).astype(np.float32)
    rows = [Sampling(temperature=1.0, seed=seed) for seed in range(5)]
    expected = draw(logits, rows)
    with jax.default_prng_impl("rbg"):
        assert draw(logits, rows) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0 must be 0 \(the likeliest token\), or positive"),
        ({"temperature": float("inf")}, "temperature=inf must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"temperature": 1e-40}, "temperature=1e-40 must be 0"),
        ({"top_k": 0}, "top_k=0 must be an integer of at least 1, or None for all tokens"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1, which leaves all tokens"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0"),
        ({"top_p": float("nan")}, "top_p=nan must be above 0"),
        ({"seed": -1}, "seed=-1 must be an integer from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296 must be an integer from 0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_one_sampling_for_all_prompts_gives_each_a_seed_of_its_own():
    shared = Sampling(temperature=1.0, seed=2**32 - 2)
    options = options_per_prompt(3, 5, sampling=shared, stop_token_ids={4, 2}, vocab_size=V)
    assert [asked.sampling.seed for asked in options] == [2**32 - 2, 2**32 - 1, 0]
    assert [set(asked.stop_token_ids) for asked in options] == [{2, 4}] * 3
    assert [asked.max_new_tokens for asked in options] == [5] * 3


def test_options_of_each_prompt():
    each = [Sampling(seed=7), Sampling(temperature=1.0, seed=7)]
    options = options_per_prompt(
        2, np.array([3, 4]), sampling=each, stop_token_ids=[[], [1, 1, 2]], vocab_size=V
    )
    assert [asked.sampling for asked in options] == each
    assert [asked.stop_token_ids for asked in options] == [(), (1, 2)]
    assert [asked.max_new_tokens for asked in options] == [3, 4]
