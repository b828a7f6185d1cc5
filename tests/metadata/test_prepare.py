"""Every field against its definition, written out sequence by sequence in Python."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxattn import AttentionSpec, Bucket, RopeConfig, advance, attention, nest_sequences, prepare_metadata
from jaxattn.batch import PAD_SLOT
from jaxattn.batch.ragged import field_slices, pack_fields
from jaxattn.metadata import Consumer
from jaxattn.metadata.consumers import triton_tiling
from jaxattn.metadata.fields import MissingFieldError
from jaxattn.metadata.rope import rope_tables
from jaxattn.metadata.schedule import (
    TileSchedule,
    Tiling,
    schedule_tiles,
    split_bound,
    tile_bound,
)
from jaxattn.metadata.spec import WindowClass
from jaxattn_kernels.arrays import SplitPlan, Tiles

BUCKET = Bucket(tokens=40, seqs=6, pages=64)
HEADS: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
SPECS = (
    AttentionSpec(**HEADS),
    AttentionSpec(**HEADS, sliding_window=3),
    AttentionSpec(**HEADS, causal=False),
)


@st.composite
def paged_batches(draw):
    """Lengths, contexts, page size and page tables that fit BUCKET."""
    q_lens = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6).filter(lambda lens: sum(lens) <= 40))
    contexts = draw(st.lists(st.integers(0, 20), min_size=len(q_lens), max_size=len(q_lens)))
    page_size = draw(st.sampled_from([4, 5, 16]))
    reserve = draw(st.integers(0, 2))
    counts = [-(-(q + c) // page_size) + reserve for q, c in zip(q_lens, contexts, strict=True)]
    pages = np.random.default_rng(draw(st.integers(0, 9))).permutation(64)[: sum(counts)]
    return q_lens, contexts, page_size, np.split(pages, np.cumsum(counts)[:-1])


def nest(case):
    q_lens, contexts, page_size, tables = case
    return nest_sequences(
        [[1] * n for n in q_lens],
        context_lens=contexts,
        page_tables=tables,
        page_size=page_size,
        bucket=BUCKET,
    )


@pytest.mark.smoke
@given(paged_batches())
def test_fields(case):
    q_lens, contexts, page_size, tables = case
    R, T, n = BUCKET.seqs, BUCKET.tokens, sum(q_lens)
    m = prepare_metadata(nest(case), SPECS)
    kv_lens = [q + c for q, c in zip(q_lens, contexts, strict=True)]
    pad_rows = [0] * (R - len(q_lens))
    tokens = [(s, c + i) for s, (q, c) in enumerate(zip(q_lens, contexts, strict=True)) for i in range(q)]
    live_pages = [-(-kv // page_size) for kv in kv_lens]

    def equal(got, values, padding, length):
        np.testing.assert_array_equal(got, list(values) + [padding] * (length - len(list(values))))

    assert int(m.num_seqs) == len(q_lens)
    assert int(m.num_tokens) == n
    equal(m.kv_lens, kv_lens, 0, R)
    equal(m.context_lens, contexts, 0, R)
    equal(m.cu_q_lens, np.cumsum([0, *q_lens]), n, R + 1)
    equal(m.cu_kv_lens, np.cumsum([0, *kv_lens]), sum(kv_lens), R + 1)
    equal(m.token_to_seq, [s for s, _ in tokens], R, T)
    equal(m.positions, [p for _, p in tokens], 0, T)
    equal(m.logits_indices, np.cumsum(q_lens) - 1, 0, R)
    slots = [int(tables[s][p // page_size]) * page_size + p % page_size for s, p in tokens]
    equal(m.slot_mapping, slots, PAD_SLOT, T)
    equal(m.kv_page_indptr, np.cumsum([0, *live_pages]), sum(live_pages), R + 1)
    equal(
        m.kv_page_list,
        np.concatenate([t[:k] for t, k in zip(tables, live_pages, strict=True)]),
        0,
        BUCKET.pages,
    )
    equal(m.kv_last_page_lens, [(kv - 1) % page_size + 1 for kv in kv_lens] + [1] * len(pad_rows), 1, R)
    for spec, first, end in (
        (SPECS[0], lambda s, p: 0, lambda s, p: p + 1),
        (SPECS[1], lambda s, p: max(0, p - 2), lambda s, p: p + 1),
        (SPECS[2], lambda s, p: 0, lambda s, p: kv_lens[s]),
    ):
        visible = m.visible_keys(spec.window_class)
        equal(visible.kv_start, [first(*t) for t in tokens], 0, T)
        equal(visible.kv_end, [end(*t) for t in tokens], 0, T)


@given(st.data())
def test_phases_are_counted(data):
    """Decodes, fresh prefills, prefills over context: written out."""
    n = data.draw(st.integers(1, 6))
    contexts = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    is_decode = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    batch = nest_sequences(
        [[1]] * n,
        context_lens=contexts,
        page_tables=np.arange(n)[:, None],
        page_size=4,
        is_decode=is_decode,
        bucket=BUCKET,
    )
    m = prepare_metadata(batch, fields=PHASE_FIELDS)
    phases = [0 if decode else (1 if c == 0 else 2) for decode, c in zip(is_decode, contexts, strict=True)]
    np.testing.assert_array_equal(m.request_distribution, np.cumsum([phases.count(g) for g in range(3)]))
    np.testing.assert_array_equal(m.is_decode[:n], is_decode)
    np.testing.assert_array_equal(m.has_initial_state, [c > 0 for c in contexts] + [False] * (6 - n))


PHASE_FIELDS = ("request_distribution", "is_decode", "has_initial_state")


@pytest.mark.smoke
def test_state_slots_default_to_rows_and_padding_has_none():
    np.testing.assert_array_equal(
        prepare_metadata(nest_sequences([[1]] * 2, bucket=BUCKET)).state_slots, [0, 1] + [PAD_SLOT] * 4
    )
    batch = nest_sequences([[1]] * 2, state_slots=[7, 3], bucket=BUCKET)
    np.testing.assert_array_equal(prepare_metadata(batch).state_slots, [7, 3] + [PAD_SLOT] * 4)


@given(st.data())
def test_cascade_groups_rows_with_common_leading_pages(data):
    """Against a definition in Python: neighbours are grouped while they share a whole cached page."""
    page_size, n = 2, data.draw(st.integers(1, 6))
    tables, contexts, fresh = [], [], iter(range(20, 60))
    for _ in range(n):
        shared = data.draw(st.sampled_from([(), (0,), (0, 1), (0, 1, 2), (5, 6)]))
        context = data.draw(st.integers(len(shared) * page_size, 8))
        own = -(-(context + 1) // page_size) - len(shared)
        tables.append([*shared, *itertools.islice(fresh, own)])
        contexts.append(context)
    batch = nest_sequences(
        [[1]] * n,
        context_lens=contexts,
        page_tables=tables,
        page_size=page_size,
        share_prefixes=True,
        bucket=BUCKET,
    )
    cascade = prepare_metadata(batch, fields=("cascade",)).cascade
    groups: list[list[int]] = []
    lengths: list[int] = []
    for row in range(n):
        common = 0
        if row:
            pairs = zip(tables[row], tables[row - 1], strict=False)
            common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
            common = min(common, contexts[row] // page_size, contexts[row - 1] // page_size)
        if common:
            lengths[-1] = min(lengths[-1], common) if len(groups[-1]) > 1 else common
            groups[-1].append(row)
        else:
            groups.append([row])
            lengths.append(0)
    R, g = BUCKET.seqs, len(groups)
    assert int(cascade.num_groups) == g
    of_row = [i for i, rows in enumerate(groups) for _ in rows]
    np.testing.assert_array_equal(cascade.group_of_seq, of_row + [R] * (R - n))
    np.testing.assert_array_equal(cascade.first_seq, [rows[0] for rows in groups] + [R] * (R - g))
    np.testing.assert_array_equal(cascade.prefix_lens, [page_size * c for c in lengths] + [0] * (R - g))
    ends = np.cumsum([0] + [len(rows) for rows in groups])
    np.testing.assert_array_equal(cascade.cu_group_q_lens, list(ends) + [n] * (R - g))


@given(paged_batches(), st.sampled_from([None, 1, 3, 7]), st.sampled_from([1, 3, 16]))
def test_split_plan_covers_every_key_once(case, window, split_keys):
    """Law 6 for split-KV: the units of a tile cut its keys at multiples of `split_keys`."""
    spec = AttentionSpec(**HEADS, sliding_window=window)
    tiling = Tiling(short_q=2, long_q=8, split_keys=split_keys)
    m = prepare_metadata(
        nest(case), spec, consumers=Consumer("s", frozenset({"schedules"}), lambda _: tiling)
    )
    schedule = m.visible[0].schedule(tiling)
    assert schedule.long is not None
    assert schedule.long.split is None
    tiles, split = schedule.short, schedule.short.split
    assert split is not None
    indptr = np.asarray(split.indptr)
    units = split.tile.shape[0]
    assert indptr[-1] <= units
    np.testing.assert_array_equal(split.tile[indptr[-1] :], tiles.seq.shape[0])
    np.testing.assert_array_equal(split.kv_start[indptr[-1] :], 0)
    np.testing.assert_array_equal(split.kv_end[indptr[-1] :], 0)
    for w in range(tiles.seq.shape[0]):
        mine = range(int(indptr[w]), int(indptr[w + 1]))
        start, end = int(tiles.kv_start[w]), int(tiles.kv_end[w])
        assert (len(mine) > 0) == (w < int(tiles.num_live))
        at = start
        for unit in mine:
            assert int(split.tile[unit]) == w
            assert int(split.kv_start[unit]) == at or end == start
            at = int(split.kv_end[unit])
            assert at == end or at % split_keys == 0
            assert at - int(split.kv_start[unit]) <= split_keys
        assert not mine or at == end


def schedule_of(batch, tiling: Tiling) -> TileSchedule:
    consumer = Consumer("s", frozenset({"schedules"}), lambda _: tiling)
    return prepare_metadata(batch, SPECS[0], consumers=consumer).visible[0].schedule(tiling)


def test_split_plan_of_a_full_decode_step():
    """Where no tile is dead, the last tile's units are units too."""
    batch = nest_sequences(
        [[1], [1]], context_lens=[3, 2], page_tables=[[0], [1]], page_size=4, bucket=Bucket(2, 2, 2, 1)
    )
    split = schedule_of(batch, Tiling(short_q=1, long_q=8, split_keys=2)).short.split
    assert split is not None
    np.testing.assert_array_equal(split.indptr, [0, 2, 4])
    np.testing.assert_array_equal(split.tile, [0, 0, 1, 1, 2, 2])  # 2 tiles, and 8 keys in the pages
    np.testing.assert_array_equal(split.kv_start, [0, 2, 0, 2, 0, 0])
    np.testing.assert_array_equal(split.kv_end, [2, 4, 2, 3, 0, 0])


@pytest.mark.parametrize(("max_q_len", "has_split"), [(1, True), (2, True), (3, False), (12, False)])
def test_only_short_queries_are_split(max_q_len, has_split):
    batch = nest_sequences([[1]], bucket=Bucket(12, 4, max_q_len=max_q_len))
    schedule = schedule_of(batch, Tiling(short_q=2, long_q=2, split_keys=4))
    assert schedule.long is None
    assert (schedule.short.split is not None) == has_split


def test_split_bound_is_tight():
    assert split_bound(3, 100, 10, None, 1) == 13  # a sequence of 100 keys, and two without
    assert split_bound(3, 1000, 10, 1, 1) == 3  # one key lies in one unit
    assert split_bound(3, 1000, 10, 2, 1) == 6  # two may lie on both sides of a cut
    assert split_bound(3, 20, 10, 2, 1) == 5  # no more than without a window


def test_longest_tiles_first():
    batch = nest_sequences([[1] * 2, [1] * 5, [1], [1] * 2], bucket=BUCKET)
    schedule = schedule_of(batch, Tiling(1, 2, longest_first=True))
    assert schedule.short.order is None, "a short query has one tile"
    assert schedule.long is not None
    assert schedule.long.order is not None
    # Tiles 1, 2, 3 are of the second sequence and end with keys 2, 4, 5; after 4 come those of padding.
    np.testing.assert_array_equal(schedule.long.order[:5], [3, 2, 0, 1, 4])
    live = np.arange(len(schedule.long.seq)) < schedule.long.num_live
    keys = np.where(live, schedule.long.kv_end - schedule.long.kv_start, -1)
    assert (np.diff(keys[schedule.long.order]) <= 0).all()


def test_page_indices_hold_the_pages_with_keys():
    batch = nest_sequences([[1] * 5, [1]], page_tables=[[3, 9, 8], [4, 5]], page_size=4, bucket=BUCKET)
    m = prepare_metadata(batch, max_pages_per_seq=4)
    np.testing.assert_array_equal(m.page_indices, [[3, 9, 0, 0], [4, 0, 0, 0]] + [[0] * 4] * 4)


def test_what_stands_past_the_listed_pages_is_never_read():
    """A batch built on the device may hold anything there."""
    batch = nest_sequences([[1] * 5, [1]], page_tables=[[3, 9, 8], [4, 5]], page_size=4, bucket=BUCKET)
    listed = batch.page_list.at[5:].set(77)
    fields = {name: getattr(batch, name) for name in field_slices(BUCKET)}
    m = prepare_metadata(pack_fields(BUCKET, 4, **{**fields, "page_list": listed}), max_pages_per_seq=4)
    np.testing.assert_array_equal(m.kv_page_list, [3, 9, 4] + [0] * 61)
    np.testing.assert_array_equal(m.page_indices, [[3, 9, 0, 0], [4, 0, 0, 0]] + [[0] * 4] * 4)


def test_one_rope_table_per_base_and_width():
    local, far = RopeConfig(), RopeConfig(theta=1e6)
    specs = [
        AttentionSpec(**HEADS, rope=local, sliding_window=3),
        AttentionSpec(**HEADS, rope=far),
        AttentionSpec(**HEADS, rope=local, logits_soft_cap=3.0),
        AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=8, rope=far),
    ]
    m = prepare_metadata(nest_sequences([[1] * 9], bucket=BUCKET), specs)
    assert len(m.rope_tables) == 3
    assert m.rope(specs[2]) is m.rope(specs[0])
    for spec in specs:
        assert spec.rope is not None
        expected = rope_tables(spec.rope, spec.head_dim, m.positions)
        np.testing.assert_allclose(m.rope(spec).cos, expected.cos, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(m.rope(spec).sin, expected.sin, rtol=1e-6, atol=1e-6)
    with pytest.raises(MissingFieldError, match="'rope_tables' has none for rope=None"):
        m.rope(AttentionSpec(**HEADS))


@given(paged_batches())
def test_every_token_stands_in_one_tile(case):
    """Law 6, with the ranges that a tile needs; padding tokens have tiles without keys, last."""
    m = prepare_metadata(nest(case), SPECS)
    for spec in SPECS:
        visible = m.visible_keys(spec.window_class)
        for schedule in visible.schedules:
            covered = np.zeros(BUCKET.tokens, int)
            for tiles in schedule.lists:
                check_tiles(m, visible, tiles, covered)
            np.testing.assert_array_equal(covered, 1)


@pytest.mark.parametrize("bucket", [Bucket(8, 8, 16, max_q_len=1), Bucket(13, 8, 16, max_q_len=1)])
@given(st.integers(1, 8), st.lists(st.booleans(), min_size=8, max_size=8), st.sampled_from([1, 3, 4, 20]))
def test_every_token_of_a_decode_step_stands_in_one_tile(bucket, n, goes_on, short_q):
    """The same where tiles are not searched for, with rows that are quiet."""
    pages = {"page_tables": np.arange(n)[:, None], "page_size": 16}
    batch = nest_sequences([[1]] * n, context_lens=[*range(1, n + 1)], **pages, bucket=bucket)
    batch = advance(batch, jnp.zeros(8, jnp.int32), q_lens=jnp.array(goes_on, jnp.int32), bucket=bucket)
    consumer = Consumer("c", frozenset(), DECODE_TILINGS[short_q])
    m = prepare_metadata(batch, SPECS[1], consumers=consumer, fields=("token_to_seq", "schedules", *RANGES))
    (visible,) = m.visible
    (schedule,) = visible.schedules
    covered = np.zeros(bucket.tokens, int)
    check_tiles(m, visible, schedule.short, covered)
    np.testing.assert_array_equal(covered, 1)
    assert schedule.long is None
    assert int(schedule.short.num_attending) == sum(goes_on[:n])


RANGES = ("kv_start", "kv_end")
DECODE_TILINGS = {q: functools.partial(lambda spec, q: Tiling(q, 64), q=q) for q in (1, 3, 4, 20)}


def check_tiles(m, visible, tiles, covered):
    live, attending = int(tiles.num_live), int(tiles.num_attending)
    for name in ("seq", "q_start", "q_len", "kv_start", "kv_end"):  # dead tiles are safe to gather with
        np.testing.assert_array_equal(getattr(tiles, name)[live:], 0)
    for i in range(live):
        tokens = slice(int(tiles.q_start[i]), int(tiles.q_start[i] + tiles.q_len[i]))
        assert 1 <= tokens.stop - tokens.start <= tiles.block_q
        covered[tokens] += 1
        np.testing.assert_array_equal(m.token_to_seq[tokens], tiles.seq[i])
        assert int(tiles.kv_start[i]) == int(visible.kv_start[tokens].min())
        assert int(tiles.kv_end[i]) == int(visible.kv_end[tokens].max())
        assert (int(tiles.seq[i]) == m.bucket.seqs) == (i >= attending)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 60))
def test_tile_bound(q_lens, min_q, slack):
    block_q = 2 * min_q + 3
    q_lens = [n for n in q_lens if n >= min_q]
    tiles = sum(-(-n // block_q) for n in q_lens)
    assert tiles <= tile_bound(sum(q_lens) + slack, len(q_lens), block_q, min_q)


def test_tile_bound_is_tight():
    assert tile_bound(64, 64, 16) == 64  # decode: one tile per token
    assert tile_bound(1024, 1, 64) == 16  # one long query
    assert tile_bound(1000, 1, 64) == 16


@pytest.mark.parametrize(
    ("bucket", "tiling", "short", "long"),
    [
        (Bucket(40, 6), Tiling(4, 4), 7 + 33 // 4, None),
        (Bucket(40, 6), Tiling(2, 8), 7, 7 + 19 // 6),  # a long query has three tokens or more
        (Bucket(40, 6, max_q_len=2), Tiling(2, 8), 7 + 33 // 2, None),
        (Bucket(6, 6, max_q_len=1), Tiling(2, 8), 6, None),
        (Bucket(9, 6, max_q_len=1), Tiling(2, 8), 7 + 2 // 2, None),
    ],
)
def test_a_schedule_has_room_for_the_most_tiles_and_no_more(bucket, tiling, short, long):
    schedule = schedule_of(nest_sequences([[1]], bucket=bucket), tiling)
    assert schedule.short.seq.shape == (short,)
    assert (None if schedule.long is None else schedule.long.seq.shape) == (long and (long,))


@pytest.mark.parametrize("kind", [Tiles, TileSchedule, SplitPlan])
def test_schedules_are_immutable(kind):
    instance, first = object.__new__(kind), dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(instance, first, None)
    assert not hasattr(instance, "__dict__")
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        kind(None)


def test_short_and_long_queries_stand_in_their_own_lists():
    batch = nest_sequences([[1] * n for n in (1, 30, 2, 1)], bucket=BUCKET)
    tiling = Tiling(short_q=2, long_q=8)
    zeros = jnp.zeros(40, jnp.int32)
    schedule = schedule_tiles(
        BUCKET,
        tiling,
        cu_q_lens=batch.cu_q_lens,
        token_to_seq=zeros,
        kv_start=zeros,
        kv_end=zeros,
        max_keys=0,
        span=None,
    )
    assert schedule.long is not None
    np.testing.assert_array_equal(schedule.short.seq[:3], [0, 2, 3])
    np.testing.assert_array_equal(schedule.long.seq[:4], [1, 1, 1, 1])
    np.testing.assert_array_equal(schedule.long.seq[4:5], [BUCKET.seqs])  # six padding tokens


def test_a_decode_bucket_has_no_long_list_and_a_tile_per_token():
    batch = nest_sequences([[1]] * 3, bucket=Bucket(8, 8, max_q_len=1))
    for schedule in prepare_metadata(batch, SPECS[0]).visible[0].schedules:
        assert schedule.long is None
        assert schedule.short.q_len.shape == (8,)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("num_q_heads", "window", "tiling"),
    [
        (8, None, Tiling(2, 8, 512, True)),
        (1, None, Tiling(16, 64, 512, True)),
        (128, None, Tiling(1, 2, 512, True)),  # however wide a group: one token, or more than one
        (8, 511, Tiling(2, 8, None, True)),  # all that the two tokens see fits one unit
        (8, 512, Tiling(2, 8, 512, True)),
    ],
)
def test_tiles_of_the_tensor_cores(num_q_heads, window, tiling):
    spec = AttentionSpec(num_q_heads=num_q_heads, num_kv_heads=1, head_dim=16, sliding_window=window)
    assert triton_tiling(spec) == tiling


def test_without_longer_tiles_there_is_one_list():
    batch = nest_sequences([[1] * 9], bucket=Bucket(16, 2))
    schedule = schedule_of(batch, Tiling(1, 1))
    assert schedule.long is None
    assert int(schedule.short.num_live) == 16


def test_equal_window_classes_are_shared():
    specs = [
        AttentionSpec(**HEADS),
        AttentionSpec(**HEADS, sliding_window=3),
        AttentionSpec(**HEADS, scale=1.0),
    ]
    batch = nest_sequences([[1] * 9], bucket=BUCKET)
    m = prepare_metadata(batch, specs)
    assert [v.window_class for v in m.visible] == [WindowClass(), WindowClass(sliding_window=3)]
    more = prepare_metadata(batch, [*specs, AttentionSpec(**HEADS, sliding_window=5)])
    added = len(jax.tree.leaves(more)) - len(jax.tree.leaves(m))
    assert added == len(jax.tree.leaves(m.visible[1]))  # a class adds its ranges and schedules, nothing else


def test_unpaged_batches_have_no_slots():
    m = prepare_metadata(nest_sequences([[1] * 9], bucket=BUCKET), SPECS)
    for name in ("slot_mapping", "kv_page_list"):
        with pytest.raises(MissingFieldError, match=f"{name}.*needs a batch nested with page_tables"):
            m[name]


def test_a_token_past_the_reserved_pages_has_no_slot():
    batch = nest_sequences([[1] * 4], page_tables=[[5]], page_size=4, bucket=Bucket(4, 1, 2))
    m = prepare_metadata(advance(batch, jnp.zeros(1, jnp.int32)), SPECS)
    np.testing.assert_array_equal(m.slot_mapping, [PAD_SLOT])


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
def test_a_sequence_past_its_pages_sees_no_other_sequence(implementation):
    tables = {"page_tables": [[0], [1]], "page_size": 2, "num_pages": 2}
    batch = nest_sequences([[1, 1], [1]], **tables, bucket=Bucket(4, 2, 2))
    batch = advance(batch, jnp.zeros(2, jnp.int32))  # the first sequence has no room for it
    m = prepare_metadata(batch, SPECS[0])
    np.testing.assert_array_equal(m.kv_page_indptr, [0, 1, 2])
    q, k = jnp.ones((2, 4, 16)), jnp.zeros((2, 2, 2, 16))
    v = jnp.stack([jnp.full((2, 2, 16), 3.0), jnp.full((2, 2, 16), 5.0)])  # a value per sequence
    out = attention(q, k, v, m, SPECS[0], implementation=implementation)
    np.testing.assert_allclose(out[0], 3.0)
    np.testing.assert_allclose(out[1], 5.0)


@pytest.mark.parametrize("consumers", ["xla", iter(["xla"])])
def test_every_spec_gets_the_schedules_asked_for(consumers):
    m = prepare_metadata(nest_sequences([[1]]), SPECS, consumers=consumers)
    assert [len(visible.schedules) for visible in m.visible] == [1, 1, 1]


def test_unknown_consumer():
    with pytest.raises(ValueError, match="unknown consumer 'flash'; use reference, xla"):
        prepare_metadata(nest_sequences([[1]]), SPECS, consumers=("flash",))


def test_quiet_rows_are_gather_safe():
    batch = nest_sequences([[1] * 3, [1] * 2], page_tables=[[0], [1]], page_size=8, bucket=BUCKET)
    quiet = advance(batch, jnp.zeros(6, jnp.int32), q_lens=jnp.array([0, 1, 1, 1, 1, 1]))
    m = prepare_metadata(quiet, SPECS)
    np.testing.assert_array_equal(m.logits_indices, [0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(m.kv_lens[:2], [3, 3])
    assert int(m.num_tokens) == 1


def test_thousands_of_tiny_sequences():
    """Law 12: 8,192 sequences of one or two tokens; the arrays stay linear in their number."""
    lens = np.random.default_rng(0).integers(1, 3, 8192)
    batch = nest_sequences(np.ones(lens.sum(), int), q_lens=lens, bucket=Bucket(16384, 8192))
    lowered = jax.jit(lambda b: prepare_metadata(b, SPECS)).lower(batch)
    m = prepare_metadata(batch, SPECS)
    np.testing.assert_array_equal(np.bincount(m.token_to_seq, minlength=8193)[:8192], lens)
    elements = sum(x.size for x in jax.tree.leaves(m))
    assert elements < 75 * 16384
    cost: Any = lowered.compile().cost_analysis()
    assert cost["flops"] < 16 * elements  # log2(8192) is 13, and 8192 what N² would take


def test_metadata_is_computed_once_however_many_layers_read_it():
    """Law 9: each further layer adds its own instructions, and none of the metadata's."""

    def index_instructions(num_layers: int) -> int:
        def model(batch, x):
            for _ in range(num_layers):
                m = prepare_metadata(batch, SPECS[0])  # written once per layer on purpose
                x = jnp.tanh(x + m.slot_mapping.astype(jnp.float32))
            return x

        hlo = jax.jit(model).lower(batch, jnp.ones(40)).compile().as_text() or ""
        return sum(" = s32[" in line for line in hlo.splitlines())

    batch = nest_sequences([[1] * 9], page_tables=[[0, 1]], page_size=8, bucket=BUCKET)
    assert index_instructions(10) == index_instructions(1) > 0
