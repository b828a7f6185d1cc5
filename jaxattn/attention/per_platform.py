"""A function with another body on some platforms, chosen where a program is lowered.

`jax.lax.platform_dependent` does the same by tracing every body. Here a body other than the default is traced
only for a program that is lowered for its platform: a CPU neither loads nor traces a GPU's kernels, and
metadata need only hold what is read where the program runs. Equal calls, such as those of equal layers, are
lowered once per program. It has no rule to be differentiated by: it stands within functions that have one.

Imported where it is called: a part of JAX that it extends loads more than `import jaxattn` should.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxattn.attention.choice import PLATFORMS


@dataclass(frozen=True, slots=True)
class PerPlatform:
    """A function that is another one on some platforms.

    All take the same arguments, and their results have the same shapes and dtypes.

    Attributes:
        default: The function on all platforms that are not named.
        others: Names of platforms (of `PLATFORMS`), each with its function.
    """

    default: Callable[..., Any]
    others: tuple[tuple[str, Callable[..., Any]], ...]

    def body(self, platform: str | None) -> Callable[..., Any]:
        """The function that is a platform's; the default one for None."""
        return next((body for name, body in self.others if name == platform), self.default)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The results of the function that is the platform's.

        Args:
            *args: Pytrees of arrays, or hashable values.
            **options: The same by name.
        """
        leaves, tree = jax.tree.flatten((args, options))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        static = tuple(_Array if isinstance(leaf, jax.Array) else leaf for leaf in leaves)
        call = _Call(self, tree, static)
        results = _call.bind(*arrays, call=call)
        _, result_tree = _results(call, tuple(jax.typeof(array) for array in arrays))
        return jax.tree.unflatten(result_tree, results)


class _Array:
    """Where an array stands among arguments."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of such a function, but for its arrays.

    Attributes:
        function: The function.
        tree: Structure of the arguments.
        static: Its leaves, `_Array` for each array.
        mapped: The axis of each array that is mapped over, for each `jax.vmap` around it.
    """

    function: PerPlatform
    tree: Any
    static: tuple[Hashable, ...]
    mapped: tuple[tuple[int | None, ...], ...] = ()

    def on(self, platform: str | None) -> Callable[..., Any]:
        """The call on a platform, as a function of the arrays."""
        body = self.function.body(platform)

        def run(*arrays: jax.Array) -> Any:
            given = iter(arrays)
            leaves = [next(given) if leaf is _Array else leaf for leaf in self.static]
            args, options = jax.tree.unflatten(self.tree, leaves)
            return body(*args, **options)

        for axes in self.mapped:
            run = jax.vmap(run, in_axes=axes)
        return run


@functools.lru_cache(maxsize=1024)
def _results(call: _Call, arrays: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """Types of the results, and their structure."""
    jaxpr, results = jax.make_jaxpr(call.on(None), return_shape=True)(*arrays)
    return jaxpr.out_avals, jax.tree.structure(results)


def _run(*arrays: jax.Array, call: _Call) -> Sequence[jax.Array]:
    """Outside of a program: as a program of its own, which JAX lowers for where the arrays are."""
    with jax.disable_jit(False):
        return _run_compiled(*arrays, call=call)


@functools.partial(jax.jit, static_argnames="call")
def _run_compiled(*arrays: jax.Array, call: _Call) -> Sequence[jax.Array]:
    return _call.bind(*arrays, call=call)


def _map(arrays: Sequence[jax.Array], axes: Sequence[Any], *, call: _Call) -> tuple[Any, Any]:
    """The rule of `jax.vmap`."""
    results = _call.bind(*arrays, call=replace(call, mapped=(*call.mapped, tuple(axes))))
    return results, (0,) * len(results)


def _lower(platform: str | None) -> Any:
    """The rule that lowers for a platform."""
    return mlir.lower_fun(lambda *arrays, call: jax.tree.leaves(call.on(platform)(*arrays)))


_call = Primitive("per_platform")
_call.multiple_results = True
_call.def_impl(_run)
_call.def_abstract_eval(lambda *arrays, call: _results(call, arrays)[0])
batching.primitive_batchers[_call] = _map
mlir.register_lowering(_call, _lower(None))
for _platform in PLATFORMS:
    mlir.register_lowering(_call, _lower(_platform), platform=_platform)
