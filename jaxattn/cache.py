"""The paged key/value cache: pages on the device, and the pool that hands them out on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped

from jaxattn.batch import INT32_MAX
from jaxattn.cards import cache_card, pool_card
from jaxattn_kernels.arrays import KVScales

QUANTIZED_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
"""Element types of a quantised cache: a stored number counts times the scale of its head."""

DEFAULT_PAGE_SIZE = 16
"""Tokens per page where nothing else is asked for."""


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class PagedKVCache:
    """Keys and values of one layer, in pages. Passed in, returned, and meant to be donated.

    Token s of a page lies at `[page, s]`; its flat slot is `page * page_size + s`.

    Attributes:
        k_pages: Keys.
        v_pages: Values.
        k_scale: Of a quantised cache, what a stored 1 counts, per key head; None for any other.
        v_scale: The same for values.
    """

    k_pages: Shaped[Array, "pages page_size K H"]
    v_pages: Shaped[Array, "pages page_size K H"]
    k_scale: Float[Array, " K"] | None = None
    v_scale: Float[Array, " K"] | None = None

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.k_pages.shape[1]

    def _repr_html_(self) -> str:
        return cache_card(self)


def init_cache(
    *,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    k_scale: jax.typing.ArrayLike | None = None,
    v_scale: jax.typing.ArrayLike | None = None,
) -> PagedKVCache:
    """An empty cache of one layer.

    Args:
        num_pages: Physical pages.
        page_size: Tokens per page.
        num_kv_heads: Key/value heads, K.
        head_dim: Size of a head, H.
        dtype: Element type of keys and values; of a quantised cache "int8", "float8_e4m3fn" or
            "float8_e5m2".
        k_scale: Of a quantised cache, and of no other, what a stored 1 counts: one number, or `[K]`, one
            per key head (see `quantization_scale`).
        v_scale: The same for values.

    Raises:
        ValueError: If a slot would not be an int32, or scales and dtype disagree. The number of elements
            is not limited.
    """
    scales = check_scales(dtype, num_kv_heads, k_scale, v_scale)
    if num_pages * page_size > INT32_MAX:
        raise ValueError(
            f"num_pages={num_pages} of page_size={page_size} tokens make {num_pages * page_size} slots, more "
            f"than an int32 can number ({INT32_MAX}); use fewer pages, or several caches"
        )
    shape = (num_pages, page_size, num_kv_heads, head_dim)
    # Copies: the cache is meant to be donated, and the caller keeps what was given.
    k_scale, v_scale = (None, None) if scales is None else (jnp.array(scales.k), jnp.array(scales.v))
    return PagedKVCache(
        k_pages=jnp.zeros(shape, dtype), v_pages=jnp.zeros(shape, dtype), k_scale=k_scale, v_scale=v_scale
    )


def check_scales(
    dtype: jax.typing.DTypeLike,
    num_kv_heads: int,
    k_scale: jax.typing.ArrayLike | None,
    v_scale: jax.typing.ArrayLike | None,
) -> KVScales | None:
    """The scales of keys and values as arrays `[K]`, float32; None where nothing is quantised.

    Args:
        dtype: Element type of keys and values.
        num_kv_heads: Key/value heads, K.
        k_scale: One number, or one per head.
        v_scale: The same for values.

    Raises:
        ValueError: If there are scales and nothing is quantised, or the other way round, or their shape
            is wrong.
    """
    name = jnp.dtype(dtype).name
    for argument, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is None) == is_quantized(dtype):
            given = "was not given" if scale is None else "was given"
            raise ValueError(
                f"{argument} {given}, and keys and values are stored as {name}; give scales exactly where "
                f"they are stored as {', '.join(QUANTIZED_DTYPES)}"
            )
        if scale is not None and jnp.shape(scale) not in ((), (num_kv_heads,)):
            raise ValueError(
                f"{argument} has shape {jnp.shape(scale)}; give one number, or one per key head, "
                f"({num_kv_heads},)"
            )
    if k_scale is None or v_scale is None:
        return None
    k_scale, v_scale = (jnp.asarray(scale, jnp.float32) for scale in (k_scale, v_scale))
    return KVScales(jnp.broadcast_to(k_scale, num_kv_heads), jnp.broadcast_to(v_scale, num_kv_heads))


def quantization_scale(x: Float[Array, "T K H"], dtype: jax.typing.DTypeLike) -> Float[Array, " K"]:
    """The scale of each head with which the largest of its numbers is the largest that can be stored.

    Args:
        x: Keys or values of some tokens that stand for all, such as those of a few prompts.
        dtype: Element type of the quantised cache.

    Returns:
        Scales, float32; some positive number for a head of zeros, none that is finite for a head in which a
            number is not.

    Raises:
        ValueError: If the dtype is none of a quantised cache.
    """
    largest = jnp.abs(x.astype(jnp.float32)).max(axis=(0, 2))
    return jnp.where(largest == 0, 1.0, largest) / _largest(dtype)


def is_quantized(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a cache of this element type is a quantised one."""
    return jnp.dtype(dtype).name in QUANTIZED_DTYPES


def _largest(dtype: jax.typing.DTypeLike) -> float:
    """The largest number that a quantised cache can store; its negative too."""
    name = jnp.dtype(dtype).name
    if not is_quantized(dtype):
        raise ValueError(f"dtype={name} is not one of {', '.join(QUANTIZED_DTYPES)}")
    return 127.0 if name == "int8" else float(jnp.finfo(dtype).max)


def _quantized(rows: Array, scale: Array, dtype: jnp.dtype) -> Array:
    """Rows in units of their head's scale, rounded to the nearest; what is too large becomes the largest."""
    largest = _largest(dtype)
    rows = jnp.clip(rows.astype(jnp.float32) / scale[None, :, None], -largest, largest)
    return (jnp.round(rows) if dtype == jnp.int8 else rows).astype(dtype)


def write_cache(
    cache: PagedKVCache,
    k: Float[Array, "_ _ _"],
    v: Float[Array, "_ _ _"],
    slot_mapping: Int32[Array, " T"],
) -> PagedKVCache:
    """Write this step's keys and values to their slots. Pure; donate the cache to do it in place.

    Args:
        cache: The layer's cache.
        k: `[T, K, H]` Keys, one per query token.
        v: `[T, K, H]` Values.
        slot_mapping: Flat slot of each token; an out-of-range positive one is skipped.

    Returns:
        The cache with the slots written, in the cache's own dtype. A quantised cache stores numbers that
            exceed its range as the largest that it has.

    Raises:
        ValueError: If keys and values do not match the slots and the cache.
    """
    expected = (*slot_mapping.shape, *cache.k_pages.shape[2:])
    for name, array in (("k", k), ("v", v)):
        if array.shape != expected:
            raise ValueError(f"{name}.shape={array.shape}; these slots and this cache need {expected}")

    def write(pages: Array, rows: Array, scale: Array | None) -> Array:
        slots = pages.reshape(-1, *pages.shape[2:])
        rows = rows.astype(pages.dtype) if scale is None else _quantized(rows, scale, pages.dtype)
        return slots.at[slot_mapping].set(rows, mode="drop").reshape(pages.shape)

    return dataclasses.replace(
        cache,
        k_pages=write(cache.k_pages, k, cache.k_scale),
        v_pages=write(cache.v_pages, v, cache.v_scale),
    )


class PagePool:
    """The pages of a cache and how many references each has, on the host.

    A page is handed out with one reference, and handed out again only after the last one is
    dropped. Several sequences may hold one page, as long as none of them writes to it.

    Args:
        num_pages: Physical pages of the cache.
        page_size: Tokens per page.

    Raises:
        ValueError: If `num_pages` is negative, or `page_size` less than 1.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 0 or page_size < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 0 and page_size={page_size} at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = np.zeros(num_pages, np.int32)
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack; low pages on top
        self._num_free = num_pages

    @property
    def num_free(self) -> int:
        """Pages that can still be allocated."""
        return self._num_free

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one sequence need."""
        return -(-num_tokens // self.page_size)

    def references(self, pages: Sequence[int] | np.ndarray) -> Int32[np.ndarray, " pages"]:
        """How many references each page has; 0 for a free one.

        Args:
            pages: Page indices.

        Raises:
            ValueError: If a page is out of range.
        """
        return self._references[self._in_range(pages)]

    def allocate(self, num_tokens: int) -> Int32[np.ndarray, " pages"]:
        """Take the pages for `num_tokens` tokens of one sequence, with one reference each.

        Args:
            num_tokens: Tokens to hold.

        Returns:
            Their indices, in logical order.

        Raises:
            MemoryError: If too few pages are free; nothing is taken then.
            ValueError: If `num_tokens` is negative.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens={num_tokens} must not be negative")
        n = self.pages_for(num_tokens)
        if n > self._num_free:
            raise MemoryError(
                f"num_tokens={num_tokens} needs {n} pages of {self.page_size} tokens, but "
                f"{self._num_free} of {self.num_pages} are free; free sequences or make the cache larger"
            )
        self._num_free -= n
        pages = self._free[self._num_free : self._num_free + n][::-1].copy()
        self._references[pages] = 1
        return pages

    def share(self, pages: Sequence[int] | np.ndarray) -> None:
        """Add one reference to each page, for one more holder that only reads it.

        Args:
            pages: Allocated pages.

        Raises:
            ValueError: If a page is out of range, named twice or not allocated; no reference is
                added then.
        """
        self._references[self._allocated(pages)] += 1

    def free(self, pages: Sequence[int] | np.ndarray) -> None:
        """Drop one reference of each page; a page without any can be allocated again.

        Args:
            pages: Allocated pages.

        Raises:
            ValueError: If a page is out of range, named twice or not allocated; nothing is freed then.
        """
        pages = self._allocated(pages)
        self._references[pages] -= 1
        unused = pages[self._references[pages] == 0]
        self._free[self._num_free : self._num_free + unused.size] = unused[::-1]
        self._num_free += unused.size

    def _repr_html_(self) -> str:
        return pool_card(self, self._references)

    def _in_range(self, pages: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(pages)
        if array.size == 0:
            return np.empty(0, np.int32)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ValueError(
                f"pages has dtype {array.dtype} and shape {array.shape}; "
                f"expected one axis of the integers that allocate gave"
            )
        outside = array[(array < 0) | (array >= self.num_pages)]
        if outside.size:
            raise ValueError(f"page {outside[0]} is out of range: the pool has pages 0..{self.num_pages - 1}")
        return array

    def _allocated(self, pages: Sequence[int] | np.ndarray) -> np.ndarray:
        array = self._in_range(pages)
        if np.unique(array).size != array.size:
            raise ValueError(f"pages={array.tolist()} names a page twice; name each once")
        free = array[self._references[array] == 0]
        if free.size:
            raise ValueError(f"page {free[0]} is not allocated; was it freed already?")
        return array
