"""What `import jaxattn` loads, and attention on a CPU: a light door, and backends that load when chosen."""

import subprocess
import sys

import pytest

HEAVY = (
    "jax.experimental.pallas",
    "jax.experimental.mosaic",
    "jax._src.pallas.triton",
    "jax._src.pallas.mosaic_gpu.core",
    "jax._src.pallas.mosaic_gpu.lowering",
    "jaxlib.triton",
    "jaxattn_kernels.triton",
    "jaxattn_kernels.mosaic_gpu",
    "matplotlib",
    "rich",
    "orbax",
    "tensorstore",
    "flax",
    "tokenizers",
    "safetensors",
    "optax",
    "chex",
)
"""Compilers of kernels, plotting, terminals, checkpoints, and what only layers and training take."""

ATTEND = """
import jax.numpy as jnp
from jaxattn import AttentionSpec, Bucket, attention, nest_sequences, prepare_metadata
spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=8)
metadata = prepare_metadata(nest_sequences([[1, 2, 3], [4]], bucket=Bucket(8, 2)), spec)
attention(jnp.ones((8, 2, 8)), *2 * [jnp.ones((8, 1, 8))], metadata, spec, implementation={!r})
"""


@pytest.mark.parametrize(
    "work", ["", ATTEND.format("xla"), ATTEND.format("auto")], ids=["import", "xla", "auto"]
)
def test_loads_nothing_heavy(work):
    code = f"import sys, jaxattn\n{work}\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = found.stdout.split()
    assert "jaxattn.attention.api" in loaded
    assert [name for name in loaded if any(name == h or name.startswith(f"{h}.") for h in HEAVY)] == []
