"""Opening: find a checkpoint and compare it with its config; nothing is read yet."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.families.gemma_variants import config_of_variant
from jaxattn.checkpoints.families.hf_config import read_config
from jaxattn.checkpoints.filling import Filling
from jaxattn.checkpoints.formats.weights import Weights
from jaxattn.checkpoints.layouts.gemma_library import is_gemma_library
from jaxattn.checkpoints.layouts.hugging_face import choose_table
from jaxattn.checkpoints.layouts.mapping import Leaf, Plan, match, spelled_shapes
from jaxattn.checkpoints.layouts.maxtext import is_maxtext
from jaxattn.checkpoints.layouts.rows import Layout
from jaxattn.checkpoints.layouts.user_tables import Table, resolve_table
from jaxattn.checkpoints.locate import CONFIG, Location, as_path, locate
from jaxattn.checkpoints.manifest import verify_manifest
from jaxattn.models import DecoderConfig, abstract_params
from jaxattn.models.params import Params

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
                layer = np.int32(plan.layers[name])
                leaf = convert(stored, layer, layout=plan.layouts[name], dtype=self.dtype)
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


@functools.partial(jax.jit, static_argnames=("layout", "dtype"))
def convert(stored: jax.Array, layer: jax.typing.ArrayLike, *, layout: Layout, dtype: jnp.dtype) -> jax.Array:
    """A stored array, or a layer of it, as a leaf of the decoder; one small program per kind of leaf."""
    return layout.to_decoder(stored, layer).astype(dtype)


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
    file = location.find_config() if config is None else None
    config = read_config(file) if file is not None else config
    if config is None and table is not None:
        raise location.no_config()
    rows = None if config is None or table is None else resolve_table(table, config)
    weights = open_weights(location)
    leaves = weights.leaves
    config = infer_config(location, leaves) if config is None else config
    plan = match(leaves, config, choose_table(leaves, config) if rows is None else rows)
    wanted = _stored_dtype(leaves[plan.sources["embed"]]) if wanted is None else wanted
    sizes = {source: leaves[source].num_bytes for source in plan.sources.values()}
    return Checkpoint(format_of(location), weights, sizes, plan, wanted, mesh, stack_layers)


def format_of(location: Location) -> str:
    """The format of weights: "safetensors", "msgpack" or "orbax"."""
    return "orbax" if location.is_orbax else "safetensors" if location.is_safetensors else "msgpack"


def load_config(path: str | os.PathLike[str]) -> DecoderConfig:
    """Read the configuration of a checkpoint; of a released Gemma that has none, tell it from its shapes.

    Args:
        path: The checkpoint, or its config.json.

    Raises:
        CheckpointError: If there is no config, or it is not one that the decoder can follow.
    """
    given = as_path(path)
    if given.suffix == ".json" and not given.name.endswith(".index.json"):
        return read_config(given)
    if (given / CONFIG).is_file():
        return read_config(given / CONFIG)
    location = locate(given)
    file = location.find_config()
    return infer_config(location, open_weights(location).leaves) if file is None else read_config(file)


def infer_config(location: Location, leaves: Mapping[str, Leaf]) -> DecoderConfig:
    """The config of weights beside which there is none.

    Raises:
        CheckpointError: If nothing tells.
    """
    shapes = spelled_shapes(leaves)
    if is_gemma_library(shapes):
        return config_of_variant(shapes)
    if is_maxtext(shapes):
        raise CheckpointError(
            f"{location.no_config()}. MaxText writes none: put the config.json of the model's Hugging Face "
            "repository beside the weights, or give config="
        )
    raise location.no_config()


def open_weights(location: Location) -> Weights:
    """Open weights in the format they are in.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    # Imported here, as Orbax takes 0.6 s and Flax 0.4 s of a session's start, `import jaxattn` 1 s,
    # and many sessions load nothing.
    if location.is_old_orbax:
        from jaxattn.checkpoints.formats.old_orbax import open_old_orbax

        return open_old_orbax(location.weights)
    if location.is_orbax:
        from jaxattn.checkpoints.formats.orbax import open_orbax

        return open_orbax(location.weights)
    if location.is_safetensors:
        from jaxattn.checkpoints.formats.safetensors import open_safetensors

        return open_safetensors(location.weights)
    from jaxattn.checkpoints.formats.msgpack import open_msgpack

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
