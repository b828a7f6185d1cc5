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
# # From lists to metadata
#
# A batch of sequences of different lengths is *nested* once, on the host. All that attention needs to know
# about it is *derived* once, on the device. Every layer and every implementation then reads the same
# object.
#
# This page walks that way with three short sequences. It needs no GPU.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import (
    AttentionSpec,
    BucketGrid,
    PagePool,
    advance,
    attention,
    init_cache,
    nest_sequences,
    prepare_metadata,
    write_cache,
)
from jaxattn.viz import plot_mask, plot_pages

# %% [markdown]
# ## What padding costs
#
# Here are three prompts, as token ids. In a rectangle each takes as much room as the longest.

# %%
prompts = [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22], [31, 32, 33], [41, 42, 43, 44, 45, 46]]
lengths = [len(prompt) for prompt in prompts]
print(f"{sum(lengths)} tokens; padded to the longest, {len(prompts) * max(lengths)}")

# %% [markdown]
# ## Nest
#
# `nest_sequences` lays them one after the other. It checks all values here, and nowhere later.

# %%
batch = nest_sequences(prompts)
batch

# %% [markdown]
# A batch has the sizes of its *bucket*: programs are compiled once per bucket, not once per batch. What is
# left over is padding, at the end. From 16 tokens on, the default grid of buckets keeps it below
# a fifth of the token axis.

# %%
BucketGrid()

# %% [markdown]
# The batch is one buffer of integers, so one transfer brings it to the device. Its fields are slices of it:
# `cu_q_lens`, for instance, says where each sequence begins. Rows past the last sequence repeat the end.

# %%
print("packed   ", batch.packed.shape)
print("token_ids", batch.token_ids)
print("cu_q_lens", batch.cu_q_lens[:5], "…")

# %% [markdown]
# ## Derive
#
# A *spec* says what a layer computes. `prepare_metadata` derives what the layers of these specs need: here,
# one layer that sees everything before a token, and one that sees a window of four keys.

# %%
spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=32)
local = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=32, sliding_window=4)
metadata = prepare_metadata(batch, [spec, local])
metadata

# %% [markdown]
# Open "fields" above: each has a shape, a meaning, and one definition in the code. You read them by name.

# %%
print("token_to_seq  ", metadata.token_to_seq)
print("positions     ", metadata.positions)
print("logits_indices", metadata.logits_indices[: len(prompts)])

# %% [markdown]
# Who sees whom follows from them. Queries run downwards, keys to the right, and the sequences lie along the
# diagonal: no token sees another sequence. The grey frames are tiles, in which the work is done.

# %%
plot_mask(metadata)

# %% [markdown]
# ## Attend
#
# Queries, keys and values are packed as the tokens are: `[T, heads, head_dim]`.

# %%
keys = jax.random.split(jax.random.key(0), 3)
T = batch.bucket.tokens
q, k, v = (jax.random.normal(key, (T, heads, 32)) for key, heads in zip(keys, (4, 2, 2), strict=True))
out = attention(q, k, v, metadata, spec)
out.shape

# %% [markdown]
# The same, one sequence at a time, with JAX's own attention:

# %%
start = 0
for i, n in enumerate(lengths):
    rows = slice(start, start + n)
    alone = jax.nn.dot_product_attention(q[rows], k[rows], v[rows], is_causal=True)
    print(f"sequence {i}: largest difference {jnp.abs(out[rows] - alone).max():.1e}")
    start += n
print("padding rows are zero:", bool((out[start:] == 0).all()))

# %% [markdown]
# ## Pages
#
# For generation, keys and values of earlier tokens are kept in a cache of *pages*. A pool hands pages out;
# a sequence may lie anywhere in the cache. Here each prompt gets room for four tokens more.

# %%
pool = PagePool(num_pages=16, page_size=4)
others = pool.allocate(8)
tables = [pool.allocate(lengths[0] + 4)]
pool.free(others)  # somebody has finished: the prompts that come next take those pages
tables += [pool.allocate(n + 4) for n in lengths[1:]]
paged = nest_sequences(prompts, page_tables=tables, page_size=4, num_pages=16)
plot_pages(paged, num_pages=16)

# %%
pool

# %% [markdown]
# `slot_mapping` says where each token's key and value go; then attention reads them from there. The result
# is the same.

# %%
paged_metadata = prepare_metadata(paged, spec)
cache = init_cache(num_pages=16, page_size=4, num_kv_heads=2, head_dim=32, dtype="float32")
cache = write_cache(cache, k, v, paged_metadata.slot_mapping)
from_pages = attention(q, cache.k_pages, cache.v_pages, paged_metadata, spec)
print(f"largest difference to packed keys: {jnp.abs(from_pages - out).max():.1e}")

# %% [markdown]
# ## The next step
#
# `advance` makes the next batch on the device, from the new tokens: one per sequence. Nothing goes back to
# the host, so a whole decoding loop is one compiled program.

# %%
new_tokens = jnp.full(paged.bucket.seqs, 99, jnp.int32)
step = advance(paged, new_tokens)
step

# %% [markdown]
# Every sequence has one query token now, and one key more than before.

# %%
np.stack([paged.kv_lens[:3], step.kv_lens[:3]])

# %% [markdown]
# ## What cannot be right is refused
#
# Messages name the argument, its value, and what to do.

# %%
try:
    nest_sequences([[1, 2], [3]], page_tables=[[0], [0]], page_size=4)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Next
#
# [One metadata, many backends](02_one_metadata_many_backends) runs the same batch on every implementation,
# and [reading a schedule](03_reading_a_schedule) shows where the work goes.
