"""Who reads what: the fields that each consumer of the metadata needs, as data.

`prepare_metadata(consumers=...)` prepares what the named ones read and nothing else. A new backend
declares a `Consumer` of its own and hands it over; no list here has to know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxattn.metadata.schedule import Tiling
from jaxattn.metadata.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class Consumer:
    """A reader of the metadata.

    Attributes:
        name: Its name.
        reads: The fields it reads of any batch; those that a batch does not have are left out.
        tiling: How it wants the query axis cut for a layer; None where it reads no schedule.
        reads_paged: Fields it reads besides, of a batch with pages.
        reads_unpaged: Fields it reads besides, of a batch without.
        key_block: Keys per tile of the transposed list; None where it does not read it.
    """

    name: str
    reads: frozenset[str]
    tiling: Callable[[AttentionSpec], Tiling] | None = None
    reads_paged: frozenset[str] = frozenset()
    reads_unpaged: frozenset[str] = frozenset()
    key_block: int | None = None

    def reads_of(self, is_paged: bool) -> frozenset[str]:
        """All that it reads of a batch with or without pages."""
        return self.reads | (self.reads_paged if is_paged else self.reads_unpaged)


def xla_tiling(spec: AttentionSpec) -> Tiling:
    """A loop over tiles on few cores: one token, or enough rows to keep a product busy."""
    del spec
    return Tiling(short_q=1, long_q=64)


SPLIT_KEYS = 512
"""Keys of a decode tile that one program of a Pallas kernel attends to. A constant, not a share of the
batch's keys: so a sequence's bits do not depend on what else is in the batch. The results that are merged
are one or two percent of the keys and values that are read."""


def _split_keys(spec: AttentionSpec, short_q: int) -> int | None:
    """How the keys of short queries are split: not where a window leaves too few of them."""
    span = spec.window_class.span
    few_keys = span is not None and span + short_q - 1 <= SPLIT_KEYS
    return None if few_keys else SPLIT_KEYS


def triton_tiling(spec: AttentionSpec) -> Tiling:
    """Tensor-core tiles of 16 or 64 rows, in which the G heads of a group are packed."""
    G = spec.group_size
    short_q = max(1, 16 // G)
    return Tiling(short_q, max(2 * short_q, 64 // G), _split_keys(spec, short_q), longest_first=True)


def mosaic_tiling(spec: AttentionSpec) -> Tiling:
    """Tiles of 64 rows for one warpgroup, or of twice as many for two; the G heads of a group are packed."""
    short_q = max(1, 64 // spec.group_size)
    return Tiling(short_q, 2 * short_q, _split_keys(spec, short_q), longest_first=True)


KEY_BLOCK = 64
"""Keys per tile of the transposed list, from which Triton computes gradients of keys and values."""

MOSAIC_KEY_BLOCK = 128
"""The same for the Mosaic kernels: 64 keys for each of two warpgroups."""

_RANGES = frozenset({"kv_start", "kv_end"})
_TILES = _RANGES | {"schedules"}
_PAGES = frozenset({"page_indptr", "page_list"})

CONSUMERS = {
    consumer.name: consumer
    for consumer in (
        Consumer(
            "reference",
            frozenset({"token_to_seq"}) | _RANGES,
            reads_paged=frozenset({"kv_lens"}) | _PAGES,
            reads_unpaged=frozenset({"positions"}),
        ),
        Consumer("xla", _TILES, xla_tiling, _PAGES, frozenset({"cu_kv_lens"})),
        Consumer("triton", _TILES, triton_tiling, _PAGES, frozenset({"cu_kv_lens"})),
        Consumer("mosaic", _TILES, mosaic_tiling, _PAGES, frozenset({"cu_kv_lens"})),
        Consumer(
            "triton_gradient",
            _TILES | {"key_tiles"},
            triton_tiling,
            _PAGES,
            frozenset({"cu_kv_lens"}),
            KEY_BLOCK,
        ),
        Consumer(
            "mosaic_gradient",
            _TILES | {"key_tiles"},
            mosaic_tiling,
            _PAGES,
            frozenset({"cu_kv_lens"}),
            MOSAIC_KEY_BLOCK,
        ),
        Consumer("write_cache", frozenset({"slot_mapping"})),
        Consumer("decoder", frozenset({"slot_mapping", "logits_indices", "rope_tables"})),
    )
}
"""The consumers that the library knows, by name."""


def resolve_consumers(consumers: str | Consumer | tuple[str | Consumer, ...]) -> tuple[Consumer, ...]:
    """Consumers by name, or as they are.

    Raises:
        ValueError: If a name is unknown.
    """
    if isinstance(consumers, str | Consumer):
        consumers = (consumers,)
    for consumer in consumers:
        if isinstance(consumer, str) and consumer not in CONSUMERS:
            raise ValueError(f"unknown consumer {consumer!r}; use {', '.join(CONSUMERS)}, or give a Consumer")
    return tuple(CONSUMERS[c] if isinstance(c, str) else c for c in consumers)
