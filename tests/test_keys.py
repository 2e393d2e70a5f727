"""The random streams of a run are independent."""

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


def test_streams_share_no_key_and_no_derived_key():
    used = {}
    for stream in STREAMS:
        key = derive_key(jax.random.key(0), stream)
        used[stream] = {bits(key), *(bits(jax.random.fold_in(key, index)) for index in range(50))}
    for one, other in combinations(STREAMS, 2):
        assert not used[one] & used[other]


def test_state_and_initial_params_use_their_streams():
    model, key = CharLSTM(5, 3), jax.random.key(7)
    state = jax.jit(partial(init_state, model, optax.sgd(1.0), batch_size=2))(key)
    assert bits(state.key) == bits(derive_key(key, "dropout"))
    ids_BT = np.zeros((2, 1), np.int32)
    params = jax.jit(model.init)(derive_key(key, "params"), ids_BT, state.carry)["params"]
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


def test_params_and_dropout_keys_are_halves_of_a_split_key():
    # The published results were trained with such keys.
    key = jax.random.key(3)
    halves = [bits(half) for half in jax.random.split(key)]
    assert halves == [bits(derive_key(key, stream)) for stream in ("params", "dropout")]


def test_unknown_stream_is_refused():
    with pytest.raises(ValueError, match="stream='data': must be one of params, dropout, sample"):
        derive_key(jax.random.key(0), "data")


def test_sample_uses_its_stream():
    # With equal logits, the uniform number u gives the character floor(8 u).
    model, key = CharLSTM(8, 3), derive_key(jax.random.key(0), "sample")
    make_state = partial(init_state, model, optax.sgd(1.0), batch_size=1)
    shapes = jax.eval_shape(make_state, jax.random.key(0)).params
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    sample_1L = jax.jit(make_sampler(model, 6))(zeros, np.zeros((1, 1), np.int32), key)
    uniforms = [float(draw_uniforms(jax.random.fold_in(key, index), 1)[0]) for index in range(6)]
    np.testing.assert_array_equal(sample_1L[0], np.floor(8 * np.array(uniforms)))
