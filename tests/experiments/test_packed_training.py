"""The ablation of training batches: its arms hold what they say, and a tiny run from end to end."""

import dataclasses
import itertools

import jax
import numpy as np
import packed_training
import pytest
from packed_training import ARMS, LAYOUTS, batch_loss, compare_gradients, real_tokens

from jaxattn import RaggedBatch, compute_logits, generate, load_model
from jaxattn.models import init_params

CONFIG = dataclasses.replace(packed_training.EXPERIMENT.small, windows=(None, 24), rows=3)


def random_documents(lens):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).astype(np.uint8) for length in lens]


DOCUMENTS = random_documents([41, 9, 30, 17, 26])


def sequences_of(batch):
    """The real tokens of each sequence of a batch."""
    if isinstance(batch, RaggedBatch):
        ends = np.asarray(batch.cu_q_lens)[1 : int(batch.num_seqs) + 1]
        return np.split(np.asarray(batch.token_ids)[: ends[-1]], ends[:-1])
    return [row[:length] for row, length in zip(batch.token_ids, batch.lens, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_all_tokens(layout):
    documents = random_documents(np.random.default_rng(1).integers(16, 129, 40))
    batches = list(LAYOUTS[layout](documents, CONFIG))
    sequences = [list(map(int, sequence)) for batch in batches for sequence in sequences_of(batch)]
    assert sum(map(real_tokens, batches)) == sum(map(len, documents))
    if layout.startswith("truncated"):
        assert list(itertools.chain(*sequences)) == list(map(int, np.concatenate(documents)))
        assert {len(sequence) for sequence in sequences[:-1]} == {CONFIG.tokens}
    else:
        assert sorted(sequences) == sorted(list(map(int, document)) for document in documents)


@pytest.mark.parametrize("lens", [[41, 9, 30, 17, 26], [1, 127]])
def test_packed_and_padded_batches_have_the_same_gradient(lens):
    """The same to float32 rounding; and where boundaries are dropped, another one."""
    params = init_params(jax.random.key(0), CONFIG.model)
    distances = compare_gradients(CONFIG, params, random_documents(lens))
    assert distances["padded"] < 1e-5
    assert distances["truncated"] > 1e-2


def test_loss_is_the_mean_over_the_documents_tokens():
    """Of both kinds of batches: each document alone, weighted by its tokens that have a target."""
    params = init_params(jax.random.key(0), CONFIG.model)
    config = dataclasses.replace(CONFIG, rows=len(DOCUMENTS))
    alone = [next(ARMS["packed"]([document], config)) for document in DOCUMENTS]
    loss = jax.jit(batch_loss, static_argnums=2)
    losses = [float(loss(params, batch, config.model)) for batch in alone]
    expected = np.average(losses, weights=[document.size - 1 for document in DOCUMENTS])
    for arm in ("packed", "padded"):
        batch = next(ARMS[arm](DOCUMENTS, config))
        assert float(loss(params, batch, config.model)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax's AdamW promotes its step count
def test_runs_and_leaves_a_checkpoint_that_generates(tmp_path):
    config = dataclasses.replace(packed_training.EXPERIMENT.small, checkpoint=str(tmp_path / "checkpoint"))
    result = packed_training.EXPERIMENT.run(config, tmp_path / "result.jsonl")
    of_kind = {
        row["kind"]: [other for other in result.rows if other["kind"] == row["kind"]] for row in result.rows
    }
    assert [row["arm"] for row in of_kind["run"]] == list(ARMS)
    for run in of_kind["run"]:
        (_, before), *_, (tokens, after) = run["curve"]
        assert len(run["curve"]) == 3
        assert after < before
        assert tokens >= config.steps * config.tokens
    assert [row["layout"] for row in of_kind["cost"]] == list(LAYOUTS)
    assert of_kind["gradients"][0]["relative_to_packed"]["padded"] < 1e-5

    model = load_model(tmp_path / "checkpoint")
    assert model.config == config.model
    prompts = [list(b"def f("), list(b"    return")]
    tokens = generate(model, prompts, max_new_tokens=5)
    assert [len(new) for new in tokens] == [5, 5]
    for new, logits in zip(tokens, compute_logits(model, prompts), strict=True):
        assert new[0] == logits[-1].argmax()
