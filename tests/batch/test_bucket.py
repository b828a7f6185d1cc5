import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxattn import Bucket, BucketGrid
from jaxattn.batch import BucketPlan, powers_of_two, quarter_steps


def test_quarter_steps():
    assert quarter_steps(16, 64) == (16, 20, 24, 28, 32, 40, 48, 56, 64)
    assert quarter_steps(1, 12) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
    assert len(quarter_steps(16, 32768)) == 45
    assert quarter_steps(5, 9)[-1] == 9  # the largest is always there, on the grid or not


def test_powers_of_two():
    assert powers_of_two(3, 20) == (4, 8, 16, 20)


@given(tokens=st.integers(1, 32768), seqs=st.integers(1, 1024), pages=st.integers(0, 5000))
def test_the_smallest_that_fits(tokens, seqs, pages):
    seqs = min(seqs, tokens)
    grid = BucketGrid()
    bucket = grid.pick(tokens=tokens, seqs=seqs, pages=pages)
    bucket.require(tokens=tokens, seqs=seqs, pages=pages, max_q_len=tokens)
    assert bucket.tokens == min(n for n in grid.tokens if n >= tokens)
    assert bucket.tokens <= max(16, 1.25 * tokens)
    assert bucket.seqs == min(bucket.tokens, grid.max_seqs)
    assert bucket.pages == (min(n for n in grid.pages if n >= pages) if pages else 0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tokens": 40000, "seqs": 1}, "tokens=40000 exceeds the grid's largest size 32768"),
        ({"tokens": 2000, "seqs": 2000}, "seqs=2000 exceeds the grid's max_seqs=1024"),
        ({"tokens": 1, "seqs": 1, "pages": 1 << 21}, "pages=2097152 exceeds the grid's largest size 1048576"),
    ],
)
def test_nothing_fits(sizes, message):
    with pytest.raises(ValueError, match=message):
        BucketGrid().pick(**sizes)


def test_require_names_every_excess():
    with pytest.raises(ValueError, match=r"tokens=9 exceeds bucket.tokens=8; pages=3 exceeds bucket.pages=2"):
        Bucket(8, 4, 2).require(tokens=9, seqs=4, pages=3, max_q_len=8)


def test_decode_bucket():
    assert Bucket(64, 8, 32).decode() == Bucket(8, 8, 32, max_q_len=1)
    assert Bucket(64, 8, 32).decode(3) == Bucket(3, 3, 32, max_q_len=1)


@pytest.mark.parametrize("sizes", [(4, 5), (4, 0), (4, 2, -1), (4, 2, 0, 5)])
def test_impossible_buckets(sizes):
    with pytest.raises(ValueError, match="must"):
        Bucket(*sizes)


@pytest.mark.parametrize("sizes", [{"tokens": ()}, {"pages": (4, 2)}, {"tokens": (0, 1)}, {"max_seqs": 0}])
def test_impossible_grids(sizes):
    with pytest.raises(ValueError, match="must be"):
        BucketGrid(**sizes)


def test_impossible_steps():
    with pytest.raises(ValueError, match="smallest=5 and largest=4"):
        quarter_steps(5, 4)


def test_a_grid_holds_what_it_has_a_bucket_for():
    grid = BucketGrid(tokens=(16, 32), pages=(4, 8), max_seqs=20)
    for tokens, seqs, pages in ((32, 20, 8), (33, 1, 0), (1, 21, 0), (32, 1, 9), (5, 20, 0), (32, 1, 0)):
        fits = grid.holds(tokens=tokens, seqs=seqs, pages=pages)
        if fits:
            grid.pick(tokens=tokens, seqs=seqs, pages=pages)
        else:
            with pytest.raises(ValueError, match="exceeds the grid's"):
                grid.pick(tokens=tokens, seqs=seqs, pages=pages)
        assert fits == (tokens <= 32 and seqs <= 20 and pages <= 8)


def test_a_grid_has_decode_buckets_for_who_asks():
    grid = BucketGrid(tokens=(16, 32), pages=(4,), max_seqs=20)
    assert grid.pick(tokens=17, seqs=17, pages=3, max_q_len=1) == Bucket(20, 20, 4, max_q_len=1)
    assert grid.pick(tokens=17, seqs=17, pages=3, max_q_len=2) == grid.pick(tokens=17, seqs=17, pages=3)


PLAN = BucketPlan((Bucket(4, 4, 8, max_q_len=1), Bucket(8, 4, 8), Bucket(32, 4, 8), Bucket(16, 4, 64)))


@pytest.mark.parametrize(
    ("sizes", "number"),
    [
        ({"tokens": 4, "seqs": 4, "pages": 8, "max_q_len": 1}, 0),
        ({"tokens": 4, "seqs": 4, "pages": 8}, 1),
        ({"tokens": 8, "seqs": 4}, 1),
        ({"tokens": 8, "seqs": 4, "pages": 9, "max_q_len": 1}, 3),
        ({"tokens": 9, "seqs": 1, "pages": 8}, 2),
        ({"tokens": 17, "seqs": 1, "pages": 9}, None),
        ({"tokens": 5, "seqs": 5}, None),
    ],
)
def test_the_first_bucket_of_a_plan_that_holds_a_batch(sizes, number):
    assert PLAN.holds(**sizes) == (number is not None)
    if number is not None:
        assert PLAN.pick(**sizes) == PLAN.buckets[number]
        return
    with pytest.raises(ValueError, match=r"no bucket of the plan holds tokens=.*Plan with limits= for"):
        PLAN.pick(**sizes)


@pytest.mark.parametrize("buckets", [(), (Bucket(4, 4), Bucket(4, 4))])
def test_impossible_plans(buckets):
    with pytest.raises(ValueError, match="must be one bucket at least, and no bucket twice"):
        BucketPlan(buckets)


def test_a_plan_in_a_file(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert BucketPlan.load(tmp_path / "plan.json") == PLAN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no plan of buckets: Expecting"),
        ("[]", "holds no plan of buckets: "),
        ("{}", "no key 'jaxattn_buckets'"),
        ('{"jaxattn_buckets": 2, "buckets": []}', "jaxattn_buckets=2 must be 1"),
        ('{"jaxattn_buckets": 1, "buckets": []}', "one bucket at least"),
        ('{"jaxattn_buckets": 1, "buckets": [3]}', "holds no plan of buckets: "),
        ('{"jaxattn_buckets": 1, "buckets": [{"tokens": 4}]}', "no key 'seqs'"),
        ('{"jaxattn_buckets": 1, "buckets": [{"tokens": 4.0}]}', "tokens=4.0 must be an integer"),
        (
            '{"jaxattn_buckets": 1, "buckets": [{"tokens": 4, "seqs": 5, "pages": 0, "max_q_len": 1}]}',
            "seqs=5 must lie between 1 and tokens=4",
        ),
    ],
)
def test_files_that_hold_no_plan(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        BucketPlan.load(tmp_path / "plan.json")
