"""Code the characters of a text by their predicted probabilities, with a range coder.

The decoder needs exactly the probabilities of the encoder, so both run `run_parts`: the same
compiled program on the same values. A text is cut into parts of about PART_CHARS characters, which
are the rows of one batch; each begins from an empty state, and its first character has the
probability 1 / V. This costs about 15 bits per part, and the time does not grow with the text.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm.errors import RunError
from charlstm.model import Carry, CharLSTM, predict, zero_carry
from charlstm.system.extras import import_extra

PART_CHARS = 2**14
MAX_PARTS = 2**10


class Coded(NamedTuple):
    """A coded text."""

    raw: bytes
    nats: float  # minus the sum of the logarithms of the probabilities of its characters
    num_parts: int


@partial(jax.jit, static_argnames="model")
def coding_step(
    model: CharLSTM, params: Any, carry: Carry, ids_B: jax.Array
) -> tuple[Carry, jax.Array]:
    """Read one character per row: (params, carry, ids_B) -> (carry, probs_BV) of the next, pure."""
    logits_B1V, carry = predict(model, params, ids_B[:, None], carry)
    return carry, jax.nn.softmax(logits_B1V[:, 0])


def num_parts(num_chars: int) -> int:
    """Return B, the number of parts of a text."""
    return max(1, min(MAX_PARTS, -(-num_chars // PART_CHARS)))


def run_parts(
    model: CharLSTM,
    params: Any,
    num_chars: int,
    code: Callable[[int, np.ndarray], np.ndarray],
    advance: Callable[[int], Any],
) -> np.ndarray:
    """Return ids_M of a text of M = `num_chars` characters, which `code` encodes or decodes.

    Args:
      model: the language model. Its recurrence is replaced by 'fused', which every machine has.
      params: its parameters.
      num_chars: M.
      code: (step, probs_BV) -> ids_B, the characters of index `step` in all parts that have one,
        given their probabilities in float64.
      advance: called with the number of characters of each step.
    """
    model = model.clone(recurrence="fused")
    rows = num_parts(num_chars)
    length = -(-num_chars // rows)
    ids_SB = np.zeros((length, rows), np.int32)
    carry = zero_carry(model, rows)
    probs_BV = np.full((rows, model.vocab_size), 1 / model.vocab_size)
    for step in range(length):
        # The last parts may end before the others.
        count = int(np.sum(np.arange(rows) * length + step < num_chars))
        ids_SB[step, :count] = code(step, probs_BV[:count])
        advance(count)
        if step + 1 < length:
            carry, probs = coding_step(model, params, carry, jax.device_put(ids_SB[step]))
            probs_BV = np.asarray(probs).astype(np.float64)
    return ids_SB.T.reshape(-1)[:num_chars]


def encode(
    model: CharLSTM, params: Any, ids_M: np.ndarray, advance: Callable[[int], Any] = int
) -> Coded:
    """Return the code of a text, which may be empty.

    Raises:
      UserError: if constriction is not installed.
      RunError: if a probability is not finite.
    """
    constriction = import_coder()
    coder = constriction.stream.queue.RangeEncoder()
    family = constriction.stream.model.Categorical(perfect=False)
    rows = num_parts(len(ids_M))
    length = -(-len(ids_M) // rows)
    nats = 0.0

    def code(step: int, probs_BV: np.ndarray) -> np.ndarray:
        nonlocal nats
        ids_B = ids_M[step::length].astype(np.int32)
        if not np.all(np.isfinite(probs_BV)):
            raise RunError("the weights give probabilities that are NaN; try another --checkpoint")
        coder.encode(ids_B, family, probs_BV)
        # The coder gives no character a probability below 2**-24.
        chosen_B = np.maximum(probs_BV[np.arange(len(ids_B)), ids_B], 2.0**-24)
        nats -= math.fsum(np.log(chosen_B))
        return ids_B

    run_parts(model, params, len(ids_M), code, advance)
    return Coded(coder.get_compressed().astype("<u4").tobytes(), nats, rows)


def decode(
    model: CharLSTM, params: Any, raw: bytes, num_chars: int, advance: Callable[[int], Any] = int
) -> np.ndarray | None:
    """Return the ids_M that `encode` coded, or None if `raw` is no code of these probabilities.

    A code of other probabilities may give another text, too.

    Raises:
      UserError: if constriction is not installed.
    """
    constriction = import_coder()
    words = np.frombuffer(raw, "<u4").astype(np.uint32)
    coder = constriction.stream.queue.RangeDecoder(words)
    family = constriction.stream.model.Categorical(perfect=False)
    try:
        return run_parts(
            model, params, num_chars, lambda step, probs_BV: coder.decode(family, probs_BV), advance
        )
    except (AssertionError, ValueError):  # constriction's errors for such a code
        return None


def import_coder() -> Any:
    """Return the package constriction; raise UserError if it is not installed."""
    return import_extra("constriction", "compress", "launch/compress.py")
