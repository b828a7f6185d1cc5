"""What a compiled program costs, read from the program itself: no timing.

XLA's optimised HLO is counted, all computations taken together, so what is fused counts too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

NOT_WORK = frozenset("parameter constant iota tuple get-tuple-element bitcast fusion call while".split())
"""Opcodes that are no work.

Parameters, tuples, their elements and bitcasts are names. Constants and iotas are literals, which XLA
writes once for each fusion that uses them. Fusions, calls and loops contain what is counted.
"""

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\(", re.MULTILINE)


class Cost(NamedTuple):
    """The cost of one or more compiled programs.

    Attributes:
        instructions: Instructions that work (`NOT_WORK` are left out), in all computations.
        flops: XLA's count of arithmetic operations.
        bytes: XLA's count of bytes read and written.
    """

    instructions: int
    flops: float
    bytes: float

    def minus(self, other: Cost) -> Cost:
        """What this program costs more than another."""
        return Cost(
            self.instructions - other.instructions, self.flops - other.flops, self.bytes - other.bytes
        )

    def exceeds(self, other: Cost) -> bool:
        """Whether anything is dearer than in another program."""
        return any(a > b for a, b in zip(self, other, strict=True))


UNFUSED: dict[str, bool | str] = {"xla_disable_hlo_passes": "fusion"}
"""Compiler options under which what is computed once stands once.

Otherwise XLA fuses a cheap producer into every one of its consumers, and computes it again in each,
where it takes that to be cheaper than a trip to memory.
"""


def compiled(
    function: Callable, *args: Any, options: dict[str, bool | str] | None = None
) -> jax.stages.Compiled:
    """The function's program for arguments, or for their shapes."""
    return jax.jit(function).lower(*args).compile(options)


def opcodes(text: str, scope: str = "") -> Counter[str]:
    """How often each opcode stands in optimised HLO, in lines that mention a scope."""
    matches = ((_INSTRUCTION.match(line), line) for line in text.splitlines())
    return Counter(match[1] for match, line in matches if match and scope in line)


def work(text: str, scope: str = "") -> int:
    """Instructions that work, in lines that mention a scope."""
    return sum(n for opcode, n in opcodes(text, scope).items() if opcode not in NOT_WORK)


def program_cost(program: jax.stages.Compiled) -> Cost:
    """The cost of a compiled program."""
    figures: Any = program.cost_analysis()
    return Cost(work(program.as_text() or ""), figures.get("flops", 0.0), figures["bytes accessed"])


def cost_of(function: Callable, *args: Any, options: dict[str, bool | str] | None = None) -> Cost:
    """The cost of a function's program for arguments, or for their shapes."""
    return program_cost(compiled(function, *args, options=options))
