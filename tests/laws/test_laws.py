"""The laws of the design as properties, on every implementation that runs on a CPU.

Each law is written once and tested twice: with some examples, and with 5,000 under the `slow` marker.
The Triton kernel runs in Pallas's interpreter. Where a law says "no bit", it is claimed for `xla` and
`triton`; the reference sums over one key axis of all sequences, and is held to rounding there.

Elsewhere: law 9 (the compiled program holds each computation once, and is never dearer than a
specialised one) in `metadata/test_never_dearer.py`, law 10 (exports and imports) in
`interop/test_conventions.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import (
    BIT_EXACT,
    BUCKET,
    CORRUPTIONS,
    DECODE,
    GQA,
    INT32_MAX,
    LARGER,
    MHA,
    MQA,
    NUM_PAGES,
    PAGE_SIZE,
    POISONS,
    SELF_ONLY,
    SPECS,
    SPECULATIVE,
    TWO_SIDED,
    UNPAGED,
    VOCAB_SIZE,
    WINDOW,
    Case,
    assert_right,
    assert_same_bits,
    attend,
    attend_case,
    cases,
    law,
    lay_out,
    pack,
    prompts,
    tiles_for,
    write,
)
from hypothesis import example
from hypothesis import strategies as st
from jax.experimental import checkify
from oracle import Problem

from jaxattn import (
    AttentionSpec,
    Bucket,
    PagedKVCache,
    RaggedBatch,
    advance,
    attention,
    nest_sequences,
    prepare_metadata,
)
from jaxattn.batch import check_batch
from jaxattn.batch.ragged import field_slices
from jaxattn.metadata import Consumer
from jaxattn.metadata.schedule import Tiling, split_bound
from jaxattn.metadata.superset import METADATA_FIELDS
from jaxattn.metadata.visible import VISIBLE_FIELDS
from jaxattn_kernels.arrays import SplitPlan, Tiles

UNSEEN = 1e30
"""Finite, since a tile multiplies it by the weight 0."""

advance_in_jit = jax.jit(advance, static_argnames="bucket")


def assert_solves(got: np.ndarray, problem: Problem, spec: AttentionSpec) -> None:
    assert_right(got, problem.q, problem.k, problem.v, spec)


def assert_equal(
    implementation: str, got: np.ndarray, expected: np.ndarray, problem: Problem | Texts, spec: AttentionSpec
) -> None:
    """The same bits where they are promised; of the reference, the solution of the same problem."""
    if implementation in BIT_EXACT:
        assert_same_bits(got, expected)
    else:
        assert_right(got, problem.q, problem.k, problem.v, spec)


# Law 1


@pytest.mark.smoke
@law(case=cases(), poison=st.sampled_from(POISONS))
@example(  # a larger bucket moved the reference's rounding by more than four units in the last place
    case=Case(
        (1, 1, 5, 12),
        (0, 0, 16, 20),
        ((2,), (1,), (15, 7, 23, 31, 12, 14), (29, 25, 18, 21, 16, 24, 9, 26)),
        seed=62132,
    ),
    poison=np.nan,
)
def test_law_1_padding_changes_nothing(implementation: str, case: Case, poison: float):
    """A larger bucket, a larger cache, and poison wherever nothing lies: the same rows, zeros after them."""
    spec, problem, n = WINDOW, case.problem(WINDOW), case.num_tokens
    clean = attend_case(implementation, spec, case, problem, fill=0)
    poisoned = attend_case(implementation, spec, case, problem, fill=poison)
    larger = attend_case(
        implementation, spec, case, problem, bucket=LARGER, fill=poison, num_pages=NUM_PAGES + 9
    )
    assert_same_bits(poisoned, clean)
    assert_equal(implementation, larger[:n], clean[:n], problem, spec)
    for out in (clean, larger):
        assert_same_bits(out[n:], np.zeros_like(out[n:]))


# Law 2


def reorder(problem: Problem, order: list[int]) -> Problem:
    return dataclasses.replace(
        problem, **{name: [getattr(problem, name)[i] for i in order] for name in ("q", "k", "v")}
    )


@law(case=cases(min_seqs=2), spec=st.sampled_from(SPECS))
def test_law_2_permuting_sequences_permutes_outputs(implementation: str, case: Case, spec: AttentionSpec):
    problem = case.problem(spec)
    order = case.rng().permutation(case.num_seqs).tolist()
    out = attend_case(implementation, spec, case, problem)
    reordered = reorder(problem, order)
    permuted = attend_case(implementation, spec, case.take(order), reordered)[: case.num_tokens]
    expected = np.concatenate([out[case.token_rows[i]] for i in order])
    assert_equal(implementation, permuted, expected, reordered, spec)


@law(case=cases(), spec=st.sampled_from(SPECS))
def test_law_2_permuting_pages_changes_nothing(implementation: str, case: Case, spec: AttentionSpec):
    problem = case.problem(spec)
    new_name = case.rng().permutation(NUM_PAGES)
    renamed = dataclasses.replace(
        case, tables=tuple(tuple(new_name[list(table)].tolist()) for table in case.tables)
    )
    assert_same_bits(
        attend_case(implementation, spec, renamed, problem), attend_case(implementation, spec, case, problem)
    )


# Law 3


@pytest.mark.smoke
@law(case=cases(), spec=st.sampled_from(SPECS))
def test_law_3_is_dense_attention_of_each_sequence(implementation: str, case: Case, spec: AttentionSpec):
    problem = case.problem(spec)
    assert_solves(attend_case(implementation, spec, case, problem)[: case.num_tokens], problem, spec)


@law(case=prompts(), spec=st.sampled_from([WINDOW, TWO_SIDED]))
def test_law_3_paged_is_unpaged(implementation: str, case: Case, spec: AttentionSpec):
    """Both are attention of each sequence; the unpaged outputs' padding is zero, too."""
    problem, n = case.problem(spec), case.num_tokens
    paged, unpaged = (
        attend_case(implementation, spec, case, problem, bucket=bucket) for bucket in (BUCKET, UNPAGED)
    )
    assert_solves(paged[:n], problem, spec)
    assert_solves(unpaged[:n], problem, spec)
    assert_same_bits(unpaged[n:], np.zeros_like(unpaged[n:]))


@law(case=cases())
def test_law_3_grouped_heads_are_repeated_heads(implementation: str, case: Case):
    """GQA is MHA with every key head repeated; MQA is GQA whose key heads are all the same."""
    n = case.num_tokens
    grouped, single = case.problem(GQA), case.problem(MQA)

    def repeated(problem: Problem, times: int) -> Problem:
        k, v = ([np.repeat(x, times, axis=1) for x in rows] for rows in (problem.k, problem.v))
        return dataclasses.replace(problem, k=k, v=v)

    for few, problem, many in ((GQA, grouped, MHA), (MQA, single, GQA)):
        wide = repeated(problem, many.num_kv_heads // few.num_kv_heads)
        for spec, each in ((few, problem), (many, wide)):
            assert_solves(attend_case(implementation, spec, case, each)[:n], problem, few)


# Law 4


class Texts(NamedTuple):
    """Queries, keys and values of whole sequences, token by token."""

    q: list[np.ndarray]
    k: list[np.ndarray]
    v: list[np.ndarray]

    @classmethod
    def draw(cls, lens: list[int], spec: AttentionSpec, seed: int) -> Texts:
        problem = Case(tuple(lens), (0,) * len(lens), ((),) * len(lens), seed).problem(spec)
        return cls(problem.q, problem.k, problem.v)

    def part(self, i: int, start: int, stop: int) -> Texts:
        """Some tokens of one text."""
        return Texts(*([array[i][start:stop].copy()] for array in self))


def empty_cache(spec: AttentionSpec) -> PagedKVCache:
    pages = np.full((NUM_PAGES, PAGE_SIZE, spec.num_kv_heads, spec.head_dim), np.nan, np.float32)
    return PagedKVCache(k_pages=jnp.asarray(pages), v_pages=jnp.asarray(pages))


def prefilled(texts: Texts, case: Case) -> PagedKVCache:
    """A cache that holds the keys of a case, the first ones of each text."""
    k_pages, v_pages = (
        jnp.asarray(
            lay_out([row[:kv] for row, kv in zip(rows, case.kv_lens, strict=False)], case.tables, np.nan)
        )
        for rows in (texts.k, texts.v)
    )
    return PagedKVCache(k_pages=k_pages, v_pages=v_pages)


def take_step(
    implementation: str, spec: AttentionSpec, batch: RaggedBatch, cache: PagedKVCache, rows: list[Texts]
) -> tuple[list[np.ndarray], PagedKVCache]:
    """Write the step's keys and attend: the outputs of each row. A row is a text of its new tokens alone."""
    q, k, v = (
        pack([getattr(row, name)[0] for row in rows], batch.bucket.tokens, np.nan) for name in ("q", "k", "v")
    )
    cache = write(batch, cache, k, v)
    out = attend(implementation, spec, batch, q, cache.k_pages, cache.v_pages)
    ends = np.cumsum([len(row.q[0]) for row in rows])
    return np.split(out[: ends[-1]], ends[:-1]), cache


CUTS = st.tuples(*[st.frozensets(st.integers(1, 11), max_size=3)] * BUCKET.seqs)


@law(case=prompts(), spec=st.sampled_from([GQA, MQA, WINDOW]), cuts=CUTS)
def test_law_4_chunks_are_one_prefill(
    implementation: str, case: Case, spec: AttentionSpec, cuts: tuple[frozenset[int], ...]
):
    """Each sequence prefilled in chunks of its own, through the cache: the same outputs, the same cache."""
    texts = Texts.draw(list(case.q_lens), spec, case.seed)
    bounds = [[0, *sorted(c for c in cut if c < n), n] for cut, n in zip(cuts, case.q_lens, strict=False)]
    outputs: list[list[np.ndarray]] = [[] for _ in bounds]
    cache = empty_cache(spec)
    for step in range(max(map(len, bounds)) - 1):
        rows = [i for i, bound in enumerate(bounds) if step + 1 < len(bound)]
        chunks = [(bounds[i][step], bounds[i][step + 1]) for i in rows]
        batch = dataclasses.replace(
            case.take(rows),
            q_lens=tuple(stop - start for start, stop in chunks),
            context_lens=tuple(start for start, _ in chunks),
        ).nest()
        new = [texts.part(i, *chunk) for i, chunk in zip(rows, chunks, strict=True)]
        outs, cache = take_step(implementation, spec, batch, cache, new)
        for i, out in zip(rows, outs, strict=True):
            outputs[i].append(out)
    whole = [texts.part(i, 0, n) for i, n in enumerate(case.q_lens)]
    at_once, cache_at_once = take_step(implementation, spec, case.nest(), empty_cache(spec), whole)
    for out in (np.concatenate([np.concatenate(each) for each in outputs]), np.concatenate(at_once)):
        assert_right(out, *texts, spec)
    assert_same_bits(np.asarray(cache.k_pages), np.asarray(cache_at_once.k_pages))
    assert_same_bits(np.asarray(cache.v_pages), np.asarray(cache_at_once.v_pages))


def rows_of(least: int, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    """A number for each row of the bucket."""
    return st.tuples(*[st.integers(least, most)] * BUCKET.seqs)


@jax.jit
def all_metadata(batch: RaggedBatch):
    fields = {*METADATA_FIELDS, *VISIBLE_FIELDS} - {"schedules"}
    return prepare_metadata(batch, WINDOW, fields=fields, max_pages_per_seq=8)


@pytest.mark.smoke
@law(
    case=cases(room_for=12),
    speculative=st.booleans(),
    steps=st.lists(st.tuples(rows_of(1, 3), rows_of(0, 12)), min_size=1, max_size=4),
)
def test_law_4_advancing_is_nesting_again(case: Case, speculative: bool, steps: list[tuple]):
    """Any steps on the device, over any pages: of one token, or of several of which some were accepted."""
    width = 3 if speculative else 1
    bucket = SPECULATIVE if speculative else DECODE
    arguments, rng, n = case.arguments(), case.rng(), case.num_seqs
    batch = again = case.nest()
    q_lens, kv_lens = np.array(case.q_lens), np.array(case.kv_lens)
    for new_lens, accepted in steps:
        tokens = rng.integers(0, VOCAB_SIZE, (BUCKET.seqs, width)).astype(np.int32)
        if speculative:
            new, kept = np.array(new_lens, np.int32), np.array(accepted, np.int32)
            batch = advance_in_jit(batch, tokens, q_lens=new, accepted=kept)
        else:
            new, kept = np.ones(BUCKET.seqs, np.int32), np.full(BUCKET.seqs, INT32_MAX)
            batch = advance_in_jit(batch, tokens[:, 0])
        contexts = kv_lens - q_lens + np.minimum(kept[:n], q_lens)
        q_lens = new[:n]
        kv_lens = contexts + q_lens
        arguments |= {
            "sequences": [row[:length] for row, length in zip(tokens, q_lens, strict=False)],
            "q_lens": None,
            "context_lens": contexts,
            "is_decode": np.ones(n, bool),
        }
        again = nest_sequences(**arguments, bucket=bucket)
        assert batch.bucket == again.bucket
        np.testing.assert_array_equal(batch.packed, again.packed)
    jax.tree.map(np.testing.assert_array_equal, all_metadata(batch), all_metadata(again))


@law(
    case=cases(max_q_len=6, max_context=10, room_for=9),
    drafts=st.lists(st.tuples(rows_of(1, 3), rows_of(0, 3)), min_size=1, max_size=3),
)
def test_law_4_rejected_tokens_leave_no_trace(implementation: str, case: Case, drafts: list[tuple]):
    """Speculative decoding on the device: what was accepted has seen what was accepted, and nothing else."""
    n, texts = case.num_seqs, Texts.draw([kv + 9 for kv in case.kv_lens], WINDOW, case.seed)
    cache, batch, kept = prefilled(texts, case), case.nest(), list(case.kv_lens)
    accepted, outputs = np.full(BUCKET.seqs, INT32_MAX), [[] for _ in range(n)]
    for lens, good in drafts:
        tokens = np.zeros((BUCKET.seqs, 3), np.int32)
        batch = advance_in_jit(batch, tokens, q_lens=np.array(lens, np.int32), accepted=accepted)
        accepted = np.minimum(lens, good).astype(np.int32)
        rows = [texts.part(i, kept[i], kept[i] + lens[i]) for i in range(n)]
        for row, count in zip(rows, accepted, strict=False):
            row.k[0][count:] = row.v[0][count:] = UNSEEN
        outs, cache = take_step(implementation, WINDOW, batch, cache, rows)
        for i, count in enumerate(accepted[:n].tolist()):
            outputs[i].append(outs[i][:count])
            kept[i] += count
    for i, (prompt, end) in enumerate(zip(case.kv_lens, kept, strict=True)):
        if prompt < end:
            keys = texts.part(i, 0, end)
            assert_right(np.concatenate(outputs[i]), [keys.q[0][prompt:]], keys.k, keys.v, WINDOW)


@law(
    case=cases(max_q_len=4, max_context=10, room_for=4),
    stop=st.integers(1, 3),
    retired=st.frozensets(st.integers(1, 3)),
    prompt=st.integers(1, 8),
)
def test_law_4_a_host_stop_changes_nothing(
    implementation: str, case: Case, stop: int, retired: frozenset[int], prompt: int
):
    """Decoding on, against nesting anew where sequences have left and another has come."""
    spec, last, n = WINDOW, 4, case.num_seqs
    texts = Texts.draw([*(kv + last for kv in case.kv_lens), prompt + last], spec, case.seed)

    def decode(batch: RaggedBatch, cache: PagedKVCache, rows: dict[int, int], steps: int):
        """Some steps; `rows` says how many tokens each row's text has in the cache."""
        outputs = []
        for step in range(steps):
            batch = advance_in_jit(batch, np.zeros(BUCKET.seqs, np.int32), bucket=DECODE)
            new = [texts.part(i, start + step, start + step + 1) for i, start in rows.items()]
            outs, cache = take_step(implementation, spec, batch, cache, new)
            outputs.append(dict(zip(rows, outs, strict=True)))
        return batch, cache, outputs

    batch, cache, _ = decode(case.nest(), prefilled(texts, case), dict(enumerate(case.kv_lens)), stop)
    lens = [kv + stop for kv in case.kv_lens]
    _, _, expected = decode(batch, cache, dict(enumerate(lens)), last - stop)

    rows = [i for i in range(n) if i not in retired]
    order, mixed = newcomer_first(case, rows, lens, prompt, last)
    new = [texts.part(i, lens[i], lens[i] + 1) if i < n else texts.part(i, 0, prompt) for i in order]
    outs, new_cache = take_step(implementation, spec, mixed.nest(), cache, new)
    got = [dict(zip(order, outs, strict=True))]
    got += decode(
        mixed.nest(), new_cache, {i: lens[i] + 1 if i < n else prompt for i in order}, last - stop - 1
    )[2]
    for step, (here, there) in enumerate(zip(got, expected, strict=True)):
        for i in rows:
            seen = texts.part(i, 0, lens[i] + step + 1)
            last_token = seen._replace(q=[seen.q[0][-1:]])
            assert_equal(implementation, here[i], there[i], last_token, spec)


def newcomer_first(
    case: Case, rows: list[int], lens: list[int], prompt: int, last: int
) -> tuple[list[int], Case]:
    """The remaining rows with a token each, a new sequence before them where there is room."""
    kept = dataclasses.replace(
        case.take(rows), q_lens=(1,) * len(rows), context_lens=tuple(lens[i] for i in rows)
    )
    owned = {page for table in kept.tables for page in table}
    needed = -(-(prompt + last) // PAGE_SIZE)
    if len(rows) == BUCKET.seqs or len(owned) + needed > BUCKET.pages:
        return rows, kept
    free = tuple(page for page in range(NUM_PAGES) if page not in owned)[:needed]
    return [case.num_seqs, *rows], Case(
        (prompt, *kept.q_lens), (0, *kept.context_lens), (free, *kept.tables), case.seed
    )


# Law 5


@law(case=cases(), spec=st.sampled_from(SPECS), token=st.integers(0, 23))
def test_law_5_a_token_sees_its_own_range_only(
    implementation: str, case: Case, spec: AttentionSpec, token: int
):
    """Everything that one token must not see is replaced: its output keeps its bits."""
    problem, token = case.problem(spec), token % case.num_tokens
    row = next(i for i, tokens in enumerate(case.token_rows) if token < tokens.stop)
    position = case.context_lens[row] + token - case.token_rows[row].start
    end = position + 1 if spec.causal else case.kv_lens[row]
    start = 0 if spec.sliding_window is None else max(0, end - spec.sliding_window)
    # The definition multiplies by every sequence's values, if only by 0; tiles do not touch them.
    of_others = UNSEEN if implementation == "reference" else np.nan

    def hidden(rows: list[np.ndarray]) -> list[np.ndarray]:
        rows = [np.full_like(x, of_others) if i != row else x.copy() for i, x in enumerate(rows)]
        rows[row][:start] = rows[row][end:] = UNSEEN
        return rows

    others = dataclasses.replace(problem, k=hidden(problem.k), v=hidden(problem.v))
    got, expected = (attend_case(implementation, spec, case, each)[token] for each in (others, problem))
    assert_same_bits(got, expected)


@law(case=cases())
def test_law_5_a_window_of_one_is_the_token_itself(implementation: str, case: Case):
    problem = case.problem(SELF_ONLY)
    got = attend_case(implementation, SELF_ONLY, case, problem)[: case.num_tokens]
    own = np.concatenate([v[len(v) - n :] for v, n in zip(problem.v, case.q_lens, strict=True)])
    assert_same_bits(got, np.repeat(own, SELF_ONLY.group_size, axis=1))


@law(case=cases(max_q_len=4, max_context=3))
def test_law_5_a_window_as_long_as_the_sequence_is_none(implementation: str, case: Case):
    assert WINDOW.sliding_window is not None
    assert max(case.kv_lens) <= WINDOW.sliding_window
    problem, n = case.problem(GQA), case.num_tokens
    assert_solves(attend_case(implementation, WINDOW, case, problem)[:n], problem, GQA)


# Law 6

TILINGS = (Tiling(1, 4, 3, True), Tiling(3, 8, 8), Tiling(4, 4, 16, True))
READERS = tuple(
    Consumer(
        f"tiling {i}",
        frozenset({"schedules", "kv_start", "kv_end"}),
        lambda spec, i=i: TILINGS[i],
    )
    for i in range(len(TILINGS))
)
WINDOW_CLASSES = (GQA, WINDOW, TWO_SIDED)


@jax.jit
def all_schedules(batch: RaggedBatch):
    return prepare_metadata(batch, WINDOW_CLASSES, consumers=READERS)


@st.composite
def scheduled(draw: st.DrawFn):
    """A batch in one of several buckets, a layer and a tiling."""
    bucket = draw(st.sampled_from([BUCKET, SPECULATIVE]))
    case = draw(cases(bucket=bucket))
    return bucket, case, draw(st.sampled_from(WINDOW_CLASSES)), draw(st.sampled_from(TILINGS))


@law(drawn=scheduled())
def test_law_6_every_unit_stands_once(drawn: tuple[Bucket, Case, AttentionSpec, Tiling]):
    """Each token in one tile; each tile's keys in units that begin where the one before ends."""
    bucket, case, spec, tiling = drawn
    visible = all_schedules(case.nest(bucket)).visible_keys(spec.window_class)
    start, end = np.asarray(visible.kv_start), np.asarray(visible.kv_end)
    covered = np.zeros(bucket.tokens, int)
    schedule = visible.schedule(tiling)
    for tiles in schedule.lists:
        seq, q_start, q_len, kv_start, kv_end = (
            np.asarray(x) for x in (tiles.seq, tiles.q_start, tiles.q_len, tiles.kv_start, tiles.kv_end)
        )
        live = int(tiles.num_live)
        assert live <= seq.size
        assert (q_len[live:] == 0).all()
        assert live == (q_len > 0).sum()
        assert (tiles.order is not None) == (tiling.longest_first and tiles.split is None)
        if tiles.order is not None:
            order = np.asarray(tiles.order)
            np.testing.assert_array_equal(np.sort(order), np.arange(seq.size))
            np.testing.assert_array_equal(np.sort(order[:live]), np.arange(live))
            assert (np.diff((kv_end - kv_start)[order[:live]]) <= 0).all()
        for w in range(live):
            tokens = slice(q_start[w], q_start[w] + q_len[w])
            covered[tokens] += 1
            assert 1 <= q_len[w] <= tiles.block_q
            row = case.token_rows[seq[w]] if seq[w] < case.num_seqs else slice(case.num_tokens, bucket.tokens)
            assert row.start <= tokens.start
            assert tokens.stop <= row.stop
            assert (kv_start[w], kv_end[w]) == (start[tokens].min(), end[tokens].max())
        if tiles.split is not None:
            check_units(tiles.split, kv_start, kv_end, live)
            assert tiles.split.tile.size == split_bound(
                seq.size,
                bucket.pages * PAGE_SIZE,
                tiles.split.split_keys,
                spec.window_class.span,
                tiles.block_q,
            )
    np.testing.assert_array_equal(covered, 1)


KEY_BLOCKS = (4, 16)
KEY_READERS = tuple(
    Consumer(f"keys {n}", frozenset({"key_tiles", "kv_start", "kv_end"}), key_block=n) for n in KEY_BLOCKS
)


@jax.jit
def all_key_tiles(batch: RaggedBatch):
    return prepare_metadata(batch, WINDOW_CLASSES, consumers=KEY_READERS)


@law(case=cases(), spec=st.sampled_from(WINDOW_CLASSES), block_k=st.sampled_from(KEY_BLOCKS))
def test_law_6_every_key_stands_once_beside_the_queries_that_see_it(
    case: Case, spec: AttentionSpec, block_k: int
):
    """Each key in one tile, and of each tile the queries that see a key of it, no more and no fewer."""
    visible = all_key_tiles(case.nest()).visible_keys(spec.window_class)
    first, last = np.asarray(visible.kv_start), np.asarray(visible.kv_end)
    tiles = visible.key_tiles_of(block_k)
    seq, kv_start, kv_end, q_start, q_end = (
        np.asarray(x) for x in (tiles.seq, tiles.kv_start, tiles.kv_end, tiles.q_start, tiles.q_end)
    )
    live = int(tiles.num_live)
    assert live == sum(-(-n // block_k) for n in case.kv_lens) <= seq.size
    assert (kv_start[live:] == kv_end[live:]).all()
    covered = [np.zeros(n, int) for n in case.kv_lens]
    for w in range(live):
        covered[seq[w]][kv_start[w] : kv_end[w]] += 1
        assert kv_start[w] % block_k == 0
        own = np.zeros(BUCKET.tokens, bool)
        own[case.token_rows[seq[w]]] = True
        sees = np.flatnonzero(own & (first < kv_end[w]) & (kv_start[w] < last))
        np.testing.assert_array_equal(np.arange(q_start[w], q_end[w]), sees)
    for count in covered:
        np.testing.assert_array_equal(count, 1)


def check_units(split: SplitPlan, kv_start: np.ndarray, kv_end: np.ndarray, live: int) -> None:
    tile, start, end, indptr = (
        np.asarray(x) for x in (split.tile, split.kv_start, split.kv_end, split.indptr)
    )
    assert indptr[0] == 0
    assert indptr[-1] <= tile.size
    assert (indptr[live:] == indptr[-1]).all()
    assert (tile[indptr[-1] :] == kv_start.size).all()
    for w in range(live):
        units = slice(indptr[w], indptr[w + 1])
        assert units.start < units.stop
        assert (tile[units] == w).all()
        assert (start[units][0], end[units][-1]) == (kv_start[w], kv_end[w])
        np.testing.assert_array_equal(start[units][1:], end[units][:-1])
        assert (start[units][1:] % split.split_keys == 0).all()
        assert (end[units] - start[units] <= split.split_keys).all()


@law(drawn=scheduled())
def test_law_6_merged_units_are_attention(drawn: tuple[Bucket, Case, AttentionSpec, Tiling]):
    """Partial results of the units, merged by their log-sum-exps as the plan says, against the oracle."""
    bucket, case, spec, tiling = drawn
    visible = all_schedules(case.nest(bucket)).visible_keys(spec.window_class)
    problem = case.problem(spec)
    q = np.concatenate(problem.q).astype(np.float64)
    sees = np.asarray(visible.kv_start), np.asarray(visible.kv_end)
    out = np.full(q.shape, np.nan)
    for tiles in visible.schedule(tiling).lists:
        for w in range(int(tiles.num_attending)):
            seq, first = int(tiles.seq[w]), int(tiles.q_start[w])
            tokens = slice(first, first + int(tiles.q_len[w]))
            k, v = (np.repeat(x[seq].astype(np.float64), spec.group_size, 1) for x in (problem.k, problem.v))
            partial = [
                attend_to_range(q[tokens], k, v, start, stop, sees[0][tokens], sees[1][tokens], spec)
                for start, stop in ranges_of(tiles, w)
            ]
            out[tokens] = merge(*map(np.stack, zip(*partial, strict=True)))
    np.testing.assert_allclose(out, problem.expected(spec), rtol=1e-9, atol=1e-12)


def ranges_of(tiles: Tiles, w: int) -> list[tuple[int, int]]:
    """The key ranges that a tile's keys are divided into."""
    if tiles.split is None:
        return [(int(tiles.kv_start[w]), int(tiles.kv_end[w]))]
    units = range(int(tiles.split.indptr[w]), int(tiles.split.indptr[w + 1]))
    return [(int(tiles.split.kv_start[u]), int(tiles.split.kv_end[u])) for u in units]


def attend_to_range(q, k, v, start: int, stop: int, first, end, spec: AttentionSpec):
    """Attention to some keys of a sequence, and its log-sum-exp. `[q, N, H]` and `[q, N]`."""
    scores = spec.softmax_scale * np.einsum("qnh,knh->qnk", q, k[start:stop])
    if spec.logits_soft_cap is not None:
        scores = spec.logits_soft_cap * np.tanh(scores / spec.logits_soft_cap)
    key = np.arange(start, stop)[None, :]
    sees = (first[:, None] <= key) & (key < end[:, None])
    weights = np.where(sees[:, None, :], np.exp(scores), 0)  # scores of unit normals do not overflow
    total = weights.sum(-1)
    out = np.einsum("qnk,knh->qnh", weights, v[start:stop]) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        return out, np.log(total)


def merge(outs: np.ndarray, lses: np.ndarray) -> np.ndarray:
    weights = np.exp(lses - lses.max(0))
    return (weights[..., None] * outs).sum(0) / weights.sum(0)[..., None]


@law(
    lens=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 3000)), min_size=1, max_size=60),
    split_keys=st.integers(1, 700),
    span=st.none() | st.integers(1, 700),
    block_q=st.integers(1, 32),
)
def test_law_6_units_stay_within_their_bound(
    lens: list[tuple[int, int]], split_keys: int, span: int | None, block_q: int
):
    """Ranges that begin anywhere, of as many keys as a tile can see: the bound of larger batches."""
    units = 0
    for place, kv_len in lens:
        visible = kv_len if span is None else min(kv_len, span + block_q - 1)
        start = place % (kv_len - visible + 1)
        units += -(-(start + visible) // split_keys) - start // split_keys
    assert units <= split_bound(len(lens), sum(n for _, n in lens), split_keys, span, block_q)


# Law 7


@functools.cache
def gradients_of(implementation: str, spec: AttentionSpec) -> Callable[..., tuple[jax.Array, ...]]:
    def go_back(q, k, v, batch, weights):
        with tiles_for(implementation, spec) as consumers:
            metadata = prepare_metadata(batch, spec, consumers=consumers)
            _, back = jax.vjp(
                lambda q, k, v: attention(q, k, v, metadata, spec, implementation=implementation), q, k, v
            )
            return back(weights)

    return jax.jit(go_back)


@pytest.mark.smoke
@pytest.mark.thinned(3)
@law(
    case=cases(),
    spec=st.sampled_from([MQA, WINDOW, TWO_SIDED]),
    paged=st.booleans(),
    poison=st.sampled_from(POISONS),
)
def test_law_7_gradients(implementation: str, case: Case, spec: AttentionSpec, paged: bool, poison: float):
    """Zero and finite for padding, whatever it holds and is handed; else the slope of the dense oracle."""
    if not paged:  # nothing is cached
        case = dataclasses.replace(case, context_lens=(0,) * case.num_seqs)
    bucket, n = BUCKET if paged else UNPAGED, case.num_tokens
    problem, rng = case.problem(spec), case.rng()

    def place(rows: list[np.ndarray], fill: float) -> np.ndarray:
        return lay_out(rows, case.tables, fill) if paged else pack(rows, bucket.tokens, fill)

    weights = rng.standard_normal((bucket.tokens, spec.num_q_heads, spec.head_dim)).astype(np.float32)
    weights[n:] = poison
    q = pack(problem.q, bucket.tokens, poison)
    k, v = (place(rows, poison) for rows in (problem.k, problem.v))
    back = gradients_of(implementation, spec)
    gradients = [np.asarray(g) for g in back(q, k, v, case.nest(bucket), weights)]
    holds_key = place([np.ones((length, 1, 1), np.float32) for length in case.kv_lens], 0)[..., 0, 0] == 1
    holds_query = np.arange(bucket.tokens) < n
    for gradient, holds in zip(gradients, (holds_query, holds_key, holds_key), strict=True):
        assert np.isfinite(gradient).all()
        assert (gradient[~holds] == 0).all()

    direction = dataclasses.replace(case, seed=case.seed + 1).problem(spec)
    along = [pack(direction.q, bucket.tokens, 0), place(direction.k, 0), place(direction.v, 0)]
    products = np.concatenate(
        [(g.astype(np.float64) * d).ravel() for g, d in zip(gradients, along, strict=True)]
    )

    def loss(step: float) -> float:
        moved = [
            [x.astype(np.float64) + step * d for x, d in zip(rows, moves, strict=True)]
            for rows, moves in (
                (problem.q, direction.q), (problem.k, direction.k), (problem.v, direction.v)
            )
        ]  # fmt: skip
        return float((Problem(problem.workload, *moved).expected(spec) * weights[:n]).sum())

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert abs(products.sum() - slope) <= 1e-5 * np.abs(products).sum() + 1e-6


@pytest.mark.thinned(2)
@law(implementations=BIT_EXACT, case=cases(), spec=st.sampled_from([MQA, WINDOW]), place=st.integers(0, 3))
def test_law_7_gradients_have_the_bits_of_the_sequence_alone(
    implementation: str, case: Case, spec: AttentionSpec, place: int
):
    """Company, and a larger bucket, change no bit of a sequence's gradients."""
    place %= case.num_seqs
    problem, back, weights = case.problem(spec), gradients_of(implementation, spec), case.problem(spec).q

    def gradients(rows: list[int], bucket: Bucket) -> list[np.ndarray]:
        batch = case.take(rows)
        q, d_out = (pack([x[i] for i in rows], bucket.tokens, 0) for x in (problem.q, weights))
        k, v = (lay_out([x[i] for i in rows], batch.tables, 0) for x in (problem.k, problem.v))
        return [np.asarray(g) for g in back(q, k, v, batch.nest(bucket), d_out)]

    dq, *of_keys = gradients(list(range(case.num_seqs)), BUCKET)
    dq_alone, *of_keys_alone = gradients([place], LARGER)
    assert_same_bits(dq[case.token_rows[place]], dq_alone[: case.q_lens[place]])
    table = list(case.tables[place])
    for together, alone in zip(of_keys, of_keys_alone, strict=True):
        assert_same_bits(together[table], alone[table])


# Law 8


@law(
    implementations=BIT_EXACT,
    case=cases(),
    others=cases(),
    spec=st.sampled_from(SPECS),
    row=st.integers(0, 3),
    place=st.integers(0, 3),
)
def test_law_8_other_sequences_change_no_bit(
    implementation: str, case: Case, others: Case, spec: AttentionSpec, row: int, place: int
):
    """A row alone, among its neighbours, and among others in another place."""
    row %= case.num_seqs
    alone, problem = case.take([row]), case.problem(spec)
    own = reorder(problem, [row])
    among = attend_case(implementation, spec, case, problem)[case.token_rows[row]]
    assert_same_bits(attend_case(implementation, spec, alone, own)[: alone.num_tokens], among)

    company, place = with_company(alone, others, place)
    strangers = company.problem(spec)
    for name in ("q", "k", "v"):
        getattr(strangers, name)[place] = getattr(own, name)[0]
    changed = attend_case(implementation, spec, company, strangers)[company.token_rows[place]]
    assert_same_bits(changed, among)


def with_company(alone: Case, others: Case, place: int) -> tuple[Case, int]:
    """As many others as fit beside one sequence, and its place among them."""
    rows, tokens, entries = 1, alone.num_tokens, len(alone.tables[0])
    for q_len, table in zip(others.q_lens, others.tables, strict=True):
        tokens, entries = tokens + q_len, entries + len(table)
        if rows == BUCKET.seqs or tokens > BUCKET.tokens or entries > BUCKET.pages:
            break
        rows += 1
    place = min(place, rows - 1)

    def insert(values: tuple, value: Any) -> tuple:
        return (*values[:place], value, *values[place : rows - 1])

    counts = insert(tuple(map(len, others.tables)), len(alone.tables[0]))
    pages = others.rng().permutation(NUM_PAGES)[: sum(counts)].tolist()
    ends = np.cumsum(counts)
    return (
        Case(
            insert(others.q_lens, alone.q_lens[0]),
            insert(others.context_lens, alone.context_lens[0]),
            tuple(tuple(pages[end - count : end]) for end, count in zip(ends, counts, strict=True)),
            others.seed,
        ),
        place,
    )


# Law 11

ONE_TOKEN = Case((1,), (0,), ((1,),))


@jax.jit
def checked(batch: RaggedBatch) -> checkify.Error:
    return checkify.checkify(functools.partial(check_batch, num_pages=NUM_PAGES))(batch)[0]


@law(
    case=cases(min_seqs=2),
    name=st.sampled_from(sorted(CORRUPTIONS)),
    entry=st.integers(0, 63),
    amount=st.integers(1, 8) | st.integers(1, 2**30),
)
def test_law_11_corrupt_input_is_named(case: Case, name: str, entry: int, amount: int):
    """On the host before anything is written; and on the device, where the batch still shows it."""
    check_corruption(case, name, entry, amount)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_law_11_the_smallest_corruption_is_named(name: str):
    check_corruption(Case((1, 3), (0, 4), ((1,), (0, 2))), name, 1, 1)


def check_corruption(case: Case, name: str, entry: int, amount: int) -> None:
    spoil, on_device = CORRUPTIONS[name]
    arguments = case.arguments()
    message = spoil(arguments, entry, amount)
    with pytest.raises((ValueError, TypeError), match=message):
        nest_sequences(**arguments, bucket=BUCKET)
    if on_device:
        corrupt = nest_sequences(**arguments, bucket=BUCKET, validate=False, transfer=False)
        assert checked(corrupt).get() is not None


@law(case=cases())
def test_law_11_valid_input_passes(case: Case):
    arguments = case.arguments()
    batch = nest_sequences(**arguments, bucket=BUCKET)
    unchecked = nest_sequences(**arguments, bucket=BUCKET, validate=False)
    np.testing.assert_array_equal(batch.packed, unchecked.packed)
    checked(batch).throw()


INTERESTING = st.sampled_from([-(2**31), -5, -1, 0, 1, 2, 3, 4, 24, 25, 31, 32, 2**30, 2**31 - 4, 2**31 - 1])


@law(
    case=cases(),
    field=st.sampled_from(sorted(field_slices(BUCKET))),
    entry=st.integers(0, 63),
    value=INTERESTING | st.integers(0, 60),
)
@example(case=ONE_TOKEN, field="kv_lens", entry=0, value=INT32_MAX)
@example(case=ONE_TOKEN, field="state_slots", entry=0, value=INT32_MAX)
@example(case=ONE_TOKEN, field="page_indptr", entry=1, value=INT32_MAX)
def test_law_11_device_checks_are_no_weaker_than_the_hosts(case: Case, field: str, entry: int, value: int):
    """Whatever one number of a packed batch is changed to: what `check_batch` lets pass, the host does."""
    corrupt = with_entry(case.nest(), field, entry, value)
    if checked(corrupt).get() is None:
        nest_again(corrupt)


def with_entry(batch: RaggedBatch, field: str, entry: int, value: int) -> RaggedBatch:
    """The batch with one number changed."""
    packed, place = np.asarray(batch.packed).copy(), field_slices(batch.bucket)[field]
    packed[place.start + entry % (place.stop - place.start)] = value
    return dataclasses.replace(batch, packed=packed)


def nest_again(batch: RaggedBatch) -> None:
    """Nest on the host what a batch says; rows without query tokens, which it does not take, left out."""
    n, cu_q_lens = int(batch.num_seqs), np.asarray(batch.cu_q_lens)
    q_lens, counts = np.diff(cu_q_lens)[:n], np.diff(batch.page_indptr)[:n]
    rows = np.flatnonzero(q_lens)
    if rows.size:
        tables = np.split(np.asarray(batch.page_list)[: counts.sum()], np.cumsum(counts)[:-1])
        nest_sequences(
            np.asarray(batch.token_ids)[: cu_q_lens[n]],
            q_lens=q_lens[rows],
            context_lens=(np.asarray(batch.kv_lens)[:n] - q_lens)[rows],
            page_tables=[tables[row] for row in rows],
            page_size=batch.page_size,
            num_pages=NUM_PAGES,
            state_slots=np.asarray(batch.state_slots)[:n][rows],
            bucket=batch.bucket,
        )


def test_law_11_the_device_sees_keys_that_an_unpaged_batch_cannot_have():
    corrupt = with_entry(ONE_TOKEN.nest(UNPAGED), "kv_lens", 0, 5)
    assert checked(corrupt).get() is not None


def test_law_11_the_device_sees_prefix_sums_that_wrap_around():
    batch = with_entry(ONE_TOKEN.nest(), "page_indptr", 1, INT32_MAX)
    for entry in range(2, BUCKET.seqs + 1):
        batch = with_entry(batch, "page_indptr", entry, -(2**31))
    assert checked(batch).get() is not None


@pytest.mark.parametrize("counts", [[2**63 - 1, 2**63 - 1, 4], [-1, 2, 1]])
@pytest.mark.parametrize("validate", [True, False])
def test_law_11_page_counts_that_only_add_up_by_chance(counts: list[int], validate: bool):
    """Lengths are always checked."""
    with pytest.raises(ValueError, match=r"page_(counts|tables)"):
        nest_sequences(
            [[1]] * 3,
            page_tables=np.array([0, 1]),
            page_counts=np.array(counts),
            page_size=PAGE_SIZE,
            bucket=BUCKET,
            validate=validate,
        )


# Law 12

TINY = (1024, 8192)


def tiny_sequences(n: int, *, transfer: bool = False) -> RaggedBatch:
    """Sequences of one and two tokens, of a page each."""
    lens = 1 + np.arange(n) % 2
    return nest_sequences(
        np.ones(lens.sum(), np.int32),
        q_lens=lens,
        page_tables=np.arange(n)[::-1].copy(),
        page_counts=np.ones(n, int),
        page_size=PAGE_SIZE,
        num_pages=n,
        bucket=Bucket(tokens=2 * n, seqs=n, pages=n),
        transfer=transfer,
    )


def test_law_12_the_device_does_no_more_than_n_log_n():
    """Operations counted by the compiler, and elements held, for 1,024 and for 8,192 tiny sequences."""
    flops, elements = [], []
    for n in TINY:
        lowered = jax.jit(lambda b: prepare_metadata(b, GQA, consumers=("xla", "decoder"))).lower(
            tiny_sequences(n)
        )
        cost: Any = lowered.compile().cost_analysis()
        flops.append(cost["flops"])
        elements.append(sum(x.size for x in jax.tree.leaves(lowered.out_info)))
    few, many = TINY
    assert flops[1] / flops[0] <= many / few * np.log2(many) / np.log2(few)
    assert elements[1] / elements[0] <= many / few


def test_law_12_the_host_makes_no_call_per_sequence():
    """For 8,192 sequences no more calls of Python and of C than for 1,024, but for a few of chance."""
    few, many = (count_calls(functools.partial(tiny_sequences, n)) for n in TINY)
    assert many - few < 50


def count_calls(run: Callable[[], Any]) -> int:
    run()  # fills caches
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls
