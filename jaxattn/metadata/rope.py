"""Rotary position embedding: tables once per step, for all layers that share a base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: Base of the frequencies, θ: frequency i of a head is θ^(-2i / H).
        kind: "default"; "linear", all frequencies divided by `factor`; or "llama3", those with
            long wavelengths divided by `factor`, those with short ones kept, and a ramp between.
        factor: The divisor.
        low_freq_factor: llama3: divided wholly above `original_max_position / low_freq_factor`.
        high_freq_factor: llama3: kept below `original_max_position / high_freq_factor`.
        original_max_position: llama3: context length before scaling, in tokens.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class RopeTables:
    """Cosine and sine of each token's angles, float32.

    Attributes:
        cos: Cosines of each pair of a head.
        sin: Sines.
        config: The embedding (static).
    """

    cos: Float[Array, "T half_H"]
    sin: Float[Array, "T half_H"]
    config: RopeConfig = field(metadata={"static": True})


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Float[Array, " half_H"]:
    """Angular frequency of each pair of a head, in radians per token.

    Raises:
        ValueError: If the kind of scaling is unknown.
    """
    frequencies = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    match rope.kind:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            # Turns that a frequency makes within the original context decide how far it is slowed.
            turns = rope.original_max_position * frequencies / (2 * jnp.pi)
            kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            kept = jnp.clip(kept, 0.0, 1.0)
            return kept * frequencies + (1 - kept) * frequencies / rope.factor
        case _:
            raise ValueError(f"unknown rope kind={rope.kind!r}; use 'default', 'linear' or 'llama3'")


def rope_tables(rope: RopeConfig, head_dim: int, positions: Int32[Array, " T"]) -> RopeTables:
    """Cosine and sine of each token's angles, position · frequency, for the pairs of a head.

    Args:
        rope: The embedding.
        head_dim: Size of a head, H.
        positions: Position of each token in its sequence.

    Raises:
        ValueError: If the kind of scaling is unknown.
    """
    angles = positions[:, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)[None, :]
    return RopeTables(cos=jnp.cos(angles), sin=jnp.sin(angles), config=rope)


def rotate(x: Float[Array, "T heads H"], tables: RopeTables) -> Float[Array, "T heads H"]:
    """Rotate the pairs (i, i + H/2) of each head: (a cos - b sin, b cos + a sin), in float32.

    Args:
        x: Queries or keys.
        tables: The step's tables for this rope and head dim.

    Returns:
        The same, rotated, in the dtype of `x`.

    References:
        Su et al., "RoFormer: Enhanced transformer with rotary position embedding", 2021, section 3.4.2; the
        pairs are those of GPT-NeoX.
    """
    cos, sin = tables.cos[:, None, :], tables.sin[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
