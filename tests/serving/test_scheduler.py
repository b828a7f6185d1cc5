"""The scheduler against a device that keeps tokens in place of keys, and a model that reads them back."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from effort import THOROUGH
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn import Bucket, PagePool
from jaxattn.cache.prefix import PrefixCache
from jaxattn.serving import Finished, ScheduledStep, Scheduler

VOCAB = 3  # small: texts coincide often
BUCKET = Bucket(tokens=32, seqs=8, pages=512)


def next_token(context: np.ndarray) -> int:
    """The fake model: a token that depends on every token before it."""
    return zlib.crc32(context.astype(np.int32).tobytes()) % VOCAB


def alone(prompt: Sequence[int], max_new_tokens: int, stop: int | None) -> list[int]:
    """The new tokens of a request, by the definition."""
    text = list(prompt)
    while len(text) < len(prompt) + max_new_tokens:
        text.append(next_token(np.array(text)))
        if text[-1] == stop:
            break
    return text[len(prompt) :]


class Device:
    """A cache that holds, at each slot, the token and the position that were written there."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.memory = np.full((pool.num_pages * pool.page_size, 2), -1)

    def run(self, step: ScheduledStep) -> np.ndarray:
        """Write all query tokens, then read each row's whole context and choose its next token."""
        page_size = self.pool.page_size
        free = self.pool.references(range(self.pool.num_pages)) == 0
        self.memory[np.repeat(free, page_size)] = -1
        tables = np.split(step.page_tables, np.cumsum(step.page_counts)[:-1])
        queries = np.split(step.token_ids, np.cumsum(step.q_lens)[:-1])
        slots = [
            table[np.arange(n * page_size) // page_size] * page_size + np.arange(n * page_size) % page_size
            for table, n in zip(tables, step.page_counts, strict=True)
        ]
        written = []
        for slot, query, context in zip(slots, queries, step.context_lens, strict=True):
            places = slot[context : context + query.size]
            self.memory[places, 0] = query
            self.memory[places, 1] = np.arange(context, context + query.size)
            written.append(places)
        places = np.concatenate(written)
        assert np.unique(places).size == places.size, "a slot is written twice"
        assert (self.pool.references(np.unique(places // page_size)) == 1).all(), "a shared page is written"
        tokens = np.full(step.num_rows, -99)
        for i, (slot, query, context) in enumerate(zip(slots, queries, step.context_lens, strict=True)):
            held = self.memory[slot[: context + query.size]]
            np.testing.assert_array_equal(held[:, 1], np.arange(len(held)), "a position is not where it was")
            if step.samples[i]:
                tokens[i] = next_token(held[:, 0])
        return tokens


def make(num_pages: int, page_size: int = 4, **options: Any) -> tuple[Scheduler, Device]:
    pool = PagePool(num_pages, page_size)
    return Scheduler(pool, **{"token_budget": 16, "max_seqs": 4, **options}), Device(pool)


def run_step(scheduler: Scheduler, device: Device) -> tuple[ScheduledStep, list[Finished]]:
    step = scheduler.schedule()
    assert step is not None
    return step, scheduler.commit(step, device.run(step))


def finish(scheduler: Scheduler, device: Device) -> dict[int, list[int]]:
    results = {}
    while scheduler.has_work:
        results |= {done.request_id: done.token_ids for done in run_step(scheduler, device)[1]}
    return results


# Every request, under every limit, gets what it would get alone.


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request: what it asks for, in which step it comes, and after how many steps it is cancelled."""

    prompt: list[int]
    max_new_tokens: int
    stop: int | None
    at: int
    cancelled_at: int | None
    cancelled_in_flight: bool


@dataclasses.dataclass(frozen=True)
class Workload:
    """Arrivals and limits."""

    arrivals: list[Arrival]
    page_size: int
    num_pages: int
    options: dict[str, Any]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Few tokens, common beginnings, and little more memory than one request needs."""
    tokens = st.integers(0, VOCAB - 1)
    common = draw(st.lists(tokens, min_size=12, max_size=12))
    page_size = draw(st.integers(1, 5))
    arrivals = []
    for _ in range(draw(st.integers(2, 6))):
        prompt = common[: draw(st.integers(1, 10))] + draw(st.lists(tokens, max_size=3))
        at = draw(st.integers(0, 6))
        arrival = Arrival(
            prompt=prompt,
            max_new_tokens=draw(st.sampled_from([1, 2, 4, 8, 12, 16, 20])),
            stop=draw(st.sampled_from([None] * 5 + [0])),
            at=at,
            cancelled_at=draw(st.sampled_from([None] * 5 + [at, at + 3, at + 6])),
            cancelled_in_flight=draw(st.booleans()),
        )
        arrivals.append(arrival)
    needed = max(-(-(len(a.prompt) + a.max_new_tokens - 1) // page_size) for a in arrivals)
    options = {
        "token_budget": draw(st.sampled_from([1, 2, 3, 4, 6, 9, 16, 32])),
        "max_seqs": draw(st.sampled_from([1, 2, 3, 4, 5, 6])),
        "max_chunk": draw(st.sampled_from([None, None, 1, 2, 3, 5])),
        "share_prefixes": draw(st.sampled_from([True, True, False])),
    }
    return Workload(arrivals, page_size, needed + draw(st.integers(0, 2)), options)


def check_step(step: ScheduledStep, scheduler: Scheduler, options: dict[str, Any], active: set[int]) -> None:
    """What holds for every step, whatever the requests."""
    batch = step.nest(bucket=BUCKET, vocab_size=VOCAB, transfer=False)
    np.testing.assert_array_equal(batch.token_ids[: step.token_ids.size], step.token_ids)
    np.testing.assert_array_equal(batch.kv_lens[: step.num_rows], step.context_lens + step.q_lens)
    np.testing.assert_array_equal(batch.is_decode[: step.num_rows], step.is_decode)
    assert step.token_ids.size <= options["token_budget"]
    assert step.num_rows <= options["max_seqs"]
    assert step.q_lens.max() <= (options["max_chunk"] or options["token_budget"])
    assert (step.q_lens[step.is_decode] == 1).all()
    assert step.samples[step.is_decode].all()
    assert set(step.request_ids) <= active
    assert min(active) in step.request_ids, "the oldest request waits"
    keys = [(not decodes, i) for decodes, i in zip(step.is_decode, step.request_ids, strict=True)]
    assert keys == sorted(keys), "decoding rows come first, and older ones before younger ones"
    references = scheduler.pool.references(step.page_tables)
    assert (references >= np.bincount(step.page_tables)[step.page_tables]).all()
    if not options["share_prefixes"]:
        assert (references == 1).all()


def stops(stop: int | None) -> list[int]:
    return [] if stop is None else [stop]


def check_workload(workload: Workload) -> None:
    scheduler, device = make(workload.num_pages, workload.page_size, **workload.options)
    arrivals = sorted(workload.arrivals, key=lambda arrival: arrival.at)
    ids: dict[int, Arrival] = {}
    active: set[int] = set()
    expected = {
        i: alone(arrival.prompt, arrival.max_new_tokens, arrival.stop) for i, arrival in enumerate(arrivals)
    }

    def cancel(now: int, in_flight: bool) -> None:
        for i in sorted(active):
            if ids[i].cancelled_at == now and ids[i].cancelled_in_flight == in_flight:
                tokens = scheduler.cancel(i)
                assert tokens == expected[i][: len(tokens)]
                active.remove(i)

    # The oldest request gets a token in every step.
    limit = sum(len(a.prompt) + a.max_new_tokens for a in arrivals) + arrivals[-1].at + 1
    for now in range(limit):
        for arrival in arrivals:
            if arrival.at == now:
                i = scheduler.add(arrival.prompt, arrival.max_new_tokens, stop_token_ids=stops(arrival.stop))
                ids[i] = arrival
                active.add(i)
        cancel(now, in_flight=False)
        step = scheduler.schedule()
        assert (step is None) == (not active)
        if step is None:
            continue
        check_step(step, scheduler, workload.options, active)
        tokens = device.run(step)
        cancel(now, in_flight=True)
        for done in scheduler.commit(step, tokens):
            assert done.token_ids == expected[done.request_id]
            assert done.reason == ("stop" if done.token_ids[-1] == ids[done.request_id].stop else "length")
            active.remove(done.request_id)
        for i in active:
            tokens = scheduler.token_ids(i)
            assert tokens == expected[i][: len(tokens)]
    assert not active
    assert not scheduler.has_work
    assert scheduler.pool.num_free + scheduler.num_retained == workload.num_pages


@pytest.mark.smoke
@given(workloads())
def test_every_request_gets_what_it_gets_alone(workload):
    check_workload(workload)


@pytest.mark.slow
@settings(max_examples=THOROUGH)
@given(workloads())
def test_every_request_gets_what_it_gets_alone_thoroughly(workload):
    check_workload(workload)


# The policy.


def test_decoding_comes_before_prefilling_before_admission():
    scheduler, device = make(30, token_budget=6, max_chunk=3)
    first = scheduler.add([0, 1], 5)
    second = scheduler.add([1] * 9, 5)
    third = scheduler.add([2] * 3, 5)
    rows = []
    for _ in range(3):
        step, _ = run_step(scheduler, device)
        rows.append(list(zip(step.request_ids, step.q_lens.tolist(), step.is_decode.tolist(), strict=True)))
    assert rows == [
        [(first, 2, False), (second, 3, False), (third, 1, False)],
        [(first, 1, True), (second, 3, False), (third, 2, False)],
        [(first, 1, True), (third, 1, True), (second, 3, False)],
    ]


def test_only_the_last_chunk_samples():
    scheduler, device = make(30, token_budget=4)
    scheduler.add([1] * 9, 1)
    steps = [run_step(scheduler, device)[0] for _ in range(3)]
    assert [step.q_lens.tolist() for step in steps] == [[4], [4], [1]]
    assert [step.context_lens.tolist() for step in steps] == [[0], [4], [8]]
    assert [step.samples.tolist() for step in steps] == [[False], [False], [True]]
    assert not any(step.is_decode.any() for step in steps), "a chunk of one token is a chunk"
    assert scheduler.schedule() is None


def test_one_token_prompts_are_prefilled():
    scheduler, device = make(4)
    scheduler.add([1], 2)
    steps = [run_step(scheduler, device)[0] for _ in range(2)]
    assert [step.is_decode.tolist() for step in steps] == [[False], [True]]
    assert [step.q_lens.tolist() for step in steps] == [[1], [1]]


def test_rows_keep_their_state_slot():
    scheduler, device = make(30, max_seqs=3)
    first, second = scheduler.add([1], 2), scheduler.add([2], 4)
    slots = []
    for _ in range(4):
        step, _ = run_step(scheduler, device)
        slots.append(dict(zip(step.request_ids, step.state_slots.tolist(), strict=True)))
    assert slots == [{first: 0, second: 1}, {first: 0, second: 1}, {second: 1}, {second: 1}]


def test_the_same_requests_make_the_same_steps():
    def steps() -> list[tuple]:
        scheduler, device = make(6, token_budget=5)
        for i in range(4):
            scheduler.add([i % VOCAB] * (3 + i), 6)
        rows = []
        while scheduler.has_work:
            step, _ = run_step(scheduler, device)
            rows.append((step.request_ids, step.token_ids.tolist(), step.page_tables.tolist()))
        return rows

    assert steps() == steps()


# Memory runs out.


def test_a_preempted_request_returns_to_the_front_and_loses_nothing():
    scheduler, device = make(4, share_prefixes=False)
    old, young, waiting = scheduler.add([0] * 7, 9), scheduler.add([1] * 7, 3), scheduler.add([2] * 3, 2)
    run_step(scheduler, device)  # two pages each: the pool is full
    run_step(scheduler, device)
    step, _ = run_step(scheduler, device)  # the old one needs a third page
    assert step.request_ids == (old,)
    assert scheduler.stats.num_preemptions == 1
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    kept = scheduler.token_ids(young)
    assert len(kept) == 2
    order = []
    results = {}
    while scheduler.has_work:
        step, finished = run_step(scheduler, device)
        order += [i for i in step.request_ids if i not in order]
        if young in step.request_ids and young not in order[:-1]:
            assert step.q_lens[step.request_ids.index(young)] == 9, "prompt and new tokens, all at once"
            assert not step.is_decode[step.request_ids.index(young)]
        results |= {done.request_id: done.token_ids for done in finished}
    assert order == [old, young, waiting]
    assert results[young][:2] == kept
    assert results == {
        old: alone([0] * 7, 9, None),
        young: alone([1] * 7, 3, None),
        waiting: alone([2] * 3, 2, None),
    }


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_the_oldest_request_always_progresses(share_prefixes):
    scheduler, device = make(5, page_size=2, share_prefixes=share_prefixes, token_budget=3, max_seqs=3)
    active = {scheduler.add([i % VOCAB] * 2, 9) for i in range(6)}
    computed = dict.fromkeys(active, 0)
    while active:
        oldest = min(active)
        step, finished = run_step(scheduler, device)
        row = step.request_ids.index(oldest)
        end = int(step.context_lens[row] + step.q_lens[row])
        assert end > computed[oldest]
        computed[oldest] = end
        active -= {done.request_id for done in finished}
    assert scheduler.stats.num_preemptions > 0


def test_the_youngest_request_waits_with_its_pages():
    scheduler, device = make(4, share_prefixes=False)
    old, young = scheduler.add([0] * 6, 3), scheduler.add([1] * 8, 4)
    run_step(scheduler, device)
    step, _ = run_step(scheduler, device)  # the young one would need a fifth page
    assert step.request_ids == (old,)
    assert scheduler.num_running == 2
    run_step(scheduler, device)  # the old one is done
    step, _ = run_step(scheduler, device)
    assert (step.request_ids, step.context_lens.tolist()) == ((young,), [8])
    assert scheduler.stats.num_preemptions == 0


def test_a_request_planned_before_an_older_one_gives_its_pages_back_in_the_same_step():
    scheduler, device = make(7, page_size=2, token_budget=8, max_chunk=2)
    old = scheduler.add([0] * 10, 3)
    scheduler.add([1], 8)
    for _ in range(3):
        run_step(scheduler, device)
    step, _ = run_step(scheduler, device)
    assert step.is_decode.tolist() == [True, False]
    step, _ = run_step(scheduler, device)  # the young one decodes into the last page, then loses it
    assert step.request_ids == (old,)
    assert scheduler.stats.num_preemptions == 1


def test_admission_waits_for_memory_and_nobody_overtakes():
    scheduler, device = make(4, max_seqs=4, share_prefixes=False)
    running = scheduler.add([0] * 9, 2)
    large, small = scheduler.add([1] * 8, 1), scheduler.add([2], 1)
    step, _ = run_step(scheduler, device)
    assert step.request_ids == (running,)
    assert (scheduler.pool.num_free, scheduler.num_waiting) == (1, 2)
    run_step(scheduler, device)
    step, finished = run_step(scheduler, device)
    assert step.request_ids == (large, small)
    assert len(finished) == 2


def test_pages_that_a_request_shares_are_not_there_for_its_other_tokens():
    scheduler, device = make(4)
    scheduler.add([1] * 9, 1)
    finish(scheduler, device)
    running = scheduler.add([0] * 7, 2)
    scheduler.add([1] * 12, 1)
    step, _ = run_step(scheduler, device)
    assert step.request_ids == (running,)
    assert (scheduler.pool.num_free, scheduler.num_retained, scheduler.num_waiting) == (0, 2, 1)
    finish(scheduler, device)
    assert scheduler.stats.num_shared_tokens == 8


def test_pages_taken_by_others():
    scheduler, _ = make(2)
    scheduler.add([1] * 5, 1)
    taken = scheduler.pool.allocate(8)
    with pytest.raises(MemoryError, match="0 of 2 pages are free and no request runs on"):
        scheduler.schedule()
    scheduler.pool.free(taken)
    assert scheduler.schedule() is not None


# Shared prefixes.


@pytest.mark.parametrize(("length", "shared"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (15, 12)])
def test_a_prompt_shares_its_whole_pages_and_leaves_a_token(length, shared):
    scheduler, device = make(20)
    scheduler.add([1] * 13, 1)
    finish(scheduler, device)
    assert scheduler.num_retained == 3
    again = scheduler.add([1] * length, 2)
    step = scheduler.schedule()
    assert step is not None
    assert step.context_lens.tolist() == [shared]
    assert step.q_lens.tolist() == [length - shared]
    assert not step.is_decode.any()
    assert scheduler.stats.num_shared_tokens == shared
    scheduler.commit(step, device.run(step))
    assert finish(scheduler, device)[again] == alone([1] * length, 2, None)


def test_equal_pages_after_different_ones_are_not_shared():
    scheduler, device = make(20)
    scheduler.add([0] * 4 + [1] * 5, 1)
    finish(scheduler, device)
    scheduler.add([2] * 4 + [1] * 5, 1)
    finish(scheduler, device)
    assert scheduler.stats.num_shared_tokens == 0


def test_nothing_is_shared_before_it_is_computed():
    scheduler, device = make(20)
    scheduler.add([1] * 8, 4)
    scheduler.add([1] * 8, 4)
    step, _ = run_step(scheduler, device)
    assert step.context_lens.tolist() == [0, 0]
    assert np.unique(step.page_tables).size == 4
    # Both have computed the same two pages: one copy stays.
    step, _ = run_step(scheduler, device)
    first, second = np.split(step.page_tables, 2)
    np.testing.assert_array_equal(first[:2], second[:2])
    assert first[2] != second[2]
    assert scheduler.pool.num_free == 16


def test_new_tokens_are_shared_too():
    scheduler, device = make(20)
    scheduler.add([1] * 3, 7)
    ((_, tokens),) = finish(scheduler, device).items()
    scheduler.add([1] * 3 + tokens, 1)
    finish(scheduler, device)
    assert scheduler.stats.num_shared_tokens == 8, "the last of ten tokens was never computed"


def test_a_preempted_request_finds_its_own_pages():
    scheduler, device = make(5)
    scheduler.add([0] * 7, 9)
    scheduler.add([1] * 7, 3)
    results = finish(scheduler, device)
    assert results == {0: alone([0] * 7, 9, None), 1: alone([1] * 7, 3, None)}
    assert scheduler.stats.num_preemptions == 1
    assert scheduler.stats.num_shared_tokens > 0


def test_pages_of_a_finished_request_are_not_reused_while_another_reads_them():
    scheduler, device = make(5)
    scheduler.add([1] * 8, 2)
    run_step(scheduler, device)
    reader = scheduler.add([1] * 9, 4)
    step, _ = run_step(scheduler, device)  # the first one ends
    shared = step.page_tables[-3:-1]
    assert scheduler.pool.references(shared).tolist() == [2, 2], "the reader and the prefix cache"
    other = scheduler.add([2] * 5, 4)
    step, _ = run_step(scheduler, device)
    assert step.request_ids == (reader, other)
    assert not set(step.page_tables[-2:]) & set(shared)
    assert finish(scheduler, device) == {reader: alone([1] * 9, 4, None), other: alone([2] * 5, 4, None)}


def test_the_least_recently_used_prefix_is_evicted_last_page_first():
    scheduler, device = make(6)

    def shared_by(prompt: list[int]) -> int:
        before = scheduler.stats.num_shared_tokens
        scheduler.add(prompt, 1)
        finish(scheduler, device)
        return scheduler.stats.num_shared_tokens - before

    assert shared_by([0] * 8) == 0
    assert shared_by([1] * 8) == 0
    assert shared_by([0] * 5) == 4  # the first page of the first prefix is used once more
    assert (scheduler.num_retained, scheduler.pool.num_free) == (4, 2)
    assert shared_by([2] * 12) == 0
    # Evicted was the second page of the first prefix: its last use is the longest ago.
    assert (scheduler.stats.num_evictions, scheduler.num_retained) == (1, 6)
    scheduler.add([0] * 8 + [1], 1)
    step = scheduler.schedule()
    assert step is not None
    assert step.context_lens.tolist() == [4]
    scheduler.commit(step, device.run(step))
    # Two pages were needed; both of the second prefix, its last one first.
    assert scheduler.stats.num_evictions == 3
    assert shared_by([2] * 12 + [0]) == 12


def test_cache_evicts_children_before_parents_and_keeps_what_is_used():
    pool = PagePool(6, 2)
    cache = PrefixCache(pool)
    text = np.arange(6, dtype=np.int32)
    long, short = [], []
    own = pool.allocate(6)
    np.testing.assert_array_equal(cache.extend(long, text, own), own)
    own = pool.allocate(4)
    np.testing.assert_array_equal(cache.extend(short, text[[0, 1, 4, 5]], own), [long[0].page, own[1]])
    assert short[0] is long[0], "the same tokens after the same tokens"
    assert (cache.num_pages, pool.num_free, cache.num_idle) == (4, 2, 0)
    cache.release(long)
    assert cache.num_idle == 2
    with pytest.raises(ValueError, match="num_pages=3 exceeds the 2 idle pages"):
        cache.evict(3)
    cache.evict(1)
    assert [node.page for node in cache.match(text)] == [node.page for node in long[:2]]
    cache.release(short)
    cache.evict(1)
    assert cache.match(text) == long[:1]
    assert cache.match(text[[0, 1, 4, 5]]) == short
    cache.evict(1)
    assert cache.match(text[[0, 1, 4, 5]]) == long[:1]
    cache.evict(1)
    assert (cache.num_pages, pool.num_free) == (0, 6)


# Bookkeeping.


@pytest.mark.smoke
def test_cancel():
    scheduler, device = make(20, max_seqs=2, share_prefixes=False)
    running, in_flight, waiting = (scheduler.add([i] * 5, 4) for i in range(3))
    run_step(scheduler, device)
    assert scheduler.cancel(waiting) == []
    step = scheduler.schedule()
    assert step is not None
    tokens = device.run(step)
    assert scheduler.cancel(in_flight) == alone([1] * 5, 1, None)
    assert scheduler.commit(step, tokens) == []
    assert scheduler.cancel(running) == alone([0] * 5, 2, None)
    assert scheduler.schedule() is None
    assert (scheduler.pool.num_free, scheduler.num_running, scheduler.num_waiting) == (20, 0, 0)
    with pytest.raises(ValueError, match=r"request_id=0 neither waits nor runs"):
        scheduler.cancel(running)


def test_stop_tokens_and_lengths():
    scheduler, device = make(20)
    text = alone([1, 2], 6, None)
    stopped, long = scheduler.add([1, 2], 6, stop_token_ids=text[:1]), scheduler.add([1, 2], 3)
    _, finished = run_step(scheduler, device)
    assert finished == [Finished(stopped, text[:1], "stop")]
    run_step(scheduler, device)
    _, finished = run_step(scheduler, device)
    assert finished == [Finished(long, text[:3], "length")]


def test_one_step_at_a_time_in_order():
    scheduler, device = make(20)
    scheduler.add([1, 2], 6)
    first = scheduler.schedule()
    assert first is not None
    with pytest.raises(RuntimeError, match="step 0 has not been committed; call commit first"):
        scheduler.schedule()
    scheduler.commit(first, device.run(first))
    with pytest.raises(ValueError, match="step 0 cannot be committed: no step is due"):
        scheduler.commit(first, [1])
    second = scheduler.schedule()
    assert second is not None
    with pytest.raises(ValueError, match="step 0 cannot be committed: step 1 is due"):
        scheduler.commit(first, [1])
    scheduler.commit(second, device.run(second))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1], r"token_ids has shape \(1,\) and dtype int64; expected one integer for each of the 2 rows"),
        ([1.0, 2.0], "dtype float64; expected one integer"),
        ([1, -1], r"token_ids\[1\]=-1 is no token id"),
        ([VOCAB, 0], r"token_ids\[0\]=3 is no token id: expected 0 <= id < 3"),
    ],
)
def test_refuses_to_commit(tokens, message):
    scheduler, device = make(20, vocab_size=VOCAB)
    scheduler.add([1], 2)
    scheduler.add([2], 2)
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(ValueError, match=message):
        scheduler.commit(step, tokens)
    assert scheduler.token_ids(0) == []
    scheduler.commit(step, device.run(step))
    assert len(scheduler.token_ids(0)) == 1


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "stop", "message"),
    [
        ([], 1, None, "prompt is empty; give at least one token id"),
        ([0.5], 1, None, r"prompt has shape \(1,\) and dtype float64; expected one axis of integers"),
        ([[1, 2]], 1, None, r"prompt has shape \(1, 2\)"),
        ([[1, 2], [3]], 1, None, "prompt holds rows of different lengths"),
        ([1, -2], 1, None, r"prompt\[1\]=-2 is no token id"),
        ([1, 7], 1, None, r"prompt\[1\]=7 is no token id: expected 0 <= id < 7"),
        ([1], 0, None, "max_new_tokens=0 must be an integer of at least 1"),
        ([1], 1, 7, "stop_token_ids holds 7; expected token ids from 0 to 6"),
        (
            [1] * 5,
            5,
            None,
            "a prompt of 5 tokens and max_new_tokens=5 need 3 pages of 4 tokens, but the .* 2;",
        ),
    ],
)
def test_refuses_to_add(prompt, max_new_tokens, stop, message):
    scheduler, _ = make(2, vocab_size=7)
    with pytest.raises(ValueError, match=message):
        scheduler.add(prompt, max_new_tokens, stop_token_ids=stops(stop))
    assert not scheduler.has_work


def test_a_request_may_fill_the_cache():
    scheduler, device = make(2)
    request = scheduler.add([1] * 5, 4)  # the last new token is never computed
    assert finish(scheduler, device) == {request: alone([1] * 5, 4, None)}


@pytest.mark.parametrize("name", ["token_budget", "max_seqs", "max_chunk", "vocab_size"])
def test_impossible_limits(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be an integer of at least 1"):
        make(2, **{name: 0})
