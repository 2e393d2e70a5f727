"""Bits per character of a held-out text, with standard errors."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from charlstm.data.batches import Batch
from charlstm.model import Carry, CharLSTM, predict
from charlstm.steps import reset_rows

MAX_BLOCKS = 30
MAX_EXPONENT = 700  # above 709 the exponential is no float64
MIN_BLOCK_CHARS = 100  # less than a paragraph is not independent of the next one

# 0.5 to 2 in steps of 9 %; a parabola interpolates.
TEMPERATURES_R = 2.0 ** (np.arange(-8, 9) / 8)

# (params, state, batch) -> (state, (nats_BT, correct_BT)): the state is a carry, or has one in it.
ScoreStep = Callable[[Any, Any, Batch], tuple[Any, tuple[jax.Array, jax.Array]]]


class Reading(NamedTuple):
    """Sums over the characters of a text that count, cut into K blocks of consecutive ones."""

    nats_K: np.ndarray
    count_K: np.ndarray
    correct: int  # the most probable character was right
    num_bytes: int | None  # in UTF-8, a line end being one; None if they are not known

    @property
    def num_chars(self) -> int:
        """How many characters count."""
        return int(self.count_K.sum())

    @property
    def loss(self) -> float:
        """Nats per character."""
        return float(self.nats_K.sum()) / self.num_chars


def scores(
    score_step: ScoreStep, params: Any, state: Any, batches: Iterable[Batch]
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Yield (batch, nats_BT, correct_BT) of each batch, the state handed on."""
    pending: Any = None
    for batch in batches:
        state, scored = score_step(params, state, batch)
        if pending:  # one batch late, so that the device never waits for the host
            yield (pending[0], *map(np.asarray, pending[1]))
        pending = batch, scored
    if pending:
        yield (pending[0], *map(np.asarray, pending[1]))


def read(
    scored: Iterable[tuple[Batch, np.ndarray, np.ndarray]],
    num_chars: int,
    bytes_V: np.ndarray | None,
) -> Reading:
    """Add up the characters that count.

    Args:
      scored: what `scores` yields, rows and batches in the order of the text.
      num_chars: how many characters count in all of it.
      bytes_V: the bytes of each id's character; None if ids are not the characters of the text.
    """
    num_blocks = max(1, min(MAX_BLOCKS, num_chars // MIN_BLOCK_CHARS))
    nats_K, count_K = np.zeros(num_blocks), np.zeros(num_blocks, np.int64)
    correct, num_bytes, begin = 0, 0, 0
    for batch, nats_BT, correct_BT in scored:
        counts_BT = np.asarray(batch.weights_BT) > 0
        nats_M = nats_BT[counts_BT].astype(np.float64)
        block_M = np.arange(begin, begin + len(nats_M)) * num_blocks // num_chars
        nats_K += np.bincount(block_M, nats_M, num_blocks)
        count_K += np.bincount(block_M, minlength=num_blocks)
        correct += int(correct_BT[counts_BT].sum())
        if bytes_V is not None:
            num_bytes += int(bytes_V[np.asarray(batch.targets_BT)[counts_BT]].sum())
        begin += len(nats_M)
    if begin != num_chars:
        raise ValueError(f"num_chars={num_chars}: the batches count {begin}")
    return Reading(nats_K, count_K, correct, None if bytes_V is None else num_bytes)


def standard_error(means_K: np.ndarray) -> float | None:
    """Return the standard error of the mean of K block means, None where there is one block.

    That is their standard deviation (divided by K - 1) over sqrt(K): the method of batch means,
    for what is not independent from one character to the next (Flegal, Haran and Jones 2008,
    'Markov chain Monte Carlo: can we trust the third significant figure?', section 3).
    """
    if len(means_K) < 2:
        return None
    return float(np.std(means_K, ddof=1) / math.sqrt(len(means_K)))


def figures(reading: Reading) -> dict[str, Any]:
    """Return the metrics of a reading.

    `standard_error` is that of the bits per character, None for a single block. `bits_per_byte` is
    None where the bytes are not known.
    """
    bits_K = reading.nats_K / reading.count_K / math.log(2)
    num_bits = float(reading.nats_K.sum()) / math.log(2)
    return {
        "characters": reading.num_chars,
        "nats_per_char": reading.loss,
        "bits_per_char": reading.loss / math.log(2),
        "standard_error": standard_error(bits_K),
        "bits_per_byte": None if reading.num_bytes is None else num_bits / reading.num_bytes,
        "perplexity": math.exp(reading.loss) if reading.loss < MAX_EXPONENT else math.inf,
        "accuracy": reading.correct / reading.num_chars,
    }


def make_temperature_step(
    model: CharLSTM,
) -> Callable[[Any, Carry, Batch, jax.Array], tuple[Carry, jax.Array]]:
    """Return temperature_step(params, carry, batch, temperatures_R) -> (carry, nats_R), pure.

    The nats are the sum over the batch of softmax(logits / temperature), for each temperature.
    """

    def temperature_step(params: Any, carry: Carry, batch: Batch, temperatures_R: jax.Array) -> Any:
        carry = reset_rows(carry, batch.reset_B)
        logits_BTV, carry = predict(model, params, batch.inputs_BT, carry)

        def nats(temperature: jax.Array) -> jax.Array:
            nats_BT = optax.softmax_cross_entropy_with_integer_labels(
                logits_BTV / temperature, batch.targets_BT
            )
            return jnp.sum(nats_BT * batch.weights_BT)

        # One after the other: side by side they would need R times the memory.
        return carry, jax.lax.map(nats, temperatures_R)

    return temperature_step


def losses_at_temperatures(
    temperature_step: Callable[..., Any],
    params: Any,
    carry: Carry,
    batches: Iterable[Batch],
    temperatures_R: Any,
) -> np.ndarray:
    """Return the nats per character of a text at each temperature."""
    nats_R, count = np.zeros(len(temperatures_R)), 0.0
    for batch in batches:
        carry, heated_R = temperature_step(params, carry, batch, np.float32(temperatures_R))
        nats_R += np.asarray(heated_R, np.float64)
        count += float(np.sum(batch.weights_BT))
    return nats_R / count


def best_temperature(losses_R: np.ndarray) -> float:
    """Return where the losses at TEMPERATURES_R are lowest, by a parabola over the logarithm.

    Where the lowest is the first or the last, that one.
    """
    least = int(np.argmin(losses_R))
    if least in (0, len(losses_R) - 1):
        return float(TEMPERATURES_R[least])
    below, here, above = losses_R[least - 1 : least + 2]
    shift = (below - above) / (below - 2 * here + above) / 2
    return float(TEMPERATURES_R[least] * (TEMPERATURES_R[1] / TEMPERATURES_R[0]) ** shift)
