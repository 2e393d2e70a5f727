"""A text of any size: what is streamed is what the whole text gives, and nothing is half-made."""

import bz2
import glob
import gzip
import hashlib
import json
import logging
import lzma
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launching import WarmLauncher

import charlstm.data.corpus
import charlstm.data.passes
from charlstm.config import base_config
from charlstm.data import find
from charlstm.data.cleaning import Cleaning
from charlstm.data.corpus import forget_pages, open_corpus, texts_folder
from charlstm.data.encoding import decode
from charlstm.data.gutenberg import cut_gutenberg
from charlstm.data.sources import find_source, read_blocks
from charlstm.data.vocab import END, UNKNOWN, Vocab, count_characters
from charlstm.errors import RunError, UserError

START = "*** START OF THE PROJECT GUTENBERG EBOOK X ***"
FINISH = "*** END OF THE PROJECT GUTENBERG EBOOK X ***"


def data_with(**changes):
    data = base_config().data
    data.update(changes)
    return data


def read(path, **changes):
    """Return the text of a path, as it is cleaned."""
    corpus = open_corpus(data_with(**changes), str(path))
    return corpus.vocab.decode(corpus.ids_M)


# --- a stream gives what the whole text gives ---

# Among them a capital sigma, whose small form depends on where in a word it stands.
SIGMA = "\u03a3"
FRAMES = [f"\n{START}\n", f"\n{FINISH}\n", f"\n{FINISH}", "End of Project Gutenberg's X\n"]
SPACES = ["\r", "\n", "\r\n", "\n\n\n", " "]
MARKS = [
    "a",
    "B",
    "#",
    "##",
    "'",
    SIGMA,
    f"B{SIGMA}",
    "\u00e9",
    "\u4e2d",
    "\U0001f600",
    "\ufeff",
    END,
]
PIECES = st.sampled_from(SPACES + MARKS + FRAMES)
CLEANINGS = st.builds(
    Cleaning, st.booleans(), st.booleans(), st.sampled_from(["", "#", "##", "\n\n"])
)


def cleaned_whole(raw, cleaning):
    """Return what Cleaning.apply should, by plain operations on the whole text."""
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
def test_a_file_cut_anywhere_is_cleaned_as_the_whole(text, size, cleaning):
    raw = text.encode()
    chunks = cleaning.apply(decode(blocks_of(raw, size), "name"))
    assert "".join(chunks) == cleaned_whole(raw, cleaning)


@given(st.text("aab \n", min_size=2, max_size=50), st.text("xyz", max_size=9), st.integers(1, 5))
def test_rare_characters_fold_into_one(common, rare, min_count):
    text = common + rare + "ab" * 5
    counts = Counter(text)
    vocab = Vocab.from_counts(count_characters([text[:20], text[20:]]), min_count)
    folded = [char if counts[char] >= min_count else UNKNOWN for char in text]
    assert list(vocab.characters) == sorted(set(folded))
    assert vocab.decode(vocab.encode(text, "replace")) == "".join(folded)


def test_the_end_of_a_document_is_never_too_rare(tmp_path):
    (tmp_path / "few.txt").write_text("aaaabbbb|aaaabbbbc")
    corpus = open_corpus(data_with(min_count=3, document_separator="|"), str(tmp_path / "few.txt"))
    assert corpus.vocab.characters == (END, "a", "b", UNKNOWN)
    assert corpus.vocab.decode(corpus.ids_M) == f"aaaabbbb{END}aaaabbbb{UNKNOWN}{END}"


def test_what_is_unknown_elsewhere_folds_too_where_there_is_something_to_fold_into():
    assert Vocab(["a", UNKNOWN]).encode("ab", "replace").tolist() == [0, 1]


# --- files, folders, patterns ---


COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": partial(lzma.compress, preset=0),
}


@pytest.fixture
def folder(tmp_path):
    """Return a folder with texts of all kinds, and files that are none."""
    folder = tmp_path / "books"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.txt").write_text("Second. ")
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"Fi") + gzip.compress(b"rst. "))
    compressed = zstandard.compress(b"Thi") + zstandard.compress(b"rd. ")
    (folder / "more" / "a.txt.zst").write_bytes(compressed)
    (folder / "notes.tar.gz").write_bytes(gzip.compress(b"No text. "))
    for name in ("notes.md", ".secret.txt", ".hidden/a.txt"):
        (folder / name).write_text("Not to be read. ")
    return folder


def test_a_folder_is_its_texts_in_order_of_their_names(folder):
    assert read(folder) == "First. Second. Third. "


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("*.txt*", "First. Second. "),
        ("**/*.zst", "Third. "),
        ("[ab].*", "First. Second. "),
        ("**/a*", "First. Third. "),
        ("*/*.zst", "Third. "),
        ("../*/more/**", "Third. "),
    ],
)
def test_a_pattern_is_the_files_that_match_it(folder, pattern, text):
    assert read(folder / pattern) == text


@given(st.lists(st.sampled_from(["a", "b.x", "c[d]"]), min_size=1, max_size=4), st.data())
def test_a_pattern_matches_what_the_shell_would(tmp_path_factory, names, data):
    words = st.sampled_from(["*", "**", "?", "a", "b.*", "c[[]d]", "[!a]*"])
    pattern = data.draw(st.lists(words, min_size=1, max_size=4))
    root = tmp_path_factory.mktemp("tree")
    path = root.joinpath(*names, "file")
    path.parent.mkdir(parents=True)
    path.touch()
    found = glob.glob("/".join([*pattern, "file"]), root_dir=root, recursive=True)
    assert find._matches([*names, "file"], [*pattern, "file"]) == bool(found)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt{}", "a{}", "A.TXT{}", "a.Txt{}"])
def test_an_ending_means_the_same_in_any_case_and_in_all_places(tmp_path, ending, name):
    name = name.format(ending.upper() if "TXT" in name else ending)
    (tmp_path / name).write_bytes(COMPRESS[ending](b"A text."))
    for path in (name, "", "*"):
        assert read(tmp_path / path) == "A text."


def test_an_ending_of_a_plain_text_may_be_in_capitals(tmp_path):
    for name in ("A.TXT", "b.Txt", "c.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == "A.TXTb.Txtc.txt"


def test_a_file_is_read_once_and_links_to_folders_are_not_followed(tmp_path):
    folder, elsewhere = tmp_path / "books", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "d.txt").write_text("Not to be read. ")
    folder.mkdir()
    (folder / "a.txt").write_text("Once. ")
    (folder / "b.txt").symlink_to("a.txt")
    os.link(folder / "a.txt", folder / "c.txt")
    for name, where in (("latest", "."), ("again", "."), ("other", elsewhere)):
        (folder / name).symlink_to(where)
    for pattern in ("", "**/*.txt", "*/*.txt", "*.txt"):
        if pattern == "*/*.txt":
            with pytest.raises(UserError, match="no file matches"):
                read(folder / pattern)
        else:
            assert read(folder / pattern) == "Once. "


def test_runs_sweeps_and_the_cache_are_no_part_of_a_text(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("A text. ")
    monkeypatch.setenv("CHARLSTM_CACHE", str(tmp_path / "cache"))
    ours = {
        "run/config.json": '{"schema": 7, "config": {}, "text": {}}',
        "sweep/sweep.json": '{"varied": []}',
        "moved/checkpoints/3/_CHECKPOINT_METADATA": "{}",
        "cache/x": "",
    }
    for name, content in ours.items():
        path = tmp_path / "more" / name if "cache" not in name else tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
    for name in ("more/run", "more/sweep/texts", "more/moved", "more/moved/checkpoints/3", "cache"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "b.txt").write_text("Not to be read. ")
    # Somebody else's.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('["schema"]')
    (tmp_path / "other" / "z.txt").write_text("Another.")
    for pattern in ("", "**/*.txt"):
        assert read(tmp_path / pattern) == "A text. Another."
    with pytest.raises(UserError, match=r"in this folder"):
        read(tmp_path / "more" / "run")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("itself")
    assert read(tmp_path / "a[1].txt") == "itself"


def test_the_hash_is_what_sha256sum_tells(folder):
    corpus = open_corpus(data_with(), str(folder))
    # As BUILD.md says.
    command = (
        r"find . -path '*/.*' -prune -o -type f -iregex '.*\.\(txt\|gz\|zst\|bz2\|xz\)' "
        r"-not -iname '*.tar.*' -printf '%P\n'"
    )
    command += r" | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum"
    told = subprocess.run(command, shell=True, cwd=folder, capture_output=True, check=True).stdout
    assert corpus.sha256 == told.decode().split()[0]
    alone = open_corpus(data_with(), str(folder / "b.txt")).sha256
    assert alone == hashlib.sha256(b"Second. ").hexdigest()
    (folder / "b.txt").write_text("second. ")
    assert open_corpus(data_with(), str(folder)).sha256 != corpus.sha256


def test_each_file_ends_a_document_and_so_does_the_separator(folder):
    (folder / "b.txt").write_text("Second. ||Or 2nd. ||")
    (folder / "c.txt").write_text("")
    text = read(folder, document_separator="||")
    assert text == f"First. {END}Second. {END}Or 2nd. {END}Third. {END}"


def test_a_separator_may_have_the_line_ends_of_its_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\n%\r\nTwo.\r\n")
    assert read(tmp_path / "a.txt", document_separator="\r\n%\r\n") == f"One.{END}Two.\n{END}"


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_compressed_file_is_read_in_pieces_however_much_it_holds(tmp_path, ending):
    raw = os.urandom(1_500_000).hex().encode()
    (tmp_path / f"a{ending}").write_bytes(COMPRESS[ending](raw))
    [file] = find_source(str(tmp_path / f"a{ending}")).files
    blocks = list(read_blocks(file))
    assert b"".join(blocks) == raw
    assert max(map(len, blocks)) < 0.8 * len(raw)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "trailing", "none"])
def test_a_compressed_file_that_is_not_whole_is_one_line(tmp_path, ending, damage):
    whole = COMPRESS[ending](b"A text that is long enough to be damaged. " * 99)
    raw = {
        "empty": b"",
        "cut": whole[:-1],
        "flipped": whole[:40] + bytes([whole[40] ^ 255]) + whole[41:],
        "trailing": whole + b"and something else",
        "none": whole,
    }[damage]
    (tmp_path / f"a{ending}").write_bytes(raw)
    if damage == "none":
        assert read(tmp_path / f"a{ending}").startswith("A text")
        return
    with pytest.raises(UserError, match=rf"a{ending}: cannot be decompressed \(.*again") as error:
        read(tmp_path / f"a{ending}")
    assert "\n" not in str(error.value)


WESTERN = "\u201cNo\u201d, the count said; na\u00efve. "
WRONG_KINDS = {
    "UTF-16 little": (WESTERN.encode("utf-16-le"), ".txt", "iconv -f UTF-16LE"),
    "UTF-16 big": (WESTERN.encode("utf-16-be"), ".txt", "iconv -f UTF-16BE"),
    "UTF-16 cut": (b"\xff\xfeA", ".txt", "not UTF-16 (byte 0x41 at offset 2); the file is damaged"),
    "Windows-1252": (WESTERN.encode("cp1252"), ".txt", "iconv -f CP1252"),
    "Latin-1": (("K\u00e4se " * 9).encode("latin1"), ".txt", "iconv -f CP1252"),
    "Shift-JIS": (("\u3042\u306e\u3001" * 9).encode("shift-jis"), ".txt", "iconv -f ENCODING"),
    "KOI8-R": (("\u0414\u0430 " * 9).encode("koi8-r"), ".txt", "iconv -f ENCODING"),
    "zip": (b"PK\x03\x04" + bytes(99), ".txt", "a zip archive"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", ".txt", "a PDF"),
    "program": (b"\x7fELF\x02\x01" + bytes(500), ".txt", "NUL bytes"),
    "twice": (gzip.compress(gzip.compress(b"A text.")), ".gz", "end in .gz"),
    "xz as gz": (lzma.compress(b"A text."), ".txt.gz", "its name should end in .xz"),
} | {f"{end} as txt": (make(b"A"), ".txt", f"end in {end}") for end, make in COMPRESS.items()}


@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_a_file_that_is_no_utf8_text_is_named_for_what_it_is(tmp_path, kind):
    raw, ending, message = WRONG_KINDS[kind]
    (tmp_path / f"a{ending}").write_bytes(raw)
    with pytest.raises(UserError) as error:
        read(tmp_path / f"a{ending}")
    assert str(error.value).startswith(f"{tmp_path}/a{ending}: ")
    assert message in str(error.value)


def test_nul_characters_are_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("charlstm"), "propagate", True)
    (tmp_path / "a.txt").write_bytes(b"A text. " * 900 + b"\0" * 12)
    assert read(tmp_path / "a.txt").endswith("\0")
    assert "12 NUL" in caplog.text


def test_a_path_may_begin_with_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert read("~/b.txt") == "Second. "
    assert read("~/*.txt") == "Second. "


def test_a_link_to_nowhere_in_a_folder_is_one_line_with_its_path(folder):
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"books/b.txt: no such file; give"):
        read(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_of_a_folder_is_one_line_with_its_path(folder):
    (folder / "b.txt").chmod(0)
    with pytest.raises(UserError, match=r"books/b.txt: cannot be read \(Permission denied\)"):
        read(folder)


# --- a large text, in the cache ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache, for which 1,000 characters are many."""
    monkeypatch.setenv("CHARLSTM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(charlstm.data.corpus, "SMALL_CHARS", 1000)
    monkeypatch.setattr(charlstm.data.passes, "LARGE_BYTES", 1000)
    monkeypatch.setattr(logging.getLogger("charlstm"), "propagate", True)
    return tmp_path / "cache" / "texts"


def entries(cache):
    return sorted(path.name for path in cache.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name))


def assert_text(corpus, text):
    assert corpus.vocab.decode(corpus.ids_M) == text
    assert corpus.vocab.characters == tuple(sorted(set(text)))


def refuse(*args, **kwargs):
    raise AssertionError("this should not be done again")


@pytest.mark.parametrize(("size", "dtype"), [(90, "uint8"), (300, "uint16"), (70_000, "uint32")])
def test_a_large_text_is_mapped_with_the_ids_that_it_has_in_memory(cache, tmp_path, size, dtype):
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


def test_a_small_text_leaves_nothing_in_the_cache(cache, book_path, monkeypatch):
    monkeypatch.setattr(charlstm.data.corpus, "SMALL_CHARS", 10_000)
    open_corpus(data_with(), str(book_path))
    assert not cache.exists()


def test_a_second_start_reads_nothing(cache, book_path, monkeypatch):
    first = open_corpus(data_with(), str(book_path))
    monkeypatch.setattr(charlstm.data.passes, "read_blocks", refuse)
    second = open_corpus(data_with(), str(book_path))
    np.testing.assert_array_equal(second.ids_M, first.ids_M)
    assert second.vocab.characters == first.vocab.characters
    assert second[2:] == first[2:]


def test_a_text_that_looks_new_but_is_not_is_hashed_and_not_numbered_again(
    cache, book, book_path, monkeypatch
):
    open_corpus(data_with(), str(book_path))
    monkeypatch.setattr(charlstm.data.corpus, "_store", refuse)
    os.utime(book_path, (1, 1))
    assert_text(open_corpus(data_with(), str(book_path)), book)
    (book_path.parent / "copy.txt").write_text(book)
    assert_text(open_corpus(data_with(), str(book_path.parent / "copy.txt")), book)


def test_a_text_that_has_changed_is_noticed_even_at_the_same_size_and_time(cache, book, book_path):
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
def test_another_preparation_is_another_entry(cache, book_path, change):
    open_corpus(data_with(), str(book_path))
    assert len(open_corpus(data_with(**change), str(book_path)).vocab) < 32
    assert len(entries(cache)) == 2


def test_the_text_of_another_vocabulary_is_another_entry(cache, book, book_path):
    own = open_corpus(data_with(), str(book_path))
    foreign = Vocab(" abcdefgh")
    for unknown, wanted in (("drop", ""), ("replace", " ")):
        found = open_corpus(data_with(), str(book_path), vocab=foreign, unknown=unknown)
        text = "".join(char if char in foreign.characters else wanted for char in book)
        assert found.vocab.decode(found.ids_M) == text
        assert found.num_unknown == sum(char not in foreign.characters for char in book)
    assert own.num_unknown == 0
    assert_text(own, book)


def test_the_position_of_an_unknown_character_is_that_in_the_whole_text(cache, tmp_path):
    for name, text in (("a.txt", "ab" * 2000), ("b.txt", "ab\u20ac")):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"\(U\+20AC\) at position 4002 is not among"):
        open_corpus(data_with(), f"{tmp_path}/*.txt", vocab=Vocab("ab"))
    assert entries(cache) == []


@pytest.mark.parametrize("name", ["ids.bin", "about.json"])
@pytest.mark.parametrize("size", [0, 7, None])
def test_an_entry_that_is_not_whole_is_made_anew(cache, book, book_path, name, size):
    open_corpus(data_with(), str(book_path))
    path = cache / entries(cache)[0] / name
    path.unlink() if size is None else os.truncate(path, size)
    assert_text(open_corpus(data_with(), str(book_path)), book)


KILLED = """
import os, signal, sys
from charlstm.data import corpus
from charlstm.config import base_config
corpus.SMALL_CHARS = 1000
whole = corpus.encode_text
def half(*args):
    for ids in whole(*args):
        yield ids[: len(ids) // 2]
        os.kill(os.getpid(), signal.SIGKILL)
corpus.encode_text = half
corpus.open_corpus(base_config().data, sys.argv[1])
"""


def test_what_a_kill_leaves_is_never_opened_and_removed_by_the_next(cache, book, book_path):
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


def test_a_disk_that_fills_is_one_line_and_leaves_nothing(cache, book, book_path):
    command = [sys.executable, "-c", FULL, str(book_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert len(answer.stdout.splitlines()) == 1, answer
    assert f"{texts_folder()}: cannot be written (File too large)" in answer.stdout
    assert f"{len(book):,} bytes" in answer.stdout
    assert "CHARLSTM_CACHE" in answer.stdout
    assert [path for path in cache.rglob("*") if path.suffix != ".lock"] == []
    assert_text(open_corpus(data_with(), str(book_path)), book)


def test_a_disk_without_room_is_told_before_anything_is_numbered(cache, book_path, monkeypatch):
    usage = type(charlstm.data.corpus.shutil.disk_usage("/"))
    monkeypatch.setattr(
        charlstm.data.corpus.shutil, "disk_usage", lambda path: usage(9999, 9998, 1)
    )
    with pytest.raises(RunError, match=r"No space left on device.*6,000 bytes"):
        open_corpus(data_with(), str(book_path))
    assert entries(cache) == []


def test_a_text_that_changes_while_it_is_read_is_refused(cache, book_path, monkeypatch):
    stats = charlstm.data.corpus.collect_stats

    def collect_stats_and_change(*args):
        result = stats(*args)
        with book_path.open("a") as file:
            file.write("more")
        return result

    monkeypatch.setattr(charlstm.data.corpus, "collect_stats", collect_stats_and_change)
    for limit in (1000, 10_000):
        monkeypatch.setattr(charlstm.data.corpus, "SMALL_CHARS", limit)
        with pytest.raises(UserError, match=r"book.txt: has changed while it was read"):
            open_corpus(data_with(), str(book_path))
    assert entries(cache) == []


def test_of_two_that_prepare_a_text_one_does_and_the_other_waits(
    cache, book, book_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    store, is_in, may_go, calls = (
        charlstm.data.corpus._store,
        threading.Event(),
        threading.Event(),
        [],
    )

    def slow_store(*args):
        calls.append(args)
        is_in.set()
        assert may_go.wait(60)
        store(*args)

    monkeypatch.setattr(charlstm.data.corpus, "_store", slow_store)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(open_corpus(data_with(), str(book_path))))
        for _ in range(2)
    ]
    threads[0].start()
    assert is_in.wait(60)
    threads[1].start()
    while "waiting for another process" not in caplog.text:
        assert threads[1].is_alive()
        threads[1].join(0.01)
    assert found == []
    may_go.set()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert len(found) == 2
    for corpus in found:
        assert_text(corpus, book)


def test_each_pass_over_a_large_text_is_told(cache, book_path, caplog):
    caplog.set_level(logging.INFO)
    open_corpus(data_with(), str(book_path))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == ["counting characters", "encoding characters"]
    assert all(re.search(r"0 MB in [0-9.]+ s, [0-9]+ MB/s$", line) for line in lines)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_that_were_read_can_be_let_go_of_and_read_again(cache, tmp_path):
    raw = bytes(range(32, 127)) * 350_000
    (tmp_path / "large.txt").write_bytes(raw)
    corpus = open_corpus(data_with(), str(tmp_path / "large.txt"))
    part_M = corpus.ids_M[1000:]
    before, total = resident_bytes(), int(part_M.sum(dtype=np.int64))
    assert resident_bytes() - before > 20_000_000
    forget_pages(part_M)
    assert resident_bytes() - before < 10_000_000
    assert int(part_M.sum(dtype=np.int64)) == total
    forget_pages(np.zeros(9))  # of a small text there is nothing to let go of


# --- documents, from the command line to the end ---


@pytest.fixture
def launch(tmp_path):
    """Return launch(launcher, *flags) -> (stdout, stderr) of a success in tmp_path."""
    warm = WarmLauncher("charlstm.training.loop", "charlstm.system.console")

    def launch(launcher, *flags):
        answer = warm(launcher, *flags, cwd=tmp_path)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout, answer.stderr

    yield launch
    warm.close()


def test_a_run_on_documents_writes_one_and_stops(tmp_path, launch):
    (tmp_path / "stories").mkdir()
    story = "Once upon a time.\n"
    for name in "abc":
        (tmp_path / "stories" / f"{name}.txt").write_text("<|end|>".join([story] * 100))
    flags = ["--config=tiny", "--config.num_steps=100", "--config.data.path=stories"]
    flags += ["--config.data.document_separator=<|end|>", "--config.optimizer.learning_rate=0.02"]
    # What compiles fast and learns a story by heart.
    flags += ["--config.model.multiplicative=False", "--config.model.recurrent_rms_norm=False"]
    flags += ["--config.model.dropout_rate=0"]
    flags += ["--config.optimizer.name=adam", "--config.optimizer.weight_decay=0"]
    flags += ["--config.optimizer.average_window=0", "--config.eval_every_steps=100"]
    told, _ = launch("train", *flags)
    samples = (tmp_path / "runs/tiny-stories/samples.txt").read_text()
    assert "<|end|>" in samples
    assert END not in samples + told
    vocab = json.loads((tmp_path / "runs/tiny-stories/vocab.json").read_text())
    assert vocab == sorted({*story, END})

    def sample(*flags):
        words = ("--workdir=runs/tiny-stories", "--length=600", "--temperature=0", *flags)
        return launch("sample", *words)[0]

    assert sample("--stream") == story + "\n"
    assert sample("--prompt=Once up", "--num_samples=2") == f"{story}\n\f\n{story}\n"
    # A prompt may have documents in it.
    assert sample(f"--prompt={story}<|end|>Once") == f"{story}<|end|>{story}\n"
    endless = sample("--nostop_at_end")
    assert endless.startswith(f"{story}<|end|>{story}")
    assert len(endless) > 600
    assert END not in endless
    (tmp_path / "new.txt").write_text(story)
    figures, _ = launch("evaluate", "--workdir=runs/tiny-stories", "--text=new.txt")
    assert re.search(rf"characters +{len(story)}\n", figures)  # its END is one, too
    figures, _ = launch("evaluate", "--workdir=runs/tiny-stories")
    assert f"the last {round(0.1 * 300 * len(story + END)):,} characters of" in figures
    assert f"{tmp_path}/stories\n" in figures
