"""The random streams of a run share nothing with each other."""

from functools import partial
from itertools import combinations

import jax
import numpy as np
import optax
import pytest

from charlstm import CharLSTM, derive_key, init_state, make_sampler
from charlstm.keys import STREAMS
from charlstm.sampling import draw_uniforms


def bits(key):
    return tuple(jax.random.key_data(key).tolist())


def test_no_two_streams_share_a_key_nor_one_that_is_derived_from_it():
    used = {}
    for stream in STREAMS:
        key = derive_key(jax.random.key(0), stream)
        used[stream] = {bits(key), *(bits(jax.random.fold_in(key, index)) for index in range(50))}
    for one, other in combinations(STREAMS, 2):
        assert not used[one] & used[other]


def test_the_state_has_the_key_of_its_stream_and_initial_parameters_of_theirs():
    model, key = CharLSTM(5, 3), jax.random.key(7)
    state = jax.jit(partial(init_state, model, optax.sgd(1.0), batch_size=2))(key)
    assert bits(state.key) == bits(derive_key(key, "dropout"))
    ids_BT = np.zeros((2, 1), np.int32)
    wanted = jax.jit(model.init)(derive_key(key, "params"), ids_BT, state.carry)["params"]
    jax.tree.map(np.testing.assert_array_equal, state.params, wanted)


def test_the_streams_of_parameters_and_dropout_are_the_two_halves_of_a_split_key():
    # On this rest the published figures: they were trained with such keys.
    key = jax.random.key(3)
    halves = [bits(half) for half in jax.random.split(key)]
    assert halves == [bits(derive_key(key, stream)) for stream in ("params", "dropout")]


def test_another_stream_is_refused():
    with pytest.raises(ValueError, match="stream='data': must be one of params, dropout, sample"):
        derive_key(jax.random.key(0), "data")


def test_a_sample_is_drawn_by_its_own_stream():
    # Equal logits: each character is then the number of its uniform number's interval.
    model, key = CharLSTM(8, 3), derive_key(jax.random.key(0), "sample")
    state = init_state(model, optax.sgd(1.0), jax.random.key(0), 1)
    even = jax.tree.map(np.zeros_like, state.params)
    found_1L = make_sampler(model, 6)(even, np.zeros((1, 1), np.int32), key)
    uniforms = [float(draw_uniforms(jax.random.fold_in(key, index), 1)[0]) for index in range(6)]
    np.testing.assert_array_equal(found_1L[0], np.floor(8 * np.array(uniforms)))
