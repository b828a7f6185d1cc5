"""The one place where the precision of a comparison is decided.

FlashAttention's criterion: an implementation may err, against float64, at most twice as much as
the plain computation of the same precision does, plus the rounding of the result itself. The bound
is derived from the data of each comparison; no constant is fitted.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

FACTOR = 2.0
"""How many times the plain path's error is allowed."""
ROUNDINGS = 4.0
"""Units in the last place of the largest output that are allowed besides."""


def assert_as_good_as(
    got: np.ndarray, plain: np.ndarray, exact: np.ndarray, dtype: jnp.dtype, summands: float = 0.0
) -> None:
    """Assert that `got` errs at most twice as much as `plain` does, both against `exact`.

    Args:
        got: The implementation under test.
        plain: The plain computation in the same precision.
        exact: The float64 result.
        dtype: Of the computation.
        summands: Size of the largest number that enters a result by addition, where results are
            differences of larger numbers.
    """
    got, plain = np.asarray(got, np.float64), np.asarray(plain, np.float64)
    assert np.isfinite(got).all(), "the result is not finite"
    rounding = float(jnp.finfo(dtype).eps) * max(np.abs(exact).max(), summands)
    bound = FACTOR * np.abs(plain - exact).max() + ROUNDINGS * rounding
    error = np.abs(got - exact).max()
    assert error <= bound, f"error {error:.2e} exceeds {bound:.2e}"
