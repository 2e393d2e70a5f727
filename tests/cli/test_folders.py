import os

import pytest
from etils import epath

import charlstm.data.sources
from charlstm.cli import folders
from charlstm.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return an empty current folder, without a cached book and without a network."""
    folder = tmp_path / "my poems"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CHARLSTM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(charlstm.data.sources, "DRACULA_URLS", ("http://127.0.0.1:9/x",))
    monkeypatch.setattr("charlstm.cli.streams.REPOSITORY", str(tmp_path / "clone"))
    return folder


def make_run(name, trained_at=None):
    run = folders.RUNS / name
    run.mkdir(parents=True)
    (run / "config.json").touch()
    if trained_at is not None:
        (run / "metrics.jsonl").touch()
        os.utime(run / "metrics.jsonl", (trained_at, trained_at))
        os.utime(run / "config.json", (1, 1))
    return run


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("", "pg345"),
        ("pg345.txt", "pg345"),
        ("/data/My Book.TXT", "My-Book"),
        ("v1.2.txt", "v1.2"),
        ("wiki.txt.gz", "wiki"),
        ("wiki.zst", "wiki"),
        ("krieg_und_frieden-ü.txt.xz", "krieg_und_frieden-ü"),
        ("texts/", "texts"),
        (".", "my-poems"),
        ("..", None),
        ("*.txt", "my-poems"),
        ("a/b/*/c*.txt", "b"),
        ("books/**/*.txt", "books"),
        ("gs://bucket/corpus", "corpus"),
        ("a$_^$b[1]\\c.txt", "a-_-b-1-c"),
        ("caf\udce9.txt", "caf"),
        ("-rf .txt", "rf"),
        ("...", "text"),
        ("/", "text"),
        ("x" * 300 + ".txt", "x" * 80),
    ],
)
def test_text_name_is_a_safe_file_name(path, name, here):
    (here / "a$_^$b[1]\\c.txt").touch()  # it exists, so its brackets are not a pattern
    wanted = name or here.parent.name
    assert folders.text_name(path) == wanted
    if path:
        assert folders.default_workdir("tiny", path) == f"runs/tiny-{wanted}"


def test_default_workdir_without_a_path_depends_on_the_network(here, monkeypatch):
    # Python's manual if there is neither a network nor a run of the book.
    assert folders.default_workdir("tiny", "") == "runs/tiny-python-manual"
    # A run of the manual keeps it, even if Dracula is available later.
    manual = make_run("tiny-python-manual")
    cache = here.parent / "other cache"
    cache.mkdir()
    (cache / "pg345.txt").write_text("Dracula")
    monkeypatch.setenv("CHARLSTM_CACHE", str(cache))
    assert folders.default_workdir("tiny", "") == str(manual)
    assert folders.default_workdir("default", "") == "runs/default-pg345"
    # A run of Dracula needs neither the cache nor the network.
    make_run("tiny-pg345")
    monkeypatch.setattr(charlstm.data.sources, "fetch_dracula", lambda: pytest.fail("not needed"))
    assert folders.default_workdir("tiny", "") == "runs/tiny-pg345"


def test_free_workdir_does_not_exist(here):
    assert folders.free_workdir("runs/x") == "runs/x"
    make_run("x")
    assert folders.free_workdir("runs/x") == "runs/x-2"
    (folders.RUNS / "x-2").write_text("a file")
    assert folders.free_workdir("runs/x/") == "runs/x-3"


@pytest.mark.parametrize(
    "given", [(), ("--workdir=poems",), ("-workdir=poems",), ("--workdir", "poems")]
)
def test_in_free_workdir_replaces_workdir(here, given):
    (here / "poems").mkdir()
    words = ["--config=tiny", *given, "--profile"]
    expected = ["--config=tiny", "--profile", "--workdir=poems-2"]
    assert folders.in_free_workdir(words, "poems") == expected


def test_make_out_refuses_a_folder_with_other_files(here):
    assert folders.make_out("new/out", "bench.json", {"cpu"}) == epath.Path("new/out")
    (here / "new/out/.bench.json.tmp").touch()  # of a start that was killed
    (here / "new/out/.lock").write_text("process 7 on host")
    folders.make_out("new/out", "bench.json", {"cpu"})
    for content in ("my figures", "[]", '{"cost": 3}'):
        (here / "new/out/bench.json").write_text(content)
        with pytest.raises(UserError, match=r"new/out: is not empty.*bench.json"):
            folders.make_out("new/out", "bench.json", {"cpu"})
    (here / "new/out/bench.json").write_text('{"cpu": "x", "step": []}')
    (here / "new/out/bench.png").touch()
    folders.make_out("new/out", "bench.json", {"cpu"})
    with pytest.raises(UserError, match=r"has no scaling.json .* bench.json, bench.png"):
        folders.make_out("new/out", "scaling.json", {"paper"})
    (here / "file").touch()
    with pytest.raises(UserError, match="cannot write there"):
        folders.make_out("file", "bench.json", {"cpu"})


def test_trained_workdir_defaults_to_the_most_recent_run(here):
    with pytest.raises(UserError, match=r"no run in .*my poems/runs; give --workdir"):
        folders.trained_workdir("")
    assert folders.trained_workdir("given") == "given"
    make_run("older", trained_at=1000)
    (folders.RUNS / "sweep" / "texts").mkdir(parents=True)
    assert folders.trained_workdir("") == "runs/older"
    make_run("latest", trained_at=2000)
    make_run("oldest", trained_at=500)
    assert folders.trained_workdir("") == "runs/latest"
    assert folders.existing_runs() == [
        folders.RUNS / name for name in ("latest", "older", "oldest")
    ]
    with pytest.raises(UserError, match=r"nowhere: no run .* runs/latest, runs/older"):
        folders.trained_workdir("nowhere")
    assert folders.trained_workdir("runs/oldest") == "runs/oldest"


def test_missing_run_is_refused_with_runs_nearby(here):
    in_clone, in_given = here.parent / "clone" / "runs" / "a", here / "mine" / "b"
    for run in (in_clone, in_given):
        run.mkdir(parents=True)
        (run / "config.json").touch()
    with pytest.raises(UserError, match=f"no run in .*/runs; .* {in_clone}$"):
        folders.trained_workdir("")
    with pytest.raises(UserError, match=f"mine: no run .* mine/b, {in_clone}$"):
        folders.trained_workdir("mine")
    make_run("c")
    with pytest.raises(UserError, match=f" runs/c, {in_clone}$"):
        folders.trained_workdir("runs")
