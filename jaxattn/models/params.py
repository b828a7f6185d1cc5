"""The decoder's parameters: their names and shapes, how a mesh divides them, random ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from jaxattn.models.config import DecoderConfig

Params = dict[str, Any]
"""A tree of arrays; see `abstract_params`."""

MODEL_AXIS = "model"
"""The axis of a mesh along which parameters are divided."""

# The axis along which a leaf is divided among the devices of a mesh; all others lie whole on each.
_DIVIDED = {
    "q": 1,
    "k": 1,
    "v": 1,
    "o": 0,
    "q_bias": 0,
    "k_bias": 0,
    "v_bias": 0,
    "gate": 1,
    "up": 1,
    "down": 0,
}


def abstract_params(
    config: DecoderConfig,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None = None,
    *,
    stack_layers: bool = False,
) -> Params:
    """Shapes, dtypes and shardings of the parameters, without any memory behind them.

    What is compiled from these leaves serves arrays that are loaded into them, and is found again in JAX's
    persistent compilation cache, whose keys depend on how arguments are placed.

    Args:
        config: The decoder.
        dtype: The element type of every leaf.
        mesh: The devices. If it has an axis named "model", heads and the features of the MLP are divided
            along it, where it divides their number; all else is on every device. None for the first device
            alone.
        stack_layers: Whether layers are stacked.
    """
    V, D, F = config.vocab_size, config.hidden_size, config.intermediate_size
    N, K, H = config.num_q_heads, config.num_kv_heads, config.head_dim

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    layer = {
        "attention_norm": leaf(D),
        "q": leaf(D, N, H),
        "k": leaf(D, K, H),
        "v": leaf(D, K, H),
        "o": leaf(N, H, D),
        "mlp_norm": leaf(D),
        "gate": leaf(D, F),
        "up": leaf(D, F),
        "down": leaf(F, D),
    }
    if config.qkv_bias:
        layer |= {"q_bias": leaf(N, H), "k_bias": leaf(K, H), "v_bias": leaf(K, H)}
    if config.qk_norm:
        layer |= {"q_norm": leaf(H), "k_norm": leaf(H)}
    if config.post_norms:
        layer |= {"post_attention_norm": leaf(D), "post_mlp_norm": leaf(D)}
    params: Params = {
        "embed": leaf(V, D),
        "layers": tuple(dict(layer) for _ in range(config.num_layers)),
        "final_norm": leaf(D),
    }
    if not config.tie_embeddings:
        params["head"] = leaf(D, V)
    params = jax.tree.map_with_path(
        lambda path, leaf: leaf.update(sharding=_placed(path[-1].key, leaf.shape, mesh)), params
    )
    if stack_layers:
        first, *_ = params["layers"]
        params["layers"] = jax.tree.map(lambda leaf: _stacked(leaf, config.num_layers), first)
    return params


def replicated(mesh: Mesh | None) -> Sharding:
    """The sharding of what lies whole on every device of a mesh; without one, on the first device."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    # What is divided is the compiler's business, also in meshes whose axes would have it in the types.
    automatic = (AxisType.Auto,) * len(mesh.axis_names)
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names, axis_types=automatic), PartitionSpec())


def _placed(name: str, shape: tuple[int, ...], mesh: Mesh | None) -> Sharding:
    """How a leaf of this name lies on a mesh: divided, where the devices divide its axis; else whole."""
    whole = replicated(mesh)
    axis = _DIVIDED.get(name)
    if axis is None or not isinstance(whole, NamedSharding) or MODEL_AXIS not in whole.mesh.axis_names:
        return whole
    if shape[axis] % whole.mesh.shape[MODEL_AXIS]:
        return whole
    return NamedSharding(whole.mesh, PartitionSpec(*[None] * axis, MODEL_AXIS))


def _stacked(leaf: jax.ShapeDtypeStruct, num_layers: int) -> jax.ShapeDtypeStruct:
    """The leaf of all layers, with their axis in front, placed as the leaf of one."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.ShapeDtypeStruct((num_layers, *leaf.shape), leaf.dtype, sharding=sharding)


def init_params(key: Array, config: DecoderConfig, dtype: jax.typing.DTypeLike = "float32") -> Params:
    """Random parameters: norms by one, no biases, matrices with a standard deviation of fan_in ** -0.5."""
    abstract = abstract_params(config, dtype)
    leaves, tree = jax.tree.flatten_with_path(abstract)

    def init(key: Array, path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.full(leaf.shape, 0 if config.norm_offset else 1, leaf.dtype)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if name == "embed":
            return (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
        fan_in = leaf.shape[0] * leaf.shape[1] if name == "o" else leaf.shape[0]
        return (fan_in**-0.5 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree, [init(key, path, leaf) for key, (path, leaf) in zip(keys, leaves, strict=True)]
    )
