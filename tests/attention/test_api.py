"""Every implementation against the definition, and the definition against `jax.nn`."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix import BACKENDS, FULL_MATRIX, HEADS, WINDOWS, covering_selection, make_spec
from oracle import Problem, attend_dense_with_lse
from tolerances import assert_as_good_as

from jaxattn import AttentionSpec, Bucket, attention, choose_implementation, nest_sequences, prepare_metadata
from jaxattn.attention import choice as choice_module
from jaxattn.measuring.workloads import ODD, Workload, nest_workload
from jaxattn.metadata import MissingFieldError

pytestmark = pytest.mark.thinned(2)

# Long enough for several key blocks of every implementation.
LONG = Workload("long", (1, 130, 3), (1299, 513, 600), "several key blocks")
LONG_DECODE = Workload("long decode", (1, 1, 1, 1), (1299, 511, 512, 30), "split keys")


@functools.lru_cache(maxsize=8)  # implementations and workloads of one spec share a program
def compiled_attention(spec: AttentionSpec, implementation: str):
    return jax.jit(lambda q, k, v, m: attention(q, k, v, m, spec, implementation=implementation))


def run_paged(problem: Problem, spec: AttentionSpec, page_size: int, implementation: str, dtype="float32"):
    """The real rows of paged attention, and the padding rows, as float64."""
    num_pages = (
        384 if problem.workload in ODD else 2600
    ) // page_size + 8  # one bucket for all ODD workloads
    tables, k_pages, v_pages = problem.pages(page_size, num_pages=num_pages)
    bucket = Bucket(tokens=160, seqs=8, pages=num_pages)
    batch = nest_workload(problem.workload, page_tables=tables, page_size=page_size, bucket=bucket)
    metadata = prepare_metadata(batch, spec)
    q = problem.packed(problem.q, bucket.tokens)
    args = (jnp.asarray(x, dtype) for x in (q, k_pages, v_pages))
    out = np.asarray(compiled_attention(spec, implementation)(*args, metadata), np.float64)
    n = sum(problem.workload.q_lens)
    return out[:n], out[n:]


def check_against_reference(heads, window, soft_cap, page_size, head_dim, implementation):
    spec = make_spec(heads, window, soft_cap, head_dim)
    for workload in ODD:
        problem = Problem.draw(workload, spec)
        plain, _ = run_paged(problem, spec, page_size, "reference")
        got, padding = run_paged(problem, spec, page_size, implementation)
        assert_as_good_as(got, plain, problem.expected(spec), jnp.dtype("float32"))
        np.testing.assert_array_equal(padding, 0)


@pytest.mark.smoke
@pytest.mark.thinned(3)
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("heads", "window", "soft_cap", "page_size", "head_dim"), covering_selection())
def test_agrees_with_reference(heads, window, soft_cap, page_size, head_dim, implementation):
    check_against_reference(heads, window, soft_cap, page_size, head_dim, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("heads", "window", "soft_cap", "page_size", "head_dim"), FULL_MATRIX)
def test_agrees_with_reference_full_matrix(heads, window, soft_cap, page_size, head_dim, implementation):
    check_against_reference(heads, window, soft_cap, page_size, head_dim, implementation)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("window", "page_size"), [(None, 16), (7, 12), (600, 64), (300, 1)])
def test_many_key_blocks(window, page_size, implementation):
    spec = make_spec("gqa", window, None, 64)
    problem = Problem.draw(LONG, spec)
    plain, _ = run_paged(problem, spec, page_size, "reference")
    got, _ = run_paged(problem, spec, page_size, implementation)
    assert_as_good_as(got, plain, problem.expected(spec), jnp.dtype("float32"))


@pytest.mark.smoke
@pytest.mark.thinned(2)
@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
@pytest.mark.parametrize(
    ("window", "soft_cap", "has_sinks"), [(None, None, True), (7, 5.0, False), (600, 5.0, True)]
)
def test_sinks_and_lse(window, soft_cap, has_sinks, implementation):
    """Over one key block and over several, split keys among them; padding has no denominator."""
    spec = dataclasses.replace(make_spec("gqa", window, soft_cap, 64), sinks=has_sinks)
    sinks = np.linspace(-9, 9, spec.num_q_heads, dtype=np.float32) if has_sinks else None
    for workload in (ODD[3], LONG):
        problem = Problem.draw(workload, spec)
        num_pages = 2600 // 16 + 8
        tables, k_pages, v_pages = problem.pages(16, num_pages=num_pages)
        bucket = Bucket(tokens=160, seqs=8, pages=num_pages)
        batch = nest_workload(workload, page_tables=tables, page_size=16, bucket=bucket)
        q = problem.packed(problem.q, bucket.tokens)
        results = attention_with_lse(spec, implementation)(
            *(jnp.asarray(x) for x in (q, k_pages, v_pages)), sinks, prepare_metadata(batch, spec)
        )
        sequences = list(zip(problem.q, problem.k, problem.v, strict=True))
        plain, exact = (
            [
                np.concatenate(x)
                for x in zip(*(attend_dense_with_lse(*s, spec, sinks, dtype) for s in sequences), strict=True)
            ]
            for dtype in (np.float32, np.float64)
        )
        n = len(exact[0])
        for got, p, e, padding in zip(results, plain, exact, (0, -np.inf), strict=True):
            assert_as_good_as(np.asarray(got)[:n], p, e, jnp.dtype("float32"))
            np.testing.assert_array_equal(got[n:], padding)


@functools.lru_cache(maxsize=8)
def attention_with_lse(spec: AttentionSpec, implementation: str):
    return jax.jit(
        lambda q, k, v, sinks, m: attention(
            q, k, v, m, spec, sinks=sinks, return_lse=True, implementation=implementation
        )
    )


PREFIX_LM = {  # queries, contexts, prefixes: of no token, of some, of a whole query, within the context
    "packed": ((70, 5, 33, 1), (0, 0, 0, 0), (40, 5, 0, 1)),
    "chunked": ((70, 5, 33, 1), (0, 130, 0, 64), (65, 100, 33, 64)),
}


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
@pytest.mark.parametrize("kind", PREFIX_LM)
def test_prefix_lm(kind, implementation):
    """Tokens of the prefix see all of it; those behind it see what causal ones see."""
    q_lens, context_lens, prefixes = PREFIX_LM[kind]
    spec = AttentionSpec(num_q_heads=6, num_kv_heads=2, head_dim=64, prefix_lm=True)
    problem = Problem.draw(Workload(kind, q_lens, context_lens, ""), spec)
    bucket, tables, layout = Bucket(tokens=160, seqs=8, pages=40), None, {}
    if kind == "packed":
        k, v = (problem.packed(x, bucket.tokens) for x in (problem.k, problem.v))
        bucket = Bucket(tokens=160, seqs=8)
    else:
        tables, k, v = problem.pages(16, num_pages=40)
        layout = {"context_lens": context_lens, "page_tables": tables, "page_size": 16}
    batch = nest_sequences(
        np.zeros(sum(q_lens), int), q_lens=q_lens, prefix_lm_lens=prefixes, bucket=bucket, **layout
    )
    q, k, v = (jnp.asarray(x) for x in (problem.packed(problem.q, 160), k, v))
    got = compiled_attention(spec, implementation)(q, k, v, prepare_metadata(batch, spec))
    exact, plain = (
        np.concatenate(
            [
                attend_dense_with_lse(q, k, v, spec, prefix=prefix, dtype=dtype)[0]
                for q, k, v, prefix in zip(problem.q, problem.k, problem.v, prefixes, strict=True)
            ]
        )
        for dtype in (np.float64, np.float32)
    )
    n = sum(q_lens)
    assert_as_good_as(np.asarray(got)[:n], plain, exact, jnp.dtype("float32"))
    np.testing.assert_array_equal(got[n:], 0)


# Each of a quantised type with another type of the queries, and options besides.
QUANTIZED = [
    ("int8", "bfloat16", {}, ODD[3]),
    ("float8_e4m3fn", "float16", {"sliding_window": 600, "sinks": True}, LONG),
    ("float8_e5m2", "float32", {"logits_soft_cap": 5.0}, LONG),
]


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(jnp.asarray(x, dtype), np.float32)


@pytest.mark.smoke
@pytest.mark.thinned(2)
@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
@pytest.mark.parametrize(("kv_dtype", "dtype", "options", "workload"), QUANTIZED)
def test_quantised_keys_and_values(kv_dtype, dtype, options, workload, implementation):
    """As good as plain attention to the numbers that the cache stands for; nobody's slots are the largest."""
    spec = AttentionSpec(num_q_heads=6, num_kv_heads=2, head_dim=64, **options)
    sinks = np.linspace(-3, 3, 6, dtype=np.float32) if spec.sinks else None
    k_scale, v_scale = np.array([0.01, 0.03], np.float32), np.array([0.02, 0.5], np.float32)
    top = 127 if kv_dtype == "int8" else float(jnp.finfo(kv_dtype).max)

    def store(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        steps = np.clip(x * 0.3 / scale[:, None], -top, top)
        return rounded(np.round(steps) if kv_dtype == "int8" else steps, kv_dtype)

    drawn = Problem.draw(workload, spec)
    stored = Problem(
        workload,
        [rounded(q, dtype) for q in drawn.q],
        [store(k, k_scale) for k in drawn.k],
        [store(v, v_scale) for v in drawn.v],
    )
    tables, k, v = stored.pages(16, num_pages=170)
    bucket = Bucket(tokens=160, seqs=8, pages=170)
    batch = nest_workload(workload, page_tables=tables, page_size=16, bucket=bucket)
    out, lse = attention(
        jnp.asarray(stored.packed(stored.q, bucket.tokens), dtype),
        jnp.asarray(np.nan_to_num(k, nan=top)).astype(kv_dtype),
        jnp.asarray(np.nan_to_num(v, nan=top)).astype(kv_dtype),
        prepare_metadata(batch, spec),
        spec,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        return_lse=True,
        implementation=implementation,
    )

    def attend_to_what_is_meant(wide: type, narrow: str | None) -> tuple[np.ndarray, np.ndarray]:
        """The definition in `wide`, its operands rounded to `narrow`."""
        parts = []
        for q, k, v in zip(stored.q, stored.k, stored.v, strict=True):
            k, v = (
                k.astype(wide) * k_scale[:, None].astype(wide),
                v.astype(wide) * v_scale[:, None].astype(wide),
            )
            k, v = (x if narrow is None else rounded(x, narrow) for x in (k, v))
            parts.append(attend_dense_with_lse(q, k, v, spec, sinks, wide))
        return np.concatenate([out for out, _ in parts]), np.concatenate([lse for _, lse in parts])

    exact, exact_lse = attend_to_what_is_meant(np.float64, None)
    plain, _ = attend_to_what_is_meant(np.float32, dtype)
    n = len(exact)
    assert out.dtype == dtype
    assert_as_good_as(np.asarray(out, np.float64)[:n], rounded(plain, dtype), exact, jnp.dtype(dtype))
    np.testing.assert_allclose(lse[:n], exact_lse, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(out[n:], np.float32), 0)


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
def test_parts_of_the_keys_merge_by_their_lse(implementation):
    """Two-sided attention to two halves of the keys of one sequence, in two batches."""
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=64, causal=False)
    whole = Problem.draw(Workload("one", (5,), (200,), ""), spec)
    parts = []
    for keys in (slice(0, 97), slice(97, 205)):
        k, v = whole.k[0][keys], whole.v[0][keys]
        half = Problem(Workload("half", (5,), (len(k) - 5,), ""), whole.q, [k], [v])
        tables, k_pages, v_pages = half.pages(16, num_pages=16)
        bucket = Bucket(tokens=8, seqs=1, pages=16)
        batch = nest_workload(half.workload, page_tables=tables, page_size=16, bucket=bucket)
        q = jnp.asarray(half.packed(half.q, 8))
        run = attention_with_lse(spec, implementation)
        parts.append(run(q, jnp.asarray(k_pages), jnp.asarray(v_pages), None, prepare_metadata(batch, spec)))
    (first, lse), (second, other) = parts
    share = 1 / (1 + np.exp(np.asarray(other - lse, np.float64)))[:5, :, None]
    merged = share * np.asarray(first)[:5] + (1 - share) * np.asarray(second)[:5]
    plain, _ = attend_dense_with_lse(whole.q[0], whole.k[0], whole.v[0], spec, dtype=np.float32)
    assert_as_good_as(merged, plain, whole.expected(spec), jnp.dtype("float32"))


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_errs_no_more_than_twice_the_plain_path(dtype, implementation):
    spec = make_spec("gqa", None, None, 64)
    problem = Problem.draw(ODD[3], spec)
    exact = problem.expected(spec)
    got, padding = run_paged(problem, spec, 16, implementation, dtype)
    plain = np.concatenate(
        [plain_attention(*qkv, spec, dtype) for qkv in zip(problem.q, problem.k, problem.v, strict=True)]
    )
    assert_as_good_as(got, plain, exact, jnp.dtype(dtype))
    np.testing.assert_array_equal(padding, 0)


def plain_attention(q, k, v, spec: AttentionSpec, dtype: str) -> np.ndarray:
    """Causal attention of one sequence, every intermediate in `dtype`."""
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    k, v = jnp.repeat(k, spec.group_size, 1), jnp.repeat(v, spec.group_size, 1)
    scores = jnp.einsum("qnh,knh->nqk", q, k) * jnp.asarray(spec.softmax_scale, dtype)
    sees = jnp.arange(k.shape[0])[None, :] <= k.shape[0] - q.shape[0] + jnp.arange(q.shape[0])[:, None]
    weights = jax.nn.softmax(jnp.where(sees[None], scores, -jnp.inf), axis=-1)
    return np.asarray(jnp.einsum("nqk,knh->qnh", weights, v), np.float64)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [None, 16])
def test_reference_agrees_with_jax_nn(heads, window, page_size):
    spec = make_spec(heads, window, None, 64)
    for workload in ODD if page_size else ODD[:1]:
        problem = Problem.draw(workload, spec)
        got = run_paged(problem, spec, page_size, "reference")[0] if page_size else run_packed(problem, spec)
        expected = np.concatenate(
            [
                jax_nn_attention(q, k, v, window)[len(k) - len(q) : len(k)]
                for q, k, v in zip(problem.q, problem.k, problem.v, strict=True)
            ]
        )
        assert_as_good_as(got, expected, problem.expected(spec), jnp.dtype("float32"))


def jax_nn_attention(q, k, v, window: int | None, length: int = 256) -> np.ndarray:
    """`jax.nn` over the whole sequence; zeros stand for earlier queries and pad the end, out of sight."""
    context = len(k) - len(q)
    q, k, v = (
        jnp.asarray(np.pad(x, ((before, length - before - len(x)), (0, 0), (0, 0))))
        for x, before in ((q, context), (k, 0), (v, 0))
    )
    # jax.nn counts the keys to the left of the query; we count the query's own as well.
    local_window_size = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        q[None], k[None], v[None], is_causal=True, local_window_size=local_window_size
    )
    return np.asarray(out[0], np.float64)


def run_packed(problem: Problem, spec: AttentionSpec, implementation: str = "reference") -> np.ndarray:
    """The real rows of attention over keys packed beside the queries; padding must come out zero."""
    bucket = Bucket(tokens=160, seqs=8)
    batch = nest_workload(problem.workload, bucket=bucket)
    q, k, v = (jnp.asarray(problem.packed(x, bucket.tokens)) for x in (problem.q, problem.k, problem.v))
    out = np.asarray(
        compiled_attention(spec, implementation)(q, k, v, prepare_metadata(batch, spec)), np.float64
    )
    n = sum(problem.workload.q_lens)
    np.testing.assert_array_equal(out[n:], 0)
    return out[:n]


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_keys(causal, implementation):
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=64, causal=causal)
    problem = Problem.draw(ODD[0], spec)
    got = run_packed(problem, spec, implementation)
    assert_as_good_as(got, run_packed(problem, spec), problem.expected(spec), jnp.dtype("float32"))


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
def test_a_larger_bucket_changes_no_bit(implementation):
    spec = make_spec("gqa", 7, None, 64)
    problem = Problem.draw(ODD[3], spec)
    tables, k_pages, v_pages = problem.pages(16)
    outs = []
    for bucket in (Bucket(108, 5, 25), Bucket(160, 8, 64), Bucket(256, 200, 128)):
        batch = nest_workload(problem.workload, page_tables=tables, page_size=16, bucket=bucket)
        q = problem.packed(problem.q, bucket.tokens)
        metadata = prepare_metadata(batch, spec)
        run = compiled_attention(spec, implementation)
        out = np.asarray(run(jnp.asarray(q), jnp.asarray(k_pages), jnp.asarray(v_pages), metadata))
        outs.append(out[: sum(problem.workload.q_lens)])
    if implementation == "reference":  # sums over the whole key axis, whose length is the bucket's
        for out in outs[1:]:
            assert_as_good_as(out, outs[0], problem.expected(spec), jnp.dtype("float32"))
    else:
        np.testing.assert_array_equal(outs[0], outs[1])
        np.testing.assert_array_equal(outs[0], outs[2])


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("window", [None, 700])
def test_the_others_change_no_bit_of_a_long_sequence(window, implementation):
    """Law 8 where keys are split: the pieces are those of the sequence's own length."""
    spec = make_spec("gqa", window, None, 64)
    problem = Problem.draw(LONG_DECODE, spec)
    together, _ = run_paged(problem, spec, 16, implementation)
    for i, (q, k, v) in enumerate(zip(problem.q, problem.k, problem.v, strict=True)):
        workload = Workload("alone", (1,), (LONG_DECODE.context_lens[i],), "")
        alone, _ = run_paged(Problem(workload, [q], [k], [v]), spec, 16, implementation)
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
@pytest.mark.parametrize("workload", [ODD[2], LONG_DECODE], ids=lambda w: w.name)
def test_decode_bucket_equals_general_bucket(workload, implementation):
    spec = make_spec("gqa", None, None, 64)
    problem = Problem.draw(workload, spec)
    tables, k_pages, v_pages = problem.pages(16)
    num_pages = len(k_pages)
    outs = []
    for bucket in (Bucket(8, 8, num_pages, max_q_len=1), Bucket(8, 8, num_pages)):
        batch = nest_workload(problem.workload, page_tables=tables, page_size=16, bucket=bucket)
        q = problem.packed(problem.q, bucket.tokens)
        run = compiled_attention(spec, implementation)
        outs.append(
            np.asarray(
                run(jnp.asarray(q), jnp.asarray(k_pages), jnp.asarray(v_pages), prepare_metadata(batch, spec))
            )
        )
    np.testing.assert_array_equal(*outs)
    np.testing.assert_array_equal(outs[0][len(workload.q_lens) :], 0)


@pytest.mark.smoke
class TestValidation:
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16)
    batch = nest_workload(ODD[0], bucket=Bucket(160, 8))
    q = jnp.zeros((160, 4, 16))
    k = jnp.zeros((160, 2, 16))

    def attend(self, q=None, k=None, v=None, spec=None, **kwargs):
        spec = spec or self.spec
        q, k = self.q if q is None else q, self.k if k is None else k
        metadata = kwargs.pop("metadata", None) or prepare_metadata(self.batch, self.spec)
        return attention(q, k, k if v is None else v, metadata, spec, **kwargs)

    def test_unknown_implementation(self):
        with pytest.raises(ValueError, match="unknown implementation='x'; use 'auto', 'reference', 'xla', "):
            self.attend(implementation="x")

    def test_query_shape(self):
        with pytest.raises(
            ValueError, match=r"q.shape=\(160, 2, 16\); this batch and spec need \(160, 4, 16\)"
        ):
            self.attend(q=self.k)

    def test_key_and_value_shapes(self):
        with pytest.raises(ValueError, match="must be equal"):
            self.attend(v=self.k[:100])

    def test_packed_keys_for_a_paged_batch(self):
        problem = Problem.draw(ODD[0], self.spec)
        tables, _, _ = problem.pages(16)
        batch = nest_workload(ODD[0], page_tables=tables, page_size=16, bucket=Bucket(160, 8, 32))
        with pytest.raises(ValueError, match="needs pages of shape"):
            self.attend(metadata=prepare_metadata(batch, self.spec))

    def test_pages_for_a_packed_batch(self):
        with pytest.raises(ValueError, match="needs packed keys"):
            self.attend(k=jnp.zeros((10, 16, 2, 16)))

    def test_dtypes(self):
        with pytest.raises(ValueError, match="one dtype"):
            self.attend(k=self.k.astype(jnp.bfloat16))

    @pytest.mark.parametrize(
        ("dtype", "k_scale", "message"),
        [
            ("int8", None, "k_scale was not given, and keys and values are stored as int8"),
            ("float32", 1.0, "k_scale was given, and keys and values are stored as float32"),
            ("int8", np.ones(4), r"k_scale has shape \(4,\); give one number, or one per key head, \(2,\)"),
        ],
    )
    def test_scales(self, dtype, k_scale, message):
        with pytest.raises(ValueError, match=message):
            self.attend(k=self.k.astype(dtype), k_scale=k_scale, v_scale=k_scale)

    def test_quantised_keys_for_hopper(self):
        q, k = self.q.astype("bfloat16"), self.k.astype("int8")
        with pytest.raises(NotImplementedError, match="keys are int8 and queries bfloat16"):
            self.attend(q=q, k=k, k_scale=1.0, v_scale=1.0, implementation="mosaic")

    def test_sinks_of_a_spec_without(self):
        with pytest.raises(ValueError, match=r"sinks was given, and spec.sinks=False"):
            self.attend(sinks=jnp.zeros(4))

    @pytest.mark.parametrize(
        ("sinks", "message"),
        [
            (None, "sinks was not given, and spec.sinks=True"),
            (np.zeros(2, "f"), r"sinks.shape=\(2,\); this spec needs \(4,\)"),
            (np.zeros(4, int), "sinks have dtype int.*; expected floating-point"),
        ],
    )
    def test_sinks(self, sinks, message):
        spec = dataclasses.replace(self.spec, sinks=True)
        with pytest.raises(ValueError, match=message):
            self.attend(spec=spec, sinks=sinks)

    def test_integers(self):
        with pytest.raises(ValueError, match="q has dtype int32; expected floating-point"):
            self.attend(q=self.q.astype(int), k=self.k.astype(int))

    @pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
    def test_numpy_arrays_are_welcome(self, implementation):
        out = self.attend(
            q=np.ones(self.q.shape, "f"), k=np.ones(self.k.shape, "f"), implementation=implementation
        )
        assert isinstance(out, jax.Array)

    def test_window_class_that_was_not_prepared(self):
        spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, sliding_window=3)
        with pytest.raises(MissingFieldError, match=r"'visible' has no .*sliding_window=3"):
            self.attend(spec=spec)

    def test_schedule_that_was_not_prepared(self):
        metadata = prepare_metadata(self.batch, self.spec, consumers="triton")
        with pytest.raises(MissingFieldError, match=r"'schedules' holds no Tiling.*short_q=1"):
            self.attend(metadata=metadata, implementation="xla")

    def test_head_dim_that_no_kernel_serves(self):
        spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=512)
        q, k = jnp.zeros((160, 4, 512)), jnp.zeros((160, 2, 512))
        with pytest.raises(NotImplementedError, match="head_dim=512 exceeds 256; use 'xla'"):
            self.attend(
                q=q, k=k, spec=spec, metadata=prepare_metadata(self.batch, spec), implementation="triton"
            )


@pytest.mark.smoke
class TestChoice:
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=64)

    def test_cpu(self):
        assert choose_implementation(self.spec, platform="cpu").implementation == "xla"

    @pytest.mark.parametrize("platform", ["gpu", "cuda"])
    def test_gpu(self, platform):
        assert choose_implementation(self.spec, platform=platform).implementation == "triton"

    @pytest.mark.parametrize(
        ("capability", "reason"), [("7.5", "7.5 is below 8.0"), ("gfx90a", "a gfx90a, not one of NVIDIA's")]
    )
    def test_gpu_that_the_kernel_does_not_serve(self, monkeypatch, capability, reason):
        device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(choice_module, "default_device", lambda: device)
        choice = choose_implementation(self.spec)
        assert choice.implementation == "xla"
        assert reason in choice.reason

    def test_gpu_with_a_dtype_no_kernel_serves(self):
        choice = choose_implementation(self.spec, platform="gpu", dtype="float64")
        assert choice.implementation == "xla"
        assert "float64" in choice.reason

    @pytest.mark.parametrize(
        ("capability", "chosen"), [("8.0", "xla"), ("8.9", "triton"), ("10.0", "triton")]
    )
    def test_float8_needs_a_gpu_that_reads_it(self, monkeypatch, capability, chosen):
        device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(choice_module, "default_device", lambda: device)
        choice = choose_implementation(self.spec, dtype="bfloat16", kv_dtype="float8_e4m3fn")
        assert choice.implementation == chosen
        for kv_dtype in ("int8", "float8_e5m2"):
            choice = choose_implementation(self.spec, dtype="bfloat16", kv_dtype=kv_dtype)
            assert choice.implementation == "triton"

    def test_auto_is_the_choice(self):
        problem = Problem.draw(ODD[0], self.spec)
        np.testing.assert_array_equal(
            run_packed(problem, self.spec, "auto"), run_packed(problem, self.spec, "xla")
        )


@pytest.mark.smoke
def test_triton_with_64_bit_types_enabled():
    problem = Problem.draw(ODD[3], TestChoice.spec)
    expected, _ = run_paged(problem, TestChoice.spec, 16, "triton")
    with jax.enable_x64(True):
        compiled_attention.cache_clear()
        got, _ = run_paged(problem, TestChoice.spec, 16, "triton")
    compiled_attention.cache_clear()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", BACKENDS)
def test_float32_products_are_full(implementation):
    spec = TestChoice.spec
    batch = nest_workload(ODD[0], bucket=Bucket(160, 8))
    q, k = jnp.zeros((160, 4, 64)), jnp.zeros((160, 2, 64))
    lowered = compiled_attention(spec, implementation).lower(q, k, k, prepare_metadata(batch, spec)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
def test_permuting_sequences_permutes_outputs(implementation):
    """Law 2, and law 8: a sequence's bits do not depend on the others, nor on its place."""
    spec = make_spec("gqa", 7, None, 64)
    problem = Problem.draw(ODD[3], spec)
    order = [3, 0, 4, 2, 1]
    q_lens, context_lens = (tuple(x[i] for i in order) for x in (ODD[3].q_lens, ODD[3].context_lens))
    q, k, v = ([x[i] for i in order] for x in (problem.q, problem.k, problem.v))
    permuted = Problem(Workload("permuted", q_lens, context_lens, ""), q, k, v)
    out, _ = run_paged(problem, spec, 16, implementation)
    out_permuted, _ = run_paged(permuted, spec, 16, implementation)
    rows = np.split(out, np.cumsum(ODD[3].q_lens)[:-1])
    expected = np.concatenate([rows[i] for i in order])
    if implementation == "reference":  # it sums over one key axis of all sequences
        assert_as_good_as(out_permuted, expected, permuted.expected(spec), jnp.dtype("float32"))
    else:
        np.testing.assert_array_equal(out_permuted, expected)


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
def test_grouped_heads_are_repeated_heads(implementation):
    """Law 3."""
    grouped, repeated = (
        make_spec("gqa", None, None, 64),
        AttentionSpec(num_q_heads=6, num_kv_heads=6, head_dim=64),
    )
    problem = Problem.draw(ODD[3], grouped)
    k, v = ([np.repeat(x, 3, axis=1) for x in rows] for rows in (problem.k, problem.v))
    as_mha = Problem(ODD[3], problem.q, k, v)
    got, _ = run_paged(problem, grouped, 16, implementation)
    expected, _ = run_paged(as_mha, repeated, 16, implementation)
    assert_as_good_as(got, expected, problem.expected(grouped), jnp.dtype("float32"))


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
@pytest.mark.parametrize("cut", [1, 37, 69])
def test_a_prefill_in_two_chunks_is_one_prefill(cut, implementation):
    """Law 4."""
    spec = make_spec("gqa", 20, None, 64)
    whole = Problem.draw(Workload("whole", (70,), (0,), ""), spec)
    first = Problem(
        Workload("first", (cut,), (0,), ""), [whole.q[0][:cut]], [whole.k[0][:cut]], [whole.v[0][:cut]]
    )
    second = Problem(Workload("second", (70 - cut,), (cut,), ""), [whole.q[0][cut:]], whole.k, whole.v)
    chunks = [run_paged(problem, spec, 16, implementation)[0] for problem in (first, second)]
    expected, _ = run_paged(whole, spec, 16, implementation)
    assert_as_good_as(np.concatenate(chunks), expected, whole.expected(spec), jnp.dtype("float32"))


def test_gradients_of_poisoned_padding_are_zero():
    """Law 7, on the differentiable implementation."""
    spec = make_spec("gqa", None, None, 64)
    problem = Problem.draw(ODD[0], spec)
    metadata = prepare_metadata(nest_workload(ODD[0], bucket=Bucket(160, 8)), spec)
    qkv = [jnp.asarray(problem.packed(x, 160)) for x in (problem.q, problem.k, problem.v)]

    def total(q, k, v):
        return attention(q, k, v, metadata, spec, implementation="reference")[:148].sum()

    gradients = jax.grad(total, argnums=(0, 1, 2))(*qkv)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[148:], 0)
