"""After warming up nothing compiles, whatever is served or generated in these buckets."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxattn import Bucket, BucketGrid, DecoderConfig, Model, Server, forbid_compiles, generate, serve, warmup
from jaxattn.batch import BatchLog, BucketPlan, read_trace
from jaxattn.compiling import CompilationForbiddenError, count_compiles
from jaxattn.models import CompiledSteps, init_params
from jaxattn.planning import LinearCost, fit_cost, measure_steps, plan_buckets
from jaxattn.serving import calibrate_kv_scales, largest_step, plan_generation

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=8,
    sliding_windows=(None,),
)
PROMPTS = [[1, 5, 9], [(5 * i) % 61 for i in range(20)], [7], [3] * 17]
NEW = 5
CACHE: dict[str, Any] = {"num_pages": 16, "page_size": 4}
LIMITS: dict[str, Any] = {"token_budget": 24, "max_seqs": 3}
PLAN = BucketPlan((Bucket(3, 3, 48, max_q_len=1), Bucket(24, 3, 48)))


@pytest.fixture
def model() -> Model:
    """One whose programs are its own."""
    return Model.from_params(CONFIG, init_params(jax.random.key(0), CONFIG))


@pytest.fixture(scope="module")
def tokens() -> list[list[int]]:
    model = Model.from_params(CONFIG, init_params(jax.random.key(0), CONFIG))
    return generate(model, PROMPTS, NEW)


@pytest.mark.smoke
def test_a_server_compiles_nothing(model, tokens):
    report = warmup(model, PLAN, **CACHE)
    assert report.programs == ("empty_cache", "choose_tokens", "choose_tokens")
    assert 0 < report.compiling_seconds < report.seconds
    with forbid_compiles():
        assert serve(model, PROMPTS, NEW, grid=PLAN, **LIMITS, **CACHE) == tokens
    assert warmup(model, PLAN, **CACHE).programs == ()


def test_without_it_the_first_step_is_refused(model):
    cache: dict[str, Any] = {
        "num_pages": 15,
        "page_size": 4,
    }  # JAX keeps programs by shape
    warmup(model, PLAN.buckets[:1], **cache)
    server = Server(model, grid=PLAN, **LIMITS, **cache)
    server.add(PROMPTS[0], NEW)
    with forbid_compiles(), pytest.raises(CompilationForbiddenError, match=r"jit\(choose_tokens\)"):
        server.step()


def test_a_quantised_server_compiles_nothing(model):
    scales = calibrate_kv_scales(model, PROMPTS, "int8")
    options: dict[str, Any] = {**LIMITS, **CACHE, "grid": PLAN, "cache_dtype": "int8"}
    warmup(model, PLAN, cache_dtype="int8", **CACHE)
    with forbid_compiles():
        served = serve(model, PROMPTS, NEW, kv_scales=scales, **options)
    assert served == serve(model, PROMPTS, NEW, **options)


def test_generation_compiles_nothing(model, tokens):
    plan = plan_generation([len(prompt) for prompt in PROMPTS], NEW)
    assert warmup(model, [plan]).programs == ("empty_cache", "prefill", "decode")
    with forbid_compiles():
        assert generate(model, PROMPTS, NEW) == tokens


def test_servers_of_one_model_share_programs(model):
    options: dict[str, Any] = {"grid": PLAN, **LIMITS, **CACHE}
    first = serve(model, PROMPTS, NEW, **options)
    with count_compiles() as compiles:
        assert serve(model, PROMPTS, NEW, **options) == first
    assert compiles.count == 0


def test_a_grid_is_warmed_up_whole():
    compiled = CompiledSteps(CONFIG, np.dtype("float32"))
    grid = BucketGrid(tokens=(2, 4), pages=(4,), max_seqs=2)
    report = warmup(compiled, grid, num_pages=8, page_size=4)
    # Two mixed buckets; one for decode steps, since both sizes of tokens have as many sequences.
    assert report.programs == ("empty_cache",) + ("choose_tokens",) * 3


def test_steps_of_another_process_are_read(tmp_path):
    for hits in (0, 3):
        jax.clear_caches()
        compiled = CompiledSteps(CONFIG, np.dtype("float32"), cache_dir=tmp_path)
        assert warmup(compiled, PLAN, **CACHE).cache_hits == hits


def test_the_cache_of_a_server_must_be_known(model):
    with pytest.raises(
        ValueError, match=r"num_pages was not given, and the programs of a server depend on it"
    ):
        warmup(model, PLAN)


def test_a_server_from_its_own_trace(model, tokens, tmp_path):
    """The whole way: serve with a log, plan, warm up, serve in the plan's buckets."""
    with BatchLog(tmp_path / "log") as log:
        assert serve(model, PROMPTS, NEW, log=log, **LIMITS, **CACHE) == tokens
    trace = read_trace(tmp_path / "log")
    assert trace.tokens.max() == 24
    assert (trace.max_q_len == 1).any()
    plan = plan_buckets(trace, 3, limits=largest_step(num_pages=16, **LIMITS))
    warmup(model, plan, **CACHE)
    with forbid_compiles():
        assert serve(model, PROMPTS, NEW, grid=plan, **LIMITS, **CACHE) == tokens
    with pytest.raises(ValueError, match="no bucket of the plan holds tokens=25"):
        Server(model, grid=plan, token_budget=25, max_seqs=3, **CACHE)


def test_one_batch_logs_its_prefill(model, tmp_path):
    with BatchLog(tmp_path / "log") as log:
        generate(model, PROMPTS, NEW, log=log)
    assert len(read_trace(tmp_path / "log")) == 1


def test_steps_are_measured(model):
    buckets = [Bucket(3, 3, 12, max_q_len=1), Bucket(24, 3, 12), Bucket(24, 3, 48)]
    seconds = measure_steps(model, buckets, repeats=2, **CACHE)
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert isinstance(fit_cost(buckets, seconds), LinearCost)
    with pytest.raises(ValueError, match="has no pages; a server's steps are paged"):
        measure_steps(model, [Bucket(3, 3)], **CACHE)
