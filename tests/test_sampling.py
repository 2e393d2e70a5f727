"""Writing: each character is drawn as asked, from what the model says of those before it."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_params
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from charlstm import sampling, streaming
from charlstm.data.vocab import Vocab
from charlstm.filters import Settings, filter_top_k_top_p
from charlstm.model import CharLSTM, predict, zero_carry
from charlstm.sampling import (
    draw_uniforms,
    make_sampler,
    sample_step,
    sample_token,
)
from charlstm.streaming import stream

# All different, so that no two axes can be mixed up unnoticed: prompts, window, text, vocabulary.
B, P, SEQ_LEN, L, V = 3, 9, 7, 25, 11
MODEL = CharLSTM(vocab_size=V, hidden_size=12, num_layers=2)

DEFAULTS = {
    "temperature": np.float32(1),
    "top_k": np.int32(0),
    "top_p": np.float32(1),
    "min_p": np.float32(0),
}

each_method = pytest.mark.parametrize("method", ["carry", "window"])


# So large that the most probable character is another one each time.
PARAMS = jax.tree.map(jnp.asarray, random_params(MODEL, scale=1.5, seed=1))
PROMPT_BP = np.random.default_rng(1).integers(V, size=(B, P), dtype=np.int32)
predict_ids = jax.jit(partial(predict, MODEL, PARAMS))


# Shared by all tests that call it with options from for_rows(B).
step_compiled = jax.jit(partial(sample_step, model=MODEL))


def for_rows(num_rows, more_defaults=None, **options):
    """Return all options, each as an array over rows, so that one program serves all tests."""
    return {
        name: np.broadcast_to(np.asarray(options.get(name, default), default.dtype), num_rows)
        for name, default in (DEFAULTS | (more_defaults or {})).items()
    }


@lru_cache
def compiled_sampler(method, length):
    return jax.jit(make_sampler(MODEL, length, method=method, seq_len=SEQ_LEN))


def write(method="carry", prompt_BP=PROMPT_BP, seed=0, length=L, **options):
    sampler = compiled_sampler(method, length)
    options = for_rows(len(prompt_BP), {"lengths_B": np.int32(prompt_BP.shape[1])}, **options)
    return np.asarray(sampler(PARAMS, prompt_BP, jax.random.key(seed), **options))


def write_in_pieces(method="carry", prompts=PROMPT_BP, seed=0, **settings):
    options = {"length": L, "method": method, "seq_len": SEQ_LEN} | settings
    return list(stream(MODEL, PARAMS, prompts, jax.random.key(seed), **options))


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
def test_a_text_goes_on_where_its_prompt_ends(method):
    shorter = P - 2
    text_BL = write(method, temperature=0.0, lengths_B=shorter)
    prompt_BP = np.concatenate([PROMPT_BP[:, :shorter], text_BL[:, :2]], axis=1)
    rest_BL = write(method, prompt_BP, temperature=0.0)
    np.testing.assert_array_equal(rest_BL[:, : L - 2], text_BL[:, 2:])


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


PER_ROW = {
    "temperature": np.float32([0.0, 1.5, 0.7]),
    "top_k": np.int32([0, 4, 0]),
    "top_p": np.float32([1.0, 1.0, 0.8]),
    "min_p": np.float32([0.0, 0.2, 0.05]),
}


@each_method
def test_settings_length_and_type_of_ids_do_not_change_a_text(method):
    sampler = make_sampler(MODEL, L + 6, method=method, seq_len=SEQ_LEN)
    # Settings that are known at tracing time, a longer text, and ids as Vocab.encode returns them.
    fixed = jax.jit(partial(sampler, temperature=0.8, top_k=5, top_p=0.9))
    vocab = Vocab.from_text("abcdefghijk")
    prompt_BP = np.stack([vocab.encode(vocab.decode(row)) for row in PROMPT_BP])
    assert prompt_BP.dtype == np.uint8
    found_BL = np.asarray(fixed(PARAMS, prompt_BP, jax.random.key(2)))
    traced_BL = write(method, seed=2, temperature=0.8, top_k=5, top_p=0.9)
    np.testing.assert_array_equal(found_BL[:, :L], traced_BL)
    assert np.any(traced_BL != write(method, seed=2))


@each_method
def test_each_row_may_have_settings_of_its_own(method):
    together_BL = write(method, seed=3, **PER_ROW)
    for row in range(B):
        shared = {name: values_B[row] for name, values_B in PER_ROW.items()}
        np.testing.assert_array_equal(together_BL[row], write(method, seed=3, **shared)[row])


@each_method
def test_a_text_of_temperature_0_is_the_same_for_every_key(method):
    texts = [write(method, seed=seed, temperature=0.0) for seed in range(3)]
    np.testing.assert_array_equal(texts[1:], [texts[0]] * 2)


LENGTHS_B = np.array([P - 2, P, P - 1])


@each_method
def test_a_row_depends_on_its_own_prompt_alone(method):
    # Ids that do not exist, where a prompt has ended.
    padded_BP = np.where(np.arange(P) < LENGTHS_B[:, None], PROMPT_BP, 200)
    found_BL = write(method, padded_BP, seed=5, lengths_B=LENGTHS_B)
    for row, length in enumerate(LENGTHS_B):
        others_BP = np.random.default_rng(row).integers(V, size=(B, P), dtype=np.int32)
        others_BP[row, :length] = PROMPT_BP[row, :length]
        lengths_B = np.roll(LENGTHS_B, 1)
        lengths_B[row] = length
        changed_BL = write(method, others_BP, seed=5, lengths_B=lengths_B)
        np.testing.assert_array_equal(np.any(found_BL != changed_BL, axis=1), np.arange(B) != row)
    # Nor does it depend on the number of rows or on padding.
    alone_1L = write(method, PROMPT_BP[:1, : LENGTHS_B[0]], seed=5)
    np.testing.assert_array_equal(found_BL[:1], alone_1L)


@each_method
@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_streaming_yields_what_the_sampler_writes(method, chunk):
    prompts = [ids_P[:length] for ids_P, length in zip(PROMPT_BP, LENGTHS_B, strict=True)]
    wanted_BL = write(method, seed=8, lengths_B=LENGTHS_B, **PER_ROW)
    pieces = write_in_pieces(method, prompts, seed=8, chunk=chunk, **PER_ROW)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), wanted_BL)
    # The piece in which the prompt ends may be shorter.
    assert all(piece.shape[1] == min(chunk, L) for piece in pieces[1:-1])


@each_method
def test_streaming_compiles_once_and_calls_once_per_chunk(method, monkeypatch):
    traced = []

    def traced_predict(*args):
        traced.append(args)
        return predict(*args)

    wanted_BL = write(method, seed=9)
    monkeypatch.setattr(sampling, "predict", traced_predict)
    # A size that no other test compiles, and that takes several calls.
    monkeypatch.setattr(streaming, "CHUNK_LEN", 6)
    pieces = write_in_pieces(method, seed=9)
    assert len(pieces) >= L // 6
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), wanted_BL)
    num_traced = len(traced)
    assert num_traced > 0
    write_in_pieces(method, length=2 * L, temperature=0.5, top_k=3, top_p=0.9)
    write_in_pieces(method, temperature=1, top_k=np.arange(B), chunk=3, min_p=0.1)
    write_in_pieces(method, PROMPT_BP[:, :-1].astype(np.uint8), length=1, temperature=0)
    write_in_pieces(method, [*PROMPT_BP[:-1], np.tile(PROMPT_BP[-1], 80)])
    assert len(traced) == num_traced


@pytest.mark.parametrize(
    ("method", "lengths", "message"),
    [
        (
            "window",
            [P, SEQ_LEN - 1, P],
            f"prompt: has {SEQ_LEN - 1} characters; .* at least {SEQ_LEN}",
        ),
        ("carry", [P, P, 0], "prompt: has 0 characters; .* at least 1"),
        ("carry", [P + 1, P, P], f"lengths_B: {P + 1}, in a prompt_BP of {P} characters"),
    ],
)
def test_a_prompt_of_a_wrong_length_is_refused(method, lengths, message):
    sampler = make_sampler(MODEL, L, method=method, seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match=message):
        sampler(PARAMS, PROMPT_BP, jax.random.key(0), lengths_B=np.array(lengths))
    if max(lengths) <= P:
        prompts = [ids_P[:length] for ids_P, length in zip(PROMPT_BP, lengths, strict=True)]
        with pytest.raises(ValueError, match=message):
            write_in_pieces(method, prompts)


def test_short_prompts_with_traced_lengths_raise():
    with pytest.raises(ValueError, match=f"prompt: has {SEQ_LEN - 1} characters"):
        write("window", PROMPT_BP[:, : SEQ_LEN - 1], lengths_B=LENGTHS_B)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (PROMPT_BP[0], "prompt_BP: must have two axes"),
        (np.float32(PROMPT_BP), "prompt_BP: must be integers"),
        (PROMPT_BP + V, f"prompt_BP: ids are 0 to {V - 1}"),
        (PROMPT_BP[:, :0], "prompt: has 0 characters"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(MODEL, L)(PARAMS, prompt, jax.random.key(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk": 0}, "chunk=0: must be"),
        ({"length": -1}, "length=-1: must be"),
        ({"prompts": []}, "the number of prompts=0: must be"),
        ({"prompts": PROMPT_BP[:, None]}, "prompts: must have one axis"),
        ({"prompts": PROMPT_BP + V}, f"prompts: ids are 0 to {V - 1}"),
    ],
)
def test_a_stream_of_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        write_in_pieces(**arguments)


def test_invalid_ids_give_ids_that_decode_to_nothing():
    # A compiled sampler cannot raise an error for numbers that it does not know yet.
    prompt_BP = PROMPT_BP.copy()
    prompt_BP[1, 0] = V
    found_BL = write("carry", prompt_BP)
    assert np.all(found_BL[1] < 0)
    np.testing.assert_array_equal(found_BL[::2], write("carry")[::2])
    with pytest.raises(ValueError, match=r"ids: .*-1"):
        Vocab("abcdefghijk").decode(found_BL[1])


@each_method
def test_a_text_of_no_characters_has_none(method):
    sampler = make_sampler(MODEL, 0, method=method, seq_len=SEQ_LEN)
    assert jax.eval_shape(sampler, PARAMS, PROMPT_BP, jax.random.key(0)).shape == (B, 0)
    assert write_in_pieces(method, length=0) == []


@each_method
def test_a_sampler_is_exported_once_for_all_sizes_of_its_prompts(method):
    batch_size, width = jax.export.symbolic_shape("B, P", constraints=[f"P >= {SEQ_LEN}"])
    sampler = jax.jit(make_sampler(MODEL, L, method=method, seq_len=SEQ_LEN))
    prompt = jax.ShapeDtypeStruct((batch_size, width), jnp.int32)
    key = jax.random.key(0)
    exported = jax.export.export(sampler)(PARAMS, prompt, jax.eval_shape(lambda: key))
    found_BL = exported.call(PARAMS, PROMPT_BP, key)
    np.testing.assert_array_equal(found_BL, write(method))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method='other'"):
        make_sampler(MODEL, L, method="other")
    with pytest.raises(ValueError, match="method='other'"):
        write_in_pieces("other")


def test_the_sampler_is_a_loop_of_sample_step():
    key = jax.random.key(10)
    _, carry = predict_ids(PROMPT_BP[:, :-1], zero_carry(MODEL, B))
    ids_B, written = PROMPT_BP[:, -1], []
    for index in range(L):
        key_of_step = jax.random.fold_in(key, index)
        carry, ids_B = step_compiled(PARAMS, carry, ids_B, key_of_step, **PER_ROW)
        written.append(ids_B)
    np.testing.assert_array_equal(np.stack(written, axis=1), write(seed=10, **PER_ROW))


def test_sample_step_works_in_a_loop_of_ones_own():
    keys = jax.random.split(jax.random.key(9), L)
    step = partial(sample_step, model=MODEL, temperature=0.7)

    def body(memory, key):
        carry, ids_B = step(PARAMS, *memory, key)
        return (carry, ids_B), ids_B

    memory = zero_carry(MODEL, B), jnp.asarray(PROMPT_BP[:, 0])
    (last_carry, _), scanned_LB = jax.jit(partial(jax.lax.scan, body))(memory, keys)

    carry, ids_B = memory
    for key, scanned_B in zip(keys, scanned_LB, strict=True):
        options = for_rows(B, temperature=0.7)
        carry, ids_B = step_compiled(PARAMS, carry, ids_B, key, **options)
        np.testing.assert_array_equal(ids_B, scanned_B)
    assert_close(last_carry, carry)
    assert len(set(np.asarray(scanned_LB).flat)) > 4


def test_sample_step_maps_over_keys_and_over_models():
    keys = jax.random.split(jax.random.key(10), 5)
    factors = np.linspace(0.5, 1.5, 5, dtype=np.float32)
    many = jax.tree.map(lambda leaf: np.multiply.outer(factors, leaf), PARAMS)
    step = partial(sample_step, model=MODEL)
    carry, ids_B = zero_carry(MODEL, B), jnp.asarray(PROMPT_BP[:, 0])
    mapped = jax.jit(jax.vmap(step, in_axes=(0, None, None, 0)))
    found = mapped(many, carry, ids_B, keys)
    for index, key in enumerate(keys):
        params, (found_carry, found_B) = jax.tree.map(lambda leaf, i=index: leaf[i], (many, found))
        wanted_carry, wanted_B = step_compiled(params, carry, ids_B, key, **for_rows(B))
        np.testing.assert_array_equal(found_B, wanted_B)
        assert_close(found_carry, wanted_carry)
    assert len({tuple(row) for row in np.asarray(found[1])}) > 1


def probabilities(logits_V):
    exp_V = np.exp(np.float64(logits_V) - np.max(logits_V))
    return exp_V / exp_V.sum()


def kept_by_oracle(probs_V, top_k, top_p, min_p=0.0):
    """Return the ids that are kept, by plain counting; where it is close, assume() it away."""
    ids = np.argsort(-probs_V, kind="stable")[: top_k or None]
    shares = probs_V / probs_V.max()
    # Else rounding would decide whether the share is reached.
    assume(np.all(np.abs(shares - min_p) > 1e-5) or min_p in (0, 1))
    if top_p < 1:
        reached = np.cumsum(probs_V[ids]) / probs_V[ids].sum()
        assume(np.all(np.abs(reached - top_p) > 1e-5))
        ids = ids[: 1 + np.sum(reached < top_p)]
    return ids[shares[ids] >= min_p]


@jax.jit
def sample_token_compiled(uniforms_B, logits_BV, **settings):
    return sample_token(uniforms_B, logits_BV, Settings(**settings))


LARGEST = np.float32(1 - 2**-24)  # the largest number below 1
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
        # The shares of the highest are 0.45, 0.21, 1, 0.61, 0.09 and 0.78.
        ({"temperature": 2.0, "min_p": 0.4}, [0, 2, 3, 5]),
    ],
)
def test_characters_are_as_frequent_as_probable(settings, kept):
    n = 20_000
    uniforms_n = draw_uniforms(jax.random.key(11), n)
    options = {"top_k": 0, "top_p": 1.0} | settings
    ids_n = np.asarray(sample_token_compiled(uniforms_n, np.tile(LOGITS_V, (n, 1)), **options))
    kept = list(kept)
    wanted_V = np.zeros(len(LOGITS_V))
    wanted_V[kept] = n * probabilities(LOGITS_V[kept] / settings["temperature"])
    counts_V = np.bincount(ids_n, minlength=len(LOGITS_V))
    assert counts_V.sum() == counts_V[kept].sum()
    chi_squared = np.sum((counts_V[kept] - wanted_V[kept]) ** 2 / wanted_V[kept])
    # Of 5 degrees of freedom or fewer, it is above 36 once in a million.
    assert chi_squared < 36, (counts_V, wanted_V)


def test_the_draws_of_all_rows_and_steps_are_independent():
    key_of_step = partial(jax.random.fold_in, jax.random.key(12))
    draw = jax.jit(jax.vmap(lambda step: draw_uniforms(key_of_step(step), 100)))
    uniforms_TB = np.asarray(draw(np.arange(300)))
    assert np.all((uniforms_TB >= 0) & (uniforms_TB < 1))
    n = uniforms_TB.size
    centred_TB = uniforms_TB - 0.5
    # Five standard deviations: of a mean of uniforms, and of a mean of products of two.
    assert abs(np.mean(centred_TB)) < 5 / np.sqrt(12 * n)
    for next_TB in (np.roll(centred_TB, 1, axis=0), np.roll(centred_TB, 1, axis=1)):
        assert abs(np.mean(centred_TB * next_TB)) < 5 / (12 * np.sqrt(n))
    # And a row keeps its numbers in a batch of another size.
    np.testing.assert_array_equal(draw_uniforms(key_of_step(7), 3), uniforms_TB[7, :3])


def test_temperature_0_picks_the_first_of_the_largest():
    rng = np.random.default_rng(12)
    # So few values that many rows have two of the largest.
    logits_BV = rng.integers(4, size=(50, V)).astype(np.float32)
    uniforms_B = np.linspace(0, LARGEST, 50, dtype=np.float32)
    ids_B = sample_token_compiled(uniforms_B, logits_BV, temperature=0.0)
    np.testing.assert_array_equal(ids_B, np.argmax(logits_BV, axis=-1))


def test_temperatures_that_are_all_but_0_pick_the_largest():
    logits_BV = np.float32(9 * np.random.default_rng(13).normal(size=(50, V)))
    uniforms_B = np.linspace(0, LARGEST, 50, dtype=np.float32)
    for temperature in (1e-5, 1e-30):
        ids_B = sample_token_compiled(uniforms_B, logits_BV, temperature=temperature)
        np.testing.assert_array_equal(ids_B, np.argmax(logits_BV, axis=-1))


def test_a_character_of_probability_zero_is_never_sampled():
    rng, n, vocab_size = np.random.default_rng(14), 4000, 1000
    logits_BV = rng.normal(size=(n, vocab_size)).astype(np.float32)
    logits_BV[rng.random(size=(n, vocab_size)) < 0.5] = -np.inf
    # Where one of those has the sum of all before it, which rounding may lift or lower.
    sums_BV = np.cumsum(np.exp(logits_BV), axis=-1, dtype=np.float64)
    edges_BV = np.where(logits_BV == -np.inf, sums_BV / sums_BV[:, -1:], 0)
    uniforms_B = edges_BV[np.arange(n), rng.integers(vocab_size, size=n)].astype(np.float32)
    uniforms_B = np.minimum(uniforms_B, LARGEST)
    ids_B = sample_token_compiled(uniforms_B, logits_BV, temperature=1.0)
    assert np.all(logits_BV[np.arange(n), ids_B] > -np.inf)


# Equal, or so far apart that their exponentials differ in float32 too, as they do in the oracle.
LOGITS = st.integers(-1024, 1024).map(lambda number: number / 128)


def test_logits_with_equal_float32_exponentials_are_ties():
    logits_1V = np.full((1, V), -1.0, np.float32)
    logits_1V[0, [2, 9]] = 0.0, 1e-8
    options = {"temperature": 0.8, "top_k": 1}
    for uniform in (0.0, 0.5, LARGEST):
        assert sample_token_compiled(np.float32([uniform]), logits_1V, **options)[0] == 2
    # Temperature 0 compares the logits themselves.
    assert sample_token_compiled(np.float32([0.5]), logits_1V, temperature=0.0)[0] == 9


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    logits_V=st.lists(st.one_of(LOGITS, st.just(-np.inf)), min_size=V, max_size=V),
    uniform=st.floats(0, float(LARGEST), width=32),
    temperature=st.sampled_from([0.0, 0.05, 0.8, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.3]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
)
def test_a_pick_inverts_the_distribution_of_what_is_kept(
    logits_V, uniform, temperature, top_k, top_p, min_p
):
    assume(max(logits_V) > -np.inf)
    logits_BV = np.float32([logits_V, logits_V])
    # A neighbour with other settings changes nothing.
    both = {"temperature": 1.0, "top_k": 2, "top_p": 0.5, "min_p": 0.3}
    ours = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options = {name: np.array([ours[name], both[name]]) for name in both}
    found = int(sample_token_compiled(np.float32([uniform, 0.5]), logits_BV, **options)[0])
    if temperature == 0:
        assert found == np.argmax(logits_V)
        return
    probs_V = probabilities(np.array(logits_V) / temperature)
    kept = kept_by_oracle(probs_V, top_k, top_p, min_p)
    assert found in kept
    assert probs_V[found] > 0
    kept = np.sort(kept)
    reached = np.cumsum(probs_V[kept]) / probs_V[kept].sum()
    # In 32 bits the sums are this exact.
    below, above = (np.sum(reached < uniform + slack) for slack in (-1e-5, 1e-5))
    assert below <= np.searchsorted(kept, found) <= above


keep_compiled = jax.jit(filter_top_k_top_p)
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
    weights_BV = np.exp(np.float32(logits_BV))
    kept_BV = np.asarray(keep_compiled(weights_BV, top_k, top_p))
    for weights_V, kept_V in zip(weights_BV, kept_BV, strict=True):
        wanted = kept_by_oracle(weights_V, top_k, top_p)
        np.testing.assert_array_equal(np.flatnonzero(kept_V), np.sort(wanted))
        np.testing.assert_array_equal(kept_V[wanted], weights_V[wanted])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", -1), ("temperature", np.nan), ("top_k", -1), ("top_p", 0.0)),
        *(("top_p", 2), ("min_p", -0.1), ("min_p", 1.1)),
        *(("repetition_penalty", -1.0), ("repetition_length", 0)),
    ],
)
def test_samplers_refuse_invalid_options(option, value):
    sampler = make_sampler(MODEL, length=3)
    arguments = PARAMS, jnp.asarray(PROMPT_BP), jax.random.key(0)
    for options in ({option: value}, {option: np.array([0.5, value, 0.5])}):
        with pytest.raises(ValueError, match=f"^{option}="):
            sampler(*arguments, **options)
    with pytest.raises(TypeError, match="topk"):
        sampler(*arguments, topk=3)
