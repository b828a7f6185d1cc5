"""Generation and scoring of a small random decoder, on every backend."""

import functools

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
    compile_generation,
    compute_logits,
    generate,
    nest_sequences,
    plan_generation,
)
from jaxattn.models import Programs, forward, init_cache, init_params
from jaxattn.models.sampling import sample

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
    compiled = set(model.programs.compiled)
    assert generate(model, PROMPTS, NEW - 2) == [t[: NEW - 2] for t in tokens]  # the same quarter step
    assert generate(model, [[2] * 10, [4] * 31, [5], [6] * 15], NEW)
    assert set(model.programs.compiled) == compiled


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
    assert generate(model, PROMPTS, NEW, stop_token_id=stop) == expected


def test_sampling(model):
    def draw(seed, prompts=PROMPTS, **kwargs):
        return generate(model, prompts, NEW, temperature=1.0, key=jax.random.key(seed), **kwargs)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0, top_k=1) == generate(model, PROMPTS, NEW)
    assert draw(0, PROMPTS[:1]) == draw(0)[:1], "a row's draw does not depend on the rows after it"


def test_raw_keys(model):
    draw = functools.partial(generate, model, PROMPTS, NEW, temperature=1.0)
    assert draw(key=jax.random.PRNGKey(3)) == draw(key=jax.random.key(3))


@pytest.mark.parametrize("temperature", [1e-37, 1e38])
def test_extreme_temperatures(model, temperature):
    drawn = generate(model, PROMPTS, 4, temperature=temperature, top_k=5, key=jax.random.key(0))
    assert (drawn == generate(model, PROMPTS, 4)) == (temperature < 1)


def test_top_k_keeps_exactly_k_of_equal_logits():
    keys = jax.random.split(jax.random.key(0), 50)
    draw = functools.partial(sample, jnp.zeros((1, 9)), temperature=jnp.float32(1), greedy=False, top_k=2)
    assert len({int(draw(key)[0]) for key in keys}) == 2


def test_one_flat_prompt(model):
    with pytest.raises(TypeError, match="prompts must hold one list or 1-D array per sequence"):
        generate(model, [1, 2, 3], 2)


def test_programs_compiled_ahead_are_those_that_run(model):
    programs = Programs(model.config, model.programs.dtype)
    compile_generation(programs, plan_generation([len(p) for p in PROMPTS], NEW))
    compiled = set(programs.compiled)
    generate(Model(model.config, model.params, programs), PROMPTS, NEW)
    assert set(programs.compiled) == compiled


def test_top_k_draws_among_the_likeliest(model):
    prompt = [1, 2, 3]
    likeliest = np.argsort(compute_logits(model, [prompt])[0][-1])[-3:]
    drawn = {
        generate(model, [prompt], 1, temperature=5.0, top_k=3, key=jax.random.key(seed))[0][0]
        for seed in range(20)
    }
    assert drawn <= set(likeliest.tolist())
    assert len(drawn) > 1


def test_low_precision(model):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    low = Model.from_params(CONFIG, params)
    assert low.programs.dtype == jnp.bfloat16
    logits, exact = compute_logits(low, PROMPTS)[2], compute_logits(model, PROMPTS)[2]
    assert 0 < np.abs(logits - exact).max() < 0.25 * exact.std()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, r"sequences\[1\] has length 0"),
        ([[97]], {}, r"sequences\[0\]\[0\]=97 is a token id outside the vocabulary.*vocab_size=97"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        ([[1]], {"temperature": float("inf"), "key": jax.random.key(0)}, "temperature=inf must be 0"),
        ([[1]], {"temperature": 1e-40, "key": jax.random.key(0)}, "temperature=1e-40 must be 0"),
        ([[1]], {"temperature": 1.0, "key": jax.random.key(0, impl="rbg")}, "expected one key"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ([[1]], {"temperature": 1.0}, "give key="),
        ([[1]], {"top_k": 98}, "top_k=98 must lie between 1 and vocab_size=97"),
        ([[1]], {"stop_token_id": 97}, "stop_token_id=97 must lie between"),
        ([[1]], {"page_size": 0}, "page_size=0 must be an integer of at least 1"),
        ([[1] * 50], {"grid": BucketGrid(tokens=(16, 32))}, "tokens=50 exceeds the grid's largest size 32"),
        ([[1]], {"implementation": "x"}, "unknown implementation='x'"),
    ],
)
def test_refuses(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 2, **options})


class TestStoppingTheLoop:
    """A decode loop on the device, stopped by the host, which retires and adds sequences, and goes on."""

    PAGE_SIZE, NUM_PAGES = 4, 64
    BUCKET = Bucket(tokens=48, seqs=4, pages=64)

    def start(self, model, implementation):
        shared = {"page_size": 4, "num_pages": 64, "implementation": implementation}
        self.prefill = model.programs.prefill(self.BUCKET, decode_seqs=4, **shared)
        self.decode = model.programs.decode(self.BUCKET.decode(), max_new_tokens=16, **shared)
        self.model, self.pool = model, PagePool(self.NUM_PAGES, self.PAGE_SIZE)
        self.cache = init_cache(CONFIG, num_pages=64, page_size=4, dtype="float32")
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
        logits, cache, batch = self.prefill(self.model.params, self.cache, batch)
        rest = (jax.random.key(0), jnp.float32(0), jnp.int32(num_tokens), jnp.int32(-1))
        tokens, counts, self.cache = self.decode(self.model.params, cache, batch, logits, *rest)
        for row, text in enumerate(self.texts):
            text.extend(tokens[row, : counts[row]].tolist())
            self.cached[row] = len(text) - 1  # the last token has been chosen, and not been read

    @pytest.mark.parametrize("implementation", ["xla", "triton"])
    def test_going_on_equals_never_having_stopped(self, model, tokens, implementation):
        self.start(model, implementation)
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
