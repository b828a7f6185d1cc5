"""How much of the suite runs, and how many examples a property is tried on: one place, for all tests.

An everyday run leaves out, as `slow`, most cases of tests that are dear and alike: of one marked
`thinned(n)` it takes one case in n, of all those in a file marked `thinned(n, group)` together one case
in n, and outside the kernels' own tests and the laws one case per file that runs a Triton kernel in the
interpreter. Which cases are taken depends on the commit: tomorrow's run takes others.

`make test-all SHARD=k/n` runs everything, a part in n at a time, and `SHARD=auto` the part that is due: the
number of commits says which. `.ci/run` runs that part of the slow tests, so that every case has its turn.

The environment tells all processes of a run the same: `JAXATTN_ROTATION` (a text; by default the commit),
`JAXATTN_SHARD` (k/n, auto, or empty for all) and `JAXATTN_EXAMPLES`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

EXAMPLES = int(os.environ.get("JAXATTN_EXAMPLES", "20"))
THOROUGH = 5000
"""Examples of the tests marked `slow`."""
PARTS = 10
"""Tests among which the thorough examples of a law are divided: in shards, none should take long alone."""
SHARDS = 43
"""Parts of the thorough run. A prime: landings of several commits each still come to all parts."""
TESTS = Path(__file__).parents[1]
INTERPRETED_WITH = ("kernels", "laws", "compile")
"""Rooms of tests that run Triton kernels in the interpreter every day."""


def _git(*words: str) -> str:
    """What git says of this checkout; nothing outside one."""
    try:
        run = subprocess.run(["git", *words], cwd=TESTS, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return run.stdout.strip()


def _shard(text: str) -> tuple[int, int]:
    """Part k of n, from 1 on.

    Raises:
        ValueError: For what is neither k/n, auto nor empty.
    """
    if text == "auto":
        return int(_git("rev-list", "--count", "--first-parent", "HEAD") or 0) % SHARDS + 1, SHARDS
    first, _, second = (text or "1/1").partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise ValueError(f"SHARD={text!r} is neither k/n with 1 <= k <= n nor auto")
    return int(first), int(second)


# The first process of a run decides, and its workers inherit what it wrote.
ROTATION = os.environ.setdefault("JAXATTN_ROTATION", _git("rev-parse", "--short=12", "HEAD"))
SHARD = _shard(os.environ.get("JAXATTN_SHARD", ""))
os.environ["JAXATTN_SHARD"] = "{}/{}".format(*SHARD)


def _digest(*words: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(words).encode()).digest())


def rotated[T](things: Iterable[T], key: Callable[[T], str]) -> list[T]:
    """Things in an order that is another one at every commit, by a text that tells them apart."""
    return sorted(things, key=lambda thing: _digest(ROTATION, key(thing)))


def _left_out(
    items: Iterable[pytest.Item],
    group: Callable[[pytest.Item], object],
    kept: Callable[[Sequence[pytest.Item]], int],
) -> list[pytest.Item]:
    """The items beyond as many as are kept of each group, which ones being up to the rotation."""
    groups = defaultdict(list)
    for item in items:
        groups[group(item)].append(item)
    return [
        item
        for members in groups.values()
        for item in rotated(members, key=lambda item: item.nodeid)[kept(members) :]
    ]


def _group_of(item: pytest.Item) -> object:
    """The test of a case; of one marked `thinned(n, group)`, all tests of its file that name the group."""
    marker = item.get_closest_marker("thinned")
    named = marker.args[1:] if marker else ()
    return item.path, *(named or (getattr(item, "originalname", item.name),))


def _one_in_n(cases: Sequence[pytest.Item]) -> int:
    """How many are kept of the cases of a group: one in n if they are marked `thinned(n)`, else all."""
    marker = cases[0].get_closest_marker("thinned")
    return len(cases) if marker is None else -(-len(cases) // marker.args[0])


def _is_interpreted(item: pytest.Item) -> bool:
    """Whether it runs a Triton kernel in the interpreter, and stands where others do so for it."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    room = item.path.relative_to(TESTS).parts[0]
    return parameters.get("implementation") == "triton" and room not in INTERPRETED_WITH


def mark_slow(items: Iterable[pytest.Item]) -> None:
    """Mark as slow what an everyday run leaves out."""

    def everyday() -> list[pytest.Item]:
        return [item for item in items if item.get_closest_marker("slow") is None]

    for item in _left_out(everyday(), _group_of, _one_in_n):
        item.add_marker(pytest.mark.slow)
    interpreted = filter(_is_interpreted, everyday())
    for item in _left_out(interpreted, lambda item: item.path, lambda _: 1):
        item.add_marker(pytest.mark.slow)


def of_other_shards(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """What this run does not take because another part of the whole does."""
    part, parts = SHARD
    return [item for item in items if _digest(item.nodeid) % parts != part - 1]
