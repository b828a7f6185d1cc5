"""Serve requests of a decoder in continuous batches: schedule, nest, one step on the device, commit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from jaxattn.attention.choice_table import ChoiceTable
from jaxattn.batch.bucket import Bucket, BucketGrid, Buckets, powers_of_two
from jaxattn.batch.trace import BatchLog
from jaxattn.cache.paged import DEFAULT_PAGE_SIZE
from jaxattn.cache.pool import PagePool
from jaxattn.cache.quantization import is_quantized
from jaxattn.models import Model, Sampling, check_cache_dtype, check_kv_scales
from jaxattn.models.options import Limits, OnTokens, StopTokens, options_per_prompt
from jaxattn.models.sampling import GREEDY, SamplingArrays
from jaxattn.serving.records import Finished, ScheduledStep
from jaxattn.serving.scheduler import Scheduler
from jaxattn.serving.score import calibrate_kv_scales
from jaxattn.serving.sizes import MAX_SEQS, largest_step
from jaxattn_kernels.arrays import KVScales


class Server:
    """A model, its paged cache and a scheduler. New requests may come between any two steps.

    A request's tokens are those of `generate` (with the same seed; in a quantised cache, with the same
    scales), whatever runs beside it and however it is cut into chunks.

    Args:
        model: The model.
        num_pages: Pages of the cache.
        page_size: Tokens per page.
        token_budget: Most query tokens per step.
        max_seqs: Most requests that run at a time.
        max_chunk: Most tokens of one prompt per step; None for no other limit than the budget.
        share_prefixes: Whether requests share the pages of common prefixes.
        cache_dtype: Element type of the cache: that of the parameters, which is the default, or a quantised
            one, "int8", "float8_e4m3fn" or "float8_e5m2".
        kv_scales: The scales `[L, K]` of a quantised cache, such as `calibrate_kv_scales` measures.
        implementation: The implementation of attention; see `jaxattn.attention`.
        grid: The buckets to choose from, one program each: a grid, or a plan of `plan_buckets`; default
            powers of two up to the largest step there can be (`largest_step`). Programs compile when they are
            first needed, or before by `warmup`.
        log: Where to write the sizes of every step, for `plan_buckets`.

    Attributes:
        scheduler: Which requests wait and run, and what was done so far. Requests may also be added and
            cancelled there.

    Raises:
        ValueError: If a limit is not an integer of at least 1, the grid does not hold every step there can
            be, no cache can have this dtype, or scales and dtype disagree.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_pages: int,
        page_size: int = DEFAULT_PAGE_SIZE,
        token_budget: int = 256,
        max_seqs: int = MAX_SEQS,
        max_chunk: int | None = None,
        share_prefixes: bool = True,
        cache_dtype: jax.typing.DTypeLike | None = None,
        kv_scales: KVScales | None = None,
        implementation: str | ChoiceTable = "auto",
        grid: Buckets | None = None,
        log: BatchLog | None = None,
    ) -> None:
        self.scheduler = Scheduler(
            PagePool(num_pages, page_size),
            token_budget=token_budget,
            max_seqs=max_seqs,
            max_chunk=max_chunk,
            share_prefixes=share_prefixes,
            vocab_size=model.config.vocab_size,
        )
        largest = largest_step(
            num_pages=num_pages, token_budget=token_budget, max_seqs=max_seqs, share_prefixes=share_prefixes
        )
        self._grid = _default_grid(largest) if grid is None else grid
        self._grid.pick(tokens=largest.tokens, seqs=largest.seqs, pages=largest.pages)
        self._model = model
        self._log = log
        cache_dtype = check_cache_dtype(cache_dtype, model.compiled.dtype)
        check_kv_scales(kv_scales, model.config, cache_dtype)
        if kv_scales is None and is_quantized(cache_dtype):
            raise ValueError(
                f"kv_scales was not given, and cache_dtype={cache_dtype.name} needs it; measure it with "
                f"calibrate_kv_scales on prompts such as will be served"
            )
        sizes: dict[str, Any] = {"num_pages": num_pages, "page_size": page_size, "cache_dtype": cache_dtype}
        self._cache = model.empty_cache(kv_scales=kv_scales, **sizes)
        self._compile_options = {**sizes, "implementation": implementation}
        self._programs: dict[Bucket, Callable] = {}

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return self.scheduler.has_work

    def add(
        self,
        prompt: Sequence[Any] | np.ndarray,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_token_ids: Collection[int] = (),
    ) -> int:
        """Put a request at the end of the queue; see `Scheduler.add`.

        Args:
            prompt: Token ids.
            max_new_tokens: The most tokens to add to it.
            sampling: How they are chosen; the likeliest ones by default.
            stop_token_ids: The request ends with any of these.

        Returns:
            The number of the request.

        Raises:
            ValueError: If an argument is out of range, or the tokens could not be held even by the
                whole cache.
        """
        return self.scheduler.add(prompt, max_new_tokens, sampling=sampling, stop_token_ids=stop_token_ids)

    def cancel(self, request_id: int) -> list[int]:
        """Retire a request now.

        Args:
            request_id: From `add`.

        Returns:
            Its new tokens so far.

        Raises:
            ValueError: If the request is unknown, cancelled or finished.
        """
        return self.scheduler.cancel(request_id)

    def step(self, on_tokens: OnTokens | None = None) -> list[Finished]:
        """Run one step.

        Args:
            on_tokens: Called at the end of the step with each request that has a new token, and a list of
                this one token. It may add and cancel requests.

        Returns:
            The requests that finished with it; none where there is no work.
        """
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return []
        batch = scheduled.nest(bucket=self._bucket(scheduled), transfer=False, log=self._log)
        token_ids, self._cache = self._program(batch.bucket)(
            self._model.params, self._cache, batch, self._sampling_arrays(scheduled, batch.bucket)
        )
        new_ids = np.asarray(token_ids)[: scheduled.num_rows]
        finished = self.scheduler.commit(scheduled, new_ids)
        if on_tokens is not None:
            rows = zip(scheduled.request_ids, scheduled.samples.tolist(), new_ids.tolist(), strict=True)
            for request_id, samples, token_id in rows:
                if samples:
                    on_tokens(request_id, [token_id])
        return finished

    def run(self, on_tokens: OnTokens | None = None) -> dict[int, list[int]]:
        """Run steps until no request is left.

        Args:
            on_tokens: Called at the end of each step, as by `step`.

        Returns:
            The new tokens of each request that finished meanwhile, by its number.
        """
        results: dict[int, list[int]] = {}
        while self.has_work:
            results |= {done.request_id: done.token_ids for done in self.step(on_tokens)}
        return results

    def _bucket(self, scheduled: ScheduledStep) -> Bucket:
        return self._grid.pick(
            tokens=scheduled.token_ids.size,
            seqs=scheduled.num_rows,
            pages=scheduled.page_tables.size,
            max_q_len=int(scheduled.q_lens.max()),
        )

    def _sampling_arrays(self, scheduled: ScheduledStep, bucket: Bucket) -> SamplingArrays:
        """How each row chooses; rows whose token is not used draw nothing."""
        rows = zip(scheduled.sampling, scheduled.samples.tolist(), strict=True)
        wanted = [sampling if samples else GREEDY for sampling, samples in rows]
        return SamplingArrays.of(wanted, bucket.seqs, self._model.config.vocab_size)

    def _program(self, bucket: Bucket) -> Callable:
        """The step's program; kept here as well, since to ask for it takes as long as a small step."""
        if bucket not in self._programs:
            self._programs[bucket] = self._model.compiled.choose_tokens(bucket, **self._compile_options)
        return self._programs[bucket]


def serve(
    model: Model,
    prompts: Sequence[Any],
    max_new_tokens: Limits,
    *,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_token_ids: StopTokens = (),
    on_tokens: OnTokens | None = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
    kv_scales: KVScales | None = None,
    implementation: str | ChoiceTable = "auto",
    **options: Any,
) -> list[list[int]]:
    """Continue every prompt, in continuous batches over a cache of limited size.

    Args:
        model: The model.
        prompts: Token ids, one list or 1-D integer array per prompt.
        max_new_tokens: The most tokens to add, as of `generate`.
        sampling: How tokens are chosen, as of `generate`.
        stop_token_ids: A prompt ends with any of these, as of `generate`.
        on_tokens: Called after every step with the number of each prompt that has a new token, and a list
            of this one token.
        cache_dtype: Element type of the cache, as of `generate`.
        kv_scales: The scales `[L, K]` of a quantised cache. By default those that `calibrate_kv_scales`
            measures on these prompts.
        implementation: The implementation of attention; see `jaxattn.attention`.
        **options: Other arguments of `Server`; `num_pages` is required.

    Returns:
        The new tokens of each prompt, in the order of the prompts.

    Raises:
        ValueError: If an argument is out of range, or a prompt could not be held by the whole cache.
    """
    wanted = options_per_prompt(
        len(prompts),
        max_new_tokens,
        sampling=sampling,
        stop_token_ids=stop_token_ids,
        vocab_size=model.config.vocab_size,
    )
    cache_dtype = check_cache_dtype(cache_dtype, model.compiled.dtype)
    if kv_scales is None and is_quantized(cache_dtype):
        kv_scales = calibrate_kv_scales(model, prompts, cache_dtype, implementation=implementation)
    server = Server(
        model, cache_dtype=cache_dtype, kv_scales=kv_scales, implementation=implementation, **options
    )
    # A new server numbers its requests from 0: they have the numbers of their prompts.
    for prompt, asked in zip(prompts, wanted, strict=True):
        server.add(prompt, asked.max_new_tokens, sampling=asked.sampling, stop_token_ids=asked.stop_token_ids)
    results = server.run(on_tokens)
    return [results[i] for i in range(len(prompts))]


def _default_grid(largest: Bucket) -> BucketGrid:
    tokens, pages = largest.tokens, largest.pages
    return BucketGrid(
        tokens=powers_of_two(min(16, tokens), tokens),
        pages=powers_of_two(min(16, pages), pages) if pages else (1,),
        max_seqs=largest.seqs,
    )
