import json
import math

import pytest
from etils import epath

from charlstm.errors import DamagedError
from charlstm.files import write_file
from charlstm.log import RunLog, read_records


def test_a_resumed_log_drops_what_a_lost_later_step_wrote(tmp_path):
    for step, new in ((0, (5, 10, 15)), (10, (12,))):
        log = RunLog(epath.Path(tmp_path), step, "title")
        for number in new:
            log.write({"step": number, "train/loss": number / 2})
        log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 12]


def test_tensorboard_reads_the_events_of_a_resumed_run_without_the_lost_ones(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, new in ((0, (5, 10, 15)), (10, (12,))):
        log = RunLog(epath.Path(tmp_path), step, "title")
        for number in new:
            log.write({"step": number, "train/loss": number / 2})
        log.close()
    events = reader.EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(5, 2.5), (10, 5.0), (12, 6.0)]


def test_a_figure_that_json_has_no_word_for_is_refused(tmp_path):
    log = RunLog(epath.Path(tmp_path), 0, "title")
    with pytest.raises(ValueError, match="Out of range float"):
        log.write({"step": 1, "train/loss": math.nan})
    log.close()


@pytest.mark.parametrize(
    "line", ["x", "[]", "{}", '{"step": "1"}', '{"step": 1}', '{"step": null}', "[" * 10**5]
)
def test_a_damaged_line_of_metrics_is_named(line, tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    path.write_text(f'{{"step": 2}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DamagedError, match=r"metrics.jsonl: line 2 is damaged"):
        read_records(path)


def test_writing_a_file_does_not_follow_a_link_out_of_the_folder(tmp_path):
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


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
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
