"""Memorization: known words, and spans of a text that occur in another."""

import re
from collections.abc import Iterable, Sequence
from types import ModuleType

import numpy as np

from charlstm.data.cleaning import break_at_space
from charlstm.system.extras import import_extra

# "o'clock" is one word, "well-known" is two.
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
NUM_PIECES, PIECE_CHARS = 50, 64
CHUNK = 2**23  # characters of the other text compared at once, which take 100 MB


def words(text: str) -> list[str]:
    """Return the words of a text in order, case-folded.

    A word is a maximal run of letters with apostrophes (straight or U+2019) inside.
    """
    return [match.group().casefold() for match in _WORD.finditer(_straight(text))]


def whole_words(text: str) -> list[str]:
    """Return the words of a piece of a text, without the first and last, which may be cut off."""
    text = _straight(text).strip("'")
    found = _WORD.finditer(text)
    return [
        match.group().casefold() for match in found if match.start() and match.end() < len(text)
    ]


def known_words(chunks: Iterable[str]) -> set[str]:
    """Return the distinct words of a text, which may be cut into chunks anywhere."""
    return {word for chunk in break_at_space(chunks) for word in words(chunk)}


def import_pydivsufsort() -> ModuleType:
    """Return the package that makes suffix arrays; raise UserError if it is not installed."""
    return import_extra("pydivsufsort", "memorization", "finding copied text")


def match_lengths(
    texts: Sequence[np.ndarray], ids_M: np.ndarray, vocab_size: int
) -> list[np.ndarray]:
    """Return the length of the longest match in another text for each position of each text.

    The result is exact. It comes from the suffix array of the texts followed by a chunk of the
    other text, in which the neighbours of a suffix share its longest prefix (Manber and Myers
    1993). It takes about a second per eight million characters of the other text; the memory does
    not depend on M, and ids_M may be mapped from a file.

    Args:
      texts: the ids_L of each text; a match ends where its text ends.
      ids_M: the other text.
      vocab_size: V, larger than all ids.

    Raises:
      UserError: if the package pydivsufsort is missing.
    """
    pydivsufsort = import_pydivsufsort()
    # An id that the other text does not contain ends each text.
    dtype, end = np.min_scalar_type(vocab_size), np.array([vocab_size])
    joined_L = np.concatenate([part for ids_L in texts for part in (ids_L, end)]).astype(dtype)
    lengths_L = np.zeros(len(joined_L), np.int64)
    longest = max(map(len, texts))
    step = max(CHUNK, longest)
    for start in range(0, len(ids_M), step):
        # A match that begins in the chunk ends within `longest` characters after it.
        chunk = ids_M[start : start + step + longest].astype(dtype)
        both = np.concatenate([joined_L, chunk])
        order = pydivsufsort.divsufsort(both)
        common = pydivsufsort.kasai(both, order)
        found_L = _longest_matches(order, common, len(joined_L))
        np.maximum(lengths_L, found_L, out=lengths_L)
    ends = np.cumsum([len(ids_L) + 1 for ids_L in texts])
    return [part[:-1] for part in np.split(lengths_L, ends[:-1])]


def share_found(text_L: np.ndarray, ids_M: np.ndarray) -> float:
    """Estimate the share of a text that occurs verbatim in another.

    It is the share of NUM_PIECES pieces of PIECE_CHARS characters, evenly spread over the text,
    that occur there. It takes at most 0.1 s per million characters of the other text.

    Args:
      text_L: the ids of the text, at least PIECE_CHARS.
      ids_M: the ids of the other text, of the same type.
    """
    starts = np.linspace(0, len(text_L) - PIECE_CHARS, NUM_PIECES).astype(int)
    pieces = {text_L[start : start + PIECE_CHARS].tobytes() for start in starts}
    num_pieces = len(pieces)
    for start in range(0, len(ids_M), CHUNK):
        raw = ids_M[start : start + CHUNK + PIECE_CHARS - 1].tobytes()
        pieces = {piece for piece in pieces if piece not in raw}
    return 1 - len(pieces) / num_pieces


def copied_spans(lengths_L: np.ndarray, min_length: int) -> np.ndarray:
    """Return starts_R, the starts of the maximal copied spans of at least `min_length` > 0.

    A maximal span cannot be extended on either side. Spans may overlap.

    Args:
      lengths_L: the lengths of one text from match_lengths.
      min_length: in characters.
    """
    ends_L = np.arange(len(lengths_L)) + lengths_L
    # Otherwise the span that starts one position earlier contains this one.
    is_new_L = np.diff(ends_L, prepend=0) > 0
    return np.flatnonzero(is_new_L & (lengths_L >= min_length))


def _straight(text: str) -> str:
    return text.replace("\u2019", "'")


def _longest_matches(order: np.ndarray, common: np.ndarray, num_ours: int) -> np.ndarray:
    """Return lengths_L, the longest match of each of our suffixes with one of theirs.

    Args:
      order: the starts of all suffixes, sorted by suffix; ours are below `num_ours`.
      common: at each index, the length of the common prefix of this suffix and the next; 0 at
        the last, which is also the one before the first.
      num_ours: L.
    """
    ranks_L = np.flatnonzero(order < num_ours)
    before_L, after_L = common[ranks_L - 1], common[ranks_L]
    # Runs of our suffixes, with theirs between the runs. The common prefix of two suffixes is the
    # smallest of those of neighbours between them.
    runs_L = np.cumsum(np.diff(ranks_L, prepend=0) > 1)
    with_previous_L = _minima(before_L, runs_L)
    with_next_L = _minima(after_L[::-1], runs_L[-1] - runs_L[::-1])[::-1]
    lengths_L = np.zeros(num_ours, np.int64)
    lengths_L[order[ranks_L]] = np.maximum(with_previous_L, with_next_L)
    return lengths_L


def _minima(values_L: np.ndarray, runs_L: np.ndarray) -> np.ndarray:
    """Return the smallest value from the beginning of each run up to each index.

    `runs_L` counts the runs before each index.
    """
    # Each run is lower than all before it by more than the values differ.
    shift_L = runs_L * (int(values_L.max()) + 1)
    return np.minimum.accumulate(values_L - shift_L) + shift_L
