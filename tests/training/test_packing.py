"""Packers as properties: every document once, no pack too full, few packs; and the targets of packed rows."""

from __future__ import annotations

import collections
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxattn import Bucket, nest_batches, nest_sequences, next_token_cross_entropy, pack_best_fit
from jaxattn.training import fit_documents, next_token_targets, pack_first_fit_decreasing

TOKENS, SEQS = 20, 4
BUCKET = Bucket(TOKENS, SEQS)
UNBOUND = Bucket(TOKENS, TOKENS)
"""As many documents as tokens: `seqs` never binds."""
LENGTHS = st.lists(st.integers(1, TOKENS), max_size=40)
BUCKETS = st.sampled_from([BUCKET, UNBOUND, Bucket(TOKENS, 1)])


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Document i consists of `lengths[i]` times i."""
    return [np.full(length, i) for i, length in enumerate(lengths)]


def assert_packs(packs: list, lengths: list[int], bucket: Bucket) -> None:
    """Every document stands in exactly one pack, and no pack exceeds the bucket."""
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    for pack in packs:
        assert 1 <= len(pack) <= bucket.seqs
        assert sum(lengths[i] for i in pack) <= bucket.tokens


def names(packs) -> list[list[int]]:
    return [[int(document[0]) for document in pack] for pack in packs]


def fewest_packs(lengths: list[int], tokens: int) -> int:
    """The optimum, by trying every pack for every document."""

    @functools.cache
    def search(rest: tuple[int, ...], room: tuple[int, ...]) -> int:
        if not rest:
            return len(room)
        length, *others = rest
        choices = [
            search(tuple(others), tuple(sorted((*room[:i], left - length, *room[i + 1 :]))))
            for i, left in enumerate(room)
            if left >= length and left not in room[:i]
        ]
        return min([*choices, search(tuple(others), tuple(sorted((*room, tokens - length))))])

    return search(tuple(sorted(lengths, reverse=True)), ())


def first_fit_decreasing(lengths: list[int], bucket: Bucket) -> list[list[int]]:
    """By the definition, in quadratic time."""
    packs: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for pack in packs:
            fits = sum(lengths[j] for j in pack) + lengths[i] <= bucket.tokens
            if fits and len(pack) < bucket.seqs:
                pack.append(i)
                break
        else:
            packs.append([i])
    return packs


@given(lengths=LENGTHS, bucket=BUCKETS)
def test_first_fit_decreasing_is_what_its_name_says(lengths, bucket):
    packs = pack_first_fit_decreasing(lengths, bucket)
    assert_packs(packs, lengths, bucket)
    assert [pack.tolist() for pack in packs] == first_fit_decreasing(lengths, bucket)
    # Of two packs that are not out of sequences, the first had no room for the second's first document.
    assert len(packs) <= 2 * sum(lengths) / bucket.tokens + len(lengths) / bucket.seqs + 1


@given(lengths=st.lists(st.integers(1, TOKENS), max_size=8))
def test_first_fit_decreasing_is_near_the_optimum(lengths):
    assert len(pack_first_fit_decreasing(lengths, UNBOUND)) <= 11 / 9 * fewest_packs(lengths, TOKENS) + 2 / 3


@given(lengths=LENGTHS, bucket=BUCKETS, max_open=st.integers(1, 6))
def test_best_fit_stays_within_its_bounds(lengths, bucket, max_open):
    """No document is lost, and what was taken from the stream and not given out fits the open packs."""
    taken = []

    def stream():
        for document in documents_of(lengths):
            held = sum(map(len, taken)) - given_out
            assert held <= max_open * bucket.tokens
            taken.append(document)
            yield document

    packs, given_out = [], 0
    for pack in pack_best_fit(stream(), bucket, max_open=max_open):
        packs.append(pack)
        given_out += sum(map(len, pack))
    packs = names(packs)
    assert_packs(packs, lengths, bucket)
    assert all(pack == sorted(pack) for pack in packs)
    assert packs == names(pack_best_fit(documents_of(lengths), bucket, max_open=max_open))
    assert len(packs) <= 2 * sum(lengths) / bucket.tokens + len(lengths) / bucket.seqs + max_open


@given(lengths=LENGTHS, bucket=BUCKETS)
def test_one_open_pack_is_next_fit(lengths, bucket):
    packs: list[list[int]] = []
    for i, length in enumerate(lengths):
        last = packs[-1] if packs else []
        if not last or len(last) == bucket.seqs or sum(lengths[j] for j in last) + length > bucket.tokens:
            packs.append([])
        packs[-1].append(i)
    assert names(pack_best_fit(documents_of(lengths), bucket, max_open=1)) == packs


def test_best_fit_takes_the_fullest_pack_that_has_room_and_closes_the_fullest():
    def packs(*lengths: int) -> list[list[int]]:
        return names(pack_best_fit(documents_of(list(lengths)), UNBOUND, max_open=2))

    assert packs(11, 12, 3) == [[0], [1, 2]]  # beside 12 it leaves 5, beside 11 it would leave 6
    assert packs(11, 12, 8) == [[1, 2], [0]]  # a full one is given out at once
    assert packs(11, 12, 13) == [[1], [0], [2]]  # one too many: the fullest goes, then the oldest first


@pytest.mark.parametrize("name", ["log-normal", "uniform"])
def test_better_packers_waste_less(name):
    rng = np.random.default_rng(0)
    draws = {"log-normal": rng.lognormal(5, 1.2, 5000), "uniform": rng.uniform(1, 2048, 5000)}
    lengths = np.clip(draws[name].astype(int), 1, 2048)
    documents, bucket = [range(n) for n in lengths], Bucket(2048, 256)
    sizes = [len(list(pack_best_fit(documents, bucket, max_open=n))) for n in (1, 4, 16)]
    sizes.append(len(pack_first_fit_decreasing(lengths, bucket)))
    assert sizes == sorted(sizes, reverse=True)
    wasted = 1 - lengths.sum() / (2048 * np.array(sizes))
    assert wasted[0] > 0.1  # next-fit
    assert wasted[2] < 0.06
    assert wasted[3] < 0.01


def test_100_000_documents_take_seconds():
    lengths = np.random.default_rng(0).integers(1, 8193, 100_000)
    started = time.perf_counter()
    packs = pack_first_fit_decreasing(lengths, Bucket(8192, 256))
    # 0.6 s on an idle core; a quadratic loop takes an hour.
    assert time.perf_counter() - started < 20
    assert len(packs) * 8192 < 1.01 * lengths.sum()


def test_an_endless_stream_is_packed_as_it_comes():
    documents = (np.full(7, i) for i in itertools.count())
    packs = list(itertools.islice(pack_best_fit(documents, BUCKET, max_open=3), 5))
    assert names(packs) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_no_documents_make_no_packs():
    assert pack_first_fit_decreasing([], BUCKET) == []
    assert list(pack_best_fit([], BUCKET)) == []


@given(lengths=st.lists(st.integers(1, 70), max_size=20), limit=st.integers(1, TOKENS))
def test_long_documents_are_split_or_dropped(lengths, limit):
    bucket, documents = Bucket(TOKENS, SEQS, max_q_len=limit), documents_of(lengths)
    dropped = list(fit_documents(documents, bucket, too_long="drop"))
    assert names([dropped]) == [[i for i, length in enumerate(lengths) if length <= limit]]
    split = list(fit_documents(documents, bucket, too_long="split"))
    assert all(1 <= len(piece) <= limit for piece in split)
    np.testing.assert_array_equal(np.concatenate([*split, []]), np.concatenate([*documents, []]))
    cuts = collections.Counter(int(piece[0]) for piece in split)
    assert all(cuts[i] == -(-length // limit) for i, length in enumerate(lengths))
    packs = pack_best_fit(documents, bucket, max_open=2, too_long="split")
    assert sorted(len(x) for pack in packs for x in pack) == sorted(len(piece) for piece in split)


def test_errors_name_argument_value_and_remedy():
    short = Bucket(TOKENS, SEQS, max_q_len=8)
    too_long = r"documents\[1\] has 9 tokens, more than bucket.max_q_len=8; .*too_long='split'"
    with pytest.raises(ValueError, match=too_long):
        list(pack_best_fit(documents_of([3, 9]), short))
    with pytest.raises(ValueError, match=r"lengths\[1\]=9 exceeds bucket.max_q_len=8; .*fit_documents"):
        pack_first_fit_decreasing([3, 9], short)
    with pytest.raises(ValueError, match=r"documents\[1\] is empty; drop it"):
        list(pack_best_fit([[1], []], BUCKET, too_long="drop"))
    with pytest.raises(ValueError, match=r"lengths\[2\]=0 must be at least 1; drop"):
        pack_first_fit_decreasing([3, 1, 0], BUCKET)
    with pytest.raises(TypeError, match=r"lengths has dtype float64"):
        pack_first_fit_decreasing(np.array([1.5]), BUCKET)
    # Arguments are checked at once, and not when the first pack is asked for.
    with pytest.raises(ValueError, match="unknown too_long='cut'; use 'raise' or 'split' or 'drop'"):
        pack_best_fit([], BUCKET, too_long="cut")
    with pytest.raises(ValueError, match="max_open=0 must be at least 1"):
        pack_best_fit([], BUCKET, max_open=0)


@given(lengths=LENGTHS.filter(len))
def test_batches_are_the_packs_in_one_bucket(lengths):
    packs = list(pack_best_fit(documents_of(lengths), BUCKET))
    for pack, batch in zip(packs, nest_batches(packs, BUCKET), strict=True):
        assert batch.bucket == BUCKET
        assert int(batch.num_seqs) == len(pack)
        np.testing.assert_array_equal(batch.token_ids[: batch.cu_q_lens[-1]], np.concatenate(pack))


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=SEQS))
def test_targets_are_the_successors_of_each_document(lengths):
    documents = [100 * (i + 1) + np.arange(length) for i, length in enumerate(lengths)]
    targets, has_target = next_token_targets(nest_sequences(documents, bucket=BUCKET))
    n = sum(lengths)
    expected = [np.append(document[1:], 0) for document in documents]
    np.testing.assert_array_equal(targets, np.append(np.concatenate(expected), np.zeros(TOKENS - n)))
    np.testing.assert_array_equal(has_target, np.asarray(targets) > 0)


@pytest.mark.smoke
def test_targets_of_a_full_batch_and_in_jit():
    targets, has_target = jax.jit(next_token_targets)(
        nest_sequences([np.arange(TOKENS) + 5], bucket=Bucket(TOKENS, 1))
    )
    assert targets.dtype == jnp.int32
    np.testing.assert_array_equal(targets, [*range(6, TOKENS + 5), 0])
    np.testing.assert_array_equal(has_target, [True] * (TOKENS - 1) + [False])


@pytest.mark.smoke
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=SEQS), seed=st.integers(0, 99))
def test_cross_entropy_is_optax_own_over_all_targets(lengths, seed):
    """A batch in which nothing is to be predicted costs nothing, and has no gradient."""
    batch = nest_sequences(documents_of(lengths), bucket=BUCKET)
    logits = jnp.asarray(np.random.default_rng(seed).normal(size=(TOKENS, 7)), jnp.float32)
    targets, has_target = next_token_targets(batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    loss, gradient = loss_and_gradient(logits, batch)
    expected = losses[has_target].sum() / max(1, int(has_target.sum()))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_array_equal(np.abs(gradient).max(axis=1) > 0, has_target)


loss_and_gradient = jax.jit(jax.value_and_grad(next_token_cross_entropy))


def test_cross_entropy_of_16_bit_logits_is_computed_in_float32():
    batch = nest_sequences([[1, 2]], bucket=BUCKET)
    logits = jnp.zeros((TOKENS, 1000), jnp.bfloat16)
    assert float(next_token_cross_entropy(logits, batch)) == pytest.approx(np.log(1000), rel=1e-6)
