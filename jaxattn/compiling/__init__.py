"""Compilations of a process: counted, forbidden, kept on disk."""

from jaxattn.compiling.compiles import (
    CompilationForbiddenError,
    Compiles,
    compile_cache,
    count_compiles,
    forbid_compiles,
)

__all__ = ["CompilationForbiddenError", "Compiles", "compile_cache", "count_compiles", "forbid_compiles"]
