"""Writing: each character is drawn as asked, from what the model says of those before it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from charlstm.model import CharLSTM, predict, zero_carry
from charlstm.sample import (
    keep_probable,
    make_sampler,
    make_writer,
    pick,
    sample_step,
    stream,
)

# All different, so that no two axes can be mixed up unnoticed: prompts, window, text, vocabulary.
B, P, SEQ_LEN, L, V = 3, 9, 7, 25, 11
MODEL = CharLSTM(vocab_size=V, hidden_size=12, num_layers=2)

each_method = pytest.mark.parametrize("method", ["carry", "window"])


def draw_params():
    ids_BT = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), ids_BT, zero_carry(MODEL, 1))["params"]
    rng = np.random.default_rng(0)
    # So large that even the most probable characters change all the time.
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0, 1.5, leaf.shape)), shapes)


PARAMS = draw_params()
PROMPT_BP = np.random.default_rng(1).integers(V, size=(B, P), dtype=np.int32)


def write(method="carry", seed=0, prompt_BP=PROMPT_BP, **settings):
    sampler = jax.jit(make_sampler(MODEL, L, method=method, seq_len=SEQ_LEN, **settings))
    return np.asarray(sampler(PARAMS, prompt_BP, jax.random.key(seed)))


def greedy_oracle(method):
    """Return ids_BL by a plain loop that rereads, from an empty carry, all it may know."""
    text_BM = PROMPT_BP
    for _ in range(L):
        # A model with a carry knows all of the text, the window only its last characters.
        known_BT = text_BM if method == "carry" else text_BM[:, -SEQ_LEN:]
        logits_BTV, _ = compiled_predict(known_BT, zero_carry(MODEL, B))
        sorted_BV = np.sort(logits_BTV[:, -1], axis=-1)
        # Else rounding would decide which character is the most probable.
        assert np.all(sorted_BV[:, -1] - sorted_BV[:, -2] > 1e-4)
        ids_B = np.argmax(logits_BTV[:, -1], axis=-1).astype(np.int32)
        text_BM = np.concatenate([text_BM, ids_B[:, None]], axis=1)
    return text_BM[:, P:]
