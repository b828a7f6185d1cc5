"""Names and axes of Hugging Face, in torch and in Flax, its layers apart or scanned."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxattn.checkpoints.layouts.rows import HEAD, LAYERS, LeafRow
from jaxattn.models import DecoderConfig

# Torch stores matrices as [out, in].
TORCH = (
    LeafRow("embed", "model.embed_tokens.weight", "v d -> v d"),
    LeafRow("layers.{i}.attention_norm", "model.layers.{i}.input_layernorm.weight", "d -> d"),
    LeafRow("layers.{i}.q", "model.layers.{i}.self_attn.q_proj.weight", "(n h) d -> d n h"),
    LeafRow("layers.{i}.k", "model.layers.{i}.self_attn.k_proj.weight", "(k h) d -> d k h"),
    LeafRow("layers.{i}.v", "model.layers.{i}.self_attn.v_proj.weight", "(k h) d -> d k h"),
    LeafRow("layers.{i}.q_bias", "model.layers.{i}.self_attn.q_proj.bias", "(n h) -> n h"),
    LeafRow("layers.{i}.k_bias", "model.layers.{i}.self_attn.k_proj.bias", "(k h) -> k h"),
    LeafRow("layers.{i}.v_bias", "model.layers.{i}.self_attn.v_proj.bias", "(k h) -> k h"),
    LeafRow("layers.{i}.q_norm", "model.layers.{i}.self_attn.q_norm.weight", "h -> h"),
    LeafRow("layers.{i}.k_norm", "model.layers.{i}.self_attn.k_norm.weight", "h -> h"),
    LeafRow("layers.{i}.o", "model.layers.{i}.self_attn.o_proj.weight", "d (n h) -> n h d"),
    LeafRow("layers.{i}.mlp_norm", "model.layers.{i}.post_attention_layernorm.weight", "d -> d"),
    LeafRow("layers.{i}.gate", "model.layers.{i}.mlp.gate_proj.weight", "f d -> d f"),
    LeafRow("layers.{i}.up", "model.layers.{i}.mlp.up_proj.weight", "f d -> d f"),
    LeafRow("layers.{i}.down", "model.layers.{i}.mlp.down_proj.weight", "d f -> f d"),
    LeafRow("final_norm", "model.norm.weight", "d -> d"),
    LeafRow(HEAD, "lm_head.weight", "v d -> d v"),
)

# What a decoder with norms after attention and MLP, too, calls otherwise: "post" is then no longer "pre".
POST_NORMS = (
    LeafRow("layers.{i}.post_attention_norm", "model.layers.{i}.post_attention_layernorm.weight", "d -> d"),
    LeafRow("layers.{i}.mlp_norm", "model.layers.{i}.pre_feedforward_layernorm.weight", "d -> d"),
    LeafRow("layers.{i}.post_mlp_norm", "model.layers.{i}.post_feedforward_layernorm.weight", "d -> d"),
)

# What Phi-3 fuses.
FUSED = (
    LeafRow("layers.{i}.q", "model.layers.{i}.self_attn.qkv_proj.weight[0]", "(n h + k h + k h) d -> d n h"),
    LeafRow("layers.{i}.k", "model.layers.{i}.self_attn.qkv_proj.weight[1]", "(n h + k h + k h) d -> d k h"),
    LeafRow("layers.{i}.v", "model.layers.{i}.self_attn.qkv_proj.weight[2]", "(n h + k h + k h) d -> d k h"),
    LeafRow("layers.{i}.gate", "model.layers.{i}.mlp.gate_up_proj.weight[0]", "(f + f) d -> d f"),
    LeafRow("layers.{i}.up", "model.layers.{i}.mlp.gate_up_proj.weight[1]", "(f + f) d -> d f"),
)


def torch_table(config: DecoderConfig, *, fused: bool = False) -> tuple[LeafRow, ...]:
    """The rows of a decoder; a leaf of a later group replaces that of an earlier one.

    Args:
        config: The decoder.
        fused: Whether projections are stored as Phi-3 does.
    """
    groups = (TORCH, POST_NORMS if config.post_norms else (), FUSED if fused else ())
    return tuple({row.destination: row for group in groups for row in group}.values())


def flax_table(config: DecoderConfig, *, fused: bool = False) -> tuple[LeafRow, ...]:
    """The same in Flax, which stores kernels as [in, out], and calls them so."""
    return tuple(map(_in_flax, torch_table(config, fused=fused)))


def hugging_face_table(names: Iterable[str], config: DecoderConfig) -> tuple[LeafRow, ...]:
    """The rows of a decoder whose leaves have Hugging Face's names, in torch or Flax, apart or scanned.

    Args:
        names: What is stored, in the one spelling.
        config: The decoder.
    """
    names = list(names)
    fused = any("/qkv_proj/" in name for name in names)
    flax = any(name.endswith(("/kernel", "/embedding")) for name in names)
    table = flax_table(config, fused=fused) if flax else torch_table(config, fused=fused)
    scanned = any(re.match(r"layers/\D", name) for name in names)
    return tuple(map(_scanned, table)) if scanned else table


def _scanned(row: LeafRow) -> LeafRow:
    """A row of layers that nn.scan or nnx.scan has stacked."""
    if "{i}" not in row.source:
        return row
    name = re.sub(r"([./])\{i\}", "", row.source)
    return row._replace(source=name, axes=f"{LAYERS} {row.axes}")


def _in_flax(row: LeafRow) -> LeafRow:
    source = row.source.replace(".", "/")
    if row.destination == "embed":
        return row._replace(source=source.replace("/weight", "/embedding"))
    if len(row.stored_words) == 1:
        return row._replace(source=source)
    rows, columns = row.stored_words
    wanted = " ".join(row.decoder_letters)
    return row._replace(source=source.replace("/weight", "/kernel"), axes=f"{columns} {rows} -> {wanted}")
