"""Names and axes of the gemma library, in its layouts: nested, flat with slashes in its keys, stacked."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jaxattn.checkpoints.errors import CheckpointError
from jaxattn.checkpoints.layouts.rows import LAYERS, UNPAD, LeafRow
from jaxattn.models import DecoderConfig

# The files of Gemma 1 and 2 have 256128 rows of embeddings, for 256000 tokens.
_MODEL = (
    LeafRow("embed", "embedder/input_embedding", "v d -> v d", ((UNPAD, "v"),)),
    LeafRow("final_norm", "final_norm/scale", "d -> d"),
)
_LAYER = (
    LeafRow("attention_norm", "pre_attention_norm/scale", "d -> d"),
    LeafRow("q", "attn/q_einsum/w", "n d h -> d n h"),
    LeafRow("k", "attn/kv_einsum/w[0]", "2 k d h -> d k h"),
    LeafRow("v", "attn/kv_einsum/w[1]", "2 k d h -> d k h"),
    LeafRow("q_norm", "attn/_query_norm/scale", "h -> h"),
    LeafRow("k_norm", "attn/_key_norm/scale", "h -> h"),
    LeafRow("o", "attn/attn_vec_einsum/w", "n h d -> n h d"),
    LeafRow("post_attention_norm", "post_attention_norm/scale", "d -> d"),
    LeafRow("mlp_norm", "pre_ffw_norm/scale", "d -> d"),
    LeafRow("gate", "mlp/gating_einsum[0]", "2 f d -> d f"),
    LeafRow("up", "mlp/gating_einsum[1]", "2 f d -> d f"),
    LeafRow("down", "mlp/linear", "f d -> f d"),
    LeafRow("post_mlp_norm", "post_ffw_norm/scale", "d -> d"),
)
# As many heads of keys as of queries: Gemma 7B.
_FUSED = (
    LeafRow("q", "attn/qkv_einsum/w[0]", "3 n d h -> d n h"),
    LeafRow("k", "attn/qkv_einsum/w[1]", "3 k d h -> d k h"),
    LeafRow("v", "attn/qkv_einsum/w[2]", "3 k d h -> d k h"),
)
# Gemma 1, and Gemma 2 2B.
_UNTRANSPOSED = (
    LeafRow("gate", "mlp/gating_einsum[0]", "2 d f -> d f"),
    LeafRow("up", "mlp/gating_einsum[1]", "2 d f -> d f"),
)

_STACKED = re.compile(r"^stacked_layers/attention_type_(\d+)/")


def is_gemma_library(names: Mapping[str, object]) -> bool:
    """Whether leaves are named so."""
    return "embedder/input_embedding" in names


def gemma_table(shapes: Mapping[str, tuple[int, ...]], config: DecoderConfig) -> tuple[LeafRow, ...]:
    """The rows of a decoder.

    Args:
        shapes: What is stored, by name in the one spelling.
        config: The decoder.

    Raises:
        CheckpointError: If the shapes do not tell which axis of the MLP is which.
    """
    groups = [
        _LAYER,
        _FUSED if any("/qkv_einsum/" in name for name in shapes) else (),
        () if _is_transposed(shapes, config) else _UNTRANSPOSED,
    ]
    layer = {row.destination: row for group in groups for row in group}.values()
    # Layers that have the same place in the pattern of windows are one stack.
    pattern = max((int(found[1]) + 1 for name in shapes if (found := _STACKED.match(name))), default=0)
    prefixes = [
        f"stacked_layers/attention_type_{i % pattern}" if pattern else f"layer_{i}"
        for i in range(config.num_layers)
    ]
    stack = f"{LAYERS} " if pattern else ""
    return _MODEL + tuple(
        LeafRow(f"layers.{i}.{row.destination}", f"{prefix}/{row.source}", stack + row.axes)
        for i, prefix in enumerate(prefixes)
        for row in layer
    )


def _is_transposed(shapes: Mapping[str, tuple[int, ...]], config: DecoderConfig) -> bool:
    d, f = config.hidden_size, config.intermediate_size
    stored = {shape[-2:] for name, shape in shapes.items() if name.endswith("/mlp/gating_einsum")}
    if d == f and stored:
        raise CheckpointError(
            f"hidden_size and intermediate_size are both {d}, so the shape of gating_einsum does not tell "
            "its axes apart; convert the checkpoint to Hugging Face's names"
        )
    return (d, f) not in stored
