"""How much of the suite runs, and how many examples a property is tried on: one place, for all tests.

An everyday run takes one case in n of the tests marked `thinned(n)`, whose cases are dear and alike; those
left out are `slow`, and `make test-slow` runs them. `JAXATTN_EXAMPLES=5 make test` makes a quick run, which
takes a fifth of the cases of every test. The suite on the oldest JAX is one, since it looks for what that
version lacks and not for what nobody has thought of.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable

import pytest

EXAMPLES = int(os.environ.get("JAXATTN_EXAMPLES", "20"))
THOROUGH = 5000
"""Examples of the tests marked `slow`."""
IS_QUICK = EXAMPLES < 20
KEPT_EVERY = 5
"""Of a test's cases a quick run takes a fifth."""


def left_out(items: Iterable[pytest.Item], kept_every: Callable[[pytest.Item], int]) -> list[pytest.Item]:
    """The cases that are left out where of each test one in so many is kept, and one at least.

    Which ones follows from a hash of their names: every process of a run keeps the same, and no value of a
    parameter is left out everywhere, as it would be if every second case were kept of two implementations.
    """
    tests = defaultdict(list)
    for item in items:
        tests[item.path, getattr(item, "originalname", item.name)].append(item)
    dropped = []
    for cases in tests.values():
        kept = -(-len(cases) // kept_every(cases[0]))
        dropped += sorted(cases, key=lambda case: hashlib.sha256(case.name.encode()).digest())[kept:]
    return dropped


def thinning(item: pytest.Item) -> int:
    """The n of a test marked `thinned(n)`; 1 of any other."""
    marker = item.get_closest_marker("thinned")
    return 1 if marker is None else marker.args[0]
