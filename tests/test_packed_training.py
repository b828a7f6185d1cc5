"""The ablation of training batches: its arms hold what they say, and a tiny run from end to end."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import packed_training
import pytest
from packed_training import ARMS, LAYOUTS, Setting, batch_loss, compare_gradients, real_tokens

from jaxattn import DecoderConfig, RaggedBatch, compute_logits, generate, load_model
from jaxattn.models import init_params

SETTING = Setting(
    model=DecoderConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=16,
        sliding_windows=(None, 24),
    ),
    tokens=128,
    seqs=8,
    rows=3,
    row_lens=(128,),
    held_out=6,
    steps=6,
    seeds=1,
    evaluations=2,
    timed=2,
    rounds=1,
)


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
    batches = list(LAYOUTS[layout](documents, SETTING))
    sequences = [list(map(int, sequence)) for batch in batches for sequence in sequences_of(batch)]
    assert sum(map(real_tokens, batches)) == sum(map(len, documents))
    if layout.startswith("truncated"):
        assert list(itertools.chain(*sequences)) == list(map(int, np.concatenate(documents)))
        assert {len(sequence) for sequence in sequences[:-1]} == {SETTING.tokens}
    else:
        assert sorted(sequences) == sorted(list(map(int, document)) for document in documents)


@pytest.mark.parametrize("lens", [[41, 9, 30, 17, 26], [1, 127]])
def test_packed_and_padded_batches_have_the_same_gradient(lens):
    """The same to float32 rounding; and where boundaries are dropped, another one."""
    params = init_params(jax.random.key(0), SETTING.model)
    distances = compare_gradients(SETTING, params, random_documents(lens))
    assert distances["padded"] < 1e-5
    assert distances["truncated"] > 1e-2


def test_loss_is_the_mean_over_the_documents_tokens():
    """Of both kinds of batches: each document alone, weighted by its tokens that have a target."""
    params = init_params(jax.random.key(0), SETTING.model)
    setting = dataclasses.replace(SETTING, rows=len(DOCUMENTS))
    alone = [next(ARMS["packed"]([document], setting)) for document in DOCUMENTS]
    loss = jax.jit(batch_loss, static_argnums=2)
    losses = [float(loss(params, batch, setting.model)) for batch in alone]
    expected = np.average(losses, weights=[document.size - 1 for document in DOCUMENTS])
    for arm in ("packed", "padded"):
        batch = next(ARMS[arm](DOCUMENTS, setting))
        assert float(loss(params, batch, setting.model)) == pytest.approx(expected, rel=1e-5)


@jax.numpy_dtype_promotion("standard")  # optax's AdamW promotes its step count
def test_runs_and_leaves_a_checkpoint_that_generates(tmp_path):
    log, checkpoint = tmp_path / "log.jsonl", tmp_path / "checkpoint"
    model_config = dataclasses.replace(
        SETTING.model, num_layers=1, sliding_windows=(24,), ropes=SETTING.model.ropes[:1]
    )
    setting = dataclasses.replace(SETTING, model=model_config)
    result = packed_training.run(setting, log=log, checkpoint=checkpoint)
    assert json.loads(json.dumps(result))["setting"]["steps"] == SETTING.steps
    origin, *lines = map(json.loads, log.read_text().splitlines())
    assert origin["jax"] == jax.__version__
    assert [line["arm"] for line in lines] == [arm for arm in ARMS for _ in range(3)]
    for run in result["runs"]:
        (_, before), *_, (tokens, after) = run["curve"]
        assert after < before
        assert tokens >= SETTING.steps * SETTING.tokens
    assert [row["layout"] for row in result["cost"]] == list(LAYOUTS)
    assert result["gradients"]["relative_to_packed"]["padded"] < 1e-5
    packed_training.plot(result).savefig(tmp_path / "picture.png")

    model = load_model(checkpoint)
    assert model.config == model_config
    prompts = [list(b"def f("), list(b"    return")]
    tokens = generate(model, prompts, max_new_tokens=5)
    assert [len(new) for new in tokens] == [5, 5]
    for new, logits in zip(tokens, compute_logits(model, prompts), strict=True):
        assert new[0] == logits[-1].argmax()
