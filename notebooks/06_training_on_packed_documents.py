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
# # Training on packed documents
#
# Documents have different lengths. Padded to the longest, most of a batch is padding; concatenated and cut,
# tokens see documents that have nothing to do with theirs. *Packed*, whole documents lie in one batch, and
# none sees another.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from jaxattn import (
    AttentionSpec,
    Bucket,
    RopeConfig,
    nest_batches,
    nest_sequences,
    next_token_cross_entropy,
    pack_best_fit,
    prepare_metadata,
)
from jaxattn.cli.demo import standard_library_functions
from jaxattn.nn.nnx import Attention
from jaxattn.training import next_token_targets
from jaxattn.viz import padding_waste, plot_mask

# %% [markdown]
# ## Documents
#
# Functions of Python's standard library, as bytes, 16 to 256 of them each.

# %%
documents = standard_library_functions(range(16, 257))
lengths = np.array([len(document) for document in documents])
figure, ax = plt.subplots(figsize=(6, 2.2), layout="constrained")
ax.hist(lengths, bins=24, color="#1f74bd")
ax.set(xlabel="bytes", ylabel="documents", title=f"{len(documents):,} documents")
plt.show()

# %% [markdown]
# ## Pack
#
# `pack_best_fit` puts each document of a stream where it leaves the least room. Every batch has the shape
# of one bucket, so there is one compiled program.

# %%
bucket = Bucket(tokens=512, seqs=16)
batches = list(nest_batches(pack_best_fit(documents, bucket), bucket))
print(f"{len(batches)} packed batches, {np.mean([padding_waste(batch) for batch in batches]):.1%} padding")

rows = lengths[: len(lengths) // 8 * 8].reshape(-1, 8)
waste = 1 - rows.sum() / (8 * rows.max(axis=1)).sum()
print(f"eight documents a batch, padded to the longest: {waste:.1%} padding")

# %%
batches[0]

# %% [markdown]
# No document sees another:

# %%
spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig())
plot_mask(prepare_metadata(batches[0], spec))

# %% [markdown]
# The target of a token is the next one of its own document. The last token of a document has none, and is
# left out of the loss.

# %%
targets, has_target = next_token_targets(batches[0])
end = int(batches[0].cu_q_lens[1])
print("tokens     ", bytes(np.asarray(batches[0].token_ids[end - 12 : end + 12], np.uint8)))
print("has target ", "".join("^" if has else "." for has in has_target[end - 12 : end + 12]))

# %% [markdown]
# ## A decoder
#
# `jaxattn.nn` has attention as a layer for NNX and for Linen. It takes the metadata, which all layers
# share.


# %%
class Block(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.RMSNorm(64, rngs=rngs) for _ in range(2)])
        self.attention = Attention(64, spec, rngs=rngs)
        self.up, self.down = nnx.Linear(64, 192, rngs=rngs), nnx.Linear(192, 64, rngs=rngs)

    def __call__(self, x, metadata):
        x = x + self.attention(self.norms[0](x), metadata)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(256, 64, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, batch):
        metadata = prepare_metadata(batch, spec)  # once, for all layers
        x = self.embed(batch.token_ids)
        for block in self.blocks:
            x = block(x, metadata)
        return self.embed.attend(x)


def loss_of(model, batch):
    return next_token_cross_entropy(model(batch), batch)


# %% [markdown]
# ## Packed or padded, the gradient is the same
#
# Before training: the gradient of one packed batch, and that of its documents one at a time, each padded to
# 256 tokens, and averaged by the number of their targets.

# %%
model = Decoder(nnx.Rngs(0))
gradient_of = nnx.jit(nnx.grad(loss_of))
packed = gradient_of(model, batches[0])

ends = np.asarray(batches[0].cu_q_lens)[: int(batches[0].num_seqs) + 1]
pieces = np.split(np.asarray(batches[0].token_ids)[: ends[-1]], ends[1:-1])
alone = [gradient_of(model, nest_sequences([piece], bucket=Bucket(256, 1))) for piece in pieces]
weights = np.array([len(piece) - 1 for piece in pieces], np.float32)
padded = jax.tree.map(
    lambda *leaves: sum(w * x for w, x in zip(weights / weights.sum(), leaves, strict=True)), *alone
)

size, difference = (
    max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
    for tree in (packed, jax.tree.map(jnp.subtract, packed, padded))
)
print(f"largest gradient {size:.3f}, largest difference {difference:.1e}")

# %% [markdown]
# ## Train

# %%
STEPS = 150
optimizer = nnx.Optimizer(model, optax.adamw(optax.cosine_decay_schedule(5e-3, STEPS)), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, batch):
    loss, gradient = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, gradient)
    return loss


order = np.random.default_rng(0).permutation(len(batches))[:STEPS]
losses = [float(train_step(model, optimizer, batches[i])) for i in order]

# %%
figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(losses, color="#1f74bd", linewidth=1, alpha=0.5, label="each batch")
ax.plot(
    np.arange(9, STEPS), np.convolve(losses, np.ones(10) / 10, "valid"), color="#c8501a", label="mean of ten"
)
ax.set(xlabel="step", ylabel="nats per byte", title=f"{STEPS} steps of {bucket.tokens} tokens")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# What packing saves in time and memory, and what cutting documents costs in loss, is measured in
# `experiments/packed_training.py`.
