"""The demo, with a few training steps: everything but the quality of the text."""

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxattn import Bucket, load_model, nest_sequences
from jaxattn.cli.demo import (
    CONFIG,
    TRAIN_BUCKET,
    dense_logits,
    next_token_loss,
    run_demo,
    standard_library_functions,
    trained_checkpoint,
    training_batches,
)
from jaxattn.models import Model, init_params


def test_documents_are_real_functions():
    documents = standard_library_functions()
    assert len(documents) > 1000
    assert len({len(d) for d in documents}) > 100
    assert all(b"def " in bytes(d) for d in documents[:50])


def test_documents_are_trained_on_whole_with_little_padding():
    documents = standard_library_functions()
    texts = {bytes(document) for document in documents}
    batches = training_batches(documents, TRAIN_BUCKET)
    trained_on = 0
    for batch, _ in zip(batches, range(300), strict=False):
        ends = np.asarray(batch.cu_q_lens)[1 : int(batch.num_seqs) + 1]
        trained_on += int(ends[-1])
        packed = np.split(np.asarray(batch.token_ids, np.uint8)[: ends[-1]], ends[:-1])
        assert all(bytes(document) in texts for document in packed)
    assert trained_on > 0.9 * 300 * TRAIN_BUCKET.tokens


def test_loss_is_that_of_each_document_alone():
    """No document sees another: the packed loss is the token-weighted mean of the separate ones."""
    params = init_params(jax.random.key(0), CONFIG)
    documents = [np.arange(9) + 40, np.arange(23) + 60]
    bucket = Bucket(40, 4)

    def loss(documents):
        return float(jax.jit(next_token_loss)(params, nest_sequences(documents, bucket=bucket)))

    separate = (8 * loss(documents[:1]) + 22 * loss(documents[1:])) / 30
    assert loss(documents) == pytest.approx(separate, rel=1e-5)


def test_loss_is_that_of_the_dense_forward_pass():
    params = init_params(jax.random.key(0), CONFIG)
    document = np.arange(80) + 40
    model = Model.from_params(CONFIG, params)
    logits = jax.jit(lambda token_ids: dense_logits(model, token_ids))(document)
    losses = -jax.nn.log_softmax(logits)[np.arange(79), document[1:]]
    packed = jax.jit(next_token_loss)(params, nest_sequences([document], bucket=Bucket(96, 4)))
    assert float(packed) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_runs_and_leaves_a_checkpoint_to_reuse(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxattn.cli.demo.MAX_NEW_TOKENS", 4)
    with jax.numpy_dtype_promotion("standard"):  # optax's AdamW promotes its step count
        run_demo(tmp_path, train_steps=4)
    output = capsys.readouterr().out
    assert "all implementations wrote the same tokens" in output
    assert "so does a dense padded forward pass" in output
    assert (tmp_path / "schedule.png").stat().st_size > 10_000
    checkpoint = trained_checkpoint(Console(), tmp_path, [], steps=4)  # nothing to train on, and no need to
    assert load_model(checkpoint).config == CONFIG
