"""Serve requests of a decoder in continuous batches: schedule, nest, one step on the device, commit."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32

from jaxattn.batch import RaggedBatch
from jaxattn.buckets import Bucket, BucketGrid, powers_of_two
from jaxattn.cache import DEFAULT_PAGE_SIZE, PagePool, is_quantized
from jaxattn.models import DecoderConfig, Model, Sampling, check_cache_dtype, check_kv_scales, init_cache
from jaxattn.models.decoder import Cache, Params
from jaxattn.models.options import Limits, OnTokens, StopTokens, options_per_prompt
from jaxattn.models.sampling import GREEDY, SamplingArrays, sample
from jaxattn.models.steps import step
from jaxattn.scheduler import Finished, ScheduledStep, Scheduler
from jaxattn.score import calibrate_kv_scales
from jaxattn_kernels.arrays import KVScales

MAX_SEQS = 32
"""Requests that run at a time where nothing else is asked for."""


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
        cache_dtype: Element type of the cache, as of `generate`.
        kv_scales: Of a quantised cache, its scales, such as `calibrate_kv_scales` measures.
        implementation: Of the attention; see `jaxattn.attention`.
        grid: The buckets to choose from, one program each; default powers of two up to the largest
            step there can be.

    Attributes:
        scheduler: Which requests wait and run, and what was done so far.

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
        implementation: str = "auto",
        grid: BucketGrid | None = None,
    ) -> None:
        self.scheduler = Scheduler(
            PagePool(num_pages, page_size),
            token_budget=token_budget,
            max_seqs=max_seqs,
            max_chunk=max_chunk,
            share_prefixes=share_prefixes,
            vocab_size=model.config.vocab_size,
        )
        num_seqs = min(max_seqs, token_budget)
        # A shared page is listed once per row.
        num_listed = num_pages * (num_seqs if share_prefixes else 1)
        self._grid = _default_grid(token_budget, num_seqs, num_listed) if grid is None else grid
        self._grid.pick(tokens=token_budget, seqs=num_seqs, pages=num_listed)
        self._model = model
        self._sampling: dict[int, Sampling] = {}
        self._implementation = implementation
        cache_dtype = check_cache_dtype(cache_dtype, model.programs.dtype)
        check_kv_scales(kv_scales, model.config, cache_dtype)
        if kv_scales is None and is_quantized(cache_dtype):
            raise ValueError(
                f"kv_scales was not given, and cache_dtype={cache_dtype.name} needs it; measure it with "
                f"calibrate_kv_scales on prompts such as will be served"
            )
        self._cache = init_cache(
            model.config,
            num_pages=num_pages,
            page_size=page_size,
            dtype=cache_dtype,
            kv_scales=kv_scales,
            stack_layers=model.programs.stack_layers,
        )

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
        request_id = self.scheduler.add(prompt, max_new_tokens, stop_token_ids=stop_token_ids)
        self._sampling[request_id] = sampling
        return request_id

    def cancel(self, request_id: int) -> list[int]:
        """Retire a request now.

        Args:
            request_id: From `add`.

        Returns:
            Its new tokens so far.

        Raises:
            ValueError: If the request is unknown, cancelled or finished.
        """
        token_ids = self.scheduler.cancel(request_id)
        del self._sampling[request_id]
        return token_ids

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
        batch = scheduled.nest(bucket=self._bucket(scheduled), transfer=False)
        rows = list(zip(scheduled.request_ids, scheduled.samples.tolist(), strict=True))
        sampling = [self._sampling[request_id] if samples else GREEDY for request_id, samples in rows]
        token_ids, self._cache = _choose_tokens(
            self._model.params,
            self._cache,
            batch,
            SamplingArrays.of(sampling, batch.bucket.seqs, self._model.config.vocab_size),
            config=self._model.config,
            implementation=self._implementation,
        )
        new_ids = np.asarray(token_ids)[: scheduled.num_rows]
        finished = self.scheduler.commit(scheduled, new_ids)
        for done in finished:
            del self._sampling[done.request_id]
        if on_tokens is not None:
            for (request_id, samples), token_id in zip(rows, new_ids.tolist(), strict=True):
                if samples:
                    on_tokens(request_id, [token_id])
        return finished

    def run(self, on_tokens: OnTokens | None = None) -> dict[int, list[int]]:
        """Run steps until no request is left.

        Args:
            on_tokens: As of `step`.

        Returns:
            The new tokens of each request that finished meanwhile, by its number.
        """
        results: dict[int, list[int]] = {}
        while self.has_work:
            results |= {done.request_id: done.token_ids for done in self.step(on_tokens)}
        return results

    def _bucket(self, scheduled: ScheduledStep) -> Bucket:
        bucket = self._grid.pick(
            tokens=scheduled.token_ids.size, seqs=scheduled.num_rows, pages=scheduled.page_tables.size
        )
        return bucket.decode() if scheduled.q_lens.max() == 1 else bucket


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
    implementation: str = "auto",
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
        kv_scales: Of a quantised cache, its scales. By default those that `calibrate_kv_scales` measures on
            these prompts.
        implementation: Of the attention; see `jaxattn.attention`.
        **options: Of `Server`; `num_pages` is required.

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
    cache_dtype = check_cache_dtype(cache_dtype, model.programs.dtype)
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


def _default_grid(tokens: int, seqs: int, pages: int) -> BucketGrid:
    return BucketGrid(
        tokens=powers_of_two(min(16, tokens), tokens),
        pages=powers_of_two(min(16, pages), pages) if pages else (1,),
        max_seqs=seqs,
    )


@functools.partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="cache")
def _choose_tokens(
    params: Params,
    cache: Cache,
    batch: RaggedBatch,
    sampling: SamplingArrays,
    *,
    config: DecoderConfig,
    implementation: str,
) -> tuple[Int32[Array, " R"], Cache]:
    """One step over a paged batch: the next token of each row, and the cache."""
    logits, cache = step(
        params, cache, batch, config=config, num_rows=batch.bucket.seqs, implementation=implementation
    )
    return sample(logits, batch.kv_lens, sampling), cache
