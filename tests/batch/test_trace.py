"""Logs of batches: what is written, what is read back, and what a crash or a stranger leaves in them."""

import json
import threading

import numpy as np
import pytest

from jaxattn import Bucket, BucketGrid, nest_sequences
from jaxattn.batch import BatchLog, BucketPlan, Trace, read_trace

GRID = BucketGrid(tokens=(8, 16), pages=(4, 8), max_seqs=4)


@pytest.mark.smoke
def test_a_batch_is_a_line(tmp_path):
    path = tmp_path / "log"
    with BatchLog(path) as log:
        nest_sequences([[1, 2, 3], [4]], page_tables=[[0], [1]], page_size=4, bucket=GRID, log=log)
        nest_sequences([[1], [4]], bucket=Bucket(2, 2, max_q_len=1), log=log)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"tokens": 4, "seqs": 2, "pages": 2, "max_q_len": 3, "bucket": [8, 4, 4, 8]},
        {"tokens": 2, "seqs": 2, "pages": 0, "max_q_len": 1, "bucket": [2, 2, 0, 1]},
    ]
    assert [tuple(batch) for batch in read_trace(path)] == [(4, 2, 2, 3), (2, 2, 0, 1)]


def test_a_log_changes_no_batch(tmp_path):
    with BatchLog(tmp_path / "log") as log:
        logged = nest_sequences([[1, 2, 3], [4]], bucket=GRID, log=log)
    np.testing.assert_array_equal(logged.packed, nest_sequences([[1, 2, 3], [4]], bucket=GRID).packed)


@pytest.mark.parametrize(
    ("sequences", "options"),
    [
        ([[1], []], {}),
        ([[-1]], {}),
        ([[1] * 17], {}),
        ([[1], [2]], {"page_tables": [[0], [0]], "page_size": 4}),
        ([[1, 2]], {"bucket": Bucket(1, 1)}),
    ],
)
def test_a_batch_that_is_refused_is_not_written(tmp_path, sequences, options):
    path = tmp_path / "log"
    with BatchLog(path) as log, pytest.raises(ValueError, match=r"length 0|outside|exceeds|twice|not fit"):
        nest_sequences(sequences, **{"bucket": GRID, **options}, log=log)
    assert path.read_text() == ""


def test_a_closed_log(tmp_path):
    log = BatchLog(tmp_path / "log")
    log.close()
    log.close()
    with pytest.raises(ValueError, match="log is closed; nest within its `with` block"):
        nest_sequences([[1]], bucket=GRID, log=log)


def test_a_second_run_adds_to_the_first(tmp_path):
    path = tmp_path / "log"
    for tokens in ([1], [1, 2]):
        with BatchLog(path) as log:
            nest_sequences([tokens], bucket=GRID, log=log)
    assert read_trace(path).tokens.tolist() == [1, 2]


@pytest.mark.parametrize("kept", [1, 20, 60, -2])
def test_after_a_crash(tmp_path, kept):
    """Half a line at the end is left out with a warning, and the next run does not write behind it."""
    path = tmp_path / "log"
    with BatchLog(path) as log:
        for tokens in ([1], [1, 2]):
            nest_sequences([tokens], bucket=GRID, log=log)
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:kept])
    with pytest.warns(UserWarning, match=r"log:2: the last line is cut off, and left out"):
        assert read_trace(path).tokens.tolist() == [1]
    with BatchLog(path) as log:
        nest_sequences([[1, 2, 3]], bucket=GRID, log=log)
    assert read_trace(path).tokens.tolist() == [1, 3]


def test_a_whole_last_line_needs_no_end(tmp_path):
    path = tmp_path / "log"
    with BatchLog(path) as log:
        nest_sequences([[1]], bucket=GRID, log=log)
    path.write_text("\n" + path.read_text().rstrip("\n"))
    assert len(read_trace(path)) == 1
    with BatchLog(path) as log:
        nest_sequences([[1, 2]], bucket=GRID, log=log)
    assert read_trace(path).tokens.tolist() == [1, 2]


def test_threads_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "log"
    with BatchLog(path) as log:

        def nest(length):
            for _ in range(50):
                nest_sequences([[1] * length], bucket=GRID, transfer=False, log=log)

        threads = [threading.Thread(target=nest, args=(length,)) for length in (1, 7, 11)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(read_trace(path).tokens.tolist()) == [1] * 50 + [7] * 50 + [11] * 50


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("}{", "not JSON: "),
        ("[1, 2]", r"\[1, 2\] is no object; write one per batch"),
        ('{"tokens": 1, "seqs": 1, "pages": 0}', "there is no 'max_q_len'; a batch has tokens, seqs, pages"),
        ('{"tokens": 1.5, "seqs": 1, "pages": 0, "max_q_len": 1}', "tokens=1.5 must be an integer"),
        ('{"tokens": 1e400, "seqs": 1, "pages": 0, "max_q_len": 1}', "tokens=inf must be an integer"),
        ('{"tokens": true, "seqs": 1, "pages": 0, "max_q_len": 1}', "tokens=True must be an integer"),
        (
            '{"tokens": 9223372036854775808, "seqs": 1, "pages": 0, "max_q_len": 1}',
            "tokens=9223372036854775808 must be an",
        ),
        ('{"tokens": 1, "seqs": 2, "pages": 0, "max_q_len": 1}', "seqs=2 must lie between 1 and tokens=1"),
        ('{"tokens": 1, "seqs": 1, "pages": -1, "max_q_len": 1}', "pages=-1 must not be negative"),
        ('{"tokens": 1, "seqs": 1, "pages": 0, "max_q_len": 0}', "max_q_len=0 must be at least 1"),
        ("\xff", "not JSON: "),
    ],
)
def test_lines_that_are_refused(tmp_path, line, message):
    good = '{"tokens": 1, "seqs": 1, "pages": 0, "max_q_len": 1}'
    path = tmp_path / "log"
    path.write_bytes(f"{good}\n{line}\n{good}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"log:2: {message}"):
        read_trace(path)


def test_an_empty_log(tmp_path):
    (tmp_path / "log").write_text("\n")
    with pytest.raises(ValueError, match="log holds no batch; log some by nest_sequences"):
        read_trace(tmp_path / "log")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (np.zeros(4, int), r"sizes has shape \(4,\)"),
        (np.zeros((1, 4)), "dtype float64"),
        (np.array([[1, 1, 0, 1], [1, 2, 0, 1]]), "batch 1 is impossible: seqs=2 must lie"),
    ],
)
def test_impossible_traces(sizes, message):
    with pytest.raises(ValueError, match=message):
        Trace(sizes)


def test_parts_of_a_trace():
    trace = Trace.of([(1, 1, 0, 1), (2, 1, 0, 2), (3, 1, 7, 3)])
    assert trace[1:].pages.tolist() == [0, 7]
    assert len(trace[:1]) == 1


def test_a_plan_is_picked_from_by_the_longest_query_too():
    """A decode bucket that a plan picks does not say that its rows decode: prompts of a token look so too."""
    plan = BucketPlan((Bucket(2, 2, max_q_len=1), Bucket(8, 4)))
    decode = nest_sequences([[1], [2]], bucket=plan)
    assert decode.bucket == Bucket(2, 2, max_q_len=1)
    assert not np.asarray(decode.is_decode).any()
    assert np.asarray(nest_sequences([[1], [2]], bucket=plan.buckets[0]).is_decode).all()
    assert np.asarray(nest_sequences([[1], [2]], bucket=plan, is_decode=[True, True]).is_decode).all()
    assert nest_sequences([[1, 2]], bucket=plan).bucket == Bucket(8, 4)
