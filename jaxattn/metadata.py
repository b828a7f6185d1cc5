"""`prepare_metadata`: everything that attention derives from a batch, once, in one pure function.

The result serves every backend, every layer and every window class. Called inside a model's own
jit, the fields that nobody reads are removed by the compiler, so a superset costs no more than
the part that is used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxattn.batch import INT32_MAX, RaggedBatch
from jaxattn.schedule import TileSchedule, Tiling, schedule_tiles, segment_of, tiling_for
from jaxattn.spec import AttentionSpec, WindowClass

# The cache slot of a padding token: out of range and *positive*, so that a scatter with
# mode="drop" skips it. A negative one would wrap around and overwrite a live slot.
PAD_SLOT = INT32_MAX

SCHEDULED = ("xla", "triton")
"""The implementations that read a tile schedule."""


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleKeys:
    """What the tokens of one window class see, and the schedules to attend with.

    Attributes:
        kv_start: First visible key of each token, as a position in its sequence; 0 for padding.
        kv_end: One past the last visible key; 0 for padding, which sees none.
        schedules: One tile schedule per distinct tiling.
        window_class: The class (static).
    """

    kv_start: Int32[Array, " T"]
    kv_end: Int32[Array, " T"]
    schedules: tuple[TileSchedule, ...]
    window_class: WindowClass = field(metadata={"static": True})

    def schedule(self, tiling: Tiling) -> TileSchedule:
        """The schedule of a tiling.

        Raises:
            ValueError: If `prepare_metadata` was not asked for it.
        """
        for schedule in self.schedules:
            if schedule.tiling == tiling:
                return schedule
        have = [tuple(s.tiling) for s in self.schedules]
        raise ValueError(
            f"no schedule of {tiling} for {self.window_class} was prepared, only {have}; "
            "give prepare_metadata the layer's spec and implementation"
        )


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """What a step's attention layers share. Index arrays are int32.

    Attributes:
        num_seqs: Sequences of the batch.
        num_tokens: Query tokens of the batch.
        cu_q_lens: Prefix sums of query lengths; the tail repeats the last value.
        cu_kv_lens: Prefix sums of `kv_lens`.
        kv_lens: Keys per sequence, this step's included; 0 for a padding row.
        context_lens: Keys cached before this step, `kv_lens - q_lens`.
        token_to_seq: Row of each token; R for padding.
        positions: Position of each token in its sequence; 0 for padding.
        logits_indices: Last token of each sequence; 0, safe to gather, for a row without tokens.
        slot_mapping: Flat cache slot of each token, `page * page_size + offset`; `PAD_SLOT` for
            padding and past a sequence's pages. None without pages, like the fields below.
        kv_page_indptr: Prefix sums of the pages that hold keys.
        kv_page_list: Those pages, sequence after sequence in logical order; 0 past the end.
        kv_last_page_lens: Keys in each sequence's last page, from 1 to `page_size`, never 0.
        visible: One entry per distinct window class.
        page_size: Tokens per page, or None (static).
    """

    num_seqs: Int32[Array, ""]
    num_tokens: Int32[Array, ""]
    cu_q_lens: Int32[Array, " R_plus_1"]
    cu_kv_lens: Int32[Array, " R_plus_1"]
    kv_lens: Int32[Array, " R"]
    context_lens: Int32[Array, " R"]
    token_to_seq: Int32[Array, " T"]
    positions: Int32[Array, " T"]
    logits_indices: Int32[Array, " R"]
    slot_mapping: Int32[Array, " T"] | None
    kv_page_indptr: Int32[Array, " R_plus_1"] | None
    kv_page_list: Int32[Array, " P"] | None
    kv_last_page_lens: Int32[Array, " R"] | None
    visible: tuple[VisibleKeys, ...]
    page_size: int | None = field(metadata={"static": True})

    def visible_keys(self, window_class: WindowClass) -> VisibleKeys:
        """The visible keys of a window class.

        Raises:
            ValueError: If `prepare_metadata` was not asked for it.
        """
        for visible in self.visible:
            if visible.window_class == window_class:
                return visible
        have = [tuple(v.window_class) for v in self.visible]
        raise ValueError(
            f"{window_class} was not prepared, only {have}; give prepare_metadata the layer's spec"
        )


def prepare_metadata(
    batch: RaggedBatch,
    specs: AttentionSpec | Iterable[AttentionSpec],
    *,
    implementations: Iterable[str] = SCHEDULED,
) -> AttentionMetadata:
    """Derive the metadata of a batch, for all layers and backends. Pure; compiled once per bucket.

    Args:
        batch: The batch.
        specs: The specs of all layers that will attend; equal window classes are shared.
        implementations: The implementations to prepare schedules for. Inside a jit there is no
            need to narrow them: what is not read is not computed.

    Returns:
        The metadata, shapes given by `batch.bucket`.

    Raises:
        ValueError: If an implementation is unknown.
    """
    specs = (specs,) if isinstance(specs, AttentionSpec) else tuple(specs)
    implementations = (implementations,) if isinstance(implementations, str) else tuple(implementations)
    wanted: dict[WindowClass, dict[Tiling, None]] = {}  # ordered sets: equal inputs, equal programs
    for spec in specs:
        tilings = wanted.setdefault(spec.window_class, {})
        for implementation in implementations:
            if (tiling := tiling_for(implementation, spec)) is not None:
                tilings[tiling] = None
    classes = tuple((window_class, tuple(tilings)) for window_class, tilings in wanted.items())
    return _prepare(batch, classes)


@functools.partial(jax.jit, static_argnums=1)
def _prepare(
    batch: RaggedBatch, classes: tuple[tuple[WindowClass, tuple[Tiling, ...]], ...]
) -> AttentionMetadata:
    T = batch.bucket.tokens
    cu_q_lens, kv_lens = batch.cu_q_lens, batch.kv_lens
    context_lens = kv_lens - jnp.diff(cu_q_lens)
    token_to_seq = segment_of(cu_q_lens[1:], T)
    token = jnp.arange(T, dtype=jnp.int32)
    is_real = token < cu_q_lens[-1]
    row = jnp.where(is_real, token_to_seq, 0)
    positions = jnp.where(is_real, context_lens[row] + token - cu_q_lens[row], 0)
    # A sequence that outran its pages sees the keys it has a place for, never another sequence's.
    stored_lens = _stored_lens(batch)
    kv_ends = jnp.where(is_real, stored_lens[row], 0)

    visible = []
    for window_class, tilings in classes:
        kv_start, kv_end = _visible_range(window_class, positions, kv_ends)
        schedules = tuple(
            schedule_tiles(batch.bucket, tiling, cu_q_lens=cu_q_lens, kv_start=kv_start, kv_end=kv_end)
            for tiling in tilings
        )
        visible.append(
            VisibleKeys(kv_start=kv_start, kv_end=kv_end, schedules=schedules, window_class=window_class)
        )
    return AttentionMetadata(
        num_seqs=batch.num_seqs,
        num_tokens=cu_q_lens[-1],
        cu_q_lens=cu_q_lens,
        cu_kv_lens=_prefix_sums(kv_lens),
        kv_lens=kv_lens,
        context_lens=context_lens,
        token_to_seq=token_to_seq,
        positions=positions,
        logits_indices=jnp.where(jnp.diff(cu_q_lens) > 0, cu_q_lens[1:] - 1, 0),
        visible=tuple(visible),
        page_size=batch.page_size,
        **_page_fields(batch, stored_lens, row, positions, is_real),
    )


def _stored_lens(batch: RaggedBatch) -> Int32[Array, " R"]:
    """Keys of each sequence that its pages have room for: all, unless `advance` went too far."""
    if batch.page_size is None:
        return batch.kv_lens
    return jnp.minimum(batch.kv_lens, jnp.diff(batch.page_indptr) * batch.page_size)


def _visible_range(
    window_class: WindowClass, positions: Int32[Array, " T"], kv_ends: Int32[Array, " T"]
) -> tuple[Int32[Array, " T"], Int32[Array, " T"]]:
    """First and one past the last visible key of each token. The only definition of visibility."""
    kv_end = jnp.minimum(positions + 1, kv_ends) if window_class.causal else kv_ends
    if window_class.sliding_window is None:
        return jnp.zeros_like(kv_end), kv_end
    return jnp.maximum(kv_end - window_class.sliding_window, 0), kv_end


def _page_fields(
    batch: RaggedBatch,
    stored_lens: Int32[Array, " R"],
    row: Int32[Array, " T"],
    positions: Int32[Array, " T"],
    is_real: Array,
) -> dict[str, Int32[Array, "..."] | None]:
    if batch.page_size is None:
        names = ("slot_mapping", "kv_page_indptr", "kv_page_list", "kv_last_page_lens")
        return dict.fromkeys(names)
    page_size, P = batch.page_size, batch.bucket.pages
    # A token's slot: its sequence's page for its position, dropped past the reserved pages.
    entry = batch.page_indptr[row] + positions // page_size
    has_page = is_real & (entry < batch.page_indptr[row + 1])
    page = batch.page_list[jnp.where(has_page, entry, 0)]
    slot_mapping = jnp.where(has_page, page * page_size + positions % page_size, PAD_SLOT)
    # The pages that hold keys, without the reserved ones in between.
    kv_page_indptr = _prefix_sums((stored_lens + page_size - 1) // page_size)
    seq = segment_of(kv_page_indptr[1:], P)
    logical = jnp.arange(P, dtype=jnp.int32) - kv_page_indptr[seq]
    live = jnp.arange(P, dtype=jnp.int32) < kv_page_indptr[-1]
    kv_page_list = jnp.where(live, batch.page_list[batch.page_indptr[seq] + logical], 0)
    return {
        "slot_mapping": slot_mapping,
        "kv_page_indptr": kv_page_indptr,
        "kv_page_list": kv_page_list,
        "kv_last_page_lens": jnp.where(stored_lens > 0, (stored_lens - 1) % page_size + 1, 1),
    }


def _prefix_sums(lens: Int32[Array, " R"]) -> Int32[Array, " R_plus_1"]:
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lens, dtype=jnp.int32)])
