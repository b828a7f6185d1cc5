"""The config of weights beside which there is none: a released Gemma's is told from the shapes.

The gemma library writes no config; MaxText writes none either, and its shapes do not tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.families.config_json import config_from_dict
from jaxattn.checkpoints.formats.weights import Leaf
from jaxattn.checkpoints.layouts.gemma_library import is_gemma_library
from jaxattn.checkpoints.layouts.maxtext import is_maxtext
from jaxattn.checkpoints.layouts.names import spelled_shapes
from jaxattn.checkpoints.locate import Location
from jaxattn.models import DecoderConfig

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_GEMMA = {"model_type": "gemma", "vocab_size": 256_000}
_GEMMA_2 = {"model_type": "gemma2", "vocab_size": 256_000, "sliding_window": 4096}
_GEMMA_3 = {"model_type": "gemma3_text", "vocab_size": 262_144}
_GEMMA_3_SMALL = _GEMMA_3 | {"sliding_window": 512}
_GEMMA_3_LARGE = _GEMMA_3 | {
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}

VARIANTS: dict[str, tuple[tuple[int, ...], Mapping[str, Any]]] = {
    "gemma 2b": ((18, 2048, 16_384, 8, 1, 256), _GEMMA),
    "gemma 7b": ((28, 3072, 24_576, 16, 16, 256), _GEMMA),
    "gemma2 2b": ((26, 2304, 9216, 8, 4, 256), _GEMMA_2),
    "gemma2 9b": ((42, 3584, 14_336, 16, 8, 256), _GEMMA_2),
    "gemma2 27b": ((46, 4608, 36_864, 32, 16, 128), _GEMMA_2 | {"query_pre_attn_scalar": 144}),
    "gemma3 270m": ((18, 640, 2048, 4, 1, 256), _GEMMA_3_SMALL),
    "gemma3 1b": ((26, 1152, 6912, 4, 1, 256), _GEMMA_3_SMALL),
    "gemma3 4b": ((34, 2560, 10_240, 8, 4, 256), _GEMMA_3_LARGE),
    "gemma3 12b": ((48, 3840, 15_360, 16, 8, 256), _GEMMA_3_LARGE),
    "gemma3 27b": ((62, 5376, 21_504, 32, 16, 128), _GEMMA_3_LARGE | {"query_pre_attn_scalar": 168}),
}
"""By name: the sizes, in the order of `_SIZES`, and the other keys of config.json that are not defaults."""


def infer_config(location: Location, leaves: Mapping[str, Leaf]) -> DecoderConfig:
    """The config of weights beside which there is none.

    Args:
        location: Where they are.
        leaves: What is stored, by name.

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


def config_of_variant(shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    """The config of weights with the gemma library's names.

    Args:
        shapes: What is stored, by name in the one spelling.

    Raises:
        CheckpointError: If they are none of the released models.
    """
    found = _sizes(shapes)
    for sizes, keys in VARIANTS.values():
        if sizes == found:
            return config_from_dict({**dict(zip(_SIZES, sizes, strict=True)), **keys})
    what = ", ".join(f"{key}={size}" for key, size in zip(_SIZES, found, strict=False))
    raise CheckpointError(
        "the weights are named as by the gemma library, but have the sizes of none of "
        f"{', '.join(VARIANTS)}: {what or 'no layers'}; give config=, or put a config.json beside them"
    )


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The sizes that weights have; empty where those of a layer are missing."""

    def last(suffix: str, num_axes: int) -> tuple[int, ...]:
        return next((shape[-num_axes:] for name, shape in shapes.items() if name.endswith(suffix)), ())

    out, linear = last("attn/attn_vec_einsum/w", 3), last("mlp/linear", 2)
    keys = last("attn/kv_einsum/w", 3) or last("attn/qkv_einsum/w", 3)
    if (len(out), len(linear), len(keys)) != (3, 2, 3):
        return ()
    num_layers = sum(
        shape[0] if name.startswith("stacked_layers/") else 1
        for name, shape in shapes.items()
        if name.endswith("attn/attn_vec_einsum/w")
    )
    return (num_layers, out[2], linear[0], out[0], keys[0], out[1])
