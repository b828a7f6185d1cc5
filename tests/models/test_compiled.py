"""What a model has compiled: free of the mesh and the device that a caller has set for something else."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

PREPARE = """
import jax
import numpy as np
from jax.sharding import AxisType
from jaxattn import DecoderConfig, Model, compute_logits, generate, serve
from jaxattn.models import abstract_params, init_params

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_q_heads=4,
    num_kv_heads=4,
    head_dim=4,
)
PROMPTS = [[1, 5, 9], [7]]

def run(model):
    return [
        generate(model, PROMPTS, 3, cache_dtype="int8", implementation="xla"),
        serve(model, PROMPTS, 3, num_pages=4, implementation="xla"),
        *(logits.argmax(-1).tolist() for logits in compute_logits(model, PROMPTS, implementation="xla")),
    ]

params = init_params(jax.random.key(0), CONFIG)
expected = run(Model.from_params(CONFIG, params))
assert jax.device_count() == 4
"""


def in_a_process(script: str) -> None:
    """Run a script on four devices of the CPU."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_mesh_of_the_caller_is_not_inherited():
    """A model alone on one device, or placed on the mesh, runs under `jax.set_mesh`, and afterwards."""
    in_a_process("""
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
            shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(CONFIG, "float32", mesh))
            for given in (params, jax.device_put(params, shardings)):
                model = Model.from_params(CONFIG, given)
                with jax.set_mesh(mesh):
                    assert run(model) == expected, (kind, "inside")
                    assert jax.sharding.get_mesh() == mesh
                num_programs = len(model.compiled.programs)
                assert run(model) == expected, (kind, "outside")
                assert len(model.compiled.programs) == num_programs
    """)


def test_a_default_device_of_the_caller_is_not_inherited():
    in_a_process("""
        model = Model.from_params(CONFIG, params)
        with jax.default_device(jax.devices()[2]):
            assert run(model) == expected
        assert run(model) == expected
        cache = model.empty_cache(num_pages=2, page_size=4)
        assert jax.tree.leaves(cache)[0].devices() == {jax.devices()[0]}
    """)


def test_programs_are_kept_by_the_precision_of_products():
    in_a_process("""
        model = Model.from_params(CONFIG, params)
        compute_logits(model, PROMPTS)
        with jax.default_matmul_precision("highest"):
            compute_logits(model, PROMPTS)
        compute_logits(model, PROMPTS)
        assert model.compiled.names == ("score", "score")
    """)
