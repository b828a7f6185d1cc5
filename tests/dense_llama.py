"""Llama and Mistral as dense NumPy in float64: one sequence, no cache, no shared code.

It reads the tree with Hugging Face's Flax names and the keys of config.json themselves, so that it
checks the loader's mapping as much as the decoder.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def logits(tree: dict[str, Any], config: dict[str, Any], tokens: list[int]) -> np.ndarray:
    """Logits of every token, `[len(tokens), vocab_size]`."""
    model = tree["model"]
    x = _f64(model["embed_tokens"]["embedding"])[np.asarray(tokens)]
    eps = config.get("rms_norm_eps", 1e-6)
    for i in range(config["num_hidden_layers"]):
        layer = model["layers"][str(i)]
        h = _rms_norm(x, layer["input_layernorm"]["weight"], eps)
        x = x + _attention(layer["self_attn"], config, h, _window(config, i))
        h = _rms_norm(x, layer["post_attention_layernorm"]["weight"], eps)
        x = x + _mlp(layer["mlp"], h)
    x = _rms_norm(x, model["norm"]["weight"], eps)
    if "lm_head" in tree:
        return x @ _f64(tree["lm_head"]["kernel"])
    return x @ _f64(model["embed_tokens"]["embedding"]).T


def greedy(tree: dict[str, Any], config: dict[str, Any], prompt: list[int], n: int) -> list[int]:
    """The n likeliest next tokens, one after the other."""
    text = list(prompt)
    for _ in range(n):
        text.append(int(logits(tree, config, text)[-1].argmax()))
    return text[len(prompt) :]


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _rms_norm(x: np.ndarray, weight: Any, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * _f64(weight)


def _mlp(mlp: dict[str, Any], x: np.ndarray) -> np.ndarray:
    gate = x @ _f64(mlp["gate_proj"]["kernel"])
    return (gate / (1 + np.exp(-gate)) * (x @ _f64(mlp["up_proj"]["kernel"]))) @ _f64(
        mlp["down_proj"]["kernel"]
    )


def _window(config: dict[str, Any], layer: int) -> int | None:
    if config.get("layer_types") is not None:
        return config["sliding_window"] if config["layer_types"][layer] == "sliding_attention" else None
    return config.get("sliding_window", 4096) if config["model_type"] == "mistral" else None


def _attention(attn: dict[str, Any], config: dict[str, Any], x: np.ndarray, window: int | None) -> np.ndarray:
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    length = len(x)
    q = (x @ _f64(attn["q_proj"]["kernel"])).reshape(length, num_heads, head_dim)
    k = (x @ _f64(attn["k_proj"]["kernel"])).reshape(length, num_kv_heads, head_dim)
    v = (x @ _f64(attn["v_proj"]["kernel"])).reshape(length, num_kv_heads, head_dim)
    q, k = _rope(q, config), _rope(k, config)
    out = np.zeros_like(q)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        for i in range(length):
            first = 0 if window is None else max(0, i - window + 1)
            scores = k[first : i + 1, kv_head] @ q[i, head] / math.sqrt(head_dim)
            if config.get("attn_logit_softcapping") is not None:
                cap = config["attn_logit_softcapping"]
                scores = cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights / weights.sum() @ v[first : i + 1, kv_head]
    return out.reshape(length, num_heads * head_dim) @ _f64(attn["o_proj"]["kernel"])


def _rope(x: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * _frequencies(config, x.shape[-1])
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1
    )


def _frequencies(config: dict[str, Any], head_dim: int) -> np.ndarray:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    frequencies = np.array([theta ** -(2 * i / head_dim) for i in range(head_dim // 2)])
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    return np.array([_llama3(frequency, rope) for frequency in frequencies])


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
