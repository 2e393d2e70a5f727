import copy
import hashlib
import http.server
import json
import logging
import os
import pickle
import threading
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import charlstm.data.sources
from charlstm.config import base_config
from charlstm.data.cleaning import Cleaning, drop_punctuation
from charlstm.data.corpus import open_corpus
from charlstm.data.encoding import decode
from charlstm.data.sources import PYTHON_MANUAL
from charlstm.data.vocab import END, Vocab
from charlstm.errors import UserError
from charlstm.runs.folder import Run

REAL_DRACULA = ROOT.parent / "shared" / "corpora" / "pg345.txt"

# st.characters() alone includes lone surrogates; astral ones are too rare in it to rely on.
ANY_TEXT = st.text(st.characters() | st.characters(min_codepoint=0x10000), max_size=60)
FEW_TEXT = st.text(st.sampled_from("abz .\u00e9\U0001f600"), max_size=30)

NEW_START = "*** START OF THE PROJECT GUTENBERG EBOOK DRACULA ***"
NEW_END = "*** END OF THE PROJECT GUTENBERG EBOOK DRACULA ***"
BOOK = "CHAPTER I\n\n  3 May. Bistritz.\n\n* * * * *\n\nAnd so on to the end of it.\n"


class Loaded(NamedTuple):
    """A text as it is read: its characters and its origin."""

    content: str
    source: str
    sha256: str
    num_bytes: int
    num_cut: int
    num_unknown: int


def load_text(path="", source="", **settings) -> Loaded:
    data = base_config().data
    data.update(settings)
    ids_M, vocab, *origin = open_corpus(data, path, source=source)
    return Loaded(vocab.decode(ids_M), *origin)


def message_of(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- Vocab ---


@settings(deadline=None, max_examples=60)
@given(ANY_TEXT)
def test_decode_gives_back_what_encode_took(text):
    vocab = Vocab.from_text(text + "ab")
    ids = vocab.encode(text)
    assert ids.shape == (len(text),)
    assert vocab.decode(ids) == text


@settings(deadline=None, max_examples=60)
@given(ANY_TEXT)
def test_a_vocab_is_the_sorted_set_of_characters_and_an_id_is_the_rank_in_it(text):
    vocab = Vocab.from_text(text + "ab")
    wanted = sorted(set(text + "ab"))
    assert list(vocab.characters) == wanted
    assert len(vocab) == len(wanted)
    assert vocab.encode(text).tolist() == [wanted.index(character) for character in text]


@pytest.mark.parametrize("integer", [np.uint8, np.int32, np.int64])
def test_decode_takes_any_integer_type(integer):
    assert Vocab("abc").decode(np.array([2, 0, 1, 1], dtype=integer)) == "cabb"


@pytest.mark.parametrize(
    ("size", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65_537, np.uint32)]
)
def test_ids_have_the_smallest_unsigned_type_that_holds_them(size, dtype):
    characters = [chr(code) for code in range(size)]
    ids = Vocab(characters).encode("".join(characters))
    assert ids.dtype == dtype
    assert ids.tolist() == list(range(size))


@pytest.mark.parametrize(
    ("text", "position", "name"),
    [
        ("ab\u00e9zz", 2, "'\u00e9' (U+00E9)"),
        ("A", 0, "'A' (U+0041)"),
        # Above the largest known code point, right above it, and after an astral character.
        ("za\U0001f602", 2, "'\U0001f602' (U+1F602)"),
        ("a\U0001f601", 1, "'\U0001f601' (U+1F601)"),
        ("\U0001f600\U0001f600y", 2, "'y' (U+0079)"),
        ("a\ud800", 1, "'\\ud800' (U+D800)"),
    ],
)
def test_an_unknown_character_is_named_with_its_position(text, position, name):
    vocab = Vocab.from_text("abz\U0001f600")
    with pytest.raises(UserError) as error:
        vocab.encode(text)
    message = message_of(error)
    assert name in message
    assert f"position {position} " in message


def test_a_vocabulary_behaves_as_the_collection_of_its_characters():
    vocab = Vocab.from_text("cabb\n")
    assert list(vocab) == ["\n", "a", "b", "c"]
    assert "b" in vocab
    assert "z" not in vocab
    assert repr(vocab) == "Vocab('\\nabc')"
    assert eval(repr(vocab)) == vocab
    assert vocab != Vocab("abc")
    assert {vocab: 1}[Vocab("\nabc")] == 1
    assert len(repr(Vocab([chr(code) for code in range(5000)]))) < 1000


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vocab: pickle.loads(pickle.dumps(vocab))])
def test_a_copy_of_a_vocabulary_equals_it(copied):
    vocab = Vocab.from_text("abz\U0001f600")
    assert copied(vocab) == vocab
    assert copied(vocab).decode([3]) == "\U0001f600"


@pytest.mark.parametrize("ids", [[-1], [0, 4], np.array([1.0]), [[0, 1]]])
def test_ids_of_no_character_are_not_decoded(ids):
    with pytest.raises(ValueError, match="ids: "):
        Vocab("abcd").decode(ids)


def test_no_ids_are_no_text():
    assert Vocab("abcd").decode([]) == ""


@pytest.mark.parametrize("text", ["", "aaa"])
def test_a_text_without_two_characters_is_a_value_error(text):
    with pytest.raises(ValueError, match="distinct character"):
        Vocab.from_text(text)


@settings(deadline=None, max_examples=60)
@given(FEW_TEXT, st.sampled_from(["ab", "bz\u00e9", "a z", " \U0001f600"]))
def test_unknown_characters_can_be_dropped(text, known):
    vocab = Vocab.from_text(known)
    kept = [character for character in text if character in known]
    assert vocab.decode(vocab.encode(text, unknown="drop")) == "".join(kept)


@settings(deadline=None, max_examples=60)
@given(FEW_TEXT, st.sampled_from(["ab", "bz\u00e9", "a z", "\t \U0001f600"]))
def test_unknown_characters_become_a_space_or_else_the_first_character(text, known):
    vocab = Vocab.from_text(known)
    filler = " " if " " in known else min(known)
    wanted = [character if character in known else filler for character in text]
    ids = vocab.encode(text, unknown="replace")
    assert vocab.decode(ids) == "".join(wanted)
    assert ids.dtype == np.uint8


def test_an_unheard_of_way_to_treat_unknown_characters_is_a_value_error():
    with pytest.raises(ValueError, match="unknown='keep': must be one of error, drop, replace"):
        Vocab("ab").encode("abc", unknown="keep")


@settings(deadline=None, max_examples=60)
@given(ANY_TEXT)
def test_a_vocab_survives_json(text):
    vocab = Vocab.from_text(text + "ab")
    written = vocab.to_json()
    assert json.loads(written) == sorted(set(text + "ab"))
    # A file in UTF-8 could not hold lone surrogates as they are.
    assert written.isascii()
    again = Vocab.from_json(written)
    assert again.characters == vocab.characters
    assert again.decode(again.encode(text)) == text


@pytest.mark.parametrize("text", ["", "a", "aaaa", "\U0001f600" * 3])
def test_a_text_of_fewer_than_two_distinct_characters_is_refused(text):
    with pytest.raises(UserError) as error:
        Vocab.from_text(text)
    assert f"{len(set(text))} distinct character" in message_of(error)


@pytest.mark.parametrize("characters", ["", "ba", "aab"])
def test_a_vocab_is_made_of_distinct_characters_in_order(characters):
    with pytest.raises(ValueError, match="characters: must be distinct, in ascending order"):
        Vocab(characters)


# --- cleaning ---


def load_bytes(tmp_path, raw, **options):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    return load_text(str(path), **options)


@pytest.mark.parametrize(
    ("raw", "content"),
    [
        (b"one\ntwo\n", "one\ntwo\n"),
        ("one\r\n\u20ac\U0001f987".encode("utf-16"), "one\n\u20ac\U0001f987"),
        (b"\xfe\xff" + "one\n\u20ac".encode("utf-16-be"), "one\n\u20ac"),
        (b"\xef\xbb\xbfone\ntwo", "one\ntwo"),
        (b"one\r\ntwo\r\n", "one\ntwo\n"),
        (b"one\rtwo\r", "one\ntwo\n"),
        (b"one\r\r\n\ntwo\n\r", "one\n\n\ntwo\n\n"),
        # Only at the beginning is it a mark; elsewhere it is a character.
        ("\ufeffa\ufeffb".encode(), "a\ufeffb"),
        ("na\u00efve \U0001f987".encode(), "na\u00efve \U0001f987"),
    ],
)
def test_byte_order_mark_and_carriage_returns_are_left_out(tmp_path, raw, content):
    text = load_bytes(tmp_path, raw)
    assert text.content == content
    assert text.num_cut == 0


def test_a_text_tells_its_origin_and_the_hash_and_size_of_the_raw_file(tmp_path):
    raw = b"\xef\xbb\xbfA header.\r\n" + NEW_START.encode() + "\r\n\u00dcber!\r\n".encode()
    text = load_bytes(tmp_path, raw, lowercase=True, strip_punctuation=True)
    assert text.content == "\u00fcber\n"
    assert text.sha256 == hashlib.sha256(raw).hexdigest()
    assert text.num_bytes == len(raw)
    assert Path(text.source) == (tmp_path / "text.txt").resolve()


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_frame_is_found_whatever_the_line_ends(tmp_path, newline):
    content = f"A header.\n{NEW_START}\n\n{BOOK}\n{NEW_END}\nA licence.\n"
    text = load_bytes(tmp_path, content.replace("\n", newline).encode())
    assert text.content == BOOK
    assert text.num_cut == len(content) - len(BOOK)


def test_a_frame_with_nothing_inside_is_an_empty_text(tmp_path):
    with pytest.raises(UserError) as error:
        load_bytes(tmp_path, f"A header.\n{NEW_START}\n\n \n{NEW_END}\nA licence.\n".encode())
    message = message_of(error)
    assert "text.txt" in message
    assert "empty" in message


@pytest.mark.parametrize(("size", "is_much"), [(2000, False), (700, True)])
def test_a_cut_of_more_than_a_tenth_of_a_text_is_a_warning(
    tmp_path, caplog, monkeypatch, size, is_much
):
    monkeypatch.setattr(logging.getLogger("charlstm"), "propagate", True)
    frame = f"{NEW_START}\n", f"{NEW_END}\nA licence.\n"
    text = load_bytes(tmp_path, (frame[0] + "ab" * (size // 2) + "\n" + frame[1]).encode())
    assert text.num_cut == sum(map(len, frame)) == 115
    warnings = warnings_in(caplog)
    assert len(warnings) == is_much
    assert not is_much or "115 characters" in warnings[0]


def test_lowercase_is_the_lower_case_of_all_of_unicode(tmp_path):
    raw = "The COUNT, \u00c9mile \u0414\u0420\u0410\u041a\u0423\u041b\u0410".encode()
    text = load_bytes(tmp_path, raw, lowercase=True)
    assert text.content == "the count, \u00e9mile \u0434\u0440\u0430\u043a\u0443\u043b\u0430"


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters() | st.characters(categories=["P", "S"]), max_size=60))
def test_drop_punctuation_drops_the_categories_p_and_s(text):
    wanted = [character for character in text if unicodedata.category(character)[0] not in "PS"]
    assert drop_punctuation(text) == "".join(wanted)


def test_punctuation_goes_only_if_asked_for(tmp_path):
    raw = "\u201cNo,\u201d she said\u2014$5 + 5!\n".encode()
    assert load_bytes(tmp_path, raw).content == raw.decode()
    assert load_bytes(tmp_path, raw, strip_punctuation=True).content == "No she said5  5\n"


@given(
    st.lists(st.sampled_from("aA \u00c9.#\r\n\u03a3"), max_size=20).map("".join),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "#", "\r\n", ".\r\n"]),
)
def test_a_prompt_is_cleaned_as_a_text_is(text, lowercase, strip, separator):
    data = base_config().data
    data.lowercase, data.strip_punctuation, data.document_separator = lowercase, strip, separator
    cleaning = Cleaning.from_config(data)
    blocks = [f"{text}b".encode()]
    of_file = "".join(cleaning.apply(decode(blocks, "name")))
    assert cleaning.apply_to(f"{text}b") == (of_file.removesuffix(END) if separator else of_file)


def test_a_run_cleans_its_prompts():
    config, vocab = base_config(), Vocab(sorted({*"the castl\n", END}))
    config.data.lowercase = config.data.strip_punctuation = True
    config.data.document_separator = "\r\n%\r\n"
    run = Run(None, config, vocab, {}, [], {}, "threefry2x32")
    ids = run.encode("The\r\n%\r\nCASTLE\r\n--")
    assert vocab.decode(ids) == f"the{END}castle\n"
    assert run.decode(ids) == "the\n%\ncastle\n"


# --- texts that cannot be had ---


@pytest.mark.parametrize(
    ("raw", "options", "reason"),
    [
        (b"", {}, "empty"),
        (b"\xef\xbb\xbf", {}, "empty"),
        (b" \t\r\n \n", {}, "empty"),
        (b"...!?\n", {"strip_punctuation": True}, "empty"),
        (b"abc\xffdef", {}, "byte 0xff at offset 3"),
        ("abc\u00e9".encode("latin1"), {}, "byte 0xe9 at offset 3"),
        # Counted from the beginning of the file, the mark included.
        (b"\xef\xbb\xbfabc\xffdef", {}, "byte 0xff at offset 6"),
    ],
)
def test_a_text_of_no_use_is_one_line_with_its_path(tmp_path, raw, options, reason):
    with pytest.raises(UserError) as error:
        load_bytes(tmp_path, raw, **options)
    message = message_of(error)
    assert message.startswith(f"{tmp_path / 'text.txt'}: ")
    assert reason in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.txt", "no such file"),
        ("folder", "no .txt, .gz, .zst, .bz2, .xz in this folder"),
        ("folder/*.txt", "no file matches"),
        ("file.txt/inside", "cannot be read"),
        ("n" * 300, "cannot be read"),
    ],
)
def test_a_path_of_no_use_is_one_line_with_the_path(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("a text")
    with pytest.raises(UserError) as error:
        load_text(str(tmp_path / name))
    message = message_of(error)
    assert message.startswith(f"{tmp_path / name}: {reason}")
    assert "config.data.path" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_one_line_with_its_path(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("a text")
    path.chmod(0)
    with pytest.raises(UserError) as error:
        load_text(str(path))
    assert message_of(error).startswith(f"{path}: cannot be read (Permission denied)")


# --- Dracula, or else the manual ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no way to the network, and warnings that reach caplog."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("CHARLSTM_CACHE", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # Nothing listens on port 9.
    monkeypatch.setattr(charlstm.data.sources, "DRACULA_URLS", ("http://127.0.0.1:9/x",))
    # The launchers turn this off for the rest of the process.
    monkeypatch.setattr(logging.getLogger("charlstm"), "propagate", True)
    return folder


@pytest.fixture
def serve(monkeypatch):
    """A function that serves pages, None for a 404, and points DRACULA_URLS at them in order."""
    pages, servers = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = pages[int(self.path[1:])]
            self.send_response(404 if page is None else 200)
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *args):
            pass

    def start(*new_pages):
        pages.extend(new_pages)
        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        servers.append((server, thread))
        thread.start()
        urls = [f"http://127.0.0.1:{server.server_port}/{index}" for index in range(len(pages))]
        monkeypatch.setattr(charlstm.data.sources, "DRACULA_URLS", tuple(urls))

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def refuse_to_download(*args, **kwargs):
    raise AssertionError("this needs no network")


def python_manual() -> str:
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_without_a_network_the_manual_takes_draculas_place_with_one_warning(cache, caplog):
    text = load_text()
    assert text.source == PYTHON_MANUAL == "pydoc_data.topics"
    assert text.content == python_manual()
    assert text.num_cut == 0
    assert text.sha256 == hashlib.sha256(python_manual().encode()).hexdigest()
    assert text.num_bytes == len(python_manual().encode())
    [warning] = warnings_in(caplog)
    assert "127.0.0.1:9" in warning
    assert "config.data.path" in warning
    assert list(cache.iterdir()) == []


def test_the_manual_is_cleaned_as_any_text(cache):
    text = load_text(lowercase=True, strip_punctuation=True)
    lower = python_manual().lower()
    wanted = [character for character in lower if unicodedata.category(character)[0] not in "PS"]
    assert text.content == "".join(wanted)


def test_a_download_that_fails_prints_its_warning_alone(cache, capsys):
    # Before the JSON of launch/evaluate.py --json nothing else may stand.
    load_text()
    assert capsys.readouterr() == ("", "")  # the warning goes to the log


def test_dracula_in_the_cache_is_read_without_a_network(cache, caplog, monkeypatch):
    monkeypatch.setattr("pooch.retrieve", refuse_to_download)
    (cache / "pg345.txt").write_text(f"A header.\n{NEW_START}\n\n{BOOK * 20}\n{NEW_END}\n")
    text = load_text()
    assert text.content == BOOK * 20
    assert Path(text.source) == (cache / "pg345.txt").resolve()
    assert warnings_in(caplog) == []


def test_a_run_that_began_with_the_manual_keeps_it(cache, caplog, monkeypatch):
    monkeypatch.setattr("pooch.retrieve", refuse_to_download)
    (cache / "pg345.txt").write_text("Dracula, come late")
    text = load_text(source=PYTHON_MANUAL)
    assert text.source == PYTHON_MANUAL
    assert text.content == python_manual()
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("page", [b"<html>Please log in</html>", b"", None])
def test_a_page_that_is_not_dracula_is_refused_and_not_kept(cache, caplog, serve, page):
    serve(page)
    assert load_text().source == PYTHON_MANUAL
    assert len(warnings_in(caplog)) == 1
    assert list(cache.iterdir()) == []


def test_dracula_is_downloaded_once(cache, caplog, serve, monkeypatch):
    raw = b"Dracula by Bram Stoker\r\n3 May. Bistritz.\r\n"
    serve(raw)
    first = load_text()
    assert first.content == "Dracula by Bram Stoker\n3 May. Bistritz.\n"
    assert Path(first.source) == (cache / "pg345.txt").resolve()
    assert [path.name for path in cache.iterdir()] == ["pg345.txt"]
    assert (cache / "pg345.txt").read_bytes() == raw
    monkeypatch.setattr("pooch.retrieve", refuse_to_download)
    assert load_text() == first
    assert warnings_in(caplog) == []


def test_the_next_address_is_tried_where_one_fails(cache, caplog, serve):
    serve(None, b"<html>Please log in</html>", b"Dracula at last")
    assert load_text().content == "Dracula at last"
    assert warnings_in(caplog) == []


def test_a_cache_that_cannot_be_written_leads_to_the_manual(cache, caplog, serve, monkeypatch):
    serve(b"Dracula, in vain")
    (cache / "file").write_text("not a folder")
    monkeypatch.setenv("CHARLSTM_CACHE", str(cache / "file"))
    assert load_text().source == PYTHON_MANUAL
    assert len(warnings_in(caplog)) == 1


@pytest.mark.skipif(not REAL_DRACULA.exists(), reason="no shared/corpora/pg345.txt here")
def test_the_real_dracula_has_the_tutorials_size():
    text = load_text(str(REAL_DRACULA))
    assert len(text.content) == 845_922
    # What is left begins with the title page and holds nothing of the licence.
    assert "DRACULA" in text.content[:500]
    assert "Project Gutenberg" not in text.content
