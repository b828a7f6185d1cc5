"""`jaxattn buckets`, and the log that `jaxattn generate` writes for it."""

import json

import jax
import pytest

from jaxattn import Bucket, DecoderConfig, generate, save_params
from jaxattn import nest_sequences as nest
from jaxattn.batch import BatchLog, BucketPlan, read_trace
from jaxattn.cli.main import run
from jaxattn.models import Model, init_params
from jaxattn.planning import plan_buckets
from jaxattn.planning.fixed_grids import FIXED_GRIDS


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "batches.jsonl"
    with BatchLog(path) as log:
        for i in range(60):
            nest([[1] * (1 + 7 * i % 90)], page_tables=[[0] * 1], page_size=128, transfer=False, log=log)
            nest([[1]] * (1 + i % 5), page_tables=[[j] for j in range(1 + i % 5)], page_size=128, log=log)
    return path


def test_a_table_a_plan_and_a_picture(trace, tmp_path, capsys):
    plan, picture = tmp_path / "plan.json", tmp_path / "curve.png"
    options = ["--max-compiles", "6", "--limits", "256/32/64", "--out", str(plan), "--plot", str(picture)]
    assert run(["buckets", str(trace), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("120 batches, ")
    for name in ("programs", "plan", *FIXED_GRIDS):
        assert name in printed
    assert "█" in printed
    assert "against the best fixed grid with as many programs, on this very trace" in " ".join(
        printed.split()
    )
    assert printed.splitlines()[-2:] == [f"wrote {plan}", f"wrote {picture}"]
    expected = plan_buckets(read_trace(trace), 6, limits=Bucket(256, 32, 64))
    assert BucketPlan.load(plan) == expected
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json(trace, capsys):
    assert run(["buckets", str(trace), "--max-compiles", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batches"] == 120
    assert [Bucket(**sizes) for sizes in found["buckets"]] == list(plan_buckets(read_trace(trace), 3).buckets)
    rows = {(row["way"], row["max_compiles"]): row for row in found["rows"]}
    assert len(rows) == 3 * (1 + len(FIXED_GRIDS))
    for name in FIXED_GRIDS:
        for k in (1, 2, 3):
            assert rows["plan", k]["over_unpadded"] <= rows[name, k]["over_unpadded"] + 1e-9
            assert rows[name, k]["compiles"] <= k


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none"], "none cannot be read: No such file"),
        (["bad"], "bad:1: not JSON: "),
        (["good", "--max-compiles", "0"], "max_compiles=0 must be an integer of at least 1"),
        (["good", "--headroom", "-1"], "headroom=-1.0 must be finite, and not negative"),
        (["good", "--out", "."], "--out . is a folder; name a file in it"),
        (["good", "--plot", "no/x.png"], "--plot no/x.png: the folder no does not exist; create it"),
    ],
)
def test_an_error_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text("{]\n")
    (tmp_path / "good").write_text('{"tokens": 1, "seqs": 1, "pages": 0, "max_q_len": 1}\n')
    assert run(["buckets", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxattn: error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("limits", ["256", "256/32/x", "8/9/1"])
def test_limits_that_are_none(tmp_path, capsys, limits):
    with pytest.raises(SystemExit, match="2"):
        run(["buckets", "trace", "--limits", limits])
    assert f"--limits: '{limits}'" in capsys.readouterr().err


def test_generate_logs_its_batches(tmp_path, capsys):
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=8,
        sliding_windows=(None,),
    )
    params = init_params(jax.random.key(0), config)
    save_params(tmp_path / "model", params, config)
    log = tmp_path / "batches.jsonl"
    options = ["--prompt-ids", "1 5 9", "--prompt-ids", "7", "--max-new-tokens", "3", "--json"]
    assert run(["generate", str(tmp_path / "model"), *options, "--log-batches", str(log)]) == 0
    expected = generate(Model.from_params(config, params), [[1, 5, 9], [7]], 3)
    assert json.loads(capsys.readouterr().out) == {"tokens": expected}
    assert [tuple(batch) for batch in read_trace(log)] == [(4, 2, 2, 3)]
    assert run(["buckets", str(log), "--max-compiles", "1"]) == 0
