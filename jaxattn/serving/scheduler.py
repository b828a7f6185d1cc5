"""Continuous batches: which tokens of which requests are computed in the next step.

    step = scheduler.schedule()                  # host: rows, chunks, pages
    tokens = run(step.nest())                    # device: one new token per row that samples
    finished = scheduler.commit(step, tokens)    # host: bookkeeping, requests that are done

The policy, in this order, within `token_budget` query tokens and `max_seqs` rows:

1. Running requests that decode get one token each, the oldest first.
2. Running requests that prefill get a chunk each, as long as the rest of the budget and
   `max_chunk` allow, the oldest first.
3. Waiting requests are admitted in order, where the pages for all their tokens can be had.

Pages are allocated when tokens need them. Where they run out, pages that are only kept for later
requests are evicted; then the youngest running request is preempted: it gives its pages back and
waits at the front of the queue to have all its tokens, new ones included, computed again. The
youngest one itself takes what is left of the pages, or waits with those it has.

So all running requests are older than all waiting ones, the oldest request gets tokens in every
step, since it can take the pages of all others, and every request ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np

from jaxattn.batch.numbers import positive_int
from jaxattn.batch.ragged import INT32_MAX
from jaxattn.cache.pool import PagePool
from jaxattn.cache.prefix import PrefixCache, PrefixNode
from jaxattn.models.sampling import GREEDY, Sampling
from jaxattn.serving.records import Finished, Request, ScheduledStep, SchedulerStats


class _StepPlan:
    """The rows of a step while it is being planned: how many tokens each request gets."""

    def __init__(self, token_budget: int) -> None:
        self.num_left = token_budget
        self.chunks: dict[Request, int] = {}

    def add(self, request: Request, num_tokens: int) -> None:
        self.num_left -= num_tokens
        self.chunks[request] = num_tokens

    def remove(self, request: Request) -> None:
        self.num_left += self.chunks.pop(request, 0)


class Scheduler:
    """Plans the steps of continuous batches, deterministically, on the host. See the module.

    Every request gets the tokens it would get alone, whatever runs beside it.

    Args:
        pool: The pages of the cache. From now on only the scheduler takes pages from it.
        token_budget: Most query tokens per step.
        max_seqs: Most requests that run at a time, and so rows per step.
        max_chunk: Most query tokens of one request per step; None for no other limit than the budget.
        share_prefixes: Whether requests that begin with the same whole pages of tokens share these
            pages; such pages are kept after their request has finished, while there is room. Not for
            models with recurrent state, which a shared page does not hold.
        vocab_size: Number of token ids, to check prompts against.

    Attributes:
        pool: The pages.
        stats: What was done so far.

    Raises:
        ValueError: If a limit is not an integer of at least 1.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        token_budget: int,
        max_seqs: int,
        max_chunk: int | None = None,
        share_prefixes: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self.pool = pool
        self.stats = SchedulerStats()
        self._token_budget = positive_int("token_budget", token_budget)
        # Every running request can have a token in every step: none starves beside decoding ones.
        self._max_running = min(positive_int("max_seqs", max_seqs), token_budget)
        self._max_chunk = token_budget if max_chunk is None else positive_int("max_chunk", max_chunk)
        self._id_limit = INT32_MAX + 1 if vocab_size is None else positive_int("vocab_size", vocab_size)
        self._share_prefixes = share_prefixes
        self._capacity = pool.num_free
        self._prefixes = PrefixCache(pool)
        self._requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()  # oldest first
        self._running: list[Request] = []  # oldest first
        self._free_slots = list(range(self._max_running - 1, -1, -1))
        self._next_id = 0
        self._pending: ScheduledStep | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that hold no pages, new or preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self._running)

    @property
    def num_retained(self) -> int:
        """Pages without a request, kept for their prefix until their memory is needed."""
        return self._prefixes.num_idle

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def token_ids(self, request_id: int) -> list[int]:
        """New tokens so far of a request that waits or runs.

        Args:
            request_id: From `add`.

        Raises:
            ValueError: If the request is unknown, cancelled or finished.
        """
        return self._get(request_id).new_tokens()

    def add(
        self,
        prompt: Sequence[Any] | np.ndarray,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_token_ids: Collection[int] = (),
    ) -> int:
        """Put a request at the end of the queue.

        Args:
            prompt: Token ids.
            max_new_tokens: The most tokens to add to it.
            sampling: How they are chosen, for whoever runs the steps; the likeliest ones by default.
            stop_token_ids: The request ends with any of these.

        Returns:
            The number of the request; later ones are larger.

        Raises:
            ValueError: If an argument is out of range, or the tokens could not be held even by the
                whole cache; the queue is unchanged then.
        """
        prompt_ids = self._check_prompt(prompt)
        positive_int("max_new_tokens", max_new_tokens)
        for token_id in stop_token_ids:
            if not isinstance(token_id, Integral) or not 0 <= token_id < self._id_limit:
                raise ValueError(
                    f"stop_token_ids holds {token_id!r}; expected token ids from 0 to {self._id_limit - 1}"
                )
        # The last new token is handed out and never computed.
        num_pages = self.pool.pages_for(prompt_ids.size + int(max_new_tokens) - 1)
        if num_pages > self._capacity:
            raise ValueError(
                f"a prompt of {prompt_ids.size} tokens and max_new_tokens={max_new_tokens} need {num_pages} "
                f"pages of {self.pool.page_size} tokens, but the cache has {self._capacity}; shorten them or "
                f"make the cache larger"
            )
        token_ids = np.zeros(prompt_ids.size + int(max_new_tokens), np.int32)
        token_ids[: prompt_ids.size] = prompt_ids
        request = Request(
            id=self._next_id,
            token_ids=token_ids,
            prompt_len=prompt_ids.size,
            sampling=sampling,
            stop_token_ids=frozenset(map(int, stop_token_ids)),
            num_known=prompt_ids.size,
            pages=np.zeros(num_pages, np.int32),
        )
        self._next_id += 1
        self._requests[request.id] = request
        self._waiting.append(request)
        return request.id

    def cancel(self, request_id: int) -> list[int]:
        """Retire a request now; its row in a step not committed yet is ignored.

        Args:
            request_id: From `add`.

        Returns:
            Its new tokens so far.

        Raises:
            ValueError: If the request is unknown, cancelled or finished.
        """
        request = self._get(request_id)
        if request.slot < 0:
            self._waiting.remove(request)
        self._retire(request)
        return request.new_tokens()

    def schedule(self) -> ScheduledStep | None:
        """Plan the next step. See the module for the policy.

        Returns:
            The step, or None where no request is left.

        Raises:
            RuntimeError: If the last step has not been committed.
            MemoryError: If pages were taken from the pool by others, and too few are left.
        """
        if self._pending is not None:
            raise RuntimeError(f"step {self._pending.number} has not been committed; call commit first")
        if not self.has_work:
            return None
        plan = _StepPlan(self._token_budget)
        decoding = [request for request in self._running if request.is_decode]
        prefilling = [request for request in self._running if not request.is_decode]
        for request in (*decoding, *prefilling):
            self._plan_row(plan, request)
        self._admit(plan)
        if not plan.chunks:
            raise MemoryError(
                f"{self.pool.num_free} of {self.pool.num_pages} pages are free and no request runs on; "
                f"the scheduler must be the only one to take pages from its pool"
            )
        self._pending = self._build(plan)
        return self._pending

    def commit(self, step: ScheduledStep, token_ids: Any) -> list[Finished]:
        """Take note that a step has run.

        Args:
            step: What `schedule` returned last.
            token_ids: `[rows]` The new token of each row; ignored where `step.samples` is False.

        Returns:
            The requests that are done; the scheduler forgets them.

        Raises:
            ValueError: If `step` is not the one that is due, or `token_ids` no token per row; nothing
                changes then.
        """
        if step is not self._pending:
            due = "no step is due" if self._pending is None else f"step {self._pending.number} is due"
            raise ValueError(
                f"step {step.number} cannot be committed: {due}; commit each step once, in order"
            )
        new_ids = self._check_new_tokens(step, token_ids)
        self._pending = None
        finished = []
        for i, request_id in enumerate(step.request_ids):
            request = self._requests.get(request_id)
            if request is None:  # cancelled since
                continue
            request.num_computed += int(step.q_lens[i])
            self._register(request)
            if step.samples[i] and (reason := self._append(request, new_ids[i])):
                self._retire(request)
                finished.append(Finished(request.id, request.new_tokens(), reason))
        return finished

    def _plan_row(self, plan: _StepPlan, request: Request) -> None:
        """Give a running request tokens of this step, unless it was preempted meanwhile."""
        wanted = min(request.num_known - request.num_computed, self._max_chunk, plan.num_left)
        if request.slot < 0 or wanted == 0:
            return
        if num_tokens := self._reserve(plan, request, wanted):
            plan.add(request, num_tokens)

    def _reserve(self, plan: _StepPlan, request: Request, wanted: int) -> int:
        """Get pages for the next tokens of a request, from younger ones if need be; how many fit."""
        while self._room(request) < wanted and self._running[-1] is not request:
            self._preempt(plan, self._running[-1])
        num_tokens = min(self._room(request), wanted)
        missing = self.pool.pages_for(request.num_computed + num_tokens) - request.num_pages
        if missing > 0:
            num_evicted = max(missing - self.pool.num_free, 0)
            self._prefixes.evict(num_evicted)
            self.stats.num_evictions += num_evicted
            end = request.num_pages + missing
            request.pages[request.num_pages : end] = self.pool.allocate(missing * self.pool.page_size)
            request.num_pages = end
        return num_tokens

    def _room(self, request: Request) -> int:
        """Tokens for which a request has pages or can get them without taking from others."""
        num_pages = request.num_pages + self.pool.num_free + self._prefixes.num_idle
        return num_pages * self.pool.page_size - request.num_computed

    def _preempt(self, plan: _StepPlan, request: Request) -> None:
        plan.remove(request)
        self._stop(request)
        self._waiting.appendleft(request)
        self.stats.num_preemptions += 1

    def _admit(self, plan: _StepPlan) -> None:
        """Start waiting requests in order, each where pages for all its known tokens can be had."""
        while self._waiting and plan.num_left and len(self._running) < self._max_running:
            request = self._waiting[0]
            chain = self._shareable(request)
            num_idle = self._prefixes.num_idle - sum(map(self._prefixes.is_idle, chain))
            if self.pool.pages_for(request.num_known) - len(chain) > self.pool.num_free + num_idle:
                return
            self._waiting.popleft()
            self._start(request, chain)
            self._plan_row(plan, request)

    def _shareable(self, request: Request) -> list[PrefixNode]:
        """Computed pages a request can begin with; one token at least is left, to have its logits."""
        if not self._share_prefixes:
            return []
        return self._prefixes.match(request.token_ids[: request.num_known - 1])

    def _start(self, request: Request, chain: list[PrefixNode]) -> None:
        self._prefixes.acquire(chain)
        request.chain = chain
        request.num_pages = len(chain)
        request.pages[: len(chain)] = [node.page for node in chain]
        request.num_computed = len(chain) * self.pool.page_size
        request.slot = self._free_slots.pop()
        self._running.append(request)
        self.stats.num_shared_tokens += request.num_computed

    def _stop(self, request: Request) -> None:
        """Take everything from a running request but its tokens."""
        self.pool.free(request.pages[len(request.chain) : request.num_pages])
        self._prefixes.release(request.chain)
        self._free_slots.append(request.slot)
        self._running.remove(request)
        request.chain, request.num_pages, request.num_computed = [], 0, 0
        request.is_decode, request.slot = False, -1

    def _retire(self, request: Request) -> None:
        if request.slot >= 0:
            self._stop(request)
        del self._requests[request.id]

    def _register(self, request: Request) -> None:
        """Make the whole pages that a request has computed known to the prefix cache."""
        page_size, first = self.pool.page_size, len(request.chain)
        end = request.num_computed // page_size
        if self._share_prefixes and end > first:
            token_ids = request.token_ids[first * page_size : end * page_size]
            own = request.pages[first:end]
            request.pages[first:end] = self._prefixes.extend(request.chain, token_ids, own)

    def _append(self, request: Request, token_id: int) -> Literal["stop", "length"] | None:
        """Add a new token to a request; why it ends, if it does."""
        request.token_ids[request.num_known] = token_id
        request.num_known += 1
        request.is_decode = True
        if token_id in request.stop_token_ids:
            return "stop"
        return "length" if request.num_known == request.token_ids.size else None

    def _build(self, plan: _StepPlan) -> ScheduledStep:
        rows = plan.chunks.items()
        ends = [request.num_computed + n for request, n in rows]

        def per_row(values: list[int]) -> np.ndarray:
            return np.array(values, np.int32)

        step = ScheduledStep(
            number=self.stats.num_steps,
            request_ids=tuple(request.id for request, _ in rows),
            token_ids=np.concatenate([r.token_ids[r.num_computed : r.num_computed + n] for r, n in rows]),
            q_lens=per_row([n for _, n in rows]),
            context_lens=per_row([request.num_computed for request, _ in rows]),
            page_tables=np.concatenate([request.pages[: request.num_pages] for request, _ in rows]),
            page_counts=per_row([request.num_pages for request, _ in rows]),
            is_decode=np.array([request.is_decode for request, _ in rows], bool),
            samples=np.array([e == r.num_known for e, (r, _) in zip(ends, rows, strict=True)], bool),
            sampling=tuple(request.sampling for request, _ in rows),
            state_slots=per_row([request.slot for request, _ in rows]),
            page_size=self.pool.page_size,
            num_pages=self.pool.num_pages,
        )
        self.stats.num_steps += 1
        self.stats.num_query_tokens += step.token_ids.size
        return step

    def _get(self, request_id: int) -> Request:
        if request_id not in self._requests:
            raise ValueError(
                f"request_id={request_id!r} neither waits nor runs; finished requests are those that commit "
                f"has returned"
            )
        return self._requests[request_id]

    def _check_prompt(self, prompt: Sequence[Any] | np.ndarray) -> np.ndarray:
        if len(prompt) == 0:
            raise ValueError("prompt is empty; give at least one token id")
        try:
            array = np.asarray(prompt)
        except ValueError:
            raise ValueError("prompt holds rows of different lengths; add one request per prompt") from None
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"prompt has shape {array.shape} and dtype {array.dtype}; expected one axis of integers"
            )
        return self._check_ids("prompt", array)

    def _check_new_tokens(self, step: ScheduledStep, token_ids: Any) -> list[int]:
        array = np.asarray(token_ids)
        if array.shape != (step.num_rows,) or array.dtype.kind not in "iu":
            raise ValueError(
                f"token_ids has shape {array.shape} and dtype {array.dtype}; expected one integer for each "
                f"of the {step.num_rows} rows of step {step.number}"
            )
        return self._check_ids("token_ids", np.where(step.samples, array, 0)).tolist()

    def _check_ids(self, name: str, array: np.ndarray) -> np.ndarray:
        bad = np.flatnonzero((array < 0) | (array >= self._id_limit))
        if bad.size:
            raise ValueError(
                f"{name}[{bad[0]}]={array[bad[0]]} is no token id: expected 0 <= id < {self._id_limit}"
            )
        return array
