"""Names and axes of MaxText, its layers apart or scanned.

MaxText stores numbers as its own layers want them, which for some families is not how others store them:

- A decoder without norms of queries has the scale of attention in its query projections; Qwen 2 has not.
- With Llama 3.1's rotary embedding, pairs that are turned lie beside each other.
- Gemma's norms are stored with their 1 added, and its embedding with its scale.
- Gemma 2 is a sequence of pairs, a layer with a window and one without; Gemma 3, scanned, one of sixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np

from jaxattn.checkpoints.layouts.rows import HEAD, LAYERS, UNPAD, LeafRow, Op
from jaxattn.models import DecoderConfig

_MODEL = (
    LeafRow("embed", "token_embedder/embedding", "v d -> v d", ((UNPAD, "v"),)),
    LeafRow("final_norm", "decoder/decoder_norm/scale", "d -> d"),
    LeafRow(HEAD, "decoder/logits_dense/kernel", "d v -> d v", ((UNPAD, "v"),)),
)
# What follows a layer's prefix; {kind} is which of a pair it is.
_LAYER = (
    LeafRow("attention_norm", "pre_self_attention_layer_norm/scale", "d -> d"),
    LeafRow("q", "self_attention{kind}/query/kernel", "d n h -> d n h"),
    LeafRow("k", "self_attention{kind}/key/kernel", "d k h -> d k h"),
    LeafRow("v", "self_attention{kind}/value/kernel", "d k h -> d k h"),
    LeafRow("q_bias", "self_attention{kind}/query/bias", "n h -> n h"),
    LeafRow("k_bias", "self_attention{kind}/key/bias", "k h -> k h"),
    LeafRow("v_bias", "self_attention{kind}/value/bias", "k h -> k h"),
    LeafRow("q_norm", "self_attention{kind}/query_norm/scale", "h -> h"),
    LeafRow("k_norm", "self_attention{kind}/key_norm/scale", "h -> h"),
    LeafRow("o", "self_attention{kind}/out/kernel", "n h d -> n h d"),
    LeafRow("mlp_norm", "post_self_attention_layer_norm/scale", "d -> d"),
    LeafRow("gate", "mlp{kind}/wi_0/kernel", "d f -> d f"),
    LeafRow("up", "mlp{kind}/wi_1/kernel", "d f -> d f"),
    LeafRow("down", "mlp{kind}/wo/kernel", "f d -> f d"),
)
_GEMMA_NORMS = (
    LeafRow("attention_norm", "pre_self_attention_norm{kind}/scale", "d -> d"),
    LeafRow("post_attention_norm", "post_self_attention_norm{kind}/scale", "d -> d"),
    LeafRow("mlp_norm", "pre_ffw_norm{kind}/scale", "d -> d"),
    LeafRow("post_mlp_norm", "post_ffw_norm{kind}/scale", "d -> d"),
)

_KINDS = ("_local", "_global")


def is_maxtext(names: Iterable[str]) -> bool:
    """Whether leaves are named so."""
    return any(name.startswith("decoder/layers") for name in names)


def maxtext_table(names: Iterable[str], config: DecoderConfig) -> tuple[LeafRow, ...]:
    """The rows of a decoder.

    Args:
        names: What is stored, in the one spelling.
        config: The decoder.
    """
    groups = (_LAYER, _GEMMA_NORMS if config.norm_offset else ())
    layer = {row.destination: row for group in groups for row in group}.values()
    rows = list(_MODEL)
    for i, (prefix, kind, scanned) in enumerate(_places(list(names), config.num_layers)):
        for row in layer:
            source = f"{prefix}/{row.source.format(kind=kind)}"
            axes = _with_layers(row.axes) if scanned else row.axes
            rows.append(LeafRow(f"layers.{i}.{row.destination}", source, axes))
    return tuple(row._replace(ops=(*row.ops, *_ops(row.destination, config))) for row in rows)


def _places(names: list[str], num_layers: int) -> Iterator[tuple[str, str, bool]]:
    """Of each layer its prefix, which of a pair it is, and whether it is in a stack."""
    scanned = any(name.startswith("decoder/layers/") for name in names)
    paired = any("_local/" in name for name in names)
    blocks = {name.split("/")[2] for name in names if name.startswith("decoder/layers/layers_")}
    num_in_blocks = num_layers - num_layers % len(blocks) if blocks else num_layers
    for i in range(num_layers):
        if i >= num_in_blocks:
            yield f"decoder/layers_remainder/layers_{i - num_in_blocks}", "", False
        elif blocks:
            yield f"decoder/layers/layers_{i % len(blocks)}", "", True
        else:
            block, kind = (i // 2, _KINDS[i % 2]) if paired else (i, "")
            yield ("decoder/layers" if scanned else f"decoder/layers_{block}"), kind, scanned


def _with_layers(axes: str) -> str:
    """Layers are stacked on the second axis."""
    first, rest = axes.split(" ", maxsplit=1)
    return f"{first} {LAYERS} {rest}"


def _ops(destination: str, config: DecoderConfig) -> tuple[Op, ...]:
    """What undoes what MaxText did to a leaf."""
    leaf = destination.rpartition(".")[2]
    ops: list[Op] = []
    if leaf in ("q", "k") and config.ropes[0].kind == "llama3":
        ops.append(("rope_deinterleave", "h"))
    if leaf == "q" and not config.qk_norm and not config.qkv_bias:
        ops.append(("scale", 1 / (config.attention_scale or config.head_dim**-0.5)))
    if leaf.endswith("_norm") and config.norm_offset:
        ops.append(("add", -1.0))
    if leaf == "embed" and config.embedding_scale is not None:
        ops.append(("scale", 1 / _stored_embedding_scale(config)))
    return tuple(ops)


def _stored_embedding_scale(config: DecoderConfig) -> float:
    """The scale that is in an embedding; MaxText rounds that of Gemma 3."""
    scale = config.embedding_scale or 1.0
    return float(np.float32(scale).astype(jnp.bfloat16)) if config.qk_norm else scale
