"""The table of fields: complete, true of the arrays, and printed into the documents as it stands."""

from pathlib import Path

import jax
import numpy as np
import pytest
from field_tables import consumers_of, rewrite

from jaxattn import AttentionSpec, RopeConfig, nest_sequences, prepare_metadata
from jaxattn.attention.implementations import IMPLEMENTATIONS
from jaxattn.batch.ragged import RaggedBatch, field_slices
from jaxattn.metadata import CONSUMERS, MissingFieldError
from jaxattn.metadata.cascade import Cascade
from jaxattn.metadata.consumers import Consumer
from jaxattn.metadata.fields import Prepared, field_table, fields_of
from jaxattn.metadata.schedule import Tiling
from jaxattn.metadata.superset import AttentionMetadata
from jaxattn.metadata.visible import VisibleKeys
from jaxattn_kernels.arrays import KeyTiles, SplitPlan, Tiles

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig())
SPLITTING = Consumer("splitting", frozenset({"schedules"}), lambda spec: Tiling(1, 8, 4, longest_first=True))
BATCH = nest_sequences([[1] * 20, [1]], page_tables=[[0, 3], [1, 2]], page_size=16)
AXES = {"T": BATCH.bucket.tokens, "R": BATCH.bucket.seqs, "P": BATCH.bucket.pages, "M": 3, "H": 16}


def everything():
    return prepare_metadata(BATCH, SPEC, consumers=(*CONSUMERS, SPLITTING), fields=ALL, max_pages_per_seq=3)


ALL = (*fields_of(AttentionMetadata), *fields_of(VisibleKeys))


def size_of(axis: str, **lengths: int) -> int:
    names = {**AXES, **lengths}
    return int(eval(axis, {}, names))


def test_the_reference_holds_the_table_of_today():
    text = (ROOT / "notebooks/reference/metadata.md").read_text(encoding="utf-8")
    assert "<!-- fields -->" in text
    assert rewrite(text) == text, "run `make tables`"


def test_every_array_has_the_shape_and_dtype_of_its_table():
    m = everything()
    (visible,) = m.visible
    schedule = next(s for s in visible.schedules if s.tiling == Tiling(1, 8, 4, longest_first=True))
    tiles, split = schedule.long, schedule.short.split
    assert tiles is not None
    assert split is not None
    lengths: dict[type, dict[str, int]] = {Tiles: {"W": tiles.seq.shape[0]}}
    lengths[KeyTiles] = {"W": visible.key_tiles[0].seq.shape[0]}
    lengths[SplitPlan] = {"W": schedule.short.seq.shape[0], "U": split.tile.shape[0]}
    holders = [
        (RaggedBatch, BATCH),
        (AttentionMetadata, m),
        (VisibleKeys, visible),
        (Tiles, tiles),
        (SplitPlan, split),
        (KeyTiles, visible.key_tiles[0]),
        (Cascade, m.cascade),
    ]
    for kind, holder in holders:
        for info in field_table(kind):
            value = getattr(holder, info.name)
            if info.shape is not None:
                axes = [axis for axis in info.shape.split(", ") if axis]
                shape = tuple(size_of(axis, **lengths.get(kind, {})) for axis in axes)
                assert (value.shape, str(value.dtype)) == (shape, info.dtype), info.name
            assert info.meaning.endswith(".") or kind not in (AttentionMetadata, VisibleKeys), info.name


def test_the_batch_table_has_every_primary_field():
    assert {info.name for info in field_table(RaggedBatch)} == set(field_slices(BATCH.bucket))


def test_every_field_is_prepared_by_default():
    m = prepare_metadata(BATCH, SPEC, max_pages_per_seq=3)
    assert set(m.values) == set(fields_of(AttentionMetadata))
    assert set(m.visible[0].values) == set(fields_of(VisibleKeys))
    assert len(jax.tree.leaves(m)) < 90  # a small pytree


def test_consumers_read_fields_that_exist():
    for consumer in CONSUMERS.values():
        assert consumer.reads <= set(ALL), consumer.name
    assert set(IMPLEMENTATIONS) <= set(CONSUMERS)
    assert consumers_of("slot_mapping") == ("write_cache", "decoder")


def test_a_selection_holds_nothing_else():
    m = prepare_metadata(BATCH, SPEC, fields=("positions", "kv_end"))
    assert set(m.values) == {"positions", "visible"}
    assert set(m.visible[0].values) == {"kv_end"}
    np.testing.assert_array_equal(m.positions, everything().positions)
    np.testing.assert_array_equal(m["positions"], m.positions)


def test_reading_a_field_that_was_not_prepared_names_it():
    m = prepare_metadata(BATCH, SPEC, fields=("positions",))
    for name in fields_of(AttentionMetadata):
        if name == "positions":
            continue
        with pytest.raises(MissingFieldError, match=f"field '{name}' of AttentionMetadata was not prepared"):
            getattr(m, name)
        assert not hasattr(m, name)
    with pytest.raises(MissingFieldError, match="field 'kv_lens' of AttentionMetadata was not prepared"):
        jax.jit(lambda m: m.kv_lens)(m)


def test_the_error_says_what_a_field_needs():
    unpaged = prepare_metadata(
        nest_sequences([[1]]), AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=8)
    )
    for name, needs in [
        ("slot_mapping", "a batch nested with page_tables"),
        ("page_indices", "max_pages_per_seq"),
        ("rope_tables", "specs with rope"),
    ]:
        with pytest.raises(MissingFieldError, match=rf"{name}.*\(it needs .*{needs}"):
            unpaged[name]


def test_an_unprepared_window_field_names_itself():
    m = prepare_metadata(BATCH, SPEC, fields=("kv_end",))
    with pytest.raises(MissingFieldError, match="field 'schedules' of VisibleKeys was not prepared"):
        _ = m.visible[0].schedules


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"unknown fields \['slots'\]; there are num_seqs"):
        prepare_metadata(BATCH, SPEC, fields=("slots",))


def test_an_own_field_cannot_replace_one():
    with pytest.raises(ValueError, match=r"derive=\['positions'\] would replace"):
        prepare_metadata(BATCH, SPEC, derive={"positions": lambda m: m.kv_lens})


def test_own_fields_read_fields_and_each_other():
    derive = {"twice": lambda m: 2 * m.positions, "four": lambda m: 2 * m["twice"]}
    m = prepare_metadata(BATCH, SPEC, fields=("four",), derive=derive)
    np.testing.assert_array_equal(m["four"], 4 * everything().positions)


def test_metadata_are_immutable():
    with pytest.raises(AttributeError):
        setattr(everything(), "page_size", 3)  # noqa: B010
    with pytest.raises(AttributeError):
        setattr(everything(), "positions", 3)  # noqa: B010
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        AttentionMetadata({}, BATCH.bucket, None)  # pyright: ignore[reportCallIssue]


def test_prepared_is_only_for_what_is_selected():
    class Empty(Prepared):
        values: dict = {}  # noqa: RUF012

    with pytest.raises(MissingFieldError, match="field 'x' of Empty was not prepared"):
        Empty()["x"]
