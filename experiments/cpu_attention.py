"""How fast is `xla` on a CPU, against attention over a padded batch?

Question: what does walking over tiles save where sequences differ in length? Every workload of
`jaxattn.cases.SERVING` runs in one process on:

- `padded`: gather the pages of every sequence to the longest length, pad the queries likewise, and
  attend densely, as `jax.nn` users do;
- `xla` and `triton` (interpreted here), from the same metadata.

    python experiments/cpu_attention.py

prints a table and writes `experiments/results/cpu_attention.json` with provenance.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxattn import AttentionSpec, attention, prepare_metadata
from jaxattn.cases import SERVING, Workload, nest_workload, random_page_tables

SPEC = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64)
PAGE_SIZE = 16
RESULTS = Path(__file__).parent / "results" / "cpu_attention.json"


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


def candidates(workload: Workload) -> dict[str, Callable[[], jax.Array]]:
    """A call per candidate, all on the same keys."""
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

    def ours(implementation: str) -> Callable[[], jax.Array]:
        run = jax.jit(lambda q, k, v, m: attention(q, k, v, m, SPEC, implementation=implementation))
        return lambda: run(q, k, v, metadata)

    calls = {"padded": lambda: dense(q, k, v, *dense_args), "xla": ours("xla"), "triton": ours("triton")}
    expected = np.asarray(calls["padded"]())[rows < batch.bucket.tokens]
    for name in ("xla", "triton"):
        np.testing.assert_allclose(calls[name]()[: ends[-1]], expected, atol=2e-5, err_msg=name)
    return calls


def measure(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds per call, warm."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return {"min_ms": 1e3 * min(seconds), "median_ms": 1e3 * statistics.median(seconds)}


def provenance() -> dict[str, Any]:
    """Where and on what the figures were taken."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    rows = []
    for workload in track(SERVING, description="workloads"):
        figures = {name: measure(call, options.repeats) for name, call in candidates(workload).items()}
        rows.append({"workload": workload.name, **figures})
    table = Table("workload", "padded, ms", "xla, ms", "triton interpreted, ms", "padded / xla")
    for row in rows:
        padded, xla, triton = (row[name]["median_ms"] for name in ("padded", "xla", "triton"))
        table.add_row(row["workload"], *(f"{ms:.1f}" for ms in (padded, xla, triton)), f"{padded / xla:.1f}")
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"provenance": provenance(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
