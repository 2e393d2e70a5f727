import math

import pytest

from charlstm.config import base_config
from charlstm.config_check import validate
from charlstm.planning import rules


@pytest.mark.parametrize("num_chars", [2, 3, 60, 1000, 10**9])
@pytest.mark.parametrize("seconds", [12, 120, 36_000])
def test_any_text_has_a_window_for_each_stream(num_chars, seconds):
    batch_size, seq_len = rules.choose_shape(seconds, num_chars, is_cpu=True)
    assert batch_size >= 1
    assert seq_len >= 1
    assert batch_size * seq_len + 1 <= num_chars


def width(seconds, num_chars=10**9, vocab_size=96, flops=5e10):
    return rules.widest(base_config(), vocab_size, num_chars, seconds, flops)


def test_width_grows_with_the_time():
    widths = [width(seconds) for seconds in (12, 60, 120, 600, 3600, 36_000)]
    places = [rules.WIDTHS.index(found) for found in widths]
    assert places == sorted(places)
    assert len(set(places)) > 4


def test_short_text_limits_the_width():
    assert width(36_000, num_chars=10_000) == rules.WIDTHS[0]
    assert width(36_000, num_chars=761_330) < width(36_000)


def test_large_vocabulary_is_embedded():
    config = rules.with_text_limits(base_config(), 120, 100, vocab_size=5000)
    assert config.model.input == "embed"
    assert config.data.max_val_chars == base_config().data.max_val_chars
    validate(config)


def test_validation_text_is_limited_by_the_time():
    config = rules.with_text_limits(base_config(), 600, 10**8, vocab_size=96)
    assert config.data.max_val_chars == 300_000
    config.data.max_val_chars = 50
    config = rules.with_text_limits(config, 600, 10**8, vocab_size=96)
    assert config.data.max_val_chars == 50


@pytest.mark.parametrize(
    ("epochs", "dropout"), [(0.5, 0.0), (1, 0.05), (3.7, 0.2), (5.2, 0.3), (100, 0.4)]
)
def test_dropout_grows_with_the_epochs(epochs, dropout):
    assert rules.with_rates(base_config(), epochs).model.dropout_rate == dropout


@pytest.mark.parametrize(
    ("epochs", "hidden"), [(0.5, 0.0), (5.9, 0.0), (6, 0.06), (12.2, 0.12), (100, 0.15)]
)
def test_recurrent_dropout_grows_with_the_epochs(epochs, hidden):
    assert rules.with_rates(base_config(), epochs).model.recurrent_dropout == hidden


@pytest.mark.parametrize(("hidden_size", "rate"), [(64, 1.2e-2), (448, 1.2e-2), (1024, 5.25e-3)])
def test_wider_model_has_a_lower_learning_rate(hidden_size, rate):
    config = rules.with_width(base_config(), (hidden_size, 1))
    assert rules.with_rates(config, 1).optimizer.learning_rate == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize(("seconds", "each", "number"), [(120, 1, 5), (120, 4, 3), (12, 60, 1)])
def test_evaluations_take_a_tenth_of_the_time(seconds, each, number):
    assert rules.choose_evaluations(seconds, each) == number


def test_last_evaluation_is_at_the_end():
    config = rules.with_length(base_config(), 1001, 5)
    assert math.ceil(1001 / config.eval_every_steps) == 5


def test_proposed_settings_are_chosen_or_changed_ones():
    given = base_config()
    proposed = rules.proposed_settings(rules.with_streams(given), given)
    assert proposed.keys() == rules.PROPOSED_KEYS
    given.data.order, given.data.loss_on = "windows", "last"
    proposed = rules.proposed_settings(rules.with_streams(given), given)
    assert proposed["data.order"] == "streams"
