"""Compilations of a process: counted, forbidden, kept on disk, free of the caller's context."""

from jaxattn.compiling.compiles import (
    CompilationForbiddenError,
    Compiles,
    compile_cache,
    count_compiles,
    forbid_compiles,
)
from jaxattn.compiling.context import neutral_context

__all__ = [
    "CompilationForbiddenError",
    "Compiles",
    "compile_cache",
    "count_compiles",
    "forbid_compiles",
    "neutral_context",
]
