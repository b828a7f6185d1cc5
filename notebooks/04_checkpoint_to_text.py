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
# # From a checkpoint to text
#
# A checkpoint is looked at, loaded, and asked for text. To have one without a download, a small decoder is
# first trained for a few seconds on functions of Python's standard library, a byte per token.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax

from jaxattn import Bucket, DecoderConfig, Sampling, compute_logits, generate, load_model, save_params
from jaxattn.checkpoints import CheckpointError, inspect
from jaxattn.cli.demo import next_token_loss, standard_library_functions, training_batches
from jaxattn.models import init_params
from jaxattn.serving import plan_generation

# %% [markdown]
# ## A checkpoint
#
# A decoder of two layers, the second with a window. You have a checkpoint already? Then take its path
# below.

# %%
config = DecoderConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=256,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    sliding_windows=(None, 64),
)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(5e-3, 240)))


@jax.jit
def train_step(params, state, batch):
    loss, gradients = jax.value_and_grad(next_token_loss)(params, batch, config)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


params = init_params(jax.random.key(0), config)
state = optimizer.init(params)
batches = training_batches(standard_library_functions(range(32, 257)), Bucket(256, 8))
losses = []
for batch, _ in zip(batches, range(240), strict=False):
    params, state, loss = train_step(params, state, batch)
    losses.append(float(loss))
print(f"loss {losses[0]:.2f}, then {np.mean(losses[-20:]):.2f} nats per byte")

# %% [markdown]
# It is written as Orbax, with a `config.json` beside it: the form that most Flax checkpoints have.

# %%
folder = Path(tempfile.mkdtemp()) / "checkpoint"
save_params(folder, params, config)
sorted(path.name for path in folder.iterdir())

# %% [markdown]
# ## Look before you load
#
# `inspect` reads no weight. It says what the format and the family are, what every leaf is called, and
# whether all of it fits the config.

# %%
found = inspect(folder)
print(f"{found.format}, {found.layout} names, family {found.family}, {found.num_params:,} parameters")
for name, leaf in list(found.leaves.items())[:5]:
    print(f"  {name:55} {leaf.dtype} {leaf.shape}")
print("problems:", found.problems or "none")

# %% [markdown]
# What does not fit is listed all at once, before anything is read. Here the config is told to be wider than
# the weights are.

# %%
try:
    load_model(folder, config=replace(config, intermediate_size=512))
except CheckpointError as error:
    print(error)

# %% [markdown]
# ## Load
#
# Shapes are known before weights are. If you say what will be run, its programs compile while the weights
# are read.

# %%
prompts = [np.frombuffer(text, np.uint8) for text in (b"        return self.", b"    if not ", b"def ")]
model = load_model(folder, buckets=[plan_generation([len(prompt) for prompt in prompts], max_new_tokens=56)])
report = model.report
print(f"{report.num_params:,} parameters, {report.bytes_read:,} bytes read in {report.reading_seconds:.1f} s")
print(f"programs {', '.join(report.programs)} compiled in {report.compiling_seconds:.1f} s, at the same time")

# %% [markdown]
# ## Generate
#
# Three prompts of different lengths, in one batch: one prefill, then one loop on the device. The decoder
# learned for seconds, so do not expect sense: what it has got is what Python looks like.

# %%
drawn = Sampling(temperature=0.7, top_p=0.95, seed=2)
tokens = generate(model, prompts, max_new_tokens=56, sampling=drawn)
for prompt, new in zip(prompts, tokens, strict=True):
    print((prompt.tobytes() + bytes(new)).decode("ascii", "replace"))
    print("-" * 40)

# %% [markdown]
# A prompt with a seed gets the same text again, whoever else is in the batch. Below, the others change
# places and are drawn differently.

# %%
others = [Sampling(), Sampling(temperature=1.0)]
again = generate(model, [prompts[0], prompts[2], prompts[1]], max_new_tokens=56, sampling=[drawn, *others])
print("the same among others:", again[0] == tokens[0])

# %% [markdown]
# ## Score
#
# `compute_logits` gives every token's logits, in one packed pass. How surprised is the model by code, and
# by the same bytes in another order?

# %%
code = np.frombuffer(b"        if self.name is None:\n            return False\n", np.uint8)
shuffled = np.random.default_rng(0).permutation(code)
texts = {"code": code, "shuffled": shuffled}
for (name, text), logits in zip(texts.items(), compute_logits(model, [*texts.values()]), strict=True):
    nats = -np.take_along_axis(jax.nn.log_softmax(logits[:-1]), text[1:, None], 1).mean()
    print(f"{name:9} {nats:.2f} nats per byte")

# %% [markdown]
# ## Checkpoints from elsewhere
#
# safetensors, msgpack, Orbax old and new, the gemma library and MaxText are told apart by their names;
# leaves of your own are described in a table. The README has the list, and what is refused.
