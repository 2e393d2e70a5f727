import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlstm.evaluation.surprise import Predictions
from charlstm.evaluation.units import Piece, split_units

TEXTS = st.text("ab \t\n\x03", max_size=30)


def pieces_of(text, cuts=()):
    """Return the pieces of a text whose characters have 1, 2, 4, ... bits, but the first."""
    bits_M = 2.0 ** np.arange(-1, len(text) - 1)
    bits_M[:1] = np.nan
    ranks_M = np.minimum(np.arange(len(text)), 1)
    tops_M1 = np.zeros((len(text), 1))
    leaves = bits_M, bits_M, ranks_M, tops_M1, tops_M1
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [
        Piece(text[begin:end], Predictions(*(leaf[begin:end] for leaf in leaves)))
        for begin, end in pairwise(bounds)
    ]


def split(text, by, cuts=()):
    return list(split_units(pieces_of(text, cuts), by))


def test_words_end_with_white_space_and_lines_with_newlines():
    text = " One two\n\n  three\tfour\x03five"
    words = [" One ", "two\n", "\n  three\t", "four\x03", "five"]
    assert [unit.text for unit in split(text, "word")] == words
    places = [unit[:2] for unit in split(text, "word")]
    assert places == [(1, 2), (1, 6), (3, 3), (3, 9), (4, 1)]
    lines = [" One two\n", "\n", "  three\tfour\x03", "five"]
    assert [unit.text for unit in split(text, "line")] == lines
    assert [unit.line for unit in split(text, "line")] == [1, 2, 3, 4]
    assert [unit.text for unit in split(text, "char")] == list(text)


def test_a_document_end_between_words_is_a_word():
    assert [unit.text for unit in split("a.\n\x03b", "word")] == ["a.\n", "\x03", "b"]


@given(TEXTS, st.lists(st.integers(0, 30), max_size=4), st.sampled_from(["char", "word", "line"]))
def test_units_contain_each_character_once_wherever_pieces_end(text, cuts, by):
    units = split(text, by, cuts)
    assert "".join(unit.text for unit in units) == text
    assert [unit[:5] for unit in units] == [unit[:5] for unit in split(text, by)]
    begin = 0
    for unit in units:
        end = begin + len(unit.text)
        # Sums of different powers of two differ.
        assert unit.bits == sum(2.0 ** (place - 1) for place in range(max(begin, 1), end))
        assert unit.num_chars == end - max(begin, 1)
        seen = text[:begin] + re.match(r"\s*(?=\S)|", unit.text)[0]
        assert unit.line == 1 + len(re.findall("[\n\x03]", seen))
        assert unit.column == 1 + len(re.split("[\n\x03]", seen)[-1])
        begin = end


def test_a_unit_is_given_before_the_next_piece_is_read():
    given_pieces = iter(pieces_of("ab\ncd\nef", [3, 6]))
    units = split_units(given_pieces, "line")
    assert next(units).text == "ab\n"
    assert next(given_pieces).text == "cd\n"


def test_only_characters_have_predictions():
    assert split("ab", "char")[1].predictions.bits_M.tolist() == [1]
    assert split("ab", "word")[0].predictions is None
    assert split("ab", "char")[0].bits_per_char is None
    with pytest.raises(ValueError, match="by"):
        split("ab", "page")
