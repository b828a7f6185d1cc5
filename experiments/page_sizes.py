"""What does the size of a page cost: slots that stay empty, a longer list of pages, time?

The same sequences over the same cached keys, in pages of 1 to 256 tokens. Small pages leave few slots empty
at the end of a sequence; each page is an entry of the list that is checked on the host, transferred with
every batch and looked up by attention.

Three phases: decode steps, chunks of 64 tokens over cached keys, and prefills of whole prompts; lengths of
two laws, even and log-normal. What is compared, with pages of 16, the default, as the baseline: that
attention returns the same bits; the share of slots that stay empty; entries of the list, and bytes of the
batch in its bucket; the processor time of `nest_sequences` from arrays, with all checks; and that of
attention by `xla`, both in turns.

Not compared: kernels on a GPU, which copy page by page, and for which small pages may cost more; and what
pages of several sequences share, of which large ones share less.

    python experiments/page_sizes.py
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import COLORS, MARKERS, draw
from rich.progress import track
from side_by_side import Rounds, measure, milliseconds, rounds_of, times_as_long

from jaxattn import AttentionSpec, RaggedBatch, attention, nest_sequences, prepare_metadata

BASELINE = 16
CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Config:
    """The layer, the batches and the pages."""

    num_q_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 2
    """Key heads."""
    head_dim: int = 64
    """Size of a head."""
    page_sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Tokens per page; 16 is among them."""
    phases: tuple[str, ...] = ("decode", "chunk", "prefill")
    """Of these."""
    laws: tuple[str, ...] = ("even", "log-normal")
    """Of these."""
    longest: int = 1024
    """Keys of a sequence, at most."""
    decode_seqs: int = 64
    """Sequences of a decode step."""
    chunk_seqs: int = 16
    """Sequences of a step of chunks."""
    prefill_seqs: int = 8
    """Prompts of a prefill."""
    rounds: int = 4
    """Rounds of timing."""

    @property
    def seqs(self) -> dict[str, int]:
        """Sequences by phase."""
        return {"decode": self.decode_seqs, "chunk": self.chunk_seqs, "prefill": self.prefill_seqs}

    @property
    def spec(self) -> AttentionSpec:
        """The layer."""
        return AttentionSpec(
            num_q_heads=self.num_q_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
        )


@dataclass(frozen=True)
class Lens:
    """The lengths of a batch.

    Attributes:
        query: Query tokens per sequence.
        keys: Keys per sequence, with those of the query tokens.
    """

    query: np.ndarray
    keys: np.ndarray

    @classmethod
    def of(cls, phase: str, law: str, config: Config) -> Lens:
        """Lengths drawn by a law."""
        rng, n = np.random.default_rng(0), config.seqs[phase]
        if law == "even":
            keys = rng.integers(1, config.longest + 1, n)
        else:
            keys = np.clip(rng.lognormal(np.log(config.longest / 8), 1.0, n).astype(int), 1, config.longest)
        most = {"decode": 1, "chunk": CHUNK, "prefill": config.longest}[phase]
        return cls(np.minimum(keys, most), keys)


@dataclass(frozen=True)
class Paged:
    """A batch in pages of one size, with queries and cached keys.

    Attributes:
        nest: Makes the batch on the host and transfers it.
        batch: It.
        used: The keys' share of the slots of all pages.
        num_pages: Pages that all sequences have.
        attend: Attention by an implementation, with metadata prepared before.
    """

    nest: Callable[[], RaggedBatch]
    batch: RaggedBatch
    used: float
    num_pages: int
    attend: Callable[[str], Callable[[], jax.Array]]

    @classmethod
    def of(cls, lens: Lens, page_size: int, config: Config) -> Paged:
        """The same keys whatever the page size, in pages in random physical order."""
        counts = -(-lens.keys // page_size)
        order = np.random.default_rng(1).permutation(counts.sum())
        nest = functools.partial(
            nest_sequences,
            np.zeros(lens.query.sum(), np.int32),
            q_lens=lens.query,
            context_lens=lens.keys - lens.query,
            page_tables=order,
            page_counts=counts,
            page_size=page_size,
            num_pages=int(counts.sum()),
        )
        batch, rng = nest(), np.random.default_rng(2)
        k, v = (_in_pages(rng, lens.keys, order, counts, page_size, config) for _ in range(2))
        q = rng.standard_normal((int(lens.query.sum()), config.num_q_heads, config.head_dim))
        padded = np.zeros((batch.bucket.tokens, *q.shape[1:]), np.float32)
        padded[: len(q)] = q
        q = jnp.asarray(padded)
        metadata = prepare_metadata(batch, config.spec, consumers=("xla", "reference"))

        def attend(implementation: str) -> Callable[[], jax.Array]:
            return lambda: _attend(q, k, v, metadata, config.spec, implementation=implementation)

        used = lens.keys.sum() / (counts.sum() * page_size)
        return cls(nest, batch, float(used), int(counts.sum()), attend)


_attend = jax.jit(attention, static_argnames=("spec", "implementation"))


def _in_pages(
    rng: np.random.Generator,
    key_lens: np.ndarray,
    order: np.ndarray,
    counts: np.ndarray,
    page_size: int,
    config: Config,
) -> jax.Array:
    """Random keys `[pages, page_size, K, H]`; slots that no key fills hold NaN."""
    pages = np.full((order.size, page_size, config.num_kv_heads, config.head_dim), np.nan, np.float32)
    for length, tables in zip(key_lens, np.split(order, np.cumsum(counts)[:-1]), strict=True):
        keys = rng.standard_normal((length, *pages.shape[2:]))
        position = np.arange(length)
        pages[tables[position // page_size], position % page_size] = keys
    return jnp.asarray(pages)


def rows(config: Config) -> Iterator[Row]:
    """A row per phase and law, with the figures of each page size."""
    for phase, law in track(list(itertools.product(config.phases, config.laws)), description="batches"):
        lens = Lens.of(phase, law, config)
        found = {size: Paged.of(lens, size, config) for size in config.page_sizes}
        attends = {size: paged.attend("xla") for size, paged in found.items()}
        expected = attends[BASELINE]()
        np.testing.assert_allclose(expected, found[BASELINE].attend("reference")(), atol=2e-5)
        for attend in attends.values():
            np.testing.assert_array_equal(attend(), expected)
        timings = {
            what: measure(
                {f"{size}": functools.partial(_ready, call) for size, call in calls.items()},
                inputs=1,
                repeats=repeats,
                rounds=config.rounds,
            )
            for what, calls, repeats in (
                ("nest", {size: paged.nest for size, paged in found.items()}, 40),
                ("attention", attends, 6),
            )
        }
        yield {
            "phase": phase,
            "law": law,
            "sequences": lens.keys.size,
            "keys": int(lens.keys.sum()),
            "empty": {size: 1 - paged.used for size, paged in found.items()},
            "pages": {size: paged.num_pages for size, paged in found.items()},
            "bytes": {size: paged.batch.packed.nbytes for size, paged in found.items()},
            "nest": rounds_of(timings["nest"]),
            "attention": rounds_of(timings["attention"]),
        }


def _ready(call: Callable[[], object], _: int) -> None:
    jax.block_until_ready(call())


def _ratio(rounds: Rounds, size: str) -> str:
    return "1" if size == f"{BASELINE}" else times_as_long(rounds, size, f"{BASELINE}").text()


def tables(rows: list[Row]) -> dict[str, Table]:
    """Memory, and time, by page size."""
    lines = [(row, size) for row in rows for size in row["empty"]]

    def of(row: Row, size: str) -> list[str]:
        return [f"{row['phase']}, {row['law']}", f"{size}"]

    return {
        "memory": Table(
            ["batch", "page size", "empty slots", "pages", "batch, bytes"],
            [
                [
                    *of(row, size),
                    f"{row['empty'][size]:.1%}",
                    f"{row['pages'][size]:,}",
                    f"{row['bytes'][size]:,}",
                ]
                for row, size in lines
            ],
        ),
        "time": Table(
            [
                "batch",
                "page size",
                "nest, processor µs",
                "nest ÷ 16",
                "attention, processor ms",
                "attention ÷ 16",
            ],
            [
                [
                    *of(row, size),
                    f"{1e3 * milliseconds(row['nest']['processor_us'], size):.0f}",
                    _ratio(row["nest"]["processor_us"], size),
                    f"{milliseconds(row['attention']['processor_us'], size):.1f}",
                    _ratio(row["attention"]["processor_us"], size),
                ]
                for row, size in lines
            ],
        ),
    }


def plot(rows: list[Row]) -> Figure:
    """Empty slots, bytes, and times, against the page size."""
    figure = Figure(figsize=(12, 8), layout="constrained", facecolor="white")
    empty, size_of, nest, attend = figure.subplots(2, 2).flat
    sizes = [int(size) for size in rows[0]["empty"]]
    for number, row in enumerate(rows):
        style = {"color": COLORS[number], "marker": MARKERS[number], "markersize": 5}
        label = f"{row['phase']}, {row['law']}"
        empty.plot(sizes, [100 * share for share in row["empty"].values()], label=label, **style)
        size_of.plot(sizes, [count / 1024 for count in row["bytes"].values()], **style)
        for axes, what in ((nest, "nest"), (attend, "attention")):
            ratios = [times_as_long(row[what]["processor_us"], f"{size}", f"{BASELINE}") for size in sizes]
            draw(axes, sizes, ratios, number, label)
    empty.set(ylabel="empty slots, % of all", title="What does the size of a page cost?\nempty slots")
    size_of.set(ylabel="KiB of a batch", yscale="log", title="what is transferred, in its bucket")
    nest.set(ylabel="processor time ÷ pages of 16", title="nesting, in turns: median and range")
    attend.set(
        ylabel="processor time ÷ pages of 16", title="attention, xla on a CPU, in turns", ylim=(0, None)
    )
    for axes in (empty, size_of, nest, attend):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size}" for size in sizes])
        axes.set(xlabel="tokens per page")
        axes.grid(alpha=0.3)
    for axes in (nest, attend):
        axes.axhline(1, color="black", linewidth=0.8)
    empty.legend(frameon=False)
    return figure


EXPERIMENT = Experiment(
    question="What does the size of a page cost: slots that stay empty, a longer list of pages, time?",
    committed=Config(),
    small=Config(
        page_sizes=(4, 16),
        phases=("decode", "chunk"),
        laws=("even",),
        longest=128,
        decode_seqs=4,
        chunk_seqs=2,
        prefill_seqs=2,
        head_dim=16,
        rounds=2,
    ),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
