"""The states and gates of a trained model at every character of a text."""

from functools import partial
from typing import Any

import jax
import numpy as np

from charlstm.checks import check_ids
from charlstm.lstm.reference import LayerStates
from charlstm.model import Carry, CharLSTM, hidden_states, zero_carry

CHUNK = 512  # characters per call


def record_states(model: CharLSTM, params: Any, ids_M: np.ndarray) -> tuple[LayerStates, ...]:
    """Return LayerStates for each layer, with NumPy arrays of the shape [M, H] in each field.

    Row m has the state after the model has read character m. The text is read in order from an
    empty state, and the carry is reset where a document ends, as in stateful evaluation. The device
    holds the states of CHUNK characters at a time; the result takes 24 M H bytes for each layer.

    Args:
      model, params: as load_model returns them.
      ids_M: the ids of the text.

    Raises:
      ValueError: if `ids_M` is empty, or not ids of the model's vocabulary.
    """
    check_ids("ids_M", ids_M, model.vocab_size, ndim=1)
    if not len(ids_M):
        raise ValueError("ids_M: must have at least one character")

    def read(params: Any, ids_BT: jax.Array, carry: Carry) -> tuple[tuple[LayerStates, ...], Carry]:
        layers = hidden_states(model, params, ids_BT, carry)
        return layers, tuple((states.c_BTH[:, -1], states.h_BTH[:, -1]) for states in layers)

    step, carry, chunks = jax.jit(read), zero_carry(model, 1), []
    for start in range(0, len(ids_M), CHUNK):
        ids_T = np.asarray(ids_M[start : start + CHUNK], np.int32)
        # Padded, so that all chunks have one shape; no state before the padding depends on it.
        padded_BT = np.pad(ids_T, (0, CHUNK - len(ids_T)))[None]
        layers, carry = step(params, jax.device_put(padded_BT), carry)
        first = partial(_first_row, length=len(ids_T))
        chunks.append(jax.tree.map(first, layers))
    return jax.tree.map(lambda *leaves_TH: np.concatenate(leaves_TH), *chunks)


def _first_row(leaf_BTH: jax.Array, length: int) -> np.ndarray:
    return np.array(jax.device_get(leaf_BTH)[0, :length])
