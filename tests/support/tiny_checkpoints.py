"""Tiny checkpoints with Hugging Face's names, written by safetensors, Flax and Orbax themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from safetensors.numpy import save_file

Tree = dict[str, Any]
Tensors = dict[str, np.ndarray]
Config = dict[str, Any]


def _without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


SIZES: Config = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
}
LLAMA: Config = SIZES | {"model_type": "llama", "rope_theta": 500.0}

LLAMA3_SCALING: Config = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GEMMA3: Config = SIZES | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "sliding_window": 5,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 5,
    "rope_theta": 500.0,
    "rope_local_base_freq": 20.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}

FAMILIES: dict[str, Config] = {
    "Llama 2": _without(SIZES, "num_key_value_heads", "head_dim") | {"model_type": "llama"},
    "Llama 3": LLAMA | {"rope_scaling": LLAMA3_SCALING, "tie_word_embeddings": True},
    "Mistral": SIZES | {"model_type": "mistral", "sliding_window": 5},
    "Phi-3": _without(SIZES, "head_dim") | {"model_type": "phi3", "sliding_window": 5},
    "Qwen 2": _without(SIZES, "head_dim")
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    },
    "Qwen 3": SIZES | {"model_type": "qwen3", "rope_theta": 500.0, "sliding_window": 5},
    "Gemma 1": SIZES | {"model_type": "gemma", "num_key_value_heads": 1, "hidden_act": "gelu"},
    "Gemma 2": SIZES
    | {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 5,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma 3": _GEMMA3,
    "Gemma 3 with images": {
        "model_type": "gemma3",
        "text_config": _GEMMA3,
        "vision_config": {"model_type": "siglip_vision_model"},
    },
}
"""In the dialect of transformers 4."""

LAYER_TYPES = {
    name: [kind + "_attention" for kind in kinds.split()]
    for name, kinds in {
        "Qwen 2": "full sliding",
        "Qwen 3": "full full",
        "Gemma 2": "sliding full",
        "Gemma 3": "sliding sliding full",
    }.items()
}


def as_transformers_5(name: str) -> Config:
    """The config of a family as version 5 writes it."""
    config = FAMILIES[name]
    if "text_config" in config:
        return config | {"text_config": as_transformers_5("Gemma 3"), "dtype": "float32"}
    scaling = {"rope_type": "default", **config.get("rope_scaling", {})}
    rope = {"rope_theta": config.get("rope_theta", 1e4), **scaling}
    if name == "Gemma 3":
        local = {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
        rope = {"full_attention": rope, "sliding_attention": local}
    old = (
        "rope_theta",
        "rope_scaling",
        "rope_local_base_freq",
        "sliding_window_pattern",
        "max_window_layers",
    )
    new = {"rope_parameters": rope, "dtype": "float32"}
    return _without(config, *old) | new | ({"layer_types": LAYER_TYPES[name]} if name in LAYER_TYPES else {})


def random_tensors(config: Config, *, seed: int = 0, head: bool | None = None) -> Tensors:
    """Weights with torch's names, so large that attention is far from uniform.

    Args:
        config: As in config.json.
        seed: Of the weights.
        head: Whether there is one; by default unless the config ties it.
    """
    rng = np.random.default_rng(seed)
    family, config = config["model_type"], config.get("text_config", config)
    gemma = family.startswith("gemma")
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N = config["num_attention_heads"]
    H = config.get("head_dim") or D // N
    K = config.get("num_key_value_heads") or N
    tensors = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        tensors[name + ".weight"] = 2 * rng.standard_normal((rows, columns)) / columns**0.5
        if family == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[name + ".bias"] = rng.standard_normal(rows)

    def norm(name: str, size: int = D) -> None:
        tensors[name + ".weight"] = rng.uniform(0.5, 1.5, size) - (1 if gemma else 0)

    tensors["model.embed_tokens.weight"] = rng.standard_normal((V, D)) * (D**-0.5 if gemma else 1)
    for i in range(config["num_hidden_layers"]):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        fused = family == "phi3"
        apart = {"q_proj": N * H, "k_proj": K * H, "v_proj": K * H}
        for name, rows in ({"qkv_proj": (N + 2 * K) * H} if fused else apart).items():
            matrix(attn + name, rows, D)
        matrix(attn + "o_proj", D, N * H)
        for name, rows in ({"gate_up_proj": 2 * F} if fused else {"gate_proj": F, "up_proj": F}).items():
            matrix(mlp + name, rows, D)
        matrix(mlp + "down_proj", D, F)
        if family in ("qwen3", "gemma3", "gemma3_text"):
            norm(attn + "q_norm", H)
            norm(attn + "k_norm", H)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if family in ("gemma2", "gemma3", "gemma3_text"):
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in norms:
            norm(f"model.layers.{i}.{name}")
    norm("model.norm")
    if not config.get("tie_word_embeddings", gemma) if head is None else head:
        matrix("lm_head", V, D)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def flax_tree(tensors: Mapping[str, np.ndarray]) -> Tree:
    """The same weights with the names and axes of Hugging Face's Flax models."""
    tree: Tree = {}
    for name, tensor in tensors.items():
        *folders, leaf = name.split(".")
        if folders[-1] == "embed_tokens":
            leaf = "embedding"
        elif tensor.ndim == 2:
            leaf, tensor = "kernel", tensor.T.copy()
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = tensor
    return tree


def random_tree(config: Config, *, seed: int = 0, head: bool | None = None) -> Tree:
    """Random weights as a Flax tree."""
    return flax_tree(random_tensors(config, seed=seed, head=head))


def as_linen_users_write_it(tree: Tree, config: Config) -> Tree:
    """The same weights with `layers_{i}`, `scale`, heads apart, and no `model` around them."""
    N, H = config["num_attention_heads"], config["head_dim"]
    model = tree["model"]
    own: Tree = {"embed_tokens": model["embed_tokens"], "norm": {"scale": model["norm"]["weight"]}}
    for i, layer in model["layers"].items():
        attn = {name: leaf["kernel"] for name, leaf in layer["self_attn"].items()}
        apart = {
            name: {"kernel": kernel.reshape((N, H, -1) if name == "o_proj" else (len(kernel), -1, H))}
            for name, kernel in attn.items()
        }
        own[f"layers_{i}"] = {
            "self_attn": {**apart, "rotary_emb": {"inv_freq": np.ones(H // 2, np.float32)}},
            "input_layernorm": {"scale": layer["input_layernorm"]["weight"]},
            "post_attention_layernorm": {"scale": layer["post_attention_layernorm"]["weight"]},
            "mlp": layer["mlp"],
        }
    return own | {name: leaf for name, leaf in tree.items() if name == "lm_head"}


def train_state(params: Tree) -> Tree:
    """A TrainState around parameters."""
    moments = jax.tree.map(np.zeros_like, params)
    return {"params": params, "opt_state": [{"mu": moments}, None], "step": 7}


def write_config(folder: Path, config: Config) -> Path:
    """Write config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_msgpack(folder: Path, config: Config, tree: Tree) -> Path:
    """A folder as Hugging Face's Flax models are saved."""
    write_config(folder, config)
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    return folder


def write_sharded(folder: Path, config: Config, tree: Tree) -> Path:
    """The same in two files and an index."""
    write_config(folder, config)
    embedding = {"embed_tokens": tree["model"]["embed_tokens"]}
    others = {name: child for name, child in tree["model"].items() if name != "embed_tokens"}
    shards = {
        "flax_model-00001-of-00002.msgpack": {"model": others},
        "flax_model-00002-of-00002.msgpack": {**tree, "model": embedding},
    }
    for name, shard in shards.items():
        (folder / name).write_bytes(serialization.msgpack_serialize(shard))
    weight_map = {
        jax.tree_util.keystr(path, simple=True, separator="/"): name
        for name, shard in shards.items()
        for path, _ in jax.tree.leaves_with_path(shard)
    }
    index = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / "flax_model.msgpack.index.json").write_text(index)
    return folder


def write_safetensors(folder: Path, config: Config, tensors: Mapping[str, np.ndarray]) -> Path:
    """A folder as Hugging Face's torch models are saved."""
    write_config(folder, config)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sharded_safetensors(folder: Path, config: Config, tensors: Mapping[str, np.ndarray]) -> Path:
    """The same in three files, each with some of every layer, and an index."""
    write_config(folder, config)
    weight_map = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        held = {name: value for name, value in tensors.items() if weight_map[name] == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    index = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def write_flax_safetensors(folder: Path, config: Config, tree: Tree) -> Path:
    """As Hugging Face's Flax models are saved with `safe_serialization=True`."""
    write_config(folder, config)
    paths = jax.tree.leaves_with_path(tree)
    held = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    save_file(held, folder / "model.safetensors", metadata={"format": "flax"})
    return folder


def save_standard(folder: Path, tree: Any) -> None:
    """By Orbax's StandardCheckpointer."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def save_pytree(folder: Path, tree: Tree) -> None:
    """By Orbax's PyTreeCheckpointer."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def save_no_ocdbt(folder: Path, tree: Tree) -> None:
    """One zarr array per leaf."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))


def save_zarr3(folder: Path, tree: Tree) -> None:
    """In the newer array format."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))


def save_steps(folder: Path, trees: dict[int, Tree], *, item: str | None = None) -> None:
    """By Orbax's CheckpointManager, one step per tree."""
    with ocp.CheckpointManager(folder, item_names=None if item is None else (item,)) as manager:
        for step, tree in trees.items():
            save = ocp.args.StandardSave(tree)
            manager.save(step, args=save if item is None else ocp.args.Composite(**{item: save}))
