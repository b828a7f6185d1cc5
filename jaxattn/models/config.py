"""The decoder's configuration: static, hashable, read from a checkpoint's config.json."""

from __future__ import annotations

from dataclasses import dataclass

from jaxattn.rope import RopeConfig
from jaxattn.spec import AttentionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A Llama-family decoder.

    Attributes:
        vocab_size: Token ids.
        hidden_size: Width of the residual stream, D.
        intermediate_size: Width of the gated MLP, F.
        num_layers: Layers.
        num_q_heads: Query heads, N.
        num_kv_heads: Key/value heads, K.
        head_dim: Size of a head, H.
        sliding_windows: Per layer, the number of visible keys, the query's own included, or None.
        rope: Rotary embedding.
        rms_norm_eps: ε of the RMS norms.
        tie_embeddings: Whether the head is the embedding, transposed.
        logits_soft_cap: Soft cap on attention scores, or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_windows: tuple[int | None, ...] = ()
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    logits_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        windows = tuple(self.sliding_windows) or (None,) * self.num_layers
        object.__setattr__(self, "sliding_windows", windows)  # hashable, whatever sequence was given
        if len(self.sliding_windows) != self.num_layers:
            raise ValueError(f"sliding_windows={self.sliding_windows} must have one entry per layer")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
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
                rope=self.rope,
            )
            for window in self.sliding_windows
        )
