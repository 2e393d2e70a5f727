"""How much each character of a text surprises a model: its bits, its rank and the alternatives.

The surprise of a character is -log2 of its probability given the characters before it. The mean
over a text is its bits per character.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.checks import check_count, check_ids
from charlstm.model import Carry, CharLSTM, predict, zero_carry

# Characters that one compiled call predicts: in one pass, or each from its own window.
CHUNK_LEN, CHUNK_WINDOWS = 512, 64


class Predictions(NamedTuple):
    """The predictions of M characters of a text, each given the characters before it.

    A character without a prediction, such as the first, has NaN bits and entropy, the rank 0, the
    ids -1 and probabilities of 0.
    """

    bits_M: np.ndarray  # float32, the surprise
    entropy_M: np.ndarray  # float32, bits: the expected surprise
    rank_M: np.ndarray  # int32, 1 for the most probable character; of equal ones, the lower id
    top_ids_MK: np.ndarray  # int32, the K most probable characters, the most probable one first
    top_probs_MK: np.ndarray  # float32, their probabilities


def predict_text(
    model: CharLSTM, params: Any, ids_M: np.ndarray, num_top: int = 5, window: int | None = None
) -> Predictions:
    """Return the predictions of a text that is read in one pass from an empty state.

    The mean of the bits is the bits per character of `evaluate`, stateful, up to rounding. The
    memory on the device does not depend on M.

    Args:
      model, params: as load_model returns them.
      ids_M: the text. A model with an end_id empties its state there, as in training.
      num_top: K, or V where the model has fewer characters.
      window: predict each character from an empty state and the `window` characters before it, as
        `evaluate` does for a run of config.data.order=windows with window=config.seq_len. The first
        `window` characters are not predicted.

    Raises:
      ValueError: if an id is not below V, or `num_top` or `window` is below 1.
    """
    [predictions] = predict_pieces(model, params, [np.asarray(ids_M)], num_top, window)
    return predictions


def predict_pieces(
    model: CharLSTM,
    params: Any,
    pieces: Iterable[np.ndarray],
    num_top: int = 5,
    window: int | None = None,
) -> Iterator[Predictions]:
    """Yield the predictions of each piece ids_M of one text, as soon as the piece is given.

    They are those of predict_text for the whole text, bit for bit, wherever the pieces end. A piece
    may be empty. At most a piece and some hundred characters are held.

    Args:
      model, params, num_top, window: as for predict_text.
      pieces: the text, cut anywhere.

    Raises:
      ValueError: as predict_text does.
    """
    check_count("num_top", num_top)
    check_count("window", 1 if window is None else window)
    num_top = min(num_top, model.vocab_size)
    # A chunk predicts `size` characters; `lead` characters come before them.
    lead, size = (1, CHUNK_LEN) if window is None else (window, CHUNK_WINDOWS)
    params = jax.device_put(params)
    carry, num_known, num_missing = zero_carry(model, 1), 0, lead
    # Where a chunk is not complete, its characters are read again with the next piece, so that one
    # compiled shape serves all pieces and the result does not depend on them.
    chunk_ids = np.zeros(0, np.int32)
    for piece_M in pieces:
        check_ids("ids_M", piece_M, model.vocab_size, ndim=1)
        chunk_ids = np.concatenate([chunk_ids, piece_M.astype(np.int32)])
        found = [_nothing(min(len(piece_M), num_missing), num_top)]
        num_missing -= len(found[0].rank_M)
        while (count := min(len(chunk_ids) - lead, size)) > num_known:
            given_T = np.zeros(lead + size, np.int32)
            given_T[: lead + count] = chunk_ids[: lead + count]
            # Explicit, because jax.transfer_guard forbids implicit transfers.
            ids_T = jax.device_put(given_T)
            new_carry, outputs = predict_chunk(model, params, carry, ids_T, num_top, window)
            found.append(Predictions(*(np.asarray(leaf)[num_known:count] for leaf in outputs)))
            num_known = count
            if count == size:
                carry, chunk_ids, num_known = new_carry, chunk_ids[size:], 0
        yield Predictions(*map(np.concatenate, zip(*found, strict=True)))


@partial(jax.jit, static_argnames=("model", "num_top", "window"))
def predict_chunk(
    model: CharLSTM, params: Any, carry: Carry, ids_T: jax.Array, num_top: int, window: int | None
) -> tuple[Carry, tuple[jax.Array, ...]]:
    """Return the new carry, and the fields of Predictions of all characters but the leading ones.

    Without a `window` the first of ids_T leads; otherwise the first `window` do, and the carry is
    not read.
    """
    if window is None:
        logits_1TV, carry = predict(model, params, ids_T[None, :-1], carry)
        logits_TV, targets_T = logits_1TV[0], ids_T[1:]
    else:
        targets_T = ids_T[window:]
        starts_B = jnp.arange(len(targets_T))
        inputs_BT = ids_T[starts_B[:, None] + jnp.arange(window)[None]]
        logits_BTV, _ = predict(model, params, inputs_BT, zero_carry(model, len(targets_T)))
        logits_TV = logits_BTV[:, -1]
    log_probs_TV = jax.nn.log_softmax(logits_TV)
    top_logs_TK, top_ids_TK = jax.lax.top_k(log_probs_TV, num_top)
    own_T1 = jnp.take_along_axis(log_probs_TV, targets_T[:, None], axis=1)
    # Of equal characters top_k takes the lowest id first, as argmax does.
    is_earlier_TV = jnp.arange(log_probs_TV.shape[1])[None] < targets_T[:, None]
    is_before_TV = (log_probs_TV > own_T1) | ((log_probs_TV == own_T1) & is_earlier_TV)
    # abs in place of a minus, which would make -0.0 of 0.0.
    bits_T = jnp.abs(own_T1[:, 0]) / math.log(2)
    entropy_T = jnp.sum(jnp.exp(log_probs_TV) * jnp.abs(log_probs_TV), axis=1) / math.log(2)
    rank_T = 1 + jnp.sum(is_before_TV, axis=1, dtype=jnp.int32)
    return carry, (bits_T, entropy_T, rank_T, top_ids_TK, jnp.exp(top_logs_TK))


def _nothing(count: int, num_top: int) -> Predictions:
    """Return the predictions of `count` characters that are not predicted."""
    return Predictions(
        bits_M=np.full(count, np.nan, np.float32),
        entropy_M=np.full(count, np.nan, np.float32),
        rank_M=np.zeros(count, np.int32),
        top_ids_MK=np.full((count, num_top), -1, np.int32),
        top_probs_MK=np.zeros((count, num_top), np.float32),
    )
