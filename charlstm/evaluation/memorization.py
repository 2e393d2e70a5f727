"""Memorization: known words, and spans of a text that occur in another."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from charlstm.data.cleaning import break_at_space

# "o'clock" is one word, "well-known" is two.
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
NUM_PIECES, PIECE_CHARS = 50, 64
CHUNK = 2**20  # positions of the other text compared at once, which take 50 MB


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


def match_lengths(
    texts: Sequence[np.ndarray], ids_M: np.ndarray, vocab_size: int
) -> list[np.ndarray]:
    """Return the length of the longest match in another text for each position of each text.

    The result is exact. For each million characters of the other text, it takes half a second for
    texts of 10,000 characters and a second for 80,000. The time grows with the square of the
    length of the matches.

    Args:
      texts: the ids_L of each text; a match ends where its text ends.
      ids_M: the other text.
      vocab_size: V, larger than all ids.
    """
    # An id that the other text does not contain separates the texts.
    border = np.array([vocab_size])
    joined_L = np.concatenate([part for ids_L in texts for part in (ids_L, border)])
    lengths_L = np.zeros(len(joined_L), np.int64)
    for start in range(0, len(ids_M), CHUNK):
        starts = np.arange(start, min(start + CHUNK, len(ids_M)))
        np.maximum(lengths_L, _follow(joined_L, ids_M, starts, vocab_size + 1), out=lengths_L)
    borders = np.cumsum([len(ids_L) + 1 for ids_L in texts])
    return [part[:-1] for part in np.split(lengths_L, borders[:-1])]


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


def _follow(ours_L: np.ndarray, ids_M: np.ndarray, theirs: np.ndarray, base: int) -> np.ndarray:
    """Return lengths_L, the longest match of each position with the positions `theirs` of ids_M.

    All matches grow by one character at a time. Matches of equal characters have the same rank.
    """
    lengths_L = np.zeros(len(ours_L), np.int64)
    ours = np.arange(len(ours_L))
    our_ranks, their_ranks = np.zeros_like(ours), np.zeros_like(theirs)
    length = 0
    while len(theirs):
        # Our texts end at a separator, which matches nothing; the other text ends anywhere.
        within = np.searchsorted(theirs, len(ids_M) - length)
        theirs, their_ranks = theirs[:within], their_ranks[:within]
        codes_U, our_ranks = np.unique(
            our_ranks * base + ours_L[ours + length], return_inverse=True
        )
        codes = their_ranks * base + ids_M[theirs + length]
        their_ranks = np.minimum(np.searchsorted(codes_U, codes), len(codes_U) - 1)
        is_found = codes_U[their_ranks] == codes
        theirs, their_ranks = theirs[is_found], their_ranks[is_found]
        is_found_U = np.zeros(len(codes_U), bool)
        is_found_U[their_ranks] = True
        is_alive = is_found_U[our_ranks]
        ours, our_ranks = ours[is_alive], our_ranks[is_alive]
        length += 1
        lengths_L[ours] = length
    return lengths_L
