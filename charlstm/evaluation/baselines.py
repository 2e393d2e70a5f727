"""What any model has to beat: frequencies, n-grams and compressors on the same split of a text."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Of more characters, only so many of the training part next to the held-out one are counted, and
# only the first of the held-out part: some seconds and some hundred megabytes.
MAX_TRAINING_CHARS = 4_000_000
MAX_HELD_OUT_CHARS = 2_000_000
# 5 is what the field quotes; on a novel 7 is the best, and longer ones gain nothing.
ORDERS = (5, 7)
# The compressed size of a shorter text is too noisy.
MIN_COMPRESSED_CHARS = 500
# Each looks back only so far: gzip 32 KiB, bz2 its block of 900 kB, xz all of what it gets here.
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda raw: gzip.compress(raw, 9, mtime=0),
    "bz2 -9": lambda raw: bz2.compress(raw, 9),
    "xz -9e": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
}


class Level(NamedTuple):
    """The n-grams of one length: U different ones, after C different contexts of n - 1."""

    codes_U: np.ndarray  # the number of the context among the level below's, times V, plus the id
    mass_U: np.ndarray  # the probability that an n-gram has of its own
    backoff_C: np.ndarray  # what its context leaves to the level below


def uniform_bits(vocab_size: int) -> float:
    """Return the bits per character of a guess among V."""
    return float(np.log2(vocab_size))


def unigram_bits(train_M: np.ndarray, ids_M: np.ndarray, vocab_size: int) -> float:
    """Return the bits per character of the training part's frequencies, one added to each count.

    All characters of the held-out part but the first count, as for a model.
    """
    counts_V = np.bincount(train_M, minlength=vocab_size) + 1.0
    return float(-np.mean(np.log2(counts_V / counts_V.sum())[ids_M[1:]]))


def kneser_ney_bits(train_M: np.ndarray, ids_M: np.ndarray, vocab_size: int, order: int) -> float:
    """Return the bits per character of an interpolated n-gram model of the training part.

    All characters of the held-out part but the first count, each after the held-out characters
    before it, as for a model.
    """
    levels = count_ngrams(train_M, vocab_size, order)
    return float(-np.mean(np.log2(ngram_probabilities(levels, ids_M, vocab_size)[1:])))


def count_ngrams(ids_M: np.ndarray, vocab_size: int, order: int) -> list[Level]:
    """Return the levels, of length 1 first, of an interpolated Kneser-Ney model of a text.

    The longest n-grams have their counts, shorter ones the number of different characters that
    stand before them; see _level for the rest (Kneser and Ney 1995; Chen and Goodman 1999, 'An
    empirical study of smoothing techniques for language modeling', section 4.1.6).
    """
    grams: list[np.ndarray] = []
    firsts: list[tuple[np.ndarray, np.ndarray]] = []
    contexts, counts_U = np.zeros(len(ids_M), np.int64), np.zeros(0, np.int64)
    for _ in range(min(order, len(ids_M))):
        # Only places that have a whole n-gram before them, each for the one that ends there.
        ends_M = ids_M[len(ids_M) - len(contexts) :]
        codes_U, first_U, rank_M, counts_U = np.unique(
            contexts * vocab_size + ends_M,
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        grams.append(codes_U)
        firsts.append((first_U, rank_M))
        contexts = rank_M[:-1]
    levels = [_level(grams[-1], counts_U, vocab_size)]
    for n in range(len(grams) - 1, 0, -1):
        # The n-gram that a longer one ends with, once for each longer one.
        suffixes = firsts[n - 1][1][firsts[n][0] + 1]
        preceding_U = np.bincount(suffixes, minlength=len(grams[n - 1]))
        levels.append(_level(grams[n - 1], preceding_U, vocab_size))
    return levels[::-1]


def _level(codes_U: np.ndarray, counts_U: np.ndarray, vocab_size: int) -> Level:
    """Return what n-grams with such counts, after discounts, keep and what they leave.

    With c the count of an n-gram and C that of its context, it keeps (c - D) / C, and the context
    leaves the sum of its Ds over C. D is one of three, for counts of 1, 2, and more.
    """
    contexts_U = codes_U // vocab_size
    discounts = _discounts(counts_U)
    taken_U = discounts[np.minimum(counts_U, 3)]
    totals_C = np.bincount(contexts_U, weights=counts_U)
    left_C = np.bincount(contexts_U, weights=taken_U)
    # A context that nothing was ever counted after leaves all.
    backoff_C = np.divide(left_C, totals_C, out=np.ones_like(left_C), where=totals_C > 0)
    kept_U = np.maximum(counts_U - taken_U, 0)
    mass_U = kept_U / np.maximum(totals_C, 1)[contexts_U]
    return Level(codes_U, mass_U, backoff_C)


def _discounts(counts_U: np.ndarray) -> np.ndarray:
    """Return D for counts of 0, 1, 2 and at least 3: Chen and Goodman 1999, equation 26.

    Where too few n-grams are so rare that it makes sense, as among single characters, D is 1/2.
    """
    n1, n2, n3, n4 = (np.bincount(np.minimum(counts_U, 5), minlength=6)[1:5]).astype(float)
    if min(n1, n2, n3, n4) > 0:
        share = n1 / (n1 + 2 * n2)
        found = (1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3)
        if all(0 < discount <= count for count, discount in enumerate(found, 1)):
            return np.array((0.0, *found))
    return np.array((0.0, 0.5, 0.5, 0.5))


def ngram_probabilities(levels: list[Level], ids_M: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the probability of each character of a text after those before it, as far as known."""
    probs_M = np.full(len(ids_M), 1 / vocab_size)
    contexts = np.zeros(len(ids_M), np.int64)  # of the last positions; -1 where never seen
    for level in levels:
        ends_M, probs = ids_M[len(ids_M) - len(contexts) :], probs_M[len(ids_M) - len(contexts) :]
        is_known = (contexts >= 0) & (contexts < len(level.backoff_C))
        safe = np.where(is_known, contexts, 0)
        codes = safe * vocab_size + ends_M
        places = np.minimum(np.searchsorted(level.codes_U, codes), len(level.codes_U) - 1)
        is_found = is_known & (level.codes_U[places] == codes)
        own = np.where(is_found, level.mass_U[places], 0.0)
        probs[:] = np.where(is_known, own + level.backoff_C[safe] * probs, probs)
        contexts = np.where(is_found, places, -1)[:-1]
    return probs_M


def compressed_bits(compress: Callable[[bytes], bytes], train: str, held_out: str) -> float:
    """Return the bits per character that a held-out text adds to the compressed training text."""
    raw = train.encode("utf-8", "surrogatepass")
    both = raw + held_out.encode("utf-8", "surrogatepass")
    return (len(compress(both)) - len(compress(raw))) * 8 / len(held_out)
