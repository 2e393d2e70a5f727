"""Each check of an audit passes for a sound evaluation and fails for one broken evaluation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from charlstm import CharLSTM, init_state
from charlstm.config import base_config
from charlstm.errors import RunError
from charlstm.evaluation import audit, dynamic
from charlstm.evaluation.passes import cold_pass, dynamic_pass, stateful_pass
from charlstm.evaluation.scoring import metrics_of, sum_losses

V, M = 6, 120
KEY = jax.random.key(0)


class SeesNext(CharLSTM):
    """A model whose logits depend on the next input, too, as without a causal mask."""

    def apply(self, variables, ids_BT, carry):
        logits_BTV, carry = super().apply(variables, ids_BT, carry)
        later_BTV = jax.nn.one_hot(jnp.roll(ids_BT, -1, axis=1), self.vocab_size)
        return logits_BTV + 1e-3 * later_BTV, carry


@pytest.fixture(scope="module")
def ids_M():
    return np.random.default_rng(0).integers(0, V, M).astype(np.uint8)


@pytest.fixture(scope="module")
def params():
    model = CharLSTM(vocab_size=V, hidden_size=4)
    init = jax.jit(partial(init_state, model, optax.identity(), batch_size=1))
    return init(KEY).params


def settings(**changes):
    config = base_config()
    config.update_from_flattened_dict({"seq_len": 16, "batch_size": 4} | changes)
    return config


def passes_of(model, params, ids_M):
    return {
        "stateful": stateful_pass(model, params, settings(), ids_M),
        "cold": cold_pass(model, params, 7, len(ids_M)),
    }


def failures(checks):
    return [check.name for check in checks if not check.passed]


def audited(model, scored, ids_M):
    num_chars = len(ids_M) - scored.first
    loss = metrics_of(sum_losses(scored.run(ids_M), num_chars, None))["nats_per_char"]
    return list(audit.check_pass("pass", scored, model, ids_M, loss, KEY))


def test_a_sound_evaluation_passes_with_its_figures(params, ids_M):
    model = CharLSTM(vocab_size=V, hidden_size=4)
    for scored in passes_of(model, params, ids_M).values():
        count, sums, loss, change = audited(model, scored, ids_M)
        assert (count.measured, change.measured) == (0, 0)
        assert 0 < sums.measured < 1e-6  # float32 rounds
        assert failures([count, sums, loss, change]) == []


def test_documents_windows_and_two_characters_pass(params, ids_M):
    model = CharLSTM(vocab_size=V, hidden_size=4, end_id=3)
    windows = stateful_pass(model, params, settings(**{"data.order": "windows"}), ids_M)
    assert failures(audited(model, windows, ids_M)) == []
    assert windows.first == 16
    short = stateful_pass(model, params, settings(), ids_M[:2])
    assert failures(audited(model, short, ids_M[:2])) == []


def test_a_model_that_sees_the_next_character_fails(params, ids_M):
    model = SeesNext(vocab_size=V, hidden_size=4)
    for scored in passes_of(model, params, ids_M).values():
        [name] = failures(audited(model, scored, ids_M))
        assert "later characters" in name


def test_a_loss_without_normalization_fails(params, ids_M, monkeypatch):
    def unnormalized(logits_BTV, batch):
        return -jnp.take_along_axis(logits_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]

    model = CharLSTM(vocab_size=V, hidden_size=4)
    monkeypatch.setattr("charlstm.steps.cross_entropy", unnormalized)
    scored = stateful_pass(model, params, settings(), ids_M)
    [name] = failures(audited(model, scored, ids_M))
    assert "logarithms" in name


@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_sums_measure_the_worst_scored_position(ids_M, params, wrong):
    model = CharLSTM(vocab_size=V, hidden_size=4)
    scored = stateful_pass(model, params, settings(), ids_M)
    log_probs_BTV = np.full((1, 16, V), -np.log(V), np.float32)
    outputs = [[batch, log_probs_BTV.copy()] for batch in scored.read(ids_M)]
    error, nats = audit.measure_sums(outputs)
    assert error < 1e-6
    assert nats == pytest.approx(np.log(V))
    outputs[2][1][0, 3] += np.log1p(wrong)
    error, _ = audit.measure_sums(outputs)
    assert error == pytest.approx(wrong, rel=1e-4, nan_ok=True)
    assert not audit.Check("sums", error, 1e-6).passed


def test_errors_of_counting_are_counted(params, ids_M):
    model = CharLSTM(vocab_size=V, hidden_size=4)
    for scored in passes_of(model, params, ids_M).values():
        batches = list(scored.read(ids_M))
        assert audit.count_errors(batches, ids_M) == 0
        size = int(batches[0].weights_BT.sum())
        assert audit.count_errors([*batches, batches[0]], ids_M) == size
        assert audit.count_errors([batches[0], *batches], ids_M) >= size
        assert audit.count_errors(batches[:-1], ids_M) == batches[-1].weights_BT.sum()
        # A target among the inputs: each character is read before it is predicted.
        peeking = [batch._replace(inputs_BT=batch.targets_BT) for batch in batches]
        wanted = np.sum(ids_M[1:] != ids_M[:-1])
        assert audit.count_errors(peeking, ids_M) == wanted


def test_other_texts_differ_at_every_later_place_only(ids_M):
    begins = set()
    for key in jax.random.split(KEY, 10):
        begin, changed_M = audit.change_after(key, ids_M, 5, V)
        assert 5 <= begin < M
        np.testing.assert_array_equal(changed_M[:begin], ids_M[:begin])
        assert np.all(changed_M[begin:] != ids_M[begin:])
        assert changed_M.max() < V
        begins.add(begin)
    assert len(begins) > 5


def test_a_dynamic_step_that_learns_first_fails(params, ids_M):
    model = CharLSTM(vocab_size=V, hidden_size=4)
    texts = [ids_M[start : start + 9].astype(np.int32) for start in range(0, 40, 10)]
    sound = dynamic_pass(model, dynamic.make_anchor(model, params, texts), 0.01)
    checks = list(audit.check_dynamic(sound, model, ids_M, KEY))
    assert failures(checks) == []

    def learn_first(anchor, state, batch):
        learnt, _ = sound.step(anchor, state, batch)
        _, outputs = sound.step(anchor, learnt._replace(carry=state.carry), batch)
        return learnt, outputs

    checks = list(audit.check_dynamic(sound._replace(step=learn_first), model, ids_M, KEY))
    learnt, changed = failures(checks)
    assert "before they are learnt" in learnt
    assert "later characters" in changed


def test_bytes_are_those_of_the_encoded_text():
    metrics = {"bits_per_char": 2.0, "characters": 4, "bits_per_byte": 8 / 7}
    assert audit.check_bytes("aé€b", metrics).passed
    # Four bytes in place of seven, of 8 / 7 bits each.
    assert audit.check_bytes("abcd", metrics).measured == pytest.approx(3 * 8 / 7)


def test_a_failed_check_is_an_error_with_its_name():
    sound, broken = audit.Check("sound", 1.0, 1.0), audit.Check("broken", np.nan, 1.0)
    audit.refuse_failed(audit.as_json([sound]))
    row = {"name": "broken", "measured": None, "limit": 1.0, "passed": False}
    found = audit.as_json([sound, broken])
    assert (found["passed"], found["checks"][1]) == (False, row)
    with pytest.raises(RunError, match=r"1 of 2 checks failed \(broken\)"):
        audit.refuse_failed(found)
