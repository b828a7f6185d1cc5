"""How many tokens of a training batch are padding, by packer, and what does packing cost on the host?

    python experiments/packing.py

Two draws of 100,000 documents into batches of 8,192 tokens and up to 256 documents, lengths even and
log-normal (median 403 tokens), and the demo's functions of the standard library into its batches of 320
tokens. `pack_best_fit` meets them in random order; with `max_open=1` it is next-fit. Processor time of one
run each.

Writes `experiments/results/packing.json` with provenance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from side_by_side import provenance

from jaxattn import Bucket, pack_best_fit, pack_first_fit_decreasing
from jaxattn.demo import TRAIN_BUCKET, standard_library_functions

RESULTS = Path(__file__).parent / "results" / "packing.json"
BUCKET = Bucket(tokens=8192, seqs=256)
NUM_DOCUMENTS = 100_000
MAX_OPEN = (1, 4, 16, 64)


def workloads() -> dict[str, tuple[np.ndarray, Bucket]]:
    """Lengths of documents in order of arrival, and the bucket they are packed for."""
    rng = np.random.default_rng(0)
    functions = np.array([document.size for document in standard_library_functions()])
    log_normal = np.clip(rng.lognormal(6, 1.2, NUM_DOCUMENTS).astype(int), 1, BUCKET.tokens)
    return {
        "even": (rng.integers(1, BUCKET.tokens + 1, NUM_DOCUMENTS), BUCKET),
        "log-normal": (log_normal, BUCKET),
        "demo": (functions, TRAIN_BUCKET),
    }


def packers(lengths: np.ndarray, bucket: Bucket) -> dict[str, Callable[[], int]]:
    """Functions that pack, and count the packs."""
    documents = [range(length) for length in lengths]  # a packer reads no more of them than their length

    def best_fit(max_open: int) -> Callable[[], int]:
        return lambda: sum(1 for _ in pack_best_fit(documents, bucket, max_open=max_open))

    return {
        **{f"best fit, {n} open": best_fit(n) for n in MAX_OPEN},
        "first-fit decreasing": lambda: len(pack_first_fit_decreasing(lengths, bucket)),
    }


def examine(name: str, lengths: np.ndarray, bucket: Bucket) -> list[dict[str, Any]]:
    """One row per packer."""
    rows = []
    for packer, count in packers(lengths, bucket).items():
        started = time.process_time()
        packs = count()
        seconds = time.process_time() - started
        padding = 1 - int(lengths.sum()) / (packs * bucket.tokens)
        rows.append(
            {"workload": name, "packer": packer, "packs": packs, "padding": padding, "seconds": seconds}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = [row for name, workload in workloads().items() for row in examine(name, *workload)]
    table = Table("workload", "packer", "packs", "padding", "seconds")
    for row in rows:
        table.add_row(
            row["workload"],
            row["packer"],
            f"{row['packs']:,}",
            f"{row['padding']:.2%}",
            f"{row['seconds']:.2f}",
        )
    Console(width=110).print(table)
    arguments.out.write_text(json.dumps({"provenance": provenance(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
