"""Ragged attention on the Pallas Triton backend: Ampere and every later NVIDIA GPU.

One kernel serves prefill, chunked prefill, decode and mixed batches. What distinguishes them is
the tile list. The visible key range of every token comes as two arrays, so causal, windowed and
two-sided attention are the same code, and a mask that is a range needs no new kernel.

Every call that exists only on Pallas's Triton backend is made in this file (`plgpu`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Softmax in base 2: the GPU has exp2, and log2(e) goes into the scale.
LOG2E = math.log2(math.e)
# Finite, so that a row that has seen nothing yet has exp2(NEG - NEG) = 1 and not NaN.
NEG = -1e30
# The narrowest operand of a tensor-core product.
MIN_DOT = 16
MAX_HEAD_DIM = 256
"""The largest head that the kernel serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """Sizes of one kernel launch.

    Attributes:
        block_k: Keys per step of the loop; a power of two.
        num_warps: Warps per program.
        num_stages: Depth of the load pipeline.
        max_rows: Rows of one program, at most; a tile with more is divided among programs. A
            token's G rows stay together, however many they are.
    """

    block_k: int
    num_warps: int
    num_stages: int
    max_rows: int = 128


class TileArrays(NamedTuple):
    """One list of W tiles, as int32 arrays of length W (see `jaxattn.schedule.Tiles`)."""

    seq: jax.Array
    q_start: jax.Array
    q_len: jax.Array
    kv_start: jax.Array
    kv_end: jax.Array


class KeyLookup(NamedTuple):
    """Where the keys of a sequence lie on the flat key axis.

    Attributes:
        start: `[R + 1]` The sequence's first entry in `pages`, or, unpaged, its first key.
        pages: `[P]` Physical pages, or None for keys that are packed.
    """

    start: jax.Array
    pages: jax.Array | None


def config_for(*, block_rows: int, head_dim: int, itemsize: int) -> KernelConfig:
    """The sizes that compile without spilling registers on sm_80 to sm_120 (tests/compile).

    16-bit operands: the accumulator decides, a row of it per query row, since it stays in registers
    through all loops. Twice the accumulator leaves room for half the keys; four times needs twice
    the threads. Loads run one step ahead of the products.

    32-bit operands: the product in full float32 runs outside the tensor cores, and holds whole rows
    of both operands in registers; so few rows, few keys, many threads, and no load ahead.

    Args:
        block_rows: Rows of the query tile.
        head_dim: Size of a head.
        itemsize: Bytes per element of keys and values.
    """
    if itemsize > 2:
        return KernelConfig(block_k=16, num_warps=8, num_stages=1, max_rows=32)
    accumulator = block_rows * _block(head_dim)
    return KernelConfig(
        block_k=64 if accumulator <= 64 * 64 else 32,
        num_warps=4 if accumulator <= 64 * 128 else 8,
        num_stages=2,
    )


def ragged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_start: jax.Array,
    kv_end: jax.Array,
    lookup: KeyLookup,
    tile_lists: tuple[tuple[TileArrays, int], ...],
    *,
    page_size: int | None,
    scale: float,
    logits_soft_cap: float | None,
    windowed: bool,
    interpret: bool,
    config: KernelConfig | None = None,
) -> jax.Array:
    """Attend with every tile of every list; each row of the output is written by one tile.

    Args:
        q: `[T, N, H]` Queries, packed.
        k: `[S, K, H]` Keys on one flat axis, packed or pages one after the other.
        v: `[S, K, H]` Values.
        kv_start: `[T]` First visible key of each token, as a position in its sequence.
        kv_end: `[T]` One past the last visible key.
        lookup: Where a sequence's keys lie.
        tile_lists: Each list with its tokens per tile.
        page_size: Tokens per page, or None for packed keys.
        scale: Factor on q·k.
        logits_soft_cap: Cap c of `c * tanh(x / c)`, or None.
        windowed: Whether a token's range may begin after the sequence does; otherwise `kv_start`
            is 0 everywhere.
        interpret: Run on the CPU, as the interpreter of Pallas does.
        config: Sizes of the launches; chosen by `config_for` where None.

    Returns:
        `[T, N, H]` Outputs in the dtype of `q`; rows that no tile covers are undefined.
    """
    out = None
    for tiles, block_q in tile_lists:
        out = _launch(
            q, k, v, kv_start, kv_end, lookup, tiles, out, block_q=block_q, page_size=page_size, scale=scale,
            logits_soft_cap=logits_soft_cap, windowed=windowed, interpret=interpret, config=config,
        )  # fmt: skip
    assert out is not None
    return out


def _launch(q, k, v, kv_start, kv_end, lookup, tiles, out, *, block_q, config, interpret, **static):
    """One `pallas_call`; writes into `out` where an earlier launch made it."""
    (_, N, H), K = q.shape, k.shape[1]
    G = N // K
    config = config or config_for(block_rows=_block(block_q * G), head_dim=H, itemsize=q.dtype.itemsize)
    # A tile may be too tall for one program: its tokens go to several.
    program_q = max(1, min(block_q, config.max_rows // G))
    block_rows = _block(program_q * G)
    kernel = functools.partial(
        _kernel,
        has_pages=lookup.pages is not None,
        has_out=out is not None,
        block_q=program_q,
        block_rows=block_rows,
        block_k=config.block_k,
        **static,
    )
    inputs = [*tiles, lookup.start]
    inputs += [lookup.pages] if lookup.pages is not None else []
    inputs += [kv_start, kv_end, q, k, v]
    inputs += [out] if out is not None else []
    return pl.pallas_call(
        kernel,
        grid=(tiles.seq.shape[0], K, pl.cdiv(block_q, program_q)),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        input_output_aliases={len(inputs) - 1: 0} if out is not None else {},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name=f"ragged_attention_q{block_rows}",
    )(*inputs)


def _kernel(*refs, has_pages: bool, has_out: bool, **static):
    """Unpack the references, in the order of `_launch`; all lie in global memory."""
    seq_ref, q_start_ref, q_len_ref, tile_start_ref, tile_end_ref, start_ref, *rest = refs
    pages_ref = rest.pop(0) if has_pages else None
    kv_start_ref, kv_end_ref, q_ref, k_ref, v_ref, *rest = rest
    o_ref = rest[1] if has_out else rest[0]

    w, head = pl.program_id(0), pl.program_id(1)
    skipped = pl.program_id(2) * static["block_q"]  # tokens of the tile that other programs serve
    q_len = q_len_ref[w] - skipped

    @pl.when(q_len > 0)
    def _():
        _attend_tile(
            kv_start_ref,  # [T]
            kv_end_ref,  # [T]
            pages_ref,  # [P] or None
            q_ref,  # [T, N, H]
            k_ref,  # [S, K, H]
            v_ref,  # [S, K, H]
            o_ref,  # [T, N, H]
            head=head,
            q_start=q_start_ref[w] + skipped,
            q_len=q_len,
            tile_start=tile_start_ref[w],
            tile_end=tile_end_ref[w],
            key_base=start_ref[seq_ref[w]],
            **static,
        )


def _attend_tile(
    kv_start_ref, kv_end_ref, pages_ref, q_ref, k_ref, v_ref, o_ref,
    *, head, q_start, q_len, tile_start, tile_end, key_base,
    block_q, block_rows, block_k, page_size, scale, logits_soft_cap, windowed,
):  # fmt: skip
    """Online softmax of one query tile over its keys, for one key head and its G query heads.

    Row r of the tile is token `r // G` and query head `head * G + r % G`. Loads and stores of
    dead rows go out of bounds, never onto a live row.
    """
    (T, N, H), K = q_ref.shape, k_ref.shape[1]
    G = N // K
    head_block = _block(H)
    r = jnp.arange(block_rows, dtype=jnp.int32)
    token = r // G
    row_ok = (token < q_len) & (r < block_q * G)
    q_row = jnp.where(row_ok, q_start + token, T)
    q_head = head * G + r % G
    # A plain arange: a masked index here would turn 128-bit loads into 16-bit ones.
    d = jnp.arange(head_block, dtype=jnp.int32)

    def mask_2d(rows_ok):
        in_head = None if head_block == H else (d < H)[None, :]
        mask = rows_ok[:, None] if in_head is None else rows_ok[:, None] & in_head
        return jnp.broadcast_to(mask, (rows_ok.shape[0], head_block))

    q = plgpu.load(q_ref.at[q_row[:, None], q_head[:, None], d[None, :]], mask=mask_2d(row_ok), other=0.0)
    first = plgpu.load(kv_start_ref.at[q_row], mask=row_ok, other=0)
    end = plgpu.load(kv_end_ref.at[q_row], mask=row_ok, other=0)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def slots_of(j, positions, ok):
        if pages_ref is None:
            return key_base + positions
        if page_size % block_k == 0:  # the whole block lies in one page
            page = pages_ref[key_base + (j * block_k) // page_size]
        else:
            page = plgpu.load(pages_ref.at[key_base + positions // page_size], mask=ok, other=0)
        return page * page_size + positions % page_size

    def visible(positions):
        sees = positions[None, :] < end[:, None]
        # Without a window this comparison is true throughout, and costs registers.
        return sees & (first[:, None] <= positions[None, :]) if windowed else sees

    def attend_block(j, state, masked):
        acc, row_max, total = state
        positions = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
        ok = positions < tile_end if masked else positions >= 0
        if masked and windowed:
            ok &= positions >= tile_start
        slots = slots_of(j, positions, ok)
        block = (slots[:, None], head, d[None, :])
        k = plgpu.load(k_ref.at[block], mask=mask_2d(ok), other=0.0)
        s = jnp.dot(q, k.T, preferred_element_type=jnp.float32, precision=precision)
        if logits_soft_cap is None:
            s = s * (scale * LOG2E)
        else:
            s = jnp.tanh(s * (scale / logits_soft_cap)) * (logits_soft_cap * LOG2E)
        sees = visible(positions) if masked else True
        if masked:
            s = jnp.where(sees, s, NEG)
        new_max = jnp.maximum(row_max, s.max(axis=1))
        rescale = jnp.exp2(row_max - new_max)
        p = jnp.exp2(s - new_max[:, None])
        if masked:
            p = jnp.where(sees, p, 0.0)
        v = plgpu.load(v_ref.at[block], mask=mask_2d(ok), other=0.0)
        pv = jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=precision)
        return acc * rescale[:, None] + pv, new_max, total * rescale + p.sum(axis=1)

    # Blocks that every live row sees whole need no mask: [all_begin, all_end) of [begin, stop).
    begin, stop = tile_start // block_k, (tile_end + block_k - 1) // block_k
    all_end = jnp.min(jnp.where(row_ok, end, tile_end)) // block_k
    all_begin = (jnp.max(first) + block_k - 1) // block_k if windowed else begin
    all_begin = jnp.clip(all_begin, begin, stop)
    all_end = jnp.clip(all_end, all_begin, stop)

    state = (
        jnp.zeros((block_rows, head_block), jnp.float32),
        jnp.full((block_rows,), NEG, jnp.float32),
        jnp.zeros((block_rows,), jnp.float32),
    )
    if windowed:
        state = lax.fori_loop(begin, all_begin, functools.partial(attend_block, masked=True), state)
    state = lax.fori_loop(all_begin, all_end, functools.partial(attend_block, masked=False), state)
    acc, _, total = lax.fori_loop(all_end, stop, functools.partial(attend_block, masked=True), state)

    out = acc * (1.0 / jnp.where(total > 0, total, 1.0))[:, None]
    place = o_ref.at[q_row[:, None], q_head[:, None], d[None, :]]
    plgpu.store(place, out.astype(o_ref.dtype), mask=mask_2d(row_ok))


def _block(n: int) -> int:
    """The smallest block size that holds n: a power of two that a tensor-core product accepts."""
    return max(MIN_DOT, 1 << (n - 1).bit_length())
