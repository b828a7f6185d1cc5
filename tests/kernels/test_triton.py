"""The kernel by itself, in the interpreter: hand-made tiles and ranges against NumPy in float64.

Slots whose key no token sees are NaN, and so is the page that the page list names past its end:
a load from the wrong place cannot go unnoticed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_as_good_as

from jaxattn_kernels.arrays import KeyLookup, SplitPlan, Tiles, VisibleRange
from jaxattn_kernels.triton import launch as triton_launch
from jaxattn_kernels.triton.forward import KernelConfig, ragged_attention

# Blocks of 16 keys, so that short sequences have several.
SMALL = KernelConfig(block_k=16, num_warps=4, num_stages=2)


@dataclass(frozen=True)
class Step:
    """Sequences with queries and keys, every token with the range of keys that it sees.

    Attributes:
        q: `[T, N, H]` Queries, packed; more than the sequences have where padding is wanted.
        k: `[keys, K, H]` Keys of each sequence.
        v: Values, likewise.
        q_lens: Query tokens of each sequence.
        first: `[T]` First visible key of each token.
        end: `[T]` One past the last.
        soft_cap: The cap on scores, or None.
        sinks: `[N]` Logits of the sinks, or None.
    """

    q: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]
    q_lens: tuple[int, ...]
    first: np.ndarray
    end: np.ndarray
    soft_cap: float | None = None
    sinks: np.ndarray | None = None

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def tokens(self, seq: int) -> slice:
        """The tokens of a sequence."""
        start = sum(self.q_lens[:seq])
        return slice(start, start + self.q_lens[seq])

    def tile(self, seq: int, offset: int, length: int) -> tuple[int, ...]:
        """A tile of some tokens of a sequence: seq, q_start, q_len, kv_start, kv_end."""
        start = self.tokens(seq).start + offset
        rows = slice(start, start + length)
        return seq, start, length, self.first[rows].min(), self.end[rows].max()

    def tiles(self, block_q: int) -> list[tuple[int, ...]]:
        """All tokens in tiles of `block_q`."""
        return [
            self.tile(seq, offset, min(block_q, q_len - offset))
            for seq, q_len in enumerate(self.q_lens)
            for offset in range(0, q_len, block_q)
        ]


def causal_step(
    q_lens: tuple[int, ...], kv_lens: tuple[int, ...], *, num_q_heads: int, num_kv_heads: int, head_dim: int,
    window: int | None = None, soft_cap: float | None = None, padding: int = 3,
) -> Step:  # fmt: skip
    """Random sequences, the queries at the end of the keys."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    ends = [np.arange(n - m, n) + 1 for m, n in zip(q_lens, kv_lens, strict=True)]
    end = np.concatenate([*ends, np.zeros(padding, int)])
    first = np.zeros_like(end) if window is None else np.maximum(end - window, 0)
    return Step(
        q=normal(len(end), num_q_heads, head_dim),
        k=[normal(n, num_kv_heads, head_dim) for n in kv_lens],
        v=[normal(n, num_kv_heads, head_dim) for n in kv_lens],
        q_lens=q_lens, first=first, end=end, soft_cap=soft_cap,
    )  # fmt: skip


def lay_out(step: Step, page_size: int | None) -> tuple[jax.Array, jax.Array, KeyLookup]:
    """Keys and values on the flat axis, and where they lie; whatever no token sees is NaN."""
    kv_lens = [len(k) for k in step.k]
    pages_of = [-(-n // (page_size or 1)) for n in kv_lens]
    start = np.cumsum([0, *pages_of])
    # One page more than is owned: the list names it, past its end, and it holds nothing but NaN.
    pages = np.random.default_rng(1).permutation(start[-1] + 1) if page_size else np.arange(start[-1] + 1)
    size = page_size or 1
    k, v = (np.full((len(pages) * size, *step.k[0].shape[1:]), np.nan, np.float32) for _ in range(2))
    for seq, kv_len in enumerate(kv_lens):
        position = np.arange(step.first[step.tokens(seq)].min(), kv_len)
        slot = pages[start[seq] + position // size] * size + position % size
        k[slot], v[slot] = step.k[seq][position], step.v[seq][position]
    page_list = np.concatenate([pages, np.full(4, pages[-1])])
    lookup = KeyLookup(as_int32(start), as_int32(page_list) if page_size else None)
    return jnp.asarray(k), jnp.asarray(v), lookup


def as_int32(values) -> jax.Array:
    return jnp.asarray(np.asarray(values), jnp.int32)


def tile_list(tiles: list[tuple[int, ...]], block_q: int, split_keys: int | None = None) -> Tiles:
    """Tiles as arrays, their keys split at multiples of `split_keys`, with two dead units at the end."""
    seq, q_start, q_len, kv_start, kv_end = (as_int32(column) for column in zip(*tiles, strict=True))
    whole = Tiles(
        seq=seq, q_start=q_start, q_len=q_len, kv_start=kv_start, kv_end=kv_end, order=None, split=None,
        num_attending=as_int32(len(tiles)), num_live=as_int32(len(tiles)), block_q=block_q,
    )  # fmt: skip
    if split_keys is None:
        return whole
    units, indptr = [], [0]
    for w, (*_, q_len, start, end) in enumerate(tiles):
        cuts = [start, *range((start // split_keys + 1) * split_keys, end, split_keys), end]
        units += [(w, *keys) for keys in itertools.pairwise(cuts)] if q_len else []
        indptr.append(len(units))
    dead = (len(tiles), 0, 0)
    tile, kv_start, kv_end = zip(*units, dead, dead, strict=True)
    split = SplitPlan(
        tile=as_int32(tile), kv_start=as_int32(kv_start), kv_end=as_int32(kv_end), indptr=as_int32(indptr),
        split_keys=split_keys,
    )  # fmt: skip
    return replace(whole, split=split)


def run(
    step: Step,
    *tile_lists: tuple[list[tuple[int, ...]], int] | tuple[list[tuple[int, ...]], int, int],
    page_size: int | None = 8,
    windowed: bool = False,
    config: KernelConfig | None = SMALL,
    dtype: str = "float32",
) -> np.ndarray:
    return run_with_lse(
        step, *tile_lists, page_size=page_size, windowed=windowed, config=config, dtype=dtype
    )[0]


def run_with_lse(
    step: Step, *tile_lists: tuple | Tiles, page_size: int | None = 8, windowed: bool = False,
    config: KernelConfig | None = SMALL, dtype: str = "float32",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    k, v, lookup = lay_out(step, page_size)
    q, k, v = (jnp.asarray(x, dtype) for x in (step.q, k, v))
    out, lse = ragged_attention(
        q, k, v, VisibleRange(as_int32(step.first), as_int32(step.end)), lookup,
        tuple(part if isinstance(part, Tiles) else tile_list(*part) for part in tile_lists),
        sinks=None if step.sinks is None else jnp.asarray(step.sinks),
        page_size=page_size, scale=step.scale, logits_soft_cap=step.soft_cap, windowed=windowed,
        interpret=True, config=config,
    )  # fmt: skip
    return np.asarray(out, np.float64), np.asarray(lse, np.float64)


def attend_plainly(step: Step, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Attention from its definition, the products' operands rounded to `dtype`: `[tokens, N, H]` and LSE.

    float64 makes it the oracle, any other dtype the measure of what that precision can do.
    """
    wide = np.float64 if dtype == "float64" else np.float32

    def rounded(x: np.ndarray) -> np.ndarray:
        return np.asarray(x, wide) if dtype == "float64" else np.asarray(jnp.asarray(x, dtype), wide)

    outputs, logarithms = [], []
    for seq in range(len(step.q_lens)):
        rows = step.tokens(seq)
        q = rounded(step.q[rows])
        group_size = q.shape[1] // step.k[seq].shape[1]
        k, v = (np.repeat(rounded(x[seq]), group_size, axis=1) for x in (step.k, step.v))
        scores = np.einsum("qnh,knh->qnk", q, k) * wide(step.scale)
        if step.soft_cap is not None:
            scores = np.tanh(scores / wide(step.soft_cap)) * wide(step.soft_cap)
        key = np.arange(len(k))
        sees = (step.first[rows, None] <= key) & (key < step.end[rows, None])
        largest = scores.max(-1, keepdims=True)
        p = np.exp(scores - largest) * sees[:, None, :]
        total = p.sum(-1)[..., None]
        if step.sinks is not None:
            sink = np.exp(step.sinks.astype(wide)[:, None] - largest)
            total = np.where(sees.any(-1)[:, None, None], total + sink, 0)
        outputs.append(rounded(np.einsum("qnk,knh->qnh", rounded(p), v) / np.where(total > 0, total, 1)))
        with np.errstate(divide="ignore"):
            logarithms.append((largest + np.log(total))[..., 0])
    return np.concatenate(outputs), np.concatenate(logarithms)


def assert_correct(got: np.ndarray, step: Step, dtype: str = "float32") -> None:
    """Assert that the rows of the sequences are as good as plain computation in `dtype` makes them."""
    (plain, _), (exact, _) = attend_plainly(step, dtype), attend_plainly(step, "float64")
    assert_as_good_as(got[: len(exact)], plain, exact, jnp.dtype(dtype))


@pytest.mark.parametrize("page_size", [8, 32, 12, 1, None])
def test_every_relation_of_page_and_block(page_size):
    # Pages of 8 divide the block of 16, the block divides 32, neither divides the other with 12.
    step = causal_step((5, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32)
    assert_correct(run(step, (step.tiles(4), 4), page_size=page_size), step)


@pytest.mark.parametrize(("group_size", "head_dim"), [(3, 80), (6, 96), (1, 16)])
def test_groups_and_heads_that_fill_no_block(group_size, head_dim):
    step = causal_step((7,), (20,), num_q_heads=2 * group_size, num_kv_heads=2, head_dim=head_dim)
    assert_correct(run(step, (step.tiles(5), 5)), step)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_window_has_masked_full_and_masked_blocks(soft_cap):
    # Windows of 70 over blocks of 16: the four tokens of a tile share three full blocks, with a
    # masked one on either side. What lies before all windows is NaN.
    step = causal_step(
        (4, 2), (131, 20), num_q_heads=4, num_kv_heads=2, head_dim=32, window=70, soft_cap=soft_cap
    )
    assert_correct(run(step, (step.tiles(4), 4), windowed=True), step)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    step = causal_step((5, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32)
    rounded = replace(
        step, q=half(step.q, dtype), k=[half(k, dtype) for k in step.k], v=[half(v, dtype) for v in step.v]
    )
    assert_correct(run(rounded, (rounded.tiles(4), 4), dtype=dtype), rounded, dtype)


def half(x: np.ndarray, dtype: str) -> np.ndarray:
    """Values that `dtype` can represent: rounding the inputs is no error of the kernel's."""
    return np.asarray(jnp.asarray(x, dtype), np.float32)


def test_dead_tiles_write_nothing():
    step = causal_step((5, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32)
    live = step.tiles(4)
    _, q_start, _, kv_start, kv_end = live[0]
    dead = (1, q_start, 0, kv_start, kv_end)  # would overwrite the first tile from the wrong sequence
    assert_correct(run(step, ([*live, dead, dead], 4)), step)


def test_rows_that_no_tile_covers_are_left_alone():
    step = causal_step((5, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32, padding=3)
    got = run(step, (step.tiles(4), 4))
    assert np.isnan(got[6:]).all()  # what the interpreter finds in memory that nobody wrote
    got = run(step, (step.tiles(4)[1:], 4))
    assert np.isnan(got[:4]).all()
    assert np.isfinite(got[4:6]).all()


def test_rows_without_keys_are_zero():
    step = causal_step((5, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32, padding=3)
    padding = (2, 6, 3, 0, 0)
    got = run(step, ([*step.tiles(4), padding], 4))
    assert (got[6:] == 0).all()
    assert_correct(got, step)


def test_a_row_without_keys_beside_rows_with_keys_is_zero():
    step = causal_step((5, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32)
    step.end[1] = 0
    got = run(step, (step.tiles(4), 4))
    assert (got[1] == 0).all()
    assert_correct(got, step)


def test_two_launches_equal_one():
    step = causal_step((5, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32)
    tiles = step.tiles(4)
    together = run(step, (tiles, 4))[:6]
    apart = run(step, (tiles[:2], 4), (tiles[2:], 4))[:6]
    np.testing.assert_array_equal(apart, together)


def test_launches_may_differ_in_tokens_per_tile():
    step = causal_step((5, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32)
    assert_correct(run(step, ([step.tile(1, 0, 1)], 1), (step.tiles(4)[:2], 4)), step)


@pytest.mark.parametrize("max_rows", [16, 2])
def test_a_tile_may_be_divided_among_programs(max_rows):
    # A token has two rows: programs of eight tokens, or of one.
    step = causal_step((13, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32, window=20)
    config = replace(SMALL, max_rows=max_rows)
    assert_correct(run(step, (step.tiles(16), 16), windowed=True, config=config), step)


def with_sinks(step: Step) -> Step:
    """A sink per query head: some far below all scores, some far above."""
    return replace(step, sinks=np.linspace(-20, 20, step.q.shape[1]).astype(np.float32))


def assert_lse(got: np.ndarray, step: Step) -> None:
    """Assert the logarithms of the sequences' rows, -inf where a row sees no key."""
    (_, plain), (_, exact) = attend_plainly(step, "float32"), attend_plainly(step, "float64")
    seen = np.isfinite(exact)
    np.testing.assert_array_equal(got[: len(exact)][~seen], -np.inf)
    assert_as_good_as(got[: len(exact)][seen], plain[seen], exact[seen], jnp.dtype("float32"))


@pytest.mark.smoke
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("split_keys", [None, 32])
def test_sinks_and_lse(sinks, split_keys):
    step = causal_step((3, 1, 2), (130, 33, 20), num_q_heads=6, num_kv_heads=2, head_dim=32)
    step.end[1] = 0  # a row without keys has no sink either
    step = with_sinks(step) if sinks else step
    part = (step.tiles(4), 4) if split_keys is None else (step.tiles(4), 4, split_keys)
    out, lse = run_with_lse(step, part)
    assert_correct(out, step)
    assert (out[1] == 0).all()
    assert_lse(lse, step)


@pytest.mark.smoke
@pytest.mark.parametrize("page_size", [8, 12, None])
@pytest.mark.parametrize("window", [None, 70])
def test_split_keys_are_merged(page_size, window):
    """Tiles of one unit, of several, and of none; a window that begins amid a unit."""
    step = causal_step(
        (4, 1, 2), (131, 20, 97), num_q_heads=4, num_kv_heads=2, head_dim=32, window=window
    )  # fmt: skip
    padding, dead = (3, 7, 3, 0, 0), (0, 0, 0, 0, 0)
    tiles = [*step.tiles(4), padding, dead]
    out, lse = run_with_lse(step, (tiles, 4, 32), page_size=page_size, windowed=window is not None)
    assert_correct(out, step)
    assert_lse(lse, step)
    np.testing.assert_array_equal(out[7:], 0)
    np.testing.assert_array_equal(lse[7:], -np.inf)


def test_a_unit_that_is_a_whole_tile_has_the_bits_of_an_unsplit_one():
    step = with_sinks(causal_step((4, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32))
    tiles = step.tiles(4)
    np.testing.assert_array_equal(run(step, (tiles, 4, 64))[:5], run(step, (tiles, 4))[:5])


def test_a_tile_split_among_units_and_programs():
    step = causal_step((13, 1), (45, 33), num_q_heads=4, num_kv_heads=2, head_dim=32, window=20)
    config = replace(SMALL, max_rows=16)
    assert_correct(run(step, (step.tiles(16), 16, 16), windowed=True, config=config), step)


@pytest.mark.parametrize("max_programs", [1, 5])
def test_a_program_may_serve_several_units(monkeypatch, max_programs):
    step = with_sinks(causal_step((9, 1, 1), (45, 33, 70), num_q_heads=4, num_kv_heads=2, head_dim=32))
    parts = (step.tiles(4)[3:], 4, 32), (step.tiles(4)[:3], 4)
    expected = run_with_lse(step, *parts)
    monkeypatch.setattr(triton_launch, "MAX_TRITON_PROGRAMS", max_programs)
    for got, before in zip(run_with_lse(step, *parts), expected, strict=True):
        np.testing.assert_array_equal(got[:11], before[:11])


@pytest.mark.parametrize("max_programs", [2048, 4])
def test_tiles_in_any_order_and_no_dead_ones(monkeypatch, max_programs):
    """The order changes no bit, and of a long list only the live tiles are looked at, split or not."""
    step = with_sinks(causal_step((9, 1, 1), (45, 33, 70), num_q_heads=4, num_kv_heads=2, head_dim=32))
    tiles = step.tiles(4)
    expected = run_with_lse(step, (tiles[3:], 4, 32), (tiles[:3], 4))
    # Were they looked at, these would overwrite live rows.
    wrong = [(1, 0, 4, 0, 2), (1, 10, 1, 0, 2), (1, 4, 3, 0, 2)]
    beyond = wrong if max_programs < 2048 else []
    split = replace(tile_list(tiles[3:], 4, 32), num_live=as_int32(2))
    order = as_int32([2, 0, 1, *range(3, 3 + len(beyond))])
    long = replace(tile_list([*tiles[:3], *beyond], 4), num_live=as_int32(3), order=order)
    monkeypatch.setattr(triton_launch, "MAX_TRITON_PROGRAMS", max_programs)
    for got, before in zip(run_with_lse(step, split, long), expected, strict=True):
        np.testing.assert_array_equal(got[:11], before[:11])


def test_lists_with_and_without_split_write_into_one_result():
    step = causal_step((9, 1, 1), (45, 33, 70), num_q_heads=4, num_kv_heads=2, head_dim=32)
    tiles = step.tiles(4)
    for order in ((tiles[3:], 4, 32), (tiles[:3], 4)), ((tiles[:3], 4), (tiles[3:], 4, 32)):
        out, lse = run_with_lse(step, *order)
        assert_correct(out, step)
        assert_lse(lse, step)


@pytest.mark.smoke
@pytest.mark.parametrize("head_dim", [64, 256])
def test_the_shipped_configuration(head_dim):
    step = causal_step((17, 1), (150, 70), num_q_heads=4, num_kv_heads=2, head_dim=head_dim)
    tiles = step.tiles(32)
    assert_correct(run(step, (tiles[1:], 8), (tiles[:1], 32), page_size=16, config=None), step)
