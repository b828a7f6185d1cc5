"""How many tokens of a training batch are padding, by packer, and what does packing cost on the host?

Two draws of documents into large batches, lengths even and log-normal (median 403 tokens), and the demo's
functions of the standard library into its batches of 320 tokens. `pack_best_fit` meets them in random order;
with one open batch it is next-fit. First-fit decreasing must know all lengths before. Processor time of one
run each; how documents are read and batches are nested is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from experiment import Experiment, Row, Table
from matplotlib.figure import Figure
from pictures import grouped_bars, white_figure
from rich.progress import track

from jaxattn import Bucket, pack_best_fit
from jaxattn.cli.demo import TRAIN_BUCKET, standard_library_functions
from jaxattn.training import pack_first_fit_decreasing


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What is packed, and into what."""

    num_documents: int = 100_000
    """Documents of each draw."""
    tokens: int = 8192
    """Tokens of a batch, and of the longest document."""
    seqs: int = 256
    """Documents of a batch, at most."""
    max_open: tuple[int, ...] = (1, 4, 16, 64)
    """Batches that best fit keeps open."""

    @property
    def bucket(self) -> Bucket:
        """Of a batch."""
        return Bucket(self.tokens, self.seqs)


def workloads(config: Config) -> dict[str, tuple[np.ndarray, Bucket]]:
    """Lengths of documents in order of arrival, and the bucket they are packed for."""
    rng, n = np.random.default_rng(0), config.num_documents
    functions = np.array([document.size for document in standard_library_functions()])
    log_normal = np.clip(rng.lognormal(6, 1.2, n).astype(int), 1, config.tokens)
    return {
        "even": (rng.integers(1, config.tokens + 1, n), config.bucket),
        "log-normal": (log_normal, config.bucket),
        "demo": (functions, TRAIN_BUCKET),
    }


def packers(lengths: np.ndarray, bucket: Bucket, max_open: tuple[int, ...]) -> dict[str, Callable[[], int]]:
    """Functions that pack, and count the packs."""
    documents = [range(length) for length in lengths]  # a packer reads no more of them than their length

    def best_fit(n: int) -> Callable[[], int]:
        return lambda: sum(1 for _ in pack_best_fit(documents, bucket, max_open=n))

    return {
        **{f"best fit, {n} open": best_fit(n) for n in max_open},
        "first-fit decreasing": lambda: len(pack_first_fit_decreasing(lengths, bucket)),
    }


def rows(config: Config) -> Iterator[Row]:
    """A row per workload and packer."""
    for workload, (lengths, bucket) in track(workloads(config).items(), "packing"):
        for packer, count in packers(lengths, bucket, config.max_open).items():
            started = time.process_time()
            packs = count()
            yield {
                "workload": workload,
                "packer": packer,
                "documents": lengths.size,
                "packs": packs,
                "padding": 1 - int(lengths.sum()) / (packs * bucket.tokens),
                "seconds": time.process_time() - started,
            }


def _names(rows: list[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def tables(rows: list[Row]) -> dict[str, Table]:
    """A line per packer, and padding and time per workload."""
    found = {(row["workload"], row["packer"]): row for row in rows}
    workloads = _names(rows, "workload")
    header = ["packer", *(f"{workload}, {what}" for workload in workloads for what in ("padding", "time"))]
    lines = []
    for packer in _names(rows, "packer"):
        cells = [
            (f"{row['padding']:.2%}", f"{row['seconds']:.2f} s")
            for row in (found[workload, packer] for workload in workloads)
        ]
        lines.append([packer, *(cell for pair in cells for cell in pair)])
    return {"padding": Table(header, lines)}


def plot(rows: list[Row]) -> Figure:
    """Padding by packer."""
    figure = white_figure("How many tokens of a training batch are padding?", 9, 4)
    axes, workloads = figure.subplots(), _names(rows, "workload")
    series = {
        packer: [row["padding"] * 100 for row in rows if row["packer"] == packer]
        for packer in _names(rows, "packer")
    }
    grouped_bars(axes, workloads, series, form="{:.2g}")
    axes.set(xlabel="lengths of documents", ylabel="padding, % of all tokens", yscale="log")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


EXPERIMENT = Experiment(
    question="How many tokens of a training batch are padding, by packer, and what does packing cost?",
    committed=Config(),
    small=Config(num_documents=3_000, max_open=(1, 16)),
    rows=rows,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    EXPERIMENT.main(__file__)
