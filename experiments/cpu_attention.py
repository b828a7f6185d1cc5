"""How fast is `xla` on a CPU, against attention over a padded batch?

What does walking over tiles save where sequences differ in length? Every workload of
`jaxattn.measuring.workloads.SERVING` runs in turns on

- `padded`: gather the pages of every sequence to the longest length, pad the queries likewise, and attend
  densely, as `jax.nn` users do;
- `xla` and `triton` (interpreted here), from the same metadata.

All give the same outputs, which is checked first. Metadata and padded tables are made before, and not timed.
Compared is the processor time of all threads: elapsed time is distorted on a busy machine, where dense
products wait longest for cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import COLORS, white_figure
from rich.progress import track
from side_by_side import Call, measure, ratios_by_round, with_range

from jaxattn import AttentionSpec, attention, prepare_metadata
from jaxattn.measuring.workloads import SERVING, Workload, nest_workload, random_page_tables

SPEC = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64)
PAGE_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which workloads, and how often."""

    workloads: tuple[str, ...] = tuple(workload.name for workload in SERVING)
    """Names in `jaxattn.measuring.workloads.SERVING`."""
    rounds: int = 5
    """Rounds of timing; the candidates take turns."""
    repeats: int = 3
    """Calls of a candidate per round, fewer where they take long."""


def padded_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    rows: jax.Array,
    tables: jax.Array,
    kv_lens: jax.Array,
) -> jax.Array:
    """Dense causal attention of right-aligned queries over gathered, padded keys.

    Args:
        q: `[T, N, H]` Packed queries.
        k_pages: `[pages, page_size, K, H]` Keys.
        v_pages: `[pages, page_size, K, H]` Values.
        rows: `[B, Q]` Packed row of each padded query; T for none. A sequence's last query is last.
        tables: `[B, M]` Page table, padded with page 0.
        kv_lens: `[B]` Keys of each sequence.

    Returns:
        `[B, Q, N, H]` Outputs; those of padding are meaningless.
    """
    (B, Q), (_, N, H), K = rows.shape, q.shape, SPEC.num_kv_heads
    keys, values = (pages[tables].reshape(B, -1, K, H) for pages in (k_pages, v_pages))
    padded = q.at[rows].get(mode="fill", fill_value=0).reshape(B, Q, K, N // K, H)
    scores = jnp.einsum("bqkgh,bskh->bkgqs", padded, keys) * SPEC.softmax_scale
    position = kv_lens[:, None] - Q + jnp.arange(Q)[None, :]
    sees = jnp.arange(keys.shape[1])[None, None, :] <= position[:, :, None]
    weights = jax.nn.softmax(jnp.where(sees[:, None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bkgqs,bskh->bqkgh", weights, values).reshape(B, Q, N, H)


def candidates(workload: Workload) -> dict[str, Call]:
    """A call per candidate, all on the same keys; their results agree."""
    rng = np.random.default_rng(0)
    tables, num_pages = random_page_tables(workload, PAGE_SIZE, rng)
    batch = nest_workload(workload, page_tables=tables, page_size=PAGE_SIZE)
    metadata = prepare_metadata(batch, SPEC)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q = normal(batch.bucket.tokens, SPEC.num_q_heads, SPEC.head_dim)
    k, v = (normal(num_pages, PAGE_SIZE, SPEC.num_kv_heads, SPEC.head_dim) for _ in range(2))
    table = np.zeros((len(tables), max(map(len, tables))), np.int32)
    rows = np.full((len(tables), max(workload.q_lens)), batch.bucket.tokens, np.int32)
    ends = np.cumsum(workload.q_lens)
    for i, (pages, end, n) in enumerate(zip(tables, ends, workload.q_lens, strict=True)):
        table[i, : len(pages)] = pages
        rows[i, -n:] = np.arange(end - n, end)
    dense_args = (jnp.asarray(rows), jnp.asarray(table), jnp.asarray(workload.kv_lens, jnp.int32))
    dense = jax.jit(padded_attention)

    def ours(implementation: str) -> Call:
        run = jax.jit(lambda q, k, v, m: attention(q, k, v, m, SPEC, implementation=implementation))
        return lambda _: jax.block_until_ready(run(q, k, v, metadata))

    calls: dict[str, Call] = {
        "padded": lambda _: jax.block_until_ready(dense(q, k, v, *dense_args)),
        "xla": ours("xla"),
        "triton": ours("triton"),
    }
    expected = np.asarray(calls["padded"](0))[rows < batch.bucket.tokens]
    for name in ("xla", "triton"):
        np.testing.assert_allclose(calls[name](0)[: ends[-1]], expected, atol=2e-5, err_msg=name)
    return calls


def rows(config: Config) -> Iterator[Row]:
    """A row per workload."""
    chosen = [workload for workload in SERVING if workload.name in config.workloads]
    for workload in track(chosen, "workloads"):
        timings = measure(candidates(workload), inputs=1, repeats=config.repeats, rounds=config.rounds)
        yield {
            "workload": workload.name,
            "timings": {name: timing._asdict() for name, timing in timings.items()},
        }


def tables(rows: list[Row]) -> dict[str, Table]:
    """A line per workload."""
    header = (
        "workload",
        "padded, ms",
        "`xla`, ms",
        "padded ÷ `xla` (range)",
        "interpreted kernel ÷ `xla`",
        "elapsed, padded ÷ `xla`",
    )
    lines = []
    for row in rows:
        timings = row["timings"]
        milliseconds = (statistics.median(timings[name]["processor_us"]) / 1e3 for name in ("padded", "xla"))
        ratios = (ratios_by_round(timings, name, "xla", of="processor_us") for name in ("padded", "triton"))
        lines.append(
            [
                row["workload"],
                *(f"{ms:.1f}" for ms in milliseconds),
                *map(with_range, ratios),
                with_range(ratios_by_round(timings, "padded", "xla")),
            ]
        )
    return {"times": Table(header, lines)}


def plot(rows: list[Row]) -> Figure:
    """Padded over `xla`, every round, by workload."""
    figure = white_figure("On a CPU, what does walking over tiles save against a padded batch?", 9, 4)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        ratios = ratios_by_round(row["timings"], "padded", "xla", of="processor_us")
        axes.barh(i, float(np.median(ratios)), color=COLORS[0])
        axes.plot(ratios, [i] * len(ratios), "|", color="black", markersize=9)
        axes.annotate(f"{np.median(ratios):.1f}", (max(ratios), i), (5, -3), textcoords="offset points")
    axes.set_yticks(range(len(rows)), [row["workload"] for row in rows])
    axes.invert_yaxis()
    axes.set(
        xscale="log", xlabel="processor time of padded ÷ that of xla; a mark per round", ylabel="workload"
    )
    axes.set_xlim(0.5, axes.get_xlim()[1] * 1.5)
    axes.axvline(1, color="#333333", linewidth=1, linestyle="--")
    return figure


EXPERIMENT = Experiment(
    question="On a CPU, what does walking over tiles save against a padded batch?",
    committed=Config(),
    small=Config(workloads=("decode 16 x 1k",), rounds=2, repeats=2),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
