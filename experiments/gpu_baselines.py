"""Others' attention kernels on dense batches of equal lengths: a library for `gpu.py`.

What cannot be imported is left out; what refuses a shape says so when it runs. Keys lie contiguously, as
these kernels want them: none of them reads pages here. Every candidate attends with several sets of
inputs in one call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

Candidate = tuple[str, Callable[..., Any], tuple]


def candidates(
    rows: int, q_len: int, kv_len: int, heads: tuple[int, int, int], *, causal: bool, sets: int
) -> Iterator[Candidate]:
    """Name, program and arguments of each kernel that serves these shapes.

    Args:
        rows: Sequences.
        q_len: Queries of each.
        kv_len: Keys of each; the queries are the last tokens.
        heads: Query heads, key heads, size of a head.
        causal: Whether a token sees keys up to its own position only.
        sets: Sets of inputs.
    """
    num_q_heads, num_kv_heads, head_dim = heads
    if causal and q_len not in (1, kv_len):
        return  # their causal mask is that of a whole prompt
    masked = causal and q_len > 1  # a single query, the last token, sees every key

    def normal(seed: int, tokens: int, num_heads: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (rows, tokens, num_heads, head_dim), jnp.bfloat16)

    inputs = [
        (normal(3 * s, q_len, num_q_heads), *(normal(3 * s + i, kv_len, num_kv_heads) for i in (1, 2)))
        for s in range(sets)
    ]

    def with_cudnn(inputs: list) -> list:
        return [
            jax.nn.dot_product_attention(q, k, v, is_causal=masked, implementation="cudnn")
            for q, k, v in inputs
        ]

    if jax.default_backend() == "gpu":
        yield "jax.nn, cuDNN", with_cudnn, (inputs,)
    if importlib.util.find_spec("tokamax") is not None:
        import tokamax  # pyright: ignore[reportMissingImports]

        def with_tokamax(inputs: list) -> list:
            return [tokamax.dot_product_attention(q, k, v, is_causal=masked) for q, k, v in inputs]

        yield "tokamax", with_tokamax, (inputs,)
