"""What a step in a bucket costs: a line through a few sizes, assumed or fitted to measured times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from jaxattn.batch.bucket import Bucket


@runtime_checkable
class CostOfSizes(Protocol):
    """A cost that takes many buckets at once, as arrays of their sizes; `plan_buckets` is then faster."""

    def of_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """The cost of each of n buckets, whose sizes are `[n, 4]`, in the order of `Bucket`."""
        ...


type Cost = Callable[[Bucket], float] | CostOfSizes
"""The cost of a step in a bucket, in any unit: a function of the bucket, or a `CostOfSizes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """A cost that is linear in a bucket's sizes.

    The default is in tokens: dense layers compute every padded token, which is most of a step; an entry of
    the page list is a number that metadata are derived from; and whatever a step does, it takes as long as a
    few tokens, a little longer where a schedule of long queries is walked as well. These are guesses:
    `fit_cost` replaces them by what a model takes on a machine.

    Attributes:
        per_step: The cost of any step.
        per_long_step: What is added where the bucket holds queries of more than one token.
        per_token: The cost of each query token of the bucket.
        per_page: The cost of each entry of its page list.

    Raises:
        ValueError: If a number is negative or not finite.
    """

    per_step: float = 8.0
    per_long_step: float = 4.0
    per_token: float = 1.0
    per_page: float = 1 / 64

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)} must be finite, and not negative")

    def __call__(self, bucket: Bucket) -> float:
        """The cost of a step in a bucket."""
        return float(self.of_sizes(np.array([astuple(bucket)]))[0])

    def of_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """The cost of each of n buckets, whose sizes are `[n, 4]`, in the order of `Bucket`."""
        return _features(sizes) @ np.array(astuple(self))

    @classmethod
    def of(cls, values: np.ndarray) -> LinearCost:
        """The cost with these numbers, in the order of the attributes."""
        return cls(**dict(zip(cls.__dataclass_fields__, map(float, values), strict=True)))


DEFAULT_COST = LinearCost()


def fit_cost(buckets: Sequence[Bucket], seconds: Sequence[float] | np.ndarray) -> LinearCost:
    """The linear cost that is nearest to measured times: the least squares of relative errors.

    None of its numbers is negative: a larger bucket never costs less. What the buckets do not tell apart,
    such as pages where all have as many, is not seen.

    Args:
        buckets: The buckets.
        seconds: What a step took in each, as by `measure_steps`.

    Raises:
        ValueError: If there is no time for each bucket, or one is not positive.
    """
    times = np.asarray(seconds, np.float64)
    if not len(buckets) or times.shape != (len(buckets),) or not (np.isfinite(times) & (times > 0)).all():
        raise ValueError(
            f"seconds={times.tolist()} must be one positive time per bucket; there are {len(buckets)}"
        )
    from scipy.optimize import nnls  # a tenth of a second, for this one function

    features = _features(np.array([astuple(bucket) for bucket in buckets])) / times[:, None]
    largest = np.maximum(features.max(axis=0), np.finfo(float).tiny)  # columns differ by orders of magnitude
    return LinearCost.of(nnls(features / largest, np.ones(len(buckets)))[0] / largest)


def costs_of(cost: Cost, sizes: np.ndarray) -> np.ndarray:
    """The cost of each of n buckets, by whatever kind of cost.

    Args:
        cost: The cost.
        sizes: `[n, 4]`, in the order of `Bucket`.

    Raises:
        ValueError: If a cost is negative or not finite.
    """
    if isinstance(cost, CostOfSizes):
        costs = np.asarray(cost.of_sizes(sizes), np.float64)
    else:
        costs = np.array([cost(Bucket(*row)) for row in sizes.tolist()], np.float64)
    bad = ~(np.isfinite(costs) & (costs >= 0))
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(f"cost={costs[i]} of {Bucket(*sizes[i].tolist())} must be finite, and not negative")
    return costs


def _features(sizes: np.ndarray) -> np.ndarray:
    """`[n, 4]` What `LinearCost` multiplies, in the order of its attributes."""
    tokens, _, pages, max_q_len = sizes.T
    return np.stack([np.ones(len(sizes)), max_q_len > 1, tokens, pages], axis=1)
