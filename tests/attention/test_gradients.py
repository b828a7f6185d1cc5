"""Gradients of every implementation against the definition's in float64, and under JAX's transformations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads
from matrix import BACKENDS, FULL_MATRIX, covering_selection, make_spec
from oracle import Problem, attend_dense_with_lse
from tolerances import assert_as_good_as

from jaxattn import AttentionMetadata, AttentionSpec, Bucket, attention, nest_sequences, prepare_metadata
from jaxattn.attention.vjp import LSE_NAME, OUT_NAME
from jaxattn.measuring.workloads import ODD, Workload, nest_workload
from jaxattn.metadata.fields import MissingFieldError

# Queries in several tiles, keys in several blocks, of every implementation.
LONG = Workload("long", (1, 130, 3, 20), (700, 180, 290, 0), "several tiles and blocks")
BUCKET = Bucket(tokens=160, seqs=8)
GQA = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16)
SINKS = np.linspace(-2, 2, 4, dtype=np.float32)


@dataclasses.dataclass
class Step:
    """A layer's arrays in a batch, everything that nobody owns NaN, and gradients of its results."""

    spec: AttentionSpec
    batch: Any
    problem: Problem
    tables: list[np.ndarray] | None
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    d_out: np.ndarray
    d_lse: np.ndarray

    @classmethod
    def draw(cls, workload: Workload, spec: AttentionSpec, page_size: int | None) -> Step:
        problem, num_tokens = Problem.draw(workload, spec), sum(workload.q_lens)
        if page_size is None:
            batch, bucket, tables = nest_workload(workload, bucket=BUCKET), BUCKET, None
            k, v = (problem.packed(rows, bucket.tokens) for rows in (problem.k, problem.v))
        else:
            needed = sum(-(-n // page_size) for n in workload.kv_lens)
            num_pages = max(needed, 400 // page_size + 5) + 3  # for all of `ODD` the same: one program
            bucket = dataclasses.replace(BUCKET, pages=num_pages)
            tables, k, v = problem.pages(page_size, num_pages=num_pages)
            batch = nest_workload(workload, page_tables=tables, page_size=page_size, bucket=bucket)
        q = problem.packed(problem.q, bucket.tokens)
        rng = np.random.default_rng(9)
        d_out, d_lse = (rng.standard_normal(shape).astype(np.float32) for shape in (q.shape, q.shape[:2]))
        d_out[num_tokens:] = d_lse[num_tokens:] = np.nan
        return cls(spec, batch, problem, tables, q, k, v, d_out, d_lse)

    def placed(self, rows: list[np.ndarray]) -> np.ndarray:
        """Rows of the keys of all sequences, where the keys lie; 0 elsewhere."""
        result = np.zeros(self.k.shape)
        if self.tables is None:
            result[: sum(map(len, rows))] = np.concatenate(rows)
            return result
        page_size, slots = self.k.shape[1], result.reshape(-1, *self.k.shape[2:])
        for table, row in zip(self.tables, rows, strict=True):
            position = np.arange(len(row))
            slots[table[position // page_size] * page_size + position % page_size] = row
        return result

    @property
    def sinks(self) -> np.ndarray | None:
        return SINKS if self.spec.sinks else None

    def gradients(self, implementation: str, dtype: str = "float32") -> list[np.ndarray]:
        """Those of queries, keys, values and sinks."""
        program = gradient_program(self.spec, implementation)
        narrow = [jnp.asarray(x, dtype) for x in (self.q, self.k, self.v, self.d_out)]
        q, k, v, d_out = narrow
        wide = "float64" if dtype == "float64" else "float32"
        sinks = None if self.sinks is None else jnp.asarray(self.sinks, wide)
        found = program(self.batch, q, k, v, sinks, d_out, jnp.asarray(self.d_lse, wide))
        return [np.asarray(x, np.float64) for x in found if x is not None]


@functools.lru_cache(maxsize=4)
def gradient_program(spec: AttentionSpec, implementation: str):
    def go_back(batch, q, k, v, sinks, d_out, d_lse):
        metadata = prepare_metadata(batch, spec)

        def attend(q, k, v, sinks):
            return attention(
                q, k, v, metadata, spec, sinks=sinks, return_lse=True, implementation=implementation
            )

        return jax.vjp(attend, q, k, v, sinks)[1]((d_out, d_lse))

    return jax.jit(go_back)


def exact_gradients(step: Step) -> list[np.ndarray]:
    with jax.enable_x64(True):
        return step.gradients("reference", "float64")


def textbook_gradients(step: Step) -> tuple[list[np.ndarray], list[float]]:
    """The formulas at the head of `jaxattn/gradients.py`, for one sequence after the other, in float32.

    Also, per gradient, the largest number whose rounding shows. Of queries and keys it is the larger of the
    two numbers, times its weight and a query or key, whose difference a gradient is made of: where weights
    cannot change, as in a window of one key, the difference is all rounding. Of values it is a logit, times
    its weight and a gradient of an output: weights are made anew from a logit and a sum of others, each of
    them rounded by itself.
    """
    spec, G, start = step.spec, step.spec.group_size, 0
    scale, cap = np.float32(spec.softmax_scale), spec.logits_soft_cap
    dq, dks, dvs = np.zeros(step.q.shape), [], []
    d_sinks, difference, exponent = np.zeros(spec.num_q_heads, np.float32), 0.0, 0.0
    for q, k, v in zip(step.problem.q, step.problem.k, step.problem.v, strict=True):
        rows = slice(start, start := start + len(q))
        d_out, d_lse = step.d_out[rows], step.d_lse[rows].T
        repeated_k, repeated_v = np.repeat(k, G, axis=1), np.repeat(v, G, axis=1)
        logits = np.einsum("qnh,knh->nqk", q, repeated_k) * scale
        slope = np.float32(1)
        if cap is not None:
            logits = np.float32(cap) * np.tanh(logits / np.float32(cap))
            slope = 1 - (logits / np.float32(cap)) ** 2
        position, key = np.arange(len(k) - len(q), len(k))[:, None], np.arange(len(k))[None, :]
        sees = key <= position if spec.causal else np.ones_like(key <= position)
        if spec.sliding_window is not None:
            sees &= key > position - spec.sliding_window
        out, lse = attend_dense_with_lse(q, k, v, spec, step.sinks, np.float32)
        weights = np.where(sees, np.exp(logits - lse.T[..., None]), np.float32(0))
        delta = np.einsum("qnh,qnh->nq", d_out, out) - d_lse
        d_weights = np.einsum("qnh,knh->nqk", d_out, repeated_v)
        largest = np.abs(weights * d_weights).max() * scale * max(np.abs(q).max(), np.abs(k).max())
        difference = max(difference, float(largest))
        exponent = max(
            exponent, float(np.abs(np.where(sees, logits, 0) * weights).max() * np.abs(d_out).max())
        )
        d_products = weights * (d_weights - delta[..., None]) * slope * scale
        dq[rows] = np.einsum("nqk,knh->qnh", d_products, repeated_k)
        for found, products, of_rows in ((dks, d_products, q), (dvs, weights, d_out)):
            by_head = np.einsum("nqk,qnh->knh", products, of_rows)
            found.append(by_head.reshape(len(k), spec.num_kv_heads, G, -1).sum(axis=2))
        if step.sinks is not None:
            d_sinks -= (np.exp(step.sinks[:, None] - lse.T) * delta).sum(axis=1)
    gradients, summands = [dq, step.placed(dks), step.placed(dvs)], [difference, difference, exponent]
    if step.sinks is None:
        return gradients, summands
    return [*gradients, d_sinks], [*summands, difference]


def check_step(step: Step, *implementations: str) -> None:
    exact = exact_gradients(step)
    plain, summands = textbook_gradients(step)
    for implementation in implementations:
        for g, p, e, size in zip(step.gradients(implementation), plain, exact, summands, strict=True):
            assert_as_good_as(g, p, e, jnp.dtype("float32"), size)
            np.testing.assert_array_equal(g[e == 0], 0)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "window", "soft_cap", "page_size", "head_dim"), covering_selection()[::2]
)  # fmt: skip
def test_agrees_with_the_definition(heads, window, soft_cap, page_size, head_dim, implementation):
    step = Step.draw(ODD[3], make_spec(heads, window, soft_cap, head_dim), page_size)
    check_step(step, implementation)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "window", "soft_cap", "page_size", "head_dim"), FULL_MATRIX)
def test_agrees_with_the_definition_full_matrix(heads, window, soft_cap, page_size, head_dim):
    for workload in ODD:
        step = Step.draw(workload, make_spec(heads, window, soft_cap, head_dim), page_size)
        check_step(step, *BACKENDS)


OPTIONS: list[tuple[dict[str, Any], int | None]] = [
    ({}, 12),
    ({"sliding_window": 100, "sinks": True}, 16),
    ({"causal": False, "logits_soft_cap": 2.0, "sinks": True}, None),
]


@pytest.mark.smoke
@pytest.mark.thinned(3)
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("options", "page_size"), OPTIONS)
def test_several_tiles_and_blocks(options, page_size, implementation):
    """Also the gradient of sinks, and through the log-sum-exp."""
    workload = LONG if page_size else Workload("packed", (1, 130, 3, 20), (0, 0, 0, 0), "")
    check_step(Step.draw(workload, dataclasses.replace(GQA, **options), page_size), implementation)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_the_same_bits_again(implementation):
    step = Step.draw(ODD[3], dataclasses.replace(GQA, sinks=True), 16)
    for first, second in zip(step.gradients(implementation), step.gradients(implementation), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_low_precision_errs_no_more_than_the_definition_of_rounded_numbers(dtype, implementation):
    """The plain path rounds what each product reads to the same type, in both directions."""
    step = Step.draw(ODD[3], GQA, 16)
    for name in ("q", "k", "v", "d_out"):
        setattr(step, name, np.asarray(jnp.asarray(getattr(step, name), dtype), np.float32))
    got, plain, exact = (
        step.gradients(implementation, dtype), plain_gradients(step, dtype), exact_gradients(step)
    )  # fmt: skip
    for g, p, e in zip(got, plain, exact, strict=True):
        assert_as_good_as(g, p, e, jnp.dtype(dtype))


def plain_gradients(step: Step, dtype: str) -> list[np.ndarray]:
    """The definition on `dtype` numbers, without the log-sum-exp's own part being rounded."""
    metadata = prepare_metadata(step.batch, step.spec)

    def attend(q, k, v):
        return attention(q, k, v, metadata, step.spec, return_lse=True, implementation="reference")

    q, k, v, d_out = (jnp.asarray(x, dtype) for x in (step.q, step.k, step.v, step.d_out))
    found = jax.vjp(attend, q, k, v)[1]((d_out, jnp.asarray(step.d_lse)))
    return [np.asarray(x, np.float64) for x in found]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
def test_pages_that_sequences_share_take_the_sum(implementation):
    """As if each sequence had copies of its own, whose gradients are then summed."""
    shared, own = [3, 5], [[1], [7], [2]]
    arguments = {"q_lens": [4, 3, 5], "context_lens": [32, 32, 32], "page_size": 16, "share_prefixes": True}
    rng, bucket = np.random.default_rng(2), Bucket(tokens=16, seqs=4, pages=12)
    k, v = (rng.standard_normal((12, 16, 2, 16)).astype(np.float32) for _ in range(2))
    q, d_out = (rng.standard_normal((16, 4, 16)).astype(np.float32) for _ in range(2))

    def gradients(tables, k, v):
        batch = nest_sequences(np.zeros(12, int), page_tables=tables, bucket=bucket, **arguments)
        found = gradient_program(GQA, implementation)(
            batch, q, k, v, None, d_out, np.zeros((16, 4), np.float32)
        )
        return [np.asarray(x, np.float64) for x in found[:3]]

    copies = [[8, 9], [10, 11], shared]
    for pages in copies[:2]:
        k[pages], v[pages] = k[shared], v[shared]
    dq, dk, dv = gradients([shared + pages for pages in own], k, v)
    dq_apart, *apart = gradients([a + b for a, b in zip(copies, own, strict=True)], k, v)
    np.testing.assert_allclose(dq, dq_apart, atol=1e-6)
    for together, each in zip((dk, dv), apart, strict=True):
        np.testing.assert_allclose(together[shared], sum(each[pages] for pages in copies), atol=1e-5)
        np.testing.assert_allclose(together[np.concatenate(own)], each[np.concatenate(own)], atol=1e-6)


def small_step(implementation: str = "xla", **options: Any):
    """A function of q, k and v, and their values, of a batch without cached keys."""
    spec = dataclasses.replace(GQA, num_q_heads=2, num_kv_heads=1, head_dim=4, **options)
    batch = nest_sequences([[0] * 3, [0] * 4], bucket=Bucket(tokens=8, seqs=2))
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((8, heads, 4)) for heads in (2, 1, 1))

    def attend(q, k, v):
        metadata = prepare_metadata(batch, spec)
        return attention(q, k, v, metadata, spec, implementation=implementation)

    return attend, (q, k, v)


@pytest.mark.smoke
@pytest.mark.thinned(2)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 2, "logits_soft_cap": 1.0}], ids=["plain", "all"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_finite_differences_agree(options, implementation):
    """Forward mode too, through the reference."""
    with jax.enable_x64(True):
        attend, arguments = small_step(implementation, **options)
        modes = ("fwd", "rev") if implementation == "reference" else ("rev",)
        check_grads(jax.jit(attend), arguments, order=1, modes=modes)


def test_the_reference_can_be_differentiated_twice():
    with jax.enable_x64(True):
        attend, arguments = small_step("reference")
        check_grads(jax.jit(attend), arguments, order=2)


def as_float32(arguments):
    return tuple(jnp.asarray(x, jnp.float32) for x in arguments)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_vmap_over_arrays_of_one_batch(implementation):
    attend, (q, k, v) = small_step(implementation)
    q, k, v = as_float32((q, k, v))
    scales = jnp.asarray([1.0, 0.5, -2.0])
    gradient = jax.grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), argnums=(0, 1, 2))
    together = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0)))(
        scales[:, None, None, None] * q[None], k, scales[:, None, None, None] * v[None]
    )
    for i, scale in enumerate(scales):
        alone = jax.jit(gradient)(scale * q, k, scale * v)
        for stacked, single in zip(together, alone, strict=True):
            np.testing.assert_allclose(stacked[i], single, rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
@pytest.mark.thinned(2)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_vmap_over_batches(implementation):
    """Batches of one bucket, stacked: metadata have a leading axis like any other array."""
    bucket = Bucket(tokens=8, seqs=2)
    batches = [
        nest_sequences(lens, bucket=bucket) for lens in ([[0] * 3, [0] * 4], [[0] * 8], [[0], [0] * 6])
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 8, n, 16)), jnp.float32) for n in (4, 2, 2))

    def loss(batch, q, k, v):
        metadata = prepare_metadata(batch, GQA, consumers=(implementation, "triton_gradient"))
        return (attention(q, k, v, metadata, GQA, implementation=implementation) ** 2).sum()

    gradient = jax.grad(loss, argnums=(1, 2, 3))
    together = jax.jit(jax.vmap(gradient))(stacked, q, k, v)
    for i, batch in enumerate(batches):
        for all_of_them, single in zip(together, jax.jit(gradient)(batch, q[i], k[i], v[i]), strict=True):
            np.testing.assert_allclose(all_of_them[i], single, rtol=1e-5, atol=1e-6)


def stack_of_layers(implementation: str, *, remat: Any = None, scan: bool = True):
    """A loss through three layers of attention, its arguments, and the layers' weights first."""
    batch = nest_sequences([[0] * 9, [0] * 4, [0]], bucket=Bucket(tokens=16, seqs=4))
    rng = np.random.default_rng(3)
    weights = jnp.asarray(rng.standard_normal((3, 64, 128)) / 8, jnp.float32)
    x = jnp.asarray(rng.standard_normal((16, 64)), jnp.float32)

    def layer(x, weight, metadata):
        q, k, v = jnp.split((x @ weight).reshape(16, 8, 16), (4, 6), axis=1)
        out = attention(q, k, v, metadata, GQA, implementation=implementation)
        return x + out.reshape(16, 64)

    def loss(weights, x):
        metadata = prepare_metadata(batch, GQA, consumers=(implementation, "triton_gradient"))
        run = layer if remat is None else jax.checkpoint(layer, policy=remat)
        if scan:
            x, _ = jax.lax.scan(lambda x, weight: (run(x, weight, metadata), None), x, weights)
        else:
            for weight in weights:
                x = run(x, weight, metadata)
        return (x[:14] ** 2).sum()

    return loss, (weights, x)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_scan_over_layers_and_checkpoint(implementation, scan):
    """The gradient of the reference, unrolled, whatever is recomputed."""
    loss, arguments = stack_of_layers("reference", scan=False)
    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arguments)
    for remat in (None, jax.checkpoint_policies.nothing_saveable):
        loss, _ = stack_of_layers(implementation, remat=remat, scan=scan)
        got = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arguments)
        for g, e in zip(got, expected, strict=True):
            np.testing.assert_allclose(g, e, rtol=2e-4, atol=2e-4)


@pytest.mark.smoke
def test_a_checkpoint_policy_can_save_the_results_of_attention():
    """Then attention is not computed a second time: its loops stand once in the program."""

    def loops(policy: Any) -> int:
        loss, arguments = stack_of_layers("xla", remat=policy, scan=False)
        return str(jax.make_jaxpr(jax.grad(loss))(*arguments)).count("while[")

    everything = loops(jax.checkpoint_policies.nothing_saveable)
    saved = loops(jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME))
    once = loops(jax.checkpoint_policies.everything_saveable)
    assert saved == once < everything


@pytest.mark.smoke
@pytest.mark.thinned(3)
@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
def test_grad_inside_shard_map(implementation):
    """Heads are divided among devices, each with its own key heads; metadata are replicated."""
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    attend, (q, k, v) = small_step(implementation)
    arguments = as_float32((q, k, v))

    def gradient(q, k, v):
        return jax.grad(lambda *x: (attend(*x) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)

    heads = PartitionSpec(None, "heads")
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(heads,) * 3, out_specs=(heads,) * 3)
    for got, expected in zip(jax.jit(sharded)(*arguments), jax.jit(gradient)(*arguments), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_peak_memory_grows_linearly(implementation):
    """Four times the tokens take about four times the memory, in both directions: no [T, S] array."""

    def peak(tokens: int) -> int:
        batch = nest_sequences([[0] * tokens], bucket=Bucket(tokens=tokens, seqs=1))
        rows = [jax.ShapeDtypeStruct((tokens, n, 16), jnp.float32) for n in (4, 2, 2)]
        program = jax.jit(
            jax.grad(lambda q, k, v: attend(q, k, v, batch).sum(), argnums=(0, 1, 2))
        ).lower(*rows)  # fmt: skip
        analysis = program.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    def attend(q, k, v, batch):
        return attention(q, k, v, prepare_metadata(batch, GQA), GQA, implementation=implementation)

    small, large = peak(2048), peak(8192)
    assert large < 4.5 * small
    assert large < 8192 * 8192 * 4  # one head's scores


def test_keys_in_eight_bits_have_no_gradient():
    step = Step.draw(ODD[3], GQA, 16)
    metadata = prepare_metadata(step.batch, GQA)
    k = jnp.zeros(step.k.shape, jnp.int8)

    def loss(q):
        return attention(q, k, k, metadata, GQA, k_scale=0.1, v_scale=0.1, implementation="xla").sum()

    with pytest.raises(
        NotImplementedError, match=r"k\.dtype=int8 is quantised.*train with keys and values in"
    ):
        jax.grad(loss)(jnp.asarray(step.q))


def test_a_gradient_whose_tiles_were_not_prepared_says_so():
    step = Step.draw(ODD[3], GQA, 16)
    metadata: AttentionMetadata = prepare_metadata(step.batch, GQA, consumers="triton")

    def loss(q):
        return attention(q, step.k, step.v, metadata, GQA, implementation="triton").sum()

    with pytest.raises(MissingFieldError, match=r"key_tiles.*not prepared.*select it"):
        jax.grad(loss)(jnp.asarray(step.q))
    other = prepare_metadata(step.batch, GQA, consumers=("xla",), fields=("kv_start", "kv_end", "key_tiles"))
    with pytest.raises(MissingFieldError, match=r"holds none of 64 keys .*'triton_gradient'"):
        other.visible_keys(GQA.window_class).key_tiles_of(64)
