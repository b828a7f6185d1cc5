"""Loading: open, then read and convert while programs compile."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax

from jaxattn.checkpoints.mapping import HEAD, Plan
from jaxattn.checkpoints.opening import open_checkpoint
from jaxattn.models import DecoderConfig, Model, Programs
from jaxattn.models.decoder import Params


def load_params(
    path: str | os.PathLike[str],
    config: DecoderConfig | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Params:
    """Load the parameters of a checkpoint.

    Args:
        path: A folder that holds a checkpoint, or the very file or Orbax folder.
        config: The decoder; read from the checkpoint's config.json where None.
        dtype: Of the parameters: "float32", "bfloat16" or "float16". None keeps the stored dtype;
            where dtypes are mixed, all leaves are brought to that of the embedding.

    Returns:
        Parameters as `forward` takes them, on the device. They have a head even where the config
        ties it to the embedding, if one is stored.

    Raises:
        ValueError: If `dtype` is none of these.
        CheckpointError: If there is no one checkpoint at the path, a file is damaged, or weights
            and config do not fit.

    Warns:
        UserWarning: If the config ties the head to the embedding, but a different one is stored.
    """
    checkpoint = open_checkpoint(path, config, dtype=dtype)
    params = checkpoint.read()
    _warn_of_other_head(checkpoint.plan, params)
    return params


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    precompile: Callable[[Programs], None] | None = None,
) -> Model:
    """Load a checkpoint as a model.

    Args:
        path: A folder that holds a checkpoint, or the very file or Orbax folder.
        dtype: Of the parameters: "float32", "bfloat16" or "float16". None keeps the stored dtype;
            where dtypes are mixed, all leaves are brought to that of the embedding.
        precompile: Called with the model's programs while the weights are being read, to compile
            those that will be needed: shapes are known before.

    Returns:
        The model. Its config has an untied head if one is stored.

    Raises:
        ValueError: If `dtype` is none of these.
        CheckpointError: If there is no one checkpoint at the path, a file is damaged, or weights
            and config do not fit.

    Warns:
        UserWarning: If the config ties the head to the embedding, but a different one is stored.
    """
    checkpoint = open_checkpoint(path, dtype=dtype)
    config = checkpoint.plan.config
    programs = Programs(config, checkpoint.dtype)
    with ThreadPoolExecutor(max_workers=1) as reader:
        reading = reader.submit(checkpoint.read)
        if precompile is not None:
            # Here rather than in the thread, so that JAX's context managers around the call hold.
            precompile(programs)
        params = reading.result()
    _warn_of_other_head(checkpoint.plan, params)
    return Model(config, params, programs)


def _warn_of_other_head(plan: Plan, params: Params) -> None:
    if plan.overrules_tie and not (params[HEAD] == params["embed"].T).all():
        warnings.warn(
            "tie_word_embeddings is true, but the checkpoint stores a head that is not the embedding; "
            "the stored head is used",
            UserWarning,
            stacklevel=3,
        )
