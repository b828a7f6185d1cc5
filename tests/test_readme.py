"""The README's example runs."""

import re
from pathlib import Path

import numpy as np


def test_ten_lines():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"<!-- tested by tests/test_readme.py -->\n```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["out"].shape == (16, 8, 64)
    assert np.isfinite(names["out"]).all()
    np.testing.assert_array_equal(names["out"][6:], 0)
