"""`AttentionMetadata`: everything that attention derives from a batch. A field is a method, its formula."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jaxattn.batch.bucket import Bucket
from jaxattn.batch.ragged import PAD_SLOT, RaggedBatch
from jaxattn.batch.segments import padded_rows, prefix_sums, segment_of
from jaxattn.metadata.cascade import Cascade, find_cascade
from jaxattn.metadata.fields import (
    MissingFieldError,
    Prepared,
    derive_fields,
    fields_of,
    formulas_of,
    metadata_field,
)
from jaxattn.metadata.rope import RopeConfig, RopeTables, rope_tables
from jaxattn.metadata.schedule import Tiling
from jaxattn.metadata.spec import AttentionSpec, Visibility
from jaxattn.metadata.visible import VISIBLE_FIELDS, ClassInputs, VisibleKeys, derive_visible

# What a field may need to exist (`metadata_field(needs=...)`).
PAGES = "a batch nested with page_tables"
TABLE_WIDTH = "max_pages_per_seq and a batch nested with page_tables"
ROPE = "specs with rope"

_PAGE_NUMBERS = ("page_list", "kv_page_list", "page_indices")


class Request(NamedTuple):
    """What `prepare_metadata` was asked for: static and hashable.

    Attributes:
        fields: Names to prepare, of both `Prepared` classes and of `derive`.
        classes: The distinct window classes, each with the distinct tilings, and lengths of tiles of keys,
            that are wanted.
        ropes: The distinct pairs of a rope and a head dim.
        max_pages_per_seq: Columns of `page_indices`.
        derive: Fields of the caller's own.
    """

    fields: tuple[str, ...]
    classes: tuple[tuple[Visibility, tuple[Tiling, ...], tuple[int, ...]], ...]
    ropes: tuple[tuple[RopeConfig, int], ...]
    max_pages_per_seq: int | None
    derive: tuple[tuple[str, Callable[[AttentionMetadata], Array]], ...]


class StepInputs(NamedTuple):
    """What the fields of a step are derived from.

    Attributes:
        batch: The primary arrays.
        request: What is wanted, and how.
    """

    batch: RaggedBatch
    request: Request


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AttentionMetadata(Prepared):
    """What a step's attention layers share. A pytree of the fields that were prepared.

    Attributes:
        values: The prepared fields by name.
        bucket: The batch's static sizes (static).
        page_size: Tokens per page, or None (static).
    """

    values: dict[str, Any]
    bucket: Bucket = field(metadata={"static": True})
    page_size: int | None = field(metadata={"static": True})

    @metadata_field(also_called="num_reqs")
    def num_seqs(self) -> Int32[Array, ""]:
        """Sequences of the batch."""
        return self._given.batch.num_seqs

    @metadata_field(also_called="num_actual_tokens")
    def num_tokens(self) -> Int32[Array, ""]:
        """Query tokens of the batch."""
        return self.cu_q_lens[-1]

    @metadata_field(also_called="query_start_loc, qo_indptr, cu_seqlens_q")
    def cu_q_lens(self) -> Int32[Array, " R_plus_1"]:
        """Prefix sums of query lengths; the tail repeats the last value."""
        return self._given.batch.cu_q_lens

    @metadata_field(also_called="extend_seq_lens")
    def q_lens(self) -> Int32[Array, " R"]:
        """Query tokens per sequence; 0 for a padding row."""
        return jnp.diff(self.cu_q_lens)

    @metadata_field(also_called="seq_lens, seqused_k, cache_seqlens")
    def kv_lens(self) -> Int32[Array, " R"]:
        """Keys per sequence, this step's included; 0 for a padding row."""
        return self._given.batch.kv_lens

    @metadata_field(also_called="cu_seqlens_k")
    def cu_kv_lens(self) -> Int32[Array, " R_plus_1"]:
        """Prefix sums of `kv_lens`."""
        return self.cu_q_lens if self.page_size is None else prefix_sums(self.kv_lens)

    @metadata_field(also_called="num_computed_tokens")
    def context_lens(self) -> Int32[Array, " R"]:
        """Keys cached before this step, `kv_lens - q_lens`."""
        return self.kv_lens - self.q_lens

    @metadata_field(also_called="batch_indices, segment_ids")
    def token_to_seq(self) -> Int32[Array, " T"]:
        """Row of each token; R for padding."""
        return segment_of(self.cu_q_lens[1:], self.bucket.tokens)

    @metadata_field(also_called="position_ids, input_positions")
    def positions(self) -> Int32[Array, " T"]:
        """Position of each token in its sequence; 0 for padding."""
        token = jnp.arange(self.bucket.tokens, dtype=jnp.int32)
        # From a token's place to its position it is equally far for all tokens of a row: one gather.
        if self.page_size is None:  # nothing is cached
            position = token - self.cu_q_lens[self._row_of_token]
        else:
            position = token + (self.kv_lens - self.cu_q_lens[1:])[self._row_of_token]
        return jnp.where(self._is_real_token, position, 0)

    @metadata_field(also_called="logits_gather_indices")
    def logits_indices(self) -> Int32[Array, " R"]:
        """Last token of each sequence; 0, safe to gather, for a row without tokens."""
        starts, ends = self.cu_q_lens[:-1], self.cu_q_lens[1:]
        return jnp.where(ends > starts, ends - 1, 0)

    @metadata_field(also_called="is_prefilling, negated")
    def is_decode(self) -> Bool[Array, " R"]:
        """Whether each row decodes, as the caller stated it."""
        return self._given.batch.is_decode

    @metadata_field(also_called="num_decodes, num_prefills")
    def request_distribution(self) -> Int32[Array, " 3"]:
        """Ends of the groups of decodes, of fresh prefills and of prefills over cached context.

        For layers with a kernel per phase, as state-space layers have: vLLM's `split_decodes_and_prefills`
        in a batch whose rows stand in this order.
        """
        phase = jnp.where(self.is_decode, 0, jnp.where(self.context_lens == 0, 1, 2))
        is_real = jnp.arange(self.bucket.seqs, dtype=jnp.int32) < self.num_seqs
        phase = jnp.where(is_real, phase, 3)
        return (phase[:, None] <= jnp.arange(3)[None, :]).sum(axis=0, dtype=jnp.int32)

    @metadata_field(also_called="slot_idx, mamba_state_indices")
    def state_slots(self) -> Int32[Array, " R"]:
        """Slot of each sequence's recurrent state; out of range, and positive, for a padding row.

        For recurrent layers, which gather and scatter their states by it; imports can state it.
        """
        return self._given.batch.state_slots

    @metadata_field(also_called="use_initial_states, has_initial_state")
    def has_initial_state(self) -> Bool[Array, " R"]:
        """Whether a sequence has a state from earlier steps, `context_lens > 0`.

        For recurrent layers: a slot that was another sequence's before is read as zeros.
        """
        return self.context_lens > 0

    @metadata_field(also_called="out_cache_loc, new_token_dests", needs=PAGES)
    def slot_mapping(self) -> Int32[Array, " T"]:
        """Flat cache slot of each token, `page * page_size + offset`; `PAD_SLOT` where it has none."""
        page_size, row = self._tokens_per_page, self._row_of_token
        entry = self.page_indptr[row] + self.positions // page_size
        has_page = self._is_real_token & (entry < self.page_indptr[row + 1])
        page = self.page_list[jnp.where(has_page, entry, 0)]
        return jnp.where(has_page, page * page_size + self.positions % page_size, PAD_SLOT)

    @metadata_field(needs=PAGES)
    def page_indptr(self) -> Int32[Array, " R_plus_1"]:
        """Prefix sums of the pages that each sequence holds, reserved ones included."""
        return self._given.batch.page_indptr

    @metadata_field(also_called="req_to_token, in pages", needs=PAGES)
    def page_list(self) -> Int32[Array, " P"]:
        """Those pages, sequence after sequence in logical order."""
        return self._given.batch.page_list

    @metadata_field(also_called="kv_indptr, cu_num_pages", needs=PAGES)
    def kv_page_indptr(self) -> Int32[Array, " R_plus_1"]:
        """Prefix sums of the pages that hold keys, reserved ones left out."""
        return prefix_sums((self._stored_lens + (self._tokens_per_page - 1)) // self._tokens_per_page)

    @metadata_field(also_called="kv_indices, cache_loc", needs=PAGES)
    def kv_page_list(self) -> Int32[Array, " P"]:
        """The pages that hold keys, sequence after sequence in logical order; 0 past the end."""
        entry = jnp.arange(self.bucket.pages, dtype=jnp.int32)
        seq = segment_of(self.kv_page_indptr[1:], self.bucket.pages)
        # The reserved pages before it move a sequence's pages equally far: one gather.
        moved = (self.page_indptr - self.kv_page_indptr)[seq]
        return jnp.where(entry < self.kv_page_indptr[-1], self.page_list[entry + moved], 0)

    @metadata_field(also_called="last_page_len", needs=PAGES)
    def kv_last_page_lens(self) -> Int32[Array, " R"]:
        """Keys in each sequence's last page, from 1 to `page_size`, never 0."""
        return jnp.where(self._stored_lens > 0, (self._stored_lens - 1) % self._tokens_per_page + 1, 1)

    @metadata_field(also_called="block_table, page_table", needs=TABLE_WIDTH)
    def page_indices(self) -> Int32[Array, "R M"]:
        """Rectangular page table of the pages that hold keys; 0 elsewhere."""
        # From the batch's own list, so that the compact one need not exist.
        starts, counts = self.page_indptr[:-1], jnp.diff(self.kv_page_indptr)
        return padded_rows(self.page_list, starts, counts, self._table_width)

    @metadata_field(needs=PAGES)
    def cascade(self) -> Cascade:
        """Groups of neighbouring sequences that share leading pages.

        For attention that reads a shared prefix once for all queries of a group.
        """
        seq_of_entry = segment_of(self.page_indptr[1:], self.bucket.pages)
        return find_cascade(self._given.batch, self._tokens_per_page, self.context_lens, seq_of_entry)

    @metadata_field(also_called="cos_sin_cache, gathered", needs=ROPE)
    def rope_tables(self) -> tuple[RopeTables, ...]:
        """Cosines and sines `[T, H/2]` of all tokens, float32; one pair per rope of the specs."""
        return tuple(
            rope_tables(rope, head_dim, self.positions) for rope, head_dim in self._given.request.ropes
        )

    @metadata_field()
    def visible(self) -> tuple[VisibleKeys, ...]:
        """Visible ranges and schedules; one entry per distinct window class."""
        return tuple(self._visible_keys(*of_class) for of_class in self._given.request.classes)

    # Shared by several fields, and of no use to others.

    @metadata_field()
    def _is_real_token(self) -> Bool[Array, " T"]:
        """Whether a token is no padding."""
        return jnp.arange(self.bucket.tokens, dtype=jnp.int32) < self.cu_q_lens[-1]

    @metadata_field()
    def _row_of_token(self) -> Int32[Array, " T"]:
        """Row of each token; 0, safe to gather, for padding."""
        return jnp.where(self._is_real_token, self.token_to_seq, 0)

    @metadata_field()
    def _stored_lens(self) -> Int32[Array, " R"]:
        """Keys that a sequence's pages have room for: all, unless `advance` outran them."""
        if self.page_size is None:
            return self.kv_lens
        return jnp.minimum(self.kv_lens, jnp.diff(self.page_indptr) * self.page_size)

    @metadata_field()
    def _kv_ends(self) -> Int32[Array, " T"]:
        """One past the last key of each token's sequence; 0 for padding."""
        return jnp.where(self._is_real_token, self._stored_lens[self._row_of_token], 0)

    @metadata_field()
    def _causal_ends(self) -> Int32[Array, " T"]:
        """One past each token's own key; 0 for padding."""
        if self.page_size is None:
            return jnp.where(self._is_real_token, self.positions + 1, 0)
        # A sequence that outran its pages sees the keys it has a place for, never another sequence's.
        return jnp.minimum(self.positions + 1, self._kv_ends)

    @metadata_field()
    def _prefix_lm_ends(self) -> Int32[Array, " T"]:
        """One past the last key of the prefix of each token's sequence; 0 for padding and for none."""
        lens = self._given.batch.prefix_lm_lens[self._row_of_token]
        return jnp.minimum(jnp.where(self._is_real_token, lens, 0), self._kv_ends)

    def _visible_keys(
        self, window_class: Visibility, tilings: tuple[Tiling, ...], key_blocks: tuple[int, ...]
    ) -> VisibleKeys:
        kv_start, kv_end = window_class.visible_range(
            self.positions, self._causal_ends, self._kv_ends, self._prefix_lm_ends
        )
        given = ClassInputs(
            bucket=self.bucket,
            max_keys=self.bucket.max_keys(self.page_size),
            tilings=tilings,
            key_blocks=key_blocks,
            cu_q_lens=self.cu_q_lens,
            token_to_seq=self.token_to_seq,
            stored_lens=self._stored_lens,
            kv_start=kv_start,
            kv_end=kv_end,
        )
        names = [name for name in VISIBLE_FIELDS if name in self._given.request.fields]
        return derive_visible(window_class, names, given)

    @property
    def _given(self) -> StepInputs:
        """What the formulas start from; not kept."""
        return self["_given"]

    @property
    def _tokens_per_page(self) -> int:
        if self.page_size is None:
            raise MissingFieldError(f"page_size=None: fields of pages need {PAGES}")
        return self.page_size

    @property
    def _table_width(self) -> int:
        width = self._given.request.max_pages_per_seq
        if width is None:
            raise MissingFieldError(f"max_pages_per_seq=None: field 'page_indices' needs {TABLE_WIDTH}")
        return width

    def at_page(self, first: int | Int32[Array, ""]) -> AttentionMetadata:
        """The same for a cache that is part of a larger one, such as a layer's in one array with all others.

        Args:
            first: Number of the page in the larger cache that is page 0 of the smaller.
        """
        moved = {name: self.values[name] + first for name in _PAGE_NUMBERS if name in self.values}
        if "slot_mapping" in self.values:
            slots = self.values["slot_mapping"]
            moved["slot_mapping"] = jnp.where(
                slots == PAD_SLOT, PAD_SLOT, slots + first * self._tokens_per_page
            )
        return dataclasses.replace(self, values=self.values | moved)

    def visible_keys(self, window_class: Visibility) -> VisibleKeys:
        """The visible keys of a window class.

        Raises:
            MissingFieldError: If `prepare_metadata` was not asked for it.
        """
        for visible in self.visible:
            if visible.window_class == window_class:
                return visible
        have = [v.window_class for v in self.visible]
        raise MissingFieldError(
            f"field 'visible' has no {window_class}, only {have}; give prepare_metadata the layer's spec"
        )

    def rope(self, spec: AttentionSpec) -> RopeTables:
        """The tables of a layer's rope.

        Raises:
            MissingFieldError: If `prepare_metadata` was not asked for them.
        """
        for tables in self.rope_tables:
            if tables.config == spec.rope and 2 * tables.cos.shape[1] == spec.head_dim:
                return tables
        raise MissingFieldError(
            f"field 'rope_tables' has none for rope={spec.rope} and head_dim={spec.head_dim}; "
            "give prepare_metadata the layer's spec"
        )

    def _repr_html_(self) -> str:
        from jaxattn.viz.cards import metadata_card  # when looked at

        return metadata_card(self)


def derive_metadata(batch: RaggedBatch, request: Request) -> AttentionMetadata:
    """The fields of a batch that were asked for."""
    holder = functools.partial(AttentionMetadata, bucket=batch.bucket, page_size=batch.page_size)
    names = [name for name in request.fields if name not in VISIBLE_FIELDS]
    formulas = formulas_of(AttentionMetadata) | dict(request.derive)
    return derive_fields(holder, names, formulas, StepInputs(batch, request))


METADATA_FIELDS = tuple(fields_of(AttentionMetadata))
