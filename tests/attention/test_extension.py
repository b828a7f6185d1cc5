"""Two mechanisms that the library does not know, added from outside. Two how-tos tell the same story.

The first is another rule of visibility, which every backend then serves. The second is another
kind of layer, with a state per sequence instead of keys: a backend of its own that declares what
it reads and derives one field more.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle import Problem
from tolerances import assert_as_good_as

from jaxattn import AttentionSpec, Bucket, advance, attention, nest_sequences, prepare_metadata
from jaxattn.measuring.workloads import ODD, nest_workload
from jaxattn.metadata import Consumer

# --- A rule of visibility: chunked local attention, as in Llama 4. A token sees its own chunk.


@dataclass(frozen=True)
class ChunkClass:
    """Visible are the keys of the token's own chunk, up to itself."""

    chunk: int

    @property
    def span(self) -> int:
        return self.chunk

    def visible_range(self, positions, causal_ends, kv_ends, prefix_lm_ends):
        return jnp.minimum(positions - positions % self.chunk, causal_ends), causal_ends


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedSpec(AttentionSpec):
    """A layer of chunked local attention."""

    chunk: int

    @property
    def window_class(self) -> ChunkClass:
        return ChunkClass(self.chunk)


def chunked_attention(q, k, v, spec: ChunkedSpec, dtype):
    """The definition, for one sequence's last `len(q)` tokens."""
    q, k, v = (np.asarray(x, dtype) for x in (q, k, v))
    k, v = np.repeat(k, spec.group_size, axis=1), np.repeat(v, spec.group_size, axis=1)
    position, key = len(k) - len(q) + np.arange(len(q))[:, None], np.arange(len(k))[None, :]
    sees = (key <= position) & (key >= position // spec.chunk * spec.chunk)
    scores = np.einsum("qnh,knh->nqk", q, k) * dtype(spec.head_dim**-0.5)
    weights = np.exp(np.where(sees, scores, -np.inf) - scores.max(-1, keepdims=True))
    return np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
@pytest.mark.parametrize("workload", ODD, ids=lambda w: w.name)
def test_every_backend_serves_a_new_rule_of_visibility(workload, implementation):
    spec = ChunkedSpec(num_q_heads=4, num_kv_heads=2, head_dim=64, chunk=24)
    problem = Problem.draw(workload, spec)
    tables, k_pages, v_pages = problem.pages(8, num_pages=80)
    bucket = Bucket(tokens=160, seqs=8, pages=80)
    batch = nest_workload(workload, page_tables=tables, page_size=8, bucket=bucket)
    q = jnp.asarray(problem.packed(problem.q, 160))
    metadata = prepare_metadata(batch, spec)
    out = attention(
        q, jnp.asarray(k_pages), jnp.asarray(v_pages), metadata, spec, implementation=implementation
    )
    n = sum(workload.q_lens)

    def dense(dtype):
        rows = zip(problem.q, problem.k, problem.v, strict=True)
        return np.concatenate([chunked_attention(*qkv, spec, dtype) for qkv in rows])

    assert_as_good_as(np.asarray(out[:n]), dense(np.float32), dense(np.float64), jnp.dtype("float32"))
    np.testing.assert_array_equal(out[n:], 0)


# --- A kind of layer: a decaying sum, s = λ s + x, with a state per sequence instead of keys.

DECAY = Consumer("decay", frozenset({"token_to_seq", "cu_q_lens", "state_slots", "has_initial_state"}))
DERIVED = {"starts_sequence": lambda m: jnp.diff(m.token_to_seq, prepend=-1) != 0}
RATE = 0.5


def decay(x, states, metadata):
    """Outputs `[T, D]`, and the states `[slots, D]` after the step."""
    slots = metadata.state_slots
    initial = jnp.where(metadata.has_initial_state[:, None], states.at[slots].get(mode="clip"), 0.0)
    starts = metadata["starts_sequence"]
    carried_in = jnp.concatenate([initial, jnp.zeros_like(initial[:1])])[metadata.token_to_seq]

    def step(state, token):
        x, starts, initial = token
        state = RATE * jnp.where(starts, initial, state) + x
        return state, state

    _, out = lax.scan(step, jnp.zeros_like(x[0]), (x, starts, carried_in))
    last, has_tokens = metadata.cu_q_lens[1:] - 1, jnp.diff(metadata.cu_q_lens) > 0
    kept = jnp.where(has_tokens, slots, states.shape[0])
    return out, states.at[kept].set(out.at[last].get(mode="clip"), mode="drop")


@jax.jit
def decay_step(x, states, batch):
    return decay(x, states, prepare_metadata(batch, consumers=DECAY, derive=DERIVED))


@pytest.mark.smoke
def test_a_new_kind_of_layer_declares_what_it_reads():
    """Prefill in two chunks, then decode steps advanced on the device, against one plain loop."""
    lens, rng = (5, 9, 1), np.random.default_rng(0)
    xs = [rng.standard_normal((n + 3, 4)).astype(np.float32) for n in lens]
    paged = {"page_tables": [[0], [1], [2]], "page_size": 16, "state_slots": [4, 0, 2]}
    bucket = Bucket(tokens=16, seqs=4, pages=3)
    states = jnp.full((6, 4), 7.0)  # of sequences long gone
    outs: list[list] = [[], [], []]

    def run(batch, parts, states):
        x = np.full((batch.bucket.tokens, 4), np.nan, np.float32)
        flat = np.concatenate(parts)
        x[: len(flat)] = flat
        out, states = decay_step(jnp.asarray(x), states, batch)
        for row, part in enumerate(
            np.split(np.asarray(out[: len(flat)]), np.cumsum([*map(len, parts)])[:-1])
        ):
            outs[row].extend(part)
        return states

    batch = nest_sequences([[1] * 2, [1] * 8, [1]], **paged, bucket=bucket)
    states = run(batch, [xs[0][:2], xs[1][:8], xs[2][:1]], states)
    rest = {"page_tables": [[0], [1]], "page_size": 16, "state_slots": [4, 0]}
    batch = nest_sequences([[1] * 3, [1]], context_lens=[2, 8], **rest, bucket=bucket)
    states = run(batch, [xs[0][2:5], xs[1][8:9]], states)
    batch = nest_sequences([[1]] * 3, context_lens=[5, 9, 1], **paged, bucket=bucket.decode())
    for step in range(3):
        states = run(batch, [x[n + step : n + step + 1] for x, n in zip(xs, lens, strict=True)], states)
        batch = advance(batch, jnp.zeros(4, jnp.int32))
    for x, out in zip(xs, outs, strict=True):
        state, expected = np.zeros(4, np.float32), []
        for token in x:
            state = RATE * state + token
            expected.append(state)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_array_equal(states[jnp.array([1, 3, 5])], 7.0)  # nobody else's state is touched


def test_a_new_consumer_is_given_what_it_reads_and_nothing_else():
    batch = nest_sequences([[1] * 3], page_tables=[[0]], page_size=4)
    metadata = prepare_metadata(batch, consumers=DECAY, derive=DERIVED)
    assert set(metadata.values) == {*DECAY.reads, *DERIVED}
