from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from jaxattn import AttentionSpec, Bucket, prepare_metadata
from jaxattn.cases import ODD, nest_workload
from jaxattn.viz import padding_waste, plot_schedule

HEADS: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.fixture
def batch():
    return nest_workload(ODD[0], bucket=Bucket(160, 8))


def test_padding_waste(batch):
    assert padding_waste(batch) == pytest.approx(1 - 148 / 160)


def test_a_panel_per_window_class_and_a_box_per_tile(batch, tmp_path):
    metadata = prepare_metadata(batch, [AttentionSpec(**HEADS), AttentionSpec(**HEADS, sliding_window=9)])
    figure = plot_schedule(batch, metadata)
    assert [ax.get_title() for ax in figure.axes] == [
        "causal, no window: 6 tiles",
        "causal, window of 9 keys: 6 tiles",
    ]
    boxes = sum(len(c.get_paths()) for c in figure.axes[0].collections)
    assert boxes == 6
    figure.savefig(tmp_path / "schedule.png")
    picture = imread(tmp_path / "schedule.png")
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10
