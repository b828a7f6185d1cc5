"""Choosing the next token from logits.

A draw is the argmax of `logits / temperature + noise` with Gumbel noise of its own for each token id
(Maddison et al., "A* Sampling", 2014), among the ids that top-k and top-p leave. The noise follows from
the seed of the prompt and the position of the new token, and from nothing else: who shares the batch, in
which row, and how the prompt was cut or preempted changes no draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jaxattn.batch.numbers import positive_int

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
NUM_SEEDS = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of a prompt are chosen. The default takes the likeliest one, which draws nothing.

    Attributes:
        temperature: 0 takes the likeliest token; above, a draw from softmax(logits / temperature).
        top_k: Draw among this many likeliest tokens only, of equal ones the smaller ids; None for all.
        top_p: Of these, draw among the likeliest only: as few as reach this part of their probability.
        seed: Of the draws. The same prompt with the same seed is continued in the same way.

    Raises:
        ValueError: If a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # A smaller temperature is flushed to zero in float32.
        if not isinstance(self.temperature, Real) or not (
            self.temperature == 0 or _SMALLEST <= self.temperature <= _LARGEST
        ):
            raise ValueError(
                f"temperature={self.temperature!r} must be 0 (the likeliest token), or positive and within "
                f"float32"
            )
        if self.top_k is not None:
            positive_int("top_k", self.top_k, "or None for all tokens")
        if not isinstance(self.top_p, Real) or not _SMALLEST <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must be above 0 and at most 1, which leaves all tokens")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed < NUM_SEEDS:
            raise ValueError(f"seed={self.seed!r} must be an integer from 0 to {NUM_SEEDS - 1}")


GREEDY = Sampling()


class SamplingArrays(NamedTuple):
    """`Sampling` of every row of a batch.

    Attributes:
        temperature: 0 for the likeliest token.
        top_k: The vocabulary's size, or more, for all tokens.
        top_p: 1 for all tokens.
        seed: Of the draws.
    """

    temperature: Float[Array | np.ndarray, " R"]
    top_k: Int32[Array | np.ndarray, " R"]
    top_p: Float[Array | np.ndarray, " R"]
    seed: UInt32[Array | np.ndarray, " R"]

    @classmethod
    def of(cls, rows: Sequence[Sampling], num_rows: int, vocab_size: int) -> SamplingArrays:
        """The arrays of given rows, on the host; rows past them take the likeliest token."""
        rows = [*rows, *[GREEDY] * (num_rows - len(rows))]
        top_k = [vocab_size if row.top_k is None else min(row.top_k, vocab_size) for row in rows]
        return cls(
            temperature=np.array([row.temperature for row in rows], np.float32),
            top_k=np.array(top_k, np.int32),
            top_p=np.array([row.top_p for row in rows], np.float32),
            seed=np.array([row.seed for row in rows], np.uint32),
        )


def sample(
    logits: Float[Array, "R V"],
    positions: Int32[Array, " R"],
    sampling: SamplingArrays,
    *,
    greedy: bool = False,
) -> Int32[Array, " R"]:
    """One token per row.

    Where no row draws, no random number is made; where no row that draws has a top-k or top-p, nothing is
    sorted. Both is decided when it runs.

    Args:
        logits: One row per sequence.
        positions: Of the new token in its sequence.
        sampling: How each row chooses.
        greedy: That no row draws is known before: nothing else is compiled.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if greedy:
        return likeliest
    draws = sampling.temperature > 0

    def draw() -> Int32[Array, " R"]:
        V = logits.shape[1]
        noise = jax.vmap(lambda seed, position: _noise(seed, position, V))(sampling.seed, positions)
        temperature = jnp.where(draws, sampling.temperature, 1)[:, None]
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
        restricted = draws & ((sampling.top_k < V) | (sampling.top_p < 1))
        drawn = lax.cond(restricted.any(), _argmax_of_kept, _argmax, scaled + noise, scaled, sampling)
        return jnp.where(draws, drawn, likeliest)

    return lax.cond(draws.any(), draw, lambda: likeliest)


def _noise(seed: UInt32[Array, ""], position: Int32[Array, ""], vocab_size: int) -> Float[Array, " V"]:
    # Named, since other generators give a row numbers that depend on its neighbours.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (vocab_size,), jnp.float32)


def _argmax(
    perturbed: Float[Array, "R V"], scaled: Float[Array, "R V"], sampling: SamplingArrays
) -> Int32[Array, " R"]:
    return jnp.argmax(perturbed, axis=-1).astype(jnp.int32)


def _argmax_of_kept(
    perturbed: Float[Array, "R V"], scaled: Float[Array, "R V"], sampling: SamplingArrays
) -> Int32[Array, " R"]:
    order = jnp.argsort(scaled, axis=-1, descending=True, stable=True).astype(jnp.int32)
    keep = kept(jnp.take_along_axis(scaled, order, axis=-1), sampling)
    chosen = jnp.argmax(jnp.where(keep, jnp.take_along_axis(perturbed, order, axis=-1), -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0]


def kept(descending: Float[Array, "R V"], sampling: SamplingArrays) -> Bool[Array, "R V"]:
    """Which logits top-k and then top-p leave: the first of each row.

    Args:
        descending: Logits, already divided by the temperature, the largest first.
        sampling: Its `top_k` are left at most; of these the first ones, as few as have `top_p` of their
            probability.
    """
    top_k, top_p = sampling.top_k[:, None], sampling.top_p[:, None]
    keep = jnp.arange(descending.shape[1], dtype=jnp.int32)[None, :] < top_k
    probabilities = jax.nn.softmax(descending, axis=-1, where=keep)
    before = jnp.pad(jnp.cumsum(probabilities, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    # By rounding, the sum may reach 1 before the last one.
    return keep & ((before < top_p) | (top_p >= 1))
