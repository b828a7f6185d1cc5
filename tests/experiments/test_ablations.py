"""What the ablation scripts count: parameters, bytes of cache, targets, transfers, keys, ratios of rounds."""

import dataclasses
import itertools

import decode_loop
import head_sharing
import jax
import jax.numpy as jnp
import numpy as np
import packed_prefill
import pytest
import window_sizes
from side_by_side import Range, times_as_long

from jaxattn import Bucket, nest_sequences
from jaxattn.models import init_model_cache
from jaxattn.training import next_token_targets


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_size": 48, "mlp_width": 100, "num_layers": 3},
        {"hidden_size": 96, "num_q_heads": 12, "kv_heads": (6, 3, 1)},
    ],
)
def test_arms_have_as_many_parameters_as_the_baseline(sizes):
    decoders = head_sharing.arms(head_sharing.Config(**sizes))
    counts = {name: head_sharing.num_params(decoder) for name, decoder in decoders.items()}
    narrow = counts.pop("MQA, narrow")
    wanted = counts[head_sharing.BASELINE]
    for name, count in counts.items():
        assert abs(count / wanted - 1) < 0.01
        for other_width in (-1, 1):  # no other width comes closer
            decoder = decoders[name]
            other = dataclasses.replace(decoder, intermediate_size=decoder.intermediate_size + other_width)
            assert abs(head_sharing.num_params(other) - wanted) >= abs(count - wanted)
    assert narrow < 0.99 * wanted


def test_bytes_of_a_token_are_those_of_the_cache():
    for decoder in head_sharing.arms(head_sharing.Config()).values():
        cache = jax.eval_shape(
            lambda decoder=decoder: init_model_cache(decoder, num_pages=3, page_size=5, dtype="float32")
        )
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        assert head_sharing.cache_bytes_per_token(decoder) * 15 == held


def test_held_out_loss_weighs_each_target_alike(monkeypatch):
    bucket = Bucket(16, 4)
    batches = [nest_sequences([[1, 2, 3], [4]], bucket=bucket), nest_sequences([[5] * 7], bucket=bucket)]
    counts = [head_sharing.num_targets(batch) for batch in batches]
    assert counts == [int(next_token_targets(batch)[1].sum()) for batch in batches] == [2, 6]
    losses = iter([1.0, 3.0])
    monkeypatch.setattr(head_sharing, "_loss", lambda *_: next(losses))
    decoder = head_sharing.arms(head_sharing.Config())[head_sharing.BASELINE]
    assert head_sharing.held_out_loss({}, decoder, batches) == pytest.approx((2 * 1 + 6 * 3) / 8)


def test_traffic_counts_what_comes_from_the_host():
    traffic = decode_loop.Traffic()
    on_device, on_host = jnp.zeros(3, jnp.int32), np.zeros(5, np.int32)
    result = traffic.run(lambda a, b: a.sum() + b["x"].sum(), on_device, {"x": on_host, "y": np.int32(7)})
    assert traffic.read(result) == 0
    assert dataclasses.astuple(traffic) == (1, 2, 24, 1)


def test_keys_that_windows_see_and_tiles_read():
    config = window_sizes.Config(windows=(128,), chunk=100, decode_seqs=3)
    chunk, decode = (window_sizes.Case.of(phase, 600, config) for phase in ("chunk", "decode"))
    window, none = config.specs["128"], config.specs["none"]
    # Positions 500 to 563 see from 373 on, and 564 to 599 from 437 on: blocks 1 and 2 of 256 keys for both.
    assert window_sizes.tiles_and_keys(chunk.metadata, window) == {
        "tiles": 2,
        "read_keys": 2 * 512,
        "seen_keys": 100 * 128,
    }
    assert window_sizes.tiles_and_keys(chunk.metadata, none) == {
        "tiles": 2,
        "read_keys": 2 * 768,
        "seen_keys": sum(range(501, 601)),
    }
    # Key 472 is in block 0 of 512 keys, key 599 in block 1.
    assert window_sizes.tiles_and_keys(decode.metadata, window) == {
        "tiles": 3,
        "read_keys": 3 * 1024,
        "seen_keys": 3 * 128,
    }


@pytest.mark.parametrize(("law", "longest"), list(itertools.product(packed_prefill.LAWS, (8, 512))))
def test_lengths_of_prompts(law, longest):
    lens = packed_prefill.prompt_lens(law, longest, 16)
    assert lens.size == 16
    assert lens.min() >= 1
    assert lens.max() == lens[0] == longest


def test_ratios_are_taken_round_by_round():
    rounds = {"slow": [30.0, 80.0, 20.0], "base": [10.0, 20.0, 20.0]}
    assert times_as_long(rounds, "slow", "base") == Range(3, 1, 4)
    assert Range(3, 1, 4).text(".1f") == "3.0 (1.0 to 4.0)"
