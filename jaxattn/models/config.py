"""The decoder's configuration: static, hashable, read from a checkpoint's config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxattn.metadata.rope import RopeConfig
from jaxattn.metadata.spec import AttentionSpec

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder of the Llama, Gemma, Qwen, Mistral or Phi-3 family: what they differ in is data.

    Attributes:
        vocab_size: Token ids.
        hidden_size: Width of the residual stream, D.
        intermediate_size: Width of the gated MLP, F.
        num_layers: Layers.
        num_q_heads: Query heads, N.
        num_kv_heads: Key/value heads, K.
        head_dim: Size of a head, H.
        sliding_windows: Per layer, the number of visible keys, the query's own included, or None. One
            entry stands for all layers.
        ropes: Per layer, the rotary embedding. One entry stands for all layers.
        activation: Of the MLP's gate: "silu", or "gelu_tanh", GELU in its approximation by tanh.
        qkv_bias: Whether the projections to queries, keys and values add a bias (Qwen 2).
        qk_norm: Whether queries and keys are normed, head by head, before they are rotated (Qwen 3, Gemma 3).
        post_norms: Whether what attention and the MLP return is normed too, before it is added to the
            residual stream (Gemma 2 and 3).
        norm_offset: Whether norms scale by 1 + weight, in float32 before rounding (Gemma), instead of by
            weight after rounding.
        rms_norm_eps: ε of the RMS norms.
        embedding_scale: Factor on embedded tokens, rounded to the parameters' dtype (Gemma: √D), or None.
        tie_embeddings: Whether the head is the embedding, transposed.
        attention_scale: Factor on q·k; `head_dim ** -0.5` where None.
        logits_soft_cap: Soft cap on attention scores, or None.
        final_logits_soft_cap: Soft cap on the logits of tokens, c · tanh(logits / c), or None.

    Raises:
        ValueError: If the values do not describe a decoder.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_windows: tuple[int | None, ...] = (None,)
    ropes: tuple[RopeConfig, ...] = (RopeConfig(),)
    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: bool = False
    rms_norm_eps: float = 1e-6
    embedding_scale: float | None = None
    tie_embeddings: bool = False
    attention_scale: float | None = None
    logits_soft_cap: float | None = None
    final_logits_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("sliding_windows", "ropes"):
            given = tuple(getattr(self, name))  # hashable, whatever sequence was given
            if len(given) not in (1, self.num_layers):
                raise ValueError(
                    f"{name}={given} must have one entry, or one per layer: num_layers={self.num_layers}"
                )
            object.__setattr__(self, name, given if len(given) > 1 else given * self.num_layers)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation={self.activation!r}; use one of {ACTIVATIONS}")
        for name in ("embedding_scale", "final_logits_soft_cap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite, or None")
        self.layer_specs()  # raises for heads that do not fit

    def layer_specs(self) -> tuple[AttentionSpec, ...]:
        """The attention of each layer."""
        return tuple(
            AttentionSpec(
                num_q_heads=self.num_q_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                sliding_window=window,
                logits_soft_cap=self.logits_soft_cap,
                scale=self.attention_scale,
                rope=rope,
            )
            for window, rope in zip(self.sliding_windows, self.ropes, strict=True)
        )
