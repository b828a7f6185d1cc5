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
# # Measuring on your GPU
#
# Which implementation is fastest depends on the device, the layer and the batches. Nothing is timed behind
# your back: you measure, write the result down, and `auto` follows it. This page runs on a CPU too, with
# small batches. Its figures are those of the machine that built it, and say nothing about yours.

# %%
import json
import os
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxattn import AttentionSpec, Bucket, attention, choose_implementation, prepare_metadata
from jaxattn.attention.choice import describe_device
from jaxattn.batch import Trace, powers_of_two, quarter_steps
from jaxattn.measuring.timing import measure
from jaxattn.measuring.tune import default_plan, tune
from jaxattn.measuring.workloads import Workload, nest_workload
from jaxattn.planning import fit_of, plan_buckets

print(describe_device())
print(f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}")

# %% [markdown]
# ## Time one program
#
# `measure` compiles, runs once to warm up, and times each further run: on an NVIDIA GPU by the device's own
# clock, elsewhere by the host's, from call to result. It says which.

# %%
spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64)


def arguments(workload):
    batch = nest_workload(workload)
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (8, 2, 2)
    return batch, *(
        jax.random.normal(key, (batch.bucket.tokens, n, 64)) for key, n in zip(keys, heads, strict=True)
    )


def attend(implementation):
    @jax.jit
    def program(batch, q, k, v):
        metadata = prepare_metadata(batch, spec)
        return attention(q, k, v, metadata, spec, implementation=implementation)

    return program


ragged = arguments(Workload("ragged", q_lens=(300, 100, 24), context_lens=(0,) * 3, source="this page"))
result = measure(attend("xla"), *ragged, repeats=7)
print(f"median {1e3 * result.median_s:.2f} ms by the {result.clock}'s clock")
print("samples", [f"{1e3 * s:.2f}" for s in result.samples_s])

# %% [markdown]
# Look at the samples before you believe a median: where they lie apart, the machine was busy.
#
# ## Compare
#
# Two things are compared in one process, in turns, so that a slow minute hits both. Ragged attention does
# the work of the tokens that there are; the padded rectangle, by `jax.nn`, that of the longest sequence
# times their number.

# %%
lengths = (300, 100, 24)
rectangle = [jnp.ones((len(lengths), max(lengths), n, 64)) for n in (8, 2, 2)]
padded = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
times = {"ragged": [], "padded": []}
for _ in range(5):
    times["ragged"].append(measure(attend("xla"), *ragged, repeats=3).median_s)
    times["padded"].append(measure(padded, *rectangle, repeats=3).median_s)

figure, ax = plt.subplots(figsize=(6, 1.8), layout="constrained")
for y, seconds in enumerate(times.values()):
    ax.barh(y, 1e3 * np.median(seconds), color="#1f74bd", alpha=0.6)
    ax.plot(1e3 * np.array(seconds), [y] * len(seconds), "|", color="#c8501a", markersize=14)
ax.set(yticks=range(len(times)), yticklabels=times, xlabel="ms: median of five rounds, and each round")
plt.show()

# %% [markdown]
# A GPU changes all of this. There, `implementation="triton"` compiles to the kernel that is interpreted
# here, `bfloat16` takes the tensor cores, and batches have to be large enough to fill the device.
#
# ## What `auto` chooses, and why
#
# It follows the first measured fact that matches device, dtype, head size, page size and phase; else one
# rule.

# %%
for phase in ("prefill", "decode"):
    choice = choose_implementation(spec, page_size=16, phase=phase)
    print(f"{phase}: {choice.implementation}\n  {choice.reason}\n")

# %% [markdown]
# For a GPU there is no fact yet, until you measure one:

# %%
print(choose_implementation(spec, dtype="bfloat16", page_size=16, platform="gpu").reason)

# %% [markdown]
# ## Tune
#
# `tune` measures the implementations that can serve each layer, leaves out what fails or disagrees with the
# others, and gives a table. Here it is a quick plan of one head size, over batches so small that who wins
# them says nothing of larger ones; `jaxattn tune` on the command line has the whole plan.

# %%
plan = replace(default_plan(describe_device(), quick=True), head_dims=(64,), page_sizes=(16,))
tuned = tune(plan)
for row in tuned.document["runs"][0]["rows"]:
    for workload, medians in row["medians_ms"].items():
        shown = ", ".join(f"{name} {ms:.2f} ms" for name, ms in medians.items())
        print(f"{row['phase']:8} {workload:10} {shown}  ->  {row['implementation']}")

# %% [markdown]
# Kept in a file, it stands before the facts that come with the library, where it is given as an argument
# (`implementation=read_table(...)`), or to the command line by the environment variable `JAXATTN_CHOICES`:

# %%
table = Path(tempfile.mkdtemp()) / "my-choices.json"
table.write_text(json.dumps(tuned.document))
print(choose_implementation(spec, page_size=16, phase="decode", table=table).reason)

# %% [markdown]
# ## Buckets
#
# Every bucket is a program to compile, and padding is work done for nothing. How do grids compare on
# lengths like yours? Here are those of 2,000 batches, whose sizes spread over two orders of magnitude.

# %%
tokens = np.exp(np.random.default_rng(0).uniform(np.log(64), np.log(8192), 2000)).astype(int)
for name, steps in (("powers of two", powers_of_two(64, 8192)), ("quarter steps", quarter_steps(64, 8192))):
    padded = np.array(steps)[np.searchsorted(steps, tokens)]
    print(f"{name}: {len(steps)} programs, {1 - tokens.sum() / padded.sum():.1%} of all tokens are padding")

# %% [markdown]
# Buckets that were fitted to the batches themselves do with fewer programs. Here they are fitted to the
# first half and judged on the second. In earnest, `nest_sequences(..., log=...)` writes the trace while you
# run, and `jaxattn buckets` draws what each further program saves.

# %%
first, second = (Trace.of((n, 1, 0, n) for n in half.tolist()) for half in np.split(tokens, 2))
for programs in (4, 8, 16):
    plan = plan_buckets(first, programs, limits=Bucket(8192, 1))
    fit = fit_of(plan, second)
    print(f"fitted: {fit.compiles} programs, {fit.padding:.1%} of all tokens are padding")
