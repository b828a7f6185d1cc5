"""The Flax modules against Flax's own attention and against NumPy in float64, one document at a time."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from oracle import attend_dense_with_lse
from tolerances import assert_as_good_as

import jaxattn.nn.linen
import jaxattn.nn.nnx
from jaxattn import (
    AttentionMetadata,
    AttentionSpec,
    Bucket,
    RopeConfig,
    init_cache,
    nest_sequences,
    prepare_metadata,
)
from jaxattn.metadata import MissingFieldError

D = 24
LENGTHS = (9, 1, 17, 5)
BUCKET = Bucket(tokens=40, seqs=8)
ENDS = np.cumsum(LENGTHS)
FLAVOURS = ("linen", "nnx")
IMPLEMENTATIONS = ("reference", "xla")

MHA = AttentionSpec(num_q_heads=4, num_kv_heads=4, head_dim=8)
GQA = AttentionSpec(
    num_q_heads=6, num_kv_heads=2, head_dim=8, sliding_window=7, logits_soft_cap=5.0, sinks=True,
    rope=RopeConfig(theta=500.0),
)  # fmt: skip
ALL_OPTIONS = {"use_qkv_bias": True, "use_out_bias": True, "normalize_qk": True}


@functools.cache  # call it outside of a trace
def make_metadata(spec: AttentionSpec) -> AttentionMetadata:
    tokens = np.zeros(sum(LENGTHS), int)
    return prepare_metadata(nest_sequences(tokens, q_lens=LENGTHS, bucket=BUCKET), spec)


def features(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((BUCKET.tokens, D)).astype(np.float32)


def documents_of(x: Any) -> list[Any]:
    """The rows of each document, without the padding."""
    return [x[end - length : end] for end, length in zip(ENDS, LENGTHS, strict=True)]


def make_params(spec: AttentionSpec, **options: Any) -> dict[str, Any]:
    """Parameters of the Linen module, biases, norms and sinks random too."""
    module = jaxattn.nn.linen.Attention(spec, implementation="reference", **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(features()), make_metadata(spec))[
        "params"
    ]
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.3, leaf.dtype),
        nn.meta.unbox(shapes),
    )


def make_nnx(spec: AttentionSpec, params: dict[str, Any], **options: Any) -> jaxattn.nn.nnx.Attention:
    module = jaxattn.nn.nnx.Attention(D, spec, rngs=nnx.Rngs(0), **options)
    state = nnx.state(module)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(state)) == jax.tree.map(jnp.shape, params)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(module, state)
    return module


def apply(
    flavour: str, params: Any, spec: AttentionSpec, x: Any, metadata: Any, cache: Any = None, **options: Any
) -> Any:
    """The layer with these parameters."""
    options = {"implementation": "reference", **options}
    args, given = (jnp.asarray(x), metadata), {} if cache is None else {"cache": cache}
    if flavour == "linen":
        return jaxattn.nn.linen.Attention(spec, **options).apply({"params": params}, *args, **given)
    return make_nnx(spec, params, **options)(*args, **given)


def dense(params: Any, spec: AttentionSpec, x: np.ndarray, dtype: type) -> np.ndarray:
    """The layer for one document, in NumPy."""
    x = x.astype(dtype)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)

    def project(name: str) -> np.ndarray:
        heads = np.einsum("td,dnh->tnh", x, params[name]["kernel"]) + params[name].get("bias", dtype(0))
        if f"{name}_norm" in params:
            rms = np.sqrt((heads**2).mean(-1, keepdims=True) + dtype(1e-6))
            heads = heads / rms * params[f"{name}_norm"]["scale"]
        return rope(heads) if name in ("query", "key") and spec.rope is not None else heads

    def rope(heads: np.ndarray) -> np.ndarray:
        assert spec.rope is not None
        half = spec.head_dim // 2
        angles = np.arange(len(x))[:, None, None] * dtype(spec.rope.theta) ** -(np.arange(half) / dtype(half))
        a, b = heads[..., :half], heads[..., half:]
        cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    q, k, v = map(project, ("query", "key", "value"))
    out, _ = attend_dense_with_lse(q, k, v, spec, params.get("sinks"), dtype)
    return np.einsum("tnh,nhd->td", out, params["out"]["kernel"]) + params["out"].get("bias", dtype(0))


def assert_dense(got: Any, params: Any, spec: AttentionSpec, x: np.ndarray) -> None:
    """The real rows are those of each document alone."""
    plain, exact = (
        np.concatenate([dense(params, spec, document, dtype) for document in documents_of(x)])
        for dtype in (np.float32, np.float64)
    )
    assert_as_good_as(got[: ENDS[-1]], plain, exact, jnp.dtype("float32"))


@pytest.mark.smoke
@pytest.mark.thinned(2)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("implementation", "has_biases"), [("reference", False), ("xla", True)])
def test_is_flax_own_attention_of_each_document(flavour, implementation, has_biases):
    """With the same parameters: outputs, and gradients of parameters and features."""
    options = {"use_qkv_bias": has_biases, "use_out_bias": has_biases}
    params, x, metadata = make_params(MHA, **options), features(), make_metadata(MHA)
    weights = features(seed=2)
    flax_attention = nn.MultiHeadAttention(
        num_heads=4, qkv_features=32, out_features=D, use_bias=has_biases, precision="highest"
    )

    def flax_loss(params, x):
        losses = [
            (flax_attention.apply({"params": params}, d, mask=nn.make_causal_mask(d[:, 0])) * w).sum()
            for d, w in zip(documents_of(x), documents_of(weights), strict=True)
        ]
        return sum(losses[1:], losses[0])

    def loss(params, x):
        y = apply(
            flavour, params, MHA, x, metadata, precision="highest", implementation=implementation, **options
        )
        return (y * weights)[: ENDS[-1]].sum()

    expected = jax.jit(jax.value_and_grad(flax_loss, argnums=(0, 1)))(params, x)
    got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "options"])
def test_is_a_dense_layer_of_each_document(flavour, implementation, options):
    params, x = make_params(GQA, **options), features()
    layer = functools.partial(apply, flavour, implementation=implementation, **options)
    y = jax.jit(layer, static_argnums=1)(params, GQA, x, make_metadata(GQA))
    assert_dense(y, params, GQA, x)


def test_nnx_and_linen_give_the_same_numbers():
    params, x, metadata = make_params(GQA, **ALL_OPTIONS), features(), make_metadata(GQA)
    outputs = [apply(flavour, params, GQA, x, metadata, **ALL_OPTIONS) for flavour in FLAVOURS]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.smoke
@pytest.mark.parametrize("flavour", FLAVOURS)
@jax.numpy_dtype_promotion("standard")  # Flax's RMS norm promotes 16-bit numbers
def test_initial_parameters(flavour):
    """Kernels as Flax initialises them, biases and sinks 0, norms 1; in the dtype that was asked for."""
    options = {**ALL_OPTIONS, "param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
    x, metadata = jnp.asarray(features()), make_metadata(GQA)
    y: Any
    if flavour == "linen":
        module = jaxattn.nn.linen.Attention(GQA, implementation="reference", **options)
        params = module.init(jax.random.key(0), x, metadata)["params"]
        y = module.apply({"params": params}, x, metadata)
    else:
        module = jaxattn.nn.nnx.Attention(D, GQA, implementation="reference", rngs=nnx.Rngs(0), **options)
        params = nnx.to_pure_dict(nnx.state(module))
        y = module(x, metadata)
    assert jnp.shape(y) == x.shape
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    for path, leaf in jax.tree.leaves_with_path(params):
        values = np.asarray(leaf, np.float32)
        match path[-1].key:
            case "kernel":
                fan_in = D if leaf.shape[0] == D else values[..., 0].size
                assert values.std() == pytest.approx(fan_in**-0.5, rel=0.2)
            case "scale":
                np.testing.assert_array_equal(values, 1)
            case _:
                np.testing.assert_array_equal(values, 0)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_paged_steps_give_what_the_packed_call_gives(flavour, implementation):
    """A prefill of parts of the documents, a chunk, then decode steps: each row as in one packed call."""
    params, x = make_params(GQA, **ALL_OPTIONS), features()
    rows, page_size = documents_of(x), 4
    tables = [[7, 2, 9], [0], [3, 11, 5, 1, 8], [4, 6]]
    cache = init_cache(num_pages=12, page_size=page_size, num_kv_heads=2, head_dim=8, dtype="float32")
    lens = np.array(LENGTHS)
    cuts = [np.minimum(lens, n) for n in (0, 3, 8, *range(9, 18))]
    outputs: list[list[np.ndarray]] = [[] for _ in LENGTHS]

    @jax.jit
    def step(x, batch, cache):
        metadata = prepare_metadata(batch, GQA)
        return apply(
            flavour, params, GQA, x, metadata, cache=cache, implementation=implementation, **ALL_OPTIONS
        )

    for starts, ends in itertools.pairwise(cuts):
        live = np.flatnonzero(ends > starts)
        batch = nest_sequences(
            np.zeros((ends - starts).sum(), int),
            q_lens=(ends - starts)[live],
            context_lens=starts[live],
            page_tables=[tables[i] for i in live],
            page_size=page_size,
            bucket=Bucket(tokens=24, seqs=4, pages=12),
        )
        packed = np.full((24, D), np.nan, np.float32)
        parts = [rows[i][starts[i] : ends[i]] for i in live]
        packed[: (ends - starts).sum()] = np.concatenate(parts)
        y, cache = step(packed, batch, cache)
        for i, part in zip(live, np.split(y, np.cumsum((ends - starts)[live])), strict=False):
            outputs[i].append(np.asarray(part))
    assert_dense(np.concatenate([np.concatenate(output) for output in outputs]), params, GQA, x)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("implementation", "poison"), [("reference", 1e6), ("xla", 1e6), ("xla", np.nan), ("xla", np.inf)]
)
def test_other_documents_change_no_bit(flavour, implementation, poison):
    params, x, metadata = make_params(GQA, **ALL_OPTIONS), features(), make_metadata(GQA)

    @jax.jit
    def forward(x):
        return apply(flavour, params, GQA, x, metadata, implementation=implementation, **ALL_OPTIONS)

    clean = documents_of(forward(x))
    for i in range(len(LENGTHS)):
        poisoned = np.full_like(x, poison)
        documents_of(poisoned)[i][:] = documents_of(x)[i]
        np.testing.assert_array_equal(documents_of(forward(poisoned))[i], clean[i])


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_crosses_documents(flavour, implementation):
    """d loss of document i / d features of document j is exactly 0, and of padding too."""
    params, x, metadata = make_params(GQA, **ALL_OPTIONS), features(), make_metadata(GQA)

    def loss(x, of_document):
        y = apply(flavour, params, GQA, x, metadata, implementation=implementation, **ALL_OPTIONS)
        return (y**2).sum(where=of_document[:, None])

    gradient = jax.jit(jax.grad(loss))
    for end, length in zip(ENDS, LENGTHS, strict=True):
        own = (np.arange(BUCKET.tokens) >= end - length) & (np.arange(BUCKET.tokens) < end)
        dx = np.asarray(gradient(x, own))
        np.testing.assert_array_equal(dx[~own], 0)
        assert (np.abs(dx[own]).max(axis=1) > 0).all()


LAYERS = 3


@functools.cache
def make_stack(implementation: str) -> tuple[list[dict[str, Any]], Any, Any]:
    """Parameters of some layers, a loss of all of them one after the other, and its gradient."""
    x = features()
    params = [jax.tree.map(lambda leaf, i=i: leaf * (1 + 0.1 * i), make_params(GQA)) for i in range(LAYERS)]

    metadata = make_metadata(GQA)

    def loss(params):
        y = x
        for layer in params:
            y = y + apply("linen", layer, GQA, y, metadata, implementation=implementation)
        return (y[: ENDS[-1]] ** 2).mean()

    return params, *jax.jit(jax.value_and_grad(loss))(params)


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def assert_close(got: Any, expected: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, expected)


class LinenBlock(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, x, metadata):
        attention = jaxattn.nn.linen.Attention(GQA, implementation=self.implementation, name="attention")
        return x + attention(x, metadata)


SCANS = [("reference", False), ("xla", True)]


@pytest.mark.smoke
@pytest.mark.parametrize(("implementation", "rematerialised"), SCANS)
def test_linen_scan_over_layers(implementation, rematerialised):
    """Metadata closed over; with `nn.remat` too."""
    x, metadata = features(), make_metadata(GQA)
    params, value, gradients = make_stack(implementation)
    block = nn.remat(LinenBlock, prevent_cse=False) if rematerialised else LinenBlock

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x, metadata):
            scan = nn.scan(
                lambda layer, y, _: (layer(y, metadata), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            return scan(block(implementation, name="layers"), x, None)[0]

    @jax.jit
    def loss(params):
        variables = {"params": {"layers": {"attention": params}}}
        y: Any = Stack().apply(variables, jnp.asarray(x), metadata)
        return (y[: ENDS[-1]] ** 2).mean()

    assert_close(jax.value_and_grad(loss)(stacked(params)), (value, stacked(gradients)))


@pytest.mark.smoke
@pytest.mark.parametrize(("implementation", "rematerialised"), SCANS)
def test_nnx_scan_over_layers(implementation, rematerialised):
    """Under `nnx.jit`, metadata closed over; with `nnx.remat` too."""
    x, metadata = features(), make_metadata(GQA)
    params, value, gradients = make_stack(implementation)

    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=0)
    def create(rngs):
        return jaxattn.nn.nnx.Attention(D, GQA, implementation=implementation, rngs=rngs)

    layers = create(nnx.Rngs(0))
    state = nnx.state(layers)
    nnx.replace_by_pure_dict(state, stacked(params))
    nnx.update(layers, state)

    @nnx.jit
    def value_and_grad(layers, x):
        def loss(layers):
            def block(y, layer):
                return y + layer(y, metadata)

            block = nnx.remat(block) if rematerialised else block
            y = nnx.scan(block, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)
            return (y[: ENDS[-1]] ** 2).mean()

        return nnx.value_and_grad(loss)(layers)

    got_value, got = value_and_grad(layers, jnp.asarray(x))
    assert_close((got_value, nnx.to_pure_dict(got)), (value, stacked(gradients)))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("flavour", "implementation"), [("linen", "reference"), ("nnx", "xla")])
def test_checkpointed_layers_have_the_same_gradients(flavour, implementation):
    x = features()
    params, value, gradients = make_stack(implementation)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def block(layer, y, metadata):
        return y + apply(flavour, layer, GQA, y, metadata, implementation=implementation)

    metadata = make_metadata(GQA)

    def loss(params):
        y = x
        for layer in params:
            y = block(layer, y, metadata)
        return (y[: ENDS[-1]] ** 2).mean()

    assert_close(jax.jit(jax.value_and_grad(loss))(params), (value, gradients))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_does_not_go_together_is_refused(flavour):
    params, x = make_params(GQA), features()
    cache = init_cache(num_pages=4, page_size=4, num_kv_heads=2, head_dim=8, dtype="float32")
    with pytest.raises(ValueError, match="cache was given, and the batch was nested without page tables"):
        apply(flavour, params, GQA, x, make_metadata(GQA), cache=cache)
    paged = nest_sequences([[1]], page_tables=[[0]], page_size=4, bucket=Bucket(40, 8, 4))
    with pytest.raises(ValueError, match="cache was not given, and the batch was nested with page tables"):
        apply(flavour, params, GQA, x, prepare_metadata(paged, GQA))
    with pytest.raises(MissingFieldError, match="rope"):
        apply(flavour, params, GQA, x, make_metadata(MHA))


def test_importing_jaxattn_does_not_import_flax():
    code = "import sys, jaxattn; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
