"""What `auto` stands for is chosen for the platform that a program is lowered for, not where it is traced."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxattn import AttentionSpec, Bucket, attention, nest_sequences, prepare_metadata
from jaxattn.attention import choice as choice_module
from jaxattn.attention.choice_table import Device
from jaxattn.attention.dispatch import names_by_platform
from jaxattn.attention.per_platform import PerPlatform
from jaxattn.metadata import MissingFieldError

SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, sinks=True)
METADATA = prepare_metadata(nest_sequences([[1, 2, 3], [4] * 20], bucket=Bucket(32, 4)), SPEC)
Q, K, V = (jax.random.normal(jax.random.key(i), (32, heads, 16)) for i, heads in enumerate((4, 2, 2)))
SINKS = jnp.linspace(-1, 1, 4)
TRITON_CALL = "__gpu$xla.gpu.triton"
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")


def attend(q, k, v, sinks, *, implementation: Any = "auto", metadata=METADATA):
    return attention(q, k, v, metadata, SPEC, sinks=sinks, implementation=implementation)


def gradients(q, k, v, sinks, *, implementation: Any = "auto"):
    def loss(*args):
        return (attend(*args, implementation=implementation) ** 2).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, sinks)


def over_a_batch(q, k, v, sinks, *, implementation: Any = "auto"):
    run = functools.partial(gradients, implementation=implementation)
    return jax.vmap(run, in_axes=(0, 1, None, None))(
        jnp.stack([q, 2 * q]), jnp.stack([k, k + 1], axis=1), v, sinks
    )


def rematerialised(q, k, v, sinks, *, implementation: Any = "auto"):
    run = jax.checkpoint(functools.partial(attend, implementation=implementation))
    return jax.grad(lambda *args: (run(*args) ** 2).sum(), argnums=(0, 1))(q, k, v, sinks)


@pytest.mark.parametrize("function", [attend, gradients, over_a_batch, rematerialised])
def test_on_a_cpu_it_is_xla_bit_for_bit(function):
    expected = jax.jit(functools.partial(function, implementation="xla"))(Q, K, V, SINKS)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(function)(Q, K, V, SINKS), expected)


@pytest.mark.parametrize("context", [jax.disable_jit, lambda: jax.default_device(jax.devices("cpu")[0])])
def test_outside_of_a_program(context):
    expected = attend(Q, K, V, SINKS, implementation="xla")
    with context():
        np.testing.assert_array_equal(attend(Q, K, V, SINKS), expected)


@pytest.fixture
def beside_a_gpu(monkeypatch):
    """Pretends that the process has a GPU, and that it is the default device; arrays stay where they are."""
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    first = choice_module.first_device
    monkeypatch.setattr(choice_module, "default_device", lambda: gpu)
    monkeypatch.setattr(
        choice_module, "first_device", lambda name: gpu if name in ("gpu", "cuda") else first(name)
    )


def test_arrays_on_the_cpu_of_a_machine_with_a_gpu(beside_a_gpu):
    assert choice_module.describe_device() == Device("gpu", "NVIDIA H200", "9.0")
    names = names_by_platform("auto", Q, K, METADATA, SPEC)
    assert names == {"cpu": "xla", "cuda": "triton", "rocm": "xla", "tpu": "xla"}
    expected = jax.jit(functools.partial(attend, implementation="xla")).lower(Q, K, V, SINKS).compile()
    compiled = jax.jit(attend).lower(Q, K, V, SINKS).compile()
    np.testing.assert_array_equal(compiled(Q, K, V, SINKS), expected(Q, K, V, SINKS))


def test_where_all_agree_there_is_nothing_to_choose():
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=272)
    q, k = jnp.zeros((32, 4, 272)), jnp.zeros((32, 2, 272))
    metadata = prepare_metadata(nest_sequences([[1, 2, 3]], bucket=Bucket(32, 4)), spec)
    assert set(names_by_platform("auto", q, k, metadata, spec).values()) == {"xla"}
    assert "per_platform" not in str(jax.make_jaxpr(lambda q, k: attention(q, k, k, metadata, spec))(q, k))


@pytest.mark.parametrize(("function", "kernels"), [(attend, 2), (gradients, 5)])
@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("cpu", "cuda")], ids="-".join)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Pallas Triton backend is deprecated:DeprecationWarning")
def test_a_cpu_exports_for_cuda(function, kernels, platforms):
    exporting = export.export(
        jax.jit(function),
        platforms=platforms,
        disabled_checks=[export.DisabledSafetyCheck.custom_call(TRITON_CALL)],
    )
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        module = exporting(Q, K, V, SINKS).mlir_module()
    assert module.count(f"custom_call @{TRITON_CALL}") == (kernels if "cuda" in platforms else 0)
    assert ("stablehlo.while" in module) == ("cpu" in platforms)


def test_metadata_hold_what_the_platform_reads():
    batch = nest_sequences([[1, 2, 3], [4] * 20], bucket=Bucket(32, 4))
    for_xla = prepare_metadata(batch, SPEC, consumers="xla")
    np.testing.assert_array_equal(
        attend(Q, K, V, SINKS, metadata=for_xla), attend(Q, K, V, SINKS, implementation="xla")
    )
    for_triton = prepare_metadata(batch, SPEC, consumers="triton")
    with pytest.raises(MissingFieldError, match=r"'schedules' holds no .* only \["):
        attend(Q, K, V, SINKS, metadata=for_triton)


def test_other_functions_are_traced_only_where_they_are_lowered():
    traced = []

    def body(name, x):
        traced.append(name)
        return x + 1

    function = PerPlatform(functools.partial(body, "default"), (("cuda", functools.partial(body, "cuda")),))
    run = jax.jit(lambda x: function(function(x)))
    assert float(run(jnp.float32(1))) == 3
    assert set(traced) == {"default"}
    export.export(run, platforms=["cuda"])(jnp.float32(1))
    assert "cuda" in traced
