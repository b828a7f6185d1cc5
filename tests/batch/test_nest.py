import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import checkify

from jaxattn import Bucket, BucketGrid, RaggedBatch, advance, nest_sequences, prepare_metadata
from jaxattn.batch import PAD_SLOT, check_batch
from jaxattn.batch.ragged import INT32_MAX, abstract_batch, field_slices, pack_fields
from jaxattn.metadata.spec import AttentionSpec

BUCKET = Bucket(tokens=12, seqs=4, pages=8)
SEQUENCES = [[3, 1, 4], [1], [5, 9]]
TABLES = [[7, 2], [0], [4, 5]]
PAGED = {"context_lens": [2, 0, 5], "page_tables": TABLES, "page_size": 4, "num_pages": 8}


@pytest.mark.smoke
def test_fields():
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    np.testing.assert_array_equal(batch.num_seqs, 3)
    np.testing.assert_array_equal(batch.token_ids, [3, 1, 4, 1, 5, 9, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.cu_q_lens, [0, 3, 4, 6, 6])
    np.testing.assert_array_equal(batch.kv_lens, [5, 1, 7, 0])
    np.testing.assert_array_equal(batch.page_indptr, [0, 2, 3, 5, 5])
    np.testing.assert_array_equal(batch.page_list, [7, 2, 0, 4, 5, 0, 0, 0])


def test_is_one_leaf_of_the_buckets_size():
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    (leaf,) = jax.tree.leaves(batch)
    assert leaf.dtype == jnp.int32
    assert leaf.shape == jax.tree.leaves(abstract_batch(BUCKET, 4))[0].shape
    assert leaf.size == 1 + 12 + 5 + 4 + 4 + 4 + 4 + 5 + 8


@pytest.mark.smoke
@pytest.mark.parametrize(
    "sequences",
    [
        [np.array(s) for s in SEQUENCES],
        [np.array(s, np.uint8) for s in SEQUENCES],
        [tuple(s) for s in SEQUENCES],
        [jnp.array(s) for s in SEQUENCES],
        [SEQUENCES[0], np.array(SEQUENCES[1]), tuple(SEQUENCES[2])],
    ],
)
def test_every_kind_of_sequence(sequences):
    expected = nest_sequences(SEQUENCES, bucket=BUCKET)
    chex.assert_trees_all_equal(nest_sequences(sequences, bucket=BUCKET), expected)


def test_flat_tokens_with_lengths():
    flat = nest_sequences(np.concatenate(SEQUENCES), q_lens=[3, 1, 2], bucket=BUCKET)
    chex.assert_trees_all_equal(flat, nest_sequences(SEQUENCES, bucket=BUCKET))


def test_rectangular_arrays():
    batch = nest_sequences(np.arange(6).reshape(2, 3), page_tables=np.array([[3], [1]]), page_size=4)
    np.testing.assert_array_equal(batch.token_ids[:6], np.arange(6))
    np.testing.assert_array_equal(batch.page_list[:2], [3, 1])


def test_flat_page_tables_with_counts():
    flat = nest_sequences(
        SEQUENCES,
        **{**PAGED, "page_tables": np.concatenate(TABLES)},
        page_counts=[2, 1, 2],
        bucket=BUCKET,
    )
    chex.assert_trees_all_equal(flat, nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint32, np.int64, np.dtype(">i4")])
def test_every_width_of_integers(dtype):
    arrays: dict = {
        "q_lens": np.array([3, 1, 2], dtype),
        "context_lens": np.array([2, 0, 5], dtype),
        "page_tables": np.concatenate(TABLES).astype(dtype),
        "page_counts": np.array([2, 1, 2], dtype),
    }
    batch = nest_sequences(
        np.concatenate(SEQUENCES).astype(dtype), **arrays, page_size=4, num_pages=8, bucket=BUCKET
    )
    chex.assert_trees_all_equal(batch, nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET))


def test_narrow_lengths_do_not_wrap():
    lens = np.array([100, 100], np.int8)
    batch = nest_sequences(
        np.zeros(200, int), q_lens=lens, context_lens=lens, page_tables=[[0], [1]], page_size=256
    )
    np.testing.assert_array_equal(batch.kv_lens[:2], [200, 200])


def test_phase_is_stated_and_never_guessed():
    default = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    np.testing.assert_array_equal(default.is_decode, [False] * 4)  # though one has one token
    stated = nest_sequences(SEQUENCES, **PAGED, is_decode=[False, True, False], bucket=BUCKET)
    np.testing.assert_array_equal(stated.is_decode, [False, True, False, False])
    bucket = nest_sequences([[1]] * 2, bucket=Bucket(4, 4, max_q_len=1))
    np.testing.assert_array_equal(bucket.is_decode, [True, True, False, False])


@pytest.mark.parametrize(
    ("is_decode", "error", "message"),
    [([1, 0, 0], TypeError, "is_decode has dtype int64"), ([True], ValueError, "for 3 sequences")],
)
def test_refuses_phases(is_decode, error, message):
    with pytest.raises(error, match=message):
        nest_sequences(SEQUENCES, is_decode=is_decode, bucket=BUCKET)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 1], "state_slots has 2 entries for 3 sequences"),
        ([0, -1, 2], r"state_slots\[1\]=-1 must lie between 0"),
        ([0, 1, 2**31 - 1], r"state_slots\[2\]=2147483647 must lie between 0 and 2147483646"),
        ([4, 1, 4], "state_slots names slot 4 twice"),
        ([2**30, 1, 2**30], "state_slots names slot 1073741824 twice"),
    ],
)
def test_refuses_state_slots(slots, message):
    with pytest.raises(ValueError, match=message):
        nest_sequences(SEQUENCES, state_slots=slots, bucket=BUCKET)


@pytest.mark.parametrize("name", ["page_size", "num_pages", "vocab_size"])
def test_refuses_sizes_that_are_no_integers(name):
    with pytest.raises(TypeError, match=f"{name}=True must be an int, or None"):
        nest_sequences(SEQUENCES, **{**PAGED, name: True}, bucket=BUCKET)


WIDE = Bucket(tokens=12, seqs=4, pages=9)
SHARED: dict = {
    "context_lens": [9, 8, 4],
    "page_tables": [[7, 2, 0], [7, 2, 1], [7, 3, 4]],
    "page_size": 4,
    "num_pages": 8,
}


def test_prefixes_are_shared_where_that_is_asked_for():
    batch = nest_sequences([[1]] * 3, **SHARED, share_prefixes=True, bucket=WIDE)
    np.testing.assert_array_equal(batch.page_list[:8], [7, 2, 0, 7, 2, 1, 7, 3])
    with pytest.raises(ValueError, match=r"page 2 is owned twice.*or set share_prefixes"):
        nest_sequences([[1]] * 3, **SHARED, bucket=WIDE)


@pytest.mark.parametrize(
    "changes",
    [
        {"context_lens": [9, 7, 4]},  # the second sequence writes its second page
        {"page_tables": [[7, 2, 0], [2, 7, 1], [5, 3, 4]]},  # at different places
        {"page_tables": [[7, 2, 0], [7, 2, 0], [7, 3, 4]]},  # the last pages are written
        {"page_tables": [[7, 7, 0], [6, 2, 1], [5, 3, 4]]},  # within one sequence
    ],
)
def test_written_pages_are_never_shared(changes):
    with pytest.raises(ValueError, match=r"is owned twice.*only whole pages of context"):
        nest_sequences([[1]] * 3, **{**SHARED, **changes}, share_prefixes=True, bucket=WIDE)


def test_pages_of_a_huge_cache_are_checked_too():
    tables = [[2**25, 3], [5], [2**25, 4]]
    with pytest.raises(ValueError, match=r"page 33554432 is owned twice, by page_tables\[0\]"):
        nest_sequences(SEQUENCES, **{**PAGED, "page_tables": tables, "num_pages": None}, bucket=BUCKET)


def test_validation_can_be_switched_off():
    valid = nest_sequences(SEQUENCES, **PAGED, validate=False, bucket=BUCKET)
    chex.assert_trees_all_equal(valid, nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET))
    nest_sequences(
        SEQUENCES, **{**PAGED, "page_tables": [[2, 2], [0], [4, 5]]}, validate=False, bucket=BUCKET
    )
    with pytest.raises(ValueError, match="tokens=13 exceeds"):  # what would not fit is refused all the same
        nest_sequences([[1] * 13], bucket=BUCKET, validate=False)


def test_without_transfer_the_buffer_stays_on_the_host():
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET, transfer=False)
    assert isinstance(batch.packed, np.ndarray)
    chex.assert_trees_all_equal(jax.device_put(batch), nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET))


def test_batches_do_not_share_memory():
    first = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET, transfer=False)
    kept = np.array(first.packed)
    nest_sequences([[9] * 5], bucket=BUCKET, transfer=False)
    np.testing.assert_array_equal(first.packed, kept)


@pytest.mark.smoke
def test_packing_fields_on_the_device():
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    fields = {name: getattr(batch, name) for name in field_slices(BUCKET)}
    chex.assert_trees_all_equal(jax.jit(lambda f: pack_fields(BUCKET, 4, **f))(fields), batch)
    with pytest.raises(ValueError, match="kv_lens has 3 entries"):
        pack_fields(BUCKET, 4, **{**fields, "kv_lens": batch.kv_lens[:3]})
    with pytest.raises(ValueError, match=r"fields \['num_seqs'\] given; a batch has"):
        pack_fields(BUCKET, 4, num_seqs=batch.num_seqs)


CHECK = {
    shared: jax.jit(checkify.checkify(functools.partial(check_batch, num_pages=8, **options)))
    for shared, options in ((False, {}), (True, {"share_prefixes": True}))
}


def corrupted(batch, name: str, values) -> RaggedBatch:
    at = field_slices(batch.bucket)[name]
    return dataclasses.replace(batch, packed=batch.packed.at[at].set(jnp.array(values, jnp.int32)))


@pytest.mark.smoke
@pytest.mark.parametrize("bucket", [BUCKET, Bucket(6, 3, 5), Bucket(64, 9, 30)])
def test_a_nested_batch_passes_the_check(bucket):
    CHECK[False](nest_sequences(SEQUENCES, **PAGED, bucket=bucket))[0].throw()
    CHECK[False](nest_sequences(SEQUENCES, bucket=bucket))[0].throw()
    step = advance(nest_sequences(SEQUENCES, **PAGED, bucket=bucket), jnp.zeros(bucket.seqs, jnp.int32))
    CHECK[False](step)[0].throw()


@pytest.mark.parametrize("bucket", [WIDE, Bucket(tokens=3, seqs=3, pages=9)])
def test_the_check_allows_shared_prefixes_only_where_asked(bucket):
    batch = nest_sequences([[1]] * 3, **SHARED, share_prefixes=True, bucket=bucket)
    CHECK[True](batch)[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match="gives a page to two sequences"):
        CHECK[False](batch)[0].throw()


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("num_seqs", [5], "num_seqs=5 must lie between 0 and bucket.seqs=4"),
        ("num_seqs", [2], "rows past num_seqs=2 must have no query tokens"),
        ("cu_q_lens", [0, 3, 2, 6, 6], "must begin with 0, never decrease"),
        ("cu_q_lens", [1, 3, 4, 6, 6], "must begin with 0"),
        ("cu_q_lens", [0, 3, 4, 13, 13], "at or before bucket.tokens=12"),
        ("cu_q_lens", [0, 3, 4, 6, 13], "at or before bucket.tokens=12"),
        ("kv_lens", [5, 1, 1, 0], "kv_lens=.* must count this step's tokens too"),
        ("kv_lens", [5, 1, 9, 0], "too few pages for kv_lens"),
        ("token_ids", [-1] * 12, "token_ids=.* must not be negative"),
        ("state_slots", [0, 0, 1, 0], "state_slots=.* must be distinct"),
        ("state_slots", [-3, 0, 1, 0], "state_slots=.* must be distinct, not negative"),
        ("prefix_lm_lens", [0, 2, 0, 0], "prefix_lm_lens=.* must lie within the contexts"),
        ("prefix_lm_lens", [0, -1, 0, 0], "prefix_lm_lens=.* must lie within the contexts"),
        ("page_indptr", [0, 2, 1, 5, 5], "page_indptr=.* must begin with 0, never decrease"),
        ("page_indptr", [0, 2, 3, 9, 9], "at or before bucket.pages=8"),
        ("page_indptr", [0, 2, 3, 5, 9], "at or before bucket.pages=8"),
        ("page_list", [7, 8, 0, 4, 5, 0, 0, 0], "page_list=.* must lie below 8"),
        ("page_list", [7, -2, 0, 4, 5, 0, 0, 0], "page_list=.* must lie below 8"),
        ("page_list", [7, 2, 0, 4, 7, 0, 0, 0], "gives a page to two sequences"),
    ],
)
def test_the_check_finds_what_is_wrong(name, values, message):
    batch = corrupted(nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET), name, values)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        CHECK[False](batch)[0].throw()


@pytest.mark.parametrize("num_pages", [None, INT32_MAX])
def test_the_check_knows_what_int32_can_number(num_pages):
    """A slot is `page * page_size + offset`, and the largest int32 is no slot."""
    check = jax.jit(checkify.checkify(functools.partial(check_batch, num_pages=num_pages)))
    limit = INT32_MAX // PAGED["page_size"]
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    check(corrupted(batch, "page_list", [7, limit - 1, 0, 4, 5, 0, 0, 0]))[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match=f"must lie below {limit}"):
        check(corrupted(batch, "page_list", [7, limit, 0, 4, 5, 0, 0, 0]))[0].throw()


def test_the_check_sees_the_last_pages_of_a_full_batch():
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=Bucket(tokens=6, seqs=3, pages=5))
    with pytest.raises(checkify.JaxRuntimeError, match="must lie below 8"):
        CHECK[False](corrupted(batch, "page_list", [7, 2, 0, 4, 8]))[0].throw()


def test_the_check_knows_the_longest_query():
    batch = nest_sequences(
        [[1]] * 2, page_tables=[[0], [1]], page_size=4, bucket=Bucket(4, 4, 8, max_q_len=1)
    )
    batch = corrupted(batch, "cu_q_lens", [0, 2, 3, 3, 3])
    with pytest.raises(checkify.JaxRuntimeError, match=r"longer than bucket.max_q_len=1"):
        CHECK[False](batch)[0].throw()


def test_picks_the_smallest_bucket():
    assert nest_sequences([[1] * 17], bucket=BucketGrid()).bucket == Bucket(20, 20)


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        ([], {}, "sequences is empty"),
        (np.empty((0, 3), int), {}, "sequences is empty"),
        ([[1], []], {}, r"sequences\[1\] has length 0; every sequence needs"),
        ([[1], np.array([])], {}, r"sequences\[1\] has length 0; every sequence needs"),
        (
            [[1, 2], [3, 11]],
            {"vocab_size": 11},
            r"sequences\[1\]\[1\]=11 is a token id outside the vocabulary.*=11",
        ),
        ([[1, -2]], {}, r"sequences\[0\]\[1\]=-2 is a token id outside the range of int32"),
        ([[2**31 + 5]], {}, r"sequences\[0\]\[0\]=2147483653 is a token id outside"),
        (np.arange(4), {}, "give the length of each sequence as q_lens"),
        (np.arange(4), {"q_lens": [3]}, "q_lens sum to 3, but sequences holds 4 entries"),
        (np.arange(4), {"q_lens": [5, -1]}, r"sequences\[1\] has length -1"),
        ([[1] * 13], {"bucket": BUCKET}, "tokens=13 exceeds bucket.tokens=12"),
        ([[1]] * 5, {"bucket": BUCKET}, "seqs=5 exceeds bucket.seqs=4"),
        ([[1, 2]], {"bucket": Bucket(4, 4, max_q_len=1)}, "max_q_len=2 exceeds bucket.max_q_len=1"),
        ([[1] * 40000], {}, "tokens=40000 exceeds the grid's largest size"),
        ([[10**23]], {}, "holds 100000000000000000000000, which is outside the range of int64"),
        ([np.array([2**64 - 1], np.uint64)], {}, "holds 18446744073709551615, which is outside the range"),
        ([[1], [2, 3]], {"q_lens": [1, 2]}, "rows of different lengths"),
        ([[1, 2]], {"context_lens": [3]}, r"context_lens\[0\]=3 needs a paged cache"),
    ],
)
def test_refuses_sequences(sequences, options, message):
    with pytest.raises(ValueError, match=message):
        nest_sequences(sequences, **options)


def test_without_a_vocabulary_a_token_may_be_any_int32():
    batch = nest_sequences([[0, INT32_MAX]], bucket=BUCKET)
    np.testing.assert_array_equal(batch.token_ids[:2], [0, INT32_MAX])
    with pytest.raises(ValueError, match=r"sequences\[0\]\[1\]=2147483648 is a token id outside the range"):
        nest_sequences([[0, INT32_MAX + 1]], bucket=BUCKET)


def test_batches_are_immutable():
    batch = nest_sequences(SEQUENCES, bucket=BUCKET)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.page_size = 4  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(batch, "__dict__")


def test_refuses_one_flat_list():
    with pytest.raises(TypeError, match="sequences must hold one list or 1-D array per sequence"):
        nest_sequences([1, 2, 3])


def test_refuses_nested_rows():
    with pytest.raises(ValueError, match="expected one axis"):
        nest_sequences([[[1, 2], [3, 4]]])


@pytest.mark.parametrize("sequences", [[[1.5, 2.0]], [np.array([1.0])], [[True, False]], [["a"]]])
def test_refuses_what_is_no_integer(sequences):
    with pytest.raises(TypeError, match="expected integers"):
        nest_sequences(sequences)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_lens": [2, 0]}, "context_lens has 2 entries for 3 sequences"),
        ({"context_lens": [2, -1, 5]}, r"context_lens\[1\]=-1 must not be negative"),
        ({"context_lens": [2, 0, 2**31 - 2]}, r"context_lens\[2\]=2147483646 plus 2 tokens exceeds int32"),
        ({"context_lens": [2**30] * 3, "page_size": 2**30}, "keys in all exceed int32"),
        ({"page_tables": [[2**28, 2], [0], [4, 5]], "num_pages": 2**31, "page_size": 16}, "out of range"),
        ({"page_size": None}, "page_tables and page_size belong together"),
        ({"page_tables": None}, "page_tables and page_size belong together"),
        ({"page_size": 0}, "page_size=0 must be at least 1"),
        ({"page_tables": TABLES[:2]}, "page_tables has 2 rows for 3 sequences"),
        (
            {"page_tables": [[7, 2], [0], [4]]},
            r"page_tables\[2\] holds 1 pages of 4 tokens, but.* needs 2 pages",
        ),
        ({"page_tables": [[7, 8], [0], [4, 5]]}, r"page_tables\[0\] names page 8, out of range.*num_pages=8"),
        ({"page_tables": [[7, 2], [-1], [4, 5]]}, r"page_tables\[1\] names page -1, out of range"),
        (
            {"page_tables": [[7, 2], [0], [4, 7]]},
            r"page 7 is owned twice, by page_tables\[0\] and page_tables\[2\]",
        ),
        (
            {"page_tables": [[2, 2], [0], [4, 5]]},
            r"page 2 is owned twice, by page_tables\[0\] and page_tables\[0\]",
        ),
    ],
)
def test_refuses_pages(changes, message):
    with pytest.raises(ValueError, match=message):
        nest_sequences(SEQUENCES, **{**PAGED, **changes}, bucket=BUCKET)


def test_advance_appends_one_token():
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    step = advance(batch, jnp.array([10, 11, 12, 99], jnp.int32))
    assert step.bucket == Bucket(4, 4, 8, max_q_len=1)
    np.testing.assert_array_equal(step.token_ids, [10, 11, 12, 0])
    np.testing.assert_array_equal(step.cu_q_lens, [0, 1, 2, 3, 3])
    np.testing.assert_array_equal(step.kv_lens, [6, 2, 8, 0])
    np.testing.assert_array_equal(step.page_list, batch.page_list)


def test_advance_leaves_inactive_rows_quiet():
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    step = advance(batch, jnp.array([10, 11, 12, 99], jnp.int32), q_lens=jnp.array([1, 0, 1, 1]))
    np.testing.assert_array_equal(step.token_ids, [10, 12, 0, 0])
    np.testing.assert_array_equal(step.cu_q_lens, [0, 1, 1, 2, 2])
    np.testing.assert_array_equal(step.kv_lens, [6, 1, 8, 0])


def test_advance_into_fewer_rows():
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    step = advance(batch, jnp.array([10, 11, 12, 99], jnp.int32), bucket=BUCKET.decode(3))
    np.testing.assert_array_equal(step.kv_lens, [6, 2, 8])


def test_advance_keeps_what_was_accepted():
    """Speculation: rows of 3, 1 and 2 query tokens keep 1, 1 and 0, and append 2, 0 and 1."""
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    step = advance(
        batch,
        jnp.array([[10, 11], [12, 13], [14, 15], [9, 9]], jnp.int32),
        q_lens=jnp.array([2, 0, 1, 2]),
        accepted=jnp.array([1, 1, 0, 5]),
    )
    assert step.bucket == Bucket(8, 4, 8, max_q_len=2)
    np.testing.assert_array_equal(step.token_ids, [10, 11, 14, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(step.cu_q_lens, [0, 2, 2, 3, 3])
    np.testing.assert_array_equal(step.kv_lens, [2 + 1 + 2, 1, 5 + 0 + 1, 0])
    np.testing.assert_array_equal(step.is_decode, [True, True, True, False])


def test_advance_clips_counts_that_cannot_be():
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    step = advance(
        batch,
        jnp.zeros(4, jnp.int32),
        q_lens=jnp.array([5, -1, 1, 1]),
        accepted=jnp.array([9, -9, 1, 1]),
    )
    np.testing.assert_array_equal(step.cu_q_lens, [0, 1, 1, 2, 2])
    np.testing.assert_array_equal(step.kv_lens, [2 + 3 + 1, 0, 5 + 1 + 1, 0])


def test_advance_keeps_state_slots():
    batch = nest_sequences(SEQUENCES, **PAGED, state_slots=[5, 0, 2], bucket=BUCKET)
    np.testing.assert_array_equal(advance(batch, jnp.zeros(4, jnp.int32)).state_slots, [5, 0, 2, PAD_SLOT])


def test_prefixes_of_prefix_lm():
    """Within a query that has no context, or within the context: prefilled in one step, then kept."""
    lens: dict[str, Any] = {"context_lens": [4, 0, 5], "prefix_lm_lens": [4, 1, 0]}
    batch = nest_sequences(
        [[1] * 2, [1], [1]], page_tables=[[0, 1], [2], [3, 4]], page_size=4, bucket=BUCKET, **lens
    )
    np.testing.assert_array_equal(batch.prefix_lm_lens, [4, 1, 0, 0])
    np.testing.assert_array_equal(advance(batch, jnp.zeros(4, jnp.int32)).prefix_lm_lens, [4, 1, 0, 0])
    CHECK[False](batch)[0].throw()


@pytest.mark.parametrize(
    ("contexts", "prefixes", "message"),
    [
        (
            [0, 0],
            [3, 0],
            r"prefix_lm_lens\[0\]=3 must lie between 0 and 2: .* 0 tokens of context and 2 of query",
        ),
        ([0, 1], [2, 2], r"prefix_lm_lens\[1\]=2 must lie between 0 and 1: .* prefilled in one step"),
        ([0, 0], [0, -1], r"prefix_lm_lens\[1\]=-1 must lie between 0 and 2"),
        ([0, 0], [0], "prefix_lm_lens .* 2 sequences"),
        ([0, 0], [0.5, 0], "prefix_lm_lens .*integer"),
    ],
)
def test_prefixes_that_are_refused(contexts, prefixes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        nest_sequences(
            [[1, 2], [3, 4]], context_lens=contexts, page_tables=[[0], [1]], page_size=4,
            prefix_lm_lens=prefixes, bucket=BUCKET,
        )  # fmt: skip


def test_advance_refuses_a_bucket_without_room():
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    for bucket in (Bucket(7, 4, 8), Bucket(8, 4, 8, max_q_len=1)):
        with pytest.raises(ValueError, match="no room for 2 tokens in each of its 4 rows"):
            advance(batch, jnp.zeros((4, 2), jnp.int32), bucket=bucket)


def test_advance_needs_pages():
    with pytest.raises(ValueError, match="nested without page_tables"):
        advance(nest_sequences(SEQUENCES, bucket=BUCKET), jnp.zeros(4, jnp.int32))


def test_mixed_integer_types():
    batch = nest_sequences([np.array([3], np.int64), np.array([4], np.uint64)])
    np.testing.assert_array_equal(batch.token_ids[:2], [3, 4])


@pytest.mark.parametrize("bucket", [Bucket(5, 5, 8), Bucket(4, 4, 9)])
def test_advance_refuses_a_bucket_that_cannot_follow(bucket):
    batch = nest_sequences(SEQUENCES, **PAGED, bucket=BUCKET)
    with pytest.raises(ValueError, match="at most the rows and exactly the pages"):
        advance(batch, jnp.zeros(4, jnp.int32), bucket=bucket)


@pytest.mark.smoke
@given(data=st.data())
def test_advancing_equals_nesting_again(data):
    """Law 4: any number of device steps, over any page crossings, equals nesting on the host."""
    page_size = data.draw(st.integers(1, 3))
    contexts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    steps = data.draw(st.integers(1, 6))
    rows = len(contexts)
    counts = [-(-(c + 1 + steps) // page_size) for c in contexts]
    pages = np.random.default_rng(0).permutation(sum(counts))
    paged = {"page_tables": np.split(pages, np.cumsum(counts)[:-1]), "page_size": page_size}
    bucket = Bucket(4, 4, 48, max_q_len=1)
    batch = nest_sequences([[1]] * rows, context_lens=contexts, **paged, bucket=bucket)
    for step in range(1, steps + 1):
        batch = ADVANCE(batch, jnp.full(4, step, jnp.int32))
        again = nest_sequences(
            [[step]] * rows, context_lens=[c + step for c in contexts], **paged, bucket=bucket
        )
        chex.assert_trees_all_equal(batch, again)


ADVANCE = jax.jit(advance)


@pytest.mark.smoke
def test_one_trace_per_bucket():
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16)
    prepare = jax.jit(chex.assert_max_traces(lambda batch: prepare_metadata(batch, spec), n=1))
    rng = np.random.default_rng(0)
    for _ in range(5):
        lens = rng.integers(1, 5, rng.integers(1, 5))
        prepare(nest_sequences([[1] * n for n in lens], bucket=Bucket(20, 5)))


def test_the_layout_has_no_gaps():
    stops = [0]
    for part in field_slices(BUCKET).values():
        assert part.start == stops[-1]
        stops.append(part.stop)
