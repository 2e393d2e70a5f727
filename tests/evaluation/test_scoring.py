import math

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlstm import CharLSTM, Vocab, init_state, zero_carry
from charlstm.data.batches import Batch, Streams, Windows, cold_batches
from charlstm.evaluation.scoring import (
    MAX_BLOCKS,
    TEMPERATURES_R,
    LossSums,
    best_temperature,
    losses_at_temperatures,
    metrics_of,
    standard_error,
    sum_losses,
)
from charlstm.steps import evaluate, make_eval_step, make_score_step, run_batches

V, H = 7, 8
BYTES_V = np.array([1, 2, 1, 3, 1, 4, 1])


@pytest.fixture(scope="module")
def trained():
    """Return (model, params, ids_M, eval_step, score_step); END is id 3."""
    model = CharLSTM(vocab_size=V, hidden_size=H, end_id=3)
    params = init_state(model, optax.identity(), jax.random.key(0), 1).params
    params = jax.tree.map(lambda leaf: 3 * leaf, params)  # so that what is read matters
    ids_M = np.random.default_rng(0).integers(0, V, 1003)
    return model, params, ids_M, jax.jit(make_eval_step(model)), jax.jit(make_score_step(model))


def sums_of(trained, batches, batch_size, num_chars, bytes_V=BYTES_V):
    model, params, _, _, score_step = trained
    outputs = run_batches(score_step, params, zero_carry(model, batch_size), batches)
    return sum_losses(outputs, num_chars, bytes_V)


def test_a_text_read_in_one_go_has_the_figures_of_evaluate(trained):
    model, params, ids_M, eval_step, _ = trained
    for batches, num_chars in (
        (Streams(ids_M, 1, 50), len(ids_M) - 1),
        (Windows(ids_M, 3, 50), len(ids_M) - 50),
    ):
        carry = zero_carry(model, batches.batch_size)
        wanted = evaluate(eval_step, params, carry, batches.epoch())
        found = metrics_of(sums_of(trained, batches.epoch(), batches.batch_size, num_chars))
        assert found["nats_per_char"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert found["accuracy"] == wanted["accuracy"]
        assert found["characters"] == wanted["count"] == num_chars


def test_cold_windows_are_each_read_alone(trained):
    model, params, ids_M, eval_step, _ = trained
    window, nats = 64, 0.0
    for begin in range(0, len(ids_M) - 1, window):
        piece = ids_M[begin : begin + window + 1]
        alone = Batch(piece[None, :-1], piece[None, 1:], np.ones((1, len(piece) - 1)), np.ones(1))
        nats += float(eval_step(params, zero_carry(model, 1), alone)[1]["nats"])
    cold = sums_of(trained, cold_batches(ids_M, window, 4), 4, len(ids_M) - 1)
    assert cold.nats_K.sum() == pytest.approx(nats, rel=1e-5)
    stateful = sums_of(trained, Streams(ids_M, 1, 50).epoch(), 1, len(ids_M) - 1)
    assert abs(stateful.loss - cold.loss) > 1e-4  # the carry makes a difference
    assert cold.num_bytes == stateful.num_bytes == BYTES_V[ids_M[1:]].sum()


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 5))
def test_cold_windows_have_each_character_but_the_first_once(size, seq_len, batch_size):
    ids_M = np.arange(size) + 100
    batches = list(cold_batches(ids_M, seq_len, batch_size))
    assert {batch.inputs_BT.shape for batch in batches} == {(batch_size, seq_len)}
    targets, inputs = [], []
    for batch in batches:
        counts_BT = batch.weights_BT > 0
        targets += batch.targets_BT[counts_BT].tolist()
        inputs += batch.inputs_BT[counts_BT].tolist()
        assert batch.reset_B.all()
    assert targets == ids_M[1:].tolist()
    assert inputs == ids_M[:-1].tolist()


@given(st.integers(2, 700), st.integers(1, 50))
def test_blocks_are_consecutive_and_of_equal_size(num_chars, length):
    nats_M = np.random.default_rng(num_chars).random(num_chars)
    pieces = [nats_M[begin : begin + length] for begin in range(0, num_chars, length)]
    outputs = []
    for piece in pieces:
        shape = 1, len(piece)
        batch = Batch(None, np.zeros(shape, int), np.ones(shape), np.zeros(1, bool))
        outputs.append((batch, (piece[None], np.zeros(shape, bool))))
    sums = sum_losses(outputs, num_chars, BYTES_V)
    wanted = [block.sum() for block in np.array_split(nats_M, len(sums.nats_K))]
    assert len(sums.nats_K) == max(1, min(MAX_BLOCKS, num_chars // 100))
    assert sums.count_K.max() - sums.count_K.min() <= 1
    if num_chars % len(wanted) == 0:  # otherwise array_split has other long blocks
        np.testing.assert_allclose(sums.nats_K, wanted)
    assert sums.nats_K.sum() == pytest.approx(nats_M.sum())


def test_batches_that_count_something_else_are_refused(trained):
    ids_M = trained[2]
    with pytest.raises(ValueError, match="num_chars=1100: the batches count 1002"):
        sums_of(trained, cold_batches(ids_M, 100, 2), 2, 1100)


def test_the_standard_error_worked_out_by_hand():
    # Deviations -1, 0, 1: their variance is 2 / 2, over 3 blocks.
    assert standard_error(np.array([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(1 / 3))
    assert standard_error(np.array([1.0])) is None


def test_the_standard_error_is_the_spread_of_means_of_new_texts():
    # Neighbours that are alike: 50 characters share a value.
    draw = np.random.default_rng(0)
    texts = draw.normal(size=(400, 30, 20)).repeat(50, axis=2)
    errors = [standard_error(blocks_KM.mean(axis=1)) for blocks_KM in texts]
    assert np.mean(errors) == pytest.approx(np.std(texts.mean(axis=(1, 2))), rel=0.1)


def test_figures_worked_out_by_hand():
    nats_K, count_K = np.array([2.0, 4.0]) * math.log(2), np.array([2, 2])
    found = metrics_of(LossSums(nats_K, count_K, correct=1, num_bytes=6))
    assert found == pytest.approx(
        {
            "characters": 4,
            "nats_per_char": 1.5 * math.log(2),
            "bits_per_char": 1.5,
            "standard_error": 0.5,  # of 1 and 2
            "bits_per_byte": 1.0,
            "perplexity": 2**1.5,
            "accuracy": 0.25,
        }
    )


def test_without_known_bytes_there_are_no_bits_per_byte(trained):
    ids_M = trained[2]
    batches = Streams(ids_M, 1, 50).epoch()
    found = metrics_of(sums_of(trained, batches, 1, len(ids_M) - 1, bytes_V=None))
    assert found["bits_per_byte"] is None
    assert found["bits_per_char"] > 0


def test_perplexity_of_a_huge_loss_is_infinite():
    found = metrics_of(LossSums(np.array([1e6]), np.array([1]), correct=0, num_bytes=1))
    assert found["perplexity"] == math.inf


def test_temperature_divides_the_weights_of_the_last_layer(trained):
    model, params, ids_M, eval_step, _ = trained
    batches, temperatures_R = Streams(ids_M, 4, 50), np.array([0.7, 1.0, 1.6])
    found = losses_at_temperatures(model, params, batches, temperatures_R)
    for temperature, loss in zip(temperatures_R, found, strict=True):
        dense = jax.tree.map(lambda leaf, by=temperature: leaf / by, params["dense"])
        wanted = evaluate(
            eval_step, params | {"dense": dense}, zero_carry(model, 4), batches.epoch()
        )
        assert loss == pytest.approx(wanted["loss"], rel=1e-5)


def test_the_best_temperature_is_the_lowest_point_of_a_parabola():
    for lowest in (0.6, 1.0, 1.07, 1.9):
        losses_R = 2 + 0.3 * np.log(TEMPERATURES_R / lowest) ** 2
        assert best_temperature(losses_R) == pytest.approx(lowest)
    assert best_temperature(TEMPERATURES_R) == 0.5
    assert best_temperature(-TEMPERATURES_R) == 2.0


def test_the_bytes_of_characters_are_those_of_python():
    vocab = Vocab.from_text("a\x03\x7f\x80\u07ff\u0800\ufffd\uffff\U00010000\U0010ffff")
    assert vocab.utf8_bytes().tolist() == [len(char.encode()) for char in vocab.characters]
