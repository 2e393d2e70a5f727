"""Texts of any size as ids: in memory, or memory-mapped from the user's cache."""

import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import charlstm.data.corpus
import charlstm.data.passes
from charlstm.config import base_config
from charlstm.data.corpus import forget_pages, open_corpus, texts_folder
from charlstm.data.sources import PYTHON_MANUAL
from charlstm.data.vocab import END, Vocab
from charlstm.errors import RunError, UserError
from charlstm.system.paths import cache_folder

START = "*** START OF THE PROJECT GUTENBERG EBOOK X ***"
FINISH = "*** END OF THE PROJECT GUTENBERG EBOOK X ***"
FRAME = f"A header.\n{START}\n\n", f"\n{FINISH}\nA licence.\n"


def data_with(**changes):
    data = base_config().data
    data.update(changes)
    return data


def text_of(corpus):
    return corpus.vocab.decode(corpus.ids_M)


@pytest.fixture
def logged(caplog, monkeypatch):
    """Return caplog with all records of the package."""
    # Launchers disable propagation for the rest of the process.
    monkeypatch.setattr(logging.getLogger("charlstm"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


# --- any text ---


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_corpus_has_the_cleaned_text_and_its_origin(tmp_path, newline):
    path, book = tmp_path / "text.txt", "\u00dcber!\n\n3 May.\n"
    raw = b"\xef\xbb\xbf" + "".join([FRAME[0], book, FRAME[1]]).replace("\n", newline).encode()
    path.write_bytes(raw)
    corpus = open_corpus(data_with(lowercase=True, strip_punctuation=True), str(path))
    assert text_of(corpus) == "\u00fcber\n\n3 may\n"
    assert corpus.source == str(path.resolve())
    assert corpus.sha256 == hashlib.sha256(raw).hexdigest()
    assert corpus.num_bytes == len(raw)
    assert corpus.num_cut == sum(map(len, FRAME))
    assert corpus.num_unknown == 0


@pytest.mark.parametrize(
    ("content", "changes"),
    [
        ("\ufeff", {}),
        (" \t\r\n \n", {}),
        ("...!?\n", {"strip_punctuation": True}),
        (" \n".join(FRAME), {}),
    ],
)
def test_empty_text_is_refused(tmp_path, content, changes):
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(UserError, match=r"^/.*text.txt: the text is empty; .*config.data.path"):
        open_corpus(data_with(**changes), str(tmp_path / "text.txt"))


@pytest.mark.parametrize(("size", "is_much"), [(2000, False), (700, True)])
def test_cut_of_more_than_a_tenth_is_a_warning(tmp_path, logged, size, is_much):
    (tmp_path / "text.txt").write_text(f"{FRAME[0]}{'ab' * (size // 2)}{FRAME[1]}")
    corpus = open_corpus(data_with(), str(tmp_path / "text.txt"))
    warnings = [record.getMessage() for record in logged.records if record.levelname == "WARNING"]
    assert len(warnings) == is_much
    assert not is_much or f"{corpus.num_cut} characters" in warnings[0]


def test_nul_characters_are_a_warning(tmp_path, logged):
    (tmp_path / "a.txt").write_bytes(b"A text. " * 900 + b"\0" * 12)
    assert text_of(open_corpus(data_with(), str(tmp_path / "a.txt"))).endswith("\0")
    assert "12 NUL" in logged.text


def test_documents_end_at_separators_and_files(tmp_path):
    for name, raw in (("a", b"One.\r\n%\r\nTwo.\r\n"), ("b", b""), ("c", b"Three.\n%\n")):
        (tmp_path / f"{name}.txt").write_bytes(raw)
    corpus = open_corpus(data_with(document_separator="\r\n%\r\n"), str(tmp_path))
    assert text_of(corpus) == f"One.{END}Two.\n{END}Three.{END}"


def test_missing_separator_is_refused_in_a_single_file(tmp_path):
    (tmp_path / "a.txt").write_text("One. Two.")
    data = data_with(document_separator="%")
    with pytest.raises(UserError, match=r"document_separator='%': .*a\.txt"):
        open_corpus(data, str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_text("Three.")
    assert text_of(open_corpus(data, str(tmp_path))) == f"One. Two.{END}Three.{END}"


def test_manual_is_cleaned_like_any_text(tmp_path, monkeypatch):
    monkeypatch.setenv("CHARLSTM_CACHE", str(tmp_path))
    corpus = open_corpus(data_with(lowercase=True), "", source=PYTHON_MANUAL)
    assert corpus.source == PYTHON_MANUAL
    assert len(corpus.ids_M) > 100_000
    assert text_of(corpus) == text_of(corpus).lower()


def test_dracula_has_the_size_of_the_tutorial(monkeypatch):
    monkeypatch.delenv("CHARLSTM_CACHE")  # of the tests; a user may have it
    path = cache_folder() / "pg345.txt"
    if not path.exists():
        pytest.skip("Dracula was not downloaded yet")
    text = text_of(open_corpus(data_with(), str(path)))
    assert len(text) == 845_922
    assert "DRACULA" in text[:500]
    assert "Project Gutenberg" not in text


# --- a large text, in the cache ---


@pytest.fixture
def cache(tmp_path, monkeypatch, logged):
    """Return an empty cache; a text of more than 1,000 characters is large."""
    monkeypatch.setenv("CHARLSTM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(charlstm.data.corpus, "SMALL_CHARS", 1000)
    monkeypatch.setattr(charlstm.data.passes, "LARGE_BYTES", 1000)
    return tmp_path / "cache" / "texts"


def entries(cache):
    return sorted(path.name for path in cache.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name))


def assert_text(corpus, text):
    assert text_of(corpus) == text
    assert corpus.vocab.characters == tuple(sorted(set(text)))


def refuse(*args, **kwargs):
    raise AssertionError("not needed")


@pytest.mark.parametrize(("size", "dtype"), [(90, "uint8"), (300, "uint16"), (70_000, "uint32")])
def test_large_text_is_mapped_with_the_same_ids(cache, tmp_path, size, dtype):
    text = "".join(map(chr, [*range(32, 0xD000), *range(0x10000, 0x10000 + size)][:size])) * 12
    (tmp_path / "large.txt").write_text(text, encoding="utf-8", newline="")
    mapped = open_corpus(data_with(), str(tmp_path / "large.txt"))
    assert len(entries(cache)) == 1
    assert not mapped.ids_M.flags.owndata
    assert not mapped.ids_M.flags.writeable
    assert mapped.ids_M.dtype == dtype
    assert_text(mapped, text)
    assert mapped.ids_M.tolist() == Vocab.from_text(text).encode(text).tolist()
    assert mapped.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_small_text_is_not_cached(cache, book_path, monkeypatch):
    monkeypatch.setattr(charlstm.data.corpus, "SMALL_CHARS", 10_000)
    open_corpus(data_with(), str(book_path))
    assert not cache.exists()


def test_unchanged_text_is_not_read_again(cache, book_path, monkeypatch):
    first = open_corpus(data_with(), str(book_path))
    monkeypatch.setattr(charlstm.data.passes, "read_blocks", refuse)
    second = open_corpus(data_with(), str(book_path))
    np.testing.assert_array_equal(second.ids_M, first.ids_M)
    assert second.vocab.characters == first.vocab.characters
    assert second[2:] == first[2:]


def test_known_content_is_not_encoded_again(cache, book, book_path, monkeypatch):
    open_corpus(data_with(), str(book_path))
    monkeypatch.setattr(charlstm.data.corpus, "_store", refuse)
    os.utime(book_path, (1, 1))
    assert_text(open_corpus(data_with(), str(book_path)), book)
    (book_path.parent / "copy.txt").write_text(book)
    assert_text(open_corpus(data_with(), str(book_path.parent / "copy.txt")), book)


def test_change_is_noticed_at_the_same_size_and_time(cache, book, book_path):
    first = open_corpus(data_with(), str(book_path))
    status = book_path.stat()
    book_path.write_text(book.swapcase())
    os.utime(book_path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = open_corpus(data_with(), str(book_path))
    assert_text(second, book.swapcase())
    assert second.sha256 != first.sha256
    assert len(entries(cache)) == 2


@pytest.mark.parametrize(
    "change", [{"lowercase": True}, {"strip_punctuation": True}, {"min_count": 90}]
)
def test_other_settings_make_another_entry(cache, book_path, change):
    open_corpus(data_with(), str(book_path))
    assert len(open_corpus(data_with(**change), str(book_path)).vocab) < 32
    assert len(entries(cache)) == 2


def test_other_vocabulary_makes_another_entry(cache, book, book_path):
    own = open_corpus(data_with(), str(book_path))
    vocab = Vocab(" abcdefgh")
    for unknown, other in (("drop", ""), ("replace", " ")):
        corpus = open_corpus(data_with(), str(book_path), vocab=vocab, unknown=unknown)
        text = "".join(char if char in vocab else other for char in book)
        assert text_of(corpus) == text
        assert corpus.num_unknown == sum(char not in vocab for char in book)
    assert own.num_unknown == 0
    assert_text(own, book)


def test_unknown_character_has_its_position_in_the_whole_text(cache, tmp_path):
    for name, text in (("a.txt", "ab" * 2000), ("b.txt", "ab\u20ac")):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"\(U\+20AC\) at position 4002 is not among"):
        open_corpus(data_with(), f"{tmp_path}/*.txt", vocab=Vocab("ab"))
    assert entries(cache) == []


@pytest.mark.parametrize("name", ["ids.bin", "about.json"])
@pytest.mark.parametrize("size", [0, 7, None])
def test_damaged_entry_is_replaced(cache, book, book_path, name, size):
    open_corpus(data_with(), str(book_path))
    path = cache / entries(cache)[0] / name
    path.unlink() if size is None else os.truncate(path, size)
    assert_text(open_corpus(data_with(), str(book_path)), book)


KILLED = """
import os, signal, sys
from charlstm.data import corpus
from charlstm.config import base_config
corpus.SMALL_CHARS = 1000
encode_text = corpus.encode_text
def half(*args):
    for ids in encode_text(*args):
        yield ids[: len(ids) // 2]
        os.kill(os.getpid(), signal.SIGKILL)
corpus.encode_text = half
corpus.open_corpus(base_config().data, sys.argv[1])
"""


def test_leftovers_of_a_kill_are_removed(cache, book, book_path):
    command = [sys.executable, "-c", KILLED, str(book_path)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".tmp"]
    other = book_path.parent / "other.txt"
    other.write_text(book * 2)
    assert_text(open_corpus(data_with(), str(other)), book * 2)
    assert not list(cache.glob("*.tmp"))
    assert_text(open_corpus(data_with(), str(book_path)), book)


FULL = """
import resource, sys
from charlstm.data import corpus
from charlstm.config import base_config
from charlstm.errors import RunError
corpus.SMALL_CHARS = 1000
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    corpus.open_corpus(base_config().data, sys.argv[1])
except RunError as error:
    print(error)
"""


def test_full_disk_is_one_line_and_leaves_nothing(cache, book, book_path):
    command = [sys.executable, "-c", FULL, str(book_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert len(answer.stdout.splitlines()) == 1, answer
    assert f"{texts_folder()}: cannot be written (File too large)" in answer.stdout
    assert f"{len(book):,} bytes" in answer.stdout
    assert "CHARLSTM_CACHE" in answer.stdout
    assert [path for path in cache.rglob("*") if path.suffix != ".lock"] == []
    assert_text(open_corpus(data_with(), str(book_path)), book)


def test_small_disk_is_refused_before_encoding(cache, book_path, monkeypatch):
    usage = type(charlstm.data.corpus.shutil.disk_usage("/"))
    monkeypatch.setattr(
        charlstm.data.corpus.shutil, "disk_usage", lambda path: usage(9999, 9998, 1)
    )
    with pytest.raises(RunError, match=r"No space left on device.*6,000 bytes"):
        open_corpus(data_with(), str(book_path))
    assert entries(cache) == []


def test_text_that_changes_between_passes_is_refused(cache, book_path, monkeypatch):
    collect_stats = charlstm.data.corpus.collect_stats

    def collect_and_change(*args):
        stats = collect_stats(*args)
        with book_path.open("a") as file:
            file.write("More?")
        return stats

    monkeypatch.setattr(charlstm.data.corpus, "collect_stats", collect_and_change)
    for limit in (1000, 10_000):
        monkeypatch.setattr(charlstm.data.corpus, "SMALL_CHARS", limit)
        with pytest.raises(UserError, match=r"book.txt: has changed while it was read"):
            open_corpus(data_with(), str(book_path))
    assert entries(cache) == []


def test_two_processes_encode_a_text_once(cache, book, book_path, monkeypatch, logged):
    store, is_storing, may_store = charlstm.data.corpus._store, threading.Event(), threading.Event()
    calls, corpora = [], []

    def slow_store(*args):
        calls.append(args)
        is_storing.set()
        assert may_store.wait(60)
        store(*args)

    monkeypatch.setattr(charlstm.data.corpus, "_store", slow_store)
    threads = [
        threading.Thread(target=lambda: corpora.append(open_corpus(data_with(), str(book_path))))
        for _ in range(2)
    ]
    threads[0].start()
    assert is_storing.wait(60)
    threads[1].start()
    while "waiting for another process" not in logged.text:
        assert threads[1].is_alive()
        threads[1].join(0.01)
    assert corpora == []
    may_store.set()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert len(corpora) == 2
    for corpus in corpora:
        assert_text(corpus, book)


def test_passes_over_a_large_text_are_logged(cache, book_path, logged):
    open_corpus(data_with(), str(book_path))
    lines = [record.getMessage() for record in logged.records]
    assert [line.split(":")[0] for line in lines] == ["counting characters", "encoding characters"]
    assert all(re.search(r"0 MB in [0-9.]+ s, [0-9]+ MB/s$", line) for line in lines)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forget_pages_releases_memory(cache, tmp_path):
    raw = bytes(range(32, 127)) * 350_000
    (tmp_path / "large.txt").write_bytes(raw)
    corpus = open_corpus(data_with(), str(tmp_path / "large.txt"))
    part_M = corpus.ids_M[1000:]
    before, total = resident_bytes(), int(part_M.sum(dtype=np.int64))
    assert resident_bytes() - before > 20_000_000
    forget_pages(part_M)
    assert resident_bytes() - before < 10_000_000
    assert int(part_M.sum(dtype=np.int64)) == total
    forget_pages(np.zeros(9))  # a text in memory
