"""Weights in an Orbax folder."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from jaxattn.checkpoints.errors import CheckpointError, summarize
from jaxattn.checkpoints.formats.weights import Leaf, check_chunks, join, leads_outside, walk
from jaxattn.checkpoints.locate import ORBAX_METADATA

_GROUP_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class OrbaxWeights:
    """Arrays that are still on disk.

    Attributes:
        folder: The Orbax folder.
        metadata: Its tree, with metadata for leaves.
    """

    folder: Path
    metadata: Any

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        """What is stored, weights or not."""
        return {join(path): _leaf(entry) for path, entry in walk(self.metadata)}

    def read(self, names: set[str]) -> Iterator[tuple[str, jax.Array]]:
        """Bring arrays to the device, float64 as float32: some at once, as Orbax reads many at a time.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        for group in _groups({name: leaf for name, leaf in self.leaves.items() if name in names}):
            wanted = _keep(self.metadata, group)
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
            tree = _call(self.folder, lambda handler, folder, args=args: handler.restore(folder, args=args))
            arrays = {join(path): array for path, array in walk(tree)}
            del tree
            while arrays:  # each is given up as it is handed on
                yield arrays.popitem()


def _groups(leaves: Mapping[str, Leaf]) -> Iterator[set[str]]:
    """Leaves in groups that are small beside a model, but for leaves that are not themselves.

    The largest come first, when there is least beside them.
    """
    group, num_bytes = set(), 0
    for name, leaf in sorted(leaves.items(), key=lambda item: -item[1].num_bytes):
        if group and num_bytes + leaf.num_bytes > _GROUP_BYTES:
            yield group
            group, num_bytes = set(), 0
        group.add(name)
        num_bytes += leaf.num_bytes
    if group:
        yield group


def open_orbax(folder: Path) -> OrbaxWeights:
    """Read what an Orbax folder says of its arrays.

    Raises:
        CheckpointError: If its metadata is missing or damaged, or leads outside the folder.
    """
    _check_names(folder / ORBAX_METADATA)
    metadata = _call(folder, lambda handler, folder: handler.metadata(folder).tree)
    for path, entry in walk(metadata):
        storage = getattr(entry, "storage", None)
        if storage is not None:
            check_chunks(join(path), entry.shape, storage.chunk_shape or ())
    return OrbaxWeights(folder, metadata)


def write_orbax(folder: Path, tree: Any) -> None:
    """Write an Orbax folder, and wait until that is done."""

    def write() -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, tree)
            checkpointer.wait_until_finished()

    _in_own_thread(write)


class PatientHandler:
    """One of Orbax's type handlers, with failures as results.

    Orbax lets the first array that fails end its event loop. Each of the others, still under way,
    then prints a page to stderr.
    """

    def __init__(self, handler: ocp.type_handlers.TypeHandler):
        self._handler = handler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    async def metadata(self, infos: Sequence[Any]) -> list[Any]:
        """Metadata of each array, or what went wrong."""
        return await _settle(self._handler.metadata([info]) for info in infos)

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Each array, or what went wrong."""
        pairs = zip(infos, args, strict=True)
        return await _settle(self._handler.deserialize([info], [arg]) for info, arg in pairs)


async def _settle(calls: Iterable[Coroutine[Any, Any, Sequence[Any]]]) -> list[Any]:
    """The one result of each call, or its exception, once all have ended."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    return [result if isinstance(result, BaseException) else result[0] for result in results]


def _call(folder: Path, function: Callable[[ocp.PyTreeCheckpointHandler, epath.Path], Any]) -> Any:
    """Have Orbax's handler read a tree from a folder.

    The handler itself, as a Checkpointer would turn its errors into a None and a log line.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    types = ocp.type_handlers
    patient = ((kind, PatientHandler(types.get_type_handler(kind))) for kind in types.supported_types())
    registry: Any = types.create_type_handler_registry(*patient)  # type: ignore[arg-type]
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        tree = _in_own_thread(lambda: function(handler, epath.Path(folder)))
    # Orbax raises whatever it stumbles over.
    except Exception as error:
        raise CheckpointError(
            f"cannot read {folder}, a file is missing or damaged: {summarize(error)}"
        ) from error
    failures = {join(path): leaf for path, leaf in walk(tree) if isinstance(leaf, BaseException)}
    if failures:
        (name, error), *others = failures.items()
        more = f" and {len(others)} more" if others else ""
        raise CheckpointError(
            f"cannot read {name}{more} in {folder}, a file is missing or damaged: {summarize(error)}"
        ) from error
    return tree


def _in_own_thread[T](function: Callable[[], T]) -> T:
    """Call a function in a thread of its own.

    Orbax runs an event loop. A notebook's thread is running one already, which Orbax answers by
    patching asyncio for the whole process.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function).result()


def _check_names(file: Path) -> None:
    """Refuse names of leaves that are paths to somewhere else: Orbax would follow them."""
    try:
        entries = json.loads(file.read_bytes())["tree_metadata"].values()
        names = [".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} does not exist; was the checkpoint saved or copied in full?"
        ) from error
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {summarize(error)}") from error
    for name in names:
        if leads_outside(name):
            raise CheckpointError(f"{file} names an array outside its folder: {name!r}")


def _leaf(entry: Any) -> Leaf:
    """The shape and dtype of an array; the kind of anything else."""
    shape, dtype = getattr(entry, "shape", None), getattr(entry, "dtype", None)
    if shape is None or dtype is None:
        return Leaf((), type(entry).__name__)
    return Leaf(tuple(shape), jnp.dtype(dtype).name)


def _keep(tree: Any, names: set[str], path: tuple[str | int, ...] = ()) -> Any:
    """The part of a metadata tree that leads to some leaves, and the arrays to put there."""
    if isinstance(tree, Mapping):
        kept = {key: _keep(child, names, (*path, key)) for key, child in tree.items()}
        return {key: child for key, child in kept.items() if child is not None} or None
    if isinstance(tree, list | tuple):
        kept = [_keep(child, names, (*path, index)) for index, child in enumerate(tree)]
        return kept if any(child is not None for child in kept) else None
    return _leaf(tree).abstract if join(path) in names else None
