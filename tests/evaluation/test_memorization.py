import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlstm import Vocab
from charlstm.errors import UserError
from charlstm.evaluation import memorization
from charlstm.evaluation.memorization import (
    copied_spans,
    known_words,
    match_lengths,
    whole_words,
    words,
)

# Of two characters, so that long matches are common.
made = st.text("ab", max_size=25)
VOCAB = Vocab("abcdefgh")


def longest_at(text, other):
    """How many characters from each place of `text` stand in `other`, by trying all."""
    places = range(len(text))
    return [
        max(length for length in range(len(text) - i + 1) if text[i : i + length] in other)
        for i in places
    ]


def maximal_runs(text, other):
    """(start, length) of all pieces that stand in `other`, but would not with a neighbour."""
    spans = [(i, j) for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
    found = {(i, j) for i, j in spans if text[i:j] in other}
    return [(i, j - i) for i, j in found if not {(i - 1, j), (i, j + 1)} & found]


def lengths_of(texts, other):
    ids = [VOCAB.encode(text) for text in texts]
    return [found.tolist() for found in match_lengths(ids, VOCAB.encode(other), len(VOCAB))]


@given(st.lists(made, min_size=1, max_size=3), st.text("ab", max_size=60), st.integers(1, 8))
def test_runs_are_those_found_by_trying_all(texts, other, min_length):
    found = lengths_of(texts, other)
    assert found == [longest_at(text, other) for text in texts]
    for text, lengths in zip(texts, found, strict=True):
        starts = copied_spans(np.array(lengths, np.int64), min_length).tolist()
        wanted = [run for run in maximal_runs(text, other) if run[1] >= min_length]
        assert [(start, lengths[start]) for start in starts] == sorted(wanted)


@pytest.mark.parametrize("factor", [1, 3, 900])
def test_matches_do_not_depend_on_chunks_or_the_size_of_ids(book, monkeypatch, factor):
    vocab, text = Vocab.from_text(book), book[3000:3400] + book[100:200]
    # Ids of one, two and four bytes.
    ids, other = (vocab.encode(part).astype(np.int64) * factor for part in (text, book[:3350]))
    vocab_size = factor * len(vocab)
    [whole] = match_lengths([ids], other, vocab_size)
    assert whole.tolist() == longest_at(text, book[:3350])
    monkeypatch.setattr(memorization, "CHUNK", 100)
    short, others = ids[370:], ids[:370]
    in_chunks = match_lengths([others, short], other, vocab_size)
    assert in_chunks[1].tolist() == longest_at(text[370:], book[:3350])
    monkeypatch.setattr(memorization, "CHUNK", 1)
    np.testing.assert_array_equal(match_lengths([ids], other, vocab_size), [whole])


def test_a_missing_package_is_one_line_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(UserError, match=r"pydivsufsort.*\[memorization\]"):
        lengths_of(["ab"], "ab")


def test_copies_are_found_where_they_are():
    assert lengths_of(["habch"], "gabcg") == [[0, 3, 2, 1, 0]]
    # A run may not cross from one text to the next, though the book has it.
    assert lengths_of(["ab", "cd", ""], "abcd") == [[2, 1], [2, 1], []]
    # 'abc' and 'bcd' overlap; 'bc' is in both and no run of its own.
    [lengths] = lengths_of(["abcd"], "abcgbcd")
    assert copied_spans(np.array(lengths), 1).tolist() == [0, 1]
    assert copied_spans(np.array(lengths), 4).tolist() == []


def test_words_are_letters_with_apostrophes_inside():
    text = "'Tis o\u2019clock, the_well-known THE\n'end' of 3rd é2; Straße"
    assert words(text) == [
        *("tis", "o'clock", "the", "well", "known", "the", "end", "of", "rd", "é", "strasse")
    ]
    assert words("...") == words("") == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("stle stood there in the ni", ["stood", "there", "in", "the"]),
        (" castle stood.", ["castle", "stood"]),
        ("'t do what I don'", ["do", "what", "i"]),
        ("castle", []),
        ("", []),
    ],
)
def test_words_that_may_be_cut_off_do_not_count(text, wanted):
    assert whole_words(text) == wanted


def test_known_words_do_not_depend_on_chunks(book):
    chunks = [book[start : start + 7] for start in range(0, len(book), 7)]
    assert known_words(chunks) == set(words(book))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_a_text_that_stands_in_another(share, monkeypatch):
    monkeypatch.setattr(memorization, "CHUNK", 1000)  # pieces lie across its borders
    rng = np.random.default_rng(0)
    train_M = rng.integers(60, size=5000).astype(np.uint8)
    text_L = rng.integers(60, size=4000).astype(np.uint8)
    copied = round(share * len(text_L))
    text_L[:copied] = train_M[500 : 500 + copied]
    # Of 50 pieces one or two lie across the end of the copy.
    assert memorization.share_found(text_L, train_M) == pytest.approx(share, abs=0.04)
