"""Serving against `generate`: the same tokens, however requests are cut, ordered, preempted or shared."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn import BucketGrid, DecoderConfig, Model, Sampling, Server, generate, serve
from jaxattn.models import init_params
from jaxattn.serving import calibrate_kv_scales
from jaxattn_kernels.arrays import KVScales

CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    sliding_windows=(None, 7),
)
COMMON = [(5 * i) % 97 for i in range(20)]
PROMPTS = [[1, 5, 9], [*COMMON, 3], [7], [*COMMON, 4, 2], COMMON[:16], [3] * 17, [*COMMON, 3]]
NEW = 12
# One bucket for mixed steps and one for decoding: two programs for all of these tests.
OPTIONS = {
    "page_size": 4,
    "num_pages": 12,
    "implementation": "xla",
    "grid": BucketGrid(tokens=(32,), pages=(128,), max_seqs=8),
}


@pytest.fixture(scope="module")
def model() -> Model:
    params = init_params(jax.random.key(0), CONFIG)
    # Large weights: attention far from uniform, and no ties between likely tokens.
    return Model.from_params(CONFIG, jax.tree.map(lambda x: 1.5 * x, params))


@pytest.fixture(scope="module")
def tokens(model) -> list[list[int]]:
    return generate(model, PROMPTS, NEW, implementation="xla")


@pytest.mark.smoke
@pytest.mark.thinned(3)
@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize(
    "limits",
    [
        {"token_budget": 32, "max_seqs": 8},
        {"token_budget": 32, "max_seqs": 8, "max_chunk": 3},
        {"token_budget": 5, "max_seqs": 2},
        {"token_budget": 1, "max_seqs": 1},
    ],
)
def test_served_tokens_are_generated_tokens(model, tokens, limits, share_prefixes):
    server = Server(model, share_prefixes=share_prefixes, **limits, **OPTIONS)
    requests = [server.add(prompt, NEW) for prompt in PROMPTS]
    results = server.run()
    assert [results[request] for request in requests] == tokens
    stats = server.scheduler.stats
    assert (stats.num_shared_tokens > 0) == share_prefixes
    assert (stats.num_preemptions > 0) == (limits["max_seqs"] > 1)


def test_requests_may_come_between_steps(model, tokens):
    server = Server(model, token_budget=16, max_seqs=4, **OPTIONS)
    requests, results = [], {}
    while len(results) < len(PROMPTS):
        if len(requests) < len(PROMPTS):
            requests.append(server.add(PROMPTS[len(requests)], NEW))
        results |= {done.request_id: done.token_ids for done in server.step()}
    assert [results[request] for request in requests] == tokens
    assert server.step() == []


def test_the_default_grid_holds_every_step(model, tokens):
    served = serve(
        model,
        PROMPTS[:3],
        NEW,
        implementation="xla",
        page_size=16,
        num_pages=5,
        token_budget=8,
        max_seqs=2,
    )
    assert served == tokens[:3]


def test_stop_token(model, tokens):
    stop = tokens[1][4]
    served = serve(model, PROMPTS, NEW, stop_token_ids=[stop], token_budget=32, max_seqs=8, **OPTIONS)
    assert served == generate(model, PROMPTS, NEW, stop_token_ids=[stop], implementation="xla")
    assert any(len(new) < NEW for new in served)


SAMPLING = [
    Sampling(temperature=1.0, seed=7),
    Sampling(),
    Sampling(temperature=1.0, top_k=30, seed=2),
    Sampling(temperature=0.8, top_p=0.9, seed=7),
    Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=5),
    Sampling(temperature=2.0, seed=2**32 - 1),
    Sampling(temperature=1.0, seed=8),
]


@pytest.mark.parametrize(
    "limits",
    [
        {"token_budget": 32, "max_seqs": 8},
        {"token_budget": 32, "max_seqs": 8, "max_chunk": 3, "share_prefixes": False},
        {"token_budget": 1, "max_seqs": 1},
    ],
)
def test_draws_depend_on_the_seed_alone(model, tokens, limits):
    """On no neighbour, chunk, preemption or shared page; and they are those of `generate`."""
    expected = generate(model, PROMPTS, NEW, sampling=SAMPLING, implementation="xla")
    assert [new == old for new, old in zip(expected, tokens, strict=True)].count(True) == 1
    stops, most = [[], [], [], [expected[3][2]], [], [], [9]], [NEW, 3, NEW, NEW, 1, NEW, NEW]
    server = Server(model, **limits, **OPTIONS)
    streamed: dict[int, list[int]] = {}
    for prompt, new, stop, sampling in zip(PROMPTS, most, stops, SAMPLING, strict=True):
        streamed[server.add(prompt, new, sampling=sampling, stop_token_ids=stop)] = []
    before = model.compiled.names.count("choose_tokens")
    results = server.run(lambda request, new: streamed[request].extend(new))
    assert model.compiled.names.count("choose_tokens") - before <= 2  # a mixed bucket, and a decode bucket
    assert results == streamed
    for i, stop in enumerate(stops):
        wanted = expected[i][: most[i]]
        ends = [j + 1 for j, token in enumerate(wanted) if token in stop] or [NEW]
        assert results[i] == wanted[: ends[0]]
    assert (server.scheduler.stats.num_preemptions > 0) == (limits["max_seqs"] > 1)


def test_a_callback_may_add_and_cancel(model, tokens):
    server = Server(model, token_budget=32, max_seqs=8, **OPTIONS)
    first, second = server.add(PROMPTS[0], NEW), server.add(PROMPTS[1], NEW)
    added, cancelled = [], []

    def look(request, new):
        if request == first and not added:
            added.append(server.add(PROMPTS[2], 2))
        if request == second and len(server.scheduler.token_ids(second)) == 4:
            cancelled.extend(server.cancel(second))

    results = server.run(look)
    assert results == {first: tokens[0], added[0]: tokens[2][:2]}
    assert cancelled == tokens[1][:4]
    with pytest.raises(ValueError, match="neither waits nor runs"):
        server.cancel(second)


def test_requests_may_be_added_to_the_scheduler(model, tokens):
    """A request carries what it samples with: whoever adds or cancels it, nothing else is kept of it."""
    server = Server(model, token_budget=32, max_seqs=8, **OPTIONS)
    first = server.scheduler.add(PROMPTS[0], NEW)
    drawn = server.scheduler.add(PROMPTS[2], NEW, sampling=SAMPLING[2])
    cancelled = server.add(PROMPTS[1], NEW, sampling=SAMPLING[0])
    finished = server.step()
    assert server.scheduler.cancel(cancelled)[:1] != []
    results = {done.request_id: done.token_ids for done in finished} | server.run()
    expected = generate(model, [PROMPTS[2]], NEW, sampling=[SAMPLING[2]], implementation="xla")
    assert results == {first: tokens[0], drawn: expected[0]}
    assert server.add(PROMPTS[0], NEW, sampling=SAMPLING[0]) == cancelled + 1


# The last bits of `reference` depend on the bucket, and with them how some keys are rounded.
@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
def test_quantised_cache(model, tokens, dtype, implementation):
    """Chunks, preemption and shared pages change nothing: what is stored depends on the scales alone."""
    scales = calibrate_kv_scales(model, PROMPTS, dtype, implementation=implementation)
    quantised = {"cache_dtype": dtype, "kv_scales": scales, "implementation": implementation}
    expected = generate(model, PROMPTS, NEW, **quantised)
    assert expected != tokens
    server = Server(model, token_budget=32, max_seqs=8, max_chunk=3, **{**OPTIONS, **quantised})
    requests = [server.add(prompt, NEW) for prompt in PROMPTS]
    results = server.run()
    assert [results[request] for request in requests] == expected
    assert server.scheduler.stats.num_shared_tokens > 0
    assert server.scheduler.stats.num_preemptions > 0


def test_scales_of_a_quantised_cache_are_measured_on_the_prompts(model):
    served = serve(model, PROMPTS, NEW, cache_dtype="int8", token_budget=32, max_seqs=8, **OPTIONS)
    assert served == generate(model, PROMPTS, NEW, cache_dtype="int8", implementation="xla")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cache_dtype": "int8"},
            "kv_scales was not given, and cache_dtype=int8 needs it; measure it with cal",
        ),
        ({"cache_dtype": "float16"}, "cache_dtype=float16 cannot be served; use the dtype of the parameters"),
        ({"kv_scales": KVScales(jnp.ones((2, 2)), jnp.ones((2, 2)))}, "cache_dtype=float32 is not quantised"),
        (
            {"cache_dtype": "int8", "kv_scales": KVScales(jnp.ones(2), jnp.ones(2))},
            r"kv_scales.k has shape \(2,\); give one scale per layer and key head, \(2, 2\)",
        ),
    ],
)
def test_a_server_refuses_scales(model, options, message):
    with pytest.raises(ValueError, match=message):
        Server(model, **OPTIONS, **{"token_budget": 32, "max_seqs": 8, **options})


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([97], {}, r"prompt\[0\]=97 is no token id: expected 0 <= id < 97"),
        (
            [1] * 40,
            {},
            "a prompt of 40 tokens and max_new_tokens=12 need 13 pages of 4 tokens, but the cache",
        ),
        ([1], {"token_budget": 33}, "tokens=33 exceeds the grid's largest size 32"),
        ([1], {"num_pages": 17}, "pages=136 exceeds the grid's largest size 128"),
        ([1], {"max_seqs": 0}, "max_seqs=0 must be an integer of at least 1"),
    ],
)
def test_refuses(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        serve(model, [prompt], NEW, **{"token_budget": 32, "max_seqs": 8, **OPTIONS, **options})
