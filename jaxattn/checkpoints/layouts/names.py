"""Names of stored leaves: those of the parameters, in one spelling, and the table that they are read by."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jaxattn.checkpoints.formats.weights import Leaf
from jaxattn.checkpoints.layouts.gemma_library import gemma_table, is_gemma_library
from jaxattn.checkpoints.layouts.hugging_face import hugging_face_table
from jaxattn.checkpoints.layouts.maxtext import is_maxtext, maxtext_table
from jaxattn.checkpoints.layouts.rows import LeafRow
from jaxattn.models import DecoderConfig

# What users of Linen, NNX and multimodal models write otherwise, brought to one spelling, in this order.
SPELLINGS = (
    (r"\.", "/"),  # torch
    (r"^(\w+/)?(params/){1,2}", ""),  # the variable collection, also of a TrainState among other things
    (r"/(value|raw_value)$", ""),  # a boxed leaf: nn.with_partitioning, nnx.Param
    (r"^(model/)?language_model/", ""),  # Gemma 3 with a tower of vision: two spellings
    (r"^((model|transformer)/)+", ""),
    (r"^layers_(\d+)/", r"layers/\1/"),
    (r"/mlp/(gating_einsum|linear)/w$", r"/mlp/\1"),  # the gemma library's released files
    (r"/scale$", "/weight"),
)

# Leaves without use here: rotary embedding is computed from the config, images are not read, and NNX keeps
# random keys and optimizers beside the parameters.
IGNORED = re.compile(
    r"(^|/)(rotary_emb|vision_tower|multi_modal_projector|vision_encoder|SigLiPFromPatches_0|rngs)/"
    r"|(^|/)embedder/mm_"
    r"|^(opt_state|optimizer)/|^(step|count)(/value)?$"
)

# What tells a layout, by names in their one spelling; the first that is found.
_LAYOUTS = {
    "gemma library": r"(^|/)(q_einsum|qkv_einsum|kv_einsum|input_embedding)(/|$)",
    "MaxText": r"^(decoder/layers|decoder/decoder_norm|token_embedder)(/|$)",
    "Hugging Face, Flax": r"/self_attn/\w+/kernel$",
    "Hugging Face, torch": r"/self_attn/\w+/weight$",
}
_OWN = "own names"


def normalize(name: str) -> str:
    """A stored leaf's name in the one spelling that names are compared in."""
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def weights_among(leaves: Mapping[str, Leaf]) -> list[str]:
    """Names of the parameters, without an optimizer's state beside them, or what has no use here."""
    names = list(leaves)
    for place in (r"params/", r"\w+/params/"):
        found = [name for name in leaves if re.match(place, name)]
        if found:
            names = found
            break
    return [name for name in names if not IGNORED.search(name.replace(".", "/"))]


def spelled_shapes(leaves: Mapping[str, Leaf]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters, by name in the one spelling."""
    return {normalize(name): leaves[name].shape for name in weights_among(leaves)}


def choose_table(leaves: Mapping[str, Leaf], config: DecoderConfig) -> tuple[LeafRow, ...]:
    """The table by which leaves are read that are named like these.

    Args:
        leaves: The stored leaves, by name.
        config: The decoder.

    Raises:
        CheckpointError: If they may mean one thing or the other.
    """
    shapes = spelled_shapes(leaves)
    if is_gemma_library(shapes):
        return gemma_table(shapes, config)
    if is_maxtext(shapes):
        return maxtext_table(shapes, config)
    return hugging_face_table(shapes, config)


def name_layout(leaves: Mapping[str, Leaf]) -> str:
    """Whose names leaves have, in words; "own names" where nobody's that is known here."""
    spelled = [normalize(name) for name in weights_among(leaves)]
    found = (name for name, pattern in _LAYOUTS.items() if any(re.search(pattern, leaf) for leaf in spelled))
    return next(found, _OWN)
