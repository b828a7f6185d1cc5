"""What the XLA implementation and its gradient do with a tile: cut it out, and put it back.

Both walk over the tiles of a schedule and, in each, over blocks of the keys that it sees. Within a tile the
rows of one key head stand together: `rows = block_q * G`, tokens times the G query heads that share it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from jaxattn.metadata.spec import AttentionSpec
from jaxattn.metadata.visible import VisibleKeys
from jaxattn_kernels.arrays import Tiles

# Keys per block. Constants, not functions of the bucket: a sum in other blocks has other bits.
SHORT_BLOCK_K = 512
LONG_BLOCK_K = 256
BLOCKS_OF_KEYS = (SHORT_BLOCK_K, LONG_BLOCK_K)
"""Keys per block, of the lists of short and of long queries."""


class Ranges(NamedTuple):
    """The visible keys of every token, with room for tiles that reach past the last one."""

    start: Int32[Array, " Tpad"]
    end: Int32[Array, " Tpad"]


class QueryTile(NamedTuple):
    """One tile of queries.

    Attributes:
        seq: Row of its sequence.
        q_start: Its first token, on the packed axis.
        kv_start: The first key that one of its tokens sees, as a position in the sequence.
        kv_end: One past the last.
        in_tile: Which of its `block_q` places hold a token.
        first: The first key that each row sees.
        end: One past the last.
        num_kv_heads: K.
        group_size: G.
    """

    seq: Int32[Array, ""]
    q_start: Int32[Array, ""]
    kv_start: Int32[Array, ""]
    kv_end: Int32[Array, ""]
    in_tile: Bool[Array, " block_q"]
    first: Int32[Array, " rows"]
    end: Int32[Array, " rows"]
    num_kv_heads: int
    group_size: int

    @property
    def block_q(self) -> int:
        """Places for tokens."""
        return self.in_tile.shape[0]

    def tokens_of(self, array: Shaped[Array, "Tpad ..."]) -> Shaped[Array, "block_q ..."]:
        """The tile's part of an array of all tokens."""
        return lax.dynamic_slice_in_dim(array, self.q_start, self.block_q)

    def rows_of(self, array: Shaped[Array, "Tpad N ..."]) -> Shaped[Array, "K rows ..."]:
        """The tile's part of an array of all tokens and query heads, key head by key head."""
        return self._by_key_head(self.tokens_of(array))

    def live_rows_of(self, array: Shaped[Array, "Tpad N ..."]) -> Shaped[Array, "K rows ..."]:
        """The same, 0 where the tile has no token."""
        tokens = self.tokens_of(array)
        return self._by_key_head(jnp.where(self._in_tile_like(tokens), tokens, 0))

    def write(
        self, result: Shaped[Array, "Tpad N ..."], rows: Shaped[Array, "K rows ..."]
    ) -> Shaped[Array, "Tpad N ..."]:
        """`result` with the tile's rows put back; other tokens keep what they have."""
        tokens = jnp.moveaxis(self._split(rows), 1, 0).reshape(self.block_q, *result.shape[1:])
        kept = jnp.where(self._in_tile_like(tokens), tokens.astype(result.dtype), self.tokens_of(result))
        return lax.dynamic_update_slice_in_dim(result, kept, self.q_start, 0)

    def blocks(self, block_k: int) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
        """The first block of `block_k` keys to visit, and one past the last."""
        return self.kv_start // block_k, (self.kv_end + block_k - 1) // block_k

    def _by_key_head(self, tokens: Array) -> Array:
        K, G = self.num_kv_heads, self.group_size
        split = tokens.reshape(self.block_q, K, G, *tokens.shape[2:])
        return jnp.moveaxis(split, 1, 0).reshape(K, self.block_q * G, *tokens.shape[2:])

    def _split(self, rows: Array) -> Array:
        return rows.reshape(self.num_kv_heads, self.block_q, self.group_size, *rows.shape[2:])

    def _in_tile_like(self, tokens: Array) -> Bool[Array, "block_q ..."]:
        return self.in_tile.reshape(-1, *[1] * (tokens.ndim - 1))


class KeyBlock(NamedTuple):
    """A block of the keys of a tile's sequence.

    Attributes:
        positions: Of its keys, in the sequence.
        in_range: Which of them lie in the tile's range. Outside lies another sequence's key, or NaN.
        sees: Which rows of the tile see which of them.
    """

    positions: Int32[Array, " block_k"]
    in_range: Bool[Array, " block_k"]
    sees: Bool[Array, "rows block_k"]

    def live(self, keys: Shaped[Array, "block_k K H"]) -> Shaped[Array, "block_k K H"]:
        """Keys or values, 0 outside of the range, since 0 * NaN is NaN."""
        return jnp.where(self.in_range[:, None, None], keys, 0)


def padded_ranges(visible: VisibleKeys, margin: int) -> Ranges:
    """The visible keys of every token, and of `margin` more that see none."""
    return Ranges(jnp.pad(visible.kv_start, (0, margin)), jnp.pad(visible.kv_end, (0, margin)))


def query_tile(tiles: Tiles, i: Int32[Array, ""], ranges: Ranges, spec: AttentionSpec) -> QueryTile:
    """Tile `i` of a list."""
    q_start = tiles.q_start[i]
    in_tile = jnp.arange(tiles.block_q, dtype=jnp.int32) < tiles.q_len[i]

    def per_row(of_tokens: Array) -> Array:
        of_tile = lax.dynamic_slice_in_dim(of_tokens, q_start, tiles.block_q)
        return jnp.repeat(jnp.where(in_tile, of_tile, 0), spec.group_size)

    return QueryTile(
        seq=tiles.seq[i],
        q_start=q_start,
        kv_start=tiles.kv_start[i],
        kv_end=tiles.kv_end[i],
        in_tile=in_tile,
        first=per_row(ranges.start),
        end=per_row(ranges.end),
        num_kv_heads=spec.num_kv_heads,
        group_size=spec.group_size,
    )


def key_block(tile: QueryTile, j: Int32[Array, ""], block_k: int) -> KeyBlock:
    """Block `j` of the keys of a tile's sequence."""
    positions = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
    return KeyBlock(
        positions=positions,
        in_range=(positions >= tile.kv_start) & (positions < tile.kv_end),
        sees=(tile.first[:, None] <= positions[None, :]) & (positions[None, :] < tile.end[:, None]),
    )


def product(equation: str, a: Array, b: Array, dtype: jnp.dtype) -> Float[Array, "..."]:
    """`jnp.einsum`, accumulated in `dtype`."""
    # Full float32 products: on a GPU the default for float32 rounds to 10 bits of mantissa.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=dtype)
