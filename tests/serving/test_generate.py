"""Generation and scoring of a small random decoder, on every backend."""

import dataclasses
import functools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import (
    Bucket,
    BucketGrid,
    DecoderConfig,
    Model,
    PagePool,
    Sampling,
    advance,
    compute_logits,
    generate,
    nest_sequences,
    prepare_metadata,
    write_cache,
)
from jaxattn.models import CompiledSteps, forward, init_model_cache, init_params
from jaxattn.models.options import PromptOptions, RowOptions
from jaxattn.models.steps import step
from jaxattn.serving import calibrate_kv_scales, compile_generation, fits_one_batch, plan_generation
from jaxattn_kernels.arrays import KVScales

pytestmark = pytest.mark.thinned(2)

CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    sliding_windows=(None, 7),
)
PROMPTS = [[1, 5, 9], [7], list(range(40)), [3] * 17]
NEW = 20


@pytest.fixture(scope="module")
def model() -> Model:
    params = init_params(jax.random.key(0), CONFIG)
    # Large weights: attention far from uniform, and no ties between likely tokens.
    return Model.from_params(CONFIG, jax.tree.map(lambda x: 1.5 * x, params))


@pytest.fixture(scope="module")
def tokens(model) -> list[list[int]]:
    return generate(model, PROMPTS, NEW, implementation="reference")


@pytest.mark.smoke
@pytest.mark.thinned(2)
@pytest.mark.parametrize("implementation", ["auto", "xla", "triton"])
def test_every_backend_writes_the_same(model, tokens, implementation):
    assert generate(model, PROMPTS, NEW, implementation=implementation) == tokens


def test_decoding_equals_scoring_the_whole_text(model, tokens):
    """The paged, step-by-step path against one packed forward pass without any cache."""
    texts = [prompt + new for prompt, new in zip(PROMPTS, tokens, strict=True)]
    for text, prompt, logits in zip(texts, PROMPTS, compute_logits(model, texts), strict=True):
        assert logits.shape == (len(text), CONFIG.vocab_size)
        assert logits.dtype == np.float32
        np.testing.assert_array_equal(logits.argmax(-1)[len(prompt) - 1 : -1], text[len(prompt) :])


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_page_size_changes_nothing(model, tokens, page_size):
    assert generate(model, PROMPTS, NEW, page_size=page_size) == tokens


def test_a_prompt_alone_writes_what_it_writes_in_a_batch(model, tokens):
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        assert generate(model, [prompt], NEW) == [new]


def test_arrays_are_prompts_too(model, tokens):
    assert generate(model, [np.array(p, np.int32) for p in PROMPTS], NEW) == tokens


def test_other_prompts_of_one_bucket_compile_nothing(model, tokens):
    assert generate(model, PROMPTS, NEW) == tokens
    compiled = set(model.compiled.programs)
    assert generate(model, PROMPTS, NEW - 2) == [t[: NEW - 2] for t in tokens]  # the same quarter step
    assert generate(model, [[2] * 10, [4] * 31, [5], [6] * 15], NEW)
    assert set(model.compiled.programs) == compiled


def test_one_trace_per_bucket(model, monkeypatch):
    monkeypatch.setattr("jaxattn.models.steps.forward", chex.assert_max_traces(forward, n=1))
    model = Model.from_params(model.config, model.params)
    for prompts in ([[1, 2], [3]], [[4] * 9], [[5], [6], [7, 8]]):
        compute_logits(model, prompts)
    with pytest.raises(AssertionError, match="is traced > 1 times"):
        compute_logits(model, [[1] * 17])  # another bucket, another trace


def test_stop_token(model, tokens):
    stop = tokens[1][4]
    expected = [t[: t.index(stop) + 1] if stop in t else t for t in tokens]
    assert any(len(t) < NEW for t in expected)
    assert generate(model, PROMPTS, NEW, stop_token_ids=[stop]) == expected


def test_limits_of_each_prompt(model, tokens):
    assert generate(model, PROMPTS, NEW) == tokens
    compiled = set(model.compiled.programs)
    limits = [NEW, 16, 9, 17]  # in as many pages
    expected = [new[:limit] for new, limit in zip(tokens, limits, strict=True)]
    assert generate(model, PROMPTS, limits) == expected
    assert generate(model, PROMPTS, np.array(limits)) == expected
    assert set(model.compiled.programs) == compiled


def test_stop_tokens_of_each_prompt(model, tokens):
    """The first of several ends a prompt, and is its last token; other prompts' stop tokens are nothing."""
    assert generate(model, PROMPTS, NEW) == tokens
    compiled = set(model.compiled.programs)
    stops = [[tokens[0][6], tokens[0][3]], [], tokens[2][9:10], [tokens[3][0], 5]]
    expected = [until(new, set(stop)) for new, stop in zip(tokens, stops, strict=True)]
    assert [len(new) for new in expected].count(NEW) < 3
    assert generate(model, PROMPTS, NEW, stop_token_ids=stops) == expected
    shared = {token for stop in stops for token in stop}
    expected = [until(new, shared) for new in tokens]
    assert generate(model, PROMPTS, NEW, stop_token_ids=shared) == expected
    assert set(model.compiled.programs) == compiled
    many = sorted({*shared, *range(50, 80)})  # more than every program has room for
    assert generate(model, PROMPTS, NEW, stop_token_ids=many) == [until(new, set(many)) for new in tokens]


def until(tokens: list[int], stops: set[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens


MIXED = [
    Sampling(temperature=1.0, seed=7),
    Sampling(),
    Sampling(temperature=0.8, top_k=9, top_p=0.95, seed=1),
    Sampling(temperature=2.0, top_p=0.5, seed=7),
]


def test_draws_do_not_depend_on_the_batch(model, tokens):
    """Alone, in another row, in another bucket: a prompt has the tokens of its seed."""
    together = generate(model, PROMPTS, NEW, sampling=MIXED)
    assert together[1] == tokens[1]
    assert all(together[i] != tokens[i] for i in (0, 2, 3))
    compiled = set(model.compiled.programs)
    order = [2, 0, 3, 1]
    moved = generate(model, [PROMPTS[i] for i in order], NEW, sampling=[MIXED[i] for i in order])
    assert moved == [together[i] for i in order]
    assert set(model.compiled.programs) == compiled
    assert generate(model, PROMPTS[:1], NEW, sampling=MIXED[:1]) == together[:1]


def test_one_seed_for_all_prompts(model):
    """Prompt i draws with the i-th seed after it, so that equal prompts differ."""
    shared = Sampling(temperature=1.0, seed=3)
    prompts = [[3] * 15] * 4
    texts = generate(model, prompts, NEW, sampling=shared)
    assert len(set(map(tuple, texts))) == 4
    assert texts == generate(model, prompts, NEW, sampling=shared)
    each = [dataclasses.replace(shared, seed=seed) for seed in (3, 4, 5, 6)]
    assert texts == generate(model, prompts, NEW, sampling=each)


@pytest.mark.parametrize("every", [1, 8, 100])
def test_tokens_as_they_come(model, tokens, every):
    stops, limits = [[], [], tokens[2][9:10], []], [NEW, 1, NEW, 11]
    run = functools.partial(generate, model, PROMPTS, limits, stop_token_ids=stops)
    result = run()
    compiled = set(model.compiled.programs)
    calls: list[tuple[int, list[int]]] = []
    assert run(stream_every=every, on_tokens=lambda i, new: calls.append((i, new))) == result
    assert joined(calls) == result
    assert calls[:4] == [(i, result[i][:1]) for i in range(4)]  # the first token of each comes at once
    assert max(len(new) for _, new in calls) <= every
    assert len(calls) == sum(1 + -(-(len(new) - 1) // every) for new in result)
    assert set(model.compiled.programs) == compiled


def joined(calls: list[tuple[int, list[int]]]) -> list[list[int]]:
    return [[token for j, new in calls if j == i for token in new] for i in range(len(PROMPTS))]


class TestManyPrompts:
    """More than a batch or a cache holds: the same tokens, through continuous batches."""

    def test_where_they_run(self):
        lens = [3, 1, 40, 17]  # in pages of 16, with 20 new tokens: 2 + 2 + 4 + 3
        fits = functools.partial(fits_one_batch, lens, NEW)
        assert fits()
        assert (fits(num_pages=11), fits(num_pages=10)) == (True, False)
        assert not fits(page_size=1, num_pages=140)
        assert not fits(grid=BucketGrid(tokens=(16, 32)))
        assert not fits(grid=BucketGrid(max_seqs=3))
        assert not fits(grid=BucketGrid(pages=(8,)))
        assert fits_one_batch(lens, [5, 15, 8, 15], num_pages=8)

    def test_a_cache_that_holds_them_is_used_for_one_batch(self, model, tokens, monkeypatch):
        monkeypatch.setattr(sys.modules["jaxattn.serving.generate"], "serve", None)
        assert generate(model, PROMPTS, NEW, num_pages=12) == tokens

    @pytest.mark.parametrize("limit", [{}, {"grid": BucketGrid(tokens=(16,))}])
    def test_they_are_continued_alike(self, model, limit):
        run = functools.partial(
            generate,
            model,
            [[1, 5, 9], [7], [2] * 10, [3] * 12],  # of which a cache of two pages holds two at a time
            [NEW, 3, 7, 9],
            sampling=MIXED,
            stop_token_ids=[[], [3], [4, 5], []],
        )
        expected = run()
        compiled = set(model.compiled.programs)
        calls = []
        assert run(num_pages=2, on_tokens=lambda i, new: calls.append((i, new)), **limit) == expected
        new_programs = {name for name, *_ in set(model.compiled.programs) - compiled}
        assert new_programs <= {"empty_cache", "choose_tokens"}  # none of one batch
        assert all(len(new) == 1 for _, new in calls)
        assert joined(calls) == expected

    @pytest.mark.slow
    def test_two_hundred(self, model):
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, 97, rng.integers(1, 60)).tolist() for _ in range(200)]
        options = {
            "max_new_tokens": rng.integers(1, 40, 200),
            "sampling": [
                Sampling(
                    temperature=float(rng.choice([0, 0.7, 1.5])),
                    top_k=int(rng.integers(1, 120)),
                    top_p=float(rng.choice([0.6, 0.9, 1])),
                    seed=int(rng.integers(2**32)),
                )
                for _ in prompts
            ],
            "stop_token_ids": [rng.integers(0, 97, rng.integers(0, 4)).tolist() for _ in prompts],
            "implementation": "xla",
        }
        expected = generate(model, prompts, **options)
        assert generate(model, prompts, num_pages=60, **options) == expected
        assert generate(model, prompts, grid=BucketGrid(max_seqs=150), **options) == expected

    def test_a_cache_for_those_that_run_at_a_time(self, model, monkeypatch):
        def serve(model, prompts, max_new_tokens, *, num_pages, **options):
            return [[num_pages]]

        monkeypatch.setattr(sys.modules["jaxattn.serving.generate"], "serve", serve)
        prompts = [[1] * length for length in range(1, 41)]
        served = generate(model, prompts, 5, grid=BucketGrid(max_seqs=33), page_size=1)
        assert served == [[sum(range(14, 46))]]

    def test_scales_of_a_quantised_cache(self, model):
        """Measured in several batches, they are those of one."""
        grid = BucketGrid(tokens=(16, 32, 64), max_seqs=3)
        assert not fits_one_batch([len(prompt) for prompt in PROMPTS], 1, grid=grid)
        expected = calibrate_kv_scales(model, PROMPTS, "int8", implementation="xla")
        scales = calibrate_kv_scales(model, PROMPTS, "int8", implementation="xla", grid=grid)
        chex.assert_trees_all_close(scales, expected, rtol=1e-6)

    def test_a_prompt_that_no_cache_of_this_size_holds(self, model):
        with pytest.raises(ValueError, match="a prompt of 40 tokens and max_new_tokens=20 need 4 pages of"):
            generate(model, PROMPTS, NEW, num_pages=3)
        with pytest.raises(ValueError, match="need 11 pages of 16 tokens, but num_pages=3; raise it, or gen"):
            plan_generation([3, 1, 40, 17], NEW, num_pages=3)


def test_one_flat_prompt(model):
    with pytest.raises(TypeError, match="prompts must hold one list or 1-D array per sequence"):
        generate(model, [1, 2, 3], 2)


def test_programs_compiled_ahead_are_those_that_run(model):
    compiled = CompiledSteps(model.config, model.compiled.dtype)
    compile_generation(compiled, plan_generation([len(p) for p in PROMPTS], NEW))
    before = set(compiled.programs)
    generate(Model(model.config, model.params, compiled), PROMPTS, NEW)
    assert set(compiled.programs) == before


def test_low_precision(model):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    low = Model.from_params(CONFIG, params)
    assert low.compiled.dtype == jnp.bfloat16
    logits, exact = compute_logits(low, PROMPTS)[2], compute_logits(model, PROMPTS)[2]
    assert 0 < np.abs(logits - exact).max() < 0.25 * exact.std()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, r"sequences\[1\] has length 0"),
        ([[97]], {}, r"sequences\[0\]\[0\]=97 is a token id outside the vocabulary.*vocab_size=97"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        ([[1]], {"max_new_tokens": [1, 2]}, "max_new_tokens has 2 entries for 1 prompts; give one integer"),
        ([[1], [2]], {"max_new_tokens": [1, 0]}, r"max_new_tokens\[1\]=0 must be an integer of at least 1"),
        ([[1]], {"sampling": []}, "sampling has 0 entries for 1 prompts; give one Sampling for all, or one"),
        ([[1]], {"stop_token_ids": [97]}, "stop_token_ids holds 97; expected token ids from 0 to 96"),
        ([[1]], {"stop_token_ids": [[3, -1]]}, r"stop_token_ids\[0\] holds -1; expected token ids from 0"),
        ([[1]], {"stop_token_ids": [[3], [4]]}, "stop_token_ids has 2 entries for 1 prompts; give one coll"),
        ([[1]], {"stream_every": 0}, "stream_every=0 must be an integer of at least 1"),
        ([[1]], {"num_pages": 0}, "num_pages=0 must be an integer of at least 1"),
        ([[1]], {"page_size": 0}, "page_size=0 must be an integer of at least 1"),
        ([[1] * 50], {"num_pages": 3}, "a prompt of 50 tokens and max_new_tokens=2 need 4 pages of 16 toke"),
        ([[1]], {"implementation": "x"}, "unknown implementation='x'"),
    ],
)
def test_refuses(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 2, **options})


XLA_FIRST = ["xla", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reference", "triton"))]
"""What the bits of a step, which all three are tested for every day, already say of the other two."""


class TestQuantisedCache:
    """Against the same model over a float32 cache into which rounded keys and values are written."""

    @pytest.fixture
    def oracle(self, model, monkeypatch):
        """Replaces `write_cache`, for programs that are traced from now on: what it gives layer by layer."""

        def model_that_rounds(scales: KVScales, dtype: str) -> Model:
            layers = iter(2 * list(zip(*scales, strict=True)))  # two programs: prefill and decode

            def write(cache, k, v, slot_mapping):
                k, v = (fake_quantise(x, s, dtype) for x, s in zip((k, v), next(layers), strict=True))
                return write_cache(cache, k, v, slot_mapping)

            monkeypatch.setattr(sys.modules["jaxattn.attention.layer"], "write_cache", write)
            return Model.from_params(model.config, model.params)

        return model_that_rounds

    @pytest.mark.thinned(2)
    @pytest.mark.parametrize("implementation", XLA_FIRST)
    def test_greedy_tokens(self, model, tokens, oracle, implementation):
        # Two programs may sum in another order: sooner or later a key is rounded up in one and down in the
        # other, and some steps later another token is chosen.
        num, scales = 8, powers_of_two(model, "int8")
        run = functools.partial(generate, implementation=implementation)
        got = run(model, PROMPTS, num, cache_dtype="int8", kv_scales=scales)
        assert got != [new[:num] for new in tokens]
        assert got == run(oracle(scales, "int8"), PROMPTS, num)

    @pytest.mark.smoke
    @pytest.mark.thinned(3)
    @pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
    @pytest.mark.parametrize("dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
    def test_the_bits_of_a_step(self, model, oracle, dtype, implementation):
        scales = powers_of_two(model, dtype)
        quantised = two_steps(model, implementation, dtype, scales)
        rounded = two_steps(oracle(scales, dtype), implementation, "float32", None)
        for (logits, cache), (wanted, exact) in zip(quantised, rounded, strict=True):
            np.testing.assert_array_equal(logits, wanted)
            for got, expected in zip(cache, exact, strict=True):
                assert got.k_pages.dtype == dtype
                np.testing.assert_array_equal(meant(got.k_pages, got.k_scale), expected.k_pages)
                np.testing.assert_array_equal(meant(got.v_pages, got.v_scale), expected.v_pages)

    def test_scales_are_measured_on_the_prompts(self, model):
        run = functools.partial(generate, model, PROMPTS, NEW, cache_dtype="int8", implementation="xla")
        scales = calibrate_kv_scales(model, PROMPTS, "int8", implementation="xla")
        assert run() == run(kv_scales=scales) != run(kv_scales=jax.tree.map(lambda x: 8 * x, scales))

    def test_scales_are_those_of_the_largest_numbers(self, model):
        """Of the layers that `forward` computes; padding and the size of the bucket do not count."""
        scales = calibrate_kv_scales(model, PROMPTS, "int8", implementation="xla")
        batch = nest_sequences(PROMPTS, bucket=Bucket(tokens=61, seqs=4))
        metadata = prepare_metadata(batch, CONFIG.layer_specs())
        _, packed = forward(model.params, CONFIG, batch.token_ids, metadata, implementation="xla")
        for layer, keys_and_values in enumerate(packed):
            for scale, x in zip(scales, keys_and_values, strict=True):
                np.testing.assert_allclose(scale[layer], np.abs(x).max((0, 2)) / 127, rtol=1e-5)
        larger = calibrate_kv_scales(
            model, PROMPTS, "int8", implementation="xla", grid=BucketGrid(tokens=(256,))
        )
        chex.assert_trees_all_close(larger, scales, rtol=1e-6)

    @pytest.mark.parametrize("implementation", XLA_FIRST)
    def test_padding_may_be_poisoned(self, model, implementation):
        prompts = [[1, 5, 9], [7], [3] * 17]
        poisoned = dict(model.params)
        poisoned["embed"] = poisoned["embed"].at[0].set(jnp.nan)  # padding has token 0
        options = {"cache_dtype": "int8", "implementation": implementation}
        got = generate(Model.from_params(CONFIG, poisoned), prompts, 3, **options)
        assert got == generate(model, prompts, 3, **options)

    @pytest.mark.parametrize("implementation", XLA_FIRST)
    @pytest.mark.parametrize(("dtype", "poison"), [("int8", -128), ("float8_e4m3fn", np.nan)])
    def test_pages_may_hold_anything(self, model, monkeypatch, dtype, poison, implementation):
        options = {"cache_dtype": dtype, "implementation": implementation}
        expected = generate(model, PROMPTS, 3, **options)

        empty = Model.empty_cache

        def poisoned(self, **kwargs):
            def fill(leaf):
                return jnp.full_like(leaf, poison) if leaf.ndim == 4 else leaf  # pages, and not their scales

            return jax.tree.map(fill, empty(self, **kwargs))

        monkeypatch.setattr(Model, "empty_cache", poisoned)
        assert generate(model, PROMPTS, 3, **options) == expected

    @pytest.mark.slow
    def test_given_scales_make_prompts_independent(self, model):
        scales = calibrate_kv_scales(model, PROMPTS[:2], "int8")
        options = {"cache_dtype": "int8", "kv_scales": scales, "implementation": "xla"}
        together = generate(model, PROMPTS, NEW, **options)
        assert [generate(model, [prompt], NEW, **options)[0] for prompt in PROMPTS] == together
        assert not scales.k.is_deleted(), "the cache that is donated has its own"

    @pytest.mark.slow
    def test_low_precision(self, model):
        low = Model.from_params(CONFIG, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
        assert generate(low, PROMPTS, 3, cache_dtype="bfloat16") == generate(low, PROMPTS, 3)
        tokens = [generate(low, PROMPTS, 3, cache_dtype="int8", implementation=i) for i in ("xla", "triton")]
        assert tokens[0] == tokens[1]

    def test_programs_compiled_ahead_are_those_that_run(self, model):
        scales, compiled = powers_of_two(model, "int8"), CompiledSteps(model.config, model.compiled.dtype)
        compile_generation(compiled, plan_generation([len(p) for p in PROMPTS], NEW), cache_dtype="int8")
        before = set(compiled.programs)
        generate(Model(CONFIG, model.params, compiled), PROMPTS, NEW, cache_dtype="int8", kv_scales=scales)
        assert set(compiled.programs) == before

    GOOD = jnp.ones((2, 2))
    BAD = GOOD.at[1, 0].set(jnp.nan)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"cache_dtype": "int4"},
                "cache_dtype=int4 cannot be served; use the dtype of the parameters, fl",
            ),
            (
                {"cache_dtype": "fp8"},
                "cache_dtype=fp8 cannot be served; .* or a quantised one: int8, float8_e",
            ),
            (
                {"cache_dtype": "bfloat16"},
                "cache_dtype=bfloat16 cannot be served; use the dtype of the param",
            ),
            (
                {"kv_scales": KVScales(GOOD, GOOD)},
                "kv_scales was given, and cache_dtype=float32 is not quantised; leave it out",
            ),
            (
                {"cache_dtype": "int8", "kv_scales": KVScales(GOOD, GOOD[0])},
                r"kv_scales.v has shape \(2,\); give one scale per layer and key head, \(2, 2\)",
            ),
            (
                {"cache_dtype": "int8", "kv_scales": KVScales(BAD, GOOD)},
                r"kv_scales.k\[1, 0\]=nan must be positive and finite; measure scales with calibrate_kv_sca",
            ),
            ({"cache_dtype": "int8", "kv_scales": KVScales(GOOD, 0 * GOOD)}, r"kv_scales.v\[0, 0\]=0.0 must"),
            ({"cache_dtype": "int8", "kv_scales": KVScales(GOOD, -GOOD)}, r"kv_scales.v\[0, 0\]=-1.0 must"),
        ],
    )
    def test_refuses_before_anything_is_compiled(self, model, options, message):
        model = Model.from_params(CONFIG, model.params)
        with pytest.raises(ValueError, match=message):
            generate(model, PROMPTS, NEW, **options)
        assert not model.compiled.programs

    def test_calibration_refuses(self, model):
        with pytest.raises(
            ValueError, match="cache_dtype=float32 needs no scales; use one of int8, float8_e"
        ):
            calibrate_kv_scales(model, PROMPTS, "float32")
        with pytest.raises(ValueError, match=r"sequences\[0\]\[0\]=97 is a token id outside the vocabulary"):
            calibrate_kv_scales(model, [[97]], "int8")
        broken = dict(model.params)
        broken["embed"] = broken["embed"].at[9].set(jnp.nan)
        with pytest.raises(
            ValueError, match=r"kv_scales.k\[0, 0\]=nan must be positive .* keys and values are"
        ):
            calibrate_kv_scales(Model.from_params(CONFIG, broken), PROMPTS, "int8")


def fake_quantise(x: jax.Array, scale: jax.Array, dtype: str) -> jax.Array:
    """The numbers that a quantised cache can hold, as near to x as they come."""
    largest = 127.0 if dtype == "int8" else float(jnp.finfo(dtype).max)
    scale = scale[None, :, None]
    steps = jnp.clip(x / scale, -largest, largest)
    steps = jnp.round(steps) if dtype == "int8" else steps.astype(dtype).astype(jnp.float32)
    return steps * scale


def powers_of_two(model: Model, dtype: str) -> KVScales:
    """Scales by which nothing is rounded differently wherever they are multiplied in; some are too small."""
    factors = np.array([[1, 2], [0.5, 1]], np.float32)
    measured = calibrate_kv_scales(model, PROMPTS, dtype, implementation="xla")
    return KVScales(*(jnp.asarray(factors * np.exp2(np.ceil(np.log2(scale)))) for scale in measured))


def meant(pages: jax.Array, scale: jax.Array) -> np.ndarray:
    """What is stored, in float32."""
    return np.asarray(pages, np.float32) * np.asarray(scale)[:, None]


def two_steps(model: Model, implementation: str, dtype: str, scales: KVScales | None) -> list:
    """Logits and cache after a prefill and after a decode step of a token that is given."""
    pool = PagePool(num_pages=24, page_size=5)
    batch = nest_sequences(
        PROMPTS,
        page_tables=[pool.allocate(len(prompt) + 1) for prompt in PROMPTS],
        page_size=5,
        num_pages=24,
        bucket=Bucket(tokens=64, seqs=4, pages=24),
    )
    cache = init_model_cache(CONFIG, num_pages=24, page_size=5, dtype=dtype, kv_scales=scales)
    run = jax.jit(functools.partial(step, config=CONFIG, num_rows=4, implementation=implementation))
    prefilled, cache = run(model.params, cache, batch)
    batch = advance(batch, jnp.arange(4, dtype=jnp.int32), bucket=batch.bucket.decode())
    decoded, decoded_cache = run(model.params, cache, batch)
    return [(prefilled, cache), (decoded, decoded_cache)]


class TestStoppingTheLoop:
    """A decode loop on the device, stopped by the host, which retires and adds sequences, and goes on."""

    PAGE_SIZE, NUM_PAGES = 4, 64
    BUCKET = Bucket(tokens=48, seqs=4, pages=64)

    def start(self, model, implementation):
        shared = {
            "page_size": 4,
            "num_pages": 64,
            "max_new_tokens": 16,
            "max_stop_tokens": 1,
            "greedy": False,
            "implementation": implementation,
        }
        self.prefill = model.compiled.prefill(self.BUCKET, decode_seqs=4, **shared)
        self.decode = model.compiled.decode(self.BUCKET.decode(), **shared)
        self.model, self.pool = model, PagePool(self.NUM_PAGES, self.PAGE_SIZE)
        self.cache = init_model_cache(CONFIG, num_pages=64, page_size=4, dtype="float32")
        self.texts: list[list[int]] = []
        self.tables: list[np.ndarray] = []
        self.cached: list[int] = []

    def add(self, prompt):
        self.texts.append(list(prompt))
        self.tables.append(self.pool.allocate(len(prompt) + NEW))
        self.cached.append(0)

    def retire(self, row):
        self.pool.free(self.tables.pop(row))
        self.cached.pop(row)
        return self.texts.pop(row)

    def run(self, num_tokens):
        """Nest what is not cached yet, decoding and new sequences side by side, and loop."""
        batch = nest_sequences(
            [text[n:] for text, n in zip(self.texts, self.cached, strict=True)],
            context_lens=self.cached,
            page_tables=self.tables,
            page_size=self.PAGE_SIZE,
            num_pages=self.NUM_PAGES,
            is_decode=[n > 0 for n in self.cached],
            bucket=self.BUCKET,
        )
        asked = [PromptOptions(num_tokens, self.sampling, ())] * len(self.texts)
        rows = RowOptions.of(asked, num_rows=4, max_stop_tokens=1, vocab_size=97)
        state, cache = self.prefill(self.model.params, self.cache, batch, rows)
        while state.active.any():  # in blocks of 3, which changes nothing
            state, cache = self.decode(self.model.params, cache, state, rows, np.int32(3))
        self.cache, tokens, counts = cache, state.tokens, state.num_tokens
        for row, text in enumerate(self.texts):
            text.extend(tokens[row, : counts[row]].tolist())
            self.cached[row] = len(text) - 1  # the last token has been chosen, and not been read

    @pytest.mark.thinned(4)
    @pytest.mark.parametrize("implementation", ["xla", "triton"])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_going_on_equals_never_having_stopped(self, model, implementation, temperature):
        self.start(model, implementation)
        self.sampling = Sampling(temperature=temperature, seed=5)
        tokens = generate(model, PROMPTS, NEW, sampling=[self.sampling] * 4, implementation=implementation)
        self.add(PROMPTS[0])
        self.add(PROMPTS[3])
        self.run(5)
        self.add(PROMPTS[1])
        self.run(7)
        assert self.retire(0) == PROMPTS[0] + tokens[0][:12]
        self.run(1)
        self.add(PROMPTS[0])  # in pages that were another's
        self.run(7)
        assert self.texts == [
            PROMPTS[3] + tokens[3],
            PROMPTS[1] + tokens[1][:15],
            PROMPTS[0] + tokens[0][:7],
        ]
