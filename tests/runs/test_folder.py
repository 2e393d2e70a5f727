"""The folder of a run: whose files are in it, and which of them a start may write."""

import os
import shutil

import pytest
from etils import epath
from helpers import small_config, stop_after, untrained_run

from charlstm.errors import UserError
from charlstm.files import lock_folder
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
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(name, book_path, tmp_path):
    folder = tmp_path / "poems"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('{"step": 1}\n')
    before = contents(folder)
    with pytest.raises(UserError, match=name.split("/")[0]) as caught:
        train(small_config(book_path), folder)
    assert "choose another --workdir" in str(caught.value)
    # A lock may be added, since the content of vocab.json is compared under it.
    assert {path: content for path, content in contents(folder).items() if path in before} == before


def test_the_text_that_is_trained_on_is_not_replaced(book, tmp_path):
    (tmp_path / "samples.txt").write_text(book)
    with pytest.raises(UserError, match=r"is not empty and not a run \(it holds samples.txt\)"):
        train(small_config(tmp_path / "samples.txt"), tmp_path)
    assert contents(tmp_path) == {tmp_path / "samples.txt": book.encode()}


def test_a_start_that_was_killed_before_its_config_was_written_starts_again(book_path, tmp_path):
    setup = prepare(small_config(book_path), epath.Path(tmp_path / "whole"))
    (tmp_path / "whole").mkdir()
    write_run(setup.run)
    begun = {".lock": "", ".config.json.tmp": "{", ".vocab.json.tmp": ""}
    for names in ([], ["vocab.json"], ["vocab.json", "prompts.json"]):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        for name, content in begun.items():
            (folder / name).write_text(content)
        for name in names:
            shutil.copy(tmp_path / "whole" / name, folder / name)
        write_run(prepare(small_config(book_path), epath.Path(folder)).run)
        for name in ("vocab.json", "prompts.json", "config.json"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_lock_file_of_another_program_is_not_replaced(kind, tmp_path):
    (tmp_path / "precious").write_text("kept")
    if kind == "link":
        (tmp_path / ".lock").symlink_to("precious")
    else:
        (tmp_path / ".lock").write_text("kept")
    with (
        pytest.raises(UserError, match=r"\.lock: is not a lock"),
        lock_folder(epath.Path(tmp_path)),
    ):
        pass
    assert {path.read_text() for path in tmp_path.iterdir()} == {"kept"}


def test_a_run_that_another_process_has_begun_meanwhile_is_not_replaced(book_path, tmp_path):
    folder = epath.Path(tmp_path / "run")
    late = prepare(small_config(book_path, **{"model.hidden_size": 24}), folder)
    untrained_run(small_config(book_path), folder)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="hidden_size is 16 there and 24 here"):
        write_run(late.run)
    assert contents(tmp_path / "run") == before


def test_checkpoints_may_lie_on_another_disk(book_path, tmp_path, monkeypatch):
    for name in ("scratch", "run"):
        (tmp_path / name).mkdir()
    os.symlink(tmp_path / "scratch", tmp_path / "run" / "checkpoints")
    config = small_config(book_path, num_steps=4)
    assert not train(config, tmp_path / "run", should_stop=stop_after(3))
    assert list((tmp_path / "scratch").glob("*/state"))
    assert train(config, tmp_path / "run")
    assert (tmp_path / "scratch" / "4").exists()
    load_run(epath.Path(tmp_path / "run"))
    # But not where somebody else has put them, and not by a link further inside.
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(UserError, match=r"checkpoints: a link to .*scratch, out of the run folder"):
        load_run(epath.Path(tmp_path / "run"))
    monkeypatch.undo()
    (tmp_path / "scratch" / "4" / "state" / "d" / "0").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"scratch/4/state/d/0: a link to /etc/hostname, out of"):
        load_run(epath.Path(tmp_path / "run"))
