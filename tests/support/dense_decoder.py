"""Llama, Mistral, Phi-3, Qwen 2 and 3, Gemma 1 to 3 as dense NumPy in float64: one sequence, no cache.

Written from the definitions of the families, without code of the library. It reads a dictionary of weights
with torch's names, `[out, in]`, and the keys of config.json themselves, in both dialects, so that it checks
the loader's readers and tables as much as the decoder.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Tensors = dict[str, Any]
Config = dict[str, Any]

GEMMA = ("gemma", "gemma2", "gemma3_text")


class Mistakes(NamedTuple):
    """What may be done wrongly on purpose, to see that the logits tell."""

    interleaved_rope: bool = False
    norm_without_one: bool = False
    no_qk_norm: bool = False
    no_embedding_scale: bool = False
    one_rope_base: bool = False
    post_norms_skipped: bool = False


NONE = Mistakes()


def logits(tensors: Tensors, config: Config, tokens: list[int], mistakes: Mistakes = NONE) -> np.ndarray:
    """Logits of every token, `[len(tokens), vocab_size]`."""
    return _Decoder(tensors, config, mistakes).logits(tokens)


def greedy(tensors: Tensors, config: Config, prompt: list[int], n: int) -> list[int]:
    """The n likeliest next tokens, one after the other."""
    text = list(prompt)
    for _ in range(n):
        text.append(int(logits(tensors, config, text)[-1].argmax()))
    return text[len(prompt) :]


class _Decoder:
    def __init__(self, tensors: Tensors, config: Config, mistakes: Mistakes):
        self.tensors = tensors
        self.config = config.get("text_config", config)
        self.mistakes = mistakes
        self.family = {"gemma3": "gemma3_text"}.get(config["model_type"], config["model_type"])
        self.num_heads = self.config["num_attention_heads"]
        self.num_kv_heads = self.config.get("num_key_value_heads") or self.num_heads
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.num_heads

    def logits(self, tokens: list[int]) -> np.ndarray:
        embedding = self.get("model.embed_tokens.weight")
        x = embedding[np.asarray(tokens)]
        if self.family in GEMMA and not self.mistakes.no_embedding_scale:
            x = x * math.sqrt(self.config["hidden_size"])
        for i in range(self.config["num_hidden_layers"]):
            x = self.layer(f"model.layers.{i}.", i, x)
        x = self.norm("model.norm", x)
        head = self.get("lm_head.weight") if "lm_head.weight" in self.tensors else embedding
        cap = self.config.get("final_logit_softcapping", 30.0 if self.family == "gemma2" else None)
        return _soft_cap(x @ head.T, cap)

    def layer(self, prefix: str, i: int, x: np.ndarray) -> np.ndarray:
        attended = self.attention(prefix + "self_attn.", i, self.norm(prefix + "input_layernorm", x))
        if self.family not in ("gemma2", "gemma3_text"):
            x = x + attended
            return x + self.mlp(prefix + "mlp.", self.norm(prefix + "post_attention_layernorm", x))
        x = x + self.after(prefix + "post_attention_layernorm", attended)
        mlp = self.mlp(prefix + "mlp.", self.norm(prefix + "pre_feedforward_layernorm", x))
        return x + self.after(prefix + "post_feedforward_layernorm", mlp)

    def attention(self, prefix: str, i: int, x: np.ndarray) -> np.ndarray:
        if self.family == "phi3":
            q, k, v = np.split(
                x @ self.get(prefix + "qkv_proj.weight").T,
                np.cumsum([self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim]),
                axis=-1,
            )
        else:
            q, k, v = (self.linear(prefix + f"{name}_proj", x) for name in "qkv")
        q = q.reshape(len(x), self.num_heads, self.head_dim)
        k = k.reshape(len(x), self.num_kv_heads, self.head_dim)
        v = v.reshape(len(x), self.num_kv_heads, self.head_dim)
        if self.family in ("qwen3", "gemma3_text") and not self.mistakes.no_qk_norm:
            q, k = self.norm(prefix + "q_norm", q), self.norm(prefix + "k_norm", k)
        frequencies = self.frequencies(i)
        q, k = self.rotate(q, frequencies), self.rotate(k, frequencies)
        scale = self.head_dim**-0.5
        if self.family in ("gemma2", "gemma3_text"):
            scale = self.config.get("query_pre_attn_scalar", 256) ** -0.5
        cap = self.config.get("attn_logit_softcapping", 50.0 if self.family == "gemma2" else None)
        window = self.window(i)
        out = np.zeros_like(q)
        for head in range(self.num_heads):
            kv_head = head // (self.num_heads // self.num_kv_heads)
            for t in range(len(x)):
                first = 0 if window is None else max(0, t - window + 1)
                scores = _soft_cap(k[first : t + 1, kv_head] @ q[t, head] * scale, cap)
                weights = np.exp(scores - scores.max())
                out[t, head] = weights / weights.sum() @ v[first : t + 1, kv_head]
        return self.linear(prefix + "o_proj", out.reshape(len(x), -1))

    def mlp(self, prefix: str, x: np.ndarray) -> np.ndarray:
        if self.family == "phi3":
            gate, up = np.split(x @ self.get(prefix + "gate_up_proj.weight").T, 2, axis=-1)
        else:
            gate, up = (self.linear(prefix + f"{name}_proj", x) for name in ("gate", "up"))
        return self.linear(prefix + "down_proj", self.activation(gate) * up)

    def activation(self, x: np.ndarray) -> np.ndarray:
        if self.family in GEMMA:
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return x / (1 + np.exp(-x))

    def window(self, i: int) -> int | None:
        """Visible keys of layer i, the query's own included."""
        config = self.config
        window = config.get("sliding_window", None if self.family in ("llama", "phi3", "gemma") else 4096)
        if self.family in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
            return None
        if config.get("layer_types") is not None:
            slides = config["layer_types"][i] == "sliding_attention"
        elif self.family in ("mistral", "phi3"):
            slides = True
        elif self.family in ("qwen2", "qwen3"):
            slides = i >= config.get("max_window_layers", 28)
        elif self.family == "gemma2":
            slides = i % 2 == 0
        elif self.family == "gemma3_text":
            slides = (i + 1) % config.get("sliding_window_pattern", 6) != 0
        else:
            slides = False
        return window if slides else None

    def frequencies(self, i: int) -> np.ndarray:
        """Angular frequencies of layer i, in radians per token."""
        config, gemma3 = self.config, self.family == "gemma3_text"
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = config.get("rope_theta") or (1e6 if gemma3 else 1e4)
        if gemma3 or "full_attention" in rope:
            local = self.window(i) is not None and not self.mistakes.one_rope_base
            if "full_attention" in rope:
                rope = rope["sliding_attention" if local else "full_attention"]
            elif local:
                rope, theta = {}, config.get("rope_local_base_freq", 1e4)
        theta = rope.get("rope_theta") or theta
        kind = rope.get("rope_type") or rope.get("type") or "default"
        plain = np.array([theta ** -(2 * j / self.head_dim) for j in range(self.head_dim // 2)])
        if kind == "default":
            return plain
        if kind == "linear":
            return plain / rope["factor"]
        return np.array([_llama3(frequency, rope) for frequency in plain])

    def rotate(self, x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        """Turn pairs (i, i + head_dim/2) of each head."""
        angles = np.arange(len(x))[:, None, None] * frequencies
        half = len(frequencies)
        if self.mistakes.interleaved_rope:
            first, second = x[..., ::2], x[..., 1::2]
        else:
            first, second = x[..., :half], x[..., half:]
        turned = (
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        )
        if self.mistakes.interleaved_rope:
            return np.stack(turned, -1).reshape(x.shape)
        return np.concatenate(turned, -1)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        eps = self.config.get("rms_norm_eps", 1e-5 if self.family == "phi3" else 1e-6)
        weight = self.get(name + ".weight")
        if self.family in GEMMA and not self.mistakes.norm_without_one:
            weight = 1 + weight
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    def after(self, name: str, x: np.ndarray) -> np.ndarray:
        return x if self.mistakes.post_norms_skipped else self.norm(name, x)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.get(name + ".weight").T
        return y + self.get(name + ".bias") if name + ".bias" in self.tensors else y

    def get(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[name]).astype(np.float64)


def _soft_cap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def _llama3(frequency: float, rope: dict[str, Any]) -> float:
    """As Meta's `apply_scaling` writes it, by wavelength."""
    original = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequency
    if wavelength < original / rope["high_freq_factor"]:
        return frequency
    if wavelength > original / rope["low_freq_factor"]:
        return frequency / rope["factor"]
    smooth = (original / wavelength - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"]
    )
    return (1 - smooth) * frequency / rope["factor"] + smooth * frequency
