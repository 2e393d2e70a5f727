import itertools
import math
import re

import numpy as np
import pytest
from helpers import random_params
from hypothesis import given
from hypothesis import strategies as st

from charlstm import CharLSTM
from charlstm.evaluation import calibration
from charlstm.evaluation.calibration import KINDS
from charlstm.evaluation.surprise import Predictions, predict_text

TEXT = "Don't pay 12 £!\nÉtés d\u2019Ångström,\tnaïve\u0301 日本 x\x03\u200b"
NAN = math.nan


def predictions_of(confidences, ranks):
    zeros_M = np.zeros(len(ranks))
    probs_M1 = np.array(confidences, np.float32)[:, None]
    return Predictions(zeros_M, zeros_M, np.array(ranks), np.zeros((len(ranks), 1)), probs_M1)


def test_reliability_worked_out_by_hand():
    # The first character is not predicted. 0.5 is in the lower of two bins.
    found = calibration.reliability(
        predictions_of([0, 0.5, 0.4, 0.9, 0.7, 0.8], [0, 1, 2, 1, 1, 3]), num_bins=2
    )
    np.testing.assert_array_equal(found.edges, [0, 0.5, 1])
    np.testing.assert_array_equal(found.count_K, [2, 3])
    np.testing.assert_allclose(found.confidence_K, [0.45, 0.8], rtol=1e-6)
    np.testing.assert_allclose(found.accuracy_K, [1 / 2, 2 / 3])
    assert found.error == pytest.approx((2 * 0.05 + 3 * (0.8 - 2 / 3)) / 5, rel=1e-6)


def test_empty_bins_have_no_accuracy_and_no_error():
    found = calibration.reliability(predictions_of([1.0, 1.0], [1, 1]))
    assert np.isnan(found.accuracy_K[:-1]).all()
    assert (found.accuracy_K[-1], found.error, found.noise) == (1, 0, 0)


def test_noise_is_the_error_of_a_calibrated_model():
    draw = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        confidence_M = draw.uniform(0.2, 1, 3000)
        ranks = 2 - (draw.random(3000) < confidence_M)
        found = calibration.reliability(predictions_of(confidence_M, ranks))
        errors.append(found.error)
    # 300 errors with a spread of a fifth have a mean that is exact to about 1 %.
    assert np.mean(errors) == pytest.approx(found.noise, rel=0.04)


def test_a_text_without_predictions_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        calibration.reliability(predictions_of([0], [0]))


def test_each_kind_has_its_characters():
    kinds = dict.fromkeys(KINDS, "")
    for char, kind in zip(TEXT, calibration.character_kinds(TEXT), strict=True):
        kinds[KINDS[kind]] += char
    assert kinds == {
        "letter": "ontpaytésdngströmnaïve\u0301日本x",
        "capital": "DÉÅ",
        "digit": "12",
        "space": "    \t  ",
        "line end": "\n",
        "punctuation": "'£!\u2019,",
        "other": "\x03\u200b",
    }


def test_loss_by_kind_sums_up_the_whole_loss():
    bits_M = np.random.default_rng(0).exponential(2, len(TEXT))
    bits_M[0] = NAN
    found = calibration.loss_by_kind(TEXT, bits_M)
    assert found.names == KINDS
    assert found.count_K.sum() == len(TEXT) - 1
    assert np.sum(found.count_K * found.bits_K) == pytest.approx(np.nansum(bits_M), rel=1e-6)
    np.testing.assert_allclose(found.share_K, found.count_K * found.bits_K / np.nansum(bits_M))
    capitals = [bits_M[TEXT.index(char)] for char in "ÉÅ"]  # D is not predicted
    assert found.bits_K[KINDS.index("capital")] == pytest.approx(np.mean(capitals), rel=1e-6)
    none = calibration.loss_by_kind("ab", np.array([NAN, 1.0]))
    assert np.isnan(none.bits_K[KINDS.index("digit")])


@given(st.text("ab C1'\n\u0301", max_size=30))
def test_positions_in_words_are_those_of_a_regex(text):
    wanted = [0] * len(text)
    for match in re.finditer("[abC\u0301]+", text):
        wanted[match.start() : match.end()] = range(1, match.end() - match.start() + 1)
    assert calibration.word_positions(text).tolist() == wanted


def test_loss_by_word_position_gathers_long_words():
    text = "ab, abc " + "z" * 14
    found = calibration.loss_by_word_position(text, np.arange(len(text), dtype=float))
    assert found.names == (*map(str, range(1, 12)), "12+")
    assert found.count_K.tolist() == [3, 3, 2, *[1] * 8, 3]
    assert found.bits_K[0] == (0 + 4 + 8) / 3
    assert found.bits_K[-1] == (19 + 20 + 21) / 3
    with pytest.raises(ValueError, match="3 values for 2 characters"):
        calibration.loss_by_word_position("ab", np.zeros(3))


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 12), st.integers(1, 5))
def test_worst_passages_are_those_of_a_greedy_search(bits, width, count):
    bits_M = np.array([NAN, *bits])
    left = [
        (-sum(bits[start - 1 : start - 1 + width]), start)
        for start in range(1, len(bits_M) - width + 1)
    ]
    wanted = []
    while left and len(wanted) < count:
        wanted.append(min(left))
        left = [pair for pair in left if abs(pair[1] - wanted[-1][1]) >= width]
    found = calibration.worst_passages(bits_M, count, width)
    pairs = zip(found.bits_K.tolist(), found.start_K.tolist(), strict=True)
    assert [(-total, start) for total, start in pairs] == wanted


@pytest.fixture(scope="module")
def small():
    """Return (model, params, ids_M) of a model on documents; END is id 3."""
    model = CharLSTM(vocab_size=7, hidden_size=8, end_id=3)
    return model, random_params(model), np.random.default_rng(0).integers(0, 7, 300)


def test_loss_by_context_is_that_of_each_window_alone(small):
    model, params, ids_M = small
    context, num_windows, bins = 6, 20, [1, 2, 3, 3, 4, 4]
    whole_M = predict_text(model, params, ids_M).bits_M
    whole_M[:20] = NAN  # as with predict_text(..., window=20)
    found = calibration.loss_by_context(model, params, ids_M, whole_M, context, num_windows)
    own, whole = {}, {}
    for start in (np.arange(num_windows) * (300 - context) // num_windows).tolist():
        window_T = ids_M[start : start + context + 1]
        bits_T = predict_text(model, params, window_T).bits_M
        num_read = 0
        for place in range(context):
            num_read = 1 if window_T[place] == model.end_id else num_read + 1
            if np.isnan(whole_M[start + place + 1]):
                continue
            own.setdefault(bins[num_read - 1], []).append(bits_T[place + 1])
            whole.setdefault(bins[num_read - 1], []).append(whole_M[start + place + 1])
    assert found.least_K.tolist() == [1, 2, 3, 5]
    assert found.most_K.tolist() == [1, 2, 4, 6]
    assert found.count_K.tolist() == [len(own[k]) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(found.bits_K, [np.mean(own[k]) for k in (1, 2, 3, 4)], rtol=1e-5)
    np.testing.assert_allclose(
        found.whole_bits_K, [np.mean(whole[k]) for k in (1, 2, 3, 4)], rtol=1e-5
    )


def test_standard_errors_are_the_spread_over_new_texts(small):
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 9, (500, 60, 1))
    sums = counts * draw.normal(1, 1, (500, 60, 1)) + draw.normal(0, 1, (500, 60, 1))
    means = sums.sum(axis=(1, 2)) / counts.sum(axis=(1, 2))
    errors = itertools.starmap(calibration._ratio_error, zip(sums, counts, strict=True))
    # 500 texts show their spread to about 3 %.
    assert np.mean(list(errors)) == pytest.approx(np.std(means), rel=0.1)


def test_the_context_of_a_short_text_is_the_text(small):
    model, params, _ = small
    ids_M = np.array([0, 1, 2])
    found = calibration.loss_by_context(
        model, params, ids_M, predict_text(model, params, ids_M).bits_M
    )
    assert found.most_K.tolist() == [1, 2]
    assert found.count_K.tolist() == [1, 1]
    assert np.isnan(found.error_K).all()
    np.testing.assert_allclose(found.bits_K, found.whole_bits_K, rtol=1e-5)
    with pytest.raises(ValueError, match="too few"):
        calibration.loss_by_context(model, params, ids_M[:1], np.array([NAN]))
