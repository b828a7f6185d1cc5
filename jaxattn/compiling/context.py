"""The context in which a program is compiled: none of the caller's.

JAX lets a caller set a mesh (`jax.set_mesh`) and a device (`jax.default_device`) for all that is traced
meanwhile. A program that is compiled once and kept must not inherit them: it would stay on that mesh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh


@contextlib.contextmanager
def neutral_context() -> Iterator[None]:
    """Set aside the mesh and the default device that a caller has set; both are as before afterwards.

    What is compiled meanwhile follows from its arguments alone. Also a decorator.
    """
    no_mesh = Mesh(np.empty((), object), ())
    with jax.set_mesh(no_mesh), jax.default_device(None):
        yield
