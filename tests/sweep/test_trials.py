import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from charlstm.config import base_config
from charlstm.sweep import grid, trials

FAKE_TRAIN = Path(__file__).with_name("fake_train.py")
# These processes have JAX's threads, a sweep has not.
FORKS = pytest.mark.filterwarnings("ignore:os.fork")


@pytest.fixture(autouse=True)
def _fake_train(monkeypatch):
    monkeypatch.setattr(trials, "TRAIN", FAKE_TRAIN)


def make_trials(*lengths):
    return grid.make_trials(base_config(), [{"seq_len": n} for n in lengths], ["a"], [0])


def run(lengths, out, core_sets=None, should_stop=lambda: False):
    exits = []
    core_sets = core_sets or trials.share_cores(1)
    is_complete = trials.run_trials(
        make_trials(*lengths), out, core_sets, should_stop, exits.append
    )
    return is_complete, exits


@FORKS
def test_failed_trial_has_a_reason_and_a_time(tmp_path):
    is_complete, exits = run([2, 3], tmp_path)
    assert is_complete
    assert [end.seconds > 0 for end in exits] == [True, True]
    outcomes = [trials.read_outcome(end, tmp_path) for end in exits]
    assert [row["status"] for row in outcomes] == [
        "failed: a bad day",
        "failed: ended by signal 9",
    ]


@FORKS
@pytest.mark.skipif(len(trials.share_cores(1)[0]) < 2, reason="needs two cores")
def test_simultaneous_trials_share_the_cores_untimed(tmp_path):
    core_sets = trials.share_cores(2)

    def should_stop():
        # Both have started before either may end.
        if len(list(tmp_path.glob("runs/*/cores"))) == 2:
            (tmp_path / "runs" / "go").touch()
        return False

    is_complete, exits = run([10, 11], tmp_path, core_sets, should_stop)
    assert is_complete
    assert [(end.code, end.seconds) for end in exits] == [(0, None), (0, None)]
    if sys.platform == "linux":
        seen = [set(json.loads(path.read_text())) for path in tmp_path.glob("runs/*/cores")]
        assert sorted(seen, key=min) == sorted(core_sets, key=min)
        assert not set.intersection(*seen)


@FORKS
def test_stop_reaches_running_trials_and_starts_no_more(tmp_path):
    started = lambda: bool(list(tmp_path.glob("runs/*/cores")))  # noqa: E731
    assert run([10, 11], tmp_path, should_stop=started) == (False, [])
    assert len(list(tmp_path.glob("runs/*/"))) == 1
    # A resumed trial is not timed.
    (tmp_path / "runs" / "go").touch()
    is_complete, exits = run([10, 11], tmp_path)
    assert is_complete
    assert [end.seconds is None for end in exits] == [True, False]


def test_stop_before_the_first_trial_starts_none(tmp_path):
    assert run([2], tmp_path, should_stop=lambda: True) == (False, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_killed_sweep_ends_its_trials(tmp_path):
    (trial,) = make_trials(10)
    program = (
        "import time; from pathlib import Path\n"
        "from charlstm.sweep import grid, trials\n"
        "from charlstm.config import base_config\n"
        f"trials.TRAIN = Path({str(FAKE_TRAIN)!r})\n"
        "(trial,) = grid.make_trials(base_config(), [{'seq_len': 10}], ['a'], [0])\n"
        "[cores] = trials.share_cores(1)\n"
        f"trials.start(trial, Path({str(tmp_path)!r}), cores, is_alone=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    folder = trials.run_folder(tmp_path, trial)
    deadline = time.monotonic() + 60
    while not (folder / "cores").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_running(str(folder))
    process.kill()
    process.wait()
    while is_running(str(folder)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(str(folder))


def is_running(word):
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                if word.encode() in file.read():
                    return True
        except OSError:
            continue
    return False


def test_final_metrics_are_those_of_the_final_weights():
    records = [{"step": 5}, *({"step": s, "val/bits_per_char": b} for s, b in ((5, 2.5), (9, 3.0)))]
    assert trials.final_metrics(records) == {
        "steps": 9,
        "bits_per_char": 3.0,
        "best_bits_per_char": 2.5,
        "status": "finished",
    }
    records[-1]["val/bits_per_char"] = None
    assert trials.final_metrics(records)["status"].startswith("failed")
    assert trials.final_metrics([])["status"].startswith("failed")
