"""Do the tests notice when a module of `batch` or `metadata` is changed by one operator or number?

Question: of a random sample of mutants, what share makes a test fail? A mutant is the package with one
change made by cosmic-ray: an operator replaced, a comparison turned, a number changed, a condition
negated. One mutant is kept per place and kind of change, so that a `+`, for which there are eleven
other operators, does not weigh eleven times as much as a `not`. Annotations are left alone: they are
strings that never run.

    pip install --group mutation
    python experiments/mutation.py --sample 300

runs the tests on the unchanged package, then on every mutant of the sample, in copies of the source
tree, and writes `experiments/results/mutation.json` with the survivors. With new tests,

    python experiments/mutation.py --retry

tries those survivors again, and only them. That is fair as long as tests were added and none was taken
away, and the modules are the same.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import json
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast_from_path  # pyright: ignore[reportMissingImports]
from cosmic_ray.mutating import mutate_and_test  # pyright: ignore[reportMissingImports]
from cosmic_ray.plugins import get_operator, operator_names  # pyright: ignore[reportMissingImports]
from cosmic_ray.work_item import MutationSpec  # pyright: ignore[reportMissingImports]
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
MODULES = tuple(
    str(path.relative_to(ROOT))
    for room in ("batch", "metadata")
    for path in sorted((ROOT / "jaxattn" / room).glob("[!_]*.py"))
)
# pytest stops at the first failure, so what fails on most mutants stands first.
TESTS = (
    "tests/batch",
    "tests/metadata/test_fields.py",
    "tests/metadata/test_prepare.py",
    "tests/attention/test_extension.py",
    "tests/attention/test_int32_bounds.py",
)
# Slow, and tried on those that survive all others.
LAST_TESTS = ("tests/laws/test_known_bugs.py", "tests/laws/test_laws.py")
EXAMPLES = 50
KINDS = ("ReplaceBinaryOperator", "ReplaceComparisonOperator", "ReplaceUnaryOperator", "ReplaceAndWithOr",
         "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "AddNot", "NumberReplacer",
         "ZeroIterationForLoop")  # fmt: skip
RESULTS = ROOT / "experiments" / "results" / "mutation.json"


def annotated(module: Path) -> set[tuple[int, int]]:
    """Positions `(line, column)` that lie inside annotations."""
    inside: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        for child in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if child is None:
                continue
            for line in range(child.lineno, child.end_lineno + 1):
                first = child.col_offset if line == child.lineno else 0
                last = child.end_col_offset if line == child.end_lineno else 1000
                inside.update((line, column) for column in range(first, last))
    return inside


def list_mutants(seed: int) -> list[MutationSpec]:
    """One mutant per place and kind of change, in random order."""
    rng, chosen = random.Random(seed), {}
    for module in MODULES:
        nodes, skipped = list(ast_nodes(get_ast_from_path(ROOT / module))), annotated(ROOT / module)
        names = [n for n in operator_names() if n.removeprefix("core/").split("_")[0] in KINDS]
        for name in sorted(names):
            operator: Any = get_operator(name)()
            places = [place for node in nodes for place in operator.mutation_positions(node)]
            for occurrence, (start, end) in enumerate(places):
                if start in skipped:
                    continue
                spec = MutationSpec(Path(module), name, occurrence, start, end)
                same = chosen.setdefault((module, name.split("_")[0], start), [])
                same.append(spec)
    mutants = [rng.choice(same) for _, same in sorted(chosen.items())]
    rng.shuffle(mutants)
    return mutants


def enter_copy(folder: str) -> None:
    """Make a copy of the source tree and work in it."""
    copy = Path(folder) / str(os.getpid())
    for part in ("jaxattn", "kernels", "tests", "experiments"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "DESIGN.md"):
        shutil.copy(ROOT / name, copy)
    os.chdir(copy)
    sys.dont_write_bytecode = True
    # Most programs of a mutant are those of the package: three quarters of the time is compiling.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder) / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAXATTN_EXAMPLES"] = str(EXAMPLES)


def changed_lines(diff: str) -> list[str]:
    """The lines of a unified diff that are removed or added."""
    return [line for line in diff.splitlines() if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]


def test_commands() -> list[str]:
    """The commands that a mutant must survive, in this order."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    return [" ".join([*command, *tests]) for tests in (TESTS, LAST_TESTS)]


def pass_unchanged() -> None:
    """Check that the tests pass on the package as it is; else every mutant would count as killed."""
    for command in test_commands():
        subprocess.run(command.split(), check=True)


def try_mutant(spec: MutationSpec, timeout_s: float) -> dict[str, Any]:
    """Run the tests on a mutant, in the current copy."""
    first, last = test_commands()
    result = mutate_and_test([spec], first, timeout_s)
    if not result.is_killed:
        result = mutate_and_test([spec], last, timeout_s)
    return {
        "module": str(spec.module_path),
        "line": spec.start_pos[0],
        "operator": spec.operator_name.removeprefix("core/"),
        "occurrence": spec.occurrence,
        "outcome": "survived" if not result.is_killed else "killed",
        "diff": changed_lines(result.diff or ""),
    }


def provenance() -> dict[str, Any]:
    """Where and on what the figures were taken."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "tests": [*TESTS, *LAST_TESTS],
        "examples": EXAMPLES,
    }


def identity(result: dict[str, Any]) -> tuple[str, str, int]:
    """What a mutant is called."""
    return result["module"], result["operator"], result["occurrence"]


def write(path: Path, results: Sequence[dict[str, Any]], mutants: Sequence[MutationSpec], seed: int) -> None:
    """Write the figures and the survivors."""
    sizes, tried = Counter(str(m.module_path) for m in mutants), Counter(r["module"] for r in results)
    killed = Counter(r["module"] for r in results if r["outcome"] == "killed")
    modules = {m: {"mutants": sizes[m], "tried": tried[m], "killed": killed[m]} for m in MODULES}
    survivors = sorted(
        (r for r in results if r["outcome"] == "survived"), key=lambda r: (r["module"], r["line"])
    )
    summary = {"tried": len(results), "killed": killed.total(), "seed": seed, "modules": modules}
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            {"provenance": provenance(), **summary, "survivors": survivors, "results": results}, indent=1
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, default=300, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retry", action="store_true", help="try only the survivors of the last run")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds per mutant")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    console, results, sample = Console(), [], []
    mutants = list_mutants(options.seed)
    if options.retry:
        last = json.loads(options.out.read_text())["results"]
        results = [result for result in last if result["outcome"] == "killed"]
        again = {identity(result) for result in last if result["outcome"] == "survived"}
        sample = [
            m
            for m in mutants
            if (str(m.module_path), m.operator_name.removeprefix("core/"), m.occurrence) in again
        ]
    else:
        sample = mutants[: options.sample]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            options.workers, context, initializer=enter_copy, initargs=(folder,)
        ) as pool:
            pool.submit(pass_unchanged).result()
            console.print("unchanged, the tests pass")
            futures = [pool.submit(try_mutant, spec, options.timeout) for spec in sample]
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                result = future.result()
                results.append(result)
                write(options.out, results, mutants, options.seed)
                console.print(
                    f"{number}/{len(sample)}",
                    result["outcome"],
                    result["module"],
                    result["line"],
                    *(result["diff"] if result["outcome"] == "survived" else ()),
                    markup=False,
                )
    summary = json.loads(options.out.read_text())
    table = Table("module", "mutants", "tried", "killed")
    for module, counts in summary["modules"].items():
        share = counts["killed"] / max(counts["tried"], 1)
        table.add_row(module, str(counts["mutants"]), str(counts["tried"]), f"{share:.1%}")
    console.print(table)
    console.print(
        f"{summary['killed']} of {summary['tried']} killed, {summary['killed'] / summary['tried']:.1%}"
    )


if __name__ == "__main__":
    main()
