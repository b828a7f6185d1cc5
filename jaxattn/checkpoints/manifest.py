"""A manifest of checksums beside the weights: no format but this tells of a flipped bit in Orbax's data.

    {"files": {"config.json": "9f86…", "params/_METADATA": "60a9…"}}

Names are relative to the folder of the manifest, with slashes; values are SHA-256 sums.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from jaxattn.checkpoints.errors import CheckpointError, summarize
from jaxattn.checkpoints.locate import Location, as_path

MANIFEST = "jaxattn-manifest.json"


def write_manifest(path: str | os.PathLike[str]) -> Path:
    """Write the checksums of all files in a checkpoint's folder, for `verify=True` of `load_params`.

    Args:
        path: The folder of the checkpoint. A manifest that is there is replaced.

    Returns:
        The manifest, `jaxattn-manifest.json` in that folder.

    Raises:
        CheckpointError: If there is no such folder, or no file in it.
    """
    folder = as_path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give that of the checkpoint")
    sums = {file.relative_to(folder).as_posix(): _sha256(file) for file in _files(folder)}
    if not sums:
        raise CheckpointError(f"{folder} has no files to write a manifest of")
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": sums}, indent=1) + "\n")
    return manifest


def verify_manifest(location: Location) -> None:
    """Compare weights, and all that is listed with them, with the manifest beside or above them.

    Raises:
        CheckpointError: If there is no manifest, or a file is missing, changed or unlisted. All of them are
            listed.
    """
    manifest = _find(location)
    folder = manifest.parent
    sums = _read(manifest)
    unlisted = {file.relative_to(folder).as_posix() for file in _weights(location.weights)} - sums.keys()
    problems = [f"not in the manifest: {name}" for name in sorted(unlisted)]
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"missing: {name}")
        elif _sha256(file) != expected:
            problems.append(f"changed: {name}")
    if problems:
        raise CheckpointError("\n  ".join([f"files are not those of {manifest}:", *problems]))


def _find(location: Location) -> Path:
    given = location.given if location.given.is_dir() else location.given.parent
    between = [folder for folder in location.weights.parents if folder.is_relative_to(given)]
    folders = dict.fromkeys([location.weights, *between, given, given.parent])
    for folder in folders:
        if (folder / MANIFEST).is_file():
            return folder / MANIFEST
    raise CheckpointError(
        f"no {MANIFEST} for {location.weights}; write it with write_manifest while the files are known to be "
        f"right, or load without verify"
    )


def _read(manifest: Path) -> dict[str, str]:
    try:
        sums = dict(json.loads(manifest.read_bytes())["files"])
    except (ValueError, RecursionError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{manifest} is no manifest: {summarize(error)}") from error
    for name in sums:
        if Path(name).is_absolute() or ".." in name.split("/") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{manifest} names {name!r}; only files beside it are read")
    return sums


def _weights(weights: Path) -> Iterator[Path]:
    """All files that may be read as these weights."""
    if weights.is_dir():
        yield from _files(weights)
    else:
        yield weights
        yield from weights.parent.glob(
            f"*{weights.suffixes[0]}" if ".index" in weights.name else weights.name
        )


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST)


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {summarize(error)}") from error
