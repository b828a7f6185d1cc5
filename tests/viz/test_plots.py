"""Figures, rendered: what must be in them is counted, and can be read on white and on black."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.collections import PatchCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from jaxattn import AttentionSpec, Bucket, nest_sequences, prepare_metadata
from jaxattn.measuring.workloads import ODD, nest_workload, random_page_tables
from jaxattn.metadata import MissingFieldError
from jaxattn.metadata.consumers import triton_tiling
from jaxattn.viz import padding_waste, plot_mask, plot_pages, plot_programs, plot_schedule
from jaxattn.viz.html import COLORS
from jaxattn.viz.pages import MAX_CELLS
from jaxattn.viz.programs import launch_of
from jaxattn.viz.style import INK
from jaxattn_kernels.triton.launch import MAX_TRITON_PROGRAMS, launch
from jaxattn_kernels.triton.parts import KernelConfig

HEADS: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
SPEC = AttentionSpec(**HEADS)
WINDOWED = AttentionSpec(**HEADS, sliding_window=9)
BACKGROUNDS = ("#ffffff", "#111111")


@pytest.fixture(scope="module")
def batch():
    return nest_workload(ODD[0], bucket=Bucket(160, 8))  # 1, 63, 65, 17 and 2 tokens


@pytest.fixture(scope="module")
def metadata(batch):
    return prepare_metadata(batch, [SPEC, WINDOWED])


@pytest.fixture(scope="module")
def figures(batch, metadata):
    return {
        "schedule": plot_schedule(batch, metadata),
        "mask": plot_mask(metadata),
        "programs": plot_programs(metadata, SPEC),
        "pages": plot_pages(shared_pages(), num_pages=16),
    }


def shared_pages():
    """37 keys in pages 7, 3 and 5; 35 in 7, 3 and 1; 20 in 9 and 0, with 12 reserved."""
    return nest_sequences(
        np.ones(28, int),
        q_lens=[5, 3, 20],
        context_lens=[32, 32, 0],
        page_tables=[[7, 3, 5], [7, 3, 1], [9, 0, 12]],
        page_size=16,
        share_prefixes=True,
    )


def of_kind(ax, kind):
    return [collection for collection in ax.collections if type(collection) is kind]


def corners_of(collection) -> list[np.ndarray]:
    """`[n, 2]` The corners of each shape, in the axes' units; the first one also ends it."""
    return [np.asarray(path.vertices) for path in collection.get_paths()]


def height(corners: np.ndarray) -> float:
    return float(np.ptp(corners[:, 1]))


def luminance(color) -> float:
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    """Contrast of two colours as WCAG defines it, from 1 to 21."""
    low, high = sorted(luminance([int(x[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for x in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_ink_and_colors_stand_out_from_any_background(background):
    assert contrast(INK, background) > 4.2
    assert min(contrast(color, background) for color in COLORS) > 1.9


@pytest.mark.parametrize("name", ["schedule", "mask", "programs", "pages"])
def test_figures_are_transparent_and_their_text_is_ink(figures, name):
    figure = figures[name]
    picture = imread(io.BytesIO(figure._repr_png_()))
    assert picture[0, 0, 3] == 0  # the page behind it shows
    assert (picture[..., 3] > 0).any()
    written = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert {to_hex(text.get_color()) for text in written} == {INK}
    box = figure.get_window_extent()
    for legend in figure.legends:
        inside = legend.get_window_extent()
        assert box.x0 <= inside.x0
        assert inside.x1 <= box.x1


def test_padding_waste(batch):
    assert padding_waste(batch) == pytest.approx(1 - 148 / 160)


@pytest.mark.smoke
def test_the_schedule_has_a_panel_per_class_and_a_box_per_tile(figures):
    figure = figures["schedule"]
    titles = ["causal, no window: 6 tiles", "causal, window of 9 keys: 6 tiles"]
    assert [ax.get_title() for ax in figure.axes] == titles
    for ax in figure.axes:
        assert [len(boxes.get_paths()) for boxes in of_kind(ax, PatchCollection)] == [1, 5]
        (seen,) = of_kind(ax, PolyCollection)
        assert len(seen.get_paths()) == 5  # an outline per sequence
    assert figure.get_suptitle() == "5 sequences, 148 query tokens in a bucket of 160 (7% padding)"


def area(corners: np.ndarray) -> float:
    x, y = corners.T
    return abs(x[:-1] @ y[1:] - x[1:] @ y[:-1]) / 2


def test_the_mask_fills_what_is_seen_and_frames_what_is_computed(figures):
    for ax, window in zip(figures["mask"].axes, (10**6, 9), strict=True):
        (tiles,), (seen,) = of_kind(ax, PatchCollection), of_kind(ax, PolyCollection)
        assert len(tiles.get_paths()) == 6
        pairs = [sum(min(i + 1, window) for i in range(n)) for n in ODD[0].q_lens]
        assert [area(corners) for corners in corners_of(seen)] == pytest.approx(pairs)
        covered = sum(area(corners) for corners in corners_of(tiles))
        masked = 1 - sum(pairs) / covered
        assert ax.get_title().splitlines()[1:] == [
            f"{sum(pairs):,} pairs seen, {covered:,.0f} in 6 tiles: {masked:.0%} masked",
            f"{5 * 65 * 65:,} if padded to the longest",
        ]
        # No key of another sequence: each outline lies between its sequence's first key and its last.
        ends = np.cumsum(ODD[0].q_lens)
        for corners, end, n in zip(corners_of(seen), ends, ODD[0].q_lens, strict=True):
            assert corners.min() >= end - n
            assert corners.max() <= end


def test_programs_have_a_bar_for_every_unit_key_head_and_part(figures, metadata):
    short, long = metadata.visible_keys(SPEC.window_class).schedule(triton_tiling(SPEC)).lists
    # Short queries of at most 8 tokens: two tiles; of the others 2 + 3 + 1 of 32, and one of padding.
    assert [int(tiles.num_live) for tiles in (short, long)] == [2, 7]
    axes = figures["programs"].axes
    assert [len(of_kind(ax, PolyCollection)[0].get_paths()) for ax in axes] == [2 * 2, 7 * 2]
    assert axes[1].get_title().startswith("long queries: 14 pieces for")


def test_bars_are_as_long_as_keys_and_lie_in_their_programs_row(figures, metadata):
    _, long = metadata.visible_keys(SPEC.window_class).schedule(triton_tiling(SPEC)).lists
    work = launch_of(long, SPEC)
    (bars,) = of_kind(figures["programs"].axes[1], PolyCollection)
    corners = np.stack([corners[:4] for corners in corners_of(bars)])
    np.testing.assert_allclose(corners[:, :, 1].mean(axis=1), work.program)
    with_keys = work.keys > 0
    np.testing.assert_allclose(np.ptp(corners[:, :, 0], axis=1)[with_keys], work.keys[with_keys])
    # Whole blocks of 64 keys, longest first: of 65 keys there are two blocks.
    assert work.keys[:4].tolist() == [128, 128, 64, 64]
    assert work.seq[:2].tolist() == [2, 2]
    assert work.seq[-2:].tolist() == [8, 8]  # zeros for padding
    assert work.head.tolist() == [0, 1] * 7


def test_units_of_a_split_tile_are_bars_of_their_own():
    workload = ODD[2].__class__("decode", (1, 1), (1199, 29), "")
    tables, _ = random_page_tables(workload, 16, np.random.default_rng(0))
    batch = nest_workload(workload, page_tables=tables, page_size=16, bucket=Bucket(2, 2, 96, max_q_len=1))
    metadata = prepare_metadata(batch, SPEC)
    figure = plot_programs(metadata, SPEC)
    (ax,) = figure.axes  # no long queries, no panel for them
    assert len(of_kind(ax, PolyCollection)[0].get_paths()) == (3 + 1) * 2  # 512 + 512 + 176 keys, and 30
    assert "then 1 tile merged" in ax.get_title()
    (tiles,) = metadata.visible[0].schedule(triton_tiling(SPEC)).lists
    assert launch_of(tiles, SPEC).keys[::2].tolist() == [512, 512, 192, 64]


def test_programs_take_turns_as_the_kernel_does():
    """More units than programs: the interpreter runs the kernel's own loop, one program after the other."""
    n = 700
    batch = nest_sequences(np.ones(n, int), q_lens=np.ones(n, int), bucket=Bucket(768, 768, max_q_len=1))
    (tiles,) = prepare_metadata(batch, SPEC).visible[0].schedule(triton_tiling(SPEC)).lists
    work = launch_of(tiles, SPEC)
    room, live = 2 * tiles.seq.shape[0], 2 * int(tiles.num_live)
    assert room > live > MAX_TRITON_PROGRAMS == work.programs

    def record(program, live, out, count):
        out[program] = count[0]
        count[0] += 1

    recorded, _ = launch(
        record,
        "record",
        room,
        lambda live, *_: live[0],
        (jnp.array([live], jnp.int32),),
        (jax.ShapeDtypeStruct((room,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)),
        (jnp.full(room, -1, jnp.int32), jnp.zeros(1, jnp.int32)),
        config=KernelConfig(block_k=16, num_warps=4, num_stages=1),
        interpret=True,
    )
    order = np.argsort(work.program, kind="stable")
    np.testing.assert_array_equal(recorded[order], np.arange(live))
    assert (recorded[live:] == -1).all()
    begins = work.begins()
    first = np.unique(work.program, return_index=True)[1]
    assert (begins[first] == 0).all()
    np.testing.assert_array_equal(np.sort(begins + work.keys)[-1], work.shares().max())


def test_programs_need_the_triton_schedule(batch):
    fields = {"fields": ["num_seqs", "visible", "schedules"], "consumers": "xla"}
    with pytest.raises(MissingFieldError, match="schedules"):
        plot_programs(prepare_metadata(batch, SPEC, **fields), SPEC)


def test_pages_have_a_cell_each_filled_as_far_as_keys_go(figures):
    (ax,) = figures["pages"].axes
    fills, frames = of_kind(ax, PolyCollection)
    assert len(frames.get_paths()) == len(fills.get_paths()) == 16
    full = height(corners_of(frames)[0])
    heights = [height(corners) / full for corners in corners_of(fills)]
    expected = {7: 1, 3: 1, 5: 5 / 16, 1: 3 / 16, 9: 1, 0: 4 / 16}
    assert heights == pytest.approx([expected.get(page, 0) for page in range(16)])
    assert len(np.unique(frames.get_edgecolor(), axis=0)) == 4  # three owners, and nobody
    (dots,) = ax.lines
    assert len(dots.get_xdata()) == 2
    assert [text.get_text() for text in ax.texts] == [str(page) for page in range(16)]
    summary = "7 of 16 pages held: 2 shared, 1 reserved, 9 free\n60 keys in 112 slots of held pages"
    assert figures["pages"].get_suptitle() == summary


def test_a_large_cache_has_cells_of_several_pages():
    batch = nest_sequences([[1] * 5], page_tables=[[8999]], page_size=8)
    figure = plot_pages(batch, num_pages=9000)
    fills, frames = of_kind(figure.axes[0], PolyCollection)
    assert len(frames.get_paths()) == 3000 <= MAX_CELLS
    full = height(corners_of(frames)[0])
    assert height(corners_of(fills)[-1]) == pytest.approx(full * 5 / 24)
    assert "a cell is 3 pages" in figure.get_suptitle()


def test_pages_are_refused_that_do_not_exist(batch):
    with pytest.raises(ValueError, match="without page_tables"):
        plot_pages(batch)
    with pytest.raises(ValueError, match="num_pages=12, but the batch holds page 12"):
        plot_pages(shared_pages(), num_pages=12)
