"""Writing: each character is drawn as asked, from what the model says of those before it."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from charlstm.model import CharLSTM, predict, zero_carry
from charlstm.sample import keep_probable, make_sampler, make_writer, pick, sample_step, stream
from charlstm.text import Vocab

# All different, so that no two axes can be mixed up unnoticed: prompts, window, text, vocabulary.
B, P, SEQ_LEN, L, V = 3, 9, 7, 25, 11
MODEL = CharLSTM(vocab_size=V, hidden_size=12, num_layers=2)

each_method = pytest.mark.parametrize("method", ["carry", "window"])


def draw_params():
    ids_BT = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), ids_BT, zero_carry(MODEL, 1))["params"]
    rng = np.random.default_rng(1)
    # So large that the most probable character is another one each time.
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0, 1.5, leaf.shape)), shapes)


PARAMS = draw_params()
PROMPT_BP = np.random.default_rng(1).integers(V, size=(B, P), dtype=np.int32)
predict_ids = jax.jit(partial(predict, MODEL, PARAMS))


@lru_cache
def compiled_sampler(method, **settings):
    return jax.jit(make_sampler(MODEL, L, method=method, seq_len=SEQ_LEN, **settings))


def write(method="carry", prompt_BP=PROMPT_BP, seed=0, **settings):
    ids_BL = compiled_sampler(method, **settings)(PARAMS, prompt_BP, jax.random.key(seed))
    return np.asarray(ids_BL)


def most_probable(logits_BV):
    sorted_BV = np.sort(logits_BV, axis=-1)
    # Else rounding would decide which character is the most probable.
    assert np.all(sorted_BV[:, -1] - sorted_BV[:, -2] > 1e-4)
    return np.argmax(logits_BV, axis=-1).astype(np.int32)[:, None]


def greedy_with_carry(prompt_BP):
    """Return ids_BL by a plain loop of one character at a time."""
    carry = zero_carry(MODEL, len(prompt_BP))
    for index in range(prompt_BP.shape[1]):
        logits_BTV, carry = predict_ids(prompt_BP[:, index : index + 1], carry)
    written = []
    for _ in range(L):
        written.append(most_probable(logits_BTV[:, 0]))
        logits_BTV, carry = predict_ids(written[-1], carry)
    return np.concatenate(written, axis=1)


def greedy_by_windows(prompt_BP):
    """Return ids_BL by a plain loop that rereads the last characters from an empty carry."""
    text_BM = prompt_BP
    for _ in range(L):
        logits_BTV, _ = predict_ids(text_BM[:, -SEQ_LEN:], zero_carry(MODEL, len(prompt_BP)))
        text_BM = np.concatenate([text_BM, most_probable(logits_BTV[:, -1])], axis=1)
    return text_BM[:, prompt_BP.shape[1] :]


@pytest.mark.parametrize(
    ("method", "oracle"), [("carry", greedy_with_carry), ("window", greedy_by_windows)]
)
def test_temperature_0_writes_the_most_probable_characters(method, oracle):
    wanted_BL = oracle(PROMPT_BP)
    # A text that repeats itself at once, or that all prompts share, would prove little.
    assert all(len(set(row)) > 4 for row in wanted_BL)
    assert len({tuple(row) for row in wanted_BL}) == B
    np.testing.assert_array_equal(write(method, temperature=0.0), wanted_BL)


def test_the_two_methods_remember_differently():
    assert np.any(write("carry", temperature=0.0) != write("window", temperature=0.0))


def test_one_character_is_prompt_enough_for_the_carry():
    prompt_B1 = PROMPT_BP[:, :1]
    found_BL = write("carry", prompt_B1, temperature=0.0)
    np.testing.assert_array_equal(found_BL, greedy_with_carry(prompt_B1))


@each_method
def test_texts_written_at_once_are_those_written_alone(method):
    together_BL = write(method, temperature=0.0)
    for row in range(B):
        alone_1L = write(method, PROMPT_BP[row : row + 1], temperature=0.0)
        np.testing.assert_array_equal(alone_1L[0], together_BL[row])


@each_method
def test_a_text_goes_on_where_its_prompt_ends(method):
    text_BL = write(method, temperature=0.0)
    longer_BP = np.concatenate([PROMPT_BP, text_BL[:, :4]], axis=1)
    rest_BL = write(method, longer_BP, temperature=0.0)
    np.testing.assert_array_equal(rest_BL[:, : L - 4], text_BL[:, 4:])


@pytest.mark.parametrize(("method", "remembers"), [("carry", True), ("window", False)])
def test_only_the_carry_remembers_what_lies_before_the_window(method, remembers):
    prompt_BP = PROMPT_BP.copy()
    prompt_BP[:, : P - SEQ_LEN] = (prompt_BP[:, : P - SEQ_LEN] + 5) % V
    found_BL = write(method, prompt_BP, temperature=0.0)
    assert np.any(found_BL != write(method, temperature=0.0)) == remembers


@each_method
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_choice_of_one_is_the_most_probable_at_any_temperature(method, temperature):
    found_BL = write(method, temperature=temperature, top_k=1)
    np.testing.assert_array_equal(found_BL, write(method, temperature=0.0))


@each_method
def test_the_key_decides_the_text(method):
    text_BL = write(method, seed=5)
    np.testing.assert_array_equal(write(method, seed=5), text_BL)
    assert np.all(np.any(write(method, seed=6) != text_BL, axis=1))
    # Rows with the same prompt draw their own characters.
    same_BP = np.tile(PROMPT_BP[:1], (B, 1))
    assert len({tuple(row) for row in write(method, same_BP)}) == B


@each_method
def test_a_text_has_its_length_in_integers_of_the_vocabulary(method):
    text_BL = write(method, seed=7, temperature=5.0)
    assert text_BL.shape == (B, L)
    assert text_BL.dtype == np.int32
    # So hot that every character of the vocabulary turns up in 75 draws.
    assert set(text_BL.flat) == set(range(V))


@each_method
def test_streaming_yields_what_the_sampler_writes(method):
    settings = {"temperature": 0.8, "top_k": 5, "top_p": 0.9}
    key = jax.random.key(8)
    writer = make_writer(MODEL, method, SEQ_LEN, **settings)
    pieces = list(stream(writer, PARAMS, PROMPT_BP, key, L))
    assert len(pieces) == L
    np.testing.assert_array_equal(np.stack(pieces, axis=1), write(method, seed=8, **settings))


@each_method
def test_a_prompt_may_be_in_the_small_integers_that_a_vocab_encodes_to(method):
    characters = "abcdefghijk"
    vocab = Vocab.from_text(characters)
    text = ["".join(characters[index] for index in row) for row in PROMPT_BP]
    prompt_BP = np.stack([vocab.encode(row) for row in text])
    assert prompt_BP.dtype == np.uint8
    np.testing.assert_array_equal(write(method, prompt_BP), write(method))


def test_a_prompt_shorter_than_the_window_is_refused():
    short_BP = PROMPT_BP[:, : SEQ_LEN - 1]
    sampler = make_sampler(MODEL, L, method="window", seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match=f"a prompt of {SEQ_LEN - 1} characters"):
        sampler(PARAMS, short_BP, jax.random.key(0))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method='other'"):
        make_sampler(MODEL, L, method="other")


def test_sample_step_works_in_a_loop_of_ones_own():
    keys = jax.random.split(jax.random.key(9), L)
    step = partial(sample_step, model=MODEL, temperature=0.7)

    def body(memory, key):
        carry, ids_B = step(PARAMS, *memory, key)
        return (carry, ids_B), ids_B

    memory = zero_carry(MODEL, B), jnp.asarray(PROMPT_BP[:, 0])
    (last_carry, _), scanned_LB = jax.jit(partial(jax.lax.scan, body))(memory, keys)

    compiled = jax.jit(step)
    carry, ids_B = memory
    for key, scanned_B in zip(keys, scanned_LB, strict=True):
        carry, ids_B = compiled(PARAMS, carry, ids_B, key)
        np.testing.assert_array_equal(ids_B, scanned_B)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), last_carry, carry)
    assert len(set(np.asarray(scanned_LB).flat)) > 4


def test_sample_step_maps_over_keys_and_over_models():
    keys = jax.random.split(jax.random.key(10), 5)
    many = jax.tree.map(
        lambda leaf: leaf * jnp.linspace(0.5, 1.5, 5).reshape(-1, *[1] * leaf.ndim), PARAMS
    )
    step = partial(sample_step, model=MODEL)
    carry, ids_B = zero_carry(MODEL, B), jnp.asarray(PROMPT_BP[:, 0])
    mapped = jax.jit(jax.vmap(step, in_axes=(0, None, None, 0)))
    found = mapped(many, carry, ids_B, keys)
    compiled = jax.jit(step)
    for index, key in enumerate(keys):
        params, (found_carry, found_B) = jax.tree.map(lambda leaf, i=index: leaf[i], (many, found))
        wanted_carry, wanted_B = compiled(params, carry, ids_B, key)
        np.testing.assert_array_equal(found_B, wanted_B)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found_carry, wanted_carry)
    assert len({tuple(row) for row in np.asarray(found[1])}) > 1


def probabilities(logits_V):
    exp_V = np.exp(np.float64(logits_V) - np.max(logits_V))
    return exp_V / exp_V.sum()


LOGITS_V = np.float32([0.3, -1.2, 1.9, 0.9, -3.0, 1.4])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.5}, range(6)),
        ({"temperature": 1.0}, range(6)),
        ({"temperature": 2.0}, range(6)),
        ({"temperature": 2.0, "top_k": 3}, [2, 3, 5]),
        # After the temperature the two most probable hold 0.53, the three most 0.69.
        ({"temperature": 2.0, "top_p": 0.6}, [2, 3, 5]),
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.6}, [2, 5]),
    ],
)
def test_characters_are_as_frequent_as_probable(settings, kept):
    n = 20_000
    ids_n = np.asarray(pick(jax.random.key(11), np.tile(LOGITS_V, (n, 1)), **settings))
    kept = list(kept)
    wanted_V = np.zeros(len(LOGITS_V))
    wanted_V[kept] = probabilities(LOGITS_V[kept] / settings["temperature"])
    counts_V = np.bincount(ids_n, minlength=len(LOGITS_V))
    # Five standard deviations of a binomial distribution, and 0 where nothing may be drawn.
    tolerance_V = 5 * np.sqrt(n * wanted_V * (1 - wanted_V))
    assert np.all(np.abs(counts_V - n * wanted_V) <= tolerance_V), (counts_V, n * wanted_V)


def test_temperature_0_picks_the_largest_of_each_row():
    logits_BV = np.random.default_rng(12).normal(size=(50, V))
    ids_B = pick(jax.random.key(0), jnp.float32(logits_BV), temperature=0.0)
    np.testing.assert_array_equal(ids_B, np.argmax(logits_BV, axis=-1))


# Few values, so that ties are common.
rows = st.lists(st.integers(-4, 4).map(lambda n: n / 2), min_size=6, max_size=6)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    logits_BV=st.lists(rows, min_size=2, max_size=2),
    top_k=st.integers(0, 8),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 0.999)),
)
@example(logits_BV=[[0.0] * 6, [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]], top_k=2, top_p=1.0)
@example(logits_BV=[[0.0] * 6, [0.0, 9.0, 0.0, 0.0, 0.0, 0.0]], top_k=0, top_p=0.4)
def test_the_fewest_and_most_probable_characters_are_kept(logits_BV, top_k, top_p):
    logits_BV = np.float32(logits_BV)
    kept_BV = np.asarray(keep_probable(jnp.asarray(logits_BV), top_k, top_p))
    for logits_V, kept_V in zip(logits_BV, kept_BV, strict=True):
        sorted_V = np.sort(logits_V)[::-1]
        wanted = sorted_V[: top_k or None]
        if top_p < 1:
            reached = np.cumsum(probabilities(wanted))
            # Else rounding would decide whether the share is reached.
            assume(np.all(np.abs(reached - top_p) > 1e-5))
            wanted = wanted[: 1 + np.sum(reached < top_p)]
        is_kept_V = kept_V > -np.inf
        # Which of those that tie is left open, but not how many.
        np.testing.assert_array_equal(np.sort(kept_V[is_kept_V])[::-1], wanted)
        np.testing.assert_array_equal(kept_V[is_kept_V], logits_V[is_kept_V])
