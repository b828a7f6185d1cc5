"""A picture of the cache: who owns which physical page, and how full it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jaxattn.batch.ragged import RaggedBatch
from jaxattn.viz.style import EMPTY, INK, color_of, count, legend, panels, picture, sequence_handles

MAX_CELLS = 4096
"""Cells of a page map; a cell of a larger cache stands for several pages."""
MAX_NUMBERED = 128
"""Pages of a cache whose pages are numbered."""


class PageMap(NamedTuple):
    """What is known of each physical page of a cache.

    Attributes:
        owner: `[pages]` The first sequence that holds it; -1 for a free page.
        holders: `[pages]` How many sequences hold it.
        keys: `[pages]` Keys in it, of `page_size`; 0 also for a page that is reserved.
        page_size: Tokens per page.
    """

    owner: np.ndarray
    holders: np.ndarray
    keys: np.ndarray
    page_size: int


def page_map(batch: RaggedBatch, num_pages: int | None = None) -> PageMap:
    """Who holds which page of the cache.

    Args:
        batch: A paged batch.
        num_pages: Pages of the cache; where None, as many as the tables name.

    Raises:
        ValueError: If the batch has no pages, or names one that the cache does not have.
    """
    if batch.page_size is None:
        raise ValueError("batch was nested without page_tables: it holds no page; nest it with some")
    indptr, num_seqs = np.asarray(batch.page_indptr), int(batch.num_seqs)
    pages = np.asarray(batch.page_list)[: indptr[num_seqs]]
    least = int(pages.max(initial=-1)) + 1
    num_pages = least if num_pages is None else num_pages
    if least > num_pages:
        raise ValueError(
            f"num_pages={num_pages}, but the batch holds page {least - 1}; give the cache's size"
        )
    counts = np.diff(indptr)[:num_seqs]
    seq = np.repeat(np.arange(num_seqs), counts)
    logical = np.arange(len(pages)) - indptr[seq]
    in_page = np.clip(np.asarray(batch.kv_lens)[seq] - logical * batch.page_size, 0, batch.page_size)
    owner, keys = np.full(num_pages, -1), np.zeros(num_pages, int)
    owner[pages[::-1]] = seq[::-1]  # of several holders the first is written last
    np.maximum.at(keys, pages, in_page)
    return PageMap(owner, np.bincount(pages, minlength=num_pages), keys, batch.page_size)


def plot_pages(batch: RaggedBatch, *, num_pages: int | None = None) -> Figure:
    """Draw the pages of a cache, in rows: each in its owner's colour, filled as far as it holds keys.

    A frame in colour is a page that is held, a grey one a free page. A dot marks a page that several
    sequences share. Beyond `MAX_CELLS` pages a cell stands for several neighbours.

    Args:
        batch: A paged batch.
        num_pages: Pages of the cache; where None, as many as the batch's tables name.

    Returns:
        The figure.

    Raises:
        ValueError: If the batch has no pages, or names one that the cache does not have.
    """
    pages = page_map(batch, num_pages)
    total, together = len(pages.owner), max(1, -(-len(pages.owner) // MAX_CELLS))
    cells = -(-total // together)
    columns = min(cells, 64) if cells > MAX_NUMBERED else min(cells, 16)
    rows = -(-cells // max(columns, 1))
    figure = picture(
        7.2, 1.3 + 0.3 * np.ceil((int(batch.num_seqs) + 1) / 2).clip(1, 5) + 7 * rows / max(columns, 1)
    )
    (ax,) = panels(figure, 1)
    _draw(ax, pages, together, columns, rows)
    labels = [f"sequence {s}: {n} keys" for s, n in enumerate(np.asarray(batch.kv_lens).tolist())]
    handles = sequence_handles(labels[: int(batch.num_seqs)])
    legend(figure, [*handles, Patch(facecolor="none", edgecolor=EMPTY, label="free")])
    figure.suptitle(_summary(pages, together), color=INK, fontsize=10)
    return figure


def _draw(ax: Axes, pages: PageMap, together: int, columns: int, rows: int) -> None:
    # A last group that is not full is filled up with free pages.
    padding = -len(pages.owner) % together
    owner, holders, keys = (
        np.pad(x, (0, padding), constant_values=fill).reshape(-1, together)
        for x, fill in ((pages.owner, -1), (pages.holders, 0), (pages.keys, 0))
    )
    first = np.take_along_axis(owner, (owner >= 0).argmax(axis=1)[:, None], axis=1)[:, 0]
    fill = keys.sum(axis=1) / (together * pages.page_size)
    colors = [EMPTY if s < 0 else color_of(s) for s in first.tolist()]
    x, y = np.arange(len(first)) % columns, np.arange(len(first)) // columns
    frame = np.ones(len(first))
    # Filled from below, which is where y is larger.
    ax.add_collection(PolyCollection([*_squares(x, y, fill)], facecolors=colors, alpha=0.85, label="keys"))
    width, size = (1.6, 5) if columns <= 16 else (0.6, 2)
    ax.add_collection(
        PolyCollection(
            [*_squares(x, y, frame)], facecolors="none", edgecolors=colors, linewidths=width, label="pages"
        )
    )
    shared = (holders > 1).any(axis=1)
    ax.plot(x[shared] + 0.85, y[shared] + 0.13, "o", color=INK, markersize=size, label="shared")
    if len(first) <= MAX_NUMBERED and together == 1:
        for page in range(len(first)):
            ax.text(x[page] + 0.5, y[page] + 0.13, str(page), ha="center", va="center", fontsize=8, color=INK)
    ax.set(xlim=(-0.02, columns + 0.02), ylim=(rows + 0.02, -0.02))
    ax.set_axis_off()


def _squares(x: np.ndarray, y: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """`[cells, 4, 2]` Corners of the lower part of each cell; a number has room above it."""
    left, right, bottom = x + 0.07, x + 0.93, y + 0.95
    top = bottom - 0.69 * fill
    corners = ((left, bottom), (right, bottom), (right, top), (left, top))
    return np.stack([np.stack(corner, axis=1) for corner in corners], axis=1)


def _summary(pages: PageMap, together: int) -> str:
    held = pages.holders > 0
    keys, slots = int(pages.keys.sum()), int(held.sum()) * pages.page_size
    shared, reserved = int((pages.holders > 1).sum()), int((held & (pages.keys == 0)).sum())
    each = f"; a cell is {together} pages" if together > 1 else ""
    return (
        f"{int(held.sum()):,} of {count(len(held), 'page')} held: {shared:,} shared, {reserved:,} reserved, "
        f"{int((~held).sum()):,} free\n{keys:,} keys in {slots:,} slots of held pages{each}"
    )
