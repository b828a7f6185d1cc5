"""What a notebook shows of a batch, a bucket, metadata, a schedule and a cache (`_repr_html_`).

The classes stand below this room, and import it when they are looked at; so it knows them by the names of
their attributes. It computes in NumPy, from values that are at hand: of a traced or abstract object it shows
the shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from jaxattn.metadata.fields import Prepared, field_table
from jaxattn.viz.html import (
    COLORS,
    MAX_PARTS,
    MAX_ROWS,
    Html,
    Part,
    card,
    details,
    grid,
    meter,
    note,
    preview,
    shape_of,
    strip,
    table,
    values_of,
    why_unknown,
)


def bucket_card(bucket: Any) -> Html:
    """The sizes of a `Bucket`."""
    sizes = [
        ("tokens, T", bucket.tokens),
        ("sequences, R", bucket.seqs),
        ("page list, P", bucket.pages or "none: keys are not paged"),
        ("longest query", f"{bucket.max_q_len:,} tokens"),
    ]
    decode = ", decode" if bucket.max_q_len == 1 else ""
    return card("Bucket", f"{bucket.tokens:,} tokens, {bucket.seqs:,} sequences{decode}", table(sizes))


def grid_card(buckets: Any) -> Html:
    """The sizes of a `BucketGrid`, and what they pad."""
    sizes, pairs = buckets.tokens, list(itertools.pairwise(buckets.tokens))
    octaves = [Part(f"up to {b:,} tokens", COLORS[i % 2], np.log2(b / a)) for i, (a, b) in enumerate(pairs)]
    facts = [
        ("tokens", _ends_of(sizes)),
        ("pages", _ends_of(buckets.pages)),
        ("sequences", f"as many as tokens, at most {buckets.max_seqs:,}"),
        (
            "padding of tokens",
            f"at most {max(((b - a - 1) / b for a, b in pairs), default=0):.0%} between two sizes",
        ),
    ]
    return card(
        "BucketGrid",
        f"{len(sizes):,} sizes of the token axis, {len(buckets.pages):,} of the page list",
        strip(octaves, f"Sizes of the token axis from {sizes[0]:,} to {sizes[-1]:,}, in octaves"),
        table(facts),
    )


def plan_card(plan: Any) -> Html:
    """The buckets of a `BucketPlan`, in the order in which they are tried."""
    rows = [
        (b.tokens, b.seqs, b.pages, "decode" if b.max_q_len == 1 else b.max_q_len)
        for b in plan.buckets[:MAX_ROWS]
    ]
    header = ("tokens", "sequences", "page list", "longest query")
    headline = f"{_count(len(plan.buckets), 'bucket')}, the cheapest first"
    return card("BucketPlan", headline, table(rows, header, total=len(plan.buckets)))


def batch_card(batch: Any, size: int) -> Html:
    """What a `RaggedBatch` holds, and how full its bucket is.

    Args:
        batch: The batch.
        size: Elements that its buffer has, if it is one batch.
    """
    bucket, values = batch.bucket, values_of(batch.packed)
    pages = f", {bucket.pages:,} pages of {batch.page_size} tokens" if batch.page_size else ""
    place = f"bucket of {bucket.tokens:,} tokens, {bucket.seqs:,} sequences{pages}"
    if values is None:
        return card("RaggedBatch", place, note(f"{shape_of(batch.packed)}, {why_unknown(batch.packed)}"))
    if values.shape[-1:] != (size,) or values.dtype.kind != "i":
        return card("RaggedBatch", place, note(f"{shape_of(values)}, not the buffer of a batch"))
    if values.ndim != 1:
        return card("RaggedBatch", f"{values.shape[:-1]} batches, each in a {place}", note(shape_of(values)))
    on_host = dataclasses.replace(batch, packed=values.astype(np.int64))  # sums of whatever is in it fit
    num_seqs, num_tokens = int(on_host.num_seqs), int(on_host.cu_q_lens[-1])
    q_lens = np.diff(on_host.cu_q_lens)[: max(num_seqs, 0)]
    parts = [
        *(
            Part(f"sequence {i}: {n} tokens", COLORS[i % len(COLORS)], n)
            for i, n in enumerate(q_lens[:MAX_PARTS])
        ),
        Part(f"{bucket.tokens - num_tokens} tokens of padding", None, bucket.tokens - num_tokens),
    ]
    used = _used(bucket, num_tokens, num_seqs)
    if batch.page_size:
        held = int(on_host.page_indptr[-1])
        keys = f"{int(on_host.kv_lens.sum()):,} keys in {held * batch.page_size:,} slots"
        used.append(meter("pages", held, bucket.pages, keys))
    where = "on the host" if isinstance(batch.packed, np.ndarray) else "on the device"
    return card(
        "RaggedBatch",
        f"{_count(num_seqs, 'sequence')}, {_count(num_tokens, 'query token')}",
        strip(parts if num_seqs < MAX_PARTS else [], f"{num_tokens} of {bucket.tokens} tokens are used"),
        table(used),
        _sequences(on_host, q_lens),
        note(f"one buffer {where}: {shape_of(values)}, {values.nbytes:,} bytes"),
    )


def metadata_card(metadata: Any) -> Html:
    """The prepared fields of an `AttentionMetadata`."""
    bucket, values = metadata.bucket, metadata.values
    return card(
        "AttentionMetadata",
        f"{_count(len(values), 'field')} of a bucket of {bucket.tokens:,} tokens, {bucket.seqs:,} sequences",
        table(_used(bucket, *(_number_in(values.get(name)) for name in ("num_tokens", "num_seqs")))),
        *(
            _visible_body(visible)
            for visible in values.get("visible", ())
            if hasattr(visible, "window_class")
        ),
        details("fields", _fields(metadata, values)),
    )


def visible_card(visible: Any) -> Html:
    """The ranges and schedules of a `VisibleKeys`."""
    return card(
        "VisibleKeys", "", _visible_body(visible), details("fields", _fields(visible, visible.values))
    )


def schedule_card(schedule: Any) -> Html:
    """The tile lists of a `TileSchedule`: how many tiles and units there are."""
    return card("TileSchedule", _tiling(schedule.tiling), _lists(schedule))


def record_card(record: Any) -> Html:
    """The fields of a record whose fields are `described`, such as `Tiles`."""
    fields = dataclasses.fields(record)
    static = [f"{f.name}={getattr(record, f.name)!r}" for f in fields if f.metadata.get("static", False)]
    values = {f.name: getattr(record, f.name) for f in fields}
    return card(type(record).__name__, ", ".join(static), _fields(record, values))


def cache_card(cache: Any) -> Html:
    """The size of a `PagedKVCache`; never its contents."""
    both = {"keys": cache.k_pages, "values": cache.v_pages}
    shape = getattr(cache.k_pages, "shape", ())
    if len(shape) != 4:
        return card("PagedKVCache", "; ".join(f"{name} {shape_of(x)}" for name, x in both.items()))
    pages, page_size, K, H = shape
    num_bytes = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in both.values())
    scales = zip(both, (cache.k_scale, cache.v_scale), strict=True)
    facts = [
        ("room", f"{pages * page_size:,} tokens"),
        ("a token", f"{K} key heads of {H}, keys and values"),
        ("memory", f"{num_bytes / 2**20:,.1f} MiB, {num_bytes // max(pages, 1):,} bytes a page"),
        *((f"scales of {name}", preview(scale)) for name, scale in scales if scale is not None),
    ]
    headline = f"{pages:,} pages of {page_size} tokens, {cache.k_pages.dtype}"
    return card("PagedKVCache", headline, table(facts))


def pool_card(pool: Any, references: np.ndarray) -> Html:
    """The pages of a `PagePool` in use.

    Args:
        pool: The pool.
        references: How many references each page has.
    """
    used, shared = int((references > 0).sum()), int((references > 1).sum())
    words, colors = ("free", "held once"), (None, COLORS[4], COLORS[0])
    pages = [
        Part(f"page {i}: {words[n] if n < 2 else f'shared by {n}'}", colors[min(n, 2)])
        for i, n in enumerate(references[: MAX_PARTS + 1].tolist())
    ]
    return card(
        "PagePool",
        f"{pool.num_pages:,} pages of {pool.page_size} tokens",
        grid(pages, f"{used} of {pool.num_pages} pages are in use"),
        table(
            [
                meter("in use", used, pool.num_pages, f"{pool.num_free:,} free"),
                meter("shared", shared, pool.num_pages),
            ]
        ),
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _ends_of(sizes: tuple[int, ...]) -> str:
    shown = [f"{n:,}" for n in sizes]
    return ", ".join(shown if len(shown) <= MAX_ROWS else [*shown[:4], "…", *shown[-3:]])


def _number_in(array: Any) -> int | None:
    """The value of an array of one number, or None where there is none."""
    values = values_of(array)
    return int(values.item()) if values is not None and values.size == 1 else None


def _used(bucket: Any, num_tokens: int | None, num_seqs: int | None) -> list[tuple[str, Html, str]]:
    """How full a bucket is, as far as it is known."""
    padding = f"{1 - (num_tokens or 0) / bucket.tokens:.0%} padding"
    rows = (("tokens", num_tokens, bucket.tokens, padding), ("sequences", num_seqs, bucket.seqs, ""))
    return [meter(label, value, limit, more) for label, value, limit, more in rows if value is not None]


def _sequences(batch: Any, q_lens: np.ndarray) -> Html:
    shown = zip(q_lens, batch.kv_lens, np.diff(batch.page_indptr), batch.is_decode, strict=False)
    rows = [
        (
            i,
            int(n),
            int(keys - n),
            int(keys),
            int(pages) if batch.page_size else "–",
            "decode" if d else "prefill",
        )
        for i, (n, keys, pages, d) in enumerate(itertools.islice(shown, MAX_ROWS))
    ]
    header = ("sequence", "query tokens", "cached before", "keys", "pages", "phase")
    return details(_count(len(q_lens), "sequence"), table(rows, header, total=len(q_lens)))


def _fields(owner: Any, values: dict[str, Any]) -> Html:
    """Name, shape, first values and meaning of the fields that are there."""
    meanings = {info.name: info.meaning for info in field_table(type(owner))}
    rows = [
        (name, *_shown(value), meanings.get(name, "a field of the caller's own"))
        for name, value in values.items()
        if name in meanings or isinstance(owner, Prepared)
    ]
    return table(rows, ("field", "shape", "values", "meaning"))


def _shown(value: Any) -> tuple[str, str]:
    """Shape and first values of a field; of a group of fields what it is made of."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return shape_of(value), preview(value)
    if isinstance(value, tuple):
        return f"{len(value)} ×", ", ".join(dict.fromkeys(type(x).__name__ for x in value))
    return ("none" if value is None else type(value).__name__), ""


def _visible_body(visible: Any) -> Html:
    """The class, how much of its tiles is seen, and the lists of each schedule."""
    start, end = (values_of(visible.values.get(name)) for name in ("kv_start", "kv_end"))
    body, seen = [table([(str(visible.window_class),)])], None
    if start is not None and end is not None and start.ndim == end.ndim == 1:
        seen = int(end.sum() - start.sum())
        body.append(note(f"{seen:,} pairs of a token and a key that it sees"))
    for schedule in visible.values.get("schedules", ()):
        if hasattr(schedule, "tiling"):
            body.append(details(_tiling(schedule.tiling), _lists(schedule, seen)))
    return Html("".join(body))


def _tiling(tiling: Any) -> str:
    short, long = (_count(n, "token") for n in (tiling.short_q, tiling.long_q))
    split = f", keys split at {tiling.split_keys}" if tiling.split_keys else ""
    return f"tiles of {short} for short queries, of {long} for longer ones{split}"


def _lists(schedule: Any, seen: int | None = None) -> Html:
    """How full the tile lists are, how many units of work they hold, and how much of the tiles is seen."""
    lists = dict(zip(("short queries", "long queries"), schedule.lists, strict=False))
    known = {name: numbers for name, tiles in lists.items() if (numbers := _measure(tiles)) is not None}
    if len(known) < len(lists):
        why = why_unknown(schedule.short.q_len) or "a stack of schedules"
        return note(f"{why}: " + ", ".join(f"{name} {shape_of(x.q_len)}" for name, x in lists.items()))
    rows = [
        meter(f"tiles of {name}", n.tiles, n.room, f"{_count(n.units, 'unit')} for each key head")
        for name, n in known.items()
    ]
    covered = sum(n.covered for n in known.values())
    if seen is not None and covered:
        rows.append(meter("seen within tiles", seen, covered, f"{1 - seen / covered:.0%} masked"))
    return table(rows)


class _Measured(NamedTuple):
    """Numbers of a tile list: live tiles, room for tiles, units, and pairs of a token and a key in tiles."""

    tiles: int
    room: int
    units: int
    covered: int


def _measure(tiles: Any) -> _Measured | None:
    """The numbers of a tile list whose values are at hand."""
    num_tiles = _number_in(tiles.num_attending)
    q_len, start, end = (values_of(x) for x in (tiles.q_len, tiles.kv_start, tiles.kv_end))
    if num_tiles is None or q_len is None or start is None or end is None or q_len.ndim != 1:
        return None
    num_tiles = min(max(num_tiles, 0), len(q_len))
    covered = int((q_len[:num_tiles].astype(np.int64) * (end - start)[:num_tiles]).sum())
    indptr = None if tiles.split is None else values_of(tiles.split.indptr)
    units = num_tiles if indptr is None else int(indptr[num_tiles])
    return _Measured(num_tiles, len(q_len), units, covered)
