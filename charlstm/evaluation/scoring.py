"""Bits per character of a held-out text, with standard errors."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.data.batches import Batch, Streams, Windows
from charlstm.model import Carry, CharLSTM, predict, zero_carry
from charlstm.steps import cross_entropy, reset_rows, run_batches

MAX_BLOCKS = 30
MAX_EXPONENT = 700  # above 709 the exponential is no float64
MIN_BLOCK_CHARS = 100  # less than a paragraph is not independent of the next one

# 0.5 to 2 in steps of 9 %; a parabola interpolates.
TEMPERATURES_R = 2.0 ** (np.arange(-8, 9) / 8)


class LossSums(NamedTuple):
    """Sums over the characters of a text with a weight, in K blocks of consecutive characters."""

    nats_K: np.ndarray
    count_K: np.ndarray
    correct: int  # characters that were the most probable one
    num_bytes: int | None  # in UTF-8, one per line end; None if unknown

    @property
    def num_chars(self) -> int:
        """Characters with a weight."""
        return int(self.count_K.sum())

    @property
    def loss(self) -> float:
        """Nats per character."""
        return float(self.nats_K.sum()) / self.num_chars


def sum_losses(
    outputs: Iterable[tuple[Batch, Any]], num_chars: int, bytes_V: np.ndarray | None
) -> LossSums:
    """Return the sums over all characters with a weight, in blocks.

    Args:
      outputs: (batch, (nats_BT, correct_BT)), rows and batches in the order of the text, as
        charlstm.steps.run_batches yields them for a score_step.
      num_chars: the number of characters with a weight.
      bytes_V: the bytes of each character; None if the ids are not the characters of the text.

    Raises:
      ValueError: if the batches have another number of characters.
    """
    num_blocks = max(1, min(MAX_BLOCKS, num_chars // MIN_BLOCK_CHARS))
    nats_K, count_K = np.zeros(num_blocks), np.zeros(num_blocks, np.int64)
    correct, num_bytes, start = 0, 0, 0
    for batch, (nats_BT, correct_BT) in outputs:
        counts_BT = np.asarray(batch.weights_BT) > 0
        nats_M = np.asarray(nats_BT)[counts_BT].astype(np.float64)
        block_M = np.arange(start, start + len(nats_M)) * num_blocks // num_chars
        nats_K += np.bincount(block_M, nats_M, num_blocks)
        count_K += np.bincount(block_M, minlength=num_blocks)
        correct += int(np.asarray(correct_BT)[counts_BT].sum())
        if bytes_V is not None:
            num_bytes += int(bytes_V[np.asarray(batch.targets_BT)[counts_BT]].sum())
        start += len(nats_M)
    if start != num_chars:
        raise ValueError(f"num_chars={num_chars}: the batches count {start}")
    return LossSums(nats_K, count_K, correct, None if bytes_V is None else num_bytes)


def standard_error(means_K: np.ndarray) -> float | None:
    """Return the standard error of the mean of K block means, None where there is one block.

    It is their standard deviation (divided by K - 1) over sqrt(K). These batch means allow for the
    dependence between characters (Flegal, Haran and Jones 2008, 'Markov chain Monte Carlo: can we
    trust the third significant figure?', section 3).
    """
    if len(means_K) < 2:
        return None
    return float(np.std(means_K, ddof=1) / math.sqrt(len(means_K)))


def metrics_of(sums: LossSums) -> dict[str, Any]:
    """Return the metrics of a text.

    `standard_error` is that of the bits per character, None for a single block. `bits_per_byte` is
    None if the bytes are unknown.
    """
    bits_K = sums.nats_K / sums.count_K / math.log(2)
    num_bits = float(sums.nats_K.sum()) / math.log(2)
    return {
        "characters": sums.num_chars,
        "nats_per_char": sums.loss,
        "bits_per_char": sums.loss / math.log(2),
        "standard_error": standard_error(bits_K),
        "bits_per_byte": None if sums.num_bytes is None else num_bits / sums.num_bytes,
        "perplexity": math.exp(sums.loss) if sums.loss < MAX_EXPONENT else math.inf,
        "accuracy": sums.correct / sums.num_chars,
    }


def make_temperature_step(
    model: CharLSTM, temperatures_R: np.ndarray
) -> Callable[[Any, Carry, Batch], tuple[Carry, jax.Array]]:
    """Return temperature_step(params, carry, batch) -> (carry, nats_R), a pure function.

    nats_R are the weighted sums over the batch of the cross-entropy of softmax(logits /
    temperature), for each of R temperatures.
    """

    def temperature_step(params: Any, carry: Carry, batch: Batch) -> Any:
        carry = reset_rows(carry, batch.reset_B)
        logits_BTV, carry = predict(model, params, batch.inputs_BT, carry)

        def nats(temperature: jax.Array) -> jax.Array:
            return jnp.sum(cross_entropy(logits_BTV / temperature, batch) * batch.weights_BT)

        # Sequential, because all at once would need R times the memory.
        return carry, jax.lax.map(nats, jnp.asarray(temperatures_R, jnp.float32))

    return temperature_step


def losses_at_temperatures(
    model: CharLSTM, params: Any, batches: Streams | Windows, temperatures_R: np.ndarray
) -> np.ndarray:
    """Return the nats per character of one epoch of `batches` at each of R temperatures."""
    step, carry = (
        make_temperature_step(model, temperatures_R),
        zero_carry(model, batches.batch_size),
    )
    nats_R, count = np.zeros(len(temperatures_R)), 0.0
    for batch, batch_nats_R in run_batches(jax.jit(step), params, carry, batches.epoch()):
        nats_R += np.asarray(batch_nats_R, np.float64)
        count += float(np.sum(batch.weights_BT))
    return nats_R / count


def best_temperature(losses_R: np.ndarray) -> float:
    """Return the temperature with the lowest loss, given the losses at TEMPERATURES_R.

    It is the minimum of a parabola over the logarithm of the temperature, or the first or last
    temperature if its loss is the lowest.
    """
    lowest = int(np.argmin(losses_R))
    if lowest in (0, len(losses_R) - 1):
        return float(TEMPERATURES_R[lowest])
    below, here, above = losses_R[lowest - 1 : lowest + 2]
    shift = (below - above) / (below - 2 * here + above) / 2
    return float(TEMPERATURES_R[lowest] * (TEMPERATURES_R[1] / TEMPERATURES_R[0]) ** shift)
