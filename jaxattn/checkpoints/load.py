"""Loading: open a checkpoint, then read it while programs compile; and what that took."""

from __future__ import annotations

import functools
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxattn.checkpoints.layouts.match import LoadPlan
from jaxattn.checkpoints.layouts.rows import HEAD
from jaxattn.checkpoints.layouts.user_tables import LeafTable
from jaxattn.checkpoints.opening import open_checkpoint
from jaxattn.checkpoints.reading import read_params
from jaxattn.compiling.compiles import count_compiles
from jaxattn.models import CompiledSteps, DecoderConfig, Model
from jaxattn.models.params import Params

COMPILE_MODES = ("overlap", "lazy", "none")

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What loading a model took.

    Attributes:
        format: How the weights are stored: "safetensors", "msgpack" or "orbax".
        seconds: The time from beginning to end.
        reading_seconds: The time that reading and converting weights took.
        compiling_seconds: The time that compiling programs took; with compile="overlap", during the reading.
        bytes_read: The bytes of the leaves that were read, as they are stored.
        result_bytes: The bytes of the parameters.
        num_params: The numbers in the parameters.
        peak_host_bytes: The most memory that the process had resident, beyond what it had before. It counts
            pages of mapped files, and on a CPU the result. None where the system does not tell, or the
            process had more at some time before.
        programs: The names of the compiled programs.
        cache_hits: The programs, also those that convert, that JAX's persistent compilation cache had. Those
            of other threads of the process are counted too.
        cache_misses: The programs that the cache was asked for, and did not have.
    """

    format: str
    seconds: float
    reading_seconds: float
    compiling_seconds: float
    bytes_read: int
    result_bytes: int
    num_params: int
    peak_host_bytes: int | None
    programs: tuple[str, ...]
    cache_hits: int
    cache_misses: int


@dataclass(frozen=True, slots=True)
class LoadedModel(Model):
    """A model from a checkpoint.

    Attributes:
        report: What loading the model took.
    """

    report: LoadReport


def load_params(
    path: str | os.PathLike[str],
    config: DecoderConfig | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    table: LeafTable | None = None,
    mesh: Mesh | None = None,
    stack_layers: bool = False,
    check_finite: bool = False,
    verify: bool = False,
) -> Params:
    """Load the parameters of a checkpoint.

    A bar on standard error, if that is a terminal, shows how far it is where this takes more than a second.

    Args:
        path: A folder that holds a checkpoint, or the very file or Orbax folder.
        config: The decoder; read from the checkpoint's config.json where None.
        dtype: The dtype of the parameters: "float32", "bfloat16" or "float16". None keeps the stored dtype;
            where dtypes are mixed, all leaves are brought to that of the embedding.
        table: What the leaves are called and how their axes lie, for names that are not known here: rows
            (`LeafRow`), or a JSON file of them (`read_table`).
        mesh: The devices that the parameters go to, divided among them as `abstract_params` says. Each leaf
            passes through the first one as a whole.
        stack_layers: Whether to stack the leaves of all layers: programs then run layers in a loop, compile
            faster, and run slower (see `models/stacked.py`).
        check_finite: Whether to look for NaN and infinity in the parameters.
        verify: Whether to compare all files with the checksums of `write_manifest` first.

    Returns:
        The parameters that `forward` takes, on the device, with the shapes of `abstract_params`. They have a
        head even where the config ties it to the embedding, if one is stored.

    Raises:
        ValueError: If `dtype` is none of these.
        CheckpointError: If there is no one checkpoint at the path, a file is damaged, weights and config do
            not fit, the table cannot be followed, or what `check_finite` or `verify` looks for is found.

    Warns:
        UserWarning: If the config ties the head to the embedding, but a different one is stored.
    """
    checkpoint = open_checkpoint(
        path, config, dtype=dtype, table=table, mesh=mesh, stack_layers=stack_layers, verify=verify
    )
    params = read_params(checkpoint, check_finite=check_finite)
    _warn_of_other_head(checkpoint.plan, params)
    return params


def load_model(
    path: str | os.PathLike[str],
    config: DecoderConfig | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    table: LeafTable | None = None,
    buckets: Sequence[Callable[[CompiledSteps], object]] = (),
    compile: str = "overlap",
    cache_dir: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    stack_layers: bool = False,
    check_finite: bool = False,
    verify: bool = False,
) -> LoadedModel:
    """Load a checkpoint as a model, with the programs of its buckets.

    Args:
        path: A folder that holds a checkpoint, or the very file or Orbax folder.
        config: The decoder; read from the checkpoint's config.json where None.
        dtype: The dtype of the parameters: "float32", "bfloat16" or "float16"; the stored one where None.
        table: What the leaves are called, for names that are not known here: rows, or a JSON file of them.
        buckets: What will be run: plans of `plan_generation`, or any other functions that have the programs
            they are called with compile what is needed.
        compile: When programs are compiled. "overlap": those of the buckets while the weights are being read;
            shapes are known before. "lazy": each when it is first used. "none": not at all; the model is for
            its parameters, and its programs raise.
        cache_dir: Folder of JAX's persistent compilation cache for all programs of this model, so that no
            later start compiles them again. JAX's own setting holds for everything else, and where None.
            Other threads may load with other folders at the same time.
        mesh: The devices that the parameters go to, and that the model runs on.
        stack_layers: Whether to stack the leaves of all layers: programs compile faster and run slower.
        check_finite: Whether to look for NaN and infinity in the parameters.
        verify: Whether to compare all files with the checksums of `write_manifest` first.

    Returns:
        The model, with a report. Its config has an untied head if one is stored.

    Raises:
        ValueError: If `dtype` or `compile` is none of these, or a bucket cannot be compiled.
        CheckpointError: If the checkpoint cannot be loaded as it is, as by `load_params`.

    Warns:
        UserWarning: If the config ties the head to the embedding, but a different one is stored.
    """
    if compile not in COMPILE_MODES:
        raise ValueError(f"unknown compile={compile!r}; use one of {', '.join(map(repr, COMPILE_MODES))}")
    started, memory = time.perf_counter(), HostMemory()
    cache_dir = None if cache_dir is None else Path(cache_dir).expanduser().absolute()
    with count_compiles() as compiles:
        checkpoint = open_checkpoint(
            path, config, dtype=dtype, table=table, mesh=mesh, stack_layers=stack_layers, verify=verify
        )
        config = checkpoint.plan.config
        compiled = CompiledSteps(
            config, checkpoint.dtype, mesh, cache_dir, stack_layers, may_compile=compile != "none"
        )
        compiling_seconds, stop = 0.0, threading.Event()
        read = functools.partial(
            read_params, checkpoint, check_finite=check_finite, cache_dir=cache_dir, stop=stop
        )
        with ThreadPoolExecutor(max_workers=1) as reader:
            reading = reader.submit(_timed, read)
            try:
                # In the calling thread, where JAX's context managers around the call hold.
                if compile == "overlap":
                    _, compiling_seconds = _timed(lambda: [bucket(compiled) for bucket in buckets])
                params, reading_seconds = reading.result()
            except BaseException:
                stop.set()
                raise
    _warn_of_other_head(checkpoint.plan, params)
    leaves = jax.tree.leaves(params)
    report = LoadReport(
        format=checkpoint.format,
        seconds=time.perf_counter() - started,
        reading_seconds=reading_seconds,
        compiling_seconds=compiling_seconds,
        bytes_read=sum(checkpoint.sizes.values()),
        result_bytes=sum(leaf.nbytes for leaf in leaves),
        num_params=sum(leaf.size for leaf in leaves),
        peak_host_bytes=memory.extra(),
        programs=compiled.names,
        cache_hits=compiles.cache_hits,
        cache_misses=compiles.cache_misses,
    )
    return LoadedModel(config, params, compiled, report)


def _timed[T](function: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and how many seconds it took."""
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def _warn_of_other_head(plan: LoadPlan, params: Params) -> None:
    if plan.overrules_tie and not (params[HEAD] == params["embed"].T).all():
        warnings.warn(
            "tie_word_embeddings is true, but the checkpoint stores a head that is not the embedding; "
            "the stored head is used",
            UserWarning,
            stacklevel=3,
        )


class HostMemory:
    """The memory of this process, watched from now on."""

    def __init__(self) -> None:
        self._resident, self._peak = _memory()

    def extra(self) -> int | None:
        """The most that was resident since then beyond what was then; None where that is not known."""
        _, peak = _memory()
        if self._resident is None or self._peak is None or peak is None or peak <= self._peak:
            return None
        return peak - self._resident


def _memory() -> tuple[int | None, int | None]:
    """Bytes resident now, and the most there ever were."""
    if not _STATUS.exists():
        return None, None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
    resident, most = (lines.get(name) for name in ("VmRSS", "VmHWM"))
    if resident is None or most is None:  # as in some sandboxes
        return None, None
    return 1024 * int(resident.split()[0]), 1024 * int(most.split()[0])
