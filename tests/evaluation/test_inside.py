import jax
import numpy as np
import optax
import pytest
from helpers import FLOAT32, assert_close

from charlstm import CharLSTM, init_state, zero_carry
from charlstm.evaluation.inside import CHUNK, record_states
from charlstm.model import hidden_states

V, H = 7, 6
END_ID = 3


@pytest.fixture(scope="module")
def trained():
    """Return (model, params, ids_M); the text has documents and is longer than two chunks."""
    model = CharLSTM(vocab_size=V, hidden_size=H, num_layers=2, end_id=END_ID)
    params = init_state(model, optax.identity(), jax.random.key(0), 1).params
    params = jax.tree.map(lambda leaf: 3 * leaf, params)  # so that what is read matters
    return model, params, np.random.default_rng(0).integers(0, V, 2 * CHUNK + 5)


def test_states_in_chunks_are_those_of_one_whole_call(trained):
    model, params, ids_M = trained
    whole = jax.jit(lambda ids_BT: hidden_states(model, params, ids_BT, zero_carry(model, 1)))
    wanted = jax.tree.map(lambda leaf_BTH: np.asarray(leaf_BTH)[0], whole(ids_M[None]))
    found = record_states(model, params, ids_M)
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [(len(ids_M), H)] * 12
    assert {type(leaf) for leaf in jax.tree.leaves(found)} == {np.ndarray}
    assert_close(found, wanted, FLOAT32)


def test_states_are_those_of_a_carry_that_documents_reset(trained):
    model, params, ids_M = trained
    found = record_states(model, params, ids_M[:40])
    predict = jax.jit(model.apply)
    carry = zero_carry(model, 1)
    for place, token in enumerate(ids_M[:40]):
        if token == END_ID:
            carry = zero_carry(model, 1)
        _, carry = predict({"params": params}, np.full((1, 1), token), carry)
        here = tuple((states.c_BTH[place], states.h_BTH[place]) for states in found)
        assert_close(here, jax.tree.map(lambda leaf_BH: np.asarray(leaf_BH)[0], carry))
    assert (ids_M[:40] == END_ID).any()


@pytest.mark.parametrize("ids_M", [np.zeros(0, int), np.array([V]), np.zeros((1, 3), int)])
def test_states_of_what_is_no_text_are_refused(trained, ids_M):
    with pytest.raises(ValueError, match="ids_M"):
        record_states(*trained[:2], ids_M)
