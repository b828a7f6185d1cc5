"""What does metadata cost: nested once and prepared once, against once per backend or per layer?

Every case runs in one process on ours and on the baselines of `per_backend_metadata.py`, which are
our own restatements of AutoDeploy's steps and not its code: they have none of its dispatch, which is
probably most of its time. Candidates take turns, each call takes the next of eight batches, and a
figure is the median over rounds of the median of a round, warm. Before anything is timed, every field
of every baseline is compared with ours.

    python experiments/metadata_cost.py

prints tables and writes `experiments/results/metadata_cost.json` with provenance. What is compared:

1. On the host: `nest_sequences` from arrays, with and without its checks, and from lists, against
   "before" (staging, and every consumer for itself) and "after" (a staged superset), both in NumPy and
   without checks. "After" holds some fields that ours leaves to the device: positions, last page
   lengths, indices to gather. So it is compared again in 2.
2. Ready on the device: nesting, transfer and `prepare_metadata` as a program of its own, for all
   fields, for what a decoder reads, and for "the same" fields as the baselines'; against "before" op
   by op in `jax.numpy`, and against "after" with its transfer.
3. Inside a step, as a model runs: metadata derived in the step's program against metadata given as
   an argument. First in layers that do little but read every field, where the difference shows; then
   in a small decoder.
4. In every layer against once: in one jit, under `jax.checkpoint`, and in jits of their own. In one
   jit no difference is expected, since the compiler merges what is equal.
5. Bytes transferred: the bucket's buffer against buffers of capacity, and what is live.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from per_backend_metadata import (
    CONSUMERS,
    HYBRID,
    Capacity,
    Fields,
    StagedSuperset,
    StepInputs,
    before_buffers,
    before_bytes,
    prepare_each,
    stage_before,
    stage_before_on_device,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table
from side_by_side import (
    Call,
    Row,
    difference,
    measure,
    microseconds,
    provenance,
    ratio,
    ratios,
    table_of,
    times,
    written,
)

from jaxattn import (
    AttentionMetadata,
    AttentionSpec,
    Bucket,
    BucketGrid,
    DecoderConfig,
    RaggedBatch,
    advance,
    nest_sequences,
    prepare_metadata,
)
from jaxattn.models.decoder import forward, init_cache, init_params, unembed

RESULTS = Path(__file__).parent / "results" / "metadata_cost.json"
INPUTS = 8
PAGE_SIZE = 64
NUM_PAGES = 40_000
VOCAB_SIZE = 32_000
CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=16,
)
(SPEC, _) = CONFIG.layer_specs()
TWO_WINDOWS = (SPEC, AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=16, sliding_window=1024))


@dataclass(frozen=True, slots=True)
class Case:
    """The shape of a step.

    Attributes:
        name: Short and unique.
        prefill: Query tokens of each prefilling sequence; they stand first.
        decode: Decoding sequences.
        max_context: Contexts are uniform from 1 to this; 0 for none.
        in_decoder: Whether to run a small decoder on it too.
        per_layer: Whether to derive its metadata in every layer too.
        quoted_us: What AutoDeploy's `nest_sequences` took for this shape on tensors, measured with
            PyTorch on another machine on one core; for orientation, no part of any ratio here.
    """

    name: str
    prefill: tuple[int, ...] = ()
    decode: int = 0
    max_context: int = 4095
    in_decoder: bool = False
    per_layer: bool = False
    quoted_us: int | None = None


TINY = tuple(np.random.default_rng(0).integers(2, 5, 8192).tolist())
CASES = (
    Case("decode 1", decode=1, in_decoder=True, quoted_us=268),
    Case("decode 8", decode=8, in_decoder=True, quoted_us=263),
    Case("decode 64", decode=64, in_decoder=True, per_layer=True, quoted_us=281),
    Case("decode 256", decode=256, quoted_us=308),
    Case("decode 1024", decode=1024, quoted_us=346),
    Case("prefill 4 x 512", prefill=(512,) * 4, quoted_us=289),
    Case("prefill 16 x 256", prefill=(256,) * 16, quoted_us=309),
    Case("mixed 2 x 512 + 62", prefill=(512,) * 2, decode=62, in_decoder=True, per_layer=True, quoted_us=300),
    Case("8192 x 2 to 4", prefill=TINY, max_context=0),
)
QUICK = (Case("decode 4", decode=4, in_decoder=True, per_layer=True),)


def draw_steps(
    case: Case, num_pages: int | None = NUM_PAGES, vocab_size: int = VOCAB_SIZE
) -> list[StepInputs]:
    """Eight batches of a case: lengths fixed; contexts, pages and tokens drawn.

    Args:
        case: The case.
        num_pages: Pages of the cache; None for as many as the largest batch needs.
        vocab_size: Number of token ids.
    """
    q_lens = np.array((*case.prefill, *(1,) * case.decode), np.int32)
    n, steps = q_lens.size, []
    rngs = [np.random.default_rng([n, i]) for i in range(INPUTS)]
    contexts = [
        rng.integers(1, case.max_context + 1, n) if case.max_context else np.zeros(n, int) for rng in rngs
    ]
    counts = [(-(-(q_lens + context) // PAGE_SIZE)).astype(np.int32) for context in contexts]
    if num_pages is None:
        num_pages = max(int(count.sum()) for count in counts)
    for rng, context, count in zip(rngs, contexts, counts, strict=True):
        steps.append(
            StepInputs(
                token_ids=rng.integers(0, vocab_size, q_lens.sum(), np.int32),
                q_lens=q_lens,
                context_lens=context.astype(np.int32),
                cu_q_lens=np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
                pages=rng.permutation(num_pages)[: count.sum()].astype(np.int32),
                page_counts=count,
                cu_page_counts=np.concatenate([[0], np.cumsum(count)]).astype(np.int32),
                state_slots=rng.permutation(n).astype(np.int32),
                is_decode=np.arange(n) >= len(case.prefill),
                page_size=PAGE_SIZE,
                num_pages=num_pages,
            )
        )
    return steps


def grid_of(steps: Sequence[StepInputs]) -> BucketGrid:
    """The default grid, with more sequences only where the steps have more."""
    return BucketGrid(max_seqs=max(BucketGrid().max_seqs, steps[0].q_lens.size))


def bucket_of(steps: Sequence[StepInputs]) -> Bucket:
    """The smallest bucket of the grid that holds each of the steps; a decode bucket where all decode."""
    largest = Capacity.of(steps)
    bucket = grid_of(steps).pick(tokens=largest.tokens, seqs=largest.seqs, pages=largest.pages)
    return bucket.decode() if steps[0].is_decode_only else bucket


def nest(
    step: StepInputs, bucket: Bucket | BucketGrid, *, validate: bool = True, transfer: bool = False
) -> RaggedBatch:
    """Ours, from arrays."""
    return nest_sequences(
        step.token_ids,
        q_lens=step.q_lens,
        context_lens=step.context_lens,
        page_tables=step.pages,
        page_counts=step.page_counts,
        page_size=step.page_size,
        num_pages=step.num_pages,
        vocab_size=VOCAB_SIZE,
        is_decode=step.is_decode,
        state_slots=step.state_slots,
        bucket=bucket,
        validate=validate,
        transfer=transfer,
    )


def nest_lists(step: StepInputs, bucket: Bucket) -> Callable[[], RaggedBatch]:
    """Ours, from Python lists: of tokens and of pages per sequence, and of numbers."""
    tokens = [row.tolist() for row in np.split(step.token_ids, step.cu_q_lens[1:-1])]
    tables = [row.tolist() for row in np.split(step.pages, step.cu_page_counts[1:-1])]
    contexts, slots = step.context_lens.tolist(), step.state_slots.tolist()
    return lambda: nest_sequences(
        tokens,
        context_lens=contexts,
        page_tables=tables,
        page_size=step.page_size,
        num_pages=step.num_pages,
        vocab_size=VOCAB_SIZE,
        is_decode=step.is_decode,
        state_slots=slots,
        bucket=bucket,
        transfer=False,
    )


SAME_FIELDS = tuple(
    "cu_q_lens q_lens kv_lens context_lens token_to_seq positions logits_indices has_initial_state "
    "kv_page_indptr kv_page_list kv_last_page_lens state_slots is_decode".split()
)
"""What the baselines derive too."""


def prepare_all(batch: RaggedBatch) -> AttentionMetadata:
    """Everything, for two window classes and every implementation."""
    return prepare_metadata(batch, TWO_WINDOWS)


def prepare_for_xla(batch: RaggedBatch) -> AttentionMetadata:
    """What a decoder on `xla` reads, and no more."""
    return prepare_metadata(batch, SPEC, consumers=("decoder", "xla"))


def prepare_same(batch: RaggedBatch) -> AttentionMetadata:
    """What the baselines derive too, and no more."""
    return prepare_metadata(batch, fields=SAME_FIELDS)


PER_CONSUMER = (
    ("cu_q_lens", "kv_page_indptr", "kv_page_list", "kv_last_page_lens", "token_to_seq", "positions"),
    ("cu_q_lens", "q_lens", "state_slots", "has_initial_state"),
    ("cu_q_lens", "token_to_seq", "state_slots", "has_initial_state", "is_decode"),
)
"""What each consumer of `HYBRID` derives, under our names."""


def prepare_each_apart(batch: RaggedBatch) -> list[AttentionMetadata]:
    """The design before, in JAX at its best: a jitted function per consumer."""
    return [prepare_metadata(batch, fields=fields) for fields in PER_CONSUMER]


def our_fields(step: StepInputs, bucket: Bucket) -> Fields:
    """What ours derives, cut to the live sizes and under the names of the baselines."""
    batch = nest(step, bucket, transfer=True)
    metadata = prepare_same(batch)
    n, num_tokens = step.q_lens.size, step.token_ids.size

    def cut(values: Any, size: int) -> np.ndarray:
        return np.asarray(values)[:size]

    cu_q_lens, q_lens = cut(metadata.cu_q_lens, n + 1), cut(metadata.q_lens, n)
    rows, positions = cut(metadata.token_to_seq, num_tokens), cut(metadata.positions, num_tokens)
    indptr, pages = cut(metadata.kv_page_indptr, n + 1), cut(metadata.kv_page_list, step.pages.size)
    last_page_lens, has_state = cut(metadata.kv_last_page_lens, n), cut(metadata.has_initial_state, n)
    num_prefill = int((~cut(metadata.is_decode, n)).sum())
    prefill_tokens = int(cu_q_lens[num_prefill])
    return {
        "input_ids": cut(batch.token_ids, num_tokens),
        "position_ids": positions,
        "positions": positions,
        "batch_indices": rows,
        "seq_idx_prefill": rows[:prefill_tokens],
        "seq_len": q_lens,
        "prompt_lens": q_lens,
        "qo_indptr": cu_q_lens,
        "cu_seqlen": cu_q_lens,
        "cu_seqlens": cu_q_lens,
        "cu_seqlens_prefill": cu_q_lens[: num_prefill + 1],
        "seq_start": cu_q_lens[:-1],
        "input_pos": cut(metadata.context_lens, n),
        "use_initial_states": has_state,
        "any_prefill_use_initial_states": has_state[:num_prefill].any(keepdims=True),
        "seq_len_with_cache": cut(metadata.kv_lens, n),
        "paged_kv_indptr": indptr,
        "cu_num_pages": indptr,
        "paged_kv_indices": pages,
        "cache_loc": pages,
        "paged_kv_last_page_len": last_page_lens,
        "last_page_len": last_page_lens,
        "slot_idx": cut(metadata.state_slots, n),
        "token_gather_indices": cut(metadata.logits_indices, n),
        "num_prefill": num_prefill,
        "num_prefill_tokens": prefill_tokens,
        "batch_info": np.array([num_prefill, prefill_tokens, 0, 0, n - num_prefill, n - num_prefill]),
    }


NOT_OURS = frozenset(
    "extra_page_per_seq gather_idx gather_slot_idx mask_scatter_indices max_seq_info".split()
)
"""Fields of the staged superset that have no counterpart: constant or unused in these steps."""


def baseline_fields(step: StepInputs, capacity: Capacity) -> dict[str, Fields]:
    """What every baseline derives, by baseline; the staged superset's are as long as its buffers."""
    superset = StagedSuperset(capacity)
    superset.copy(superset.nest(step))
    on_host = stage_before(step, before_buffers(capacity))
    on_device = stage_before_on_device(step, capacity)
    derived = {
        **prepare_each(np, on_host, step.page_size, CONSUMERS),
        **{
            f"{name}, op by op": fields
            for name, fields in prepare_each(jnp, on_device, step.page_size, CONSUMERS).items()
        },
    }
    for fields in derived.values():
        if "paged_kv_indices" in fields:
            fields["paged_kv_indices"] = fields["paged_kv_indices"][: step.pages.size]
    staged = {name: view for name, view in superset.device.items() if name not in NOT_OURS}
    return {"staged superset": {**staged, "batch_info": superset.batch_info}, **derived}


def check(step: StepInputs, bucket: Bucket, capacity: Capacity) -> None:
    """Assert that every field of every baseline equals ours."""
    ours = our_fields(step, bucket)
    for baseline, fields in baseline_fields(step, capacity).items():
        for name, values in fields.items():
            got, expected = np.asarray(values), np.asarray(ours[name])
            if baseline == "staged superset":
                got = got[: expected.size]
            np.testing.assert_array_equal(got, expected, err_msg=f"{name} of {baseline}")


def ready(result: Any) -> Any:
    """The result of a computation, when it has ended."""
    return jax.block_until_ready(result)


COPIED = ("nest + copy", "nest + copy, unchecked")
"""Ours with a copy of the buffer, as the baselines make one. The baselines check nothing."""


def host_and_device_calls(steps: list[StepInputs], bucket: Bucket, capacity: Capacity) -> dict[str, Call]:
    """The candidates of questions 1 and 2."""
    lists = [nest_lists(step, bucket) for step in steps]
    batches = [nest(step, bucket, transfer=True) for step in steps]
    buffers, tight_buffers = before_buffers(capacity), StagedSuperset(Capacity.of(steps))
    superset, grid = StagedSuperset(capacity), grid_of(steps)
    advanced = jax.jit(advance)
    new_tokens = [jnp.asarray(np.resize(step.token_ids, bucket.seqs)) for step in steps]

    def before(i: int, consumers: Sequence[str]) -> None:
        prepare_each(np, stage_before(steps[i], buffers), PAGE_SIZE, consumers)

    def before_op_by_op(i: int) -> None:
        ready(prepare_each(jnp, stage_before_on_device(steps[i], capacity), PAGE_SIZE, HYBRID))

    def all_the_way(i: int, prepare: Callable[[RaggedBatch], AttentionMetadata]) -> None:
        ready(prepare(nest(steps[i], bucket, transfer=True)))

    calls: dict[str, Call] = {
        "nest": lambda i: nest(steps[i], bucket),
        "nest, unchecked": lambda i: nest(steps[i], bucket, validate=False),
        "nest, picking a bucket": lambda i: nest(steps[i], grid),
        "nest from lists": lambda i: lists[i](),
        "nest + copy": lambda i: nest(steps[i], bucket).packed.copy(),
        "nest + copy, unchecked": lambda i: nest(steps[i], bucket, validate=False).packed.copy(),
        "before: staging": lambda i: stage_before(steps[i], buffers),
        "before": lambda i: before(i, HYBRID),
        "before, five consumers": lambda i: before(i, tuple(CONSUMERS)),
        "after": lambda i: superset.copy(superset.nest(steps[i])),
        "after, capacity of the batch": lambda i: tight_buffers.copy(tight_buffers.nest(steps[i])),
        "nest + transfer": lambda i: ready(nest(steps[i], bucket, transfer=True).packed),
        "after + transfer": lambda i: ready(superset.transfer(superset.nest(steps[i]))),
        "prepare all": lambda i: ready(prepare_all(batches[i])),
        "prepare for xla": lambda i: ready(prepare_for_xla(batches[i])),
        "prepare the same": lambda i: ready(prepare_same(batches[i])),
        "prepare the same, a jit per consumer": lambda i: ready(prepare_each_apart(batches[i])),
        "ready, all": lambda i: all_the_way(i, prepare_all),
        "ready for xla": lambda i: all_the_way(i, prepare_for_xla),
        "ready, the same": lambda i: all_the_way(i, prepare_same),
        "before, op by op": before_op_by_op,
    }
    if steps[0].is_decode_only:
        calls["advance"] = lambda i: ready(advanced(batches[i], new_tokens[i]))
    return calls


# Question 3: metadata inside a step.


def read_everything(x: jax.Array, weight: jax.Array, metadata: AttentionMetadata) -> jax.Array:
    """A layer that does little but read every field that was prepared."""
    total = sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(metadata))
    return jnp.tanh(x @ weight + 1e-9 * total)


def reading_layers(weights: jax.Array, x: jax.Array, metadata: AttentionMetadata) -> jax.Array:
    """A stack of such layers, `weights [L, D, D]`."""
    for weight in weights:
        x = read_everything(x, weight, metadata)
    return x


def layer_inputs(num_layers: int) -> tuple[jax.Array, jax.Array]:
    """Weights and input of the reading layers."""
    weights = np.random.default_rng(0).normal(size=(num_layers, 16, 16))
    return jnp.asarray(weights, jnp.float32), jnp.ones((1, 16))


def reading_calls(batches: Sequence[RaggedBatch]) -> dict[str, Call]:
    """The reading layers with metadata given, and derived in their program."""
    weights, x = layer_inputs(CONFIG.num_layers)
    given = [ready(prepare_for_xla(batch)) for batch in batches]
    on_given = jax.jit(reading_layers)
    on_batch = jax.jit(lambda weights, x, batch: reading_layers(weights, x, prepare_for_xla(batch)))
    return {
        "layers, given": lambda i: ready(on_given(weights, x, given[i])),
        "layers, inside": lambda i: ready(on_batch(weights, x, batches[i])),
    }


def decoder_calls(case: Case) -> dict[str, Call]:
    """A small decoder on `xla` with metadata given, and derived in its program; caches are donated."""
    steps = draw_steps(case, num_pages=None, vocab_size=CONFIG.vocab_size)
    batches = [nest(step, bucket_of(steps), transfer=True) for step in steps]
    given = [ready(prepare_for_xla(batch)) for batch in batches]
    params = init_params(jax.random.key(0), CONFIG)

    def run(cache: Any, batch: RaggedBatch, metadata: AttentionMetadata) -> tuple[jax.Array, Any]:
        hidden, cache = forward(params, CONFIG, batch.token_ids, metadata, cache, implementation="xla")
        return unembed(params, CONFIG, hidden[metadata.logits_indices]), cache

    on_given = jax.jit(run, donate_argnums=0)
    on_batch = jax.jit(lambda cache, batch: run(cache, batch, prepare_for_xla(batch)), donate_argnums=0)
    num_pages = steps[0].num_pages
    caches = {
        name: init_cache(CONFIG, num_pages=num_pages, page_size=PAGE_SIZE, dtype="float32")
        for name in ("given", "inside")
    }

    def given_call(i: int) -> None:
        _, caches["given"] = ready(on_given(caches["given"], batches[i], given[i]))

    def inside_call(i: int) -> None:
        _, caches["inside"] = ready(on_batch(caches["inside"], batches[i]))

    return {"decoder, given": given_call, "decoder, inside": inside_call}


# Question 4: metadata in every layer.


class Program(NamedTuple):
    """What the compiler made of a program.

    Attributes:
        instructions: HLO instructions, those inside fusions included.
        int32: Those of them whose result is int32: the metadata, but for a few.
    """

    instructions: int
    int32: int


def inspect(compiled: Any) -> Program:
    """Count the instructions of a compiled program."""
    results = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = (\S+)", compiled.as_text(), re.MULTILINE)
    return Program(len(results), sum(result.startswith("s32") for result in results))


def per_layer_functions() -> dict[str, tuple[Callable, Callable]]:
    """Pairs of functions `(weights, x, batch)`: metadata derived once, and in every layer."""

    def unrolled(weights: jax.Array, x: jax.Array, batch: RaggedBatch, *, once: bool) -> jax.Array:
        metadata = prepare_for_xla(batch)
        for weight in weights:
            x = read_everything(x, weight, metadata if once else prepare_for_xla(batch))
        return x

    def scanned(weights: jax.Array, x: jax.Array, batch: RaggedBatch, *, once: bool) -> jax.Array:
        metadata = prepare_for_xla(batch)

        def body(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return read_everything(x, weight, metadata if once else prepare_for_xla(batch)), None

        return jax.lax.scan(body, x, weights)[0]

    def gradient(weights: jax.Array, x: jax.Array, batch: RaggedBatch, *, once: bool) -> jax.Array:
        metadata = prepare_for_xla(batch)

        @jax.checkpoint
        def with_given(x: jax.Array, weight: jax.Array, metadata: AttentionMetadata) -> jax.Array:
            return read_everything(x, weight, metadata)

        @jax.checkpoint
        def with_own(x: jax.Array, weight: jax.Array, batch: RaggedBatch) -> jax.Array:
            return read_everything(x, weight, prepare_for_xla(batch))

        def loss(weights: jax.Array) -> jax.Array:
            y = x
            for weight in weights:
                y = with_given(y, weight, metadata) if once else with_own(y, weight, batch)
            return y.sum()

        return jax.grad(loss)(weights)

    return {
        name: (functools.partial(function, once=True), functools.partial(function, once=False))
        for name, function in (
            ("one jit", unrolled),
            ("one jit, scan over layers", scanned),
            ("gradient, each layer under checkpoint", gradient),
        )
    }


def per_layer_calls(
    batches: Sequence[RaggedBatch], num_layers: int
) -> tuple[dict[str, Call], dict[str, Program]]:
    """The candidates of question 4, by name and " once" or " in every layer", and their programs."""
    weights, x = layer_inputs(num_layers)
    calls: dict[str, Call] = {}
    programs: dict[str, Program] = {}
    for name, pair in per_layer_functions().items():
        for when, function in zip(("once", "in every layer"), pair, strict=True):
            compiled = jax.jit(function).lower(weights, x, batches[0]).compile()
            programs[f"{name}: {when}"] = inspect(compiled)
            calls[f"{name}: {when}"] = functools.partial(
                lambda compiled, i: ready(compiled(weights, x, batches[i])), compiled
            )
    layer = jax.jit(read_everything)
    each = tuple(weights)

    def separate(i: int, *, once: bool) -> None:
        metadata = prepare_for_xla(batches[i])
        y = layer(x, each[0], metadata)
        for weight in each[1:]:
            y = layer(y, weight, metadata if once else prepare_for_xla(batches[i]))
        ready(y)

    calls["a jit per layer: once"] = functools.partial(separate, once=True)
    calls["a jit per layer: in every layer"] = functools.partial(separate, once=False)
    return calls, programs


def count_bytes(steps: list[StepInputs], bucket: Bucket, capacity: Capacity) -> dict[str, int]:
    """Bytes per step, of the first of the steps."""
    step = steps[0]
    superset = StagedSuperset(capacity)
    return {
        "ours": nest(step, bucket).packed.nbytes,
        "live": nest(step, Bucket(step.token_ids.size, step.q_lens.size, step.pages.size)).packed.nbytes,
        "before": before_bytes(step),
        "after": superset.transferred_bytes(step.pages.size),
    }


# Running and reporting.


def capacity_for(case: Case) -> Capacity:
    """A server's buffers: larger only where the case does not fit."""
    tokens, seqs = sum(case.prefill) + case.decode, len(case.prefill) + case.decode
    usual = Capacity.deployed(page_size=PAGE_SIZE)
    if tokens <= usual.tokens and seqs <= usual.seqs:
        return usual
    return Capacity.deployed(tokens=max(tokens, 32768), seqs=max(seqs, 8192), max_len=64, page_size=PAGE_SIZE)


def run_case(case: Case, *, repeats: int, rounds: int, num_layers: int) -> dict[str, Any]:
    """Everything of one case."""
    steps, capacity = draw_steps(case), capacity_for(case)
    bucket = bucket_of(steps)
    for step in steps:
        check(step, bucket, capacity)
    timed = functools.partial(measure, inputs=INPUTS, repeats=repeats, rounds=rounds)
    batches = [nest(step, bucket, transfer=True) for step in steps]
    timings = timed(host_and_device_calls(steps, bucket, capacity)) | timed(reading_calls(batches))
    if case.in_decoder:
        timings |= timed(decoder_calls(case))
    programs: dict[str, Program] = {}
    if case.per_layer:
        calls, programs = per_layer_calls(batches, num_layers)
        timings |= timed(calls)
    return {
        "case": case.name,
        "sequences": len(case.prefill) + case.decode,
        "tokens": sum(case.prefill) + case.decode,
        "bucket": asdict(bucket),
        "bytes": count_bytes(steps, bucket, capacity),
        "timings": {name: timing._asdict() for name, timing in timings.items()},
        "programs": {name: program._asdict() for name, program in programs.items()},
        "quoted_us": case.quoted_us,
    }


def print_tables(console: Console, rows: Sequence[Row]) -> None:
    """One table per question, then the targets."""
    reached = [targets(rows)] if any(row["case"] in TARGETS for row in rows) else []
    console.print(
        table_of(
            "1. On the host, µs; before and after: our restatements in NumPy",
            rows,
            times("nest", "nest, unchecked", "nest, picking a bucket", "nest from lists"),
            times("before: staging", "before", "before, five consumers"),
            times("after", "after, capacity of the batch"),
            times(*COPIED),
            ratios(COPIED[0], "before", "after"),
            ratios(COPIED[1], "before", "after"),
            [("quoted: AutoDeploy's own, elsewhere", lambda row: row["quoted_us"])],
        ),
        table_of(
            "2. Ready on the device, µs",
            rows,
            times("nest + transfer", "prepare the same", "prepare for xla", "prepare all"),
            times("prepare the same, a jit per consumer"),
            ratios("prepare the same", "prepare the same, a jit per consumer"),
            times("ready, the same", "ready for xla", "ready, all", "advance"),
            times("before, op by op", "after + transfer"),
            ratios("ready, the same", "before, op by op", "after + transfer"),
        ),
        table_of(
            "3. Inside a step, µs",
            rows,
            [
                *times("layers, given", "layers, inside"),
                difference("added to layers", "layers, inside", "layers, given"),
            ],
            [
                *times("decoder, given", "decoder, inside"),
                difference("added to decoder", "decoder, inside", "decoder, given"),
            ],
        ),
        per_layer_table(rows),
        table_of(
            "5. Bytes transferred per step",
            rows,
            [
                (name, functools.partial(lambda name, row: row["bytes"][name], name))
                for name in ("live", "ours", "before", "after")
            ],
            [("after ÷ ours", lambda row: row["bytes"]["after"] / row["bytes"]["ours"])],
        ),
        *reached,
        sep="\n",
    )


def per_layer_table(rows: Sequence[Row]) -> Table:
    """The table of question 4."""
    headers = ("case", "program", "once, µs", "every layer, µs", "ratio", "instructions", "of int32")
    table = Table(*headers, title="4. In every layer against once", title_justify="left")
    for row in rows:
        for once in [name for name in row["timings"] if name.endswith(": once")]:
            every = once.replace(": once", ": in every layer")
            figures = [microseconds(row, name) for name in (once, every)]
            programs = [row["programs"].get(name) for name in (once, every)]
            counts = [
                " → ".join(str(program[count]) for program in programs if program) or "–"
                for count in Program._fields
            ]
            cells = [*map(written, (*figures, ratio(row, every, once))), *counts]
            table.add_row(row["case"], once.removesuffix(": once"), *cells)
    return table


TARGETS = {"decode 64": (15, 20), "decode 1024": (30, 12)}
"""Microseconds of a nest at most, and how many times as fast as the staged superset."""


def targets(rows: Sequence[Row]) -> Table:
    """What was to be reached on an unloaded core, and what this run has."""
    table = Table("target", "this run", title="Targets", title_justify="left")
    for row in rows:
        if row["case"] not in TARGETS:
            continue
        limit_us, factor = TARGETS[row["case"]]
        ours, checked, unchecked = microseconds(row, "nest"), *(ratio(row, "after", name) for name in COPIED)
        assert ours is not None
        table.add_row(f"{row['case']}: nest in at most {limit_us} µs", f"{ours:.1f} µs")
        table.add_row(
            f"{row['case']}: {factor} times as fast as the staged superset",
            f"{written(checked)} × as fast as our restatement, unchecked {written(unchecked)} ×; "
            f"{row['quoted_us'] / ours:.1f} × against AutoDeploy's own {row['quoted_us']} µs, elsewhere",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=60, help="calls per candidate and round")
    parser.add_argument("--quick", action="store_true", help="one small case, few calls: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the figures")
    options = parser.parse_args()
    cases = QUICK if options.quick else CASES
    settings = {
        "repeats": min(options.repeats, 5) if options.quick else options.repeats,
        "rounds": 3 if options.quick else 7,
        "num_layers": 2 if options.quick else 8,
    }
    before = provenance()
    rows = [run_case(case, **settings) for case in track(cases, description="cases")]
    print_tables(Console(), rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "provenance": {**before, "load_average_after": os.getloadavg()},
        "settings": settings,
        "results": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
