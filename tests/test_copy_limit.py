"""The limit of copies against a search for substrings in Python."""

from functools import partial

import jax
import numpy as np
import pytest
from helpers import random_params
from hypothesis import given, settings
from hypothesis import strategies as st

from charlstm import CharLSTM, predict, streaming, zero_carry
from charlstm import copy_limit as limits
from charlstm.copy_limit import CopyLimit, index_copies
from charlstm.errors import UserError
from charlstm.streaming import stream

V = 4


def as_text(ids):
    return "".join("abcd"[index] for index in ids)


def as_ids(text):
    return np.array(["abcd".index(char) for char in text], np.int64)


def is_too_long(text, other, length):
    """Whether the last length + 1 characters of `text` occur in `other`."""
    return len(text) > length and text[-length - 1 :] in other


made = st.text("abc", max_size=30)


@settings(deadline=None)
@given(st.text("abc", max_size=60), st.lists(made, min_size=2, max_size=2), made, st.integers(1, 4))
def test_characters_are_accepted_up_to_the_first_too_long_copy(other, prompts, drawn, length):
    limit = CopyLimit(index_copies(as_ids(other), length, V), list(map(as_ids, prompts)))
    # The other row differs, so that the rows have copies at other places.
    rows = drawn, drawn[::-1]
    kept, forbidden_BV = limit.accept(np.stack([as_ids(row) for row in rows]))
    violations = [
        [
            place
            for place in range(len(row))
            if is_too_long(prompt + row[: place + 1], other, length)
        ]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    assert kept == min((min(places) for places in violations if places), default=len(drawn))
    for prompt, row, places, found_V in zip(prompts, rows, violations, forbidden_BV, strict=True):
        text = prompt + row[:kept]
        wanted = [char for char in "abcd" if is_too_long(text + char, other, length)]
        assert as_text(np.flatnonzero(found_V)) == "".join(wanted if kept in places else [])


def test_an_index_does_not_depend_on_blocks(monkeypatch):
    ids_M = np.random.default_rng(0).integers(V, size=500).astype(np.uint8)
    whole = index_copies(ids_M, 7, V)
    monkeypatch.setattr(limits, "BLOCK", 10)
    np.testing.assert_array_equal(index_copies(ids_M, 7, V).hashes_M, whole.hashes_M)
    assert len(np.unique(whole.hashes_M)) == len({as_text(ids_M)[i : i + 8] for i in range(493)})


MODEL = CharLSTM(vocab_size=V, hidden_size=6)
PARAMS = random_params(MODEL, scale=1.5, seed=1)
SEQ_LEN, L, N = 5, 60, 3
PROMPTS = [as_ids("abcdabc"), as_ids("ddcab")]
OTHER = as_text(np.random.default_rng(5).integers(V, size=60))


def write(prompts=PROMPTS, key=0, **options):
    index = index_copies(as_ids(OTHER), N, V)
    options = {"length": L, "seq_len": SEQ_LEN, "limit": CopyLimit(index, prompts)} | options
    return np.concatenate(list(stream(MODEL, PARAMS, prompts, jax.random.key(key), **options)), 1)


predict_ids = jax.jit(partial(predict, MODEL, PARAMS))


def greedy(prompt, method):
    """Return the most probable characters that do not copy more than N, by a plain loop."""
    text, width = as_text(prompt), len(PROMPTS[0]) + L
    while len(text) < len(prompt) + L:
        read = as_ids(text if method == "carry" else text[-SEQ_LEN:])
        # Padded at its end, of which a causal model sees nothing before, to compile once.
        ids_1T = np.pad(read, (0, width - len(read)))[None]
        logits_1TV, _ = predict_ids(ids_1T, zero_carry(MODEL, 1))
        logits_V = np.asarray(logits_1TV)[0, len(read) - 1]
        allowed = [char for char in "abcd" if not is_too_long(text + char, OTHER, N)]
        text += max(allowed, key=lambda char: logits_V["abcd".index(char)])
    return text[len(prompt) :]


@pytest.mark.parametrize("method", ["carry", "window"])
def test_copies_do_not_exceed_the_limit(method):
    found_BL = write(method=method, temperature=0.0)
    wanted = [greedy(prompt, method) for prompt in PROMPTS]
    assert [as_text(ids_L) for ids_L in found_BL] == wanted


def test_rows_and_pieces_do_not_change_a_limited_text():
    together_BL = write()
    for prompt, ids_L in zip(PROMPTS, together_BL, strict=True):
        text = as_text(prompt) + as_text(ids_L)
        ends = range(len(prompt) + 1, len(text) + 1)
        assert not any(is_too_long(text[:end], OTHER, N) for end in ends)
    free_BL = write(limit=None)
    assert any(is_too_long(as_text(free_BL[0, :end]), OTHER, N) for end in range(L))
    np.testing.assert_array_equal(write(chunk=7), together_BL)
    np.testing.assert_array_equal(write(PROMPTS[:1]), together_BL[:1])


def test_other_characters_keep_their_relative_probabilities(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_LEN", 1)  # for which numbers are drawn in vain
    number = 4000
    prompts = [as_ids("abca")] * number
    [other] = [as_ids("cabcab")]  # after 'bca' comes 'b'
    limit = CopyLimit(index_copies(other, N, V), prompts)
    drawn_B = write(prompts, length=1, limit=limit)[:, 0]
    logits_1TV, _ = predict_ids(prompts[0][None], zero_carry(MODEL, 1))
    probs_V = np.exp(np.asarray(logits_1TV[0, -1], np.float64))
    probs_V[1] = 0
    counts_V, wanted_V = np.bincount(drawn_B, minlength=V), number * probs_V / probs_V.sum()
    assert counts_V[1] == 0
    allowed = wanted_V > 0
    chi_squared = np.sum((counts_V - wanted_V)[allowed] ** 2 / wanted_V[allowed])
    # Of 2 degrees of freedom, it is above 28 once in a million.
    assert chi_squared < 28, (counts_V, wanted_V)


def test_a_text_that_nothing_can_continue_raises():
    with pytest.raises(UserError, match="no_copy=1: all 4 characters"):
        CopyLimit(index_copies(as_ids("aabacad"), 1, V), [as_ids("a")]).accept(as_ids("c")[None])
