"""PyTorch's and FlashInfer's attention on the shapes of a case: a library for `gpu.py`, without JAX.

PyTorch's `scaled_dot_product_attention` serves dense batches of equal lengths, with its FlashAttention and
its cuDNN. FlashInfer serves any: pages or packed keys, ragged, windowed. What cannot be imported is left
out; what fails says so when it is timed. Inputs are random tensors of their own, in as many sets as ours, and
pages stand in random order.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

WORKSPACE_BYTES = 512 * 2**20
"""What FlashInfer may use for partial results."""
FIXED_SPLIT_KEYS = 512
"""Keys per piece where FlashInfer is told to split keys whatever the batch is, as we do."""


class Shapes(NamedTuple):
    """What is attended.

    Attributes:
        q_lens: Queries per sequence; they are its last tokens.
        kv_lens: Keys per sequence.
        heads: Query heads, key heads, size of a head.
        page_size: Tokens per page, or None for packed keys.
        window: Keys that a token sees, its own included, or None.
        causal: Whether a token sees keys up to its own position only.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: tuple[int, int, int]
    page_size: int | None
    window: int | None
    causal: bool

    @property
    def equal_lens(self) -> tuple[int, int] | None:
        """Queries and keys of every sequence, where all are alike."""
        lens = set(zip(self.q_lens, self.kv_lens, strict=True))
        return lens.pop() if len(lens) == 1 else None


Program = Callable[[int], Any]
"""Attends to the inputs of this number."""
Candidate = tuple[str, Callable[[], Program]]
"""A name, and what makes inputs and program; it raises where the library or the shape is refused."""


def candidates(shapes: Shapes, *, sets: int, device: str = "cuda") -> Iterator[Candidate]:
    """Whatever is installed and can serve the shapes; nothing without PyTorch on the device."""
    if importlib.util.find_spec("torch") is None:
        return
    torch: Any = importlib.import_module("torch")
    if device == "cuda" and not torch.cuda.is_available():
        return
    if shapes.equal_lens is not None and shapes.window is None:
        q_len, kv_len = shapes.equal_lens
        if not shapes.causal or q_len in (1, kv_len):  # its causal mask is that of a whole prompt
            for name, backend in (("FlashAttention", "FLASH_ATTENTION"), ("cuDNN", "CUDNN_ATTENTION")):
                yield f"torch, {name}", lambda backend=backend: _sdpa(shapes, sets, device, backend)
    if importlib.util.find_spec("flashinfer") is None:
        return
    if shapes.page_size is None:
        yield "FlashInfer, ragged", lambda: _flashinfer_ragged(shapes, sets, device)
        return
    if set(shapes.q_lens) == {1}:
        yield "FlashInfer, decode", lambda: _flashinfer_decode(shapes, sets, device, use_tensor_cores=False)
        yield (
            "FlashInfer, decode on tensor cores",
            lambda: _flashinfer_decode(shapes, sets, device, use_tensor_cores=True),
        )
        pages = max(1, FIXED_SPLIT_KEYS // shapes.page_size)
        yield (
            "FlashInfer, decode in fixed pieces",
            lambda: _flashinfer_decode(shapes, sets, device, use_tensor_cores=True, fixed_split_size=pages),
        )
    yield "FlashInfer, paged", lambda: _flashinfer_paged(shapes, sets, device)


def measure(program: Program, *, sets: int, repeats: int, device: str = "cuda") -> tuple[list[float], str]:
    """Seconds of each run over all sets of inputs, and the clock.

    On a GPU the clock is that of CUDA's events, around a graph of all launches where they can be captured, so
    that the host does not hold the device up. Unlike the kernels' own times, it includes gaps between them.
    """
    torch: Any = importlib.import_module("torch")

    def run() -> None:
        for i in range(sets):
            program(i)

    with torch.inference_mode():
        for _ in range(3):
            run()
        if device != "cuda":
            return [_host_time(run) for _ in range(repeats)], "host"
        torch.cuda.synchronize()
        replay, clock = _graph_of(torch, run)
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        replay()
        for start, end in zip(starts, ends, strict=True):
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)], clock


def _graph_of(torch: Any, run: Callable[[], None]) -> tuple[Callable[[], None], str]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # it does what cannot be captured
        torch.cuda.synchronize()
        return run, "events"
    return graph.replay, "events, graph"


def _host_time(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# PyTorch.


def _sdpa(shapes: Shapes, sets: int, device: str, backend: str) -> Program:
    torch: Any = importlib.import_module("torch")
    attention: Any = importlib.import_module("torch.nn.attention")
    assert shapes.equal_lens is not None
    (q_len, kv_len), rows = shapes.equal_lens, len(shapes.q_lens)
    num_q_heads, num_kv_heads, head_dim = shapes.heads

    def normal(tokens: int, num_heads: int) -> Any:
        # In memory as ours: a token's heads side by side.
        shape = (rows, tokens, num_heads, head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device=device).transpose(1, 2)

    inputs = [
        (normal(q_len, num_q_heads), normal(kv_len, num_kv_heads), normal(kv_len, num_kv_heads))
        for _ in range(sets)
    ]
    masked = shapes.causal and q_len > 1  # a single query, the last token, sees every key

    def program(i: int) -> Any:
        with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                *inputs[i], is_causal=masked, enable_gqa=num_q_heads != num_kv_heads
            )

    return program


# FlashInfer, by its public interface: a wrapper plans on the host, once, and runs.


def _prefix_sums(torch: Any, lengths: Any, device: str) -> Any:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _options(torch: Any, shapes: Shapes) -> dict[str, Any]:
    left = -1 if shapes.window is None else shapes.window - 1
    return {"window_left": left, "q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}


def _normal(torch: Any, device: str, *shape: int) -> Any:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


class _Pages(NamedTuple):
    """Page tables as FlashInfer takes them, and the number of pages."""

    indptr: Any
    indices: Any
    last_page_len: Any
    number: int


def _pages(torch: Any, shapes: Shapes, device: str) -> _Pages:
    page_size = shapes.page_size or 1
    counts = [-(-n // page_size) for n in shapes.kv_lens]
    last = [(n - 1) % page_size + 1 for n in shapes.kv_lens]
    return _Pages(
        indptr=_prefix_sums(torch, counts, device),
        indices=torch.randperm(sum(counts), device=device).to(torch.int32),
        last_page_len=torch.tensor(last, dtype=torch.int32, device=device),
        number=sum(counts),
    )


def _paged_inputs(torch: Any, shapes: Shapes, pages: _Pages, sets: int, device: str) -> list[tuple]:
    num_q_heads, num_kv_heads, head_dim = shapes.heads
    cache = (pages.number, shapes.page_size or 1, num_kv_heads, head_dim)
    return [
        (
            _normal(torch, device, sum(shapes.q_lens), num_q_heads, head_dim),
            (_normal(torch, device, *cache), _normal(torch, device, *cache)),
        )
        for _ in range(sets)
    ]


def _workspace(torch: Any, device: str) -> Any:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _flashinfer_decode(
    shapes: Shapes, sets: int, device: str, *, use_tensor_cores: bool, **split: int
) -> Program:
    torch: Any = importlib.import_module("torch")
    flashinfer: Any = importlib.import_module("flashinfer")
    pages = _pages(torch, shapes, device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(torch, device), "NHD", use_tensor_cores=use_tensor_cores
    )
    tables = (pages.indptr, pages.indices, pages.last_page_len)
    wrapper.plan(*tables, *shapes.heads, shapes.page_size, **_options(torch, shapes), **split)
    inputs = _paged_inputs(torch, shapes, pages, sets, device)
    return lambda i: wrapper.run(*inputs[i])


def _flashinfer_paged(shapes: Shapes, sets: int, device: str) -> Program:
    torch: Any = importlib.import_module("torch")
    flashinfer: Any = importlib.import_module("flashinfer")
    pages = _pages(torch, shapes, device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(torch, device), "NHD")
    tables = (pages.indptr, pages.indices, pages.last_page_len)
    wrapper.plan(
        _prefix_sums(torch, shapes.q_lens, device), *tables, *shapes.heads, shapes.page_size,
        causal=shapes.causal, **_options(torch, shapes),
    )  # fmt: skip
    inputs = _paged_inputs(torch, shapes, pages, sets, device)
    return lambda i: wrapper.run(*inputs[i])


def _flashinfer_ragged(shapes: Shapes, sets: int, device: str) -> Program:
    torch: Any = importlib.import_module("torch")
    flashinfer: Any = importlib.import_module("flashinfer")
    num_q_heads, num_kv_heads, head_dim = shapes.heads
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(torch, device), "NHD")
    starts = [_prefix_sums(torch, lens, device) for lens in (shapes.q_lens, shapes.kv_lens)]
    wrapper.plan(*starts, *shapes.heads, causal=shapes.causal, **_options(torch, shapes))
    inputs = [
        [
            _normal(torch, device, sum(lens), num_heads, head_dim)
            for lens, num_heads in (
                (shapes.q_lens, num_q_heads),
                (shapes.kv_lens, num_kv_heads),
                (shapes.kv_lens, num_kv_heads),
            )
        ]
        for _ in range(sets)
    ]
    return lambda i: wrapper.run(*inputs[i])
