"""Triton kernels without Pallas: taken out of a lowered program as text, and put into another by `jax.ffi`.

XLA compiles Triton's own intermediate language (TTIR) itself. Pallas's Triton backend writes it, and hands it
over in a custom call, which anybody can make.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

TARGET = "__gpu$xla.gpu.triton"
"""What XLA calls its custom call for kernels in TTIR."""

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "i8": "int8", "i32": "int32"}
"""MLIR's names of element types, and ours."""

Value = tuple[int, int]
"""A value of a program: the number of the call that returns it, -1 for arguments, and which of them it is."""


Type = tuple[tuple[int, ...], str]
"""Shape and dtype."""


class Call(NamedTuple):
    """A launch of a kernel.

    Attributes:
        name: The kernel's name.
        ir: Its TTIR, as text.
        num_warps: Warps per program.
        num_stages: Depth of the load pipeline.
        grid: Programs along three axes.
        operands: What it reads.
        operand_types: Of what it reads.
        result_types: Of what it returns.
        aliases: Operand and result that are one buffer, in pairs.
    """

    name: str
    ir: str
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    operands: tuple[Value, ...]
    operand_types: tuple[Type, ...]
    result_types: tuple[Type, ...]
    aliases: tuple[tuple[int, int], ...]


class Program(NamedTuple):
    """Launches in order, and which of their results are the program's."""

    calls: tuple[Call, ...]
    results: tuple[Value, ...]


def run(program: Program, *args: jax.Array) -> list[jax.Array]:
    """The program over `jax.ffi`."""
    values = {(-1, i): x for i, x in enumerate(args)}
    for number, call in enumerate(program.calls):
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in call.result_types]
        launch = jax.ffi.ffi_call(TARGET, shapes, input_output_aliases=dict(call.aliases))
        sizes = {"num_warps": call.num_warps, "num_stages": call.num_stages}
        sizes |= {f"grid_{axis}": size for axis, size in zip("xyz", call.grid, strict=True)}
        numbers = {name: np.int32(size) for name, size in sizes.items()}
        operands = [values[x] for x in call.operands]
        types = tuple((x.shape, x.dtype.name) for x in operands)
        assert types == call.operand_types, f"{call.name} reads {call.operand_types}, not {types}"
        results = launch(*operands, name=call.name, ir=call.ir, debug=False, **numbers)
        values |= {(number, i): x for i, x in enumerate(results)}
    return [values[x] for x in program.results]


def program_of(lowered: Any) -> Program:
    """The launches of a lowered function that consists of nothing else."""
    # Parts of jaxlib that are not public, and go with Pallas's Triton backend; `run` does without.
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    module = lowered.compiler_ir("stablehlo")
    (main,) = (o for o in module.body.operations if o.operation.name == "func.func")
    (block,) = main.regions[0].blocks
    values = {argument: (-1, i) for i, argument in enumerate(block.arguments)}
    *operations, end = block.operations
    calls = []
    with module.context as context, ir.Location.unknown():
        dialect.register_dialect(context)
        for number, operation in enumerate(operations):
            assert _text(operation.attributes["call_target_name"]) == TARGET, operation
            values |= {result: (number, i) for i, result in enumerate(operation.results)}
            calls.append(_call(operation, tuple(values[x] for x in operation.operands)))
    return Program(tuple(calls), tuple(values[x] for x in end.operands))


def _call(operation: Any, operands: tuple[Value, ...]) -> Call:
    from jaxlib.mlir import ir

    config = operation.attributes["mhlo.backend_config"]

    def number(name: str) -> int:
        return ir.IntegerAttr(config[name]).value

    kernel = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)  # bytecode, or text

    def types(values: Any) -> tuple[Type, ...]:
        tensors = [ir.RankedTensorType(value.type) for value in values]
        return tuple((tuple(t.shape), DTYPES[str(t.element_type)]) for t in tensors)

    return Call(
        name=_text(config["name"]),
        ir=str(kernel.operation.get_asm(enable_debug_info=False)),
        num_warps=number("num_warps"),
        num_stages=number("num_stages"),
        grid=tuple(number(f"grid_{axis}") for axis in "xyz"),
        operands=operands,
        operand_types=types(operation.operands),
        result_types=types(operation.results),
        aliases=tuple(_aliases(operation)),
    )


def _aliases(operation: Any) -> Iterator[tuple[int, int]]:
    from jaxlib.mlir.dialects import stablehlo

    if "output_operand_aliases" in operation.attributes:
        for attribute in operation.attributes["output_operand_aliases"]:
            alias = stablehlo.OutputOperandAlias(attribute)
            yield alias.operand_index, (*alias.output_tuple_indices, 0)[0]  # of a single result, no index


def _text(attribute: Any) -> str:
    return str(attribute).strip('"')


def save(program: Program, path: Path) -> None:
    """Write a program as JSON."""
    text = {"calls": [call._asdict() for call in program.calls], "results": program.results}
    path.write_text(json.dumps(text), encoding="utf-8")


def load(path: Path) -> Program:
    """Read a program."""
    text: Any = as_tuples(json.loads(path.read_text(encoding="utf-8")))
    return Program(tuple(Call(**call) for call in text["calls"]), text["results"])


def as_tuples(value: Any) -> Any:
    """What JSON made of tuples, as tuples."""
    if isinstance(value, dict):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
