"""Are the words that a model writes words, and how much of its text is copied?"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from charlstm.data.cleaning import break_at_space

# "o'clock" is one word, "well-known" is two.
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
NUM_PIECES, PIECE_CHARS = 50, 64
CHUNK = 2**20  # places of a training text that are followed at once: they take fifty megabytes


def words(text: str) -> list[str]:
    """Return the words of a text in order, case-folded.

    A word is a maximal run of letters with apostrophes (straight or U+2019) inside.
    """
    return [match.group().casefold() for match in _WORD.finditer(_straight(text))]


def whole_words(text: str) -> list[str]:
    """Return the words of a text that is a piece of a longer one.

    Those at its beginning and its end are left out, since they may be cut off there.
    """
    text = _straight(text).strip("'")
    found = _WORD.finditer(text)
    return [
        match.group().casefold() for match in found if match.start() and match.end() < len(text)
    ]


def known_words(chunks: Iterable[str]) -> set[str]:
    """Return the different words of a text in chunks, whose borders mean nothing."""
    return {word for chunk in break_at_space(chunks) for word in words(chunk)}


def match_lengths(
    texts: Sequence[np.ndarray], ids_M: np.ndarray, vocab_size: int
) -> list[np.ndarray]:
    """Return the length of the longest match in another text for each position of each text.

    This is exact. For each million characters of the other text it takes half a second where
    10,000 were made, a second where 80,000 were. Copies of thousands of characters take longer, a
    time that grows with the square of their length, and so does what repeats itself in both.

    Args:
      texts: the ids_L of each text; a match ends where its text ends.
      ids_M: the other text.
      vocab_size: V, above all ids.
    """
    # An id that the other text has not, so that all texts are compared in one go.
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

    Of NUM_PIECES pieces of PIECE_CHARS characters, evenly spread over the text, those are counted
    that stand there. It takes at most 0.1 s for each million characters of the other text.

    Args:
      text_L: the ids of the text, at least PIECE_CHARS.
      ids_M: those of the other one, of the same type.
    """
    starts = np.linspace(0, len(text_L) - PIECE_CHARS, NUM_PIECES).astype(int)
    pieces = {text_L[start : start + PIECE_CHARS].tobytes() for start in starts}
    num_pieces = len(pieces)
    for start in range(0, len(ids_M), CHUNK):
        raw = ids_M[start : start + CHUNK + PIECE_CHARS - 1].tobytes()
        pieces = {piece for piece in pieces if piece not in raw}
    return 1 - len(pieces) / num_pieces


def verbatim_runs(lengths_L: np.ndarray, min_length: int) -> np.ndarray:
    """Return starts_R, the starts of the maximal copied spans of at least `min_length` > 0.

    Maximal: neither with the character before nor with the one after does it stand in the other
    text. Two of them may overlap.

    Args:
      lengths_L: of one text, from match_lengths.
      min_length: in characters.
    """
    ends_L = np.arange(len(lengths_L)) + lengths_L
    # Else the run from the place before holds this one.
    is_new_L = np.diff(ends_L, prepend=0) > 0
    return np.flatnonzero(is_new_L & (lengths_L >= min_length))


def _straight(text: str) -> str:
    return text.replace("\u2019", "'")


def _follow(ours_L: np.ndarray, ids_M: np.ndarray, theirs: np.ndarray, base: int) -> np.ndarray:
    """Return lengths_L, the longest match of each place of ours with the places `theirs` of ids_M.

    All places go on by one character at a time, as long as they have a match. Those with the same
    characters so far have the same rank.
    """
    lengths_L = np.zeros(len(ours_L), np.int64)
    ours = np.arange(len(ours_L))
    our_ranks, their_ranks = np.zeros_like(ours), np.zeros_like(theirs)
    length = 0
    while len(theirs):
        # Ours end at a border, which nothing matches, but theirs end anywhere.
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
