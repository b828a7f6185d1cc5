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
# # Reading a schedule
#
# A schedule says which program attends with which query tokens to which keys. It is part of the metadata:
# plain arrays, made on the device. This page shows how to read one, and where the padding goes.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import AttentionSpec, Bucket, attention, prepare_metadata
from jaxattn.measuring.workloads import Workload, nest_workload, random_page_tables
from jaxattn.metadata.consumers import triton_tiling, xla_tiling
from jaxattn.viz import padding_waste, plot_mask, plot_programs, plot_schedule

# %% [markdown]
# ## Tiles
#
# Two sequences decode, and two prompts of 130 and 40 tokens are prefilled, in a bucket with room for 192
# tokens.

# %%
mixed = Workload("mixed", q_lens=(1, 1, 130, 40), context_lens=(150, 60, 0, 0), source="this page")
tables, _ = random_page_tables(mixed, page_size=16, rng=np.random.default_rng(0))
batch = nest_workload(mixed, page_tables=tables, page_size=16, bucket=Bucket(192, 8, 32))
spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64)
local = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, sliding_window=32)
metadata = prepare_metadata(batch, [spec, local])
plot_schedule(batch, metadata)

# %% [markdown]
# Downwards run the query tokens of all sequences, to the right the keys of each. A box is a tile. What is
# filled is seen; the rest of a box is computed and masked. No tile crosses from one sequence into another,
# a decode token has a tile of its own, and with a window a tile begins where the window of its first token
# does.
#
# The same as numbers: the tiles of the prompts, from the schedule of the XLA implementation.

# %%
schedule = metadata.visible_keys(spec.window_class).schedule(xla_tiling(spec))
long = schedule.long
print("tile  sequence  tokens      keys")
for w in range(int(long.num_attending)):
    first, keys = int(long.q_start[w]), f"{long.kv_start[w]}–{long.kv_end[w]}"
    print(f"{w:4}  {long.seq[w]:8}  {first:3}–{first + int(long.q_len[w]):<5}  {keys:>8}")

# %% [markdown]
# How much of the computed part is seen? In this picture the keys lie one after the other, as they would in
# one dense mask. A batch padded to its longest sequence would compute every pair in the third line of the
# title.

# %%
plot_mask(metadata)

# %% [markdown]
# Implementations want different tiles, and the metadata have a schedule for each. Open one to see how many
# of its tiles are live, and how much of them is masked.

# %%
metadata.visible_keys(spec.window_class)

# %% [markdown]
# ## Padding
#
# The bucket has room for 192 tokens, and the batch has 172.

# %%
print(f"{padding_waste(batch):.0%} of the token axis is padding")

# %% [markdown]
# A schedule's length is a bound that holds for every batch of the bucket. Its live tiles stand first, and
# their number is in the metadata, so that nobody visits the others. In a bucket four times as large the
# live tiles are the same.

# %%
large_bucket = nest_workload(mixed, page_tables=tables, page_size=16, bucket=Bucket(768, 8, 32))
large = prepare_metadata(large_bucket, spec, consumers="xla")
for name, prepared in (("192 tokens", metadata), ("768 tokens", large)):
    tiles = prepared.visible_keys(spec.window_class).schedule(xla_tiling(spec)).long
    print(f"bucket of {name}: {int(tiles.num_attending)} tiles with work, room for {tiles.seq.shape[0]}")

# %% [markdown]
# Nothing about a sequence's tiles depends on the bucket. So its outputs have the same bits in either one.

# %%
keys = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(keys[0], (768, 8, 64))
k, v = (jax.random.normal(key, (32, 16, 2, 64)) for key in keys[1:])
small_out = attention(q[:192], k, v, metadata, spec, implementation="xla")
large_out = attention(q, k, v, large, spec, implementation="xla")
print("same bits:", bool(jnp.array_equal(small_out[:172], large_out[:172])))

# %% [markdown]
# ## Programs
#
# On a GPU, programs run side by side. A row of this picture is a program of the Triton kernel, a bar a
# piece of work: a tile for one key head. The launch ends with its longest row, and longer tiles come first.

# %%
plot_programs(metadata, spec)

# %% [markdown]
# ## A long context among short ones
#
# One sequence has 4,000 keys, seven have 60. With a tile for each, seven programs would soon wait for one.
# So the keys of a decode tile are split every 512: the long sequence has eight units, and a second launch
# merges their results. The split never depends on the other sequences.

# %%
skewed = Workload("skewed", q_lens=(1,) * 8, context_lens=(3999,) + (59,) * 7, source="this page")
tables, _ = random_page_tables(skewed, page_size=16, rng=np.random.default_rng(0))
decode = nest_workload(skewed, page_tables=tables, page_size=16, bucket=Bucket(8, 8, 512, max_q_len=1))
decoding = prepare_metadata(decode, spec, fields=("num_seqs", "visible", "schedules"), consumers="triton")
plot_programs(decoding, spec)

# %% [markdown]
# The units of each tile are neighbours, and `indptr` says where they begin:

# %%
(tiles,) = decoding.visible_keys(spec.window_class).schedule(triton_tiling(spec)).lists
units = tiles.split
print("indptr  ", units.indptr)
print("kv_start", units.kv_start[:10], "…")
print("kv_end  ", units.kv_end[:10], "…")

# %% [markdown]
# ## More work than programs
#
# A launch has at most 512 programs. Where there are more pieces, programs take them in turns, backwards on
# every second turn, which is paler: who got the longest piece of a turn gets the shortest of the next, and
# rows come out equally long.

# %%
prompt = Workload("one prompt", q_lens=(4096,), context_lens=(0,), source="this page")
wide = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
long_prompt = prepare_metadata(
    nest_workload(prompt, bucket=Bucket(4096, 16)),
    wide,
    fields=("num_seqs", "visible", "schedules"),
    consumers="triton",
)
plot_programs(long_prompt, wide)
