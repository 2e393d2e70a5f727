import math

import jax
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from helpers import assert_close, assert_equal, random_params
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from charlstm import CharLSTM, zero_carry
from charlstm.data.batches import evaluation_batches
from charlstm.evaluation import HeldOut, evaluate
from charlstm.evaluation.surprise import CHUNK_LEN, Predictions, predict_pieces, predict_text
from charlstm.model import predict
from charlstm.runs.folder import load_run
from charlstm.steps import evaluate as evaluate_batches
from charlstm.steps import make_eval_step

V, END_ID = 7, 3


@pytest.fixture(scope="module")
def small():
    """Return (model, params, ids_M) of a model on documents; END is id 3."""
    model = CharLSTM(vocab_size=V, hidden_size=8, end_id=END_ID)
    ids_M = np.random.default_rng(0).integers(0, V, 2 * CHUNK_LEN + 90).astype(np.uint8)
    return model, random_params(model), ids_M


def test_bits_per_char_are_those_of_evaluate(small):
    model, params, ids_M = small
    run = load_run(epath.Path(ROOT / "tests" / "fixtures" / "run_schema_1"))
    metrics = evaluate(run, model, params, HeldOut(ids_M)).metrics
    found = predict_text(model, params, ids_M)
    assert np.isnan(found.bits_M[0])
    assert np.mean(found.bits_M[1:]) == pytest.approx(metrics["bits_per_char"], rel=1e-6)
    assert np.mean(found.rank_M[1:] == 1) == pytest.approx(metrics["accuracy"])


def test_a_window_is_all_that_is_read_before_a_character(small):
    model, params, ids_M = small
    window, ids_M = 9, ids_M[:150]
    found = predict_text(model, params, ids_M, window=window)
    assert np.isnan(found.bits_M[:window]).all()
    assert (found.rank_M[:window] == 0).all()
    run = load_run(epath.Path(ROOT / "tests" / "fixtures" / "run_schema_1"))
    config = ConfigDict(run.config.to_dict())
    config.seq_len, config.data.order = window, "windows"
    batches = evaluation_batches(ids_M, config)
    step, carry = jax.jit(make_eval_step(model)), zero_carry(model, batches.batch_size)
    wanted = evaluate_batches(step, params, carry, batches.epoch())
    predicted_M = found.bits_M[window:]
    assert np.mean(predicted_M) * math.log(2) == pytest.approx(wanted["loss"], rel=1e-6)
    assert len(predicted_M) == wanted["count"]
    pieces = np.split(ids_M, [3, 9, 10, 80])
    parts = predict_pieces(model, params, pieces, window=window)
    assert_equal(Predictions(*map(np.concatenate, zip(*parts, strict=True))), found)


def test_predictions_are_those_of_a_softmax_in_numpy(small):
    model, params, ids_M = small
    ids_1M = ids_M[None].astype(np.int32)
    logits_1MV, _ = jax.jit(predict, static_argnums=0)(model, params, ids_1M, zero_carry(model, 1))
    logits_MV = np.asarray(logits_1MV[0, :-1], np.float64)
    probs_MV = np.exp(logits_MV) / np.exp(logits_MV).sum(axis=1, keepdims=True)
    own_M = probs_MV[np.arange(len(probs_MV)), ids_M[1:]]
    order_MV = np.argsort(-logits_MV, axis=1, kind="stable")
    wanted = Predictions(
        bits_M=-np.log2(own_M),
        entropy_M=-(probs_MV * np.log2(probs_MV)).sum(axis=1),
        rank_M=1 + np.argmax(order_MV == ids_M[1:, None], axis=1),
        top_ids_MK=order_MV[:, :5],
        top_probs_MK=np.take_along_axis(probs_MV, order_MV[:, :5], axis=1),
    )
    found = predict_text(model, params, ids_M)
    assert_close(Predictions(*(leaf[1:] for leaf in found)), wanted)
    assert len(found.bits_M) == len(ids_M)
    assert np.isnan(found.bits_M[0])
    assert np.isnan(found.entropy_M[0])
    assert (found.rank_M[0], found.top_ids_MK[0].tolist()) == (0, [-1] * 5)


@given(st.lists(st.integers(0, 2 * CHUNK_LEN + 90), max_size=6))
def test_predictions_do_not_depend_on_where_pieces_end(small, cuts):
    model, params, ids_M = small
    pieces = np.split(ids_M, sorted(cuts))
    found = list(predict_pieces(model, params, pieces))
    assert [len(part.bits_M) for part in found] == [len(piece) for piece in pieces]
    joined = Predictions(*map(np.concatenate, zip(*found, strict=True)))
    assert_equal(joined, predict_text(model, params, ids_M))


def test_a_piece_is_predicted_before_the_next_is_read(small):
    model, params, ids_M = small
    num_read = 0

    def pieces():
        nonlocal num_read
        for begin in range(0, 30, 10):
            num_read += 10
            yield ids_M[begin : begin + 10]

    for number, found in enumerate(predict_pieces(model, params, pieces()), 1):
        assert num_read == 10 * number
        assert len(found.bits_M) == 10


def test_a_document_does_not_depend_on_the_one_before(small):
    model, params, ids_M = small
    document_M = np.array([END_ID, 0, 1, 5, 6, 0, 2])
    after = predict_text(model, params, np.concatenate([ids_M[:50], document_M]))
    alone = predict_text(model, params, document_M)
    assert_close(jax.tree.map(lambda leaf: leaf[51:], after), jax.tree.map(lambda x: x[1:], alone))


def test_equal_probabilities_are_ranked_by_id(small):
    model, params, ids_M = small
    found = predict_text(model, jax.tree.map(np.zeros_like, params), ids_M[:40])
    np.testing.assert_array_equal(found.rank_M[1:], ids_M[1:40] + 1)
    np.testing.assert_allclose(found.bits_M[1:], np.log2(V), rtol=1e-6)
    np.testing.assert_array_equal(found.top_ids_MK[1:], np.tile(np.arange(5), (39, 1)))


def test_texts_of_any_length_and_vocabularies_of_any_size(small):
    model, params, ids_M = small
    for size in (0, 1, 2, CHUNK_LEN, CHUNK_LEN + 1, CHUNK_LEN + 2):
        found = predict_text(model, params, ids_M[:size], num_top=100)
        assert np.isfinite(found.bits_M).sum() == max(0, size - 1)
        assert found.top_probs_MK.shape == (size, V)
        np.testing.assert_allclose(found.top_probs_MK[1:].sum(axis=1), 1, rtol=1e-6)


def test_ids_of_no_character_are_refused(small):
    model, params, _ = small
    with pytest.raises(ValueError, match="ids_M: ids are 0 to 6"):
        predict_text(model, params, np.array([0, 1, V]))
    with pytest.raises(ValueError, match="num_top"):
        predict_text(model, params, np.array([0, 1]), num_top=0)
