"""Pictures of a batch: what each tile attends to, and where the padding goes."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from jaxattn.batch import RaggedBatch
from jaxattn.metadata import AttentionMetadata, VisibleKeys
from jaxattn.schedule import Tiles
from jaxattn.spec import Visibility, WindowClass

# Distinguishable with a colour-vision deficiency, and on paper of either brightness.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_PADDING = "#dddddd"


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
    num_panels = len(metadata.visible)
    figure = Figure(figsize=(6.2 * num_panels, 6.5), layout="constrained")
    axes = figure.subplots(1, num_panels, sharey=True, squeeze=False)[0]
    for ax, visible in zip(axes, metadata.visible, strict=True):
        _draw_window_class(ax, batch, metadata, visible, tiling_index)
    axes[0].set_ylabel("query token, packed")
    num_tokens, T = int(metadata.num_tokens), batch.bucket.tokens
    figure.suptitle(
        f"{int(metadata.num_seqs)} sequences, {num_tokens} query tokens in a bucket of {T} "
        f"({padding_waste(batch):.0%} padding)"
    )
    figure.legend(handles=_legend(metadata), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def padding_waste(batch: RaggedBatch) -> float:
    """Padding tokens over all tokens of the bucket."""
    return 1 - int(batch.cu_q_lens[-1]) / batch.bucket.tokens


def _draw_window_class(
    ax: Axes, batch: RaggedBatch, metadata: AttentionMetadata, visible: VisibleKeys, tiling_index: int
) -> None:
    schedule = visible.schedules[tiling_index]
    token_to_seq = np.asarray(metadata.token_to_seq)
    kv_start, kv_end = np.asarray(visible.kv_start), np.asarray(visible.kv_end)
    q_lens = np.diff(np.asarray(metadata.cu_q_lens))
    for t, s in enumerate(token_to_seq[: int(metadata.num_tokens)]):
        # A query too short to be seen gets an edge in its colour.
        edge = 3 if q_lens[s] < batch.bucket.tokens / 100 else 0
        row = Rectangle((kv_start[t], t), kv_end[t] - kv_start[t], 1, color=_COLORS[s % len(_COLORS)])
        row.set(alpha=0.75, linewidth=edge)
        ax.add_patch(row)
    for tiles in schedule.lists:
        ax.add_collection(PatchCollection(_boxes(tiles), facecolor="none", edgecolor="black", linewidth=0.9))
    num_tokens, T = int(metadata.num_tokens), batch.bucket.tokens
    ax.axhspan(num_tokens, T, color=_PADDING)
    widest = max(int(kv_end.max()), 1)
    ax.set_xlim(-0.01 * widest, 1.02 * widest)
    ax.set_ylim(T, -0.01 * T)
    num_tiles = sum(int(tiles.num_attending) for tiles in schedule.lists)
    ax.set_title(f"{_describe(visible.window_class)}: {num_tiles} tiles")
    ax.set_xlabel("key position in the sequence")


def _describe(window_class: Visibility) -> str:
    if not isinstance(window_class, WindowClass):
        return str(window_class)
    window = window_class.sliding_window
    kind = "causal" if window_class.causal else "two-sided"
    kind = "prefix-LM" if window_class.prefix_lm else kind
    return f"{kind}, {'no window' if window is None else f'window of {window} keys'}"


def _boxes(tiles: Tiles) -> list[Rectangle]:
    q_start, q_len, kv_start, kv_end = (
        np.asarray(x)[: int(tiles.num_attending)]
        for x in (tiles.q_start, tiles.q_len, tiles.kv_start, tiles.kv_end)
    )
    return [
        Rectangle((k0, q0), k1 - k0, n)
        for q0, n, k0, k1 in zip(q_start, q_len, kv_start, kv_end, strict=True)
    ]


def _legend(metadata: AttentionMetadata) -> list[Patch]:
    q_lens = np.diff(np.asarray(metadata.cu_q_lens))
    context_lens = np.asarray(metadata.context_lens)
    handles = []
    for s in range(min(int(metadata.num_seqs), len(_COLORS))):
        cached = f" after {context_lens[s]} cached" if context_lens[s] else ""
        label = f"sequence {s}: {q_lens[s]} token{'s' if q_lens[s] != 1 else ''}{cached}"
        handles.append(Patch(color=_COLORS[s], alpha=0.75, label=label))
    return [*handles, Patch(color=_PADDING, label="padding")]
