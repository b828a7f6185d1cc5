from typing import Any

import jax
import pytest

from jaxattn import AttentionSpec
from jaxattn.metadata import WindowClass

HEADS: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64}


def test_derived_values():
    spec = AttentionSpec(**HEADS, sliding_window=7)
    assert spec.group_size == 4
    assert spec.softmax_scale == 0.125
    assert AttentionSpec(**HEADS, scale=2.0).softmax_scale == 2.0
    assert spec.window_class == WindowClass(causal=True, sliding_window=7)


@pytest.mark.smoke
def test_equal_ones_share_a_program():
    traced = []

    def program(x: float, spec: AttentionSpec) -> float:
        traced.append(spec)
        return x

    program = jax.jit(program, static_argnums=1)
    for soft_cap in (None, None, 30.0):
        program(1.0, AttentionSpec(**HEADS, logits_soft_cap=soft_cap))
    assert [spec.logits_soft_cap for spec in traced] == [None, 30.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_q_heads": 6, "num_kv_heads": 4}, "num_q_heads=6 must be a multiple of num_kv_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be an integer of at least 1"),
        ({"head_dim": 0}, "head_dim=0 must be an integer of at least 1"),
        ({"sliding_window": 0}, "sliding_window=0 must be an integer of at least 1"),
        ({"sliding_window": 4, "causal": False}, "sliding_window needs causal=True"),
        ({"prefix_lm": True, "causal": False}, "prefix_lm needs causal=True, not False"),
        ({"prefix_lm": True, "sliding_window": 4}, "and sliding_window=None, not 4"),
        ({"scale": float("nan")}, "scale=nan must be finite"),
        ({"logits_soft_cap": float("inf")}, "logits_soft_cap=inf must be positive and finite"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap=0.0 must be positive"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**{**HEADS, **changes})
