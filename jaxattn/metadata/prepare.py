"""`prepare_metadata`: everything that attention derives from a batch, once, in one pure function.

The result serves every backend, every layer and every window class. Called inside a model's own
jit, the fields that nobody reads are removed by the compiler, so a superset costs no more than
the part that is used; standing alone, it takes a selection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from jaxattn.batch.ragged import RaggedBatch
from jaxattn.metadata.consumers import CONSUMERS, Consumer, resolve_consumers
from jaxattn.metadata.fields import fields_of
from jaxattn.metadata.schedule import Tiling
from jaxattn.metadata.spec import AttentionSpec, Visibility
from jaxattn.metadata.superset import (
    METADATA_FIELDS,
    PAGES,
    ROPE,
    TABLE_WIDTH,
    AttentionMetadata,
    Request,
    derive_metadata,
)
from jaxattn.metadata.visible import VISIBLE_FIELDS, VisibleKeys


def prepare_metadata(
    batch: RaggedBatch,
    specs: AttentionSpec | Iterable[AttentionSpec] = (),
    *,
    consumers: str | Consumer | Iterable[str | Consumer] | None = None,
    fields: Iterable[str] | None = None,
    max_pages_per_seq: int | None = None,
    derive: Mapping[str, Callable[[AttentionMetadata], Array]] | None = None,
) -> AttentionMetadata:
    """Derive the metadata of a batch, for all layers and backends. Pure; compiled once per bucket.

    Called inside a jit, leave the selection open: what is not read is not computed. Called by
    itself, its outputs are all computed, so name who reads them.

    Args:
        batch: The batch.
        specs: The specs of all layers that will attend; equal window classes and ropes are shared.
        consumers: Who will read: names of `jaxattn.metadata.consumers.CONSUMERS`, such as "xla" or "decoder",
            or a `Consumer` of your own. What they read is prepared, with their schedules. Default:
            every field, and the schedules of every implementation.
        fields: Names to prepare instead; the schedules are those of `consumers`.
        max_pages_per_seq: Columns of the rectangular `page_indices`, at least the pages of the
            longest sequence, whose further pages are cut off; it does not exist without.
        derive: Fields of your own, by name: functions of the metadata, which may read any field and
            each other. They are read as `metadata[name]`. Functions are static: define them once, since
            a new one is a new program.

    Returns:
        The metadata, shapes given by `batch.bucket`. Reading a field that was not prepared raises
        `MissingFieldError` with its name.

    Raises:
        ValueError: If a consumer or a field is unknown.
    """
    if isinstance(consumers, str | Consumer):
        consumers = (consumers,)
    request = _request(
        batch.page_size is not None,
        (specs,) if isinstance(specs, AttentionSpec) else tuple(specs),
        None if consumers is None else tuple(consumers),
        None if fields is None else tuple(fields),
        max_pages_per_seq,
        tuple((derive or {}).items()),
    )
    return _prepare(batch, request)


@functools.lru_cache(maxsize=256)
def _request(
    is_paged: bool,
    specs: tuple[AttentionSpec, ...],
    consumers: tuple[str | Consumer, ...] | None,
    fields: tuple[str, ...] | None,
    max_pages_per_seq: int | None,
    own: tuple[tuple[str, Callable[[AttentionMetadata], Array]], ...],
) -> Request:
    """The request that the arguments of `prepare_metadata` stand for."""
    readers = tuple(CONSUMERS.values()) if consumers is None else resolve_consumers(consumers)
    derive = dict(own)
    if fields is not None:
        names = {*fields, *derive}
    elif consumers is not None:
        names = {name for reader in readers for name in reader.reads_of(is_paged)} | set(derive)
    else:
        names = {*METADATA_FIELDS, *VISIBLE_FIELDS, *derive}
    return Request(
        fields=_existing(names, is_paged, specs, max_pages_per_seq, derive),
        classes=_window_classes(specs, readers),
        ropes=tuple(dict.fromkeys((s.rope, s.head_dim) for s in specs if s.rope is not None)),
        max_pages_per_seq=max_pages_per_seq,
        derive=own,
    )


@functools.partial(jax.jit, static_argnums=1)
def _prepare(batch: RaggedBatch, request: Request) -> AttentionMetadata:
    return derive_metadata(batch, request)


def _existing(
    names: set[str],
    is_paged: bool,
    specs: tuple[AttentionSpec, ...],
    max_pages_per_seq: int | None,
    derive: Mapping[str, Any],
) -> tuple[str, ...]:
    """The names, sorted, without those that this batch and these specs cannot have."""
    known = {**fields_of(AttentionMetadata), **fields_of(VisibleKeys)}
    if unknown := sorted(names - known.keys() - derive.keys()):
        raise ValueError(f"unknown fields {unknown}; there are {', '.join(known)}")
    if taken := sorted(known.keys() & derive.keys()):
        raise ValueError(f"derive={taken} would replace fields that exist; choose other names")
    has = {
        None: True,
        PAGES: is_paged,
        TABLE_WIDTH: is_paged and max_pages_per_seq is not None,
        ROPE: any(spec.rope is not None for spec in specs),
    }
    exist = {name for name in names if name in derive or has[known[name].needs]}
    if exist & set(VISIBLE_FIELDS):
        exist.add("visible")
    return tuple(sorted(exist))


def _window_classes(
    specs: tuple[AttentionSpec, ...], readers: tuple[Consumer, ...]
) -> tuple[tuple[Visibility, tuple[Tiling, ...], tuple[int, ...]], ...]:
    """The distinct window classes in order, each with the distinct tilings and key blocks of its readers."""
    # Ordered sets: equal inputs, equal programs.
    wanted: dict[Visibility, tuple[dict[Tiling, None], dict[int, None]]] = {}
    for spec in specs:
        tilings, key_blocks = wanted.setdefault(spec.window_class, ({}, {}))
        for reader in readers:
            if reader.tiling is not None:
                tilings[reader.tiling(spec)] = None
            if reader.key_block is not None:
                key_blocks[reader.key_block] = None
    return tuple(
        (window_class, tuple(tilings), tuple(key_blocks))
        for window_class, (tilings, key_blocks) in wanted.items()
    )
