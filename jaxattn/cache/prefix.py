"""Computed pages that later requests can read again, found by the tokens they hold.

The keys of a token depend on it and on the tokens before it. So a page may be read in place of
another one exactly where both hold the same tokens after the same tokens: a tree, whose edges are the
tokens of one whole page each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from jaxattn.cache.pool import PagePool


@dataclass(slots=True, eq=False)
class PrefixNode:
    """One computed page: its place in the tree says which tokens it holds, after which others.

    Attributes:
        page: The physical page; -1 at the root.
        tokens: The bytes of its tokens.
        parent: The page before it, or None at the root.
        children: The pages after it, by the bytes of their tokens.
    """

    page: int
    tokens: bytes
    parent: PrefixNode | None
    children: dict[bytes, PrefixNode] = field(default_factory=dict)


class PrefixCache:
    """Whole, computed pages by the tokens they hold; each is held by a reference of the cache's own.

    A chain is the list of nodes from the first page of a sequence on. Whoever uses a chain holds a
    reference to each of its pages, so a page in use has all pages before it in use as well. A page
    that nobody uses is idle: it stays readable until its memory is needed.

    Args:
        pool: Where the pages come from.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._root = PrefixNode(page=-1, tokens=b"", parent=None)
        # In the order they became idle. A page becomes idle after all pages behind it have, and
        # leaves this table before they do, so the first one here never has children.
        self._idle: OrderedDict[PrefixNode, None] = OrderedDict()
        self._num_pages = 0

    @property
    def num_pages(self) -> int:
        """Pages that can be found."""
        return self._num_pages

    @property
    def num_idle(self) -> int:
        """Pages that nobody uses: `evict` can free as many."""
        return len(self._idle)

    def is_idle(self, node: PrefixNode) -> bool:
        """Whether nobody uses the page of a node."""
        return node in self._idle

    def match(self, token_ids: Int32[np.ndarray, " tokens"]) -> list[PrefixNode]:
        """The longest chain that holds the first whole pages of these tokens; nothing changes.

        Args:
            token_ids: Tokens of one sequence, from its first on.
        """
        page_size, node, chain = self._pool.page_size, self._root, []
        for start in range(0, token_ids.size - page_size + 1, page_size):
            child = node.children.get(token_ids[start : start + page_size].tobytes())
            if child is None:
                break
            chain.append(node := child)
        return chain

    def acquire(self, chain: Sequence[PrefixNode]) -> None:
        """Use a chain: add one reference to each of its pages.

        Args:
            chain: From `match`, since when nothing was evicted.
        """
        self._pool.share([node.page for node in chain])
        for node in chain:
            self._idle.pop(node, None)

    def extend(
        self,
        chain: list[PrefixNode],
        token_ids: Int32[np.ndarray, " tokens"],
        pages: Int32[np.ndarray, " pages"],
    ) -> Int32[np.ndarray, " pages"]:
        """Append pages that were just computed to a chain in use.

        Where the same tokens are known already, the user's reference moves to the known page and
        its own page is given back: no text is held twice, and a chain in use is in use throughout.

        Args:
            chain: The pages before them; the new nodes are appended.
            token_ids: The tokens of these pages.
            pages: Pages the user holds; whole, computed and never to be written again.

        Returns:
            The pages that take their places.
        """
        page_size, first = self._pool.page_size, len(chain)
        added, replaced, known = [], [], []
        for i, page in enumerate(pages.tolist()):
            parent = chain[-1] if chain else self._root
            tokens = token_ids[i * page_size : (i + 1) * page_size].tobytes()
            node = parent.children.get(tokens)
            if node is None:
                node = parent.children[tokens] = PrefixNode(page=page, tokens=tokens, parent=parent)
                added.append(page)
            else:
                known.append(node)
                replaced.append(page)
            chain.append(node)
        self._pool.share(added)
        self.acquire(known)
        self._pool.free(replaced)
        self._num_pages += len(added)
        return np.array([node.page for node in chain[first:]], np.int32)

    def release(self, chain: Sequence[PrefixNode]) -> None:
        """End the use of a chain; its pages stay readable until they are evicted.

        Args:
            chain: A chain in use.
        """
        pages = [node.page for node in chain]
        self._pool.free(pages)
        unused = self._pool.references(pages) == 1  # the cache's own
        for i in reversed(np.flatnonzero(unused)):
            self._idle[chain[i]] = None

    def evict(self, num_pages: int) -> None:
        """Free idle pages: least recently used ones first, pages behind another before that one.

        Args:
            num_pages: How many.

        Raises:
            ValueError: If fewer are idle; nothing is freed then.
        """
        if num_pages > len(self._idle):
            raise ValueError(
                f"num_pages={num_pages} exceeds the {len(self._idle)} idle pages; free some first"
            )
        evicted = [self._idle.popitem(last=False)[0] for _ in range(num_pages)]
        for node in evicted:
            assert node.parent is not None
            del node.parent.children[node.tokens]
        self._pool.free([node.page for node in evicted])
        self._num_pages -= num_pages
