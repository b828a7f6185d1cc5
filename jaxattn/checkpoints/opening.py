"""Opening: find a checkpoint and compare its names and shapes with its config; no weight is read yet.

A path goes one way: where the weights are (`locate`), which decoder their config describes (`families`), what
is stored (`formats`), whose names that has (`layouts.names`), which leaf becomes which (`layouts.match`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.families.config_json import read_config
from jaxattn.checkpoints.families.without_config import infer_config
from jaxattn.checkpoints.formats.open import open_weights
from jaxattn.checkpoints.formats.weights import Leaf, Weights
from jaxattn.checkpoints.layouts.match import LoadPlan, match
from jaxattn.checkpoints.layouts.names import choose_table
from jaxattn.checkpoints.layouts.user_tables import LeafTable, resolve_table
from jaxattn.checkpoints.locate import CONFIG, Format, as_path, locate
from jaxattn.checkpoints.manifest import verify_manifest
from jaxattn.models import DecoderConfig

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights that fit their config, and have not been read yet.

    Attributes:
        format: What they are stored as: "safetensors", "msgpack" or "orbax".
        weights: The stored arrays.
        sizes: Stored bytes of each leaf that will be read.
        plan: Which stored leaf becomes which of the decoder's.
        dtype: The dtype that parameters will have.
        mesh: The devices they go to; None for one.
        stack_layers: Whether layers will be stacked.
    """

    format: Format
    weights: Weights
    sizes: Mapping[str, int]
    plan: LoadPlan
    dtype: jnp.dtype
    mesh: Mesh | None
    stack_layers: bool


def open_checkpoint(
    path: str | os.PathLike[str],
    config: DecoderConfig | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    table: LeafTable | None = None,
    mesh: Mesh | None = None,
    stack_layers: bool = False,
    verify: bool = False,
) -> Checkpoint:
    """Find a checkpoint and compare its names and shapes with its config.

    Config and table are looked at before the weights are, so that what is wrong with them is said at once.

    Args:
        path: A folder that holds a checkpoint, or the very file or Orbax folder.
        config: The decoder; read from the checkpoint's config.json where None.
        dtype: The dtype of the parameters; the stored one where None.
        table: Names of leaves that are not known here.
        mesh: The devices.
        stack_layers: Whether layers will be stacked.
        verify: Whether to compare files with their checksums first.

    Raises:
        ValueError: If `dtype` is not one to load in.
        CheckpointError: If there is nothing at the path that fits.
    """
    given_dtype = None if dtype is None else _check_dtype(dtype)
    location = locate(path)
    if verify:
        verify_manifest(location)
    file = location.find_config() if config is None else None
    config = config if file is None else read_config(file)
    rows = None
    if table is not None:
        if config is None:
            raise location.no_config()
        rows = resolve_table(table, config)
    weights = open_weights(location)
    leaves = weights.leaves
    config = infer_config(location, leaves) if config is None else config
    plan = match(leaves, config, choose_table(leaves, config) if rows is None else rows)
    return Checkpoint(
        format=location.format,
        weights=weights,
        sizes={source: leaves[source].num_bytes for source in plan.sources.values()},
        plan=plan,
        dtype=_stored_dtype(leaves[plan.sources["embed"]]) if given_dtype is None else given_dtype,
        mesh=mesh,
        stack_layers=stack_layers,
    )


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
