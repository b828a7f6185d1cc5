"""What one attention layer computes, as a static and hashable description."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxattn.batch.numbers import positive_int
from jaxattn.metadata.rope import RopeConfig


@runtime_checkable
class Visibility(Protocol):
    """A rule of which keys a token sees: static and hashable, its ranges never decreasing.

    `WindowClass` is the usual one. A spec whose `window_class` returns another is served by every
    backend, since all of them read the ranges and know nothing of the rule.
    """

    @property
    def span(self) -> int | None:
        """The most keys that one token sees; None where ranges begin with their sequence."""
        ...

    def visible_range(
        self,
        positions: Int32[Array, " T"],
        causal_ends: Int32[Array, " T"],
        kv_ends: Int32[Array, " T"],
        prefix_lm_ends: Int32[Array, " T"],
    ) -> tuple[Int32[Array, " T"], Int32[Array, " T"]]:
        """First and one past the last visible key of each token; within a sequence neither decreases.

        Args:
            positions: Position of each token in its sequence; 0 for padding.
            causal_ends: One past the token's own key; 0 for padding, which sees none.
            kv_ends: One past the last key of the token's sequence, which no range may pass; 0 for
                padding.
            prefix_lm_ends: One past the last key of the sequence's prefix that all its tokens see; 0
                where it has none.
        """
        ...


@dataclass(frozen=True, slots=True)
class WindowClass:
    """Which keys a token may see, apart from the bounds of its own sequence.

    Layers of one window class share visible key ranges and tile schedules.

    Attributes:
        causal: Whether a token sees keys up to its own position only.
        sliding_window: Number of visible keys, the token's own included, or None for all.
        prefix_lm: Whether a token sees, besides, all keys of its sequence's prefix.
    """

    causal: bool = True
    sliding_window: int | None = None
    prefix_lm: bool = False

    @property
    def span(self) -> int | None:
        """The window, if there is one."""
        return self.sliding_window

    def visible_range(
        self,
        positions: Int32[Array, " T"],
        causal_ends: Int32[Array, " T"],
        kv_ends: Int32[Array, " T"],
        prefix_lm_ends: Int32[Array, " T"],
    ) -> tuple[Int32[Array, " T"], Int32[Array, " T"]]:
        """First and one past the last visible key of each token (see `Visibility`)."""
        del positions
        kv_end = causal_ends if self.causal else kv_ends
        if self.prefix_lm:
            kv_end = jnp.maximum(kv_end, prefix_lm_ends)
        if self.sliding_window is None:
            return jnp.zeros_like(kv_end), kv_end
        return jnp.maximum(kv_end - self.sliding_window, 0), kv_end


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Static description of one attention layer.

    The layer computes, for a token at position p with visible keys j,

        out = Σⱼ softmaxⱼ(cap(scale · q·kⱼ)) vⱼ,   cap(x) = c · tanh(x / c), or x without a cap.

    Query head n reads key/value head `n // group_size`. With sinks, the softmax of query head n runs
    over one more logit, which is given, and whose value is 0: a head may attend to nothing.

    Attributes:
        num_q_heads: Query heads, N.
        num_kv_heads: Key/value heads, K; a divisor of N. K = N is MHA, K = 1 is MQA.
        head_dim: Size of a head, H.
        sliding_window: Visible keys per token, the query's own included (W keys, as Hugging Face
            and Gemma count; FlashAttention and `jax.nn` count the W - 1 keys to the left).
            None for no window. Requires `causal`.
        logits_soft_cap: The cap c, or None.
        scale: Factor on q·k; `head_dim ** -0.5` where None.
        causal: Whether a token sees only keys up to its own position.
        prefix_lm: Whether a token sees, besides, its sequence's prefix, however far it reaches beyond the
            token's position (`nest_sequences(prefix_lm_lens=...)`). Requires `causal`, and no window.
        sinks: Whether each query head has a sink, a learned logit: neither scaled nor capped, and
            outside of every window. `attention` then takes their values.
        rope: The rotary embedding of queries and keys, whose tables are then prepared once per step;
            `attention` itself does not rotate. None where there is none.

    Raises:
        ValueError: If the sizes do not describe a layer.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    scale: float | None = None
    causal: bool = True
    prefix_lm: bool = False
    sinks: bool = False
    rope: RopeConfig | None = None

    def __post_init__(self) -> None:
        for name in ("num_q_heads", "num_kv_heads", "head_dim"):
            positive_int(name, getattr(self, name))
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.sliding_window is not None:  # the query's own key counts
            positive_int("sliding_window", self.sliding_window)
        if self.sliding_window is not None and not self.causal:
            raise ValueError("sliding_window needs causal=True: a two-sided window has no agreed meaning")
        if self.prefix_lm and (not self.causal or self.sliding_window is not None):
            raise ValueError(
                f"prefix_lm needs causal=True, not {self.causal}, and sliding_window=None, not "
                f"{self.sliding_window}: a prefix in a window has no agreed meaning"
            )
        if self.logits_soft_cap is not None and not 0 < self.logits_soft_cap < math.inf:
            raise ValueError(f"logits_soft_cap={self.logits_soft_cap} must be positive and finite, or None")
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} must be finite, or None")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head, G."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def softmax_scale(self) -> float:
        """The factor on q·k, with its default filled in."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def window_class(self) -> Visibility:
        """The part of the description that visible key ranges depend on."""
        return WindowClass(self.causal, self.sliding_window, self.prefix_lm)


def softmax_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which scores are summed: float32, or float64 for float64 inputs."""
    return jnp.dtype("float64") if jnp.dtype(dtype) == jnp.float64 else jnp.dtype("float32")
