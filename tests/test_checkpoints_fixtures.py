"""Checkpoints that other libraries wrote, each in its own environment, against the logits that those computed."""

from pathlib import Path

import numpy as np
import pytest
from fixtures.archive import PROMPTS, read_archive

from jaxattn import compute_logits
from jaxattn.buckets import BucketGrid
from jaxattn.checkpoints import load_model

GRID = BucketGrid(tokens=(32,), max_seqs=8)
NAMES = sorted(file.stem for file in (Path(__file__).parent / "fixtures").glob("*.zip"))


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_the_library_that_wrote_it(name, tmp_path):
    expected = read_archive(name, tmp_path)
    model = load_model(tmp_path, dtype="float32")
    got = compute_logits(model, [list(prompt) for prompt in PROMPTS], grid=GRID)
    for ours, theirs in zip(got, expected, strict=True):
        assert theirs.std() > 0.5
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
