"""Compile the main configurations, and write what they take into `resources.json` and into documents.

make resources                                         compiles, minutes
python tests/compile/write_resources.py PAGE.md        only brings a page up to date
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mosaic_sass
import resources
import test_blackwell_sass
import test_gradient_sass
import test_mosaic_gradient_sass
import test_mosaic_sass
import test_sass
from deviceless import B200, H200
from rich.progress import track


def measured() -> Iterator[dict[resources.Key, resources.Resources]]:
    """The resources of every case whose test compares them."""
    for case in track((*test_sass.MAIN, *test_sass.MAIN_QUANTIZED), "triton"):
        yield test_sass.resources_by_key(case, test_sass.compile_case(case))
    for case in track(test_sass.MAIN, "triton's gradient"):
        yield test_sass.resources_by_key(case, test_gradient_sass.compile_case(case))
    for target, tests in ((H200, test_mosaic_sass), (B200, test_blackwell_sass)):
        for case in track(tests.CASES, f"mosaic on {target.architecture}"):
            with tempfile.TemporaryDirectory() as folder:
                kernels = mosaic_sass.compile_kernels(target, tests.MODULE, case, Path(folder))
            yield mosaic_sass.resources_by_key(target, case, kernels)
    for case in track(test_mosaic_gradient_sass.CASES, "mosaic's gradient"):
        with tempfile.TemporaryDirectory() as folder:
            kernels = test_mosaic_gradient_sass.compile_case(case, Path(folder))
        yield test_mosaic_gradient_sass.resources_by_key(case, kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("documents", nargs="*", type=Path, help="where to bring the table up to date")
    parser.add_argument("--write", action="store_true", help="compile, and write the table")
    arguments = parser.parse_args()
    if arguments.write:
        table = {key: value for found in measured() for key, value in found.items()}
        resources.TABLE.write_text(resources.written(resources.versions(), table), encoding="utf-8")
    for path in arguments.documents:
        text = path.read_text(encoding="utf-8")
        path.write_text(resources.rewrite(text, *resources.read()), encoding="utf-8")


if __name__ == "__main__":
    main()
