"""Damaged and hostile checkpoints in a process of their own: each loads, or raises CheckpointError.

    python tests/support/fuzz_checkpoints.py --cases 10000 --seed 0

A case damages one file of a tiny checkpoint: bytes at random, or, of a file with a structure, one of its
values. Whatever the file says then, nothing else may be raised, no file outside the folder be read, and time
and memory stay within bounds; more memory than `MEMORY` cannot be had at all. The last line that is printed
is a JSON object with the number of cases by outcome and the failures.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
import tiny_checkpoints as tiny
from fixtures.archive import read_archive

from jaxattn.checkpoints import CheckpointError, inspect, load_params

MEMORY = 3 * 2**30
"""Bytes of address space that all cases together may take beyond what sound checkpoints took."""
SECONDS = 20.0
"""What a case may take: many times what it does, on a busy machine."""
DECOY = 777.0
"""The numbers of an array outside the checkpoint, to which hostile files point."""


# Checkpoints to damage.


def write_all(root: Path) -> dict[str, Path]:
    """A tiny checkpoint of every format, by name."""
    config, tensors = tiny.LLAMA, tiny.random_tensors(tiny.LLAMA)
    tree = tiny.flax_tree(tensors)
    folders = {
        "msgpack": tiny.write_msgpack(root / "msgpack", config, tree),
        "sharded msgpack": tiny.write_sharded(root / "sharded", config, tree),
        "safetensors": tiny.write_safetensors(root / "safetensors", config, tensors),
        "sharded safetensors": tiny.write_sharded_safetensors(root / "shards", config, tensors),
    }
    writers = {"orbax": tiny.save_standard, "zarr": tiny.save_no_ocdbt, "zarr3": tiny.save_zarr3}
    for name, save in writers.items():
        folders[name] = tiny.write_config(root / name, config)
        save(folders[name] / "params", tree)
    for name in ("orbax_0_2_aggregated", "orbax_0_2_manager", "orbax_0_3_ocdbt", "flax_training"):
        folders[name] = root / name
        read_archive(name, folders[name])
    folders["gemma library"] = root / "gemma"
    read_archive("gemma_library_3_flat", folders["gemma library"])
    return folders


# Damage. Every function takes what is there and returns what to put in its place.


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, overwrite or insert."""
    if not data:
        return rng.randbytes(rng.randrange(64))
    at, size = rng.randrange(len(data)), min(rng.choice((1, 4, 8, 64, 1024)), len(data))
    kind = rng.choice(("cut", "flip", "overwrite", "insert", "repeat"))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 8))):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(damaged)
    other = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), data[:size]))
    if kind == "overwrite":
        return data[:at] + other + data[at + size :]
    if kind == "insert":
        return data[:at] + other + data[at:]
    return data + data[at:]


def hostile_value(outside: Path, rng: random.Random) -> Any:
    """What no writer puts there."""
    deep: Any = []
    for _ in range(rng.choice((3, 400))):
        deep = [deep]
    numbers = (None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), [10**12, 10**12], [-1])
    paths = (str(outside), f"{outside}/array", "../outside/array", "../outside.safetensors", "a/../../b")
    words = ("", "x" * 5000, "\0", "..", "/dev/zero", "1000000000000", "O", "I8", "float8_e4m3fn")
    return rng.choice((*numbers, *paths, *words, [], {}, {"dtype": "F64"}, deep))


def damage_value(value: Any, outside: Path, rng: random.Random) -> Any:
    """Replace, drop, rename or repeat one value somewhere within."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places or rng.random() < 0.02:
        return hostile_value(outside, rng)
    parent, key = rng.choice(places)
    kind = rng.choice(("replace", "replace", "replace", "drop", "rename", "grow"))
    if kind == "drop":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[str(hostile_value(outside, rng))] = parent.pop(key)
    elif kind == "grow" and isinstance(parent[key], int | float | str):
        old = parent[key]
        parent[key] = f"{old}/../{old}" if isinstance(old, str) else old * 10**9
    else:
        parent[key] = hostile_value(outside, rng)
    return value


def damage_json(data: bytes, outside: Path, rng: random.Random) -> bytes:
    """One value of a JSON file."""
    return json.dumps(damage_value(json.loads(data), outside, rng)).encode()


def damage_safetensors(data: bytes, outside: Path, rng: random.Random) -> bytes:
    """One value of the header, whose length stays right or becomes hostile."""
    (size,) = struct.unpack("<Q", data[:8])
    header = damage_json(data[8 : 8 + size], outside, rng)
    claimed = rng.choice((len(header),) * 8 + (0, 2**40, 2**64 - 1))
    return struct.pack("<Q", claimed) + header + data[8 + size :]


def damage_msgpack(data: bytes, outside: Path, rng: random.Random) -> bytes:
    """One value of the tree, or of what stands for an array: shape, dtype and bytes."""
    tree = msgpack.unpackb(data, strict_map_key=False)

    def open_arrays(node: Any) -> Any:
        if isinstance(node, msgpack.ExtType) and node.code == 1:
            return {"": list(msgpack.unpackb(node.data))}
        return {key: open_arrays(child) for key, child in node.items()} if isinstance(node, dict) else node

    def close_arrays(node: Any) -> Any:
        if isinstance(node, dict):
            if list(node) == [""]:
                return msgpack.ExtType(rng.choice((1,) * 9 + (2, 3, 99)), pack(node[""]))
            return {key: close_arrays(child) for key, child in node.items()}
        return node

    return pack(close_arrays(damage_value(open_arrays(tree), outside, rng)))


def pack(value: Any) -> bytes:
    """As msgpack; numbers that are too large for it raise OverflowError."""
    packed = msgpack.packb(value)
    assert packed is not None
    return packed


def damage_file(path: Path, outside: Path, rng: random.Random) -> None:
    """Damage one file, as its format allows."""
    data = path.read_bytes()
    kind = rng.random()
    if kind < 0.03:
        path.unlink()
        return
    if kind < 0.06:
        path.unlink()
        path.symlink_to(rng.choice((path, path.parent, outside / "missing")))
        return
    structured: dict[str, Callable[[bytes, Path, random.Random], bytes]] = {
        ".json": damage_json,
        ".safetensors": damage_safetensors,
        ".msgpack": damage_msgpack,
    }
    is_json = path.name.startswith((".z", "_")) or path.name == "zarr.json"
    is_msgpack = path.name.startswith("checkpoint")
    damage = damage_json if is_json else damage_msgpack if is_msgpack else structured.get(path.suffix)
    if damage is None or rng.random() < 0.35:
        path.write_bytes(damage_bytes(data, rng))
        return
    try:
        path.write_bytes(damage(data, outside, rng))
    except (ValueError, OverflowError, TypeError):  # cannot be written in this format at all
        path.write_bytes(damage_bytes(data, rng))


# Running.


class OpenedFiles:
    """Files that Python opens, those of libraries left out; C++ libraries are watched by the decoy."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.watching = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.watching and event == "open" and isinstance(arguments[0], str):
            self.paths.add(arguments[0])

    def outside(self, root: Path, folder: Path) -> list[str]:
        """Of the files under `root`, those outside the folder; a config.json beside it may be looked for."""
        found = (Path(os.path.normpath(path)) for path in self.paths)
        return [
            str(path)
            for path in found
            if path.is_relative_to(root) and not path.is_relative_to(folder) and path.name != "config.json"
        ]


def run_case(folder: Path) -> str:
    """Look at a checkpoint, and load it: how that ended.

    Raises:
        Exception: What should not have been raised.
    """
    try:
        inspect(folder)
        params = load_params(folder)
    except CheckpointError as error:
        if not str(error).strip():
            raise AssertionError("an error without a message") from error
        return "refused"
    for leaf in jax.tree.leaves(params):
        if np.any(np.asarray(leaf, np.float32) == DECOY):
            raise AssertionError("numbers from outside the checkpoint")
    return "loaded"


def cases(number: int, seed: int, root: Path) -> Iterator[tuple[str, str]]:
    """Every case with its outcome: "loaded", "refused", or what went wrong."""
    sound, outside, folder = write_all(root / "sound"), root / "outside", root / "case"
    tiny.save_no_ocdbt(outside, {"array": np.full((24,), DECOY, np.float32)})
    (root / "outside.safetensors").write_bytes((sound["safetensors"] / "model.safetensors").read_bytes())
    opened = OpenedFiles()
    for name, path in sound.items():
        assert run_case(path) == "loaded", name
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    for i in range(number):
        rng = random.Random(f"{seed}, {i}")
        name = rng.choice(list(sound))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound[name], folder)
        file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        damage_file(file, outside, rng)
        opened.paths.clear()
        started, opened.watching = time.monotonic(), True
        try:
            outcome = run_case(folder)
        except BaseException:
            outcome = traceback.format_exc(limit=-3)[-3000:]
        opened.watching = False
        seconds = time.monotonic() - started
        if seconds > SECONDS:
            outcome = f"took {seconds:.0f} s"
        if strays := opened.outside(root, folder):
            outcome = f"read {strays}"
        yield f"{seed}, {i}: {name}, {file.relative_to(folder)}", outcome


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    failures = {}
    with tempfile.TemporaryDirectory() as root:
        for case, outcome in cases(arguments.cases, arguments.seed, Path(root).resolve()):
            kind = outcome if outcome in ("loaded", "refused") else "failed"
            counts[kind] += 1
            if kind == "failed":
                failures[case] = outcome
    print(json.dumps({"counts": counts, "failures": failures}))


if __name__ == "__main__":
    main()
