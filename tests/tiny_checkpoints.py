"""Tiny Llama checkpoints with Hugging Face's names, written by Flax and Orbax themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

Tree = dict[str, Any]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}


def random_tree(config: dict[str, Any], *, seed: int = 0, head: bool | None = None) -> Tree:
    """Weights so large that attention is far from uniform; a head unless the config ties it."""
    rng = np.random.default_rng(seed)
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N = config["num_attention_heads"]
    H = config.get("head_dim") or D // N
    K = config.get("num_key_value_heads") or N

    def matrix(rows: int, columns: int) -> Tree:
        return {"kernel": (2 * rng.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)}

    def norm() -> Tree:
        return {"weight": rng.uniform(0.5, 1.5, D).astype(np.float32)}

    def layer() -> Tree:
        return {
            "input_layernorm": norm(),
            "self_attn": {
                "q_proj": matrix(D, N * H),
                "k_proj": matrix(D, K * H),
                "v_proj": matrix(D, K * H),
                "o_proj": matrix(N * H, D),
            },
            "post_attention_layernorm": norm(),
            "mlp": {"gate_proj": matrix(D, F), "up_proj": matrix(D, F), "down_proj": matrix(F, D)},
        }

    tree: Tree = {
        "model": {
            "embed_tokens": {"embedding": rng.standard_normal((V, D)).astype(np.float32)},
            "layers": {str(i): layer() for i in range(config["num_hidden_layers"])},
            "norm": norm(),
        }
    }
    if not config.get("tie_word_embeddings", False) if head is None else head:
        tree["lm_head"] = matrix(D, V)
    return tree


def as_linen_users_write_it(tree: Tree, config: dict[str, Any]) -> Tree:
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


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Write config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_msgpack(folder: Path, config: dict[str, Any], tree: Tree) -> Path:
    """A folder as Hugging Face's Flax models are saved."""
    write_config(folder, config)
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    return folder


def write_sharded(folder: Path, config: dict[str, Any], tree: Tree) -> Path:
    """The same in two files and an index."""
    write_config(folder, config)
    shards = {"flax_model-00001-of-00002.msgpack": {"model": tree["model"]}}
    shards["flax_model-00002-of-00002.msgpack"] = {"lm_head": tree["lm_head"]}
    for name, shard in shards.items():
        (folder / name).write_bytes(serialization.msgpack_serialize(shard))
    weight_map = {"/".join(shard): name for name, shard in shards.items()}
    index = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / "flax_model.msgpack.index.json").write_text(index)
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
