"""What is done when Pallas's Triton backend goes: its kernels, stored as text, compile without it.

Today's Pallas writes Triton's intermediate language. Another process, which cannot import Pallas, reads it
and hands it to XLA, and the same PTX comes out.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import jax
import pytest
import ttir
from deviceless import A100, Kernel, kernels_of, lower_for
from test_sass import MAIN, program_of

pytestmark = pytest.mark.compile

WITHOUT_PALLAS = """
import sys

# Neither Pallas nor the bindings of Triton's language: to import one of them fails.
for name in "jax.experimental.pallas", "jax._src.pallas", "jaxlib.triton":
    sys.modules[name] = None

import functools
import json
from pathlib import Path

import jax
import ttir
from deviceless import TARGETS, compile_for

(target,) = [t for t in TARGETS if t.architecture == sys.argv[1]]
shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in json.loads(sys.argv[2])]
program = ttir.load(Path(sys.argv[3]))
print(json.dumps(compile_for(target, functools.partial(ttir.run, program), *shapes)))
"""
CASES = [case for case in MAIN if (case.group_size, case.head_dim) == (4, 128)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stored_kernels_compile_without_pallas(case, tmp_path):
    function, *args = program_of(case)
    lowered = lower_for(case.target, function, *args)
    program, path = ttir.program_of(lowered), tmp_path / "kernels.json"
    ttir.save(program, path)
    assert ttir.load(path) == program
    shapes = json.dumps([(x.shape, x.dtype.name) for x in jax.tree.leaves(args)])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WITHOUT_PALLAS, case.target.architecture, shapes, path]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    without = sorted(Kernel(*ttir.as_tuples(kernel)) for kernel in json.loads(run.stdout))
    assert len(without) == 3
    assert without == sorted(kernels_of(case.target, lowered)), "launches, registers and PTX are the same"


def test_one_text_serves_every_gpu_and_keeps_buffers_in_place():
    function, *args = program_of(CASES[0])
    program, *others = (ttir.program_of(lower_for(case.target, function, *args)) for case in CASES)
    assert all(other == program for other in others)
    assert [len(call.aliases) for call in program.calls] == [0, 2, 2]
    over_ffi = lower_for(A100, functools.partial(ttir.run, program), *jax.tree.leaves(args))
    assert ttir.program_of(over_ffi) == program
    print(f"KB of text per kernel: {[round(len(call.ir) / 1000) for call in program.calls]}")
    assert all(len(call.ir) < 200_000 for call in program.calls)
