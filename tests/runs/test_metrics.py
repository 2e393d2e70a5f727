import json
import math
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from etils import epath
from matplotlib.figure import Figure

from charlstm.errors import DamagedError, UserError
from charlstm.files import write_file
from charlstm.runs.metrics import RunLog, evaluations_since_best, read_records
from charlstm.runs.plots import thinned


def test_resumed_log_drops_records_of_later_steps(tmp_path):
    for step, new in ((0, (5, 10, 15)), (10, (12,))):
        log = RunLog(epath.Path(tmp_path), step, "title")
        for number in new:
            log.write({"step": number, "train/loss": number / 2})
        log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 12]


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ([], 0),
        ([(1, 2.0)], 0),
        ([(1, 2.0), (2, 1.5), (3, 1.6), (4, 1.5)], 2),  # an equal loss is no improvement
        ([(1, 2.0), (2, None), (2, None), (3, 2.5)], 2),  # step 2 was repeated after a crash
        ([(1, None), (2, None)], 2),
    ],
)
def test_evaluations_since_best_counts_steps_after_it(losses, wanted):
    records = [{"step": step, "val/loss": loss} for step, loss in losses]
    training = [{"step": 1, "train/loss": 0.1}, {"step": 9, "train/loss": 0.1}]
    assert evaluations_since_best([*training[:1], *records, *training[1:]]) == wanted


TORN = {"metrics.jsonl": '{"step": 99, "tr', "samples.txt": "=== st"}


@pytest.mark.parametrize("is_local", [True, False], ids=["local", "bucket"])
def test_files_do_not_depend_on_restarts(is_local, tmp_path, monkeypatch):
    monkeypatch.setattr("charlstm.files.is_local", lambda path: is_local)
    records = [{"step": step, "train/loss": step / 3} for step in range(1, 8)]
    records[2] |= {"prompt": "x" * 99 + "the ", "sample": "a\nb", "val/bits_per_char": 2.5}
    records[5] |= {"sample": "caf\u00e9"}
    for folder, size in (("once", 7), ("often", 2)):
        (tmp_path / folder).mkdir()
        for begin in range(0, 7, size):
            log = RunLog(epath.Path(tmp_path / folder), begin, "title")
            for record in records[begin : begin + size]:
                log.write(record)
            log.close()
            if folder == "often":
                # As after a crash or with a full disk.
                for name, torn in TORN.items():
                    with (tmp_path / folder / name).open("a") as file:
                        file.write(torn)
    for name, torn in TORN.items():
        often = (tmp_path / "often" / name).read_text().removesuffix(torn)
        assert often == (tmp_path / "once" / name).read_text()
    assert read_records(epath.Path(tmp_path / "once" / "metrics.jsonl")) == records
    expected = "=== step 3, validation 2.500 bits per character ===\n[..."
    expected += "x" * 56 + "the ]a\nb\n\n"
    expected += "=== step 6 ===\ncaf\u00e9\n\n"
    assert (tmp_path / "once" / "samples.txt").read_text() == expected


def test_records_are_appended_to_the_same_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": "%s"}\n' % ("x" * 10**6))
    log = RunLog(epath.Path(tmp_path), 1, "title")
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    for step in range(2, 5):
        log.write({"step": step, "sample": "a"})
    log.close()
    # The file was not replaced.
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode
    assert [r["step"] for r in read_records(epath.Path(tmp_path / "metrics.jsonl"))] == [1, 2, 3, 4]


def test_deleted_metrics_file_is_written_again(tmp_path):
    log = RunLog(epath.Path(tmp_path), 0, "title")
    for step in (1, 2, 3):
        log.write({"step": step})
        if step == 2:
            (tmp_path / "metrics.jsonl").unlink()
    log.close()
    assert [r["step"] for r in read_records(epath.Path(tmp_path / "metrics.jsonl"))] == [1, 2, 3]


def test_samples_file_of_the_user_is_not_replaced(tmp_path):
    (tmp_path / "samples.txt").write_text("my own")
    with pytest.raises(UserError, match=r"samples.txt: .*move it"):
        RunLog(epath.Path(tmp_path), 0, "title")
    assert (tmp_path / "samples.txt").read_text() == "my own"


@pytest.mark.parametrize("title", ["a$_^$b", "$\\frac{$", "caf\udce9", "\x1b[2J", "深い%{}\\", ""])
def test_curves_may_have_any_title(title, tmp_path, caplog):
    log = RunLog(epath.Path(tmp_path), 0, title)
    log.write({"step": 1, "seconds": 1.0, "val/bits_per_char": 5.0})
    # Settings that a matplotlibrc may have.
    with matplotlib.rc_context({"text.usetex": True, "font.family": "none.such"}):
        log.draw()
    log.close()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not caplog.records


def test_failure_to_draw_is_one_warning(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("charlstm.runs.metrics.draw_curves", fail)
    log = RunLog(epath.Path(tmp_path), 0, "title")
    for step in (1, 2):
        log.write({"step": step, "seconds": 1.0, "val/bits_per_char": 5.0})
        log.draw()
    log.close()
    [record] = caplog.records
    assert "curves.png: could not be drawn (no fonts)" in record.message


def test_curves_file_of_the_user_is_not_replaced(tmp_path, caplog):
    figure = Figure()
    figure.subplots()
    figure.savefig(tmp_path / "curves.png")
    before = (tmp_path / "curves.png").read_bytes()
    log = RunLog(epath.Path(tmp_path), 0, "title")
    log.write({"step": 1, "seconds": 1.0, "val/bits_per_char": 5.0})
    log.draw()
    assert (tmp_path / "curves.png").read_bytes() == before
    [record] = caplog.records
    assert "curves.png" in record.message
    # A picture of this program is replaced.
    (tmp_path / "curves.png").unlink()
    log.draw()
    first = (tmp_path / "curves.png").read_bytes()
    log.write({"step": 2, "seconds": 2.0, "val/bits_per_char": 4.0})
    log.draw()
    log.close()
    assert (tmp_path / "curves.png").read_bytes() != first


@pytest.mark.parametrize("backend", ["Qt4Agg", "module://nothing.there", "agg"])
def test_curves_need_no_window_system(backend):
    program = (
        "import os, sys, numpy; from charlstm.runs.plots import draw_curves\n"
        # XLA's threads may read the environment of the process at this moment.
        "changes = {'os.putenv', 'os.unsetenv'}\n"
        "sys.addaudithook(lambda event, _: print(event) if event in changes else None)\n"
        "draw_curves([{'step': 1, 'seconds': 1.0, 'val/bits_per_char': 5.0}], '')\n"
        "print(os.environ['MPLBACKEND'])"
    )
    environment = os.environ | {"MPLBACKEND": backend}
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (answer.stdout, answer.stderr) == (f"{backend}\n", "")


def test_thinned_keeps_order_and_extremes():
    values = np.random.default_rng(0).normal(size=12_345)
    values[4321], values[7654] = 99, -99
    records = [{"step": step, "x": float(value)} for step, value in enumerate(values)]
    few = thinned(records, "x", 100)
    steps = [record["step"] for record in few]
    assert len(few) <= 100
    assert steps == sorted(set(steps))
    assert {4321, 7654} <= set(steps)
    # Each interval has a record.
    assert max(np.diff(steps)) < 2 * 12_345 / 50
    assert thinned(records[:100], "x", 100) == records[:100]


def test_tensorboard_omits_events_of_later_steps(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, new in ((0, (5, 10, 15)), (10, (12,))):
        log = RunLog(epath.Path(tmp_path), step, "title")
        for number in new:
            log.write({"step": number, "train/loss": number / 2})
        log.close()
    events = reader.EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(5, 2.5), (10, 5.0), (12, 6.0)]


def test_nonfinite_metric_is_an_error(tmp_path):
    log = RunLog(epath.Path(tmp_path), 0, "title")
    with pytest.raises(ValueError, match="Out of range float"):
        log.write({"step": 1, "train/loss": math.nan})
    log.close()


@pytest.mark.parametrize(
    "line", ["x", "[]", "{}", '{"step": "1"}', '{"step": 1}', '{"step": null}', "[" * 10**5]
)
def test_damaged_line_of_metrics_is_named(line, tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    path.write_text(f'{{"step": 2}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DamagedError, match=r"metrics.jsonl: line 2 is damaged"):
        read_records(path)


def test_write_file_replaces_links(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    run = epath.Path(tmp_path / "run")
    run.mkdir()
    for name in ("metrics.jsonl", ".metrics.jsonl.tmp"):
        (tmp_path / "run" / name).symlink_to(outside)
    write_file(run / "metrics.jsonl", "new")
    assert outside.read_text() == "precious"
    assert (run / "metrics.jsonl").read_text() == "new"
    assert not (tmp_path / "run" / "metrics.jsonl").is_symlink()


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "file")
    write_file(path, "old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_file(path, "new")
    assert [child.name for child in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
