"""The weights of tiny checkpoints as NNX, the gemma library and MaxText lay them out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_checkpoints import Config, Tensors, Tree

Flat = dict[str, np.ndarray]


def nest(flat: Mapping[str, Any]) -> Tree:
    """A tree of dictionaries, from names with slashes."""
    tree: Tree = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def scanned(tree: Tree) -> Tree:
    """A Linen tree whose layers `nn.scan` has stacked."""
    layers = tree["model"]["layers"]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(layers[str(i)] for i in range(len(layers))))
    return tree | {"model": tree["model"] | {"layers": stacked}}


def nnx_state(tree: Tree) -> nnx.State:
    """The state of an NNX model with the same names, its layers in a list, and a stream of random keys."""
    state: Tree = jax.tree.map(nnx.Param, tree)
    state["model"]["layers"] = {int(i): layer for i, layer in state["model"]["layers"].items()}
    return nnx.State(state | {"dropout": {"rngs": nnx.to_pure_dict(nnx.state(nnx.Rngs(0)))}})


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _projections(tensors: Tensors, i: int, config: Config) -> Flat:
    """Queries, keys and values `[D, heads, H]`, and the output `[N, H, D]`."""
    D, H, attn = config["hidden_size"], _head_dim(config), f"model.layers.{i}.self_attn."
    heads = {name: tensors[attn + f"{name}_proj.weight"].T.reshape(D, -1, H) for name in "qkv"}
    return heads | {"o": tensors[attn + "o_proj.weight"].T.reshape(-1, H, D)}


def gemma_nested(tensors: Tensors, config: Config, *, transposed: bool = True, padding: int = 0) -> Flat:
    """By the gemma library's names: as `gm.ckpts.save_params` writes them, with slashes for nesting.

    Args:
        tensors: With torch's names.
        config: As in config.json.
        transposed: Whether the MLP's input axis comes last, as in all but Gemma 1 and Gemma 2 2B.
        padding: Rows of the embedding beyond the vocabulary.
    """
    embedding = np.pad(tensors["model.embed_tokens.weight"], ((0, padding), (0, 0)), constant_values=7)
    flat = {"embedder/input_embedding": embedding, "final_norm/scale": tensors["model.norm.weight"]}
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if "model.layers.0.pre_feedforward_layernorm.weight" in tensors:
        norms |= {
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    if "model.layers.0.self_attn.q_norm.weight" in tensors:
        norms |= {"attn/_query_norm": "self_attn.q_norm", "attn/_key_norm": "self_attn.k_norm"}
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{i}.", f"layer_{i}/"
        heads = {
            name: x.swapaxes(0, 1) for name, x in _projections(tensors, i, config).items() if name != "o"
        }
        if heads["q"].shape == heads["k"].shape:
            flat[theirs + "attn/qkv_einsum/w"] = np.stack([heads["q"], heads["k"], heads["v"]])
        else:
            flat[theirs + "attn/q_einsum/w"] = heads["q"]
            flat[theirs + "attn/kv_einsum/w"] = np.stack([heads["k"], heads["v"]])
        flat[theirs + "attn/attn_vec_einsum/w"] = _projections(tensors, i, config)["o"]
        gating = np.stack([tensors[ours + f"mlp.{name}_proj.weight"] for name in ("gate", "up")])
        flat[theirs + "mlp/gating_einsum"] = gating if transposed else gating.swapaxes(1, 2)
        flat[theirs + "mlp/linear"] = tensors[ours + "mlp.down_proj.weight"].T
        for name, source in norms.items():
            flat[theirs + name + "/scale"] = tensors[ours + source + ".weight"]
    return {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}


def gemma_flat(nested: Flat) -> dict[str, Flat]:
    """As the released files are: keys with slashes, one dictionary per module, `w` in the MLP too."""
    flat: dict[str, Flat] = {}
    for name, leaf in nested.items():
        name = name + "/w" if name.endswith(("mlp/linear", "mlp/gating_einsum")) else name
        module, _, last = f"transformer/{name}".rpartition("/")
        flat.setdefault(module, {})[last] = leaf
    return flat


def gemma_stacked(flat: dict[str, Flat], pattern: int) -> dict[str, Flat]:
    """Layers at the same place of the pattern of windows in one array."""
    stacked: dict[str, Flat] = {}
    stacks: dict[tuple[str, str], list[np.ndarray]] = {}
    for module, leaves in flat.items():
        layer = re.search(r"layer_(\d+)", module)
        for last, leaf in leaves.items():
            if layer is None:
                stacked.setdefault(module, {})[last] = leaf
            else:
                place = f"stacked_layers/attention_type_{int(layer[1]) % pattern}"
                stacks.setdefault((module.replace(layer[0], place), last), []).append(leaf)
    for (module, last), leaves in stacks.items():
        stacked.setdefault(module, {})[last] = np.stack(leaves)
    return stacked


def gemma_multimodal(nested: Flat) -> Flat:
    """The same with a tower of vision."""
    image = np.ones((3, 3), np.float32)
    return nested | {
        "vision_encoder/siglip_encoder/embedding/kernel": image,
        "embedder/mm_input_projection/w": image,
        "embedder/mm_soft_embedding_norm/scale": image[0],
    }


def kauldron(params: Tree) -> Tree:
    """As Kauldron's trainer writes a run."""
    return {"params": params, "opt_state": {"0": {"mu": params}}, "collections": {}, "step": np.int32(3)}


def maxtext(tensors: Tensors, config: Config, *, scanned: bool, padding: int = 3) -> Tree:
    """MaxText's tree: what its converter from Hugging Face's names does to numbers, order and axes."""
    family = config["model_type"]
    flat = {"decoder/decoder_norm/scale": tensors["model.norm.weight"] + family.startswith("gemma")}
    embedding = tensors["model.embed_tokens.weight"] * _embedding_scale(config)
    flat["token_embedder/embedding"] = np.pad(embedding, ((0, padding), (0, 0)), constant_values=7)
    if "lm_head.weight" in tensors:
        flat["decoder/logits_dense/kernel"] = np.pad(tensors["lm_head.weight"].T, ((0, 0), (0, padding)))
    layers = [_maxtext_layer(tensors, config, i) for i in range(config["num_hidden_layers"])]
    if family == "gemma2":
        layers = [local | other for local, other in zip(layers[::2], layers[1::2], strict=True)]
    stacks = {"decoder/layers": layers} if scanned else {}
    if scanned and family == "gemma3_text":
        # Blocks of two here, of six there; the last layer is left over.
        stacks = {f"decoder/layers/layers_{i}": layers[i:-1:2] for i in (0, 1)}
        flat |= {f"decoder/layers_remainder/layers_0/{name}": leaf for name, leaf in layers[-1].items()}
    for prefix, stack in stacks.items():
        flat |= {f"{prefix}/{name}": np.stack([layer[name] for layer in stack], 1) for name in stack[0]}
    if not scanned:
        flat |= {f"decoder/layers_{i}/{name}": leaf for i, x in enumerate(layers) for name, leaf in x.items()}
    params = nest({name: np.asarray(leaf, np.float32, order="C") for name, leaf in flat.items()})
    return {"params": {"params": params}, "opt_state": {}, "step": np.int32(0)}


def _maxtext_layer(tensors: Tensors, config: Config, i: int) -> Flat:
    family, ours, H = config["model_type"], f"model.layers.{i}.", _head_dim(config)
    gemma = family.startswith("gemma")
    heads = _projections(tensors, i, config)
    if config.get("rope_scaling", {}).get("rope_type") == "llama3":
        heads |= {name: _side_by_side(heads[name]) for name in "qk"}
    if family in ("llama", "mistral", "gemma", "gemma2"):
        heads["q"] = heads["q"] * config.get("query_pre_attn_scalar", H) ** -0.5
    kind = ("_local", "_global")[i % 2] if family == "gemma2" else ""
    layer: Flat = {}
    for name in ("query", "key", "value", "out"):
        layer[f"self_attention{kind}/{name}/kernel"] = heads[name[0]]
        bias = tensors.get(ours + f"self_attn.{name[0]}_proj.bias")
        if bias is not None:
            layer[f"self_attention/{name}/bias"] = bias.reshape(-1, H)
        norm = tensors.get(ours + f"self_attn.{name[0]}_norm.weight")
        if norm is not None:
            layer[f"self_attention/{name}_norm/scale"] = norm + gemma
    for name, source in {"wi_0": "gate", "wi_1": "up", "wo": "down"}.items():
        layer[f"mlp{kind}/{name}/kernel"] = tensors[ours + f"mlp.{source}_proj.weight"].T
    norms = {
        "pre_self_attention_layer_norm": "input_layernorm",
        "post_self_attention_layer_norm": "post_attention_layernorm",
    }
    if gemma:
        norms = {"pre_self_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if family in ("gemma2", "gemma3_text"):
        norms |= {
            "post_self_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    for name, source in norms.items():
        layer[f"{name}{kind}/scale"] = tensors[ours + f"{source}.weight"] + gemma
    return layer


def _embedding_scale(config: Config) -> np.floating:
    scale = np.float32(config["hidden_size"] ** 0.5 if config["model_type"].startswith("gemma") else 1)
    return scale.astype(jnp.bfloat16).astype(np.float32) if config["model_type"] == "gemma3_text" else scale


def _side_by_side(heads: np.ndarray) -> np.ndarray:
    """The two numbers of a pair, which lie half a head apart, beside each other."""
    first, second = np.split(heads, 2, axis=-1)
    return np.stack([first, second], axis=-1).reshape(heads.shape)
