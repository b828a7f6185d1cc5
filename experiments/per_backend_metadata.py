"""Metadata derived per backend, and a superset staged at capacity: what `jaxattn` is compared with.

TensorRT-LLM's AutoDeploy had two designs: before its refactor every backend derived lengths, prefix
sums and page lists for itself (`stage_before`, `CONSUMERS`); after it, one function stages a superset
into one buffer of the largest batch's size, and copies that buffer (`StagedSuperset`). These are **our own
restatements of the steps, not their code**: theirs is PyTorch and runs on its dispatcher; ours is
NumPy, or `jax.numpy` op by op. They say what the *design* costs here, in one process with ours, and
nothing about the time of their programs.

Every choice that was open was made in the baselines' favour.

In, of the design before: staging of seven fields, each through an array of its own, five of them
cleared to capacity; per consumer the count of sequences from the padded tail, with its assertion,
in steps that are not decode alone; prefix sums of lengths and of pages; the copy of the page list at
capacity; last page lengths; row and position of each token; state slots as 64-bit integers;
initial-state flags; counts of prefill sequences and tokens, which must reach the host.

In, of the design after: its fifteen fields of a steady step and their types, the clearing of the
token and position buffers, the six counts on the host, and both copies: the whole region at capacity,
and the page list cut to its length.

Out: Python lists as the only input and loops over them (arrays are taken here, and positions are
vectorised), pinned memory, the search for a free page, flags recomputed in every layer, chunk
indices of state-space layers, fields for overlap scheduling and speculation, further window pools,
kernel plans, assembling the model's arguments, and PyTorch's dispatch, which by the number of its
calls is probably most of AutoDeploy's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Fields = dict[str, Any]
"""Fields by name: NumPy or JAX arrays, or integers on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """One step's batch as a scheduler knows it: int32 arrays of the live sizes.

    Prefilling sequences stand before decoding ones, and a prefill has more than one token: the
    baselines tell the two by that.

    Attributes:
        token_ids: Query tokens, sequence after sequence.
        q_lens: Query tokens per sequence.
        context_lens: Tokens cached before, per sequence.
        cu_q_lens: Prefix sums of `q_lens`. Only the staged superset reads them; it is given them.
        pages: Pages, sequence after sequence, exactly as many as hold keys.
        page_counts: Pages per sequence.
        cu_page_counts: Prefix sums of `page_counts`, for the staged superset.
        state_slots: Slot of each sequence's recurrent state.
        is_decode: Whether each sequence decodes.
        page_size: Tokens per page.
        num_pages: Pages of the cache.
    """

    token_ids: np.ndarray
    q_lens: np.ndarray
    context_lens: np.ndarray
    cu_q_lens: np.ndarray
    pages: np.ndarray
    page_counts: np.ndarray
    cu_page_counts: np.ndarray
    state_slots: np.ndarray
    is_decode: np.ndarray
    page_size: int
    num_pages: int

    @property
    def is_decode_only(self) -> bool:
        """Whether every sequence adds one token: their tokens are then `[B, 1]`, else `[1, T]`."""
        return self.token_ids.size == self.q_lens.size


@dataclass(frozen=True, slots=True)
class Capacity:
    """The largest batch that buffers are allocated for.

    Attributes:
        tokens: Query tokens.
        seqs: Sequences.
        pages: Entries of the page list.
    """

    tokens: int
    seqs: int
    pages: int

    @classmethod
    def deployed(
        cls, *, page_size: int, tokens: int = 8192, seqs: int = 1024, max_len: int = 8192
    ) -> Capacity:
        """Room for `seqs` sequences of `max_len` tokens each: what a server allocates once."""
        return cls(tokens, seqs, max(tokens, seqs * (max_len // page_size) + 1))

    @classmethod
    def of(cls, steps: Iterable[StepInputs]) -> Capacity:
        """Exactly the largest sizes of these steps: the best that a fixed capacity can be."""
        sizes = [(step.token_ids.size, step.q_lens.size, step.pages.size) for step in steps]
        return cls(*(max(column) for column in zip(*sizes, strict=True)))


# Before the refactor: staging field by field, then every consumer for itself.

BEFORE_DTYPES = {
    "input_ids": np.int32,
    "position_ids": np.int64,
    "seq_len": np.int32,
    "input_pos": np.int32,
    "cache_loc": np.int32,
    "pages_per_seq": np.int32,
    "slot_idx": np.int32,
}
CLEARED = ("input_ids", "position_ids", "seq_len", "input_pos", "pages_per_seq")


def before_sizes(capacity: Capacity) -> dict[str, int]:
    """Entries of each buffer of the design before."""
    tokens = dict.fromkeys(("input_ids", "position_ids"), capacity.tokens)
    seqs = dict.fromkeys(("seq_len", "input_pos", "pages_per_seq", "slot_idx"), capacity.seqs)
    return {**tokens, **seqs, "cache_loc": capacity.pages}


def before_values(step: StepInputs) -> Fields:
    """The values of each field of the design before; positions are derived, all else is given."""
    starts = np.cumsum(step.q_lens) - step.q_lens
    offsets = np.arange(step.token_ids.size) - np.repeat(starts, step.q_lens)
    return {
        "input_ids": step.token_ids,
        "position_ids": offsets + np.repeat(step.context_lens, step.q_lens),
        "seq_len": step.q_lens,
        "input_pos": step.context_lens,
        "cache_loc": step.pages,
        "pages_per_seq": step.page_counts,
        "slot_idx": step.state_slots,
    }


def before_bytes(step: StepInputs) -> int:
    """Bytes that the design before transfers: what is live, in as many pieces as there are fields."""
    return sum(np.array(values, BEFORE_DTYPES[name]).nbytes for name, values in before_values(step).items())


def before_buffers(capacity: Capacity) -> Fields:
    """The persistent buffers of the design before, zeros."""
    return {name: np.zeros(size, BEFORE_DTYPES[name]) for name, size in before_sizes(capacity).items()}


def stage_before(step: StepInputs, buffers: Mapping[str, np.ndarray]) -> Fields:
    """Stage the fields one by one into their buffers, in NumPy.

    Each goes through a fresh array, as through fresh pinned memory, and buffers that a consumer scans
    to the end are cleared first.

    Returns:
        The buffers, with the tokens cut to the shape that tells decode from prefill.
    """
    for name, values in before_values(step).items():
        staged = np.array(values, BEFORE_DTYPES[name])
        if name in CLEARED:
            buffers[name].fill(0)
        buffers[name][: staged.size] = staged
    return _with_token_shapes(dict(buffers), step)


def stage_before_on_device(step: StepInputs, capacity: Capacity) -> Fields:
    """Stage the fields one by one on the default device: a transfer and a padding of each."""
    sizes = before_sizes(capacity)
    buffers = {}
    for name, values in before_values(step).items():
        live = jax.device_put(np.array(values, np.int32))  # JAX has no 64-bit integers by default
        buffers[name] = jnp.pad(live, (0, sizes[name] - live.size))
    return _with_token_shapes(buffers, step)


def _with_token_shapes(buffers: Fields, step: StepInputs) -> Fields:
    shape = (-1, 1) if step.is_decode_only else (1, -1)
    for name in ("input_ids", "position_ids"):
        buffers[name] = buffers[name][: step.token_ids.size].reshape(shape)
    return buffers


def _live_lens(xp: ModuleType, staged: Fields) -> Any:
    """Query lengths without the zero tail; its length must reach the host, unless all decode."""
    batch, length = staged["input_ids"].shape
    lens = staged["seq_len"]
    if length == 1:
        return lens[:batch]
    num_seqs = int(xp.sum(lens > 0))
    assert int(xp.sum(lens[num_seqs:])) == 0, "lengths must be padded with zeros"
    return lens[:num_seqs]


def _prefix_sums(xp: ModuleType, lens: Any) -> Any:
    return xp.concatenate([xp.zeros(1, np.int32), xp.cumsum(lens, dtype=np.int32)])


def _repeat(xp: ModuleType, values: Any, counts: Any, total: int) -> Any:
    """`values`, each repeated: both libraries' own function; JAX's is told the total."""
    return np.repeat(values, counts) if xp is np else jnp.repeat(values, counts, total_repeat_length=total)


def _slots(xp: ModuleType, staged: Fields, num_seqs: int) -> Any:
    # A clone of the live slots, then indices as wide as the library has them.
    return xp.array(staged["slot_idx"][:num_seqs], copy=True).astype(np.int64 if xp is np else np.int32)


def _prefill_counts(xp: ModuleType, lens: Any) -> tuple[int, int]:
    """Prefilling sequences and their tokens, on the host."""
    num_prefill = int(xp.sum(lens > 1))
    return num_prefill, int(xp.sum(lens[:num_prefill]))


def prepare_paged_attention(xp: ModuleType, staged: Fields, page_size: int) -> Fields:
    """What paged attention in the manner of FlashInfer derives: CSR pages, and each token's place."""
    lens = _live_lens(xp, staged)
    num_seqs, num_tokens = lens.shape[0], staged["input_ids"].size
    qo_indptr = _prefix_sums(xp, lens)
    indptr = _prefix_sums(xp, staged["pages_per_seq"][:num_seqs])
    last_page_len = (staged["input_pos"][:num_seqs] + lens - 1) % page_size + 1
    # The helper that finds each token's row and position derives the lengths once more.
    kv_lens = (indptr[1:] - indptr[:-1] - 1) * page_size + last_page_len
    batch_indices = _repeat(xp, xp.arange(num_seqs, dtype=np.int32), lens, num_tokens)
    offsets = xp.arange(num_tokens, dtype=np.int32) - qo_indptr[batch_indices]
    return {
        "qo_indptr": qo_indptr,
        "paged_kv_indptr": indptr,
        "paged_kv_indices": xp.array(staged["cache_loc"], copy=True),
        "paged_kv_last_page_len": last_page_len,
        "batch_indices": batch_indices,
        "positions": offsets + (kv_lens - (qo_indptr[1:] - qo_indptr[:-1]))[batch_indices],
    }


def prepare_slot_attention(xp: ModuleType, staged: Fields, page_size: int) -> Fields:
    """What attention over one cache slot per sequence derives, in the manner of a Triton kernel."""
    del page_size
    lens = _live_lens(xp, staged)
    num_seqs = lens.shape[0]
    return {
        "seq_len": lens,
        "seq_start": _prefix_sums(xp, lens)[:-1],
        "input_pos": xp.array(staged["input_pos"][:num_seqs], copy=True),
        "slot_idx": xp.array(staged["slot_idx"][:num_seqs], copy=True),
    }


def prepare_convolution(xp: ModuleType, staged: Fields, page_size: int) -> Fields:
    """What causal convolutions with a state derive."""
    del page_size
    lens = _live_lens(xp, staged)
    num_seqs = lens.shape[0]
    return {
        "seq_len": lens,
        "seq_start": _prefix_sums(xp, lens)[:-1],
        "slot_idx": _slots(xp, staged, num_seqs),
        "use_initial_states": staged["input_pos"][:num_seqs] > 0,
    }


def prepare_state_space(xp: ModuleType, staged: Fields, page_size: int) -> Fields:
    """What state-space layers derive: a convolution's fields, and how the batch splits into phases."""
    del page_size
    lens = _live_lens(xp, staged)
    num_seqs = lens.shape[0]
    fields: Fields = {
        "seq_start": _prefix_sums(xp, lens)[:-1],
        "slot_idx": _slots(xp, staged, num_seqs),
        "use_initial_states": staged["input_pos"][:num_seqs] > 0,
        "num_prefill": 0,
        "num_prefill_tokens": 0,
    }
    if staged["input_ids"].shape[1] == 1:
        return fields
    num_prefill, num_tokens = _prefill_counts(xp, lens)
    prefill_lens = lens[:num_prefill]
    rows = xp.arange(num_prefill, dtype=np.int32)
    return {
        **fields,
        "num_prefill": num_prefill,
        "num_prefill_tokens": num_tokens,
        "cu_seqlens_prefill": _prefix_sums(xp, prefill_lens),
        "seq_idx_prefill": _repeat(xp, rows, prefill_lens, num_tokens),
    }


def prepare_linear_attention(xp: ModuleType, staged: Fields, page_size: int) -> Fields:
    """What (gated) linear attention derives, in the manner of flash-linear-attention."""
    del page_size
    lens = _live_lens(xp, staged)
    num_seqs = lens.shape[0]
    fields = {
        "cu_seqlens": _prefix_sums(xp, lens),
        "slot_idx": _slots(xp, staged, num_seqs),
        "use_initial_states": staged["input_pos"][:num_seqs] > 0,
    }
    if staged["input_ids"].shape[1] == 1:
        return {**fields, "num_prefill": 0, "num_prefill_tokens": 0}
    num_prefill, num_tokens = _prefill_counts(xp, lens)
    return {**fields, "num_prefill": num_prefill, "num_prefill_tokens": num_tokens}


CONSUMERS: dict[str, Callable[[ModuleType, Fields, int], Fields]] = {
    "paged attention": prepare_paged_attention,
    "convolution": prepare_convolution,
    "state space": prepare_state_space,
    "slot attention": prepare_slot_attention,
    "linear attention": prepare_linear_attention,
}
HYBRID = ("paged attention", "convolution", "state space")
"""The consumers of a hybrid model; no model has all of `CONSUMERS`."""


def prepare_each(
    xp: ModuleType, staged: Fields, page_size: int, consumers: Iterable[str] = HYBRID
) -> dict[str, Fields]:
    """Every consumer's fields, each derived by itself from what was staged.

    Args:
        xp: `numpy` or `jax.numpy`, matching the arrays.
        staged: From `stage_before` or `stage_before_on_device`.
        page_size: Tokens per page.
        consumers: Names in `CONSUMERS`.
    """
    return {name: CONSUMERS[name](xp, staged, page_size) for name in consumers}


# After the refactor: one superset in one buffer of capacity.


def after_layout(capacity: Capacity) -> dict[str, tuple[type, int]]:
    """Type and entries of each field of the contiguous region, unused ones included."""
    T, B = capacity.tokens, capacity.seqs
    return {
        "position_ids": (np.int64, T),
        "token_gather_indices": (np.int64, T),
        "slot_idx": (np.int64, B),
        "gather_slot_idx": (np.int64, B),
        "input_ids": (np.int32, T),
        "gather_idx": (np.int32, T),
        "mask_scatter_indices": (np.int32, T),
        "input_pos": (np.int32, B),
        "cu_seqlen": (np.int32, B + 1),
        "cu_num_pages": (np.int32, B + 1),
        "last_page_len": (np.int32, B),
        "seq_len": (np.int32, B),
        "seq_len_with_cache": (np.int32, B),
        "prompt_lens": (np.int32, B),
        "extra_page_per_seq": (np.int32, B),
        "max_seq_info": (np.int32, 4),
        "use_initial_states": (np.bool_, B),
        "any_prefill_use_initial_states": (np.bool_, 1),
    }


class StagedSuperset:
    """The design after the refactor: a superset of fields in one buffer of capacity, then copied.

    Attributes:
        staging: A typed view of each field in host memory, and the page list, which lies apart.
        device: The same views of the copy, which stands for the device's memory.
        batch_info: Counts on the host: sequences and tokens of prefill, extend and decode.
    """

    def __init__(self, capacity: Capacity) -> None:
        layout = after_layout(capacity)
        size = sum(np.dtype(dtype).itemsize * entries for dtype, entries in layout.values())
        self._host_bytes, self._device_bytes = (np.zeros(size, np.uint8) for _ in range(2))
        self.staging, self.device = (
            _views(buffer, layout, capacity.pages) for buffer in (self._host_bytes, self._device_bytes)
        )
        self.batch_info = np.zeros(6, np.int32)

    def _stage(self, name: str, values: Any, *, clear: bool = False) -> None:
        view = self.staging[name]
        if clear:
            view.fill(0)
        view[: len(values)] = values

    def nest(self, step: StepInputs) -> int:
        """Stage a step's fields, in AutoDeploy's order; returns the entries of the page list."""
        q_lens = np.diff(step.cu_q_lens)
        n, num_tokens = q_lens.size, step.token_ids.size
        is_prefill = q_lens > 1
        num_prefill = int(np.count_nonzero(is_prefill))
        prefill_tokens = int(step.cu_q_lens[num_prefill])
        self.batch_info[:] = (num_prefill, prefill_tokens, 0, 0, n - num_prefill, n - num_prefill)
        self._stage("cu_seqlen", step.cu_q_lens)
        self._stage("seq_len", q_lens)
        self._stage("input_pos", step.context_lens)
        self._stage("input_ids", step.token_ids, clear=True)
        kv_lens = step.context_lens + q_lens
        self._stage("last_page_len", (kv_lens - 1) % step.page_size + 1)
        self._stage("slot_idx", step.state_slots)
        self._stage("cache_loc", step.pages)
        self._stage("cu_num_pages", step.cu_page_counts)
        self._stage("extra_page_per_seq", np.full(n, -1, np.int32))
        starts = np.repeat(step.cu_q_lens[:-1], q_lens)
        positions = np.repeat(step.context_lens, q_lens) + np.arange(num_tokens) - starts
        self._stage("position_ids", positions, clear=True)
        self._stage("seq_len_with_cache", kv_lens)
        self._stage("prompt_lens", q_lens)
        has_state = step.context_lens > 0
        self._stage("use_initial_states", has_state)
        self._stage("any_prefill_use_initial_states", (has_state[:num_prefill].any(),))
        last_of_prefill = step.cu_q_lens[1 : num_prefill + 1] - 1
        gathered = np.concatenate([last_of_prefill, np.arange(prefill_tokens, num_tokens)])
        self._stage("token_gather_indices", gathered)
        return step.pages.size

    def copy(self, num_pages: int) -> None:
        """Copy the whole region, and the page list cut to its length, in host memory."""
        self._device_bytes[:] = self._host_bytes
        self.device["cache_loc"][:num_pages] = self.staging["cache_loc"][:num_pages]

    def transfer(self, num_pages: int) -> tuple[jax.Array, jax.Array]:
        """The same two copies to the default device; copies even where that is the host."""
        pages = self.staging["cache_loc"][:num_pages]
        return jax.device_put(self._host_bytes, may_alias=False), jax.device_put(pages, may_alias=False)

    def transferred_bytes(self, num_pages: int) -> int:
        """Bytes of the two copies."""
        return self._host_bytes.nbytes + 4 * num_pages


def _views(buffer: np.ndarray, layout: Mapping[str, tuple[type, int]], pages: int) -> dict[str, np.ndarray]:
    """Views of one buffer, widest types first so that all are aligned; the page list beside it."""
    views, start = {}, 0
    for name, (dtype, entries) in layout.items():
        end = start + np.dtype(dtype).itemsize * entries
        views[name] = buffer[start:end].view(dtype)
        start = end
    return {**views, "cache_loc": np.zeros(pages, np.int32)}
