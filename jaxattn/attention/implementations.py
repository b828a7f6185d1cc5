"""The implementations by name: where each stands, and its gradient; imported when they are first called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxattn.attention.vjp import Gradients, Results


class Implementation(NamedTuple):
    """Where an implementation stands.

    Attributes:
        forward: The module of its `attend`.
        backward: The module of its `attend_backward`; None where JAX differentiates `attend`.
    """

    forward: str
    backward: str | None


IMPLEMENTATIONS = {
    "reference": Implementation("jaxattn.attention.reference", None),
    "xla": Implementation("jaxattn.attention.xla", "jaxattn.attention.xla_gradient"),
    "triton": Implementation("jaxattn.attention.triton", "jaxattn.attention.triton_gradient"),
    "mosaic": Implementation("jaxattn.attention.mosaic", "jaxattn.attention.mosaic_gradient"),
}


@dataclass(frozen=True, slots=True)
class Forward:
    """The `attend` of an implementation; two of the same name are equal, as programs are cached by them.

    Attributes:
        name: The implementation.
        capability: Compute capability of the GPU, for an implementation that has a kernel for each.
    """

    name: str
    capability: str | None = None

    def __call__(self, *args: Any, **options: Any) -> Results:
        """What the function returns."""
        if self.name == "mosaic":
            options["capability"] = self.capability
        return _function(IMPLEMENTATIONS[self.name].forward, "attend")(*args, **options)


@dataclass(frozen=True, slots=True)
class Backward:
    """The `attend_backward` of an implementation that has one.

    Attributes:
        name: The implementation.
    """

    name: str

    def __call__(self, *args: Any) -> Gradients:
        """What the function returns."""
        module = IMPLEMENTATIONS[self.name].backward
        assert module is not None
        return _function(module, "attend_backward")(*args)


def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)
