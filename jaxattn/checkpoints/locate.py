"""Where in a user's folder the weights and the config are, told from file names alone."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxattn.checkpoints.errors import CheckpointError

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
)
SUFFIXES = (".safetensors", ".safetensors.index.json", ".msgpack", ".msgpack.index.json")
ORBAX_METADATA = "_METADATA"
OCDBT_MANIFEST = "manifest.ocdbt"
OLD_ORBAX_TREE = "checkpoint"
"""The tree of an Orbax folder of before version 0.4, which has no metadata."""
CONFIG = "config.json"

Format = Literal["safetensors", "msgpack", "orbax"]

# Files of an Orbax folder; the second alone tells of one whose save was never finished.
_ORBAX_FILES = (ORBAX_METADATA, OCDBT_MANIFEST, OLD_ORBAX_TREE)
# A step's folder, or a file or folder of flax.training.checkpoints.
_STEP = re.compile(r"(checkpoint_)?(\d+)")
# Parts of an Orbax folder that look like one, as each process leaves its own.
_ORBAX_INNER = "ocdbt.process_"
# Where a CheckpointManager puts the weights among other items of a step, the likeliest first.
_STEP_ITEMS = ("default", "state", "params", "items", "model")

_REFUSED = {
    ".safetensors": "it has safetensors files, but none named model.safetensors, nor a "
    "model.safetensors.index.json that lists them; give the path of the one to load",
    ".bin": "PyTorch's format is pickle, which runs code when opened; save the model as safetensors",
}
_REFUSED |= dict.fromkeys((".pt", ".pth", ".pkl", ".pickle", ".ckpt"), _REFUSED[".bin"])


@dataclass(frozen=True, slots=True)
class Location:
    """Weights that were found.

    Attributes:
        given: The path that the user gave.
        weights: A `.safetensors` or `.msgpack` file, the `.index.json` of either, a msgpack file
            `checkpoint_7`, or an Orbax folder.
    """

    given: Path
    weights: Path

    @property
    def is_orbax(self) -> bool:
        """Whether the weights are an Orbax folder."""
        return self.weights.is_dir()

    @property
    def is_old_orbax(self) -> bool:
        """Whether they are one of before version 0.4."""
        return not (self.weights / ORBAX_METADATA).is_file() and (self.weights / OLD_ORBAX_TREE).is_file()

    @property
    def format(self) -> Format:
        """How the weights are stored; "orbax" also for folders of before version 0.4."""
        if self.is_orbax:
            return "orbax"
        return "safetensors" if self.weights.name.endswith(SUFFIXES[:2]) else "msgpack"

    def find_config(self) -> Path | None:
        """The config.json that belongs to the weights, if there is one.

        It is looked for in the given folder, then beside the weights and upwards to the given
        folder, then in the given folder's parent.
        """
        files = (folder / CONFIG for folder in self._config_folders())
        return next((file for file in files if file.is_file()), None)

    def no_config(self) -> CheckpointError:
        """The error where there is none, which says where it was looked for."""
        folders = self._config_folders()
        return CheckpointError(
            f"no {CONFIG} for the weights {self.weights}; looked in "
            + ", ".join(map(str, folders))
            + self._config_hint(folders[-1])
        )

    def _config_folders(self) -> list[Path]:
        if self.given.is_file():
            return [self.given.parent]
        beside = self.weights if self.is_orbax else self.weights.parent
        upwards = [folder for folder in (beside, *beside.parents) if folder.is_relative_to(self.given)]
        return list(dict.fromkeys([self.given, *upwards, self.given.parent]))

    @staticmethod
    def _config_hint(highest: Path) -> str:
        above = highest.parent
        if not (above / CONFIG).is_file():
            return ""
        what = f"{highest} is a step folder; its parent" if highest.name.isdigit() else f"{above}"
        return f". {what} holds a {CONFIG}: give {str(above)!r}"


def as_path(path: str | os.PathLike[str]) -> Path:
    """An absolute path that exists.

    Raises:
        CheckpointError: If it does not.
    """
    found = Path(path).expanduser().absolute()
    if not found.exists():
        raise CheckpointError(f"{found} does not exist")
    return found


def locate(path: str | os.PathLike[str]) -> Location:
    """Find the weights at a path.

    Args:
        path: A folder with the weights in one of the places where Hugging Face, Flax, Orbax and their
            users put them, or the very file or Orbax folder.

    Raises:
        CheckpointError: If there are none, more than one, or none in a format that is read.
    """
    given = as_path(path)
    found = [given] if given.is_file() else _candidates(given)
    if len(found) > 1:
        listed = "\n".join(f"  {candidate}" for candidate in found)
        raise CheckpointError(f"{given} holds more than one checkpoint; give the path of one:\n{listed}")
    if not found or not _is_readable(found[0]):
        raise CheckpointError(_why_nothing(given))
    return Location(given, found[0])


def _is_readable(path: Path) -> bool:
    return path.is_dir() or path.name.endswith(SUFFIXES) or _is_flax_training(path)


def _is_flax_training(path: Path) -> bool:
    """Whether flax.training.checkpoints may have written a file."""
    return path.is_file() and path.name.startswith("checkpoint_") and _step(path) is not None


def _step(path: Path) -> int | None:
    found = _STEP.fullmatch(path.name)
    return None if found is None else int(found[2])


def _is_orbax(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _ORBAX_FILES)


def _candidates(folder: Path) -> list[Path]:
    """Every checkpoint that a folder may mean; of numbered ones, the newest."""
    if _is_orbax(folder):
        return [folder, *_files(folder)]
    children = sorted(child for child in folder.iterdir() if not child.name.startswith(_ORBAX_INNER))
    weights = [child for child in children if _is_orbax(child) or _is_flax_training(child)]
    steps = [child for child in children if _step(child) is not None and (child.is_dir() or child in weights)]
    found = [child for child in weights if child not in steps]
    if steps:
        newest = max(steps, key=lambda child: _step(child) or 0)
        found += [newest] if newest in weights else _step_candidates(newest)
    return found + _files(folder)


def _step_candidates(step: Path) -> list[Path]:
    preferred = [step / name for name in _STEP_ITEMS if _is_orbax(step / name)]
    return preferred[:1] or _candidates(step)


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in FILES if (folder / name).is_file()]


def _why_nothing(given: Path) -> str:
    names = [given.name] if given.is_file() else sorted(child.name for child in given.iterdir())
    if not names:
        return f"{given} is an empty folder"
    for suffix, reason in _REFUSED.items():
        if any(name.endswith(suffix) for name in names):
            return f"cannot load {given}: {reason}"
    return (
        f"no checkpoint at {given}; looked for {', '.join(FILES)}, flax.training's checkpoint_N with a "
        f"number, and an Orbax folder (one with {', '.join(_ORBAX_FILES)}) there, in its folders, and in the "
        "newest of its numbered steps"
    )
