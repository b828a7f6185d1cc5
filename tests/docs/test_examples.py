"""The examples of README and how-tos run, and the pages hold the tables and pictures of today."""

import re
from pathlib import Path

import checkpoint_matrix
import jax
import numpy as np
import rooms

ROOT = Path(__file__).parents[2]
TESTED = re.compile(r"<!-- tested by tests/docs/test_examples.py -->\n```python\n(.*?)```", re.DOTALL)


def run_example(page: str, number: int = 0) -> dict:
    """Everything that an example of a page defines."""
    names = {}
    exec(TESTED.findall((ROOT / page).read_text(encoding="utf-8"))[number], names)
    return names


def test_ten_lines():
    names = run_example("README.md")
    assert names["out"].shape == (16, 8, 64)
    assert np.isfinite(names["out"]).all()
    np.testing.assert_array_equal(names["out"][6:], 0)


@jax.numpy_dtype_promotion("standard")  # optax's AdamW promotes its step count
def test_own_model_learns():
    names = run_example("notebooks/how_to/train_on_packed_documents.md")
    assert len(names["losses"]) > 30
    assert names["losses"][0] > 4
    assert names["losses"][-1] < 1


@jax.numpy_rank_promotion("allow")  # Flax's Dense and RMSNorm
def test_own_checkpoints_are_loaded_with_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        names = run_example("notebooks/how_to/load_your_own_checkpoint.md", number)
        logits = np.concatenate(names["logits"])
        assert logits.std() > 0.3
        np.testing.assert_allclose(names["own"][: len(logits)], logits, rtol=0, atol=1e-4)


def test_checkpoints_are_those_of_the_tests():
    text = (ROOT / "notebooks/reference/checkpoints.md").read_text(encoding="utf-8")
    assert checkpoint_matrix.markdown() in text


def test_the_picture_of_the_rooms_is_that_of_the_imports():
    drawn = (ROOT / "notebooks/_static/rooms.svg").read_text(encoding="utf-8")
    assert drawn == rooms.picture(), "run `make tables`"


def test_documents_stay_short():
    for document, most in (("README.md", 200), ("DESIGN.md", 350)):
        lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= most, f"{document} has {len(lines)} lines; take something out"
