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
# # An attention mechanism of your own
#
# Chunked local attention: tokens see their own chunk, up to themselves. The library does not know it. It
# takes one small class, and every implementation then serves it, with pages, tiles and gradients.

# %%
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import AttentionSpec, attention, nest_sequences, prepare_metadata
from jaxattn.metadata import Consumer
from jaxattn.viz import plot_mask

# %% [markdown]
# ## A rule of visibility
#
# A rule says, for every token, where the range of keys that it sees begins and ends. `span` bounds how many
# keys one token sees. Ranges must never move backwards within a sequence: this is what tiles are built on.


# %%
@dataclass(frozen=True)
class Chunks:
    size: int

    @property
    def span(self):
        return self.size

    def visible_range(self, positions, causal_ends, kv_ends, prefix_lm_ends):
        return jnp.minimum(positions - positions % self.size, causal_ends), causal_ends


# %% [markdown]
# A layer says that it follows the rule. Everything else is as in any spec.


# %%
@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedSpec(AttentionSpec):
    chunk: int

    @property
    def window_class(self):
        return Chunks(self.chunk)


spec = ChunkedSpec(num_q_heads=2, num_kv_heads=1, head_dim=32, chunk=16)

# %% [markdown]
# ## Look at it
#
# Two sequences, of 72 and 23 tokens, as one batch:

# %%
lengths = [72, 23]
batch = nest_sequences([[1] * n for n in lengths])
metadata = prepare_metadata(batch, spec)
plot_mask(metadata)

# %% [markdown]
# Tiles begin where the chunk of their first token does, so that chunks before it are not computed.
#
# ## Is it right?
#
# A dense mask says it in the plainest way. It knows nothing of tiles.

# %%
keys = jax.random.split(jax.random.key(0), 3)
T = batch.bucket.tokens
q, k, v = (jax.random.normal(key, (T, heads, 32)) for key, heads in zip(keys, (2, 1, 1), strict=True))


def dense(q, k, v, lengths, chunk):
    outputs, start = [], 0
    for n in lengths:
        token, key = np.arange(n)[:, None], np.arange(n)[None, :]
        sees = (key <= token) & (key // chunk == token // chunk)
        rows = slice(start, start + n)
        outputs.append(jax.nn.dot_product_attention(q[rows], k[rows], v[rows], mask=sees[None]))
        start += n
    return jnp.concatenate(outputs)


expected = dense(q, k, v, lengths, chunk=16)
for implementation in ("reference", "xla"):
    out = attention(q, k, v, metadata, spec, implementation=implementation)
    print(f"{implementation:9}  largest difference {jnp.abs(out[: sum(lengths)] - expected).max():.1e}")

# %% [markdown]
# Gradients follow the same tiles.


# %%
def loss(attend):
    return lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v)[: sum(lengths)]))


ours = jax.grad(loss(lambda *qkv: attention(*qkv, metadata, spec)), argnums=(0, 1, 2))(q, k, v)
theirs = jax.grad(loss(lambda *qkv: dense(*qkv, lengths, 16)), argnums=(0, 1, 2))(q, k, v)
for name, a, b in zip("qkv", ours, theirs, strict=True):
    print(f"gradient of {name}  largest difference {jnp.abs(a - b).max():.1e}")

# %% [markdown]
# ## A range with a hole
#
# Some layers see the first few tokens and a window: a range with a hole, which no rule can say. But both
# parts are ranges, and attention over parts is merged by the logarithm of the softmax's denominator.


# %%
@dataclass(frozen=True)
class First:
    """The first `count` keys, as far as they lie before a window."""

    count: int
    window: int

    @property
    def span(self):
        return self.count

    def visible_range(self, positions, causal_ends, kv_ends, prefix_lm_ends):
        return jnp.zeros_like(causal_ends), jnp.clip(causal_ends - self.window, 0, self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstSpec(AttentionSpec):
    first: First

    @property
    def window_class(self):
        return self.first


HEADS = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 32}
window, first = AttentionSpec(**HEADS, sliding_window=8), FirstSpec(**HEADS, first=First(4, window=8))
two_parts = prepare_metadata(batch, [window, first])
plot_mask(two_parts)

# %%
parts = [attention(q, k, v, two_parts, part, return_lse=True) for part in (window, first)]
total = jnp.logaddexp(parts[0][1], parts[1][1])
weights = [jnp.where(jnp.isfinite(total), jnp.exp(lse - total), 0.0) for _, lse in parts]
merged = sum(weight[..., None] * out for weight, (out, _) in zip(weights, parts, strict=True))

token, key = np.arange(72)[:, None], np.arange(72)[None, :]
sees = (key <= token) & ((key > token - 8) | (key < 4))
expected = jax.nn.dot_product_attention(q[:72], k[:72], v[:72], mask=sees[None])
print(f"largest difference {jnp.abs(merged[:72] - expected).max():.1e}")

# %% [markdown]
# ## A layer without keys
#
# A layer may also have a state instead of keys: here a decaying sum over each sequence. It declares what it
# reads, and derives one field more, once per step as all others.

# %%
DECAY = Consumer("decay", frozenset({"token_to_seq"}))


def starts_sequence(metadata):
    return jnp.diff(metadata.token_to_seq, prepend=-1) != 0


@jax.jit
def decay(x, batch):
    metadata = prepare_metadata(batch, consumers=DECAY, derive={"starts_sequence": starts_sequence})

    def step(state, token):
        x, starts = token
        state = jnp.where(starts, 0.0, 0.5 * state) + x
        return state, state

    return lax.scan(step, 0.0, (x, metadata["starts_sequence"]))[1]


x = jnp.ones(T)
sums = decay(x, batch)
print(sums[:4], "…", sums[70:75])  # token 72 begins the second sequence

# %% [markdown]
# The metadata hold what was asked for, and nothing else:

# %%
prepare_metadata(batch, consumers=DECAY, derive={"starts_sequence": starts_sequence})
