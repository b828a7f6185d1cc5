"""`jaxattn tune`: measure what is fastest here, and write a table of choices."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxattn.attention.choice import describe_device
from jaxattn.attention.choice_table import Layer, format_table, parse_table
from jaxattn.attention.implementations import IMPLEMENTATIONS
from jaxattn.cache.quantization import QUANTIZED_DTYPES
from jaxattn.cli.choices import VARIABLE
from jaxattn.measuring.tune import TunePlan, default_plan, tune


def add_tune_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.epilog = f"auto chooses by the table that {VARIABLE} names. Times are taken when this is run only."
    parser.add_argument(
        "--out", type=Path, default=Path("jaxattn-choices.json"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    several: dict = {"action": "append", "help": "once per value; default: by device"}
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), **several)
    parser.add_argument("--cache-dtype", choices=QUANTIZED_DTYPES, action="append",
                        help="measure a quantised cache too; once per value")  # fmt: skip
    parser.add_argument("--head-dim", type=int, action="append", help="once per value; default: 64 and 128")
    parser.add_argument("--page-size", type=_page_size, metavar="TOKENS", action="append",
                        help="once per value, 'none' for packed keys; default: 16 and none")  # fmt: skip
    parser.add_argument("--heads", type=_heads, metavar="N/K", help="query and key/value heads, such as 32/8")
    parser.add_argument("--implementation", choices=tuple(IMPLEMENTATIONS), **several)
    parser.add_argument("--quick", action="store_true", help="small batches and few runs: does it work?")


def _page_size(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1, or 'none'")
    return int(text)


def _heads(text: str) -> tuple[int, int]:
    query, _, key = text.partition("/")
    if not query.isdecimal() or not key.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be query heads/key heads, such as 32/8")
    return int(query), int(key)


def run_tune(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: What was parsed.

    Raises:
        ValueError: If the file exists or cannot be written, or no layer has a candidate.
    """
    plan = default_plan(describe_device(), quick=options.quick)
    named = {
        "dtypes": options.dtype,
        "cache_dtypes": options.cache_dtype,
        "head_dims": options.head_dim,
        "page_sizes": options.page_size,
        "implementations": options.implementation,
    }
    given = {name: tuple(dict.fromkeys(values)) for name, values in named.items() if values}
    if options.heads:
        given["num_q_heads"], given["num_kv_heads"] = options.heads
    _measure_into(options.out, dataclasses.replace(plan, **given), force=options.force)
    if options.quick:
        print("small batches and few runs show that it works, not what is fastest: measure without --quick")


def _measure_into(out: Path, plan: TunePlan, *, force: bool) -> None:
    """Measure, write the table, and say what it holds and how it is used."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist; create it")
    if out.exists() and not force:
        raise ValueError(f"--out {out} exists; name another file, or replace it with --force")
    for layer in plan.layers():
        plan.spec(layer)  # raises before anything is measured
    steps = len(plan.implementations) * sum(map(len, plan.layers().values()))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=steps)
        done = iter(range(steps))
        tuned = tune(
            plan, announce=lambda what: progress.update(task, description=what, completed=next(done))
        )
    text = format_table(tuned.document)
    rows = parse_table(text, str(out)).facts  # what is written can be read
    for layer, reasons in tuned.unserved.items():
        print(f"no row for {layer}: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}")
    if not rows:
        raise ValueError("no candidate serves any of these layers; nothing is written")
    out.write_text(text, encoding="utf-8")
    _print_rows(tuned.document["runs"][0]["rows"], plan.implementations)
    print(f"wrote {len(rows)} rows to {out}; to choose by them:")
    print(f"  export {VARIABLE}={shlex.quote(str(out.resolve()))}")


def _print_rows(rows: list[dict[str, Any]], candidates: tuple[str, ...]) -> None:
    table = Table("layer", "workload", *(f"{name}, ms" for name in candidates), "chosen")
    for row in rows:
        layer = str(Layer(*(row[name] for name in Layer._fields)))
        chosen = row["implementation"]
        for workload, medians in row["medians_ms"].items():
            times = (f"{medians[name]:,.3f}" if name in medians else "–" for name in candidates)
            table.add_row(layer, workload, *times, chosen)
            layer = chosen = ""
        for name, why in row.get("left_out", {}).items():
            table.add_row("", f"{name} left out: {why}")
    Console().print(table)
