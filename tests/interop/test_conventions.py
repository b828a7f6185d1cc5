"""Every export against its convention, written out in Python; every import undoes it; every known trap."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from effort import EXAMPLES, THOROUGH
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from jaxattn import AttentionSpec, Bucket, attention, nest_sequences, prepare_metadata
from jaxattn import interop as ex
from jaxattn.batch import PAD_SLOT, check_batch
from jaxattn.batch.ragged import RaggedBatch, field_slices
from jaxattn.metadata import WindowClass
from jaxattn.metadata.fields import field_table
from jaxattn.metadata.superset import METADATA_FIELDS
from jaxattn.metadata.visible import VISIBLE_FIELDS

PAGED = Bucket(tokens=24, seqs=5, pages=32)
UNPAGED = Bucket(tokens=24, seqs=5)
R, T, P, PAGE, M = 5, 24, 32, 4, 6
CHUNK = 4
HEADS: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
RANGES = ("kv_start", "kv_end")
SPECS = (AttentionSpec(**HEADS), AttentionSpec(**HEADS, sliding_window=3))


class Case(NamedTuple):
    """A batch in Python: one entry per sequence. `tables` is None for an unpaged batch."""

    q_lens: list[int]
    contexts: list[int]
    is_decode: list[bool]
    slots: list[int]
    tables: list[list[int]] | None
    reserved: list[int]

    @property
    def n(self) -> int:
        return len(self.q_lens)

    @property
    def kv_lens(self) -> list[int]:
        return [q + c for q, c in zip(self.q_lens, self.contexts, strict=True)]

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """Row and position of each token."""
        return [
            (s, c + i)
            for s, (q, c) in enumerate(zip(self.q_lens, self.contexts, strict=True))
            for i in range(q)
        ]


@st.composite
def cases(draw, paged=True, quiet=True, reserve=True):
    """Sequences that fit the bucket; a quiet one has keys, but no query token in this step."""
    q_lens, contexts, counts, reserved = [], [], [], []
    for _ in range(draw(st.integers(1, R))):
        q = min(
            draw(st.sampled_from([1, 1, CHUNK, *range(0 if quiet and paged else 1, 13)])), T - sum(q_lens)
        )
        context = draw(st.integers(0, 12)) if paged else 0
        if q + context == 0 or (q == 0 and not (quiet and paged)):
            break
        needed = -(-(q + context) // PAGE)
        spare = draw(st.integers(0, 2)) if reserve else 0
        spare = min(spare, P - sum(counts) - needed)
        if spare < 0:
            break
        q_lens.append(q)
        contexts.append(context)
        counts.append(needed + spare)
        reserved.append(spare)
    if not q_lens:
        q_lens, contexts, counts, reserved = [1], [0], [1], [0]
    n = len(q_lens)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    pages = rng.permutation(64)[: sum(counts)].tolist()
    starts = np.cumsum([0, *counts])
    tables = [pages[starts[i] : starts[i + 1]] for i in range(n)]
    is_decode = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return Case(
        q_lens, contexts, is_decode, rng.permutation(99)[:n].tolist(), tables if paged else None, reserved
    )


def build(case: Case) -> RaggedBatch:
    """The batch of a case, field by field: unlike `nest_sequences`, it has quiet rows too."""
    bucket = UNPAGED if case.tables is None else PAGED
    packed = np.zeros(field_slices(bucket)["page_list"].stop, np.int32)
    at = {name: packed[place] for name, place in field_slices(bucket).items()}
    at["num_seqs"][0] = case.n
    at["token_ids"][: sum(case.q_lens)] = 7 + np.arange(sum(case.q_lens))
    at["cu_q_lens"][:] = padded(np.cumsum([0, *case.q_lens]), sum(case.q_lens), R + 1)
    at["kv_lens"][: case.n] = case.kv_lens
    at["is_decode"][: case.n] = case.is_decode
    at["state_slots"][:] = padded(case.slots, PAD_SLOT, R)
    if case.tables is not None:
        counts = [len(table) for table in case.tables]
        at["page_indptr"][:] = padded(np.cumsum([0, *counts]), sum(counts), R + 1)
        at["page_list"][: sum(counts)] = [page for table in case.tables for page in table]
    return RaggedBatch(
        packed=jnp.asarray(packed), bucket=bucket, page_size=None if case.tables is None else PAGE
    )


EXPRESSIBLE = (*METADATA_FIELDS, *VISIBLE_FIELDS)
EXPRESSIBLE = tuple(
    name for name in EXPRESSIBLE if name not in ("page_indptr", "page_list")
)  # reserved pages


def prepare(batch: RaggedBatch):
    max_pages_per_seq = None if batch.page_size is None else M
    return prepare_metadata(batch, SPECS, fields=EXPRESSIBLE, max_pages_per_seq=max_pages_per_seq)


def padded(values, padding, length) -> list[int]:
    values = [int(value) for value in values]
    return values + [padding] * (length - len(values))


# What each convention says, sequence by sequence.


def used_pages(case: Case) -> list[list[int]]:
    assert case.tables is not None
    return [table[: -(-kv // PAGE)] for table, kv in zip(case.tables, case.kv_lens, strict=True)]


def table_of(case: Case) -> list[list[int]]:
    return [padded(pages, 0, M) for pages in used_pages(case)] + [[0] * M] * (R - case.n)


def cu(lens) -> list[int]:
    return padded(np.cumsum([0, *lens]), sum(lens), R + 1)


def flashinfer_says(case: Case) -> dict[str, Any]:
    said: dict[str, Any] = {
        "qo_indptr": cu(case.q_lens),
        "kv_indptr": cu(case.kv_lens),
        "kv_len_arr": padded(case.kv_lens, 0, R),
        "batch_indices": padded([s for s, _ in case.tokens], -1, T),
        "positions": padded([p for _, p in case.tokens], 0, T),
    }
    if case.tables is None:
        return said | dict.fromkeys(("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"))
    pages = used_pages(case)
    last = [kv - PAGE * (len(row) - 1) for kv, row in zip(case.kv_lens, pages, strict=True)]
    return said | {
        "paged_kv_indptr": cu([len(row) for row in pages]),
        "paged_kv_indices": padded([page for row in pages for page in row], 0, P),
        "paged_kv_last_page_len": padded(last, 1, R),
    }


def flash_attention_says(case: Case) -> dict[str, Any]:
    return {
        "cu_seqlens_q": cu(case.q_lens),
        "cu_seqlens_k": cu(case.kv_lens),
        "seqused_q": padded(case.q_lens, 0, R),
        "seqused_k": padded(case.kv_lens, 0, R),
        "page_table": None if case.tables is None else table_of(case),
        "max_seqlen_q": T,
        "max_seqlen_k": T if case.tables is None else M * PAGE,
    }


def vllm_says(case: Case) -> dict[str, Any]:
    assert case.tables is not None
    ends = np.cumsum(case.q_lens)
    return {
        "query_start_loc": cu(case.q_lens),
        "seq_lens": padded(case.kv_lens, 0, R),
        "num_computed_tokens": padded(case.contexts, 0, R),
        "block_table": table_of(case),
        "slot_mapping": padded([case.tables[s][p // PAGE] * PAGE + p % PAGE for s, p in case.tokens], -1, T),
        "num_reqs": case.n,
        "num_actual_tokens": sum(case.q_lens),
        "logits_indices": padded([e - 1 if q else 0 for e, q in zip(ends, case.q_lens, strict=True)], 0, R),
        "is_prefilling": [not d for d in case.is_decode] + [False] * (R - case.n),
        "max_query_len": T,
        "max_seq_len": M * PAGE,
    }


def rpa_says(case: Case) -> dict[str, Any]:
    return {
        "kv_lens": padded(case.kv_lens, 0, R),
        "page_indices": table_of(case),
        "cu_q_lens": cu(case.q_lens),
        "num_seqs": [case.n],
    }


def rpa_v3_says(case: Case) -> dict[str, Any]:
    groups = [[], [], [], []]
    for row, q in enumerate([*case.q_lens, *[0] * (R - case.n)]):
        groups[0 if q == 1 else 1 if q == CHUNK else 2 if q else 3].append(row)
    order = [row for group in groups for row in group]
    starts = np.cumsum([0, *case.q_lens])
    tokens = [int(starts[row]) + i for row in order if row < case.n for i in range(case.q_lens[row])]
    tokens += list(range(len(tokens), T))
    table = table_of(case)
    return {
        "kv_lens": [padded(case.kv_lens, 0, R)[row] for row in order],
        "page_indices": [page for row in order for page in table[row]],
        "cu_q_lens": cu([padded(case.q_lens, 0, R)[row] for row in order]),
        "distribution": np.cumsum([len(group) for group in groups[:3]]),
        "row_order": order,
        "row_rank": [order.index(row) for row in range(R)],
        "token_order": tokens,
        "token_rank": [tokens.index(token) for token in range(T)],
    }


def cudnn_says(case: Case) -> dict[str, Any]:
    table = None if case.tables is None else np.reshape(table_of(case), (R, 1, M, 1))
    return {
        "q_seqlen": [padded(case.q_lens, -1, R)],
        "kv_seqlen": [padded(case.kv_lens, -1, R)],
        "q_offsets": [padded(np.cumsum([0, *case.q_lens]), -1, R + 1)],
        "kv_offsets": [padded(np.cumsum([0, *case.kv_lens]), -1, R + 1)],
        "segment_ids": [padded([s + 1 for s, _ in case.tokens], 0, T)],
        "segment_pos": [padded([p for _, p in case.tokens], 0, T)],
        "page_table": table,
    }


class Convention(NamedTuple):
    """An export, its import, what the convention says, and what the import must be told."""

    to: Callable
    from_: Callable
    says: Callable[[Case], dict[str, Any]]
    paged: bool
    unsaid: tuple[str, ...]


def convention(to, from_, says, *, paged, unsaid=("is_decode", "state_slots")) -> Convention:
    def back(exported, token_ids, stated):
        bucket, page_size = (PAGED, PAGE) if paged else (UNPAGED, None)
        return from_(exported, token_ids, bucket=bucket, page_size=page_size, **stated)

    return Convention(jax.jit(to), jax.jit(back), says, paged, unsaid)


TABLE = {"max_pages_per_seq": M}
TO_V3 = partial(ex.to_ragged_paged_attention_v3, **TABLE, chunk_prefill_size=CHUNK)
CONVENTIONS = {
    "flashinfer": convention(ex.to_flashinfer, ex.from_flashinfer, flashinfer_says, paged=True),
    "flash_attention": convention(
        partial(ex.to_flash_attention, **TABLE), ex.from_flash_attention, flash_attention_says, paged=True
    ),
    "vllm": convention(
        partial(ex.to_vllm, **TABLE), ex.from_vllm, vllm_says, paged=True, unsaid=("state_slots",)
    ),
    "ragged_paged_attention": convention(
        partial(ex.to_ragged_paged_attention, **TABLE), ex.from_ragged_paged_attention, rpa_says, paged=True
    ),
    "ragged_paged_attention_v3": convention(
        TO_V3,
        ex.from_ragged_paged_attention_v3,
        rpa_v3_says,
        paged=True,
        unsaid=("is_decode", "state_slots", "num_seqs"),
    ),
    "cudnn": convention(partial(ex.to_cudnn, **TABLE), ex.from_cudnn, cudnn_says, paged=True),
    "unpaged flashinfer": convention(ex.to_flashinfer, ex.from_flashinfer, flashinfer_says, paged=False),
    "unpaged flash_attention": convention(
        ex.to_flash_attention, ex.from_flash_attention, flash_attention_says, paged=False
    ),
    "unpaged cudnn": convention(ex.to_cudnn, ex.from_cudnn, cudnn_says, paged=False),
}


def check_values(convention: Convention, case: Case):
    exported = convention.to(prepare(build(case)))
    said = convention.says(case)
    assert said.keys() == {row.name for row in field_table(type(exported))}
    for name, expected in said.items():
        got = getattr(exported, name)
        if expected is None or isinstance(got, int):
            assert got == expected, name
            continue
        assert got.dtype == (bool if name == "is_prefilling" else jnp.int32), name
        np.testing.assert_array_equal(got, expected, err_msg=name, strict=False)


def assert_same(got, expected):
    """Trees equal in every bit; chex, which is slow, says where they are not."""
    leaves = [jax.tree.leaves(jax.device_get(tree)) for tree in (got, expected)]
    alike = jax.tree.structure(got) == jax.tree.structure(expected)
    if not (alike and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(*leaves, strict=True))):
        chex.assert_trees_all_equal(got, expected, strict=True)


def check_round_trip(convention: Convention, case: Case):
    """Law 10: what comes back has the same metadata, all fields, schedules included."""
    batch = build(case)
    metadata = prepare(batch)
    exported = convention.to(metadata)
    tokens = batch.token_ids
    stated = {name: getattr(batch, name) for name in convention.unsaid}
    if isinstance(exported, ex.RaggedPagedAttentionV3Metadata):  # what stands beside it has its order
        tokens = tokens[exported.token_order]
        stated = {
            name: value if name == "num_seqs" else value[exported.row_order] for name, value in stated.items()
        }
    back = convention.from_(exported, tokens, stated)
    assert back.bucket == batch.bucket
    np.testing.assert_array_equal(back.token_ids, batch.token_ids)
    assert_same(prepare(back), metadata)
    if not any(case.reserved):
        assert_same(back, batch)


def thoroughly(check, examples: int, name: str, **options):
    """Run a check on many cases of a convention."""
    convention = CONVENTIONS[name]

    @settings(max_examples=examples)
    @given(cases(paged=convention.paged, **options))
    def run(case):
        check(convention, case)

    run()


@pytest.mark.smoke
@pytest.mark.parametrize("name", CONVENTIONS)
def test_values(name):
    thoroughly(check_values, EXAMPLES, name)


@pytest.mark.smoke
@pytest.mark.parametrize("name", CONVENTIONS)
def test_round_trip(name):
    thoroughly(check_round_trip, EXAMPLES, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("check", [check_values, check_round_trip])
def test_thoroughly(check, name):
    thoroughly(check, THOROUGH, name)
    thoroughly(check, 1000, name, quiet=False, reserve=False)


# A batch to look at: one decode, a prompt, a chunk over cached keys; two rows and fifteen tokens are padding.

EXAMPLE = Case([1, 5, 3], [7, 0, 6], [True, False, False], [2, 0, 1], [[9, 3], [5, 60], [1, 8, 4]], [0] * 3)
METADATA = prepare(build(EXAMPLE))
VLLM = ex.to_vllm(METADATA, max_pages_per_seq=M)


def test_the_batches_of_these_tests_are_nested_batches():
    nested = nest_sequences(
        [[7], range(8, 13), range(13, 16)],
        context_lens=EXAMPLE.contexts,
        page_tables=EXAMPLE.tables,
        page_size=PAGE,
        is_decode=EXAMPLE.is_decode,
        state_slots=EXAMPLE.slots,
        bucket=PAGED,
    )
    chex.assert_trees_all_equal(build(EXAMPLE), nested)


# The traps: conventions that differ in a value or a meaning, one test each.


def test_trap_a_dead_sequence_has_each_systems_padding_value():
    dead = slice(EXAMPLE.n, None)
    flashinfer = ex.to_flashinfer(METADATA)
    np.testing.assert_array_equal(flashinfer.kv_len_arr[dead], 0)
    np.testing.assert_array_equal(flashinfer.paged_kv_last_page_len[dead], 1)  # type: ignore[index]
    np.testing.assert_array_equal(ex.to_flash_attention(METADATA, **TABLE).seqused_k[dead], 0)
    np.testing.assert_array_equal(ex.to_ragged_paged_attention(METADATA, **TABLE).kv_lens[dead], 0)
    np.testing.assert_array_equal(VLLM.seq_lens[dead], 0)
    np.testing.assert_array_equal(ex.to_cudnn(METADATA, **TABLE).kv_seqlen[0, dead], -1)
    np.testing.assert_array_equal(ex.to_cudnn(METADATA, **TABLE, pad_len=0).kv_seqlen[0, dead], 0)


@pytest.mark.parametrize("pad_seq_len", [0, 1, 17])
def test_trap_vllm_pads_seq_lens_with_zero_or_one_and_no_key_comes_back(pad_seq_len):
    exported = ex.to_vllm(METADATA, **TABLE, pad_seq_len=pad_seq_len)
    np.testing.assert_array_equal(exported.seq_lens, [8, 5, 9, pad_seq_len, pad_seq_len])
    batch = build(EXAMPLE)
    back = ex.from_vllm(
        exported, batch.token_ids, bucket=PAGED, page_size=PAGE, state_slots=batch.state_slots
    )
    chex.assert_trees_all_equal(back, batch)


@pytest.mark.parametrize("pad_len", [0, -1])
def test_trap_cudnn_pads_with_minus_one_or_zero_and_both_come_back(pad_len):
    batch = build(EXAMPLE)
    back = ex.from_cudnn(
        ex.to_cudnn(METADATA, **TABLE, pad_len=pad_len),
        batch.token_ids,
        bucket=PAGED,
        page_size=PAGE,
        is_decode=batch.is_decode,
        state_slots=batch.state_slots,
    )
    chex.assert_trees_all_equal(back, batch)


def test_trap_flashinfers_get_seq_lens_sees_a_key_in_a_dead_row():
    exported = ex.to_flashinfer(METADATA)
    assert exported.paged_kv_indptr is not None
    pages = np.diff(np.asarray(exported.paged_kv_indptr))
    its_lens = np.maximum(pages - 1, 0) * PAGE + np.asarray(exported.paged_kv_last_page_len)
    np.testing.assert_array_equal(its_lens, [8, 5, 9, 1, 1])  # wrong; so its importer reads kv_len_arr
    batch = build(EXAMPLE)
    back = ex.from_flashinfer(exported, batch.token_ids, bucket=PAGED, page_size=PAGE)
    np.testing.assert_array_equal(back.kv_lens, [8, 5, 9, 0, 0])


def test_trap_a_dead_token_wraps_at_minus_one_and_drops_at_our_slot():
    cache = jnp.zeros(64 * PAGE)
    ones = jnp.ones(T)
    ours = cache.at[METADATA.slot_mapping].set(ones, mode="drop")
    theirs = cache.at[VLLM.slot_mapping].set(ones, mode="drop")
    assert ours.sum() == sum(EXAMPLE.q_lens)
    assert (float(ours[-1]), float(theirs[-1])) == (0.0, 1.0)  # -1 overwrote the last live slot
    mapped = ex.slots_from_vllm(VLLM.slot_mapping)
    np.testing.assert_array_equal(mapped, METADATA.slot_mapping)
    np.testing.assert_array_equal(cache.at[mapped].set(ones, mode="drop"), ours)


def test_trap_seq_lens_count_this_steps_tokens_and_computed_tokens_do_not():
    np.testing.assert_array_equal(VLLM.seq_lens[:3], [8, 5, 9])
    np.testing.assert_array_equal(VLLM.num_computed_tokens[:3], [7, 0, 6])
    flash = ex.to_flash_attention(METADATA, **TABLE)
    np.testing.assert_array_equal(flash.seqused_k, VLLM.seq_lens)
    np.testing.assert_array_equal(flash.seqused_k - flash.seqused_q, VLLM.num_computed_tokens)
    np.testing.assert_array_equal(ex.to_flashinfer(METADATA).kv_len_arr, VLLM.seq_lens)
    np.testing.assert_array_equal(ex.to_ragged_paged_attention(METADATA, **TABLE).kv_lens, VLLM.seq_lens)
    np.testing.assert_array_equal(ex.to_cudnn(METADATA, **TABLE).kv_seqlen[0, :3], VLLM.seq_lens[:3])


def test_trap_page_indices_are_rectangular_in_v2_flat_in_v3_and_compact_in_flashinfer():
    v2 = ex.to_ragged_paged_attention(METADATA, **TABLE)
    v3 = TO_V3(METADATA)
    flashinfer = ex.to_flashinfer(METADATA)
    assert v2.page_indices.shape == (R, M)
    assert v3.page_indices.shape == (R * M,)
    np.testing.assert_array_equal(v3.page_indices.reshape(R, M)[v3.row_rank], v2.page_indices)
    assert flashinfer.paged_kv_indices is not None
    np.testing.assert_array_equal(flashinfer.paged_kv_indices[:8], [9, 3, 5, 60, 1, 8, 4, 0])


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (WindowClass(), (-1, 0)),
        (WindowClass(causal=False), (-1, -1)),
        (WindowClass(sliding_window=1), (0, 0)),
        (WindowClass(sliding_window=3), (2, 0)),
        (WindowClass(sliding_window=9), (8, 0)),  # the longest sequence
        (WindowClass(sliding_window=1000), (999, 0)),
    ],
)
def test_trap_the_window_counts_the_keys_besides_ones_own(window, expected):
    """FlashAttention's text: query i sees keys i + seqlen_k - seqlen_q - left .. + right, inclusive."""
    spec = AttentionSpec(**HEADS, causal=window.causal, sliding_window=window.sliding_window)
    left, right = ex.window_size(spec)
    assert (left, right) == ex.window_size(window) == expected
    visible = prepare_metadata(build(EXAMPLE), spec, fields=RANGES).visible_keys(window)
    token = 0
    for q_len, kv_len in zip(EXAMPLE.q_lens, EXAMPLE.kv_lens, strict=True):
        i, j = np.arange(q_len)[:, None] + kv_len - q_len, np.arange(kv_len)[None, :]
        mask = ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))
        mine = np.arange(token, token + q_len)
        start, end = np.asarray(visible.kv_start)[mine, None], np.asarray(visible.kv_end)[mine, None]
        np.testing.assert_array_equal((start <= j) & (j < end), mask)
        token += q_len


def test_a_prefix_is_no_pair():
    with pytest.raises(ValueError, match=r"prefix_lm=True.* is no \(left, right\) pair"):
        ex.window_size(AttentionSpec(**HEADS, prefix_lm=True))


@pytest.mark.parametrize("sliding_window", [1, 2, 6, 50])
def test_trap_the_window_means_the_same_to_jax_nn(sliding_window):
    """Equal scores over an identity matrix of values show which keys `jax.nn` lets through."""
    spec = AttentionSpec(**HEADS, sliding_window=sliding_window)
    visible = prepare_metadata(nest_sequences([[1] * 6]), spec, fields=RANGES).visible_keys(spec.window_class)
    zeros = jnp.zeros((6, 1, 6))
    out = jax.nn.dot_product_attention(
        zeros, zeros, jnp.eye(6)[:, None], local_window_size=ex.window_size(spec), is_causal=True
    )
    key = np.arange(6)[None, :]
    start, end = np.asarray(visible.kv_start)[:6, None], np.asarray(visible.kv_end)[:6, None]
    np.testing.assert_array_equal(np.asarray(out[:, 0]) > 0, (start <= key) & (key < end))


def test_trap_slot_mapping_is_int64_in_vllm_and_the_host_casts_it():
    assert VLLM.slot_mapping.dtype == jnp.int32
    on_host = np.asarray(VLLM.slot_mapping, np.int64)
    assert on_host.dtype == np.int64
    assert on_host.tolist() == VLLM.slot_mapping.tolist()
    assert on_host[0] == 3 * PAGE + 3  # position 7 in the second page
    assert (on_host[sum(EXAMPLE.q_lens) :] == -1).all()


@given(cases())
def test_trap_v3_wants_single_tokens_first_and_a_way_back(case):
    """Its kernel for the first group reads one token per row, and that for the second `CHUNK`."""
    exported = CONVENTIONS["ragged_paged_attention_v3"].to(prepare(build(case)))
    q_lens = np.diff(exported.cu_q_lens)
    single, chunk, rest = np.asarray(exported.distribution)
    assert (q_lens[:single] == 1).all()
    assert (q_lens[single:chunk] == CHUNK).all()
    assert (q_lens[chunk:rest] > 1).all()
    assert (q_lens[rest:] == 0).all()
    np.testing.assert_array_equal(exported.row_order[exported.row_rank], np.arange(R))
    q = 100 + np.arange(T)
    moved = q[exported.token_order]
    np.testing.assert_array_equal(moved[exported.token_rank], q)
    starts = np.cumsum([0, *case.q_lens])
    for place in range(rest):
        row = int(exported.row_order[place])
        mine = moved[exported.cu_q_lens[place] : exported.cu_q_lens[place + 1]]
        np.testing.assert_array_equal(mine, q[starts[row] : starts[row + 1]])
        assert exported.kv_lens[place] == case.kv_lens[row]


def test_trap_v3_without_a_chunk_size_skips_its_second_group_so_it_is_empty():
    """A fresh prompt stands in the second group of `request_distribution`: that is another partition."""
    exported = ex.to_ragged_paged_attention_v3(METADATA, **TABLE)
    np.testing.assert_array_equal(exported.distribution, [1, 1, 3])
    np.testing.assert_array_equal(METADATA.request_distribution, [1, 2, 3])


def test_trap_a_speculating_row_decodes_but_is_no_single_token_to_v3():
    case = EXAMPLE._replace(q_lens=[2, 1, 3], contexts=[6, 0, 6], is_decode=[True, False, True])
    exported = ex.to_ragged_paged_attention_v3(prepare(build(case)), **TABLE)
    np.testing.assert_array_equal(exported.distribution, [1, 1, 3])
    np.testing.assert_array_equal(exported.row_order, [1, 0, 2, 3, 4])


def test_trap_the_last_page_length_is_never_zero():
    case = EXAMPLE._replace(q_lens=[1, 4, 2], contexts=[7, 0, 10])  # 8, 4 and 12 keys fill their pages
    exported = ex.to_flashinfer(prepare(build(case)))
    np.testing.assert_array_equal(exported.paged_kv_last_page_len, [4, 4, 4, 1, 1])  # type: ignore[arg-type]


def test_trap_the_rectangular_table_is_the_one_large_field():
    """1,024 sequences of 128K tokens in pages of 16: 32 MiB, all other fields together below 1 MiB."""
    bucket = Bucket(tokens=1024, seqs=1024, pages=1 << 16)
    shapes = jax.eval_shape(lambda: jnp.zeros(field_slices(bucket)["page_list"].stop, jnp.int32))

    def export(packed):
        batch = RaggedBatch(packed=packed, bucket=bucket, page_size=16)
        return ex.to_vllm(prepare_metadata(batch), max_pages_per_seq=8192)

    exported = jax.eval_shape(export, shapes)
    size = {name: leaf.size * 4 for name, leaf in vars_of(exported).items() if hasattr(leaf, "size")}
    assert size.pop("block_table") == 32 << 20
    assert sum(size.values()) < 1 << 20


def vars_of(record) -> dict[str, Any]:
    return {row.name: getattr(record, row.name) for row in field_table(type(record))}


def test_trap_a_batch_with_reserved_pages_comes_back_without_them():
    case = EXAMPLE._replace(tables=[[9, 3, 11], [5, 60, 12], [1, 8, 4]], reserved=[1, 1, 0])
    batch = build(case)
    exported = ex.to_flashinfer(prepare(batch))
    back = ex.from_flashinfer(exported, batch.token_ids, bucket=PAGED, page_size=PAGE)
    np.testing.assert_array_equal(back.page_indptr, [0, 2, 4, 7, 7, 7])
    np.testing.assert_array_equal(back.page_list[:8], [9, 3, 5, 60, 1, 8, 4, 0])


def test_trap_rows_past_the_last_sequence_may_hold_anything_in_a_ragged_kernel():
    exported = ex.RaggedPagedAttentionMetadata(
        kv_lens=jnp.array([8, 5, 9, 77, -5], jnp.int32),
        page_indices=jnp.array(table_of(EXAMPLE)[:3] + [[99] * M] * 2, jnp.int32),
        cu_q_lens=jnp.array([0, 1, 6, 9, 1000, -3], jnp.int32),
        num_seqs=jnp.array([3], jnp.int32),
    )
    batch = build(EXAMPLE)
    back = ex.from_ragged_paged_attention(
        exported,
        batch.token_ids,
        bucket=PAGED,
        page_size=PAGE,
        is_decode=batch.is_decode,
        state_slots=batch.state_slots,
    )
    chex.assert_trees_all_equal(back, batch)


# The kernels' own definitions read the exports.


@pytest.mark.smoke
@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("sliding_window", [None, 1, 3])
def test_jaxs_ragged_paged_attention_computes_our_attention(version, sliding_window):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import (
        dynamic_validate_inputs,
        ref_ragged_paged_attention,
    )

    spec = AttentionSpec(**HEADS, sliding_window=sliding_window)
    metadata = prepare_metadata(build(EXAMPLE), spec, fields={*METADATA_FIELDS, *RANGES})
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((T, 4, 16), (64, PAGE, 2, 16), (64, PAGE, 2, 16))
    )
    ours = attention(q, k, v, metadata, spec, implementation="reference")
    n = sum(EXAMPLE.q_lens)
    if version == "v2":
        there, back = jnp.arange(T), jnp.arange(T)
        exported = ex.to_ragged_paged_attention(metadata, **TABLE)
    else:
        v3 = TO_V3(metadata)
        there, back = v3.token_order, v3.token_rank
        exported = ex.RaggedPagedAttentionMetadata(
            kv_lens=v3.kv_lens,
            page_indices=v3.page_indices.reshape(R, M),
            cu_q_lens=v3.cu_q_lens,
            num_seqs=v3.distribution[2:],
        )
    arrays = (exported.kv_lens, exported.page_indices, exported.cu_q_lens, exported.num_seqs)
    kv_pages = jnp.stack([k, v], axis=3).reshape(64, PAGE, 4, 16)  # keys and values of a head in turn
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        dynamic_validate_inputs(q[there], kv_pages, *arrays)
        theirs = ref_ragged_paged_attention(
            q[there], kv_pages, *arrays, sm_scale=spec.softmax_scale, sliding_window=sliding_window
        )
    theirs = jnp.zeros_like(ours).at[:n].set(theirs)[back]
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


# Defaults, selections and errors.


def test_what_no_one_says_has_the_defaults_of_nesting():
    batch = build(EXAMPLE)
    back = ex.from_flashinfer(ex.to_flashinfer(METADATA), batch.token_ids, bucket=PAGED, page_size=PAGE)
    assert int(back.num_seqs) == 3
    assert not back.is_decode.any()
    np.testing.assert_array_equal(back.state_slots, [0, 1, 2, PAD_SLOT, PAD_SLOT])
    decode = nest_sequences([[4], [5]], bucket=Bucket(3, 3, max_q_len=1))
    back = ex.from_flash_attention(
        ex.to_flash_attention(prepare_metadata(decode)),
        decode.token_ids,
        bucket=decode.bucket,
        page_size=None,
    )
    chex.assert_trees_all_equal(back, decode)


def test_the_number_of_sequences_can_be_stated():
    batch = build(EXAMPLE)
    exported = ex.to_flashinfer(METADATA)
    two = jnp.array(2, jnp.int32)
    back = ex.from_flashinfer(exported, batch.token_ids, bucket=PAGED, page_size=PAGE, num_seqs=two)
    np.testing.assert_array_equal(back.kv_lens, [8, 5, 0, 0, 0])
    np.testing.assert_array_equal(back.cu_q_lens, [0, 1, 6, 6, 6, 6])
    np.testing.assert_array_equal(back.page_indptr, [0, 2, 4, 4, 4, 4])


def test_a_row_without_keys_counts_where_others_follow():
    case = EXAMPLE._replace(q_lens=[1, 0, 3], contexts=[7, 0, 6], tables=[[9, 3], [], [1, 8, 4]])
    batch = build(case)
    back = ex.from_flashinfer(
        ex.to_flashinfer(prepare(batch)),
        batch.token_ids,
        bucket=PAGED,
        page_size=PAGE,
        is_decode=batch.is_decode,
        state_slots=batch.state_slots,
    )
    chex.assert_trees_all_equal(back, batch)


def test_vllm_without_phases_decodes_by_default():
    batch = build(EXAMPLE)
    exported = dataclasses.replace(VLLM, is_prefilling=None)
    assert not ex.from_vllm(exported, batch.token_ids, bucket=PAGED, page_size=PAGE).is_decode.any()
    stated = ex.from_vllm(
        exported, batch.token_ids, bucket=PAGED, page_size=PAGE, is_decode=jnp.ones(R, bool)
    )
    np.testing.assert_array_equal(stated.is_decode, [True, True, True, False, False])


@pytest.mark.parametrize("name", [name for name in CONVENTIONS if " " not in name])
def test_an_export_reads_what_its_consumer_says(name):
    batch = build(EXAMPLE)
    metadata = prepare_metadata(batch, consumers=ex.EXPORT_CONSUMERS[name])
    assert set(metadata.values) == ex.EXPORT_CONSUMERS[name].reads
    chex.assert_trees_all_equal(CONVENTIONS[name].to(metadata), CONVENTIONS[name].to(METADATA))
    for field in metadata.values:  # and nothing more
        fewer = dataclasses.replace(metadata, values={**metadata.values})
        del fewer.values[field]
        with pytest.raises(AttributeError, match=repr(field)):
            CONVENTIONS[name].to(fewer)


def test_the_page_table_is_the_prepared_one():
    np.testing.assert_array_equal(ex.page_indices(METADATA, M), METADATA.page_indices)


@pytest.mark.parametrize(
    "kind",
    [
        ex.FlashInferMetadata,
        ex.FlashAttentionMetadata,
        ex.VllmMetadata,
        ex.RaggedPagedAttentionMetadata,
        ex.RaggedPagedAttentionV3Metadata,
        ex.CudnnMetadata,
    ],
)
def test_every_field_is_described(kind):
    for row in field_table(kind):
        assert row.meaning
        assert row.also_called in ("", *METADATA_FIELDS)


@pytest.mark.smoke
def test_statics_stay_ints_in_a_jit():
    exported = jax.jit(partial(ex.to_flash_attention, **TABLE))(METADATA)
    assert (type(exported.max_seqlen_q), type(exported.max_seqlen_k)) == (int, int)
    decode = nest_sequences([[4]], page_tables=[[1]], page_size=4, bucket=Bucket(2, 2, 8, max_q_len=1))
    assert ex.to_vllm(prepare_metadata(decode), max_pages_per_seq=3).max_query_len == 1


def test_an_imported_batch_passes_the_checks():
    batch = build(EXAMPLE)
    back = CONVENTIONS["vllm"].from_(VLLM, batch.token_ids, {})
    with jax.numpy_rank_promotion("allow"):
        error, _ = checkify.checkify(partial(check_batch, num_pages=64))(back)
    error.throw()


def test_a_table_that_is_too_narrow_is_found():
    check = checkify.checkify(ex.check_table_width)
    check(METADATA, 3)[0].throw()
    error, _ = check(METADATA, 2)
    with pytest.raises(checkify.JaxRuntimeError, match="has 3 pages, more than max_pages_per_seq=2"):
        error.throw()


UNPAGED_METADATA = prepare(build(Case([2], [0], [False], [0], None, [0])))


@pytest.mark.parametrize(
    "export",
    [
        ex.to_vllm,
        ex.to_ragged_paged_attention,
        ex.to_ragged_paged_attention_v3,
        ex.to_flash_attention,
        ex.to_cudnn,
    ],
)
def test_an_unpaged_batch_has_no_page_table(export):
    with pytest.raises(ValueError, match="give nest_sequences page_tables and page_size"):
        export(UNPAGED_METADATA, max_pages_per_seq=M)


@pytest.mark.parametrize("export", [ex.to_flash_attention, ex.to_cudnn])
def test_a_paged_batch_needs_the_width_of_its_table(export):
    with pytest.raises(ValueError, match="max_pages_per_seq=None, but the batch is paged"):
        export(METADATA)
    with pytest.raises(ValueError, match="max_pages_per_seq=0 must be at least 1"):
        export(METADATA, max_pages_per_seq=0)


def test_pages_and_page_size_belong_together():
    tokens = jnp.zeros(T, jnp.int32)
    with pytest.raises(ValueError, match="page_size=None for an export with pages"):
        ex.from_flashinfer(ex.to_flashinfer(METADATA), tokens, bucket=PAGED, page_size=None)
    with pytest.raises(ValueError, match="page_size=4 for an export without pages"):
        ex.from_cudnn(ex.to_cudnn(UNPAGED_METADATA), tokens, bucket=UNPAGED, page_size=4)


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        (Bucket(24, 6, 32), "5 rows and 32 pages given; .* needs 6 and 32"),
        (Bucket(24, 5, 31), "5 rows and 32 pages given; .* needs 5 and 31"),
        (Bucket(23, 5, 32), "token_ids has 24 entries"),
    ],
)
def test_arrays_must_have_the_buckets_sizes(bucket, message):
    with pytest.raises(ValueError, match=message):
        ex.from_flashinfer(ex.to_flashinfer(METADATA), jnp.zeros(T, jnp.int32), bucket=bucket, page_size=PAGE)


def test_a_page_table_must_have_the_buckets_rows():
    with pytest.raises(ValueError, match=r"the page table has 5 rows; .* needs 6"):
        ex.from_vllm(VLLM, jnp.zeros(T, jnp.int32), bucket=Bucket(24, 6, 32), page_size=PAGE)


def test_a_window_of_ones_own_is_no_pair():
    class Diagonal(NamedTuple):
        span: int = 1

    class DiagonalSpec(AttentionSpec):
        @property
        def window_class(self) -> Any:
            return Diagonal()

    with pytest.raises(ValueError, match=r"window_class=Diagonal\(span=1\) is no \(left, right\) pair"):
        ex.window_size(DiagonalSpec(**HEADS))
