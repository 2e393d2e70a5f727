"""The run folder: which files a start may write or replace."""

import os
import shutil
from contextlib import closing

import pytest
from etils import epath
from helpers import abstract_state_of, small_config, untrained_run

from charlstm.errors import UserError
from charlstm.files import lock_folder
from charlstm.runs.checkpoints import Checkpoints
from charlstm.runs.folder import load_run, write_run
from charlstm.training.loop import train
from charlstm.training.setup import prepare

OWN_NAMES = [
    "config.json",
    "vocab.json",
    "prompts.json",
    "metrics.jsonl",
    "samples.txt",
    "curves.png",
    ".lock",
    "checkpoints/1000/metadata",
    "checkpoints/trash/thesis",
    "letters.txt",
]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", OWN_NAMES)
def test_folder_with_other_files_is_not_changed(name, book_path, tmp_path):
    folder = tmp_path / "poems"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('{"step": 1}\n')
    before = contents(folder)
    with pytest.raises(UserError, match=name.split("/")[0]) as caught:
        train(small_config(book_path), folder)
    assert "choose another --workdir" in str(caught.value)
    # A lock may be added, under which vocab.json is compared.
    assert {path: content for path, content in contents(folder).items() if path in before} == before


def test_text_in_the_run_folder_is_not_replaced(book, tmp_path):
    (tmp_path / "samples.txt").write_text(book)
    with pytest.raises(UserError, match=r"is not empty and not a run \(it holds samples.txt\)"):
        train(small_config(tmp_path / "samples.txt"), tmp_path)
    assert contents(tmp_path) == {tmp_path / "samples.txt": book.encode()}


def test_start_killed_before_its_config_can_be_repeated(book_path, tmp_path):
    setup = prepare(small_config(book_path), epath.Path(tmp_path / "complete"))
    (tmp_path / "complete").mkdir()
    write_run(setup.run)
    leftovers = {".lock": "", ".config.json.tmp": "{", ".vocab.json.tmp": ""}
    for names in ([], ["vocab.json"], ["vocab.json", "prompts.json"]):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        for name, content in leftovers.items():
            (folder / name).write_text(content)
        for name in names:
            shutil.copy(tmp_path / "complete" / name, folder / name)
        write_run(prepare(small_config(book_path), epath.Path(folder)).run)
        for name in ("vocab.json", "prompts.json", "config.json"):
            assert (folder / name).read_bytes() == (tmp_path / "complete" / name).read_bytes()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_lock_of_another_program_is_not_replaced(kind, tmp_path):
    (tmp_path / "file").write_text("content")
    if kind == "link":
        (tmp_path / ".lock").symlink_to("file")
    else:
        (tmp_path / ".lock").write_text("content")
    with (
        pytest.raises(UserError, match=r"\.lock: is not a lock"),
        lock_folder(epath.Path(tmp_path)),
    ):
        pass
    assert {path.read_text() for path in tmp_path.iterdir()} == {"content"}


def test_run_of_a_concurrent_start_is_not_replaced(book_path, tmp_path):
    folder = epath.Path(tmp_path / "run")
    late = prepare(small_config(book_path, **{"model.hidden_size": 24}), folder)
    untrained_run(small_config(book_path), folder)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="hidden_size is 16 there and 24 here"):
        write_run(late.run)
    assert contents(tmp_path / "run") == before


def test_checkpoints_may_be_a_link_to_another_disk(book_path, tmp_path, monkeypatch):
    for name in ("scratch", "run"):
        (tmp_path / name).mkdir()
    os.symlink(tmp_path / "scratch", tmp_path / "run" / "checkpoints")
    run = untrained_run(small_config(book_path), tmp_path / "run", steps=(2, 4))
    assert (tmp_path / "scratch" / "4").exists()
    with closing(Checkpoints(run.workdir)) as checkpoints:
        state, _ = checkpoints.restore_newest(abstract_state_of(run))
    assert state.step == 4
    load_run(epath.Path(tmp_path / "run"))
    # Not a link of another user, and not a link inside.
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(UserError, match=r"checkpoints: a link to .*scratch, out of the run folder"):
        load_run(epath.Path(tmp_path / "run"))
    monkeypatch.undo()
    (tmp_path / "scratch" / "4" / "state" / "d" / "0").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"scratch/4/state/d/0: a link to /etc/hostname, out of"):
        load_run(epath.Path(tmp_path / "run"))
