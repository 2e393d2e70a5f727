"""Where the predictions of a text are wrong: calibration, and loss by kind, place and context.

Axis K: bins or groups.
"""

import math
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm.checks import check_count
from charlstm.data.batches import Batch, check_text
from charlstm.data.vocab import code_points
from charlstm.evaluation.surprise import Predictions
from charlstm.model import CharLSTM, zero_carry
from charlstm.steps import make_score_step

NUM_BINS = 15  # as in Guo et al. 2017, section 4
KINDS = ("letter", "capital", "digit", "space", "line end", "punctuation", "other")
MAX_WORD_POSITION = 12  # later characters of a word are one group
PASSAGE_CHARS, NUM_PASSAGES = 80, 10
CONTEXT_CHARS, NUM_WINDOWS = 256, 512
BATCH_SIZE = 16


class Reliability(NamedTuple):
    """A reliability diagram of the most probable characters, and their calibration error."""

    edges: np.ndarray  # of the K bins of confidence, from 0 to 1: K + 1 numbers
    count_K: np.ndarray  # characters
    confidence_K: np.ndarray  # mean probability of the most probable character; NaN in empty bins
    accuracy_K: np.ndarray  # how often it was the right one; NaN in empty bins
    error: float  # expected calibration error, 0 to 1
    noise: float  # the error that a calibrated model has on as many characters, on average


class GroupLoss(NamedTuple):
    """The loss of K groups of characters."""

    names: tuple[str, ...]
    count_K: np.ndarray  # characters that were predicted
    bits_K: np.ndarray  # mean surprise; NaN in an empty group
    share_K: np.ndarray  # of the bits of all groups together


class Passages(NamedTuple):
    """K passages of a text, the most surprising one first."""

    start_K: np.ndarray  # index of the first character
    bits_K: np.ndarray  # sum over the passage
    width: int  # characters


class ContextLoss(NamedTuple):
    """The loss by the number of characters that were read since an empty state.

    `whole_bits_K` is of the same characters, so that the difference shows what the characters
    before the window are worth.
    """

    least_K: np.ndarray  # characters read: from `least_K` to `most_K`
    most_K: np.ndarray
    count_K: np.ndarray  # predictions
    bits_K: np.ndarray  # mean surprise
    whole_bits_K: np.ndarray  # mean surprise after reading the whole text before
    error_K: np.ndarray  # standard error of the difference, over windows; NaN for one window


def reliability(predictions: Predictions, num_bins: int = NUM_BINS) -> Reliability:
    """Return the reliability diagram of a text in bins of equal width.

    It compares the probability of the most probable character, the confidence, with the share of
    characters that it predicts (Guo et al. 2017, 'On calibration of modern neural networks', arXiv
    1706.04599, section 2). The expected calibration error is the mean difference over all
    characters (Naeini et al. 2015, 'Obtaining well calibrated probabilities using Bayesian
    binning'). Chance makes it positive for a calibrated model too: see `noise`.

    Raises:
      ValueError: if `num_bins` is below 1, or no character is predicted.
    """
    check_count("num_bins", num_bins)
    is_predicted_M = predictions.rank_M > 0
    confidence_M = predictions.top_probs_MK[is_predicted_M, 0].astype(np.float64)
    is_right_M = predictions.rank_M[is_predicted_M] == 1
    if not len(confidence_M):
        raise ValueError("predictions: no character is predicted; give a text of at least two")
    # A bin contains its upper edge.
    bin_M = np.clip(np.ceil(confidence_M * num_bins).astype(int) - 1, 0, num_bins - 1)
    count_K = np.bincount(bin_M, minlength=num_bins)
    confidence_K = _ratio(np.bincount(bin_M, confidence_M, num_bins), count_K)
    accuracy_K = _ratio(np.bincount(bin_M, is_right_M, num_bins), count_K)
    share_K = count_K / len(confidence_M)
    # The mean absolute value of a normal variable is its standard deviation by sqrt(2 / pi).
    variance_K = _ratio(np.bincount(bin_M, confidence_M * (1 - confidence_M), num_bins), count_K)
    spread_K = np.sqrt(2 / math.pi * _ratio(variance_K, count_K))
    return Reliability(
        edges=np.arange(num_bins + 1) / num_bins,
        count_K=count_K,
        confidence_K=confidence_K,
        accuracy_K=accuracy_K,
        error=float(np.nansum(share_K * np.abs(accuracy_K - confidence_K))),
        noise=float(np.nansum(share_K * spread_K)),
    )


def loss_by_kind(text: str, bits_M: np.ndarray) -> GroupLoss:
    """Return the loss of each of KINDS.

    Args:
      text: M characters.
      bits_M: their surprise, NaN where a character was not predicted.

    Raises:
      ValueError: if there are not M characters.
    """
    return _loss_of_groups(KINDS, character_kinds(text), bits_M)


def loss_by_word_position(text: str, bits_M: np.ndarray) -> GroupLoss:
    """Return the loss of the first, second, ... character of words, without other characters.

    A word is a run of letters. The last group has all positions from MAX_WORD_POSITION on.

    Args:
      text, bits_M: as for loss_by_kind.

    Raises:
      ValueError: if there are not M characters.
    """
    position_M = np.minimum(word_positions(text), MAX_WORD_POSITION)
    names = (*map(str, range(1, MAX_WORD_POSITION)), f"{MAX_WORD_POSITION}+")
    return _loss_of_groups(names, position_M - 1, bits_M)


def character_kinds(text: str) -> np.ndarray:
    """Return kind_M, the index in KINDS of each character, by its Unicode category."""
    codes_V, id_M = np.unique(code_points(text), return_inverse=True)
    kind_V = np.array([KINDS.index(_kind(chr(code))) for code in codes_V.tolist()], np.int64)
    return kind_V[id_M]


def _kind(char: str) -> str:
    category = unicodedata.category(char)
    if char == "\n":
        return "line end"
    if char.isspace():
        return "space"
    if category in ("Lu", "Lt"):
        return "capital"
    # A combining mark belongs to its letter.
    groups = {"L": "letter", "M": "letter", "N": "digit", "P": "punctuation", "S": "punctuation"}
    return groups.get(category[0], "other")


def word_positions(text: str) -> np.ndarray:
    """Return position_M: 1, 2, 3, ... in each run of letters, and 0 elsewhere."""
    is_letter_M = np.isin(character_kinds(text), (KINDS.index("letter"), KINDS.index("capital")))
    place_M = np.arange(len(text))
    last_other_M = np.maximum.accumulate(np.where(is_letter_M, -1, place_M))
    return place_M - last_other_M


def _loss_of_groups(names: tuple[str, ...], group_M: np.ndarray, bits_M: np.ndarray) -> GroupLoss:
    """Return the loss of each group; a negative group is left out."""
    if len(group_M) != len(bits_M):
        raise ValueError(f"bits_M: has {len(bits_M)} values for {len(group_M)} characters")
    is_counted_M = (group_M >= 0) & ~np.isnan(bits_M)
    groups, bits = group_M[is_counted_M], bits_M[is_counted_M].astype(np.float64)
    count_K = np.bincount(groups, minlength=len(names))
    sum_K = np.bincount(groups, bits, len(names))
    return GroupLoss(names, count_K, _ratio(sum_K, count_K), sum_K / max(sum_K.sum(), 1e-300))


def worst_passages(
    bits_M: np.ndarray, count: int = NUM_PASSAGES, width: int = PASSAGE_CHARS
) -> Passages:
    """Return the passages of `width` characters with the most bits, which do not overlap.

    Each is the one with the most bits among those that overlap none before it. There are fewer than
    `count` in a short text, and none in a text of at most `width` characters.

    Args:
      bits_M: the surprise of each character, NaN where it was not predicted; such a character is in
        no passage.
      count: K, at most.
      width: characters of a passage.

    Raises:
      ValueError: if `count` or `width` is below 1.
    """
    check_count("count", count)
    check_count("width", width)
    is_missing_M = np.isnan(bits_M)
    sums = _window_sums(np.where(is_missing_M, 0, bits_M), width)
    sums[_window_sums(is_missing_M, width) > 0] = -np.inf
    starts, bits = list[int](), list[float]()
    while len(starts) < count and np.max(sums, initial=-np.inf) > -np.inf:
        start = int(np.argmax(sums))
        starts.append(start)
        bits.append(sums[start])
        sums[max(0, start - width + 1) : start + width] = -np.inf
    return Passages(np.array(starts, np.int64), np.array(bits, np.float64), width)


def _window_sums(values_M: np.ndarray, width: int) -> np.ndarray:
    """Return the sum of each window of `width` values."""
    sums = np.concatenate([[0.0], np.cumsum(values_M, dtype=np.float64)])
    return sums[width:] - sums[:-width] if width < len(sums) else np.zeros(0)


def loss_by_context(
    model: CharLSTM,
    params: Any,
    ids_M: np.ndarray,
    bits_M: np.ndarray,
    context: int = CONTEXT_CHARS,
    num_windows: int = NUM_WINDOWS,
) -> ContextLoss:
    """Return the loss by the number of characters read since an empty state.

    Windows at equal distances, which may overlap, are each read from an empty state. Bins double: 1
    character, 2, 3 to 4, 5 to 8 and so on. A model on documents also has an empty state before each
    end_id.

    Args:
      model, params: as load_model returns them.
      ids_M: the text.
      bits_M: the surprise of each character after the whole text before it, as predict_text
        returns it. Characters with NaN are left out.
      context: the largest number of characters; a shorter text has at most M - 1.
      num_windows: at most; a short text has fewer.

    Raises:
      ValueError: if the text has fewer than two characters, or another length than `bits_M`, or a
        number is below 1.
    """
    check_text(ids_M)
    check_count("context", context)
    check_count("num_windows", num_windows)
    if len(ids_M) != len(bits_M):
        raise ValueError(f"bits_M: has {len(bits_M)} values for {len(ids_M)} characters")
    context = min(context, len(ids_M) - 1)
    num_starts = len(ids_M) - context
    num_windows = min(num_windows, num_starts)
    start_N = np.arange(num_windows) * num_starts // num_windows
    num_bins = math.ceil(math.log2(context)) + 1
    count_NK, bits_NK, whole_NK = (np.zeros((num_windows, num_bins)) for _ in range(3))
    step = jax.jit(make_score_step(model))
    for first, batch, position_BT in _cold_windows(ids_M, start_N, context):
        _, (nats_BT, _) = step(params, zero_carry(model, BATCH_SIZE), jax.device_put(batch))
        num_read_BT = _chars_since_reset(batch.inputs_BT, model.end_id)
        bin_BT = np.ceil(np.log2(num_read_BT)).astype(int)
        for row in range(min(BATCH_SIZE, num_windows - first)):
            whole = bits_M[position_BT[row] + 1]
            is_known = ~np.isnan(whole)
            bins, whole = bin_BT[row][is_known], whole[is_known]
            own = np.asarray(nats_BT)[row][is_known] / math.log(2)
            count_NK[first + row] = np.bincount(bins, minlength=num_bins)
            bits_NK[first + row] = np.bincount(bins, own, num_bins)
            whole_NK[first + row] = np.bincount(bins, whole, num_bins)
    most_K = np.minimum(2 ** np.arange(num_bins), context)
    count_K = count_NK.sum(axis=0)
    return ContextLoss(
        least_K=np.concatenate([[0], most_K[:-1]]) + 1,
        most_K=most_K,
        count_K=count_K.astype(np.int64),
        bits_K=_ratio(bits_NK.sum(axis=0), count_K),
        whole_bits_K=_ratio(whole_NK.sum(axis=0), count_K),
        error_K=_ratio_error(bits_NK - whole_NK, count_NK),
    )


def _cold_windows(
    ids_M: np.ndarray, start_N: np.ndarray, length: int
) -> Iterator[tuple[int, Batch, np.ndarray]]:
    """Yield (index of the first window, batch, position_BT of its inputs); the last is padded."""
    weights_BT, reset_B = np.ones((BATCH_SIZE, length), np.float32), np.ones(BATCH_SIZE, bool)
    for first in range(0, len(start_N), BATCH_SIZE):
        start_B = np.resize(start_N[first : first + BATCH_SIZE], BATCH_SIZE)
        position_BT = start_B[:, None] + np.arange(length)
        inputs_BT, targets_BT = (ids_M[position_BT + shift].astype(np.int32) for shift in (0, 1))
        yield first, Batch(inputs_BT, targets_BT, weights_BT, reset_B), position_BT


def _chars_since_reset(inputs_BT: np.ndarray, end_id: int | None) -> np.ndarray:
    """Return how many characters the state has read after each input, 1 or more."""
    place_BT = np.broadcast_to(np.arange(inputs_BT.shape[1]), inputs_BT.shape)
    is_reset_BT = (place_BT == 0) | (inputs_BT == (-1 if end_id is None else end_id))
    return place_BT - np.maximum.accumulate(np.where(is_reset_BT, place_BT, 0), axis=1) + 1


def _ratio(sum_K: np.ndarray, count_K: np.ndarray) -> np.ndarray:
    """Return sum_K / count_K, NaN where the count is 0."""
    return np.divide(sum_K, count_K, out=np.full(len(sum_K), np.nan), where=count_K > 0)


def _ratio_error(sum_NK: np.ndarray, count_NK: np.ndarray) -> np.ndarray:
    """Return the standard error of sums over counts of N windows, by linearization.

    NaN for one window (Cochran 1977, 'Sampling techniques', section 6.2).
    """
    num_windows, count_K = len(sum_NK), count_NK.sum(axis=0)
    if num_windows < 2:
        return np.full(sum_NK.shape[1], np.nan)
    residual_NK = sum_NK - _ratio(sum_NK.sum(axis=0), count_K)[None] * count_NK
    spread_K = np.sqrt(np.sum(residual_NK**2, axis=0) * num_windows / (num_windows - 1))
    return _ratio(spread_K, count_K)
