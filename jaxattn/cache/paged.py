"""The paged key/value cache: pages on the device, written slot by slot."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from jaxattn.batch.ragged import INT32_MAX
from jaxattn.cache.quantization import check_scales, quantized

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
        k_scale: What a stored 1 of a quantised cache counts, per key head; None where nothing is quantised.
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
        from jaxattn.viz.cards import cache_card  # when looked at

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
        dtype: Element type of keys and values; "int8", "float8_e4m3fn" or "float8_e5m2" for a quantised
            cache.
        k_scale: What a stored 1 of a quantised cache counts: one number, or `[K]`, one per key head
            (`quantization_scale` finds them). None where nothing is quantised.
        v_scale: The same for values.

    Returns:
        The cache, of zeros.

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
        The cache with the slots written, in the cache's own dtype. A number beyond the range of a quantised
        cache is stored as the largest that it has.

    Raises:
        ValueError: If keys and values do not match the slots and the cache.
    """
    expected = (*slot_mapping.shape, *cache.k_pages.shape[2:])
    for name, array in (("k", k), ("v", v)):
        if array.shape != expected:
            raise ValueError(f"{name}.shape={array.shape}; these slots and this cache need {expected}")

    def write(pages: Array, rows: Array, scale: Array | None) -> Array:
        slots = pages.reshape(-1, *pages.shape[2:])
        rows = rows.astype(pages.dtype) if scale is None else quantized(rows, scale, pages.dtype)
        return slots.at[slot_mapping].set(rows, mode="drop").reshape(pages.shape)

    return dataclasses.replace(
        cache,
        k_pages=write(cache.k_pages, k, cache.k_scale),
        v_pages=write(cache.v_pages, v, cache.v_scale),
    )
