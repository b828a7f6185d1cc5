"""Reading: weights that fit their config are read, converted and put into their places, leaf by leaf."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.layouts.rows import Layout, leaf_name
from jaxattn.checkpoints.opening import Checkpoint
from jaxattn.compiling.compiles import compile_cache
from jaxattn.models import abstract_params
from jaxattn.models.params import Params

_SHOWN_AFTER = 1.0
"""Seconds before there is a bar."""


def read_params(
    checkpoint: Checkpoint,
    *,
    check_finite: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    stop: threading.Event | None = None,
) -> Params:
    """Read the weights and convert them, one by one, each into its place. This can be done once.

    A bar on standard error, if that is a terminal, shows how far it is where this takes more than a second.

    Args:
        checkpoint: The weights.
        check_finite: Whether to look for NaN and infinity in what the leaves have become.
        cache_dir: Folder of the persistent compilation cache for the programs that convert.
        stop: An event that ends the reading at the next leaf.

    Returns:
        The parameters, on the device.

    Raises:
        CheckpointError: If a file is damaged, or a number is not finite.
        CancelledError: If reading was stopped.
    """
    plan, finite = checkpoint.plan, {}
    filling = Filling(
        abstract_params(plan.config, checkpoint.dtype, checkpoint.mesh, stack_layers=checkpoint.stack_layers)
    )
    with reading_bar(sum(checkpoint.sizes.values())) as advance:
        for source, stored in checkpoint.weights.read(set(checkpoint.sizes)):
            for name in [name for name in plan.sources if plan.sources[name] == source]:
                with compile_cache(cache_dir):
                    layer = np.int32(plan.layers[name])
                    leaf = convert(stored, layer, layout=plan.layouts[name], dtype=checkpoint.dtype)
                    filling.put(name, leaf)
                    if check_finite:
                        finite[name] = is_finite(leaf)
            del stored  # no more than this one leaf is held beside the result
            if stop is not None and stop.is_set():
                raise CancelledError
            advance(checkpoint.sizes[source])
    bad = [f"{name}, from {plan.sources[name]}" for name in finite if not finite[name]]
    if bad:
        what = f"NaN or infinite numbers, as {checkpoint.dtype.name}, in"
        raise CheckpointError("\n  ".join([f"the weights have {what}:", *bad]))
    return filling.tree()


@functools.partial(jax.jit, static_argnames=("layout", "dtype"))
def convert(stored: jax.Array, layer: jax.typing.ArrayLike, *, layout: Layout, dtype: jnp.dtype) -> jax.Array:
    """A stored array, or a layer of it, as a leaf of the decoder; one small program per kind of leaf."""
    return layout.to_decoder(stored, layer).astype(dtype)


@jax.jit
def is_finite(leaf: jax.Array) -> jax.Array:
    """Whether all numbers are finite."""
    return jnp.isfinite(leaf).all()


class Filling:
    """Parameters that are being filled in, leaf by leaf.

    Args:
        abstract: Their shapes and places.
    """

    def __init__(self, abstract: Params) -> None:
        self._abstract = abstract
        self._places = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(abstract)}
        self._leaves: dict[str, jax.Array] = {}

    def put(self, name: str, leaf: jax.Array) -> None:
        """Put a leaf where it belongs, and wait until it is there.

        Args:
            name: The leaf as tables name it, with the number of its layer even where layers are stacked.
            leaf: The array, of one layer.
        """
        if name in self._places:
            self._leaves[name] = jax.device_put(leaf, self._places[name].sharding).block_until_ready()
            return
        layers, number, rest = name.split(".", 2)
        name = f"{layers}.{rest}"
        if name not in self._leaves:
            place = self._places[name]
            self._leaves[name] = jnp.zeros(place.shape, place.dtype, device=place.sharding)
        self._leaves[name] = _insert(self._leaves[name], leaf, int(number)).block_until_ready()

    def tree(self) -> Params:
        """The parameters, when all are there."""
        return jax.tree.map_with_path(lambda path, _: self._leaves[leaf_name(path)], self._abstract)


@functools.partial(jax.jit, donate_argnames="stack")
def _insert(stack: jax.Array, leaf: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, leaf, number, 0)


@contextlib.contextmanager
def reading_bar(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes that have been read; a bar shows them after a while.

    There is none where standard error is no terminal.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    # Imported here, as no session needs it before it loads, and few do at a terminal.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("reading weights", total=num_bytes)
    timer = threading.Timer(_SHOWN_AFTER, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda read: bar.advance(task, read)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
