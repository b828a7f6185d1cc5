"""The command `buckets`: which buckets suit a trace, what they cost, and what fixed grids would."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from jaxattn.batch.bucket import Bucket, BucketPlan
from jaxattn.batch.trace import Trace, read_trace
from jaxattn.planning.fixed_grids import FIXED_GRIDS, grid_curve
from jaxattn.planning.planner import Fit, fit_of, plan_curve, unpadded_cost
from jaxattn.viz.buckets import plot_tradeoff

PLAN = "plan"
_BAR = 24
"""Characters of the longest bar."""


def add_buckets_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.epilog = (
        "Costs are modelled: padded tokens, a few more per step, and little per page (`LinearCost`). In "
        "Python, `measure_steps` and `fit_cost` fit them to a model, for `plan_buckets(..., cost=)`."
    )
    add = parser.add_argument
    add("trace", type=Path, metavar="TRACE", help="what `generate --log-batches`, or a BatchLog, has written")
    add("--max-compiles", type=int, metavar="N", default=16, help="most programs; default: %(default)s")
    add("--limits", type=_limits, metavar="TOKENS/SEQS/PAGES",
        help="the largest batch that can come; default: none larger than those of the trace")  # fmt: skip
    add("--headroom", type=float, metavar="PART", default=0.0,
        help="batches may soon be larger by this part, such as 0.25, than any of the trace")  # fmt: skip
    add("--out", type=Path, metavar="FILE.json", help="write the plan, for BucketPlan.load")
    add("--plot", type=Path, metavar="FILE.png", help="draw costs by the number of programs")
    add("--json", action="store_true", help="print one JSON object")


def run_buckets(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: What was parsed.

    Raises:
        ValueError: If the trace cannot be read, or an option is out of range.
    """
    for name, path in (("--out", options.out), ("--plot", options.plot)):
        _check_output(name, path)
    try:
        trace = read_trace(options.trace)
    except OSError as error:
        raise ValueError(f"{options.trace} cannot be read: {error.strerror or error}") from None
    found = _compare(trace, options.max_compiles, options.limits, options.headroom)
    if options.out is not None:
        found.plan.save(options.out)
    if options.plot is not None:
        title = f"{options.trace.name}: {len(trace):,} batches"
        plot_tradeoff(found.ratios(), title=title).savefig(options.plot, dpi=150)
    if options.json:
        print(json.dumps(found.as_json()))
        return
    _print(found, options)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A trace in the plan's buckets and in those of fixed grids.

    Attributes:
        trace: The trace.
        plan: For the most programs.
        unpadded: What the trace would cost without padding.
        fits: By way to choose buckets, for 1, 2, … programs.
    """

    trace: Trace
    plan: BucketPlan
    unpadded: float
    fits: dict[str, list[Fit]]

    def ratios(self) -> dict[str, list[float]]:
        """Costs over the cost without padding."""
        return {name: [fit.cost / self.unpadded for fit in fits] for name, fits in self.fits.items()}

    def as_json(self) -> dict[str, Any]:
        rows = [
            {"way": name, "max_compiles": k, **fit._asdict(), "over_unpadded": fit.cost / self.unpadded}
            for name, fits in self.fits.items()
            for k, fit in enumerate(fits, start=1)
        ]
        return {
            "batches": len(self.trace),
            "buckets": [asdict(bucket) for bucket in self.plan.buckets],
            "rows": rows,
        }


def _compare(trace: Trace, max_compiles: int, limits: Bucket | None, headroom: float) -> _Comparison:
    plans = plan_curve(trace, max_compiles, limits=limits, headroom=headroom)
    curves = {PLAN: plans} | {
        name: grid_curve(sizes, trace, max_compiles, limits=limits) for name, sizes in FIXED_GRIDS.items()
    }
    fits = {name: [fit_of(plan, trace) for plan in curve] for name, curve in curves.items()}
    return _Comparison(trace, plans[-1], unpadded_cost(trace), fits)


def _print(found: _Comparison, options: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 10_000)  # a file has room for whole lines
    trace, counts = found.trace, _shown(options.max_compiles)
    decodes = float((trace.max_q_len == 1).mean())
    console.print(
        f"{len(trace):,} batches, {decodes:.0%} of them decode steps; {trace.tokens.min():,} to "
        f"{trace.tokens.max():,} tokens, up to {trace.pages.max():,} pages"
    )
    console.print("\n[bold]Padding, in tokens of the buckets[/], and what it costs the plan, over none:")
    console.print(_table(found, counts))
    _print_gain(console, found, counts)
    console.print("\n[bold]The plan[/]: tokens, sequences, pages" + " " * 6 + "(cheapest first)")
    for bucket in found.plan.buckets:
        kind = "  decode" if bucket.max_q_len == 1 else ""
        console.print(f"  {bucket.tokens:>7,} {bucket.seqs:>6,} {bucket.pages:>9,}{kind}", highlight=False)
    for path in filter(None, (options.out, options.plot)):
        print(f"wrote {path}")


def _table(found: _Comparison, counts: list[int]) -> Table:
    names = list(found.fits)
    table = Table("programs", *(Column(name, justify="right") for name in names), "cost of padding", box=None)
    ratios = found.ratios()[PLAN]
    largest = max(ratios[counts[0] - 1] - 1, 1e-12)
    for k in counts:
        excess = ratios[k - 1] - 1
        bar = "█" * max(round(_BAR * excess / largest), 1)
        cells = [f"{found.fits[name][k - 1].padding:.1%}" for name in names]
        table.add_row(str(k), *cells, f"{bar} {excess:.1%}")
    return table


def _print_gain(console: Console, found: _Comparison, counts: list[int]) -> None:
    """What the plan gains over the best fixed grid, where there are few programs and where there are many."""
    ratios = found.ratios()
    parts = []
    for k in counts:
        fixed = {name: values[k - 1] for name, values in ratios.items() if name != PLAN}
        name = min(fixed, key=lambda n: fixed[n])
        parts.append(f"{k}: {1 - ratios[PLAN][k - 1] / fixed[name]:.1%} ({name})")
    console.print(
        "\n[bold]Modelled cost that the plan saves[/] against the best fixed grid with as many programs, on "
        "this very trace:\n  " + "; ".join(parts),
        highlight=False,
    )


def _shown(most: int) -> list[int]:
    """Numbers of programs that stand in the table."""
    return sorted({k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96) if k < most} | {most})


def _limits(text: str) -> Bucket:
    words = text.split("/")
    if len(words) != 3 or not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} must be tokens/sequences/pages, such as 256/32/4096")
    try:
        return Bucket(*map(int, words))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _check_output(name: str, path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{name} {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{name} {path}: the folder {path.parent} does not exist; create it")
