"""Steps of a server, drawn at random, and how ours nests them: a library for experiments about metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from per_backend_metadata import Capacity, StepInputs

from jaxattn import Bucket, BucketGrid, RaggedBatch, nest_sequences

INPUTS = 8
"""Batches of each case; calls rotate over them."""
PAGE_SIZE = 64
NUM_PAGES = 40_000
VOCAB_SIZE = 32_000


@dataclass(frozen=True, slots=True)
class Case:
    """The shape of a step.

    Attributes:
        name: Short and unique.
        prefill: Query tokens of each prefilling sequence; they stand first.
        decode: Decoding sequences.
        max_context: Contexts are uniform from 1 to this; 0 for none.
    """

    name: str
    prefill: tuple[int, ...] = ()
    decode: int = 0
    max_context: int = 4095


_TINY = tuple(np.random.default_rng(0).integers(2, 5, 8192).tolist())
CASES = {
    case.name: case
    for case in (
        Case("decode 1", decode=1),
        Case("decode 8", decode=8),
        Case("decode 64", decode=64),
        Case("decode 256", decode=256),
        Case("decode 1024", decode=1024),
        Case("prefill 4 x 512", prefill=(512,) * 4),
        Case("prefill 16 x 256", prefill=(256,) * 16),
        Case("mixed 2 x 512 + 62", prefill=(512,) * 2, decode=62),
        Case("8192 x 2 to 4", prefill=_TINY, max_context=0),
    )
}
"""By name."""


def draw_steps(
    case: Case, num_pages: int | None = NUM_PAGES, vocab_size: int = VOCAB_SIZE
) -> list[StepInputs]:
    """Eight batches of a case: lengths fixed; contexts, pages and tokens drawn.

    Args:
        case: The case.
        num_pages: Pages of the cache; None for as many as the largest batch needs.
        vocab_size: Number of token ids.
    """
    q_lens = np.array((*case.prefill, *(1,) * case.decode), np.int32)
    n, steps = q_lens.size, []
    rngs = [np.random.default_rng([n, i]) for i in range(INPUTS)]
    contexts = [
        rng.integers(1, case.max_context + 1, n) if case.max_context else np.zeros(n, int) for rng in rngs
    ]
    counts = [(-(-(q_lens + context) // PAGE_SIZE)).astype(np.int32) for context in contexts]
    if num_pages is None:
        num_pages = max(int(count.sum()) for count in counts)
    for rng, context, count in zip(rngs, contexts, counts, strict=True):
        steps.append(
            StepInputs(
                token_ids=rng.integers(0, vocab_size, q_lens.sum(), np.int32),
                q_lens=q_lens,
                context_lens=context.astype(np.int32),
                cu_q_lens=np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
                pages=rng.permutation(num_pages)[: count.sum()].astype(np.int32),
                page_counts=count,
                cu_page_counts=np.concatenate([[0], np.cumsum(count)]).astype(np.int32),
                state_slots=rng.permutation(n).astype(np.int32),
                is_decode=np.arange(n) >= len(case.prefill),
                page_size=PAGE_SIZE,
                num_pages=num_pages,
            )
        )
    return steps


def grid_of(steps: Sequence[StepInputs]) -> BucketGrid:
    """The default grid, with more sequences only where the steps have more."""
    return BucketGrid(max_seqs=max(BucketGrid().max_seqs, steps[0].q_lens.size))


def bucket_of(steps: Sequence[StepInputs]) -> Bucket:
    """The smallest bucket of the grid that holds each of the steps; a decode bucket where all decode."""
    largest = Capacity.of(steps)
    bucket = grid_of(steps).pick(tokens=largest.tokens, seqs=largest.seqs, pages=largest.pages)
    return bucket.decode() if steps[0].is_decode_only else bucket


def nest(
    step: StepInputs, bucket: Bucket | BucketGrid, *, validate: bool = True, transfer: bool = False
) -> RaggedBatch:
    """Ours, from arrays."""
    return nest_sequences(
        step.token_ids,
        q_lens=step.q_lens,
        context_lens=step.context_lens,
        page_tables=step.pages,
        page_counts=step.page_counts,
        page_size=step.page_size,
        num_pages=step.num_pages,
        vocab_size=VOCAB_SIZE,
        is_decode=step.is_decode,
        state_slots=step.state_slots,
        bucket=bucket,
        validate=validate,
        transfer=transfer,
    )


def nest_lists(step: StepInputs, bucket: Bucket) -> Callable[[], RaggedBatch]:
    """Ours, from Python lists: of tokens and of pages per sequence, and of numbers."""
    tokens = [row.tolist() for row in np.split(step.token_ids, step.cu_q_lens[1:-1])]
    tables = [row.tolist() for row in np.split(step.pages, step.cu_page_counts[1:-1])]
    contexts, slots = step.context_lens.tolist(), step.state_slots.tolist()
    return lambda: nest_sequences(
        tokens,
        context_lens=contexts,
        page_tables=tables,
        page_size=step.page_size,
        num_pages=step.num_pages,
        vocab_size=VOCAB_SIZE,
        is_decode=step.is_decode,
        state_slots=slots,
        bucket=bucket,
        transfer=False,
    )


def ready(result: Any) -> Any:
    """The result of a computation, when it has ended."""
    return jax.block_until_ready(result)
