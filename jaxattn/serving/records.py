"""What a scheduler keeps of a request, and what it hands out: steps, finished requests, counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, no_type_check

import numpy as np
from jaxtyping import Bool, Int32

from jaxattn.batch.bucket import Bucket, Buckets
from jaxattn.batch.nest import DEFAULT_GRID, nest_sequences
from jaxattn.batch.ragged import RaggedBatch
from jaxattn.batch.trace import BatchLog
from jaxattn.cache.prefix import PrefixNode
from jaxattn.models.sampling import Sampling


@no_type_check  # checking the shapes of each instance takes longer in tests than all else
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScheduledStep:
    """The work of one step: what `nest_sequences` takes, row by row, decoding rows first.

    Attributes:
        number: Of the step, counted from 0.
        request_ids: The request of each row.
        token_ids: Query tokens, row after row.
        q_lens: Query tokens per row.
        context_lens: Tokens of each row that the cache holds already.
        page_tables: Physical pages, row after row, in logical order.
        page_counts: Pages per row.
        is_decode: Whether a row appends to a request whose last token was chosen in an earlier step
            and all others computed; False for prompts, their chunks and recomputation.
        samples: Whether a row reaches the end of its known tokens: its last logits give a new one.
        sampling: How each row's request chooses its new tokens, as it was added.
        state_slots: A number below `max_seqs` that a request keeps while it runs.
        page_size: Tokens per page.
        num_pages: Pages of the cache.
    """

    number: int
    request_ids: tuple[int, ...]
    token_ids: Int32[np.ndarray, " tokens"]
    q_lens: Int32[np.ndarray, " rows"]
    context_lens: Int32[np.ndarray, " rows"]
    page_tables: Int32[np.ndarray, " pages"]
    page_counts: Int32[np.ndarray, " rows"]
    is_decode: Bool[np.ndarray, " rows"]
    samples: Bool[np.ndarray, " rows"]
    sampling: tuple[Sampling, ...]
    state_slots: Int32[np.ndarray, " rows"]
    page_size: int
    num_pages: int

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return len(self.request_ids)

    def nest(
        self,
        *,
        bucket: Bucket | Buckets = DEFAULT_GRID,
        vocab_size: int | None = None,
        validate: bool = True,
        transfer: bool = True,
        log: BatchLog | None = None,
    ) -> RaggedBatch:
        """The batch of this step.

        Args:
            bucket: The sizes to fill up to, or a grid to pick them from.
            vocab_size: Number of token ids, to check the tokens against.
            validate: Whether to check values.
            transfer: Whether to move the batch to the device.
            log: Where to write its sizes.

        Raises:
            ValueError: If the batch does not fit the bucket, or a token the vocabulary.
        """
        return nest_sequences(
            self.token_ids,
            q_lens=self.q_lens,
            context_lens=self.context_lens,
            page_tables=self.page_tables,
            page_counts=self.page_counts,
            page_size=self.page_size,
            num_pages=self.num_pages,
            vocab_size=vocab_size,
            is_decode=self.is_decode,
            state_slots=self.state_slots,
            share_prefixes=True,
            bucket=bucket,
            validate=validate,
            transfer=transfer,
            log=log,
        )


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that is done.

    Attributes:
        request_id: As `Scheduler.add` returned it.
        token_ids: All its new tokens; a stop token is the last of them.
        reason: "stop" for a stop token, "length" for `max_new_tokens`.
    """

    request_id: int
    token_ids: list[int]
    reason: Literal["stop", "length"]


@dataclass(slots=True)
class SchedulerStats:
    """What a scheduler has done so far.

    Attributes:
        num_steps: Steps scheduled.
        num_query_tokens: Tokens computed, recomputed ones included.
        num_shared_tokens: Tokens that were found computed at admission.
        num_preemptions: Requests put back into the queue.
        num_evictions: Retained pages given up.
    """

    num_steps: int = 0
    num_query_tokens: int = 0
    num_shared_tokens: int = 0
    num_preemptions: int = 0
    num_evictions: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """A request that waits or runs.

    Attributes:
        id: Its number; a smaller one is older.
        token_ids: Room for the prompt and all new tokens; known are the first `num_known`.
        prompt_len: Tokens of the prompt.
        sampling: How its new tokens are chosen; the scheduler hands it on and does not look at it.
        stop_token_ids: Tokens that end it.
        num_known: Tokens of the prompt and new ones so far.
        num_computed: Tokens whose keys are in the cache.
        pages: Room for its page table; held are the first `num_pages`.
        num_pages: Pages it holds.
        chain: Its first pages as nodes of the prefix cache; the others are its own.
        is_decode: Whether only its newest token is not computed, and was chosen since admission.
        slot: Its state slot; -1 while it waits.
    """

    id: int
    token_ids: np.ndarray
    prompt_len: int
    sampling: Sampling
    stop_token_ids: frozenset[int]
    num_known: int
    pages: np.ndarray
    num_computed: int = 0
    num_pages: int = 0
    chain: list[PrefixNode] = field(default_factory=list)
    is_decode: bool = False
    slot: int = -1

    def new_tokens(self) -> list[int]:
        """The tokens chosen so far."""
        return self.token_ids[self.prompt_len : self.num_known].tolist()
