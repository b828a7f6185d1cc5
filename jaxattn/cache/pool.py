"""The pool that hands out a cache's pages, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from jaxattn.batch.numbers import positive_int


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
        if num_pages < 0:
            raise ValueError(f"num_pages={num_pages} must not be negative")
        positive_int("page_size", page_size)
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
        from jaxattn.viz.cards import pool_card  # when looked at

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
