"""What is asked for each prompt, on the host, and for each row of a batch, on the device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int32

from jaxattn.batch.numbers import positive_int
from jaxattn.models.sampling import GREEDY, NUM_SEEDS, Sampling, SamplingArrays

NO_STOP_TOKEN = -1

type Limits = int | Sequence[int] | np.ndarray
"""The most new tokens: of every prompt, or one number per prompt."""

type StopTokens = Collection[int] | Sequence[Collection[int]]
"""Token ids with which a prompt ends: the same for all prompts, or one collection per prompt."""

type OnTokens = Callable[[int, list[int]], object]
"""Called with the number of a prompt and new tokens of it, as they come."""


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """What is asked for one prompt.

    Attributes:
        max_new_tokens: The most tokens to add to it.
        sampling: How they are chosen.
        stop_token_ids: It ends with any of these.
    """

    max_new_tokens: int
    sampling: Sampling
    stop_token_ids: tuple[int, ...]


class RowOptions(NamedTuple):
    """What is asked for each row of a batch, as arrays.

    Attributes:
        sampling: How its tokens are chosen.
        limits: The most tokens it chooses.
        stop_tokens: It ends with any of these; filled up with `NO_STOP_TOKEN`.
    """

    sampling: SamplingArrays
    limits: Int32[Array | np.ndarray, " R"]
    stop_tokens: Int32[Array | np.ndarray, "R S"]

    @classmethod
    def of(
        cls, prompts: Sequence[PromptOptions], *, num_rows: int, max_stop_tokens: int, vocab_size: int
    ) -> RowOptions:
        """The arrays of given prompts, on the host; rows past them choose nothing."""
        limits = np.zeros(num_rows, np.int32)
        stop_tokens = np.full((num_rows, max_stop_tokens), NO_STOP_TOKEN, np.int32)
        for row, prompt in enumerate(prompts):
            limits[row] = prompt.max_new_tokens
            stop_tokens[row, : len(prompt.stop_token_ids)] = prompt.stop_token_ids
        sampling = [prompt.sampling for prompt in prompts]
        return cls(SamplingArrays.of(sampling, num_rows, vocab_size), limits, stop_tokens)


def options_per_prompt(
    num_prompts: int,
    max_new_tokens: Limits,
    *,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_token_ids: StopTokens = (),
    vocab_size: int,
) -> list[PromptOptions]:
    """Options of every prompt, from options that may be given once for all.

    Args:
        num_prompts: How many prompts there are.
        max_new_tokens: The most tokens to add to a prompt.
        sampling: How tokens are chosen. Given once, prompt i draws with `seed + i`: prompts that are
            equal are continued differently.
        stop_token_ids: A prompt ends with any of these.
        vocab_size: Number of token ids.

    Raises:
        ValueError: If a value is out of range, or there are not as many as prompts.
    """
    limits = limits_per_prompt(num_prompts, max_new_tokens)
    stops = _stops_per_prompt(num_prompts, stop_token_ids, vocab_size)
    if isinstance(sampling, Sampling):
        sampling = [replace(sampling, seed=(sampling.seed + i) % NUM_SEEDS) for i in range(num_prompts)]
    _check_count("sampling", sampling, num_prompts, "one Sampling")
    return [PromptOptions(*options) for options in zip(limits, sampling, stops, strict=True)]


def limits_per_prompt(num_prompts: int, max_new_tokens: Limits) -> list[int]:
    """The most new tokens of every prompt.

    Raises:
        ValueError: If a limit is not an integer of at least 1, or there are not as many as prompts.
    """
    if isinstance(max_new_tokens, int | np.integer):
        named = [("max_new_tokens", max_new_tokens)] * num_prompts
    else:
        _check_count("max_new_tokens", max_new_tokens, num_prompts, "one integer")
        named = [(f"max_new_tokens[{i}]", limit) for i, limit in enumerate(max_new_tokens)]
    return [positive_int(name, limit) for name, limit in named]


def _stops_per_prompt(num_prompts: int, stop_token_ids: StopTokens, vocab_size: int) -> list[tuple[int, ...]]:
    if all(isinstance(entry, Integral) for entry in stop_token_ids):
        return [_check_ids("stop_token_ids", stop_token_ids, vocab_size)] * num_prompts
    _check_count("stop_token_ids", stop_token_ids, num_prompts, "one collection of token ids")
    return [_check_ids(f"stop_token_ids[{i}]", ids, vocab_size) for i, ids in enumerate(stop_token_ids)]


def _check_count(name: str, values: Any, num_prompts: int, what: str) -> None:
    if len(values) != num_prompts:
        raise ValueError(
            f"{name} has {len(values)} entries for {num_prompts} prompts; give {what} for all, or one per "
            f"prompt"
        )


def _check_ids(name: str, ids: Any, vocab_size: int) -> tuple[int, ...]:
    for token_id in ids:
        if not isinstance(token_id, int | np.integer) or not 0 <= token_id < vocab_size:
            raise ValueError(f"{name} holds {token_id!r}; expected token ids from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(int(token_id) for token_id in ids))
