"""Bugs that other systems had, one named test each: that ours does not have them.

Numbers are those of the issue or pull request. AutoDeploy is the part of TensorRT-LLM that
`nest_sequences` and `prepare_metadata` come from; "AutoDeploy, hazard n" was found by running its code.

Known bugs without a counterpart here, and why:

- dummy requests that run out, alias live ones or cannot be allocated (TensorRT-LLM 7998, 13278, 16072):
  padding is rows without tokens, and needs neither a request, a page nor a state slot
  (`test_padding_needs_no_page_and_no_state_slot`);
- races of copies between host and device (14714, 14838), stale host mirrors of what the device advanced
  (13135): a batch is one immutable array, and nothing mirrors it;
- captured graphs that are replayed with stale arguments, addresses or plans (sglang 32417,
  TensorRT-LLM 18769): there are none;
- pools per window, page eviction, cyclic tables (13745 in part, 14906 in part): pages are not evicted;
- chunk indices of state-space layers (hazard 8, 12573): there is no such field; the same arithmetic, that
  of segments cut into blocks, is tested on tiles;
- −1 as padding of cuDNN's lengths (jax 30023) and other conventions: `test_exports.py`;
- metadata rebuilt or passed once per layer (tpu-inference 3409, vLLM 53301): `test_never_dearer.py`;
- masks and mask blocks built in memory (pytorch 134756, jax 37179): ranges are the only mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import (
    BIT_EXACT,
    BUCKET,
    GQA,
    IMPLEMENTATIONS,
    INT32_MAX,
    NUM_PAGES,
    PAGE_SIZE,
    UNPAGED,
    WINDOW,
    Case,
    assert_same_bits,
    attend,
    attend_case,
    lay_out,
    pack,
    write,
)

from jaxattn import (
    AttentionMetadata,
    AttentionSpec,
    Bucket,
    BucketGrid,
    PagedKVCache,
    RaggedBatch,
    advance,
    attention,
    nest_sequences,
    prepare_metadata,
)
from jaxattn.batch import PAD_SLOT
from jaxattn.metadata import Consumer, MissingFieldError
from jaxattn.metadata.schedule import TileSchedule, Tiling

TABLES = [[10, 11, 12], [20, 21, 22]]


def nest(sequences: list[list[int]] | np.ndarray, **options: Any) -> RaggedBatch:
    """A paged batch, in the bucket of the laws."""
    paged = {"page_tables": TABLES[: len(sequences)], "page_size": PAGE_SIZE, "num_pages": NUM_PAGES}
    return nest_sequences(sequences, **{"bucket": BUCKET, **paged, **options})


def ones(width: int) -> jax.Array:
    return jnp.ones((BUCKET.seqs, width), jnp.int32)


def all_fields(batch: RaggedBatch) -> AttentionMetadata:
    return prepare_metadata(batch, GQA, max_pages_per_seq=3)


def schedule(batch: RaggedBatch, tiling: Tiling) -> TileSchedule:
    reader = Consumer("reader", frozenset({"schedules"}), lambda spec: tiling)
    return prepare_metadata(batch, GQA, consumers=reader).visible[0].schedules[0]


def visible_range(window: int | None, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
    """What each token of one sequence sees."""
    spec = dataclasses.replace(GQA, sliding_window=window)
    visible = prepare_metadata(nest([[1] * kv_len]), spec, fields=("kv_start", "kv_end")).visible[0]
    return np.asarray(visible.kv_start)[:kv_len], np.asarray(visible.kv_end)[:kv_len]


class TestPhases:
    def test_a_prompt_of_one_token_is_no_decode(self):
        """AutoDeploy, hazard 1; vLLM 53059, 47123: a trailing length of 1 was taken for a decode."""
        m = all_fields(nest([[1, 2, 3], [4]]))
        np.testing.assert_array_equal(m.is_decode, False)
        np.testing.assert_array_equal(m.request_distribution, [0, 2, 2])

    def test_the_last_chunk_of_a_prompt_is_no_decode(self):
        """vLLM 53059: a short prefill over cached tokens has a decode's shape."""
        m = all_fields(nest([[1], [4]], context_lens=[5, 6], is_decode=[False, True]))
        np.testing.assert_array_equal(m.is_decode, [False, True, False, False])
        np.testing.assert_array_equal(m.request_distribution, [1, 1, 2])

    def test_the_token_after_a_prompt_goes_on_where_it_ended(self):
        """AutoDeploy, hazard 10: [1, 1] after prompts of 3 and 4 tokens, in a test that copied the code."""
        m = all_fields(advance(nest([[1, 2, 3], [1, 2, 3, 4]]), ones(1)))
        np.testing.assert_array_equal(m.positions[:2], [3, 4])
        np.testing.assert_array_equal(m.context_lens[:2], [3, 4])

    def test_one_row_of_logits_per_sequence(self):
        """AutoDeploy, hazard 9: with several tokens per sequence, one row per token came back."""
        m = all_fields(advance(nest([[1], [2]]), ones(3), q_lens=jnp.array([3, 2, 0, 0])))
        np.testing.assert_array_equal(m.logits_indices, [2, 4, 0, 0])


class TestStaleState:
    def test_a_smaller_batch_after_a_larger_one_has_no_stale_tail(self):
        """AutoDeploy, hazard 2; TensorRT-LLM 8002: cu_seqlen [0, 1, 4, 3, 4], illegal memory access."""
        nest([[1], [1, 2, 3], [1, 2], [3]], page_tables=[[1], [2], [3], [4]], state_slots=[3, 1, 2, 0])
        batch = nest([[1, 2]])
        np.testing.assert_array_equal(batch.cu_q_lens, [0, 2, 2, 2, 2])
        np.testing.assert_array_equal(batch.kv_lens, [2, 0, 0, 0])
        np.testing.assert_array_equal(batch.page_indptr, [0, 3, 3, 3, 3])
        np.testing.assert_array_equal(batch.state_slots, [0, PAD_SLOT, PAD_SLOT, PAD_SLOT])

    @pytest.mark.parametrize("transfer", [True, False])
    def test_the_next_call_does_not_write_into_a_batch(self, transfer: bool):
        """TensorRT-LLM 14008: the one staging buffer was overwritten before its copy ran."""
        tokens, pages = np.array([5, 6, 7]), np.array([1, 2])
        batch = nest(tokens, q_lens=[3], page_tables=pages, page_counts=[2], transfer=transfer)
        before = np.array(batch.packed)
        tokens[:], pages[:] = 9, 9
        nest([[8, 8]], transfer=transfer)
        np.testing.assert_array_equal(batch.packed, before)

    def test_dead_entries_of_a_schedule_are_defined(self):
        """TensorRT-LLM 14203, FlashInfer 4430, 4794: a kernel read work items that nobody had written."""
        batch = nest([[1] * 5, [1]], page_tables=[[1, 2], [3, 4, 5]], context_lens=[0, 8])
        for split in (None, 4):
            for part in schedule(batch, Tiling(1, 4, split)).lists:
                dead = slice(int(part.num_live), None)
                for name in ("seq", "q_start", "q_len", "kv_start", "kv_end"):
                    np.testing.assert_array_equal(getattr(part, name)[dead], 0)
                if part.split is not None:
                    unused = slice(int(part.split.indptr[-1]), None)
                    np.testing.assert_array_equal(part.split.tile[unused], part.seq.size)
                    np.testing.assert_array_equal(part.split.kv_end[unused], 0)


class TestValidation:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"context_lens": [1000]}, r"page_tables\[0\] holds 3 pages of 4 tokens, but.*1001 keys"),
            ({"state_slots": [-1]}, r"state_slots\[0\]=-1 must lie between"),
            ({"page_tables": [[-5]]}, r"page_tables\[0\] names page -5, out of range"),
            ({"page_tables": [[77]]}, r"page_tables\[0\] names page 77, out of range"),
        ],
    )
    def test_impossible_positions_slots_and_pages_are_refused(self, options: dict, message: str):
        """AutoDeploy, hazard 3: position 1000 of 64, slot 77 of 5, page -5, all accepted silently."""
        with pytest.raises(ValueError, match=message):
            nest([[1]], **options)

    def test_a_token_id_beyond_int32_does_not_wrap(self):
        """AutoDeploy, hazard 3: 2³¹ + 5 became -2147483643."""
        with pytest.raises(ValueError, match=r"sequences\[0\]\[0\]=2147483653 is a token id outside"):
            nest_sequences(np.array([2**31 + 5]), q_lens=[1])

    def test_a_sequence_without_tokens_is_refused(self):
        """AutoDeploy, hazard 4: last page length of a full page, gather index -1."""
        with pytest.raises(ValueError, match=r"sequences\[1\] has length 0; every sequence needs"):
            nest([[1], []])

    def test_a_row_without_new_tokens_is_safe_to_gather(self):
        """AutoDeploy, hazard 4, where a row goes quiet on the device."""
        m = all_fields(advance(nest([[1, 2, 3, 4], [1]]), ones(1), q_lens=jnp.array([0, 1, 1, 1])))
        np.testing.assert_array_equal(m.logits_indices, 0)
        np.testing.assert_array_equal(m.kv_last_page_lens, [4, 2, 1, 1])

    def test_an_argument_that_does_not_exist_is_refused(self):
        """AutoDeploy: a misspelt keyword became an input of the model."""
        with pytest.raises(TypeError, match="context_len"):
            nest([[1]], context_len=[0])

    def test_a_bucket_of_more_rows_than_tokens_is_refused(self):
        """TensorRT-LLM 10688, 13093: graphs were captured for more rows than could ever be filled."""
        with pytest.raises(ValueError, match="seqs=8 must lie between 1 and tokens=4"):
            Bucket(4, 8)

    @pytest.mark.parametrize("bucket", [BUCKET, BucketGrid(max_seqs=4)])
    def test_more_sequences_than_capacity_are_refused(self, bucket: Bucket | BucketGrid):
        """MaxText 2774: the surplus corrupted the others."""
        with pytest.raises(ValueError, match=r"seqs=5 exceeds .*max_seqs=4|seqs=5 exceeds bucket.seqs=4"):
            nest_sequences([[1]] * 5, bucket=bucket)

    def test_a_slot_that_overflows_int32_is_refused(self):
        """vLLM 47671, 50427: page times stride wrapped around."""
        with pytest.raises(ValueError, match=r"page_tables\[0\] names page 134217728, out of range"):
            nest_sequences([[1]], page_tables=[[2**27]], page_size=16, bucket=BUCKET)
        page = 2**27 - 2
        batch = nest_sequences([[1] * 16], page_tables=[[page]], page_size=16, bucket=BUCKET)
        np.testing.assert_array_equal(all_fields(batch).slot_mapping[:16], page * 16 + np.arange(16))


class TestPages:
    def test_an_appended_page_is_in_every_field(self):
        """AutoDeploy, hazard 5: the pages of one view had grown, the lengths of another had not."""
        m = all_fields(advance(nest([[1, 2, 3, 4], [1]]), ones(1)))
        np.testing.assert_array_equal(m.kv_page_indptr, [0, 2, 3, 3, 3])
        np.testing.assert_array_equal(m.kv_page_list[:4], [10, 11, 20, 0])
        np.testing.assert_array_equal(m.page_indices, [[10, 11, 0], [20, 0, 0], [0, 0, 0], [0, 0, 0]])
        np.testing.assert_array_equal(m.kv_last_page_lens, [1, 2, 1, 1])
        np.testing.assert_array_equal(m.slot_mapping[:2], [44, 81])

    def test_one_step_goes_over_several_pages(self):
        """AutoDeploy, hazard 6: six tokens more in pages of four moved one page only."""
        bucket = Bucket(24, 4, 24)
        m = all_fields(advance(nest([[1, 2, 3, 4], [1]]), ones(6), bucket=bucket))
        np.testing.assert_array_equal(m.kv_lens[:2], [10, 7])
        np.testing.assert_array_equal(m.kv_page_indptr[:3], [0, 3, 5])
        np.testing.assert_array_equal(m.slot_mapping[:6], [44, 45, 46, 47, 48, 49])

    def test_two_crossings_take_two_pages(self):
        """AutoDeploy, hazard 7: the one spare page stood in the table twice, [10, 99, 99]."""
        batch = nest([[1, 2, 3]])
        for _ in range(6):
            batch = advance(batch, ones(1))
        m = all_fields(batch)
        np.testing.assert_array_equal(m.kv_page_list[:4], [10, 11, 12, 0])
        assert int(m.slot_mapping[0]) == 12 * PAGE_SIZE

    def test_a_crossing_without_a_page_writes_nowhere(self):
        """AutoDeploy, hazard 7: page -1 was appended."""
        m = all_fields(advance(nest([[1, 2, 3, 4]], page_tables=[[10]]), ones(1)))
        assert int(m.slot_mapping[0]) == PAD_SLOT
        np.testing.assert_array_equal(m.kv_page_list, [10] + [0] * 23)

    def test_the_last_page_is_never_of_length_zero(self):
        """FlashInfer: a last page length of 0 is not allowed, and a full page must not give one."""
        m = all_fields(nest([[1] * 4, [1] * 8]))
        np.testing.assert_array_equal(m.kv_last_page_lens, [4, 4, 1, 1])

    def test_a_reused_prefix_is_not_written_again(self):
        """TensorRT-LLM 8108: with a cached prefix, the tokens handed on were those of the whole prompt."""
        m = all_fields(nest([[7, 8]], context_lens=[5]))
        np.testing.assert_array_equal(m.slot_mapping, [45, 46] + [PAD_SLOT] * 22)
        np.testing.assert_array_equal(m.positions[:2], [5, 6])


class TestPadding:
    def cache(self) -> PagedKVCache:
        shape = (NUM_PAGES, PAGE_SIZE, GQA.num_kv_heads, GQA.head_dim)
        pages = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
        return PagedKVCache(k_pages=pages, v_pages=pages)

    def test_padding_writes_no_live_page(self):
        """TensorRT-LLM 8108: rows added to reach a captured size wrote to pages of other sequences."""
        before = self.cache()
        k = np.full((BUCKET.tokens, GQA.num_kv_heads, GQA.head_dim), np.nan, np.float32)
        k[:2] = 1
        after = np.asarray(write(nest([[1, 2]]), before, k, k).k_pages)
        expected = np.array(before.k_pages)
        expected[10, :2] = 1
        assert_same_bits(after, expected)

    def test_no_slot_wraps_around(self):
        """vLLM pads with slot -1, which JAX takes for the last slot of the cache."""
        slots = np.asarray(all_fields(nest([[1, 2]])).slot_mapping)
        assert (slots >= 0).all()
        assert (slots[2:] >= NUM_PAGES * PAGE_SIZE).all()

    def test_padding_needs_no_page_and_no_state_slot(self):
        """TensorRT-LLM 7998, 13278, 16072: no page was left for the dummy, or its slot was a live one's."""
        pages = np.arange(NUM_PAGES // 4 * 3).reshape(3, -1)  # every entry of the page list is taken
        batch = nest([[1]] * 3, page_tables=pages, state_slots=[0, 1, 2])
        assert int(batch.page_indptr[-1]) == BUCKET.pages
        np.testing.assert_array_equal(batch.state_slots, [0, 1, 2, PAD_SLOT])

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_rows_past_the_last_token_are_written(self, implementation: str):
        """FlashAttention 1228, vLLM 38436: they stayed as they were, and NaN leaked from there."""
        case = Case((2, 1), (0, 3), ((1,), (2,)))
        out = attend_case(implementation, GQA, case, case.problem(GQA), fill=np.nan)
        assert_same_bits(out[3:], np.zeros_like(out[3:]))
        assert np.isfinite(out).all()

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_a_quiet_row_gives_no_nan(self, implementation: str):
        """vLLM 38436: a length of 0 gave NaN, which contaminated its neighbours."""
        batch = advance(nest([[1], [2]]), ones(1), q_lens=jnp.array([0, 1, 0, 0]), bucket=BUCKET)
        case = Case((1, 1), (0, 0), ((10,), (20,)))
        problem = case.problem(GQA)
        k, v = (
            lay_out([np.repeat(x, 2, axis=0) for x in rows], case.tables, np.nan)
            for rows in (problem.k, problem.v)
        )
        out = attend(implementation, GQA, batch, pack(problem.q[1:], BUCKET.tokens, np.nan), k, v)
        np.testing.assert_allclose(out[0], np.repeat(problem.v[1][0], GQA.group_size, axis=0), rtol=1e-6)
        assert_same_bits(out[1:], np.zeros_like(out[1:]))

    def test_arrays_have_the_buckets_size(self):
        """vLLM 24002, 25251: padding was added after the metadata, whose sizes then disagreed."""
        few, many = (all_fields(nest(sequences)) for sequences in ([[1]], [[1] * 9, [1] * 12]))
        assert jax.tree.map(jnp.shape, few) == jax.tree.map(jnp.shape, many)


class TestCapacity:
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_a_batch_that_fills_everything(self, implementation: str):
        """TensorRT-LLM 4505: an illegal memory access at exactly the largest batch and length."""
        bucket, n = Bucket(8, 4, NUM_PAGES), NUM_PAGES // 4
        order = np.random.default_rng(0).permutation(NUM_PAGES).reshape(4, n)
        case = Case((2,) * 4, (n * PAGE_SIZE - 2,) * 4, tuple(map(tuple, order.tolist())))
        problem = case.problem(GQA)
        out = attend_case(implementation, GQA, case, problem, bucket=bucket)
        np.testing.assert_allclose(out, problem.expected(GQA), rtol=1e-4, atol=1e-5)

    def test_one_more_than_everything_is_refused(self):
        """TensorRT-LLM 4505: the workaround there was to allocate one more."""
        full = {"bucket": Bucket(8, 4, 8), "page_tables": np.arange(8).reshape(4, 2)}
        nest([[1, 2]] * 4, context_lens=[6] * 4, **full)
        with pytest.raises(ValueError, match="holds 2 pages of 4 tokens, but sequence 3 has 9"):
            nest([[1, 2]] * 4, context_lens=[6, 6, 6, 7], **full)
        with pytest.raises(ValueError, match=r"tokens=9 exceeds bucket\.tokens=8"):
            nest([[1, 2]] * 3 + [[1, 2, 3]], context_lens=[5] * 4, **full)

    def test_thousands_of_tiny_sequences_make_linear_lists(self):
        """FlashAttention 2520, 2807; Transformer Engine 2522: work or memory as sequences × tokens."""
        n = 8192
        batch = nest_sequences(np.ones(2 * n, int), q_lens=np.full(n, 2), bucket=Bucket(2 * n, n))
        shapes = jax.eval_shape(lambda batch: prepare_metadata(batch, GQA), batch)
        assert max(x.size for x in jax.tree.leaves(shapes)) <= 3 * n + 1


class TestWindows:
    def test_a_window_counts_the_token_itself(self):
        """Megatron-Bridge 2656, zml 763: W against W - 1 keys to the left."""
        start, end = visible_range(3, 8)
        np.testing.assert_array_equal(end - start, [1, 2, 3, 3, 3, 3, 3, 3])
        np.testing.assert_array_equal(end, np.arange(1, 9))

    def test_a_window_beyond_the_longest_sequence_is_no_window(self):
        """TensorRT-LLM 14906: it made a second pool."""
        np.testing.assert_array_equal(visible_range(1000, 8), visible_range(None, 8))
        np.testing.assert_array_equal(visible_range(INT32_MAX, 8), visible_range(None, 8))

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_a_prefill_longer_than_its_window(self, implementation: str):
        """TensorRT-LLM 13745: lengths were cut down to the window, and long prefills silently corrupted."""
        case = Case((21,), (0,), ((3, 1, 4, 0, 5, 9),))
        problem = case.problem(WINDOW)
        out = attend_case(implementation, WINDOW, case, problem)
        np.testing.assert_allclose(out[:21], problem.expected(WINDOW), rtol=1e-4, atol=1e-5)

    def test_a_layer_does_not_get_the_schedule_of_another_window(self):
        """vLLM 54374, 17574; sglang 32417; TensorRT-LLM 18769: wrong results, or illegal accesses."""
        batch = nest([[1] * 9])
        m = prepare_metadata(batch, [GQA, WINDOW], consumers="xla")
        tiles = [m.visible_keys(spec.window_class).schedules[0].long for spec in (GQA, WINDOW)]
        assert all(tile is not None for tile in tiles)
        other = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=16, sliding_window=8)
        q, k = jnp.zeros((24, 8, 16)), jnp.zeros((NUM_PAGES, PAGE_SIZE, 2, 16))
        with pytest.raises(MissingFieldError, match=r"'visible' has no .*sliding_window=8"):
            attention(q, k, k, m, other, implementation="xla")


class TestOtherSequences:
    @pytest.mark.parametrize("implementation", BIT_EXACT)
    def test_a_prefill_that_grows_flips_no_bit_of_a_decode(self, implementation: str):
        """vLLM 51902, FlashInfer 2424, 2830: 9 against 10 tokens chose another tile for every row."""
        cases = [Case((1, n), (12, 0), ((5, 6, 7, 8), (1, 2, 3)), seed=n) for n in (9, 10)]
        problems = [case.problem(GQA) for case in cases]
        for name in ("q", "k", "v"):
            getattr(problems[1], name)[0] = getattr(problems[0], name)[0]
        before, after = (
            attend_case(implementation, GQA, *both) for both in zip(cases, problems, strict=True)
        )
        assert_same_bits(after[0], before[0])

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_the_second_prompts_decode_is_its_own(self, implementation: str):
        """TensorRT-LLM 11791: garbage from the second sequence on."""
        case = Case((1, 1, 1), (7, 3, 11), ((9, 2), (4,), (8, 1, 6)))
        problem = case.problem(GQA)
        out = attend_case(implementation, GQA, case, problem)
        np.testing.assert_allclose(out[:3], problem.expected(GQA), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_packed_documents_do_not_see_each_other(self, implementation: str):
        """MaxText 4476: tokens attended across the border of their segment."""
        case = Case((5, 1, 6), (0, 0, 0), ((1, 2), (3,), (4, 5)))
        problem = case.problem(WINDOW)
        out = attend_case(implementation, WINDOW, case, problem, bucket=UNPAGED)
        np.testing.assert_allclose(out[:12], problem.expected(WINDOW), rtol=1e-4, atol=1e-5)


class TestShapes:
    def test_segments_are_cut_into_blocks_from_their_own_start(self):
        """AutoDeploy, hazard 8: offsets of [0, 5, 10] in blocks of 8 came out as [-1, 0, 2]."""
        batch = nest_sequences([[1] * 5, [1] * 5], bucket=Bucket(10, 2))
        tiles = schedule(batch, Tiling(1, 8)).long
        assert tiles is not None
        assert int(tiles.num_live) == 2
        np.testing.assert_array_equal(tiles.seq[:2], [0, 1])
        np.testing.assert_array_equal(tiles.q_start[:2], [0, 5])

    def test_shapes_are_known_without_values(self):
        """TensorRT-LLM 15289, 12573: shapes hung on values, by a hidden copy to the host or wrongly."""
        batch = nest([[1] * 9, [1] * 2])
        shapes = jax.eval_shape(all_fields, batch)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
            lambda x: (x.shape, x.dtype), all_fields(batch)
        )

    def test_static_parts_change_with_the_bucket_only(self):
        """sglang-jax 609: values in the static part of a pytree, and a compilation per step."""
        one, other = nest([[1] * 9, [1] * 2], context_lens=[3, 0]), nest([[1]], state_slots=[7])
        assert jax.tree.structure(one) == jax.tree.structure(other)
        assert jax.tree.structure(all_fields(one)) == jax.tree.structure(all_fields(other))

    def test_a_step_has_few_leaves(self):
        """tpu-inference 2607: 17.6 ms per step to flatten 7,600 leaves."""
        batch = nest([[1]])
        assert len(jax.tree.leaves(batch)) == 1
        assert len(jax.tree.leaves(prepare_metadata(batch, GQA, consumers=("xla", "decoder")))) <= 32

    def test_a_field_that_nobody_asked_for_is_not_prepared(self):
        """AutoDeploy lost this: with no consumer at all, 95 % of the price was paid."""
        m = prepare_metadata(nest([[1]]), GQA, consumers="write_cache")
        assert len(jax.tree.leaves(m)) == 1
        with pytest.raises(MissingFieldError, match="'positions' of AttentionMetadata was not prepared"):
            _ = m.positions

    def test_context_lens_do_not_count_this_step(self):
        """EasyDeL calls the keys, this step's included, by this name."""
        m = all_fields(nest([[1, 2, 3]], context_lens=[5]))
        assert (int(m.context_lens[0]), int(m.kv_lens[0])) == (5, 8)
