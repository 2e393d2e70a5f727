"""The vocabulary: characters to ids and back."""

import copy
import json
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlstm.data.vocab import END, UNKNOWN, Vocab, count_characters
from charlstm.errors import UserError

# st.characters() alone includes lone surrogates, but rarely characters above U+FFFF.
ANY_TEXT = st.text(st.characters() | st.characters(min_codepoint=0x10000), max_size=60)
FEW_TEXT = st.text(st.sampled_from("abz .\u00e9\U0001f600"), max_size=30)


@given(ANY_TEXT)
def test_ids_are_ranks_among_the_sorted_characters(text):
    vocab, characters = Vocab.from_text(text + "ab"), sorted(set(text + "ab"))
    ids_M = vocab.encode(text)
    assert list(vocab) == characters
    assert ids_M.tolist() == [characters.index(character) for character in text]
    assert vocab.decode(ids_M) == text


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_decode_takes_any_integer_type(dtype):
    assert Vocab("abc").decode(np.array([2, 0, 1, 1], dtype)) == "cabb"


@pytest.mark.parametrize(
    ("size", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65_537, np.uint32)]
)
def test_ids_have_the_smallest_unsigned_type(size, dtype):
    characters = [chr(code) for code in range(size)]
    ids_M = Vocab(characters).encode("".join(characters))
    assert ids_M.dtype == dtype
    assert ids_M.tolist() == list(range(size))


@pytest.mark.parametrize(
    ("text", "position", "name"),
    [
        ("ab\u00e9zz", 2, "'\u00e9' (U+00E9)"),
        # Above the largest known code point, between known ones, and a surrogate.
        ("za\U0001f602", 2, "'\U0001f602' (U+1F602)"),
        ("\U0001f600\U0001f600y", 2, "'y' (U+0079)"),
        ("a\ud800", 1, "'\\ud800' (U+D800)"),
    ],
)
def test_unknown_character_is_named_with_its_position(text, position, name):
    with pytest.raises(UserError) as error:
        Vocab.from_text("abz\U0001f600").encode(text)
    assert name in str(error.value)
    assert f"position {position} " in str(error.value)


@given(FEW_TEXT, st.sampled_from(["ab", "bz\u00e9", "a z", "\t \U0001f600"]))
def test_unknown_characters_are_dropped_or_replaced(text, known):
    vocab = Vocab.from_text(known)
    assert vocab.decode(vocab.encode(text, "drop")) == "".join(c for c in text if c in known)
    other = " " if " " in known else min(known)
    replaced = "".join(character if character in known else other for character in text)
    assert vocab.decode(vocab.encode(text, "replace")) == replaced


def test_unknown_characters_become_the_replacement_character():
    assert Vocab(["a", UNKNOWN]).encode("ab", "replace").tolist() == [0, 1]


def test_unknown_must_be_a_valid_choice():
    with pytest.raises(ValueError, match="unknown='keep': must be one of error, drop, replace"):
        Vocab("ab").encode("abc", unknown="keep")


@given(st.text("aab \n", min_size=2, max_size=50), st.text("xyz", max_size=9), st.integers(1, 5))
def test_rare_characters_are_replaced(common, rare, min_count):
    text = common + rare + "ab" * 5
    counts = Counter(text)
    vocab = Vocab.from_counts(count_characters([text[:20], text[20:]]), min_count)
    replaced = [char if counts[char] >= min_count else UNKNOWN for char in text]
    assert list(vocab) == sorted(set(replaced))
    assert vocab.decode(vocab.encode(text, "replace")) == "".join(replaced)


def test_end_of_a_document_is_never_too_rare():
    counts = count_characters([f"aaaabbbb{END}c"])
    assert list(Vocab.from_counts(counts, min_count=3)) == [END, "a", "b", UNKNOWN]


def test_vocab_is_a_collection_of_its_characters():
    vocab = Vocab.from_text("cabb\n")
    assert "b" in vocab
    assert "z" not in vocab
    assert repr(vocab) == "Vocab('\\nabc')"
    assert vocab != Vocab("abc")
    assert {vocab: 1}[Vocab("\nabc")] == 1
    assert len(repr(Vocab([chr(code) for code in range(5000)]))) < 1000


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copy_of_a_vocab_equals_it(make_copy):
    vocab = Vocab.from_text("abz\U0001f600")
    assert make_copy(vocab) == vocab
    assert make_copy(vocab).decode([3]) == "\U0001f600"


@given(ANY_TEXT)
def test_json_preserves_a_vocab(text):
    vocab = Vocab.from_text(text + "ab")
    written = vocab.to_json()
    assert json.loads(written) == sorted(set(text + "ab"))
    # A file in UTF-8 cannot contain lone surrogates.
    assert written.isascii()
    assert Vocab.from_json(written) == vocab


@pytest.mark.parametrize("ids", [[-1], [0, 4], np.array([1.0]), [[0, 1]]])
def test_decode_refuses_invalid_ids(ids):
    with pytest.raises(ValueError, match="ids: "):
        Vocab("abcd").decode(ids)


def test_decode_of_no_ids_is_empty():
    assert Vocab("abcd").decode([]) == ""


@pytest.mark.parametrize("text", ["", "\U0001f600" * 3])
@pytest.mark.parametrize("error", [UserError, ValueError])
def test_vocab_needs_two_distinct_characters(text, error):
    with pytest.raises(error, match=f"{len(set(text))} distinct character"):
        Vocab.from_text(text)


@pytest.mark.parametrize("characters", ["", "ba", "aab"])
def test_vocab_needs_distinct_characters_in_order(characters):
    with pytest.raises(ValueError, match="characters: must be distinct, in ascending order"):
        Vocab(characters)
