"""Every field against its definition, written out sequence by sequence in Python."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn import PAD_SLOT, AttentionSpec, Bucket, advance, attention, nest_sequences, prepare_metadata
from jaxattn.consumers import triton_tiling
from jaxattn.fields import MissingFieldError
from jaxattn.schedule import Tiling, schedule_tiles, tile_bound
from jaxattn.spec import WindowClass

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


@settings(max_examples=100)
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


@settings(max_examples=100)
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


def check_tiles(m, visible, tiles, covered):
    live, attending = int(tiles.num_live), int(tiles.num_attending)
    assert (np.asarray(tiles.q_len[live:]) == 0).all()
    for i in range(live):
        tokens = slice(int(tiles.q_start[i]), int(tiles.q_start[i] + tiles.q_len[i]))
        assert 1 <= tokens.stop - tokens.start <= tiles.block_q
        covered[tokens] += 1
        np.testing.assert_array_equal(m.token_to_seq[tokens], tiles.seq[i])
        assert int(tiles.kv_start[i]) == int(visible.kv_start[tokens].min())
        assert int(tiles.kv_end[i]) == int(visible.kv_end[tokens].max())
        assert (int(tiles.seq[i]) == BUCKET.seqs) == (i >= attending)


@settings(max_examples=200)
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


def test_short_and_long_queries_stand_in_their_own_lists():
    batch = nest_sequences([[1] * n for n in (1, 30, 2, 1)], bucket=BUCKET)
    tiling = Tiling(short_q=2, long_q=8)
    zeros = jnp.zeros(40, jnp.int32)
    schedule = schedule_tiles(
        BUCKET, tiling, cu_q_lens=batch.cu_q_lens, kv_start=zeros, kv_end=zeros, max_keys=0, span=None
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


def test_wide_groups_have_one_list():
    spec = AttentionSpec(num_q_heads=128, num_kv_heads=1, head_dim=16)
    assert triton_tiling(spec) == Tiling(1, 1)
    batch = nest_sequences([[1] * 9], bucket=Bucket(16, 2))
    (visible,) = prepare_metadata(batch, spec, consumers="triton").visible
    assert visible.schedules[0].long is None
    assert int(visible.schedules[0].short.num_live) == 16


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
    assert added == len(jax.tree.leaves(m.visible[0]))  # a class adds its ranges and schedules, nothing else


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
    assert elements < 60 * 16384
    cost: Any = lowered.compile().cost_analysis()
    assert cost["flops"] < elements * np.log2(8192)


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
