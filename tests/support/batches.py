"""Random batches for property tests, and the small fixed sizes that every property is tested at.

All drawn batches fit a few buckets and use a few layers, so that each program is compiled once and an
example costs NumPy work and some calls of a millisecond. The sizes are small on purpose: tiles, pages
and blocks of keys begin and end everywhere in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.fuser  # else loaded by the first interpreted kernel, and all is compiled twice
import jax.numpy as jnp
import numpy as np
import pytest
from effort import EXAMPLES, PARTS, THOROUGH
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Problem, attend_dense
from tolerances import assert_as_good_as

from jaxattn import (
    AttentionSpec,
    Bucket,
    PagedKVCache,
    RaggedBatch,
    attention,
    nest_sequences,
    prepare_metadata,
    write_cache,
)
from jaxattn.attention import triton_gradient, xla, xla_gradient
from jaxattn.measuring.workloads import Workload
from jaxattn.metadata import CONSUMERS, Consumer
from jaxattn.metadata.consumers import KEY_BLOCK
from jaxattn.metadata.schedule import Tiling

PAGE_SIZE = 4
NUM_PAGES = 32
VOCAB_SIZE = 100
BUCKET = Bucket(tokens=24, seqs=4, pages=24)
UNPAGED = Bucket(tokens=24, seqs=4)
LARGER = Bucket(tokens=40, seqs=7, pages=48)
DECODE = BUCKET.decode()
SPECULATIVE = Bucket(tokens=12, seqs=4, pages=24, max_q_len=3)

IMPLEMENTATIONS = ("reference", "xla", "triton")
BIT_EXACT = ("xla", "triton")
"""Those whose tiles and blocks depend on a sequence's own length alone. The reference sums over one key
axis of all sequences, as long as the bucket: its last bits change with both."""

GQA = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=16)
MHA = dataclasses.replace(GQA, num_kv_heads=8)
MQA = dataclasses.replace(GQA, num_kv_heads=1)
SELF_ONLY = dataclasses.replace(GQA, sliding_window=1)
WINDOW = dataclasses.replace(GQA, sliding_window=7)
TWO_SIDED = dataclasses.replace(GQA, causal=False, logits_soft_cap=2.0)
SPECS = (GQA, MQA, SELF_ONLY, WINDOW, TWO_SIDED)

# To these layers, tiles and blocks are smaller than the batches.
SMALL_TILES = (MQA, WINDOW)
_SMALL_TILING = Tiling(short_q=1, long_q=4)
_SMALL_BLOCKS = {"BLOCKS_OF_KEYS": (8, 16), "xla_tiling": lambda spec: _SMALL_TILING}
_SMALL_XLA = dataclasses.replace(CONSUMERS["xla"], tiling=lambda spec: _SMALL_TILING)
_SMALL_KEY_BLOCK = 16
_SMALL_TRITON = dataclasses.replace(CONSUMERS["triton_gradient"], key_block=_SMALL_KEY_BLOCK)

INT32_MAX = int(np.iinfo(np.int32).max)
Rows = list[np.ndarray]
POISONS = (np.nan, np.inf, -np.inf, np.finfo(np.float32).max)


@dataclass(frozen=True)
class Case:
    """The lengths of a batch and the pages of its sequences, and a seed for all values.

    Attributes:
        q_lens: Query tokens per sequence.
        context_lens: Tokens cached before, per sequence.
        tables: Physical pages per sequence, reserved ones included.
        seed: Of queries, keys, values and orders.
    """

    q_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]
    seed: int = 0

    @property
    def num_seqs(self) -> int:
        return len(self.q_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.q_lens)

    @property
    def kv_lens(self) -> tuple[int, ...]:
        return tuple(q + c for q, c in zip(self.q_lens, self.context_lens, strict=True))

    @property
    def token_rows(self) -> list[slice]:
        """The query tokens of each sequence, on the packed axis."""
        ends = np.cumsum(self.q_lens)
        return [slice(int(end) - n, int(end)) for end, n in zip(ends, self.q_lens, strict=True)]

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def problem(self, spec: AttentionSpec) -> Problem:
        """Queries, keys and values of a layer."""
        return Problem.draw(Workload("drawn", self.q_lens, self.context_lens, ""), spec, self.seed)

    def take(self, rows: list[int]) -> Case:
        """Some of the sequences, in another order."""
        q_lens, contexts = (tuple(lens[i] for i in rows) for lens in (self.q_lens, self.context_lens))
        return Case(q_lens, contexts, tuple(self.tables[i] for i in rows), self.seed)

    def arguments(self) -> dict[str, Any]:
        """What `nest_sequences` takes, as flat arrays, all checks asked for."""
        rng = self.rng()
        return {
            "sequences": rng.integers(0, VOCAB_SIZE, self.num_tokens),
            "q_lens": np.array(self.q_lens),
            "context_lens": np.array(self.context_lens),
            "page_tables": np.array([page for table in self.tables for page in table]),
            "page_counts": np.array([len(table) for table in self.tables]),
            "page_size": PAGE_SIZE,
            "num_pages": NUM_PAGES,
            "vocab_size": VOCAB_SIZE,
            "is_decode": rng.random(self.num_seqs) < 0.5,
            "state_slots": rng.permutation(9)[: self.num_seqs],
        }

    def nest(self, bucket: Bucket = BUCKET) -> RaggedBatch:
        """The batch; unpaged in a bucket without pages."""
        arguments = self.arguments()
        if not bucket.pages:
            arguments |= dict.fromkeys(
                ("context_lens", "page_tables", "page_counts", "page_size", "num_pages")
            )
        return nest_sequences(**arguments, bucket=bucket, transfer=False)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    min_seqs: int = 1,
    max_q_len: int = 12,
    max_context: int = 20,
    room_for: int = 0,
    bucket: Bucket = BUCKET,
) -> Case:
    """Batches that fit a bucket, their pages in random physical order.

    Args:
        draw: Of hypothesis.
        min_seqs: Sequences, at least.
        max_q_len: Query tokens of a sequence, at most.
        max_context: Cached tokens of a sequence, at most.
        room_for: Further tokens that every sequence has pages for.
        bucket: What they must fit.
    """
    n = draw(st.integers(min_seqs, bucket.seqs))
    max_q_len, tokens, pages = min(max_q_len, bucket.max_q_len), bucket.tokens, bucket.pages
    q_lens, contexts, counts = [], [], []
    for rows_after in reversed(range(n)):
        least = _pages_for(1 + room_for)
        most_pages = pages - rows_after * least
        room = most_pages * PAGE_SIZE - room_for
        q_lens.append(draw(st.integers(1, min(max_q_len, tokens - rows_after, room))))
        contexts.append(draw(st.integers(0, min(max_context, room - q_lens[-1]))))
        needed = _pages_for(q_lens[-1] + contexts[-1] + room_for)
        counts.append(needed + draw(st.integers(0, min(1, most_pages - needed))))
        tokens, pages = tokens - q_lens[-1], pages - counts[-1]
    seed = draw(st.integers(0, 2**16))
    order = np.random.default_rng(seed).permutation(NUM_PAGES)[: sum(counts)]
    tables = np.split(order, np.cumsum(counts)[:-1])
    return Case(tuple(q_lens), tuple(contexts), tuple(tuple(map(int, table)) for table in tables), seed)


def prompts(**limits: Any) -> st.SearchStrategy[Case]:
    """Batches of sequences none of whose tokens is cached."""
    return cases(max_context=0, **limits)


def _pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def pack(rows: list[np.ndarray], length: int, fill: float) -> np.ndarray:
    """Rows on one axis of a fixed length, the rest filled."""
    flat = np.concatenate(rows)
    out = np.full((length, *flat.shape[1:]), fill, np.float32)
    out[: len(flat)] = flat
    return out


def lay_out(
    rows: list[np.ndarray], tables: tuple[tuple[int, ...], ...], fill: float, num_pages: int = NUM_PAGES
) -> np.ndarray:
    """Keys or values in pages, every slot that holds none filled."""
    pages = np.full((num_pages, PAGE_SIZE, *rows[0].shape[1:]), fill, np.float32)
    slots = pages.reshape(-1, *rows[0].shape[1:])
    for row, table in zip(rows, tables, strict=True):
        position = np.arange(len(row))
        slots[np.asarray(table)[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE] = row
    return pages


@contextlib.contextmanager
def tiles_for(implementation: str, spec: AttentionSpec) -> Iterator[tuple[str | Consumer, ...]]:
    """While a program is traced: the tiles that are tested, and who reads the metadata, gradients too."""
    small = spec in SMALL_TILES
    with pytest.MonkeyPatch.context() as patch:
        if small and implementation == "xla":
            for name, value in _SMALL_BLOCKS.items():
                patch.setattr(xla, name, value)
                patch.setattr(xla_gradient, name, value)
            yield (_SMALL_XLA,)
        elif implementation == "triton":
            patch.setattr(triton_gradient, "KEY_BLOCK", _SMALL_KEY_BLOCK if small else KEY_BLOCK)
            yield (_SMALL_TRITON if small else "triton_gradient",)
        else:
            yield (implementation,)


@functools.cache
def _program(implementation: str, spec: AttentionSpec) -> Callable[..., jax.Array]:
    def attend(batch: RaggedBatch, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with tiles_for(implementation, spec) as consumers:
            metadata = prepare_metadata(batch, spec, consumers=consumers)
            return attention(q, k, v, metadata, spec, implementation=implementation)

    return jax.jit(attend)


def attend(
    implementation: str, spec: AttentionSpec, batch: RaggedBatch, q: Any, k: Any, v: Any
) -> np.ndarray:
    """Attention of a batch, metadata and all, in one compiled program per layer and bucket."""
    return np.asarray(_program(implementation, spec)(batch, q, k, v))


def attend_case(
    implementation: str,
    spec: AttentionSpec,
    case: Case,
    problem: Problem,
    *,
    bucket: Bucket = BUCKET,
    fill: float = np.nan,
    num_pages: int = NUM_PAGES,
) -> np.ndarray:
    """The outputs of a case; padding tokens, unused pages and empty slots hold `fill`."""
    q = pack(problem.q, bucket.tokens, fill)
    if bucket.pages:
        k, v = (lay_out(rows, case.tables, fill, num_pages) for rows in (problem.k, problem.v))
    else:
        k, v = (pack(rows, bucket.tokens, fill) for rows in (problem.k, problem.v))
    return attend(implementation, spec, case.nest(bucket), q, k, v)


@jax.jit
def write(batch: RaggedBatch, cache: PagedKVCache, k: jax.Array, v: jax.Array) -> PagedKVCache:
    """Write a step's keys and values."""
    return write_cache(cache, k, v, prepare_metadata(batch, fields=("slot_mapping",)).slot_mapping)


def attend_plainly(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    """The oracle's attention of one sequence, but in float32: how far plain rounding may lead astray."""
    k, v = np.repeat(k, spec.group_size, axis=1), np.repeat(v, spec.group_size, axis=1)
    scores = np.einsum("qnh,knh->nqk", q, k) * np.float32(spec.softmax_scale)
    if spec.logits_soft_cap is not None:
        cap = np.float32(spec.logits_soft_cap)
        scores = cap * np.tanh(scores / cap)
    age = len(k) - len(q) + np.arange(len(q))[:, None] - np.arange(len(k))[None, :]
    hidden = (age < 0) if spec.causal else np.zeros_like(age, bool)
    if spec.sliding_window is not None:
        hidden |= age >= spec.sliding_window
    scores = np.where(hidden, np.float32(-np.inf), scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v)


def assert_right(got: np.ndarray, q: Rows, k: Rows, v: Rows, spec: AttentionSpec) -> None:
    """Assert that outputs, packed, are attention of each sequence, but for rounding."""
    sequences = list(zip(q, k, v, strict=True))
    plain, exact = (
        np.concatenate([attend(*qkv, spec) for qkv in sequences]) for attend in (attend_plainly, attend_dense)
    )
    assert_as_good_as(got, plain, exact, jnp.dtype("float32"))


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Assert equality of the bits: of the signs of zeros, too."""
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    )


def law(
    *, implementations: tuple[str, ...] = IMPLEMENTATIONS, **strategies: st.SearchStrategy
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a check of drawn values a test: of some examples, and of thousands where marked slow.

    A check that takes an `implementation` is tested with each. Regressions found once are kept as
    `hypothesis.example` between this decorator and the check.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        def test(max_examples: int, **implementation: str) -> None:
            settings(max_examples=max_examples)(given(**strategies)(check))(**implementation)

        takes = [p for p in inspect.signature(check).parameters.values() if p.name not in strategies]
        parameters = [inspect.Parameter("max_examples", inspect.Parameter.KEYWORD_ONLY), *takes]
        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        test.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        )
        sizes = [pytest.param(EXAMPLES, id=f"{EXAMPLES} examples")]
        for part in range(1, PARTS + 1):
            name = f"{THOROUGH} examples, part {part} of {PARTS}"
            sizes.append(pytest.param(THOROUGH // PARTS, id=name, marks=pytest.mark.slow))
        test = pytest.mark.parametrize("max_examples", sizes)(test)
        if takes:
            test = pytest.mark.parametrize("implementation", implementations)(test)
        return test

    return decorate


Arguments = dict[str, Any]


class Corruption(NamedTuple):
    """A way to spoil the arguments of `nest_sequences`.

    Attributes:
        spoil: Changes the arguments in place, at some entry and by some amount; returns the message due.
        on_device: Whether the packed batch still shows it, so that `check_batch` must see it.
    """

    spoil: Callable[[Arguments, int, int], str]
    on_device: bool


CORRUPTIONS: dict[str, Corruption] = {}


def _corruption(spoil: Callable[[Arguments, int, int], str]) -> Callable:
    CORRUPTIONS[spoil.__name__.strip("_")] = Corruption(spoil, on_device=False)
    return spoil


def _seen_on_device(spoil: Callable[[Arguments, int, int], str]) -> Callable:
    CORRUPTIONS[spoil.__name__.strip("_")] = Corruption(spoil, on_device=True)
    return spoil


def _row_of(counts: np.ndarray, entry: int) -> tuple[int, int]:
    """The row of an entry, and its place in it."""
    ends = np.cumsum(counts)
    row = int(np.searchsorted(ends, entry, side="right"))
    return row, int(entry - (ends[row] - counts[row]))


@_corruption
def _length_below_one(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["q_lens"])
    taken = a["q_lens"][i] - 1 + amount % 1000
    a["q_lens"][i] -= taken
    a["q_lens"][i - 1] += taken  # the sum stays right
    return rf"sequences\[{i}\] has length {a['q_lens'][i]};"


@_corruption
def _too_long(a: Arguments, i: int, amount: int) -> str:
    i, more = i % len(a["q_lens"]), BUCKET.tokens + amount % 1000
    a["sequences"] = np.concatenate([a["sequences"], np.zeros(more, int)])
    a["q_lens"][i] += more
    return rf"tokens={a['sequences'].size} exceeds bucket.tokens=24|page_tables\[\d\] holds"


@_corruption
def _too_many_sequences(a: Arguments, i: int, amount: int) -> str:
    more = BUCKET.seqs
    free = np.setdiff1d(np.arange(NUM_PAGES), a["page_tables"])[:more]
    added = {"sequences": 0, "q_lens": 1, "context_lens": 0, "page_counts": 1, "is_decode": False}
    for name, value in added.items():
        a[name] = np.concatenate([a[name], np.full(more, value)])
    a["page_tables"] = np.concatenate([a["page_tables"], free])
    a["state_slots"] = np.concatenate([a["state_slots"], 100 + np.arange(more)])
    return rf"seqs={len(a['q_lens'])} exceeds bucket.seqs=4"


@_seen_on_device
def _page_out_of_range(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["page_tables"])
    a["page_tables"][i] = NUM_PAGES - 1 + amount
    row, _ = _row_of(a["page_counts"], i)
    return rf"page_tables\[{row}\] names page {a['page_tables'][i]}, .*num_pages=32"


@_seen_on_device
def _page_negative(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["page_tables"])
    a["page_tables"][i] = -amount
    row, _ = _row_of(a["page_counts"], i)
    return rf"page_tables\[{row}\] names page -{amount}, .*num_pages=32"


@_seen_on_device
def _page_owned_twice(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["page_tables"])
    a["page_tables"][i] = a["page_tables"][i - 1]
    return rf"page {a['page_tables'][i]} is owned twice, by page_tables\[\d\] and page_tables\[\d\]"


@_seen_on_device
def _too_few_pages(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["q_lens"])
    a["context_lens"][i] = a["page_counts"][i] * PAGE_SIZE - a["q_lens"][i] + 1 + amount % 2**26
    needs = -(-(a["context_lens"][i] + a["q_lens"][i]) // PAGE_SIZE)
    return rf"page_tables\[{i}\] holds {a['page_counts'][i]} pages of 4 tokens.*needs {needs} pages"


@_seen_on_device
def _context_negative(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["q_lens"])
    a["context_lens"][i] = -amount
    return rf"context_lens\[{i}\]=-{amount} must not be negative"


@_seen_on_device
def _context_beyond_int32(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["q_lens"])
    a["context_lens"][i] = INT32_MAX - a["q_lens"][i] + amount
    return rf"context_lens\[{i}\]={a['context_lens'][i]} plus {a['q_lens'][i]} tokens exceeds int32"


@_seen_on_device
def _token_negative(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["sequences"])
    a["sequences"][i] = -amount
    return r"sequences\[{}\]\[{}\]=-{} is a token id outside".format(*_row_of(a["q_lens"], i), amount)


@_corruption  # the device is not told of the vocabulary
def _token_beyond_the_vocabulary(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["sequences"])
    a["sequences"][i] = VOCAB_SIZE - 1 + amount * 7
    row, place = _row_of(a["q_lens"], i)
    return rf"sequences\[{row}\]\[{place}\]={a['sequences'][i]} is a token id outside.*vocab_size=100"


@_seen_on_device
def _state_slot_twice(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["state_slots"])
    a["state_slots"][i] = a["state_slots"][i - 1]
    return f"state_slots names slot {a['state_slots'][i]} twice"


@_seen_on_device
def _state_slot_negative(a: Arguments, i: int, amount: int) -> str:
    i %= len(a["state_slots"])
    a["state_slots"][i] = -amount
    return rf"state_slots\[{i}\]=-{amount} must lie between"


@_corruption
def _counts_that_do_not_add_up(a: Arguments, i: int, amount: int) -> str:
    name, flat = (("q_lens", "sequences"), ("page_counts", "page_tables"))[i % 2]
    a[name][0] += amount
    return f"{name} sum to {a[name].sum()}, but {flat} holds {len(a[flat])} entries"


@_corruption
def _an_entry_too_many(a: Arguments, i: int, amount: int) -> str:
    name, n = ("context_lens", "state_slots")[i % 2], len(a["q_lens"])
    a[name] = np.append(a[name], amount)
    return f"{name} has {n + 1} entries for {n} sequences"


@_corruption
def _no_integers(a: Arguments, i: int, amount: int) -> str:
    name = ("sequences", "q_lens", "context_lens", "page_tables", "page_counts", "state_slots")[i % 6]
    a[name] = a[name] + amount / 7
    return f"{name} has dtype float64; expected integers"


@_corruption
def _phases_that_are_numbers(a: Arguments, i: int, amount: int) -> str:
    a["is_decode"] = a["is_decode"].astype(int)
    return "is_decode has dtype int64; expected one bool per sequence"
