"""Damaged and hostile files raise CheckpointError alone, read nothing else, and cost little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("cases", "seed"), [(150, 0), *(pytest.param(2500, seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_damaged_and_hostile_files(cases, seed):
    folders = (TESTS, TESTS / "support", TESTS.parent, TESTS.parent / "kernels")
    paths = os.pathsep.join(map(str, folders))
    words = [
        sys.executable,
        str(TESTS / "support" / "fuzz_checkpoints.py"),
        f"--cases={cases}",
        f"--seed={seed}",
    ]
    run = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, check=True
    )
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["failures"] == {}
    assert min(result["counts"]["loaded"], result["counts"]["refused"]) > cases / 8
    assert sum(result["counts"].values()) == cases
