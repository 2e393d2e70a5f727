"""Cleaning: a text in chunks is cleaned as the whole text is."""

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from charlstm.config import base_config
from charlstm.data.cleaning import Cleaning, CleaningStats, drop_punctuation
from charlstm.data.encoding import decode
from charlstm.data.gutenberg import cut_gutenberg
from charlstm.data.vocab import END, Vocab
from charlstm.runs.folder import Run

START = "*** START OF THE PROJECT GUTENBERG EBOOK X ***"
FINISH = "*** END OF THE PROJECT GUTENBERG EBOOK X ***"
# The small form of a capital sigma depends on its position in a word.
SIGMA = "\u03a3"
FRAMES = [f"\n{START}\n", f"\n{FINISH}\n", f"\n{FINISH}", "End of Project Gutenberg's X\n"]
SPACES = ["\r", "\n", "\r\n", "\n\n\n", " "]
CHARACTERS = ["a", "B", "#", "##", "'", SIGMA, f"B{SIGMA}", "\u00e9", "\u4e2d", "\U0001f600"]
PIECES = st.sampled_from([*SPACES, *CHARACTERS, "\ufeff", END, *FRAMES])
CLEANINGS = st.builds(
    Cleaning, st.booleans(), st.booleans(), st.sampled_from(["", "#", "##", "\n\n"])
)


def clean_whole(raw, cleaning):
    """Clean a file by plain operations on the whole text."""
    text = raw.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(cut_gutenberg([text]))  # see test_gutenberg.py
    if cleaning.separator:
        text = text.replace(cleaning.separator, END)
        text += END * (text[-1:] not in ("", END))
    text = text.lower() if cleaning.lowercase else text
    if cleaning.strip_punctuation:
        text = "".join(char for char in text if unicodedata.category(char)[0] not in "PS")
    return text


def blocks_of(raw, size):
    return (raw[begin : begin + size] for begin in range(0, len(raw), size))


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=25).map("".join), st.integers(1, 40), CLEANINGS)
@example("a##b#", 3, Cleaning(separator="##"))
@example(f"B{SIGMA} B{SIGMA}\nB{SIGMA}B", 1, Cleaning(lowercase=True))
@example(f"x\n{START}\n\n\nB\n\n\n{FINISH}\nx", 1, Cleaning())
def test_cleaning_does_not_depend_on_chunks(text, size, cleaning):
    raw = text.encode()
    chunks = cleaning.apply(decode(blocks_of(raw, size), "name"))
    assert "".join(chunks) == clean_whole(raw, cleaning)


def test_stats_count_what_is_cut_and_separators():
    stats, frame = CleaningStats(), (f"A header.\n{START}\n\n", f"\n{FINISH}\nA licence.\n")
    text = "".join(Cleaning(separator="#").apply([frame[0], "a#b#c\n", frame[1]], stats))
    assert text == f"a{END}b{END}c\n{END}"
    assert stats == CleaningStats(num_cut=sum(map(len, frame)), num_separators=2)


@given(st.text(st.characters() | st.characters(categories=["P", "S"]), max_size=60))
def test_drop_punctuation_drops_the_categories_p_and_s(text):
    wanted = [character for character in text if unicodedata.category(character)[0] not in "PS"]
    assert drop_punctuation(text) == "".join(wanted)


@given(
    st.lists(st.sampled_from(["a", "A", " ", "\u00c9", ".", "#", "\r", "\n", SIGMA]), max_size=20),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "#", "\r\n", ".\r\n"]),
)
def test_prompt_is_cleaned_like_a_file(characters, lowercase, strip, separator):
    data, text = base_config().data, "".join(characters) + "b"
    data.lowercase, data.strip_punctuation, data.document_separator = lowercase, strip, separator
    cleaning = Cleaning.from_config(data)
    of_file = "".join(cleaning.apply(decode([text.encode()], "name")))
    assert cleaning.apply_to(text) == (of_file.removesuffix(END) if separator else of_file)


def test_run_cleans_its_prompts():
    config, vocab = base_config(), Vocab(sorted({*"the castl\n", END}))
    config.data.lowercase = config.data.strip_punctuation = True
    config.data.document_separator = "\r\n%\r\n"
    run = Run(None, config, vocab, {}, [], {}, "threefry2x32")
    ids_M = vocab.encode(run.cleaning.apply_to("The\r\n%\r\nCASTLE\r\n--"))
    assert vocab.decode(ids_M) == f"the{END}castle\n"
    assert run.decode(ids_M) == "the\n%\ncastle\n"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "\u201cNo,\u201d \u00c9mile said\u2014$5!"),
        ({"lowercase": True}, "\u201cno,\u201d \u00e9mile said\u2014$5!"),
        ({"strip_punctuation": True}, "No \u00c9mile said5"),
    ],
)
def test_cleaning_follows_the_settings(changes, wanted):
    data = base_config().data
    data.update(changes)
    cleaning = Cleaning.from_config(data)
    assert cleaning.apply_to("\u201cNo,\u201d \u00c9mile said\u2014$5!") == wanted
