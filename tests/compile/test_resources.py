"""The table of resources: complete, printed into the document, and compared as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_blackwell_sass
import test_mosaic_gradient_sass
import test_mosaic_sass
import test_sass
from deviceless import B200, H200
from mosaic_sass import Compiled, keys_of
from resources import Key, Resources, changes, read, resources_of, rewrite, written

ROOT = Path(__file__).parents[2]
KEY = Key("triton", "g4-d128", "attention", "sm_80")
OLD = Resources(registers=100, spilled=0, shared_memory=1024, instructions={"mma.sync": 8})
V1, V2 = {"jax": "1"}, {"jax": "2"}


def test_the_document_holds_the_table_of_today():
    text = (ROOT / "notebooks/reference/resources.md").read_text(encoding="utf-8")
    assert "<!-- resources -->" in text
    assert rewrite(text, *read()) == text, "run `make tables`"


def test_the_table_holds_every_case_that_is_compared_and_no_other():
    keys = [
        *(test_sass.key_of(case, "") for case in (*test_sass.MAIN, *test_sass.MAIN_QUANTIZED)),
        *(
            key
            for target, tests in ((H200, test_mosaic_sass), (B200, test_blackwell_sass))
            for case in tests.CASES
            for key in keys_of(target, case)
        ),
        *(key for case in test_mosaic_gradient_sass.CASES for key in test_mosaic_gradient_sass.keys_of(case)),
    ]

    def cases(keys):
        return {(key.backend, key.case, key.architecture) for key in keys}

    assert cases(read()[1]) == cases(keys)


def test_what_is_written_is_read(monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    monkeypatch.setattr("resources.TABLE", path)
    path.write_text(written(V1, {KEY: OLD}))
    assert read() == (V1, {KEY: OLD})


@pytest.mark.parametrize(
    ("new", "same_versions", "other_versions"),
    [
        (OLD, True, True),
        (OLD._replace(registers=99), False, True),
        (OLD._replace(registers=256), False, False),
        (OLD._replace(spilled=4), False, False),
        (OLD._replace(shared_memory=1000), False, False),
        (OLD._replace(instructions={"mma.sync": 9}), False, True),
        (OLD._replace(instructions={}), False, False),
    ],
)
def test_what_passes(new, same_versions, other_versions):
    assert bool(changes({KEY: new}, V1, recorded=(V1, {KEY: OLD}))) != same_versions
    assert bool(changes({KEY: new}, V2, recorded=(V1, {KEY: OLD}))) != other_versions


def test_a_kernel_that_is_not_in_the_table_is_told():
    (line,) = changes({KEY: OLD}, V1, recorded=(V1, {}))
    assert line == "triton g4-d128 attention sm_80 is not in the table"


def test_instructions_are_counted_as_compilers_write_them():
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ];
    ld.global.b32 { %r1 }, [ %rd1 + 0 ];
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
    cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1], [%r2];
    cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%rd1, {%r1, %r2, %r3}], [%r4];
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0;
    @%p tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p3;
    """
    counts = {"128-bit load": 2, "16-byte cp.async": 1, "TMA copy": 2}
    products = {"mma.sync": 1, "wgmma": 1, "tcgen05.mma": 1}
    assert resources_of(Compiled(1, 2, 3, 4, ptx)) == Resources(1, 2, 3, counts | products)
