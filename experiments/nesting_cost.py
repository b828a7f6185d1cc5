"""What does nesting cost on the host, against AutoDeploy's two designs?

Compared are `nest_sequences`, from arrays and from lists, with and without its checks, and our own
restatements of AutoDeploy's steps in NumPy (`per_backend_metadata.py`): *before* its refactor every consumer
derives lengths, prefix sums and pages for itself; *after* it a superset is staged into one buffer of
capacity. They are not its code: they have none of its dispatch, which is probably most of its time, and they
check nothing. Where ours is compared with them it copies its buffer, as they do.

*After* holds some fields that ours leaves to the device: positions, last page lengths, indices to gather. So
the same is compared again ready on the device: nesting, transfer and `prepare_metadata` of the same fields as
a program of its own, against *after* with its transfer, and *before* op by op in `jax.numpy`.

Each call takes the next of eight batches. Before anything is timed, every field of every baseline is compared
with ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
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
from pictures import COLORS, level, lighten, white_figure
from rich.progress import track
from serving_steps import (
    CASES,
    INPUTS,
    PAGE_SIZE,
    Case,
    bucket_of,
    draw_steps,
    grid_of,
    nest,
    nest_lists,
    ready,
)
from side_by_side import Call, measure, ratios_by_round, with_range

from jaxattn import AttentionMetadata, Bucket, RaggedBatch, advance, prepare_metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which steps, and how often."""

    cases: tuple[str, ...] = tuple(CASES)
    """Names in `serving_steps.CASES`."""
    rounds: int = 5
    """Rounds of timing; the candidates take turns."""
    repeats: int = 40
    """Calls of a candidate per round, fewer where they take long."""


# The same fields, whoever derives them.

SAME_FIELDS = tuple(
    "cu_q_lens q_lens kv_lens context_lens token_to_seq positions logits_indices has_initial_state "
    "kv_page_indptr kv_page_list kv_last_page_lens state_slots is_decode".split()
)
"""What the baselines derive too."""


def prepare_same(batch: RaggedBatch) -> AttentionMetadata:
    """What the baselines derive too, and no more."""
    return prepare_metadata(batch, fields=SAME_FIELDS)


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


# Candidates.


def on_host(steps: list[StepInputs], bucket: Bucket, capacity: Capacity) -> dict[str, Call]:
    """Arrays or lists to a buffer in host memory."""
    lists = [nest_lists(step, bucket) for step in steps]
    buffers, tight = before_buffers(capacity), StagedSuperset(Capacity.of(steps))
    superset, grid = StagedSuperset(capacity), grid_of(steps)

    def before(i: int, consumers: Sequence[str]) -> None:
        prepare_each(np, stage_before(steps[i], buffers), PAGE_SIZE, consumers)

    return {
        "nest": lambda i: nest(steps[i], bucket),
        "nest, unchecked": lambda i: nest(steps[i], bucket, validate=False),
        "nest, picking a bucket": lambda i: nest(steps[i], grid),
        "nest from lists": lambda i: lists[i](),
        "nest + copy": lambda i: nest(steps[i], bucket).packed.copy(),
        "nest + copy, unchecked": lambda i: nest(steps[i], bucket, validate=False).packed.copy(),
        "before": lambda i: before(i, HYBRID),
        "before, five consumers": lambda i: before(i, tuple(CONSUMERS)),
        "after": lambda i: superset.copy(superset.nest(steps[i])),
        "after, capacity of the batch": lambda i: tight.copy(tight.nest(steps[i])),
    }


def to_device(steps: list[StepInputs], bucket: Bucket, capacity: Capacity) -> dict[str, Call]:
    """Arrays to fields that are ready on the device."""
    superset, advanced = StagedSuperset(capacity), jax.jit(advance)
    batches = [nest(step, bucket, transfer=True) for step in steps]
    new_tokens = [jnp.asarray(np.resize(step.token_ids, bucket.seqs)) for step in steps]

    def before(i: int) -> None:
        ready(prepare_each(jnp, stage_before_on_device(steps[i], capacity), PAGE_SIZE, HYBRID))

    calls: dict[str, Call] = {
        "nest + transfer": lambda i: ready(nest(steps[i], bucket, transfer=True).packed),
        "ready": lambda i: ready(prepare_same(nest(steps[i], bucket, transfer=True))),
        "after + transfer": lambda i: ready(superset.transfer(superset.nest(steps[i]))),
        "before, op by op": before,
    }
    if steps[0].is_decode_only:
        calls["advance"] = lambda i: ready(advanced(batches[i], new_tokens[i]))
    return calls


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


def capacity_for(case: Case) -> Capacity:
    """A server's buffers: larger only where the case does not fit."""
    tokens, seqs = sum(case.prefill) + case.decode, len(case.prefill) + case.decode
    usual = Capacity.deployed(page_size=PAGE_SIZE)
    if tokens <= usual.tokens and seqs <= usual.seqs:
        return usual
    return Capacity.deployed(tokens=max(tokens, 32768), seqs=max(seqs, 8192), max_len=64, page_size=PAGE_SIZE)


# Running and reporting.


def examine(case: Case, config: Config) -> Row:
    """Everything of one case."""
    steps, capacity = draw_steps(case), capacity_for(case)
    bucket = bucket_of(steps)
    for step in steps:
        check(step, bucket, capacity)
    calls = (on_host(steps, bucket, capacity), to_device(steps, bucket, capacity))
    timings = {}
    for some in calls:
        timings |= measure(some, inputs=INPUTS, repeats=config.repeats, rounds=config.rounds)
    return {
        "case": case.name,
        "bucket": asdict(bucket),
        "bytes": count_bytes(steps, bucket, capacity),
        "timings": {name: timing._asdict() for name, timing in timings.items()},
    }


def rows(config: Config) -> Iterator[Row]:
    """A row per case."""
    for name in track(config.cases, "cases"):
        yield examine(CASES[name], config)


ON_HOST = {
    "checks: nest ÷ unchecked": ("nest", "nest, unchecked"),
    "from lists ÷ from arrays": ("nest from lists", "nest"),
    "before ÷ nest": ("before", "nest + copy"),
    "after ÷ nest": ("after", "nest + copy"),
    "after ÷ nest, unchecked": ("after", "nest + copy, unchecked"),
}
"""Columns of a table: the candidates whose times are divided. Above 1 the last named is faster."""
ON_DEVICE = {
    "before, op by op ÷ ours": ("before, op by op", "ready"),
    "after with its transfer ÷ ours": ("after + transfer", "ready"),
}


def tables(rows: list[Row]) -> dict[str, Table]:
    """Ratios on the host, and ready on the device with bytes."""

    def ratios(row: Row, columns: dict[str, tuple[str, str]]) -> list[str]:
        return [with_range(ratios_by_round(row["timings"], *pair)) for pair in columns.values()]

    on_host = [
        [row["case"], f"{row['timings']['nest']['median_us']:.0f}", *ratios(row, ON_HOST)] for row in rows
    ]
    on_device = [
        [
            row["case"],
            *ratios(row, ON_DEVICE),
            *(f"{row['bytes'][name] / 1024:,.1f}" for name in ("live", "ours", "before", "after")),
        ]
        for row in rows
    ]
    sizes = ("live", "ours", "before", "after")
    return {
        "host": Table(("step", "nest, µs", *ON_HOST), on_host),
        "device": Table(("step", *ON_DEVICE, *(f"KiB, {name}" for name in sizes)), on_device),
    }


def plot(rows: list[Row]) -> Figure:
    """Every round's ratio of the staged superset to ours, on the host and ready on the device."""
    figure = white_figure("What does nesting cost, against AutoDeploy's two designs (restated)?", 11, 4.6)
    panels = {**{k: ON_HOST[k] for k in list(ON_HOST)[2:]}, **ON_DEVICE}
    series = (("before ÷ nest", "after ÷ nest", "after ÷ nest, unchecked"), tuple(ON_DEVICE))
    for axes, names in zip(figure.subplots(1, 2), series, strict=True):
        for i, name in enumerate(names):
            found = [ratios_by_round(row["timings"], *panels[name]) for row in rows]
            places = np.arange(len(rows)) + 0.2 * (i - (len(names) - 1) / 2)
            middle = [statistics.median(ratios) for ratios in found]
            spread = [
                [m - min(r) for m, r in zip(middle, found, strict=True)],
                [max(r) - m for m, r in zip(middle, found, strict=True)],
            ]
            axes.errorbar(places, middle, spread, fmt="o", color=COLORS[i], label=name, capsize=2)
        axes.set_xticks(range(len(rows)), [row["case"] for row in rows], rotation=30, ha="right")
        axes.set(xlabel="step", yscale="log")
        level(axes)
        lighten(axes)
        axes.legend(frameon=False, fontsize=8)
    host, device = figure.axes
    host.set_ylabel("time on the host; above 1 ours is faster")
    device.set_ylabel("time until ready on the device")
    for axes, ticks in ((host, (0.5, 1, 2, 4, 8)), (device, (0.1, 1, 10, 100))):
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    return figure


EXPERIMENT = Experiment(
    question="What does nesting cost on the host, against AutoDeploy's two designs?",
    committed=Config(),
    small=Config(cases=("decode 8",), rounds=2, repeats=3),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
