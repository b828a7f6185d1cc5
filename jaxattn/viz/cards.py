"""What a notebook shows of a batch, a bucket, metadata, a schedule and a cache (`_repr_html_`).

The classes stand later in the flow than this file, so it knows them by the names of their attributes. It
computes in NumPy, from values that are at hand: of a traced or abstract object it shows the shapes.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
from typing import Any, NamedTuple

import numpy as np

from jaxattn.metadata.fields import Prepared, field_table
from jaxattn.viz.html import (
    COLORS,
    MAX_PARTS,
    MAX_ROWS,
    Meter,
    Part,
    card,
    cells,
    details,
    facts,
    meters,
    note,
    preview,
    shape_of,
    strip,
    table,
    values_of,
    why_unknown,
)
from jaxattn_kernels.triton.parts import MAX_PROGRAMS


def bucket_card(bucket: Any) -> str:
    """The sizes of a `Bucket`."""
    decodes = bucket.max_q_len == 1
    return card(
        "Bucket",
        f"{bucket.tokens:,} tokens, {bucket.seqs:,} sequences" + (", decode" if decodes else ""),
        facts(
            [
                ("tokens, T", f"{bucket.tokens:,}"),
                ("sequences, R", f"{bucket.seqs:,}"),
                ("page list, P", f"{bucket.pages:,}" if bucket.pages else "none: keys are not paged"),
                ("longest query", f"{bucket.max_q_len:,} tokens"),
            ]
        ),
    )


def grid_card(grid: Any) -> str:
    """The sizes of a `BucketGrid`, and what they pad."""
    sizes = grid.tokens
    gaps = [(sizes[i] - sizes[i - 1] - 1) / sizes[i] for i in range(1, len(sizes))]
    parts = [
        Part(np.log2(b) - np.log2(a), f"up to {b:,} tokens", COLORS[i % 2])
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    return card(
        "BucketGrid",
        f"{len(sizes):,} sizes of the token axis, {len(grid.pages):,} of the page list",
        strip(parts, f"Sizes of the token axis from {sizes[0]:,} to {sizes[-1]:,}, in octaves"),
        facts(
            [
                ("tokens", _ends_of(sizes)),
                ("pages", _ends_of(grid.pages)),
                ("sequences", f"as many as tokens, at most {grid.max_seqs:,}"),
                ("padding of tokens", f"at most {max(gaps, default=0):.0%} between two sizes"),
            ]
        ),
    )


def plan_card(plan: Any) -> str:
    """The buckets of a `BucketPlan`, in the order in which they are tried."""
    rows = [
        [f"{b.tokens:,}", f"{b.seqs:,}", f"{b.pages:,}", "decode" if b.max_q_len == 1 else f"{b.max_q_len:,}"]
        for b in plan.buckets[:MAX_ROWS]
    ]
    return card(
        "BucketPlan",
        f"{_count(len(plan.buckets), 'bucket')}, the cheapest first",
        table(("tokens", "sequences", "page list", "longest query"), rows, total=len(plan.buckets)),
    )


def batch_card(batch: Any, size: int) -> str:
    """What a `RaggedBatch` holds, and how full its bucket is.

    Args:
        batch: The batch.
        size: Elements that its buffer has, if it is one batch.
    """
    bucket = batch.bucket
    place = f"bucket of {bucket.tokens:,} tokens, {bucket.seqs:,} sequences" + (
        f", {bucket.pages:,} pages of {batch.page_size} tokens" if batch.page_size else ""
    )
    values = values_of(batch.packed)
    if values is None:
        return card("RaggedBatch", place, note(f"{shape_of(batch.packed)}, {why_unknown(batch.packed)}"))
    if values.shape[-1:] != (size,) or values.dtype.kind != "i":
        return card("RaggedBatch", place, note(f"{shape_of(values)}, not the buffer of a batch"))
    if values.ndim != 1:
        return card("RaggedBatch", f"{values.shape[:-1]} batches, each in a {place}", note(shape_of(values)))
    on_host = dataclasses.replace(batch, packed=values.astype(np.int64))  # sums of whatever is in it fit
    num_seqs, num_tokens, q_lens = int(on_host.num_seqs), int(on_host.cu_q_lens[-1]), _q_lens(on_host)
    used = [
        Meter("tokens", num_tokens, bucket.tokens, f"{_padding(num_tokens, bucket.tokens)} padding"),
        Meter("sequences", num_seqs, bucket.seqs),
    ]
    if batch.page_size:
        used.append(Meter("pages", int(on_host.page_indptr[-1]), bucket.pages, _pages_used(on_host)))
    parts = [
        Part(n, f"sequence {i}: {n} tokens", COLORS[i % len(COLORS)])
        for i, n in enumerate(q_lens[:MAX_PARTS].tolist())
    ]
    parts += [Part(bucket.tokens - num_tokens, f"{bucket.tokens - num_tokens} tokens of padding", None)]
    where = "on the host" if isinstance(batch.packed, np.ndarray) else "on the device"
    return card(
        "RaggedBatch",
        f"{_count(num_seqs, 'sequence')}, {_count(num_tokens, 'query token')}",
        strip(parts if num_seqs < MAX_PARTS else [], f"{num_tokens} of {bucket.tokens} tokens are used"),
        meters(used),
        _sequences(on_host, q_lens),
        note(f"one buffer {where}: {shape_of(values)}, {values.nbytes:,} bytes"),
    )


def metadata_card(metadata: Any) -> str:
    """The prepared fields of an `AttentionMetadata`."""
    bucket, values = metadata.bucket, metadata.values
    num_tokens, num_seqs = (_scalar(values.get(name)) for name in ("num_tokens", "num_seqs"))
    used = [
        Meter(label, value, limit, note)
        for label, value, limit, note in (
            ("tokens", num_tokens, bucket.tokens, f"{_padding(num_tokens or 0, bucket.tokens)} padding"),
            ("sequences", num_seqs, bucket.seqs, ""),
        )
        if value is not None
    ]
    classes = values.get("visible", ())
    return card(
        "AttentionMetadata",
        f"{_count(len(values), 'field')} of a bucket of {bucket.tokens:,} tokens, {bucket.seqs:,} sequences",
        meters(used),
        *(_visible_body(visible) for visible in classes if hasattr(visible, "window_class")),
        details("fields", _fields(metadata)),
    )


def visible_card(visible: Any) -> str:
    """The ranges and schedules of a `VisibleKeys`."""
    return card("VisibleKeys", "", _visible_body(visible), details("fields", _fields(visible)))


def schedule_card(schedule: Any) -> str:
    """The tile lists of a `TileSchedule`: how many tiles and units, and what a program takes."""
    return card("TileSchedule", _tiling(schedule.tiling), _lists(schedule))


def record_card(record: Any) -> str:
    """The fields of a record whose fields are `described`, such as `Tiles`."""
    static = [
        f"{f.name}={getattr(record, f.name)!r}"
        for f in dataclasses.fields(record)
        if f.metadata.get("static", False)
    ]
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return card(type(record).__name__, ", ".join(static), _fields_table(record, values))


def cache_card(cache: Any) -> str:
    """The size of a `PagedKVCache`; never its contents."""
    shapes = [f"keys {shape_of(cache.k_pages)}", f"values {shape_of(cache.v_pages)}"]
    shape = getattr(cache.k_pages, "shape", ())
    if len(shape) != 4:
        return card("PagedKVCache", "; ".join(shapes))
    pages, page_size, K, H = shape
    num_bytes = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in (cache.k_pages, cache.v_pages))
    scales = [
        f"{name} {preview(scale)}"
        for name, scale in (("keys", cache.k_scale), ("values", cache.v_scale))
        if scale is not None
    ]
    return card(
        "PagedKVCache",
        f"{pages:,} pages of {page_size} tokens, {cache.k_pages.dtype}",
        facts(
            [
                ("room", f"{pages * page_size:,} tokens"),
                ("a token", f"{K} key heads of {H}, keys and values"),
                ("memory", f"{num_bytes / 2**20:,.1f} MiB, {num_bytes // max(pages, 1):,} bytes a page"),
            ]
        ),
        *(f"<div>scales of {scale}</div>" for scale in scales),
    )


def pool_card(pool: Any, references: np.ndarray) -> str:
    """The pages of a `PagePool` in use.

    Args:
        pool: The pool.
        references: How many references each page has.
    """
    used, shared = int((references > 0).sum()), int((references > 1).sum())
    words = ("free", "held once")
    fills = [
        Part(
            min(0.5 * n, 1.0),
            f"page {i}: {words[n] if n < 2 else f'shared by {n}'}",
            COLORS[0] if n else None,
        )
        for i, n in enumerate(references[:MAX_PARTS].tolist())
    ]
    return card(
        "PagePool",
        f"{pool.num_pages:,} pages of {pool.page_size} tokens",
        cells(fills if references.size <= MAX_PARTS else [], f"{used} of {pool.num_pages} pages are in use"),
        meters(
            [
                Meter("in use", used, pool.num_pages, f"{pool.num_free:,} free"),
                Meter("shared", shared, pool.num_pages),
            ]
        ),
    )


def _ends_of(sizes: tuple[int, ...]) -> str:
    shown = [f"{n:,}" for n in sizes]
    return ", ".join(shown if len(shown) <= MAX_ROWS else [*shown[:4], "…", *shown[-3:]])


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _padding(used: int, limit: int) -> str:
    return f"{1 - used / limit:.0%}"


def _scalar(array: Any) -> int | None:
    """The value of an array of one number, or None where there is none."""
    values = None if array is None else values_of(array)
    return int(values.item()) if values is not None and values.size == 1 else None


def _q_lens(batch: Any) -> np.ndarray:
    return np.diff(batch.cu_q_lens)[: max(int(batch.num_seqs), 0)]


def _pages_used(batch: Any) -> str:
    """How many of the slots in a batch's pages hold keys."""
    slots, keys = int(batch.page_indptr[-1]) * batch.page_size, int(batch.kv_lens.sum())
    return f"{keys:,} keys in {slots:,} slots"


def _sequences(batch: Any, q_lens: np.ndarray) -> str:
    pages = np.diff(batch.page_indptr)
    rows = [
        [
            str(i),
            f"{q_lens[i]:,}",
            f"{batch.kv_lens[i] - q_lens[i]:,}",
            f"{batch.kv_lens[i]:,}",
            f"{pages[i]:,}" if batch.page_size else "–",
            "decode" if batch.is_decode[i] else "prefill",
        ]
        for i in range(min(len(q_lens), MAX_ROWS))
    ]
    header = ("sequence", "query tokens", "cached before", "keys", "pages", "phase")
    return details(_count(len(q_lens), "sequence"), table(header, rows, total=len(q_lens)))


def _fields(prepared: Any) -> str:
    return _fields_table(prepared, prepared.values)


def _fields_table(owner: Any, values: dict[str, Any]) -> str:
    """Name, shape, first values and meaning of the fields that are there."""
    meanings = {info.name: info.meaning for info in field_table(type(owner))}
    rows = [
        [html.escape(name), *_shown(value), html.escape(meanings.get(name, "a field of the caller's own"))]
        for name, value in values.items()
        if name in meanings or isinstance(owner, Prepared)
    ]
    return table(("field", "shape", "values", "meaning"), rows)


def _shown(value: Any) -> tuple[str, str]:
    """Shape and first values of a field; of a group of fields what it is made of."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return html.escape(shape_of(value)), preview(value)
    if isinstance(value, tuple):
        return f"{len(value)} ×", html.escape(", ".join(dict.fromkeys(type(x).__name__ for x in value)))
    return ("none" if value is None else html.escape(type(value).__name__)), ""


def _visible_body(visible: Any) -> str:
    """The class, how much of its tiles is seen, and the lists of each schedule."""
    start, end = (values_of(visible.values.get(name)) for name in ("kv_start", "kv_end"))
    seen = None
    if start is not None and end is not None and start.ndim == end.ndim == 1:
        seen = int(end.sum() - start.sum())
    name = html.escape(str(visible.window_class))
    body = [f'<div style="margin-top:.3em;font-weight:600">{name}</div>']
    if seen is not None:
        body.append(note(f"{seen:,} pairs of a token and a key that it sees"))
    for schedule in visible.values.get("schedules", ()):
        if hasattr(schedule, "tiling"):
            body.append(details(_tiling(schedule.tiling), _lists(schedule, seen)))
    return "".join(body)


def _tiling(tiling: Any) -> str:
    short, long = (_count(n, "token") for n in (tiling.short_q, tiling.long_q))
    split = f", keys split at {tiling.split_keys}" if tiling.split_keys else ""
    return f"tiles of {short} for short queries, of {long} for longer ones{split}"


def _lists(schedule: Any, seen: int | None = None) -> str:
    """How full the tile lists are, how many units a program takes, and how much of the tiles is seen."""
    lists = dict(zip(("short queries", "long queries"), schedule.lists, strict=False))
    known = {name: _measure(tiles) for name, tiles in lists.items()}
    if any(numbers is None for numbers in known.values()):
        return note(
            f"{why_unknown(schedule.short.q_len) or 'a stack of schedules'}: "
            + ", ".join(f"{name} {shape_of(tiles.q_len)}" for name, tiles in lists.items())
        )
    rows = [(name, numbers) for name, numbers in known.items() if numbers is not None]
    covered = sum(numbers.covered for _, numbers in rows)
    shown = meters(Meter(f"tiles of {name}", n.tiles, n.room, _per_program(n.units)) for name, n in rows)
    if seen is None or not covered:
        return shown
    return shown + meters([Meter("seen within tiles", seen, covered, f"{_padding(seen, covered)} masked")])


class _Measured(NamedTuple):
    """Numbers of a tile list: live tiles, room for tiles, units, and pairs of a token and a key in tiles."""

    tiles: int
    room: int
    units: int
    covered: int


def _measure(tiles: Any) -> _Measured | None:
    """The numbers of a tile list whose values are at hand."""
    num_tiles = _scalar(tiles.num_attending)
    q_len, start, end = (values_of(x) for x in (tiles.q_len, tiles.kv_start, tiles.kv_end))
    if num_tiles is None or q_len is None or start is None or end is None or q_len.ndim != 1:
        return None
    num_tiles = min(max(num_tiles, 0), len(q_len))
    covered = int((q_len[:num_tiles].astype(np.int64) * (end - start)[:num_tiles]).sum())
    indptr = None if tiles.split is None else values_of(tiles.split.indptr)
    units = num_tiles if indptr is None else int(indptr[num_tiles])
    return _Measured(num_tiles, len(q_len), units, covered)


def _per_program(units: int) -> str:
    """The units of a list, and what a program of a launch takes of them, of the Triton kernel."""
    if not units:
        return "no work"
    each = units * _HEADS / min(units * _HEADS, MAX_PROGRAMS)
    return f"{_count(units, 'unit')} per key head; with {_HEADS} heads a program takes {each:.3g}"


_HEADS = 8
"""Key heads of a usual layer; a schedule does not know how many its layers have."""
