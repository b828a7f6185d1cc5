"""Counts and model of launches: small cases that can be worked out by hand."""

import launch_model
import launches
import numpy as np
import pytest
import split_policies

from jaxattn.measuring.workloads import Workload


def test_counts_of_a_decode_step(monkeypatch):
    workload = Workload("w", (1, 1, 1), (511, 1024, 0), "")  # 512, 1,025 and 1 keys: 1, 3 and 1 units
    monkeypatch.setitem(launch_model.WORKLOADS, "w", workload)
    result = launches.examine("w", overhead=32)
    attend, merge = (launches.Launch(**launch) for launch in result["launches"])
    heads = launch_model.SPEC.num_kv_heads
    assert (attend.working, merge.working) == (5 * heads, 1 * heads)
    assert attend.launched == attend.places == attend.visited  # few enough for a program each
    assert result["total"]["working"] == 6 * heads


def test_long_lists_are_visited_where_they_are_live():
    result = launches.examine("prefill 1024", overhead=32)
    short, merge, long = (launches.Launch(**launch) for launch in result["launches"])
    assert (short.working, merge.working, long.working) == (0, 0, 64 * 8)
    assert short.launched == launches.MAX_TRITON_PROGRAMS < short.places
    assert short.visited == 0


@pytest.mark.parametrize(("costs", "slots", "end"), [([3, 3, 3], 2, 6), ([1, 1, 2], 2, 3), ([5], 4, 5)])
def test_makespan(costs, slots, end):
    assert launch_model.makespan(np.array(costs), slots) == end


def test_backwards_on_odd_rounds_evens_out():
    costs = launch_model.longest_first(np.arange(1, 17))
    assert set(launches.strided(costs, 4, serpentine=True)) == {costs.sum() // 4}
    assert np.ptp(launches.strided(costs, 4, serpentine=False)) == 4 * 3


def test_every_order_and_split_has_all_the_work():
    keys = np.array([4096, 64, 700])
    for piece in 128, 512, 5000:
        costs = split_policies.split_costs(keys, piece, 4, overhead=0)
        pieces = -(-keys // piece)
        blocks = -(-keys // 64) * 64 + launch_model.MERGED_KEYS * np.where(pieces > 1, pieces, 0)
        assert costs.sum() == 16 * blocks.sum()
        assert launches.strided(costs, 5, serpentine=True).sum() == costs.sum()


def test_pieces_that_depend_on_the_batch():
    keys = np.array([8192])
    piece = split_policies.piece_that_fits(keys, 8)
    assert -(-8192 // piece) * 8 <= launch_model.SLOTS < -(-8192 // (piece - 16)) * 8
    assert split_policies.piece_that_fits(np.full(64, 8192), 8) == 8192, "tiles alone are too many"
    assert split_policies.piece_of_even_share(keys, 8) == 256
