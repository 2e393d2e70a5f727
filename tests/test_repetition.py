"""The repetition penalty against a plain search in the text."""

from functools import partial

import jax
import numpy as np
import pytest
from helpers import assert_close, random_params
from hypothesis import given, settings
from hypothesis import strategies as st

from charlstm import CharLSTM, make_sampler, predict, sample_step, zero_carry
from charlstm import repetition as rep
from charlstm.streaming import stream

V = 5


def longest_repetitions(text, history, vocab_size=V):
    """Return, for each character, the longest end of `text` that it followed before."""
    longest = [0] * vocab_size
    for place in range(max(0, len(text) - history + 1), len(text)):
        size = 0
        while size < place and text[place - 1 - size] == text[-1 - size]:
            size += 1
        longest[text[place]] = max(longest[text[place]], size)
    return longest


def penalties_of(text, penalty, length, history=rep.HISTORY, vocab_size=V):
    return [
        min(penalty * rep.BASE ** (size - length), rep.MAX_PENALTY) if size >= length else 0.0
        for size in longest_repetitions(text, history, vocab_size)
    ]


@jax.jit
def penalize(ids_BP, penalty, length):
    return rep.penalties(rep.add_texts(rep.no_repeats(len(ids_BP)), ids_BP), V, penalty, length)


def padded(texts, width=30):
    """Return ids_BP with negative ids before the texts, to compile once."""
    return np.array([[-1] * (width - len(text)) + text for text in texts], np.int32)


texts = st.lists(st.integers(0, 1), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(texts, min_size=2, max_size=2), st.floats(0.1, 3), st.integers(1, 6))
def test_penalties_are_those_of_a_search(given_texts, penalty, length):
    # The second row has other settings.
    settings = np.float32([penalty, 1.0]), np.int32([length, 2])
    wanted = [penalties_of(given_texts[0], penalty, length), penalties_of(given_texts[1], 1.0, 2)]
    assert_close(penalize(padded(given_texts), *settings), np.array(wanted))


@pytest.mark.parametrize("history", [3, 12])
def test_repetitions_are_found_within_the_history_only(history, monkeypatch):
    monkeypatch.setattr(rep, "HISTORY", history)
    text = np.random.default_rng(1).integers(2, size=80).tolist()
    wanted = penalties_of(text, 1.0, 1, history)
    assert any(wanted)
    assert wanted != penalties_of(text, 1.0, 1)
    # A new function, since the compiled one has the usual history.
    found = jax.jit(lambda ids_BP: penalize.__wrapped__(ids_BP, 1.0, 1))(padded([text], 80))
    assert_close(found, np.array([wanted]))


def test_a_loop_costs_more_and_more_but_never_infinity():
    sizes = [10, 20, 40, 2000]
    found_4V = penalize(padded([[0] * size for size in sizes], 2000), 1.0, 4)
    wanted = [rep.BASE ** (size - 5) for size in sizes[:3]]
    assert found_4V[:, 0].tolist() == pytest.approx([*wanted, rep.MAX_PENALTY], rel=1e-5)


def test_penalties_map_over_texts():
    ids_BP = np.random.default_rng(0).integers(3, size=(6, 30), dtype=np.int32)
    mapped = jax.jit(jax.vmap(lambda ids_2P: penalize(ids_2P, 1.0, 2)))(ids_BP.reshape(3, 2, 30))
    assert np.any(np.asarray(mapped) > 0)
    wanted = [penalties_of(ids_P.tolist(), 1.0, 2) for ids_P in ids_BP]
    assert_close(mapped, np.reshape(wanted, (3, 2, V)))


MODEL = CharLSTM(vocab_size=V, hidden_size=6)
PARAMS = random_params(MODEL, scale=1.5, seed=1)
PENALTY = {"repetition_penalty": np.float32([2.0, 2.0]), "repetition_length": np.int32([3, 3])}
PROMPT_BP = np.random.default_rng(3).integers(V, size=(2, 8), dtype=np.int32)
SEQ_LEN, L = 6, 30
predict_ids = jax.jit(partial(predict, MODEL, PARAMS))


def greedy(prompt, method, penalty):
    """Return the most probable characters after their penalties, by a plain loop."""
    text = prompt.tolist()
    for _ in range(L):
        read = text if method == "carry" else text[-SEQ_LEN:]
        # Padded at its end, of which a causal model sees nothing before, to compile once.
        ids_1T = np.array([read + [0] * (len(prompt) + L - len(read))], np.int32)
        logits_1TV, _ = predict_ids(ids_1T, zero_carry(MODEL, 1))
        logits_V = np.asarray(logits_1TV)[0, len(read) - 1]
        if penalty:
            logits_V = logits_V - penalties_of(text, penalty, 3)
        # Else rounding would decide.
        assert np.diff(np.sort(logits_V)[-2:]) > 1e-4
        text.append(int(np.argmax(logits_V)))
    return text[len(prompt) :]


def test_sampler_subtracts_penalties_of_prompt_and_text():
    sampler = jax.jit(make_sampler(MODEL, L))
    found_BL = sampler(PARAMS, PROMPT_BP, jax.random.key(0), temperature=0.0, **PENALTY)
    np.testing.assert_array_equal(found_BL, [greedy(ids_P, "carry", 2.0) for ids_P in PROMPT_BP])


@pytest.mark.parametrize("method", ["carry", "window"])
def test_streams_subtract_penalties_of_prompt_and_text(method):
    wanted_BL = [greedy(ids_P, method, 2.0) for ids_P in PROMPT_BP]
    assert wanted_BL != [greedy(ids_P, method, 0.0) for ids_P in PROMPT_BP]
    options = {"method": method, "seq_len": SEQ_LEN, "length": L, "chunk": 7, "temperature": 0.0}
    options |= {"repetition_penalty": 2.0, "repetition_length": 3}
    pieces = stream(MODEL, PARAMS, list(PROMPT_BP), jax.random.key(0), **options)
    np.testing.assert_array_equal(np.concatenate(list(pieces), axis=1), wanted_BL)


def test_sample_step_subtracts_the_penalties_of_repeats():
    step = jax.jit(partial(sample_step, model=MODEL, temperature=0.0))
    carry, repeats = zero_carry(MODEL, 2), rep.no_repeats(2)
    written = list(PROMPT_BP.T)
    for index in range(PROMPT_BP.shape[1] + L - 1):
        repeats = rep.add_ids(repeats, written[index])
        given = PARAMS, carry, written[index], jax.random.key(0)
        carry, ids_B = step(*given, repeats=repeats, **PENALTY)
        if index >= PROMPT_BP.shape[1] - 1:
            written.append(ids_B)
    found_BL = np.stack(written, axis=1)[:, PROMPT_BP.shape[1] :]
    np.testing.assert_array_equal(found_BL, [greedy(prompt, "carry", 2.0) for prompt in PROMPT_BP])
    with pytest.raises(ValueError, match="repetition_penalty: needs"):
        step(PARAMS, carry, ids_B, jax.random.key(0), **PENALTY)


@pytest.mark.parametrize(("penalty", "is_searched"), [({}, False), (PENALTY, True)])
def test_only_a_penalty_makes_the_sampler_search(penalty, is_searched):
    sampler = partial(make_sampler(MODEL, L), **penalty)
    program = str(jax.make_jaxpr(sampler)(PARAMS, PROMPT_BP, jax.random.key(0)))
    assert (f"i32[2,{rep.HISTORY}]" in program) == is_searched
