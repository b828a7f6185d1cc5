"""Saving, in the form that Hugging Face's Flax models have as an Orbax checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.families.config_json import config_to_dict
from jaxattn.checkpoints.layouts.hugging_face import flax_table
from jaxattn.checkpoints.layouts.match import expand
from jaxattn.checkpoints.layouts.rows import Layout, leaf_name
from jaxattn.checkpoints.locate import CONFIG
from jaxattn.checkpoints.manifest import write_manifest
from jaxattn.models import DecoderConfig, abstract_params, unstack_layers
from jaxattn.models.params import Params


def save_params(path: str | os.PathLike[str], params: Params, config: DecoderConfig) -> None:
    """Write a checkpoint that `load_model` reads back, bit by bit.

    It consists of `config.json`, of an Orbax folder `params`, whose leaves are named and shaped as in
    Hugging Face's Flax models, and of a manifest of checksums. A tied head is not written.

    Args:
        path: A folder that does not exist yet, or is empty.
        params: The parameters, with the shapes of `abstract_params`, or with stacked layers.
        config: The decoder that they are for.

    Raises:
        CheckpointError: If there is something at the path, the config cannot be written, or the parameters
            are not those of the config. In all cases nothing has been written.
    """
    from jaxattn.checkpoints.formats.orbax import write_orbax  # slow to import; see formats/open.py

    folder = Path(path).expanduser().absolute()
    described = json.dumps(config_to_dict(config), indent=2)
    params = unstack_layers(params)
    _check_shapes(params, config)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder; nothing is written over")
    folder.mkdir(parents=True, exist_ok=True)
    tree = stored_tree(params, config)
    write_orbax(folder / "params", tree)
    (folder / CONFIG).write_text(described + "\n")
    write_manifest(folder)


def _check_shapes(params: Params, config: DecoderConfig) -> None:
    wanted = {leaf_name(path): leaf.shape for path, leaf in _leaves(abstract_params(config, "float32"))}
    given = {leaf_name(path): leaf.shape for path, leaf in _leaves(params)}
    wrong = [name for name in wanted | given if wanted.get(name) != given.get(name)]
    if wrong:
        raise CheckpointError(
            "the parameters do not fit the config:\n  "
            + "\n  ".join(
                f"{name} is {given.get(name)}, the config needs {wanted.get(name)}" for name in wrong
            )
        )


def stored_tree(params: Params, config: DecoderConfig) -> dict[str, Any]:
    """The decoder's parameters as the nested tree that Hugging Face's Flax models have."""
    leaves = {leaf_name(path): leaf for path, leaf in _leaves(params)}
    rows = expand(flax_table(config), config)
    layouts = {name: Layout.of(row, config) for name, row in rows.items()}
    convert = jax.jit(lambda leaves: {name: layouts[name].to_stored(leaves[name]) for name in rows})
    return _nest({rows[name].name: array for name, array in convert(leaves).items()})


_leaves = jax.tree.leaves_with_path


def _nest(leaves: dict[str, jax.Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree
