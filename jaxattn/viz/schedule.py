"""Pictures of who sees what: the tiles of each window class, and how much of them is masked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from jaxattn.batch.ragged import RaggedBatch
from jaxattn.metadata.spec import Visibility, WindowClass
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.metadata.visible import VisibleKeys
from jaxattn.viz.style import EMPTY, FAINT, INK, color_of, count, legend, panels, picture, sequence_handles
from jaxattn_kernels.arrays import Tiles


def plot_schedule(batch: RaggedBatch, metadata: AttentionMetadata, *, tiling_index: int = 0) -> Figure:
    """Draw the tile schedule of every window class: query tokens downwards, keys to the right.

    A box is a tile: the query tokens that one program takes and the keys that it walks over. The
    filled part is what its tokens see; the rest of the box is masked. Grey rows are padding.

    Args:
        batch: The batch.
        metadata: Its metadata.
        tiling_index: Which of the prepared tilings to draw.

    Returns:
        The figure; `figure.savefig(path)` writes it.
    """
    figure = picture(6.2 * len(metadata.visible), 6.5)
    axes = panels(figure, len(metadata.visible))
    for ax, visible in zip(axes, metadata.visible, strict=True):
        _draw_window_class(ax, batch, metadata, visible, tiling_index)
    axes[0].set_ylabel("query token, packed")
    num_tokens, T = int(metadata.num_tokens), batch.bucket.tokens
    figure.suptitle(
        f"{count(int(metadata.num_seqs), 'sequence')}, {num_tokens} query tokens in a bucket of {T} "
        f"({padding_waste(batch):.0%} padding)",
        color=INK,
    )
    legend(figure, [*_sequences(metadata), Patch(color=EMPTY, alpha=FAINT, label="padding")])
    return figure


def plot_mask(metadata: AttentionMetadata, *, tiling_index: int = 0) -> Figure:
    """Draw the mask of every window class by tiles: packed query tokens downwards, packed keys to the right.

    Filled is what a token sees. The faint rest of a tile is computed and masked; what no tile covers is not
    computed. The title counts pairs of a token and a key, and what a batch padded to the longest would have.

    Args:
        metadata: The metadata of a batch.
        tiling_index: Which of the prepared tilings to draw.

    Returns:
        The figure; `figure.savefig(path)` writes it.
    """
    figure = picture(6.2 * len(metadata.visible), 6.2)
    for ax, visible in zip(panels(figure, len(metadata.visible)), metadata.visible, strict=True):
        _draw_mask(ax, metadata, visible, tiling_index)
    figure.axes[0].set_ylabel("query token, packed")
    masked = Patch(color=INK, alpha=FAINT, label="masked part of a tile")
    legend(figure, [*_sequences(metadata), masked])
    return figure


def padding_waste(batch: RaggedBatch) -> float:
    """Padding tokens over all tokens of the bucket."""
    return 1 - int(batch.cu_q_lens[-1]) / batch.bucket.tokens


def describe_class(window_class: Visibility) -> str:
    """A window class in words."""
    if not isinstance(window_class, WindowClass):
        return str(window_class)
    window = window_class.sliding_window
    kind = "causal" if window_class.causal else "two-sided"
    kind = "prefix-LM" if window_class.prefix_lm else kind
    return f"{kind}, {'no window' if window is None else f'window of {window} keys'}"


def _draw_window_class(
    ax: Axes, batch: RaggedBatch, metadata: AttentionMetadata, visible: VisibleKeys, tiling_index: int
) -> None:
    schedule = visible.schedules[tiling_index]
    num_tokens, T = int(metadata.num_tokens), batch.bucket.tokens
    ax.add_collection(_seen(metadata, visible, lambda s: 0, least=T / 100))
    for tiles in schedule.lists:
        boxes = _boxes(tiles, lambda s: 0)
        ax.add_collection(PatchCollection(boxes, facecolor="none", edgecolor=INK, linewidth=1.1))
    ax.axhspan(num_tokens, T, color=EMPTY, alpha=FAINT, linewidth=0)
    widest = max(int(np.max(visible.kv_end)), 1)
    ax.set_xlim(-0.01 * widest, 1.02 * widest)
    ax.set_ylim(T, -0.01 * T)
    num_tiles = sum(int(tiles.num_attending) for tiles in schedule.lists)
    ax.set_title(f"{describe_class(visible.window_class)}: {num_tiles} tiles")
    ax.set_xlabel("key position in the sequence")


def _draw_mask(ax: Axes, metadata: AttentionMetadata, visible: VisibleKeys, tiling_index: int) -> None:
    first_key = np.concatenate([[0], np.cumsum(np.asarray(metadata.kv_lens))])
    boxes = [
        box
        for tiles in visible.schedules[tiling_index].lists
        for box in _boxes(tiles, lambda s: int(first_key[s]))
    ]
    ax.add_collection(
        PatchCollection(boxes, facecolor=to_rgba(INK, FAINT), edgecolor=to_rgba(INK, 0.9), linewidth=0.8)
    )
    num_tokens, num_keys = int(metadata.num_tokens), max(int(first_key[-1]), 1)
    ax.add_collection(_seen(metadata, visible, lambda s: int(first_key[s]), least=num_tokens / 150))
    ax.set_xlim(-0.01 * num_keys, 1.01 * num_keys)
    ax.set_ylim(1.01 * num_tokens, -0.01 * num_tokens)
    covered = sum(int(box.get_width()) * int(box.get_height()) for box in boxes)
    seen = int((np.asarray(visible.kv_end) - np.asarray(visible.kv_start)).sum())
    masked = 1 - seen / covered if covered else 0.0
    ax.set_title(
        f"{describe_class(visible.window_class)}\n"
        f"{seen:,} pairs seen, {covered:,} in {count(len(boxes), 'tile')}: {masked:.0%} masked\n"
        f"{_padded(metadata):,} if padded to the longest",
        fontsize=10,
    )
    ax.set_xlabel("key, packed")


def _padded(metadata: AttentionMetadata) -> int:
    """Pairs of a token and a key where every sequence is as long as the longest."""
    q_lens, kv_lens = np.diff(np.asarray(metadata.cu_q_lens)), np.asarray(metadata.kv_lens)
    return int(metadata.num_seqs) * int(q_lens.max()) * int(kv_lens.max())


def _seen(
    metadata: AttentionMetadata, visible: VisibleKeys, offset: Callable[[int], int], *, least: float
) -> PolyCollection:
    """What each sequence's tokens see, an outline per sequence.

    Args:
        metadata: The metadata.
        visible: The window class.
        offset: Where the keys of a sequence begin.
        least: Tokens below which a query is too short to be seen, and gets an edge in its colour.
    """
    cu_q_lens = np.asarray(metadata.cu_q_lens)
    kv_start, kv_end = np.asarray(visible.kv_start), np.asarray(visible.kv_end)
    shapes, colors, widths = [], [], []
    for s in range(int(metadata.num_seqs)):
        first, end = int(cu_q_lens[s]), int(cu_q_lens[s + 1])
        if first == end:
            continue
        # Stairs: every token is one step down.
        down = np.repeat(np.arange(first, end + 1), 2)[1:-1]
        left, right = (np.repeat(x[first:end], 2) + offset(s) for x in (kv_start, kv_end))
        outline = np.concatenate([np.stack([right, down], 1), np.stack([left, down], 1)[::-1]])
        shapes.append(outline)
        colors.append(color_of(s))
        widths.append(3.0 if end - first < least else 0.0)
    return PolyCollection(shapes, facecolors=colors, edgecolors=colors, linewidths=widths, alpha=0.85)


def _boxes(tiles: Tiles, offset: Callable[[int], int]) -> list[Rectangle]:
    """The tiles of real sequences, from their first token and key on."""
    seq, q_start, q_len, kv_start, kv_end = (
        np.asarray(x)[: int(tiles.num_attending)]
        for x in (tiles.seq, tiles.q_start, tiles.q_len, tiles.kv_start, tiles.kv_end)
    )
    return [
        Rectangle((k0 + offset(s), q0), k1 - k0, n)
        for s, q0, n, k0, k1 in zip(
            *(x.tolist() for x in (seq, q_start, q_len, kv_start, kv_end)), strict=True
        )
    ]


def _sequences(metadata: AttentionMetadata) -> list[Patch]:
    q_lens, kv_lens = np.diff(np.asarray(metadata.cu_q_lens)), np.asarray(metadata.kv_lens)
    labels = []
    for s, (n, keys) in enumerate(zip(q_lens, kv_lens, strict=True)):
        cached = f" after {keys - n} cached" if keys > n else ""
        labels.append(f"sequence {s}: {count(int(n), 'token')}{cached}")
    return sequence_handles(labels[: int(metadata.num_seqs)])
