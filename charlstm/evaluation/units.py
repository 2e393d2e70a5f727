"""Sum the surprise over the words or lines of a text, as a stream."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from charlstm.checks import check_choice
from charlstm.data.vocab import END
from charlstm.evaluation.surprise import Predictions

_LETTER, _BORDER = rf"[^\s{END}]", rf"[\s{END}]"
_UNITS = {
    "char": re.compile(r".", re.DOTALL),
    "word": re.compile(rf"\s*(?:{_LETTER}+{_BORDER}|{END})"),
    "line": re.compile(rf"[^\n{END}]*[\n{END}]"),
}
_REST_OF_WORD = re.compile(rf"{_LETTER}*{_BORDER}")
UNITS = tuple(_UNITS)


class Piece(NamedTuple):
    """M consecutive characters of a text, and their predictions."""

    text: str
    predictions: Predictions


class Unit(NamedTuple):
    """A character, a word or a line."""

    line: int  # of its first character that is not white space, from 1
    column: int  # from 1
    text: str
    num_chars: int  # characters that were predicted
    bits: float  # the sum of their surprise
    predictions: Predictions | None = None  # of a character: M = 1

    @property
    def bits_per_char(self) -> float | None:
        """Mean surprise; None if no character was predicted."""
        return self.bits / self.num_chars if self.num_chars else None


def split_units(pieces: Iterable[Piece], by: str) -> Iterator[Unit]:
    """Yield the units of a text in order, each as soon as its last character is given.

    Together they contain each character once. A line ends with its newline. A word ends with the
    first white space after it, so that its surprise includes that of its end (Pimentel and Meister
    2024, 'How to compute the probability of a word', arXiv 2406.14561). Further white space belongs
    to the next word. END, which ends a document, also ends a line and a word.

    Args:
      pieces: the text, cut anywhere.
      by: one of UNITS.

    Raises:
      ValueError: for another value of `by`.
    """
    check_choice("by", by, UNITS)
    texts, num_chars, bits, place = list[str](), 0, 0.0, (1, 1)
    is_in_word = False
    for text, predictions in pieces:
        is_predicted_M = predictions.rank_M > 0
        counts = _sums(is_predicted_M)
        totals = _sums(np.where(is_predicted_M, predictions.bits_M, 0))
        for begin, end, is_complete in _cut(text, by, is_in_word):
            texts.append(text[begin:end])
            num_chars += int(counts[end] - counts[begin])
            bits += float(totals[end] - totals[begin])
            if not is_complete:
                is_in_word = is_in_word or bool(re.search(_LETTER, texts[-1]))
                continue
            whole = "".join(texts)
            own = _slice(predictions, begin, end) if by == "char" else None
            yield Unit(*_first_place(place, whole), whole, num_chars, bits, own)
            texts, num_chars, bits, place = [], 0, 0.0, _advance(place, whole)
            is_in_word = False
    if texts:
        whole = "".join(texts)
        yield Unit(*_first_place(place, whole), whole, num_chars, bits)


def _cut(text: str, by: str, is_in_word: bool) -> Iterator[tuple[int, int, bool]]:
    """Yield (begin, end, is_complete) of the parts of a text, each of one unit.

    `is_in_word` says that the unit at the beginning has a character other than white space before
    it.
    """
    begin, pattern = 0, _REST_OF_WORD if is_in_word and by == "word" else _UNITS[by]
    while match := pattern.match(text, begin):
        yield begin, match.end(), True
        begin, pattern = match.end(), _UNITS[by]
    if begin < len(text):
        yield begin, len(text), False


def _sums(values_M: np.ndarray) -> np.ndarray:
    """Return the sums of the first 0, 1, ..., M values."""
    return np.concatenate([[0.0], np.cumsum(values_M, dtype=np.float64)])


def _slice(predictions: Predictions, begin: int, end: int) -> Predictions:
    return Predictions(*(leaf[begin:end] for leaf in predictions))


def _first_place(place: tuple[int, int], text: str) -> tuple[int, int]:
    """Return the place of the first character that is not white space, `place` if there is none."""
    size = len(text) - len(text.lstrip())
    return _advance(place, text[:size]) if size < len(text) else place


def _advance(place: tuple[int, int], text: str) -> tuple[int, int]:
    """Return the (line, column) after `text`, which begins at `place`."""
    line, column = place
    *ended, rest = re.split(rf"[\n{END}]", text)
    return (line + len(ended), len(rest) + 1) if ended else (line, column + len(text))
