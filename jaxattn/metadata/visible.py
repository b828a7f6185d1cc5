"""`VisibleKeys`: what the tokens of one window class see, and the schedules to attend with."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, no_type_check

import jax
from jaxtyping import Array, Int32

from jaxattn.batch.bucket import Bucket
from jaxattn.metadata.fields import (
    MissingFieldError,
    Prepared,
    derive_fields,
    fields_of,
    formulas_of,
    metadata_field,
)
from jaxattn.metadata.schedule import TileSchedule, Tiling, schedule_key_tiles, schedule_tiles
from jaxattn.metadata.spec import Visibility
from jaxattn_kernels.arrays import KeyTiles


class ClassInputs(NamedTuple):
    """What the fields of one window class are derived from.

    Attributes:
        bucket: The batch's static sizes.
        max_keys: The most keys that all sequences have together.
        tilings: The ways in which the query axis is cut, a schedule each.
        key_blocks: The lengths of tiles of keys, a list each.
        cu_q_lens: Prefix sums of query lengths.
        token_to_seq: Row of each token; R for padding.
        stored_lens: Keys of each sequence that have a place.
        kv_start: First visible key of each token.
        kv_end: One past the last visible key of each token.
    """

    bucket: Bucket
    max_keys: int
    tilings: tuple[Tiling, ...]
    key_blocks: tuple[int, ...]
    cu_q_lens: Int32[Array, " R_plus_1"]
    token_to_seq: Int32[Array, " T"]
    stored_lens: Int32[Array, " R"]
    kv_start: Int32[Array, " T"]
    kv_end: Int32[Array, " T"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VisibleKeys(Prepared):
    """What the tokens of one window class see, and the schedules to attend with.

    Attributes:
        values: The prepared fields by name.
        window_class: The class (static).
    """

    values: dict[str, Any]
    window_class: Visibility = field(metadata={"static": True})

    @metadata_field(also_called="k_start")
    def kv_start(self) -> Int32[Array, " T"]:
        """First visible key of each token, as a position in its sequence; 0 for padding."""
        return self._given.kv_start

    @metadata_field(also_called="k_end")
    def kv_end(self) -> Int32[Array, " T"]:
        """One past the last visible key of each token; 0 for padding, which sees none."""
        return self._given.kv_end

    @metadata_field()
    def schedules(self) -> tuple[TileSchedule, ...]:
        """Which program attends with which query tokens to which keys; one schedule per tiling."""
        given = self._given
        return tuple(
            schedule_tiles(
                given.bucket,
                tiling,
                cu_q_lens=given.cu_q_lens,
                token_to_seq=given.token_to_seq,
                kv_start=given.kv_start,
                kv_end=given.kv_end,
                max_keys=given.max_keys,
                span=self.window_class.span,
            )
            for tiling in given.tilings
        )

    @metadata_field()
    def key_tiles(self) -> tuple[KeyTiles, ...]:
        """Tiles of keys with the queries that see them, for gradients; one list per length of a tile."""
        given = self._given
        return tuple(
            schedule_key_tiles(
                block_k,
                stored_lens=given.stored_lens,
                token_to_seq=given.token_to_seq,
                kv_start=given.kv_start,
                kv_end=given.kv_end,
                max_keys=given.max_keys,
            )
            for block_k in given.key_blocks
        )

    @property
    def _given(self) -> ClassInputs:
        """What the formulas start from; not kept."""
        return self["_given"]

    def key_tiles_of(self, block_k: int) -> KeyTiles:
        """The tiles of `block_k` keys.

        Raises:
            MissingFieldError: If `prepare_metadata` was not asked for them.
        """
        for tiles in self.key_tiles:
            if tiles.block_k == block_k:
                return tiles
        have = [tiles.block_k for tiles in self.key_tiles]
        raise MissingFieldError(
            f"field 'key_tiles' holds none of {block_k} keys for {self.window_class}, only {have}; "
            "give prepare_metadata the layer's spec and a consumer of them, such as 'triton_gradient'"
        )

    def schedule(self, tiling: Tiling) -> TileSchedule:
        """The schedule of a tiling.

        Raises:
            MissingFieldError: If `prepare_metadata` was not asked for it.
        """
        for schedule in self.schedules:
            if schedule.tiling == tiling:
                return schedule
        have = [tuple(s.tiling) for s in self.schedules]
        raise MissingFieldError(
            f"field 'schedules' holds no {tiling} for {self.window_class}, only {have}; "
            "give prepare_metadata the layer's spec and its consumer"
        )

    def _repr_html_(self) -> str:
        from jaxattn.viz.cards import visible_card  # when looked at

        return visible_card(self)


def derive_visible(window_class: Visibility, names: Iterable[str], given: ClassInputs) -> VisibleKeys:
    """The named fields of a window class."""
    holder = functools.partial(VisibleKeys, window_class=window_class)
    return derive_fields(holder, names, formulas_of(VisibleKeys), given)


VISIBLE_FIELDS = tuple(fields_of(VisibleKeys))
