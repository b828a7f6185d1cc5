# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One metadata, many backends
#
# The metadata belong to no implementation. They are derived once; whoever attends reads its part, and what
# nobody reads is never computed.

# %%
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import (
    AttentionSpec,
    attention,
    choose_implementation,
    init_cache,
    interop,
    prepare_metadata,
    write_cache,
)
from jaxattn.measuring.workloads import Workload, nest_workload, random_page_tables
from jaxattn.metadata import CONSUMERS, MissingFieldError

# %% [markdown]
# ## One batch of everything
#
# Two sequences decode, one prefills, and one goes on with a prompt that is partly cached. Their pages are
# scattered over the cache.

# %%
mixed = Workload("mixed", q_lens=(1, 1, 40, 12), context_lens=(90, 13, 0, 37), source="this page")
tables, num_pages = random_page_tables(mixed, page_size=16, rng=np.random.default_rng(0))
batch = nest_workload(mixed, page_tables=tables, page_size=16)
batch

# %% [markdown]
# The metadata are prepared once, for a layer with a window here.

# %%
spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=32, sliding_window=64)
metadata = prepare_metadata(batch, spec)

# %% [markdown]
# Queries of this step, and a cache that holds the keys and values of all tokens so far:

# %%
keys = jax.random.split(jax.random.key(0), 3)
cache = init_cache(num_pages=num_pages, page_size=16, num_kv_heads=2, head_dim=32, dtype="float32")
everything = jnp.arange(num_pages * 16, dtype=jnp.int32)
k, v = (jax.random.normal(key, (num_pages * 16, 2, 32)) for key in keys[:2])
cache = write_cache(cache, k, v, everything)
q = jax.random.normal(keys[2], (batch.bucket.tokens, 4, 32))

# %% [markdown]
# ## Three implementations, one answer
#
# `reference` is the plain definition. `xla` walks over the tiles. `triton` is the kernel for NVIDIA GPUs;
# where there is none, Pallas interprets it, which is slow and right. Pallas calls its Triton backend
# deprecated: that is known, and silenced by name.

# %%
warnings.filterwarnings(
    "ignore", message=".*Pallas Triton backend is deprecated", category=DeprecationWarning
)
outputs = {
    name: attention(q, cache.k_pages, cache.v_pages, metadata, spec, implementation=name)
    for name in ("reference", "xla", "triton")
}
for name, out in outputs.items():
    print(f"{name:9}  largest difference to reference {jnp.abs(out - outputs['reference']).max():.1e}")

# %% [markdown]
# ## Who reads what
#
# That is data: a `Consumer` names the fields that it reads, and how it wants the query axis cut.

# %%
for consumer in CONSUMERS.values():
    print(f"{consumer.name:16} {', '.join(sorted(consumer.reads_of(is_paged=True)))}")

# %% [markdown]
# Asked for one consumer, `prepare_metadata` prepares what it reads. Anything else is missing by name,
# instead of wrong:

# %%
for_xla = prepare_metadata(batch, spec, consumers="xla")
for_xla

# %%
try:
    for_xla.slot_mapping
except MissingFieldError as error:
    print(error)

# %% [markdown]
# ## A superset costs nothing inside a program
#
# Inside your own `jit` nothing has to be selected: the compiler removes what is not read. Both programs
# below return the same two fields. One selects them; the other prepares all of them, with all schedules.


# %%
@jax.jit
def selected(batch):
    metadata = prepare_metadata(batch, spec, fields=("positions", "slot_mapping"))
    return metadata.positions, metadata.slot_mapping


@jax.jit
def from_all(batch):
    metadata = prepare_metadata(batch, spec)
    return metadata.positions, metadata.slot_mapping


for program in (selected, from_all):
    compiled = program.lower(batch).compile()
    print(program.__name__, compiled.as_text().count(" = "), "instructions")

# %% [markdown]
# How many instructions do all fields take, if all are returned?

# %%
everything = jax.jit(lambda batch: prepare_metadata(batch, spec)).lower(batch).compile()
print(everything.as_text().count(" = "), "instructions")

# %% [markdown]
# ## Other systems' conventions
#
# `jaxattn.interop` hands the same batch to libraries outside: each with its own names, padding and order.

# %%
vllm = interop.to_vllm(metadata, max_pages_per_seq=8)
print("query_start_loc", vllm.query_start_loc[:6], "…")
print("seq_lens       ", vllm.seq_lens[:6], "…")
print("slot_mapping   ", vllm.slot_mapping[:6], "…")
print("block_table")
print(vllm.block_table[:4])

# %% [markdown]
# ## Which one is chosen
#
# `implementation="auto"`, the default, follows measurements that are written down, and one rule where there
# are none. It says which, and why.

# %%
choice = choose_implementation(spec, page_size=16, phase="prefill")
print(choice.implementation)
print(choice.reason)
