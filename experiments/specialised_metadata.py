"""What each consumer reads, derived for it alone: what the superset must never be dearer than.

Every function here takes a `RaggedBatch` and returns exactly the arrays that one implementation of
attention, or the decoder, reads. Nothing of `jaxattn.metadata` is used but the type of a tiling. They are
written as by somebody who knows that consumer and its bucket, and owes nobody else a field: only what is read
is derived; what can be folded into one value per row, and so gathered once per token, is; keys that are not
paged are known to be as many as queries; and where every sequence has one token, no tile is searched for.

Names are flat: `token_to_seq`; `kv_start/1` for window class 1; `short.seq/1` for its tiles. A layer reads
the arrays of its own class, so those that classes have in common stand there once per class, as they do
in the superset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import AttentionMetadata, AttentionSpec, RaggedBatch
from jaxattn.metadata.consumers import KEY_BLOCK, MOSAIC_KEY_BLOCK, mosaic_tiling, triton_tiling, xla_tiling
from jaxattn.metadata.schedule import Tiling
from jaxattn.metadata.spec import Visibility, WindowClass

Arrays = dict[str, jax.Array]

PAD_SLOT = 2**31 - 1


class _Tokens(NamedTuple):
    """Where each token stands.

    Attributes:
        seq: Row; R for padding.
        row: Row; 0 for padding.
        real: Whether it is no padding.
        positions: Position in the sequence; 0 for padding.
    """

    seq: jax.Array
    row: jax.Array
    real: jax.Array
    positions: jax.Array


def _count(n: int) -> jax.Array:
    return jnp.arange(n, dtype=jnp.int32)


def _prefix_sums(lens: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lens, dtype=jnp.int32)])


def _segments(ends: jax.Array, length: int) -> jax.Array:
    """The segment of each index: a histogram of the segments' ends, summed up."""
    return jnp.cumsum(jnp.zeros(length, jnp.int32).at[ends].add(1, mode="drop"), dtype=jnp.int32)


def _tokens(batch: RaggedBatch) -> _Tokens:
    T, ends = batch.bucket.tokens, batch.cu_q_lens[1:]
    token = _count(T)
    real = token < ends[-1]
    seq = _segments(ends, T)
    row = jnp.where(real, seq, 0)
    if batch.page_size is None:  # nothing is cached
        position = token - batch.cu_q_lens[row]
    else:  # A query's last token is its sequence's last: one distance per row, one gather.
        position = token + (batch.kv_lens - ends)[row]
    positions = jnp.where(real, position, 0)
    return _Tokens(seq, row, real, positions)


def _room(batch: RaggedBatch) -> jax.Array:
    """Keys that each sequence's pages hold."""
    assert batch.page_size is not None
    return jnp.minimum(batch.kv_lens, jnp.diff(batch.page_indptr) * batch.page_size)


def _pages(batch: RaggedBatch) -> Arrays:
    """Pages are looked up where the host put them."""
    return {"page_indptr": batch.page_indptr, "page_list": batch.page_list}


def _visible(batch: RaggedBatch, tokens: _Tokens, window: Visibility) -> tuple[jax.Array, jax.Array]:
    """First and one past the last key of each token."""
    assert isinstance(window, WindowClass)
    if window.causal and batch.page_size is None:  # every position has its key
        end = jnp.where(tokens.real, tokens.positions + 1, 0)
    else:
        lens = batch.kv_lens if batch.page_size is None else _room(batch)
        end = jnp.where(tokens.real, lens[tokens.row], 0)
        end = jnp.minimum(tokens.positions + 1, end) if window.causal else end
    if window.sliding_window is None:
        return jnp.zeros_like(end), end
    return jnp.maximum(end - window.sliding_window, 0), end


def _most_tiles(tokens: int, rows: int, block_q: int, min_q: int) -> int:
    """The most tiles that rows of at least `min_q` tokens are cut into: as many rows as there can be."""
    rows = min(rows, tokens // min_q)
    return rows + (tokens - rows * min_q) // (block_q + 1 - min_q)


def _tiles_of_single_tokens(
    batch: RaggedBatch, tokens: _Tokens, start: jax.Array, end: jax.Array, block_q: int
) -> Arrays:
    """Where every sequence has one token or none: a tile per token, then tiles of padding."""
    T, R, num_tokens = batch.bucket.tokens, batch.bucket.seqs, batch.cu_q_lens[-1]
    W = _most_tiles(T, R + 1, block_q, 1)
    found = {"kv_start": start[:W], "kv_end": end[:W], "num_attending": num_tokens}
    if block_q == 1:
        every = {"seq": tokens.seq, "q_start": _count(T), "q_len": jnp.ones(T, jnp.int32)}
        return {**every, **found, "num_live": jnp.asarray(T, jnp.int32)}
    tile = _count(W)
    q_start = jnp.where(tokens.real[:W], tile, num_tokens + (tile - num_tokens) * block_q)
    live = q_start < T
    return {
        "seq": jnp.where(live, tokens.seq[:W], 0),
        "q_start": jnp.where(live, q_start, 0),
        "q_len": jnp.where(tokens.real[:W], 1, jnp.clip(T - q_start, 0, block_q)),
        "num_live": num_tokens + (T - num_tokens + block_q - 1) // block_q,
        **found,
    }


def _tiles_of_rows(
    batch: RaggedBatch, start: jax.Array, end: jax.Array, block_q: int, min_q: int, max_q: int | None
) -> Arrays:
    """Tiles of the rows with `min_q` to `max_q` tokens; the padding tokens are a row too.

    A row of at most `max_q` tokens is at most one tile.
    """
    T, R = batch.bucket.tokens, batch.bucket.seqs
    W = min(T, R + 1) if max_q is not None else _most_tiles(T, R + 1, block_q, min_q)
    row_ends = jnp.append(batch.cu_q_lens[1:], T)
    lens = row_ends - batch.cu_q_lens
    counts = (lens + block_q - 1) // block_q
    if max_q is not None:
        counts = jnp.where(lens <= max_q, counts, 0)
    elif min_q > 1:
        counts = jnp.where(lens <= min_q - 1, 0, counts)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    tile = _count(W)
    live = tile < ends[-1]
    seq = jnp.where(live, _segments(ends, W), 0)
    # A row's first token and first tile, folded into one distance per row.
    q_start = jnp.where(live, tile * block_q + (batch.cu_q_lens - (ends - counts) * block_q)[seq], 0)
    if block_q == 1:
        q_len, last = live.astype(jnp.int32), q_start
    else:
        q_len = jnp.where(live, jnp.minimum(block_q, row_ends[seq] - q_start), 0)
        last = jnp.maximum(q_start + q_len - 1, 0)
    return {
        "seq": seq,
        "q_start": q_start,
        "q_len": q_len,
        "kv_start": jnp.where(live, start[q_start], 0),
        "kv_end": jnp.where(live, end[last], 0),
        "num_attending": ends[-2],
        "num_live": ends[-1],
    }


def _tile_lists(
    batch: RaggedBatch, tokens: _Tokens, start: jax.Array, end: jax.Array, tiling: Tiling
) -> dict[str, Arrays]:
    """The tiles of short queries, and those of long ones where there are any."""
    short_q, long_q = tiling.short_q, tiling.long_q
    if batch.bucket.max_q_len == 1:
        return {"short": _tiles_of_single_tokens(batch, tokens, start, end, short_q)}
    if batch.bucket.max_q_len <= short_q or long_q <= short_q:
        return {"short": _tiles_of_rows(batch, start, end, short_q, 1, None)}
    return {
        "short": _tiles_of_rows(batch, start, end, short_q, 1, short_q),
        "long": _tiles_of_rows(batch, start, end, long_q, short_q + 1, None),
    }


def _keys(batch: RaggedBatch) -> int:
    """Keys of all sequences together, at most."""
    return batch.bucket.tokens if batch.page_size is None else batch.bucket.pages * batch.page_size


def _units(batch: RaggedBatch, tiles: Arrays, tiling: Tiling, window: Visibility) -> Arrays:
    """The keys of short tiles in pieces of `split_keys`, each a unit of its own."""
    size, W, tokens = tiling.split_keys, tiles["seq"].shape[0], tiling.short_q
    assert size is not None
    U = W + _keys(batch) // size
    if window.span is not None:
        U = min(U, W * ((window.span + tokens - 3) // size + 2))
    first = tiles["kv_start"] // size
    counts = jnp.maximum((tiles["kv_end"] + size - 1) // size - first, 1)
    ends = jnp.cumsum(jnp.where(tiles["q_len"] > 0, counts, 0), dtype=jnp.int32)
    indptr = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    unit, tile = _count(U), _segments(ends, U)
    live = unit < indptr[-1]
    owner = jnp.where(live, tile, 0)
    begin = (first[owner] + unit - indptr[owner]) * size
    return {
        "split.tile": tile,
        "split.kv_start": jnp.where(live, jnp.maximum(begin, tiles["kv_start"][owner]), 0),
        "split.kv_end": jnp.where(live, jnp.minimum(begin + size, tiles["kv_end"][owner]), 0),
        "split.indptr": indptr,
    }


def _order(tiles: Arrays) -> Arrays:
    """Tiles by descending number of keys."""
    keys = jnp.where(tiles["q_len"] > 0, tiles["kv_end"] - tiles["kv_start"], -1)
    return {"order": jnp.argsort(keys, descending=True, stable=True).astype(jnp.int32)}


def _tile_reader(
    batch: RaggedBatch,
    specs: Iterable[AttentionSpec],
    tiling: Callable[[AttentionSpec], Tiling],
) -> Arrays:
    tokens = _tokens(batch)
    # Keys that are not paged lie beside their queries.
    found = {"cu_kv_lens": batch.cu_q_lens} if batch.page_size is None else _pages(batch)
    for i, spec in enumerate(specs):
        start, end = _visible(batch, tokens, spec.window_class)
        found |= {f"kv_start/{i}": start, f"kv_end/{i}": end}
        for kind, tiles in _tile_lists(batch, tokens, start, end, tiling(spec)).items():
            one_tile_each = batch.bucket.max_q_len <= tiling(spec).short_q
            has_long = not one_tile_each and tiling(spec).long_q > tiling(spec).short_q
            if kind == "long" or not (one_tile_each or has_long):  # several tiles of one query
                tiles = tiles | (_order(tiles) if tiling(spec).longest_first else {})
            elif (split_keys := tiling(spec).split_keys) is not None and _keys(batch) > split_keys:
                tiles = tiles | _units(batch, tiles, tiling(spec), spec.window_class)
            found |= {f"{kind}.{name}/{i}": array for name, array in tiles.items()}
    return found


# A list of tiles is one field: its parts are prepared together, also the count that only one reader uses.
TILE = ("seq", "q_start", "q_len", "kv_start", "kv_end", "num_attending", "num_live")
KEYS = ("seq", "kv_start", "kv_end", "q_start", "q_end", "num_live")
SPLIT = ("tile", "kv_start", "kv_end", "indptr")


def reference_arrays(batch: RaggedBatch, specs: Iterable[AttentionSpec]) -> Arrays:
    """What `jaxattn.attention.reference` reads."""
    tokens = _tokens(batch)
    found = {"token_to_seq": tokens.seq}
    if batch.page_size is None:
        found["positions"] = tokens.positions
    else:
        found |= {"kv_lens": batch.kv_lens, **_pages(batch)}
    for i, spec in enumerate(specs):
        found[f"kv_start/{i}"], found[f"kv_end/{i}"] = _visible(batch, tokens, spec.window_class)
    return found


def xla_arrays(batch: RaggedBatch, specs: Iterable[AttentionSpec]) -> Arrays:
    """What `jaxattn.attention.xla` reads."""
    return _tile_reader(batch, specs, xla_tiling)


def triton_arrays(batch: RaggedBatch, specs: Iterable[AttentionSpec]) -> Arrays:
    """What `jaxattn.attention.triton` reads."""
    return _tile_reader(batch, specs, triton_tiling)


def mosaic_arrays(batch: RaggedBatch, specs: Iterable[AttentionSpec]) -> Arrays:
    """What `jaxattn.attention.mosaic` reads."""
    return _tile_reader(batch, specs, mosaic_tiling)


def triton_gradient_arrays(batch: RaggedBatch, specs: Iterable[AttentionSpec]) -> Arrays:
    """What `jaxattn.attention.triton_gradient` reads."""
    specs = tuple(specs)
    return _with_key_tiles(triton_arrays(batch, specs), batch, specs, KEY_BLOCK)


def mosaic_gradient_arrays(batch: RaggedBatch, specs: Iterable[AttentionSpec]) -> Arrays:
    """What `jaxattn.attention.mosaic_gradient` reads."""
    specs = tuple(specs)
    return _with_key_tiles(mosaic_arrays(batch, specs), batch, specs, MOSAIC_KEY_BLOCK)


def _with_key_tiles(
    found: Arrays, batch: RaggedBatch, specs: tuple[AttentionSpec, ...], block_k: int
) -> Arrays:
    """What is found, and tiles of `block_k` keys besides."""
    tokens = _tokens(batch)
    lens = batch.kv_lens if batch.page_size is None else _room(batch)
    W = _most_tiles(_keys(batch), batch.bucket.seqs, block_k, 1)
    ends = jnp.cumsum((lens + block_k - 1) // block_k, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    tile = _count(W)
    live = tile < ends[-1]
    seq = jnp.where(live, _segments(ends, W), 0)
    first = jnp.where(live, (tile - starts[seq]) * block_k, 0)
    end = jnp.where(live, jnp.minimum(first + block_k, lens[seq]), 0)
    own = starts.at[tokens.seq].get(mode="fill", fill_value=W)
    for i in range(len(specs)):
        begins = own + found[f"kv_start/{i}"] // block_k
        past = own + (found[f"kv_end/{i}"] + block_k - 1) // block_k
        tiles = {"seq": seq, "kv_start": first, "kv_end": end, "num_live": ends[-1]}
        tiles |= {"q_start": _segments(past, W), "q_end": _segments(begins, W)}
        found |= {f"keys.{name}/{i}": array for name, array in tiles.items()}
    return found


def write_cache_arrays(batch: RaggedBatch, specs: Iterable[AttentionSpec] = ()) -> Arrays:
    """What writing keys into their pages reads."""
    del specs
    tokens, page_size = _tokens(batch), batch.page_size
    assert page_size is not None
    entry = batch.page_indptr[tokens.row] + tokens.positions // page_size
    has_page = tokens.real & (entry < batch.page_indptr[tokens.row + 1])
    page = batch.page_list[jnp.where(has_page, entry, 0)]
    slot = page * page_size + tokens.positions % page_size
    return {"slot_mapping": jnp.where(has_page, slot, PAD_SLOT)}


def decoder_arrays(batch: RaggedBatch, specs: Iterable[AttentionSpec]) -> Arrays:
    """What the decoder reads besides: slots, the last token of each sequence, and rope tables."""
    starts, ends = batch.cu_q_lens[:-1], batch.cu_q_lens[1:]
    found = write_cache_arrays(batch) | {"logits_indices": jnp.where(ends > starts, ends - 1, 0)}
    positions = _tokens(batch).positions.astype(jnp.float32)[:, None]
    ropes = dict.fromkeys((spec.rope, spec.head_dim) for spec in specs if spec.rope is not None)
    for i, (rope, head_dim) in enumerate(ropes):
        assert rope.kind == "default"
        frequencies = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        angles = positions * frequencies[None, :]
        found |= {f"rope_tables.cos/{i}": jnp.cos(angles), f"rope_tables.sin/{i}": jnp.sin(angles)}
    return found


TILINGS = {
    "xla": xla_tiling,
    "triton": triton_tiling,
    "triton_gradient": triton_tiling,
    "mosaic": mosaic_tiling,
    "mosaic_gradient": mosaic_tiling,
}
KEY_BLOCKS = {"triton_gradient": KEY_BLOCK, "mosaic_gradient": MOSAIC_KEY_BLOCK}
SPECIALISED: dict[str, Callable[[RaggedBatch, Iterable[AttentionSpec]], Arrays]] = {
    "reference": reference_arrays,
    "xla": xla_arrays,
    "triton": triton_arrays,
    "triton_gradient": triton_gradient_arrays,
    "mosaic": mosaic_arrays,
    "mosaic_gradient": mosaic_gradient_arrays,
    "write_cache": write_cache_arrays,
    "decoder": decoder_arrays,
}


def read_by(consumer: str, metadata: AttentionMetadata, specs: Iterable[AttentionSpec]) -> Arrays:
    """The same arrays, of the same names, taken from the superset."""
    match consumer, metadata.page_size:
        case "write_cache", _:
            return {"slot_mapping": metadata.slot_mapping}
        case "decoder", _:
            tables = enumerate(metadata.rope_tables)
            found = {name: metadata[name] for name in ("slot_mapping", "logits_indices")}
            return found | {
                f"rope_tables.{name}/{i}": getattr(t, name) for i, t in tables for name in ("cos", "sin")
            }
        case "reference", None:
            names = ("token_to_seq", "positions")
        case "reference", _:
            names = ("token_to_seq", "kv_lens", "page_indptr", "page_list")
        case _, None:
            names = ("cu_kv_lens",)
        case _:
            names = ("page_indptr", "page_list")
    found = {name: metadata[name] for name in names}
    for i, spec in enumerate(specs):
        visible = metadata.visible_keys(spec.window_class)
        found |= {f"kv_start/{i}": visible.kv_start, f"kv_end/{i}": visible.kv_end}
        if consumer == "reference":
            continue
        tiling = TILINGS[consumer]
        for kind, tiles in zip(("short", "long"), visible.schedule(tiling(spec)).lists, strict=False):
            found |= {f"{kind}.{name}/{i}": getattr(tiles, name) for name in TILE}
            found |= {} if tiles.order is None else {f"{kind}.order/{i}": tiles.order}
            if tiles.split is not None:
                found |= {f"{kind}.split.{name}/{i}": getattr(tiles.split, name) for name in SPLIT}
        if consumer in KEY_BLOCKS:
            keys = visible.key_tiles_of(KEY_BLOCKS[consumer])
            found |= {f"keys.{name}/{i}": getattr(keys, name) for name in KEYS}
    return found


def without_repeats(arrays: Arrays) -> Arrays:
    """The arrays with those that belong to a tiling, and not to a window class, once."""

    def repeats(name: str) -> bool:
        array, _, window_class = name.partition("/")
        return window_class not in ("", "0") and array.split(".")[-1] not in ("kv_start", "kv_end", "order")

    return {name: array for name, array in arrays.items() if not repeats(name)}


def further_class_arrays(window: WindowClass, tokens: Arrays, lists: Iterable[Arrays]) -> list[jax.Array]:
    """What one more window class adds where others have been derived: its ranges, and those of its tiles.

    Args:
        window: The class.
        tokens: Of a causal class, `kv_end` of each token; of a two-sided one, its `row`, whether it is
            `real`, and the number of keys of each row, `kv_lens`.
        lists: Of each list of tiles, `q_start`, `last` and whether a tile is `live`.
    """
    if window.causal:
        end = tokens["kv_end"]
    else:
        end = jnp.where(tokens["real"], tokens["kv_lens"][tokens["row"]], 0)
    start = (
        jnp.zeros_like(end) if window.sliding_window is None else jnp.maximum(end - window.sliding_window, 0)
    )
    found = [start, end]
    for tiles in lists:
        found.append(jnp.where(tiles["live"], start[tiles["q_start"]], 0))
        found.append(jnp.where(tiles["live"], end[tiles["last"]], 0))
    return found
