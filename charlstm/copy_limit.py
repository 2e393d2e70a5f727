"""A limit on the length of copies: which characters would continue a copy of another text."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from charlstm.checks import check_count
from charlstm.errors import UserError

BLOCK = 2**20  # sequences of the other text hashed at once
# The hash of ids is the sum of value[id] * BASE ** place modulo 2 ** 64, where an odd BASE has an
# inverse.
BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 2**64)


class CopyIndex(NamedTuple):
    """The sequences of N + 1 characters that occur in a text, by their hashes."""

    length: int  # N, the length that a copy may have
    values_V: np.ndarray  # the value of each character, and of none at -1
    hashes_M: np.ndarray  # sorted


def index_copies(ids_M: np.ndarray, length: int, vocab_size: int) -> CopyIndex:
    """Return the index of a text, which takes 8 bytes per character of it.

    Args:
      ids_M: the text, which may be mapped from a file.
      length: N, the length that a copy may have, at least 1.
      vocab_size: V.
    """
    check_count("length", length)
    values_V = np.random.default_rng(0).integers(2**64, size=vocab_size + 1, dtype=np.uint64)
    hashes_M = np.zeros(max(len(ids_M) - length, 0), np.uint64)
    step = max(BLOCK, length)
    for start in range(0, len(hashes_M), step):
        block = values_V[ids_M[start : start + step + length]]
        hashes_M[start : start + step] = hash_sequences(block, length + 1)
    hashes_M.sort()
    return CopyIndex(length, values_V, hashes_M)


class CopyLimit:
    """Finds where texts in progress would continue a copy beyond the limit.

    A collision of hashes forbids a character without need, with a probability below 1e-9 per
    character for texts of up to a gigabyte; it never allows one.
    """

    def __init__(self, index: CopyIndex, prompts: Sequence[np.ndarray]):
        """Start B texts.

        Args:
          index: of the text that may be copied up to its length.
          prompts: ids of the beginning of each text, in which a copy may begin.
        """
        self._index = index
        # Before the beginning is the id -1, which matches nothing.
        self._before_BN = np.full((len(prompts), index.length), -1)
        for row_N, prompt in zip(self._before_BN, prompts, strict=True):
            kept = prompt[-index.length :]
            row_N[index.length - len(kept) :] = kept

    def accept(self, drawn_BT: np.ndarray) -> tuple[int, np.ndarray]:
        """Continue the texts up to the first character that would continue a copy beyond the limit.

        Returns:
          The number of characters that are accepted, and forbidden_BV: the characters that must not
          come next, in rows in which one of them was to come; all False elsewhere.

        Raises:
          UserError: if a row has no other character.
        """
        length, values_V, _ = self._index
        text_BM = np.concatenate([self._before_BN, drawn_BT], axis=1)
        is_copy_BT = self._occurs(hash_sequences(values_V[text_BM], length + 1))
        [columns] = np.nonzero(np.any(is_copy_BT, axis=0))
        kept = int(columns[0]) if len(columns) else drawn_BT.shape[1]
        self._before_BN = text_BM[:, kept : kept + length]
        forbidden_BV = np.zeros((len(drawn_BT), len(values_V) - 1), bool)
        if len(columns):
            is_copy_B = is_copy_BT[:, kept]
            forbidden_BV[is_copy_B] = self._continuations(self._before_BN[is_copy_B])
        return kept, forbidden_BV

    def _continuations(self, before_BN: np.ndarray) -> np.ndarray:
        length, values_V, _ = self._index
        begun_B1 = hash_sequences(values_V[before_BN], length)
        added_V = values_V[:-1] * np.uint64(pow(BASE, length, 2**64))
        forbidden_BV = self._occurs(begun_B1 + added_V)
        if np.any(np.all(forbidden_BV, axis=1)):
            raise UserError(
                f"no_copy={length}: all {len(values_V) - 1} characters would continue a copy; "
                "allow longer copies"
            )
        return forbidden_BV

    def _occurs(self, hashes: np.ndarray) -> np.ndarray:
        """Return whether each hash is one of the text."""
        known = self._index.hashes_M
        if not len(known):
            return np.zeros(hashes.shape, bool)
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return known[places] == hashes


def hash_sequences(values: np.ndarray, length: int) -> np.ndarray:
    """Return the hash of each sequence of `length` values along the last axis."""
    size = values.shape[-1]
    sums = np.cumsum(values * powers(BASE, size), axis=-1, dtype=np.uint64)
    sums = np.concatenate([np.zeros_like(sums[..., :1]), sums], axis=-1)
    differences = sums[..., length:] - sums[..., : size + 1 - length]
    return differences * powers(INVERSE, size + 1 - length)


def powers(base: int, count: int) -> np.ndarray:
    """Return the powers 0 to count - 1 of `base` modulo 2 ** 64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)
