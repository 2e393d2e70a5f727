"""Baselines on the same split of a text: frequencies, n-grams and compressors."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Limits of the training part, next to the held-out part, and of the held-out part, so that the
# baselines take some seconds and some hundred megabytes.
MAX_TRAINING_CHARS = 4_000_000
MAX_HELD_OUT_CHARS = 2_000_000
# Published results use 5; 7 is the best order on a novel.
ORDERS = (5, 7)
# The compressed size of a shorter text is too noisy.
MIN_COMPRESSED_CHARS = 500
# Windows: gzip 32 KiB, bz2 900 kB, xz the whole text.
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda raw: gzip.compress(raw, 9, mtime=0),
    "bz2 -9": lambda raw: bz2.compress(raw, 9),
    "xz -9e": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
}


class Level(NamedTuple):
    """The n-grams of one length: U distinct n-grams after C distinct contexts of n - 1."""

    codes_U: np.ndarray  # index of the context among the shorter n-grams, times V, plus the id
    mass_U: np.ndarray  # discounted probability of each n-gram
    backoff_C: np.ndarray  # probability that each context leaves to shorter n-grams


def uniform_bits(vocab_size: int) -> float:
    """Return the bits per character of the uniform distribution over V characters."""
    return float(np.log2(vocab_size))


def unigram_bits(train_M: np.ndarray, ids_M: np.ndarray, vocab_size: int) -> float:
    """Return the bits per character of the training frequencies with add-one smoothing.

    All held-out characters except the first count, as for a model.
    """
    counts_V = np.bincount(train_M, minlength=vocab_size) + 1.0
    return float(-np.mean(np.log2(counts_V / counts_V.sum())[ids_M[1:]]))


def kneser_ney_bits(train_M: np.ndarray, ids_M: np.ndarray, vocab_size: int, order: int) -> float:
    """Return the bits per character of an interpolated n-gram model of the training part.

    All held-out characters except the first count, each given the held-out characters before it,
    as for a model.
    """
    levels = count_ngrams(train_M, vocab_size, order)
    return float(-np.mean(np.log2(ngram_probabilities(levels, ids_M, vocab_size)[1:])))


def count_ngrams(ids_M: np.ndarray, vocab_size: int, order: int) -> list[Level]:
    """Return the levels, shortest first, of an interpolated Kneser-Ney model of a text.

    The longest n-grams use their counts, shorter ones the number of distinct characters before them
    (Kneser and Ney 1995; Chen and Goodman 1999, 'An empirical study of smoothing techniques for
    language modeling', section 4.1.6).
    """
    grams: list[np.ndarray] = []
    firsts: list[tuple[np.ndarray, np.ndarray]] = []
    contexts, counts_U = np.zeros(len(ids_M), np.int64), np.zeros(0, np.int64)
    for _ in range(min(order, len(ids_M))):
        # The positions at which an n-gram of this length ends.
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
        # The n-gram at the end of each distinct longer one.
        suffixes = firsts[n - 1][1][firsts[n][0] + 1]
        preceding_U = np.bincount(suffixes, minlength=len(grams[n - 1]))
        levels.append(_level(grams[n - 1], preceding_U, vocab_size))
    return levels[::-1]


def _level(codes_U: np.ndarray, counts_U: np.ndarray, vocab_size: int) -> Level:
    """Return a level with discounted probabilities.

    An n-gram of count c after a context of count C has the mass (c - D) / C, and the context leaves
    the sum of D / C to shorter n-grams. D depends on whether c is 1, 2 or larger.
    """
    contexts_U = codes_U // vocab_size
    discounts = _discounts(counts_U)
    taken_U = discounts[np.minimum(counts_U, 3)]
    totals_C = np.bincount(contexts_U, weights=counts_U)
    left_C = np.bincount(contexts_U, weights=taken_U)
    # A context without counts leaves everything to shorter n-grams.
    backoff_C = np.divide(left_C, totals_C, out=np.ones_like(left_C), where=totals_C > 0)
    kept_U = np.maximum(counts_U - taken_U, 0)
    mass_U = kept_U / np.maximum(totals_C, 1)[contexts_U]
    return Level(codes_U, mass_U, backoff_C)


def _discounts(counts_U: np.ndarray) -> np.ndarray:
    """Return D for counts of 0, 1, 2 and at least 3: Chen and Goodman 1999, equation 26.

    D is 1/2 where the counts of counts do not allow the formula, as for single characters.
    """
    n1, n2, n3, n4 = (np.bincount(np.minimum(counts_U, 5), minlength=6)[1:5]).astype(float)
    if min(n1, n2, n3, n4) > 0:
        share = n1 / (n1 + 2 * n2)
        found = (1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3)
        if all(0 < discount <= count for count, discount in enumerate(found, 1)):
            return np.array((0.0, *found))
    return np.array((0.0, 0.5, 0.5, 0.5))


def ngram_probabilities(levels: list[Level], ids_M: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the probability of each character of a text given the characters before it."""
    probs_M = np.full(len(ids_M), 1 / vocab_size)
    contexts = np.zeros(len(ids_M), np.int64)  # of the last positions; -1 for unknown contexts
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
    """Return the compressed bits per character that a held-out text adds to the training text."""
    raw = train.encode("utf-8", "surrogatepass")
    both = raw + held_out.encode("utf-8", "surrogatepass")
    return (len(compress(both)) - len(compress(raw))) * 8 / len(held_out)
