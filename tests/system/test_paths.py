import os
import pwd

import pytest

from charlstm.cli import runtime
from charlstm.config import base_config
from charlstm.data.sources import find_source
from charlstm.errors import UserError
from charlstm.runs.checkpoints import load_model
from charlstm.system.paths import cache_folder, given_path, local_path
from charlstm.training.loop import train


@pytest.mark.parametrize("path", ["", "runs/x", "/a/b", "a:b", "books/*.txt", "x~", "./~"])
def test_other_paths_do_not_change(path):
    assert given_path(path) == local_path(path) == path


@pytest.mark.parametrize("check", [given_path, local_path])
def test_tilde_is_the_home_folder_of_the_shell(check, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check("~/a b/c") == f"{tmp_path}/a b/c"
    assert check("~root") == pwd.getpwnam("root").pw_dir
    with pytest.raises(UserError, match="no home folder ~nobody-here"):
        check("~nobody-here/x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~draft.txt").touch()  # a file, as some editors name them
    assert check("~draft.txt") == "~draft.txt"


ADDRESSES = [
    ("https://example.org/book.txt", "https://.* curl"),
    ("HTTP://example.org", "HTTP://.* curl"),
    ("file:///home/book.txt", "file://.* /home/book.txt"),
    ("gs://bucket/run", "gcsfs.*extra gcs"),
    ("s3://bucket/run", "s3fs.*extra s3"),
    ("/gs/bucket/run", "gcsfs.*extra gcs"),
]


@pytest.mark.parametrize(("path", "message"), ADDRESSES)
def test_unsupported_address_is_refused(path, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for reader in (given_path, find_source, load_model, lambda path: train(base_config(), path)):
        with pytest.raises(UserError, match=message):
            reader(path)
    if "://" in path:
        with pytest.raises(UserError, match="local path"):
            local_path(path)


def test_bucket_needs_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "gcsfs" or None)
    assert given_path("gs://bucket/run") == "gs://bucket/run"
    with pytest.raises(UserError, match="s3fs"):
        given_path("s3://bucket/run")


def test_the_library_expands_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "book.txt").write_text("some text")
    assert find_source("~/book.txt").path == str(tmp_path / "book.txt")
    config = base_config()
    config.data.path = "~/none.txt"
    for reader in (load_model, lambda path: train(config, path)):
        with pytest.raises(UserError, match=f"{tmp_path}/"):
            reader("~/run")


def test_cache_folder_without_a_home_folder_is_one_line(monkeypatch, tmp_path):
    def no_entry(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "CHARLSTM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    with pytest.raises(UserError, match="CHARLSTM_CACHE"):
        cache_folder()
    with pytest.raises(UserError, match="no home folder ~"):
        given_path("~/run")
    monkeypatch.setenv("CHARLSTM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_launcher_without_a_cache_folder_warns(monkeypatch, capsys):
    monkeypatch.setenv("CHARLSTM_CACHE", "~nobody-here/cache")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    runtime.keep_compilations()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
