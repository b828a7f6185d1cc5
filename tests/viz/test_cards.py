"""What notebooks show of objects: right numbers, bounded, escaped, never an error, legible everywhere."""

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxattn import AttentionSpec, Bucket, BucketGrid, PagePool, init_cache, nest_sequences, prepare_metadata
from jaxattn.batch import BucketPlan, abstract_batch
from jaxattn.measuring.workloads import ODD, nest_workload
from jaxattn.viz.html import MAX_ROWS, Part, card, details, grid, meter, note, strip, table

HEADS: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
SPEC = AttentionSpec(**HEADS, sliding_window=9)
PAGED: dict[str, Any] = {"page_tables": [[4, 1], [0], [2]], "page_size": 4, "num_pages": 8}
VOID = {"rect", "br", "hr"}


class Reader(HTMLParser):
    """Reads HTML, and fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.shapes = 0

    def handle_starttag(self, tag, attrs):
        self.shapes += tag == "rect"
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.shapes += tag == "rect"

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & {*self.open} and "svg" not in self.open:
            self.rows[-1][-1] += data


def read(text: str) -> Reader:
    """What is read there; nothing is left open, and no colour is that of a theme."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    colors = set(re.findall(r"(?:fill|color|stroke|background)[=:]\"?([^;\"]+)", text))
    assert colors <= {"inherit", "transparent", "none"} | set(re.findall(r"#[0-9a-f]{6}", text))
    for color in re.findall(r"#([0-9a-f]{6})", text):
        light = [int(color[i : i + 2], 16) for i in (0, 2, 4)]
        assert 50 < sum(light) / 3 < 210, f"#{color} vanishes on white or on black"
    return reader


def shown(thing: Any) -> str:
    return " ".join(" ".join(read(thing._repr_html_()).text).split())


def rows_of(thing: Any) -> dict[str, list[str]]:
    """The tables of a card: of each row its first cell, and the others that say something."""
    return {row[0]: [cell for cell in row[1:] if cell] for row in read(thing._repr_html_()).rows}


def numbers_in(cell: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"[0-9][0-9,]*\.?[0-9]*", cell)]


@pytest.fixture(scope="module")
def batch():
    return nest_sequences([[5, 3, 9], [7], [1, 2]], context_lens=[4, 0, 0], bucket=Bucket(16, 4, 8), **PAGED)


def test_a_batch_shows_what_is_used_of_its_bucket(batch):
    rows = rows_of(batch)
    assert [numbers_in(*rows[name]) for name in ("tokens", "sequences", "pages")] == [
        [6, 16, 38, 62],  # of so many, in per cent, and in per cent of padding
        [3, 4, 75],
        [4, 8, 50, 10, 16],  # keys, and slots of the pages
    ]
    # Query tokens, cached before, keys, pages, phase of each sequence.
    assert rows["sequence"] == ["query tokens", "cached before", "keys", "pages", "phase"]
    assert rows["0"] == ["3", "4", "7", "2", "prefill"]
    assert rows["1"] == ["1", "0", "1", "1", "prefill"]


def test_a_batch_is_a_strip_of_its_sequences_and_of_padding(batch):
    strip_of_tokens = batch._repr_html_().split("</svg>")[0]
    assert read(strip_of_tokens + "</svg></div>").shapes == 3 + 1
    widths = [float(w) for w in re.findall(r' width="([0-9.]+)"', strip_of_tokens)]
    np.testing.assert_allclose(widths, (3, 1, 2, 10))


def test_a_batch_on_the_host_says_so(batch):
    on_host = dataclasses.replace(batch, packed=np.asarray(batch.packed))
    assert "on the host" in shown(on_host)
    assert "on the device" in shown(batch)
    assert rows_of(on_host) == rows_of(batch)


def test_a_batch_without_values_says_why(batch):
    assert "a shape without values" in shown(abstract_batch(Bucket(16, 4)))
    texts = []
    jax.make_jaxpr(lambda b: (texts.append(shown(b)), b.packed)[1])(batch)
    jax.vmap(lambda p: (texts.append(shown(dataclasses.replace(batch, packed=p))), p)[1])(batch.packed[None])
    assert all("traced" in text for text in texts)
    assert len(texts) == 2
    assert "(2,) batches" in shown(jax.tree.map(lambda x: jnp.stack([x, x]), batch))
    assert "NoneType, not an array" in shown(jax.tree.map(lambda _: None, batch))
    given_away = dataclasses.replace(batch, packed=jnp.array(batch.packed))
    given_away.packed.delete()
    assert "donated" in shown(given_away)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=8), st.sampled_from([0, 1]))
def test_a_batch_of_garbage_is_shown_all_the_same(numbers, missing):
    """Memory that nobody has written yet, or a tree that somebody mapped over."""
    batch = abstract_batch(Bucket(16, 4, 8), page_size=4)
    values = np.resize(np.array(numbers, np.int32), batch.packed.size - missing)
    text = shown(dataclasses.replace(batch, packed=values))
    assert ("not the buffer of a batch" in text) == bool(missing)
    assert "not the buffer" in shown(dataclasses.replace(batch, packed=values.astype(np.float32)))


@pytest.mark.smoke
def test_metadata_show_each_prepared_field_and_no_other(batch):
    rows = rows_of(prepare_metadata(batch, SPEC, fields=["positions", "num_seqs", "num_tokens"]))
    assert set(rows) == {"tokens", "sequences", "field", "positions", "num_seqs", "num_tokens"}
    shape, values, meaning = rows["positions"]
    assert shape == "int32[16]"
    assert numbers_in(values) == [4, 5, 6, 0, 0, 1, 0, 0, 16]  # the first eight, of so many
    assert meaning.startswith("Position of each token")


def test_metadata_show_fields_of_the_callers_own(batch):
    metadata = prepare_metadata(batch, SPEC, fields=["q_lens"], derive={"<b>": lambda m: 2 * m.q_lens})
    assert rows_of(metadata)["<b>"][:2] == ["int32[4]", "6, 2, 4, 0"]


def test_tiles_are_counted_by_class_and_tiling():
    batch = nest_workload(ODD[0], bucket=Bucket(160, 8))  # 1, 63, 65, 17 and 2 tokens
    metadata = prepare_metadata(batch, SPEC, consumers="xla")
    rows = rows_of(metadata.visible[0])
    seen = sum(min(i + 1, 9) for n in ODD[0].q_lens for i in range(n))
    assert f"{seen:,} pairs of a token and a key" in shown(metadata.visible[0])
    # Of tiles of 64 there is one for each sequence longer than a token, and one more for the 65th.
    assert numbers_in(*rows["tiles of long queries"])[0] == 5
    assert numbers_in(*rows["tiles of short queries"])[:2] == [1, 9]
    covered = sum(
        min(64, n - i) * (n if n < 65 else (64 if i == 0 else 9))
        for n in ODD[0].q_lens
        for i in range(0, n, 64)
    )
    assert numbers_in(*rows["seen within tiles"])[:2] == [seen, covered]


def test_units_are_counted_where_keys_are_split():
    batch = nest_sequences(
        [[1], [2]],
        context_lens=[1199, 29],
        page_tables=[range(75), [75, 76]],
        page_size=16,
        bucket=Bucket(2, 2, 96, max_q_len=1),
    )
    metadata = prepare_metadata(batch, AttentionSpec(**HEADS), consumers="triton")
    (schedule,) = metadata.visible[0].schedules
    (counted,) = rows_of(schedule)["tiles of short queries"]
    assert numbers_in(counted)[0] == 2
    assert "4 units" in counted  # 512 + 512 + 176 keys, and 30


def test_schedules_without_values_show_shapes(batch):
    texts = []

    def prepare(batch):
        metadata = prepare_metadata(batch, SPEC)
        texts.extend(shown(x) for x in (metadata, metadata.visible[0], metadata.visible[0].schedules[0]))
        texts.extend(shown(x) for x in (metadata.visible[0].schedules[0].short, metadata.cascade))
        texts.extend(shown(x) for x in metadata.visible[0].key_tiles)
        return metadata

    shapes = jax.eval_shape(prepare, batch)
    assert all("traced" in text for text in texts)
    assert "a shape without values" in shown(shapes)


@pytest.mark.smoke
def test_a_cache_shows_its_size_and_never_its_contents():
    cache = init_cache(num_pages=24, page_size=16, num_kv_heads=2, head_dim=64, dtype="bfloat16")
    assert "24 pages of 16 tokens, bfloat16" in shown(cache)
    rows = rows_of(cache)
    assert numbers_in(*rows["room"]) == [384]
    assert numbers_in(*rows["memory"]) == [pytest.approx(2 * 24 * 16 * 2 * 64 * 2 / 2**20, abs=0.05), 8192]
    scaled = {"k_scale": 0.5, "v_scale": np.array([0.25, 1.0])}
    rows = rows_of(init_cache(num_pages=2, page_size=4, num_kv_heads=2, head_dim=8, dtype="int8", **scaled))
    assert (rows["scales of keys"], rows["scales of values"]) == (["0.5, 0.5"], ["0.25, 1"])
    assert "bfloat16" in shown(jax.eval_shape(lambda: cache))


def test_a_pool_shows_pages_in_use_and_shared():
    pool = PagePool(num_pages=10, page_size=4)
    pages = pool.allocate(14)
    pool.share(pages[:1])
    rows = rows_of(pool)
    assert numbers_in(*rows["in use"]) == [4, 10, 40, 6]
    assert numbers_in(*rows["shared"])[:2] == [1, 10]
    assert "page 0: shared by 2 page 1: held once" in shown(pool)
    cells = re.findall(r'<rect[^>]* fill="(#[0-9a-f]{6})"[^>]*><title>page', pool._repr_html_())
    assert len(cells) == 10
    assert len(set(cells)) == 3  # shared, held once, free


def test_buckets_show_their_sizes():
    assert "8 tokens, 8 sequences, decode" in shown(Bucket(8, 8, max_q_len=1))
    assert rows_of(Bucket(2048, 8, 99))["page list, P"] == ["99"]
    rows = rows_of(BucketGrid(tokens=(16, 24, 32), pages=(4,), max_seqs=9))
    assert rows["tokens"] == ["16, 24, 32"]
    assert numbers_in(*rows["sequences"]) == [9]
    assert numbers_in(*rows["padding of tokens"]) == [29]  # per cent: 17 tokens in 24


def test_output_is_bounded():
    n = 50_000
    batch = nest_sequences(np.zeros(n, int), q_lens=np.ones(n, int), bucket=Bucket(n, n))
    text = shown(batch)
    assert f"and {n - MAX_ROWS:,} more" in text
    assert len(batch._repr_html_()) < 10_000
    assert len(PagePool(100_000, 16)._repr_html_()) < 10_000
    assert len(BucketGrid(tokens=tuple(range(1, 20_000)))._repr_html_()) < 10_000
    assert len(prepare_metadata(batch, SPEC, consumers="xla")._repr_html_()) < 60_000


@given(st.text(), st.integers(0, 10), st.integers(0, 10))
def test_text_is_escaped(text, value, limit):
    rows = [meter(text, value, limit, text), (text, text)]
    parts = [Part(text, None)]
    pieces = [table(rows, [text]), strip(parts, text), grid(parts, text), note(text), details(text)]
    read_text = "".join(read(card(text, text, *pieces)).text).replace("\r", "")
    assert not text or read_text.count(text.replace("\r", "")) >= 11  # each time it was given


def test_a_plan_shows_its_buckets_in_order_and_how_many_more():
    buckets = tuple(Bucket(n, min(n, 4), 16, max_q_len=1 if n == 1 else n) for n in range(1, 13))
    plan = BucketPlan(buckets)
    assert "12 buckets" in shown(plan)
    assert list(rows_of(plan)) == ["tokens", *"12345678"]
    assert rows_of(plan)["1"] == ["1", "16", "decode"]
    assert "and 4 more" in shown(plan)
