"""Files of a text: folders, patterns, compression, Dracula and Python's manual."""

import bz2
import glob
import gzip
import hashlib
import http.server
import logging
import lzma
import os
import subprocess
import threading
from functools import partial

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import charlstm.data.sources
from charlstm.data.find import _matches
from charlstm.data.sources import PYTHON_MANUAL, find_source, hash_of, read_blocks
from charlstm.errors import UserError

COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": partial(lzma.compress, preset=0),
}


def read(path):
    return b"".join(raw for file in find_source(str(path)).files for raw in read_blocks(file))


def refusal_of(path):
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with texts of all kinds, and other files."""
    folder = tmp_path / "books"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.txt").write_text("Second. ")
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"Fi") + gzip.compress(b"rst. "))
    compressed = zstandard.compress(b"Thi") + zstandard.compress(b"rd. ")
    (folder / "more" / "a.txt.zst").write_bytes(compressed)
    (folder / "notes.tar.gz").write_bytes(gzip.compress(b"Not text. "))
    for name in ("notes.md", ".secret.txt", ".hidden/a.txt"):
        (folder / name).write_text("Not to be read. ")
    return folder


# --- files, folders, patterns ---


@pytest.mark.parametrize(
    ("pattern", "content"),
    [
        ("", b"First. Second. Third. "),
        ("*.txt*", b"First. Second. "),
        ("**/*.zst", b"Third. "),
        ("[ab].*", b"First. Second. "),
        ("**/a*", b"First. Third. "),
        ("../*/more/**", b"Third. "),
    ],
)
def test_folders_and_patterns_are_read_in_order(folder, pattern, content):
    assert read(folder / pattern) == content


@given(st.lists(st.sampled_from(["a", "b.x", "c[d]"]), min_size=1, max_size=4), st.data())
def test_patterns_match_like_glob(tmp_path_factory, names, data):
    words = st.sampled_from(["*", "**", "?", "a", "b.*", "c[[]d]", "[!a]*"])
    pattern = data.draw(st.lists(words, min_size=1, max_size=4))
    root = tmp_path_factory.mktemp("tree")
    path = root.joinpath(*names, "file")
    path.parent.mkdir(parents=True)
    path.touch()
    matches = glob.glob("/".join([*pattern, "file"]), root_dir=root, recursive=True)
    assert _matches([*names, "file"], [*pattern, "file"]) == bool(matches)


@pytest.mark.parametrize("name", ["a.txt", "B.TXT", "a.txt.gz", "b.Zst", "A.TXT.BZ2", "c.xz"])
def test_ending_decides_in_any_case(tmp_path, name):
    compress = COMPRESS.get(os.path.splitext(name.lower())[1], bytes)
    (tmp_path / name).write_bytes(compress(b"A text."))
    for path in (name, "", "*"):
        assert read(tmp_path / path) == b"A text."


def test_file_with_several_names_is_read_once(tmp_path):
    folder, elsewhere = tmp_path / "books", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "d.txt").write_text("Not to be read. ")
    folder.mkdir()
    (folder / "a.txt").write_text("Once. ")
    (folder / "b.txt").symlink_to("a.txt")
    os.link(folder / "a.txt", folder / "c.txt")
    for name, target in (("latest", "."), ("again", "."), ("other", elsewhere)):
        (folder / name).symlink_to(target)
    for pattern in ("", "**/*.txt", "*.txt"):
        assert read(folder / pattern) == b"Once. "
    assert "no file matches" in refusal_of(folder / "*/*.txt")  # links to folders


def test_runs_sweeps_and_the_cache_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("A text. ")
    monkeypatch.setenv("CHARLSTM_CACHE", str(tmp_path / "cache"))
    output = {
        "more/run/config.json": '{"schema": 7, "config": {}, "text": {}}',
        "more/sweep/sweep.json": '{"varied": []}',
        "more/moved/checkpoints/3/_CHECKPOINT_METADATA": "{}",
        "cache/x": "",
    }
    for name, content in output.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    for name in ("more/run", "more/sweep/texts", "more/moved", "more/moved/checkpoints/3", "cache"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "b.txt").write_text("Not to be read. ")
    # The folder of another program.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('["schema"]')
    (tmp_path / "other" / "z.txt").write_text("Another.")
    for pattern in ("", "**/*.txt"):
        assert read(tmp_path / pattern) == b"A text. Another."
    assert "in this folder" in refusal_of(tmp_path / "more" / "run")


def test_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    (tmp_path / "a[1].txt").write_text("itself")
    assert read(tmp_path / "a[1].txt") == b"itself"


def test_path_may_start_with_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert read("~/b.txt") == read("~/*.txt") == b"Second. "


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
def test_path_without_a_text_is_refused(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("a text")
    with pytest.raises(UserError) as error:
        find_source(str(tmp_path / name), remedy="give another file")
    assert str(error.value).startswith(f"{tmp_path / name}: {reason}")
    assert str(error.value).endswith("; give another file")


def test_broken_link_in_a_folder_is_named(folder):
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to("nowhere")
    assert "books/b.txt: no such file; give" in refusal_of(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("path", ["", "b.txt"])
def test_unreadable_file_is_named(folder, path):
    (folder / "b.txt").chmod(0)
    assert "books/b.txt: cannot be read (Permission denied)" in refusal_of(folder / path)


def test_hash_is_that_of_sha256sum(folder):
    # The command is in charlstm/data/README.md.
    command = (
        r"find . -path '*/.*' -prune -o -type f -iregex '.*\.\(txt\|gz\|zst\|bz2\|xz\)' "
        r"-not -iname '*.tar.*' -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum"
    )
    output = subprocess.run(
        f"{command} | sha256sum", shell=True, cwd=folder, capture_output=True, check=True
    ).stdout
    source = find_source(str(folder))
    names = [file.name for file in source.files]
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    assert hash_of(source, digests) == output.decode().split()[0]
    assert hash_of(find_source(str(folder / "b.txt")), digests[1:2]) == digests[1]


# --- compressed files ---


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_file_is_read_in_blocks(tmp_path, ending):
    raw = os.urandom(1_500_000).hex().encode()
    (tmp_path / f"a{ending}").write_bytes(COMPRESS[ending](raw))
    [file] = find_source(str(tmp_path / f"a{ending}")).files
    blocks = list(read_blocks(file))
    assert b"".join(blocks) == raw
    assert all(blocks)
    assert max(map(len, blocks)) < 0.8 * len(raw)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "trailing", "mixed"])
def test_damaged_compressed_file_is_refused(tmp_path, ending, damage):
    whole = COMPRESS[ending](b"A text that is long enough to be damaged. " * 99)
    raw = {
        "empty": b"",
        "cut": whole[:-1],
        "flipped": whole[:40] + bytes([whole[40] ^ 255]) + whole[41:],
        "trailing": whole + b"and something else",
        "mixed": whole + COMPRESS[".xz" if ending != ".xz" else ".gz"](b"A text"),
    }[damage]
    (tmp_path / f"a{ending}").write_bytes(raw)
    message = refusal_of(tmp_path / f"a{ending}")
    assert message.startswith(f"{tmp_path}/a{ending}: cannot be decompressed (")
    assert message.endswith("again")


def test_wrong_ending_of_a_compressed_file_is_corrected(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(lzma.compress(b"A text."))
    assert "its name should end in .xz" in refusal_of(tmp_path / "a.txt.gz")


# --- Dracula, or Python's manual ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache, without a network, and with warnings in caplog."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("CHARLSTM_CACHE", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # Nothing listens on port 9.
    monkeypatch.setattr(charlstm.data.sources, "DRACULA_URLS", ("http://127.0.0.1:9/x",))
    # Launchers disable propagation for the rest of the process.
    monkeypatch.setattr(logging.getLogger("charlstm"), "propagate", True)
    return folder


@pytest.fixture
def serve(monkeypatch):
    """Return a function that serves pages, or 404 for None, as the URLs of Dracula."""
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


def python_manual():
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items())).encode()


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_manual_replaces_dracula_without_a_network(cache, caplog, capsys):
    source = find_source("")
    assert source.path == PYTHON_MANUAL == "pydoc_data.topics"
    assert read("") == python_manual()
    assert source.num_bytes == len(python_manual())
    [warning] = warnings_in(caplog)
    assert "127.0.0.1:9" in warning
    assert "config.data.path" in warning
    assert list(cache.iterdir()) == []
    # Nothing may precede the JSON of launch/evaluate.py --json.
    assert capsys.readouterr() == ("", "")


def test_manual_can_be_named(cache, caplog):
    assert read(PYTHON_MANUAL) == python_manual()
    assert find_source(PYTHON_MANUAL).path == PYTHON_MANUAL
    assert warnings_in(caplog) == []


def test_dracula_is_downloaded_once(cache, caplog, serve, monkeypatch):
    page = b"Dracula by Bram Stoker\r\n3 May. Bistritz.\r\n"
    serve(page)
    assert read("") == page
    assert find_source("").path == str((cache / "pg345.txt").resolve())
    assert [path.name for path in cache.iterdir()] == ["pg345.txt"]
    monkeypatch.setattr("pooch.retrieve", lambda *args, **kwargs: pytest.fail("not needed"))
    charlstm.data.sources._fetch_into.cache_clear()
    assert read("") == page
    # A run that was started with the manual continues with it.
    assert find_source("", source=PYTHON_MANUAL).path == PYTHON_MANUAL
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("page", [b"<html>Please log in</html>", None])
def test_other_page_is_refused_and_removed(cache, caplog, serve, page):
    serve(page)
    assert find_source("").path == PYTHON_MANUAL
    assert len(warnings_in(caplog)) == 1
    assert list(cache.iterdir()) == []


def test_next_url_is_tried_when_one_fails(cache, caplog, serve):
    serve(None, b"<html>Please log in</html>", b"Dracula at last")
    assert read("") == b"Dracula at last"
    assert warnings_in(caplog) == []


def test_unwritable_cache_leads_to_the_manual(cache, caplog, serve, monkeypatch):
    serve(b"Dracula, in vain")
    (cache / "file").write_text("not a folder")
    monkeypatch.setenv("CHARLSTM_CACHE", str(cache / "file"))
    assert find_source("").path == PYTHON_MANUAL
    assert len(warnings_in(caplog)) == 1
