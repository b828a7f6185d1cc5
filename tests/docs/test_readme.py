"""The README's examples run."""

import re
from pathlib import Path

import checkpoint_matrix
import jax
import numpy as np

README = (Path(__file__).parents[2] / "README.md").read_text()


def run_example(number: int) -> dict:
    """Everything that the example defines."""
    tested = r"<!-- tested by tests/docs/test_readme.py -->\n```python\n(.*?)```"
    examples = re.findall(tested, README, re.DOTALL)
    names = {}
    exec(examples[number], names)
    return names


def test_ten_lines():
    names = run_example(0)
    assert names["out"].shape == (16, 8, 64)
    assert np.isfinite(names["out"]).all()
    np.testing.assert_array_equal(names["out"][6:], 0)


@jax.numpy_dtype_promotion("standard")  # optax's AdamW promotes its step count
def test_own_model_learns():
    names = run_example(1)
    assert len(names["losses"]) > 30
    assert names["losses"][0] > 4
    assert names["losses"][-1] < 1


@jax.numpy_rank_promotion("allow")  # Flax's Dense and RMSNorm
def test_own_checkpoints_are_loaded_with_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (2, 3):
        names = run_example(number)
        logits = np.concatenate(names["logits"])
        assert logits.std() > 0.3
        np.testing.assert_allclose(names["own"][: len(logits)], logits, rtol=0, atol=1e-4)


def test_checkpoints_are_those_of_the_tests():
    assert checkpoint_matrix.markdown() in README
