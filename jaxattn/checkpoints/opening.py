"""Opening: find a checkpoint and compare it with its config; nothing is read yet."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.hf_config import read_config
from jaxattn.checkpoints.locate import Location, locate
from jaxattn.checkpoints.manifest import verify_manifest
from jaxattn.checkpoints.mapping import Leaf, Plan, leaf_name, match
from jaxattn.checkpoints.rows import Layout
from jaxattn.checkpoints.tables import choose_table
from jaxattn.checkpoints.user_tables import Table, resolve_table
from jaxattn.checkpoints.weights import Weights
from jaxattn.models import DecoderConfig, abstract_params
from jaxattn.models.decoder import Params

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights that fit their config, and have not been read yet.

    Attributes:
        format: What they are stored as: "safetensors", "msgpack" or "orbax".
        weights: Where they are.
        sizes: Stored bytes of each leaf that is read.
        plan: What becomes of them.
        dtype: Of the parameters.
        mesh: The devices they go to, as of `abstract_params`.
        stack_layers: Whether layers are stacked.
    """

    format: str
    weights: Weights
    sizes: Mapping[str, int]
    plan: Plan
    dtype: jnp.dtype
    mesh: Mesh | None
    stack_layers: bool

    def read(self, *, check_finite: bool = False, on_read: Callable[[int], None] = lambda _: None) -> Params:
        """Read the weights and convert them, one by one, each into its place. This can be done once.

        Args:
            check_finite: Whether to look for NaN and infinity in what the leaves have become.
            on_read: Called with the stored bytes of each leaf that has been read and converted.

        Raises:
            CheckpointError: If a file is damaged, or a number is not finite.
        """
        plan, finite = self.plan, {}
        parameters = Filling(
            abstract_params(plan.config, self.dtype, self.mesh, stack_layers=self.stack_layers)
        )
        for source, stored in self.weights.read(set(self.sizes)):
            for name in [name for name in plan.sources if plan.sources[name] == source]:
                leaf = convert(stored, layout=plan.layouts[name], dtype=self.dtype)
                parameters.put(name, leaf)
                if check_finite:
                    finite[name] = is_finite(leaf)
            del stored  # no more than this one leaf is held beside the result
            on_read(self.sizes[source])
        bad = [f"{name}, from {plan.sources[name]}" for name in finite if not finite[name]]
        if bad:
            what = f"NaN or infinite numbers, as {self.dtype.name}, in"
            raise CheckpointError("\n  ".join([f"the weights have {what}:", *bad]))
        return parameters.tree()


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
            name: As tables name it, with the number of its layer even where layers are stacked.
            leaf: Of one layer.
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


@functools.partial(jax.jit, static_argnames=("layout", "dtype"))
def convert(stored: jax.Array, *, layout: Layout, dtype: jnp.dtype) -> jax.Array:
    """A stored array as a leaf of the decoder; one small program per kind of leaf."""
    return layout.to_decoder(stored).astype(dtype)


@jax.jit
def is_finite(leaf: jax.Array) -> jax.Array:
    """Whether all numbers are."""
    return jnp.isfinite(leaf).all()


def open_checkpoint(
    path: str | os.PathLike[str],
    config: DecoderConfig | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    table: Table | None = None,
    mesh: Mesh | None = None,
    stack_layers: bool = False,
    verify: bool = False,
) -> Checkpoint:
    """Find a checkpoint and compare its names and shapes with its config.

    Args:
        path: As of `load_params`.
        config: As of `load_params`.
        dtype: As of `load_params`.
        table: As of `load_params`.
        mesh: As of `load_params`.
        stack_layers: As of `load_params`.
        verify: As of `load_params`.

    Raises:
        ValueError: If `dtype` is not one to load in.
        CheckpointError: If there is nothing at the path that fits.
    """
    wanted = None if dtype is None else _check_dtype(dtype)
    location = locate(path)
    if verify:
        verify_manifest(location)
    config = read_config(location.find_config()) if config is None else config
    rows = None if table is None else resolve_table(table, config)
    weights = open_weights(location)
    leaves = weights.leaves
    plan = match(leaves, config, choose_table(leaves, config) if rows is None else rows)
    wanted = _stored_dtype(leaves[plan.sources["embed"]]) if wanted is None else wanted
    sizes = {source: leaves[source].num_bytes for source in plan.sources.values()}
    return Checkpoint(format_of(location), weights, sizes, plan, wanted, mesh, stack_layers)


def format_of(location: Location) -> str:
    """The format of weights: "safetensors", "msgpack" or "orbax"."""
    return "orbax" if location.is_orbax else "safetensors" if location.is_safetensors else "msgpack"


def open_weights(location: Location) -> Weights:
    """Open weights in the format they are in.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    # Imported here, as Orbax takes 0.6 s and Flax 0.4 s of a session's start, `import jaxattn` 1 s,
    # and many sessions load nothing.
    if location.is_orbax:
        from jaxattn.checkpoints.orbax_weights import open_orbax

        return open_orbax(location.weights)
    if location.is_safetensors:
        from jaxattn.checkpoints.safetensors_weights import open_safetensors

        return open_safetensors(location.weights)
    from jaxattn.checkpoints.msgpack_weights import open_msgpack

    return open_msgpack(location.weights)


def _check_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} cannot be loaded in; use one of {', '.join(map(repr, DTYPES))}")
    return jnp.dtype(name)


def _stored_dtype(embedding: Leaf) -> jnp.dtype:
    if embedding.dtype not in DTYPES:
        raise CheckpointError(f"the embedding is stored as {embedding.dtype}; give dtype='float32'")
    return jnp.dtype(embedding.dtype)
