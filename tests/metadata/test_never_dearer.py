"""Law 9: the compiled program holds each metadata computation once, and no more than a specialised one.

Programs are compiled and counted, not timed: XLA's instructions, arithmetic operations and bytes.
`specialised_metadata.py` holds what the superset is compared with, `never_dearer.py` and
`once_per_step.py` the functions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_cost import UNFUSED, Cost, compiled, cost_of, opcodes, program_cost, work
from never_dearer import (
    BUCKETS,
    GLOBAL,
    LAYERS,
    READERS,
    SLIDING,
    TWO_SIDED,
    WIDER,
    compare_further_class,
    compare_together,
    empty_batch,
    programs,
    window_classes,
)
from once_per_step import METADATA, STACK_LAYERS, metadata_instructions, stack_text
from specialised_metadata import read_by

from jaxattn import AttentionSpec, Bucket, RaggedBatch
from jaxattn.batch.ragged import pack_fields

FUSABLE = frozenset("add subtract multiply minimum maximum compare select and or not broadcast slice".split())
"""Opcodes that XLA may repeat inside the fusions that read them, in place of reading memory."""


def random_batch(bucket: Bucket, page_size: int | None, rng: np.random.Generator) -> RaggedBatch:
    """Any batch of a bucket: rows without tokens, reserved pages, and rows that outran their pages."""
    n = int(rng.integers(1, bucket.seqs + 1))
    wanted = rng.choice([0, 1, 1, 2, 7, 40, 200], n).clip(max=bucket.max_q_len)
    q_lens = np.diff(wanted.cumsum().clip(max=bucket.tokens), prepend=0)
    kv_lens = q_lens if page_size is None else q_lens + rng.integers(0, 5 * page_size, n)
    page_counts = np.zeros(n, int) if page_size is None else -(-kv_lens // page_size) + rng.integers(-1, 3, n)
    page_counts = np.diff(page_counts.clip(min=0).cumsum().clip(max=bucket.pages), prepend=0)

    def per_row(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, bucket.seqs - n)).astype(np.int32)

    def prefix_sums(values: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], per_row(values).cumsum()]).astype(np.int32)

    fields = {
        "num_seqs": np.int32(n),
        "token_ids": np.zeros(bucket.tokens, np.int32),
        "cu_q_lens": prefix_sums(q_lens),
        "kv_lens": per_row(kv_lens),
        "is_decode": per_row(q_lens == 1),
        "state_slots": np.arange(bucket.seqs, dtype=np.int32),
        "prefix_lm_lens": np.zeros(bucket.seqs, np.int32),
        "page_indptr": prefix_sums(page_counts),
        "page_list": rng.permutation(bucket.pages).astype(np.int32),
    }
    return pack_fields(bucket, page_size, **{name: jnp.asarray(value) for name, value in fields.items()})


def assert_no_dearer(cost: Cost, limit: Cost, what: str) -> None:
    assert not cost.exceeds(limit), f"{what} costs {cost}, more than the specialised {limit}"


def check_consumer(bucket: Bucket, *, paged: bool, layers: tuple[AttentionSpec, ...], consumer: str) -> None:
    """The same arrays, for no more."""
    abstract = empty_batch(bucket, paged=paged)
    compiled_programs = programs(consumer, layers, abstract)
    for seed in range(6):
        batch = random_batch(abstract.bucket, abstract.page_size, np.random.default_rng(seed))
        results = {name: program(batch) for name, program in compiled_programs.items()}
        results["selected"] = read_by(consumer, results["selected"], window_classes(layers))
        for name in ("inlined", "selected"):
            assert results[name].keys() == results["specialised"].keys()
            for array, value in results["specialised"].items():
                np.testing.assert_array_equal(results[name][array], value, err_msg=f"{name} {array}")
    costs = {name: program_cost(program) for name, program in compiled_programs.items()}
    assert_no_dearer(costs["inlined"], costs["specialised"], "the superset, inlined,")
    assert_no_dearer(costs["selected"], costs["specialised"], "the superset, selected,")


@pytest.mark.thinned(2)
@pytest.mark.parametrize("consumer", READERS)
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "unpaged"])
@pytest.mark.parametrize("bucket", ["decode 32", "mixed 512"])
def test_the_superset_is_no_dearer_than_a_function_for_one_backend(bucket, paged, consumer):
    check_consumer(BUCKETS[bucket], paged=paged, layers=LAYERS["5 sliding : 1 global"], consumer=consumer)


@pytest.mark.parametrize("consumer", ["triton", "write_cache", "decoder"])
def test_three_window_classes_and_the_decoder(consumer):
    check_consumer(BUCKETS["mixed 512"], paged=True, layers=LAYERS["three classes"], consumer=consumer)


@pytest.mark.slow
@pytest.mark.parametrize("consumer", READERS)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "unpaged"])
@pytest.mark.parametrize("bucket", [*BUCKETS, "decode with padding", "odd"])
def test_the_superset_is_no_dearer_anywhere(bucket, paged, layers, consumer):
    more = {"decode with padding": Bucket(50, 33, 130, max_q_len=1), "odd": Bucket(77, 13, 61)}
    check_consumer((BUCKETS | more)[bucket], paged=paged, layers=LAYERS[layers], consumer=consumer)


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["decode 32", "mixed 512"])
def test_wide_groups_cut_into_single_tokens(bucket):
    layers = (AttentionSpec(num_q_heads=128, num_kv_heads=1, head_dim=16, sliding_window=9),)
    check_consumer(BUCKETS[bucket], paged=True, layers=layers, consumer="triton")


@pytest.mark.parametrize("paged", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_all_consumers_at_once_are_no_dearer_than_one_by_one(paged):
    costs = compare_together(LAYERS["three classes"], empty_batch(BUCKETS["mixed 512"], paged=paged))
    assert_no_dearer(costs["superset"], costs["specialised"], "the superset of all consumers")


# Counted before fusion, which may derive a shared value again for each of its readers.
@pytest.mark.parametrize("last", [WIDER, TWO_SIDED], ids=["sliding", "two-sided"])
@pytest.mark.parametrize("bucket", [pytest.param("decode 32", marks=pytest.mark.slow), "mixed 512"])
def test_a_further_window_class_adds_its_own_ranges_and_nothing_else(bucket, last):
    batch = empty_batch(BUCKETS[bucket], paged=True)
    costs = compare_further_class("xla", (GLOBAL, SLIDING, last), batch)
    assert_no_dearer(costs["superset"], costs["specialised"], "a further window class")


def check_stack(implementation: str, form: str, layers: tuple[int, ...], **kwargs: Any) -> None:
    """As many instructions of the metadata, however many layers."""
    texts = [stack_text(n, implementation, form, once=True, **kwargs) for n in layers]
    if implementation == "xla" or form == "scan":
        counts = [work(text, METADATA) for text in texts]
        assert counts[0] > 0
        assert len(set(counts)) == 1, counts
        return
    # Layers of the reference are fused with what they read: nothing but arithmetic may be repeated...
    kept = [{k: n for k, n in opcodes(t, METADATA).items() if k not in FUSABLE} for t in texts]
    # ...and without fusion, nothing at all.
    exact = [stack_text(n, implementation, form, once=True, options=UNFUSED, **kwargs) for n in layers]
    counts = [work(text, METADATA) for text in exact]
    assert counts[0] > 0
    assert len(set(counts)) == 1, counts
    costly = ("gather", "scatter", "reduce-window", "sort")
    assert len({tuple(k.get(op, 0) for op in costly) for k in kept}) == 1, kept


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_further_layer_adds_none_of_the_metadata(implementation):
    check_stack(implementation, "loop", (1, 2), classes=STACK_LAYERS[1:])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_scanned_layers_close_over_the_metadata(implementation):
    check_stack(implementation, "scan", (4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["loop", "scan"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_sixteen_layers_hold_the_metadata_of_one(implementation, form):
    check_stack(implementation, form, (4, 8, 16))
    check_stack(
        implementation, form, (2, 4, 8, 16) if form == "scan" else (1, 2, 4, 8, 16), classes=STACK_LAYERS[:1]
    )


def test_rematerialisation_repeats_what_every_layer_derives():
    """Where deriving once does pay: the compiler may not merge what is derived again on purpose."""
    once, each = (
        [metadata_instructions(n, "reference", "rematerialised loop", once=once) for n in (2, 4)]
        for once in (True, False)
    )
    assert each[1] - each[0] > 4 * (once[1] - once[0])


def test_the_count_of_a_known_program():
    x = jax.ShapeDtypeStruct((8,), jnp.int32)
    text = compiled(lambda x: (x + 1, jnp.cumsum(x)), x).as_text() or ""
    assert opcodes(text)["reduce-window"] == 1
    assert cost_of(lambda x: x + x, x) == Cost(instructions=1, flops=8.0, bytes=64.0)
