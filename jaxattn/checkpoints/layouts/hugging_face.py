"""Which stored leaf is which of the decoder's: Hugging Face's names, in torch and in Flax."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jaxattn.checkpoints.layouts.gemma_library import gemma_table, is_gemma_library
from jaxattn.checkpoints.layouts.mapping import HEAD, Leaf, spelled_shapes
from jaxattn.checkpoints.layouts.maxtext import is_maxtext, maxtext_table
from jaxattn.checkpoints.layouts.rows import LAYERS, Row
from jaxattn.models import DecoderConfig

# Torch stores matrices as [out, in].
TORCH = (
    Row("embed", "model.embed_tokens.weight", "v d -> v d"),
    Row("layers.{i}.attention_norm", "model.layers.{i}.input_layernorm.weight", "d -> d"),
    Row("layers.{i}.q", "model.layers.{i}.self_attn.q_proj.weight", "(n h) d -> d n h"),
    Row("layers.{i}.k", "model.layers.{i}.self_attn.k_proj.weight", "(k h) d -> d k h"),
    Row("layers.{i}.v", "model.layers.{i}.self_attn.v_proj.weight", "(k h) d -> d k h"),
    Row("layers.{i}.q_bias", "model.layers.{i}.self_attn.q_proj.bias", "(n h) -> n h"),
    Row("layers.{i}.k_bias", "model.layers.{i}.self_attn.k_proj.bias", "(k h) -> k h"),
    Row("layers.{i}.v_bias", "model.layers.{i}.self_attn.v_proj.bias", "(k h) -> k h"),
    Row("layers.{i}.q_norm", "model.layers.{i}.self_attn.q_norm.weight", "h -> h"),
    Row("layers.{i}.k_norm", "model.layers.{i}.self_attn.k_norm.weight", "h -> h"),
    Row("layers.{i}.o", "model.layers.{i}.self_attn.o_proj.weight", "d (n h) -> n h d"),
    Row("layers.{i}.mlp_norm", "model.layers.{i}.post_attention_layernorm.weight", "d -> d"),
    Row("layers.{i}.gate", "model.layers.{i}.mlp.gate_proj.weight", "f d -> d f"),
    Row("layers.{i}.up", "model.layers.{i}.mlp.up_proj.weight", "f d -> d f"),
    Row("layers.{i}.down", "model.layers.{i}.mlp.down_proj.weight", "d f -> f d"),
    Row("final_norm", "model.norm.weight", "d -> d"),
    Row(HEAD, "lm_head.weight", "v d -> d v"),
)

# What a decoder with norms after attention and MLP, too, calls otherwise: "post" is then no longer "pre".
POST_NORMS = (
    Row("layers.{i}.post_attention_norm", "model.layers.{i}.post_attention_layernorm.weight", "d -> d"),
    Row("layers.{i}.mlp_norm", "model.layers.{i}.pre_feedforward_layernorm.weight", "d -> d"),
    Row("layers.{i}.post_mlp_norm", "model.layers.{i}.post_feedforward_layernorm.weight", "d -> d"),
)

# What Phi-3 fuses.
FUSED = (
    Row("layers.{i}.q", "model.layers.{i}.self_attn.qkv_proj.weight[0]", "(n h + k h + k h) d -> d n h"),
    Row("layers.{i}.k", "model.layers.{i}.self_attn.qkv_proj.weight[1]", "(n h + k h + k h) d -> d k h"),
    Row("layers.{i}.v", "model.layers.{i}.self_attn.qkv_proj.weight[2]", "(n h + k h + k h) d -> d k h"),
    Row("layers.{i}.gate", "model.layers.{i}.mlp.gate_up_proj.weight[0]", "(f + f) d -> d f"),
    Row("layers.{i}.up", "model.layers.{i}.mlp.gate_up_proj.weight[1]", "(f + f) d -> d f"),
)


def torch_table(config: DecoderConfig, *, fused: bool = False) -> tuple[Row, ...]:
    """The rows of a decoder; a leaf of a later group replaces that of an earlier one.

    Args:
        config: The decoder.
        fused: Whether projections are stored as Phi-3 does.
    """
    groups = (TORCH, POST_NORMS if config.post_norms else (), FUSED if fused else ())
    return tuple({row.destination: row for group in groups for row in group}.values())


def flax_table(config: DecoderConfig, *, fused: bool = False) -> tuple[Row, ...]:
    """The same in Flax, which stores kernels as [in, out], and calls them so."""
    return tuple(map(_in_flax, torch_table(config, fused=fused)))


def choose_table(leaves: Mapping[str, Leaf], config: DecoderConfig) -> tuple[Row, ...]:
    """The table that the names of stored leaves look like.

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
    fused = any("/qkv_proj/" in name for name in shapes)
    flax = any(name.endswith(("/kernel", "/embedding")) for name in shapes)
    table = flax_table(config, fused=fused) if flax else torch_table(config, fused=fused)
    scanned = any(re.match(r"layers/\D", name) for name in shapes)
    return tuple(map(_scanned, table)) if scanned else table


def _scanned(row: Row) -> Row:
    """A row of layers that nn.scan or nnx.scan has stacked."""
    if "{i}" not in row.source:
        return row
    name = re.sub(r"([./])\{i\}", "", row.source)
    return row._replace(source=name, axes=f"{LAYERS} {row.axes}")


def _in_flax(row: Row) -> Row:
    source = row.source.replace(".", "/")
    if row.destination == "embed":
        return row._replace(source=source.replace("/weight", "/embedding"))
    if len(row.stored_axes) == 1:
        return row._replace(source=source)
    rows, columns = row.stored_axes
    wanted = row.axes.partition(" -> ")[2]
    return row._replace(source=source.replace("/weight", "/kernel"), axes=f"{columns} {rows} -> {wanted}")
