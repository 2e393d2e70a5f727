import math
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from helpers import small_config

from charlstm.data.batches import Batch
from charlstm.runs.checkpoints import Checkpoints
from charlstm.runs.metrics import read_records
from charlstm.steps import evaluate
from charlstm.training.progress import (
    MAX_NONFINITE_STEPS,
    Counters,
    DivergedError,
    Progress,
    describe_evaluation,
)
from charlstm.training.setup import prepare


class OnDevice:
    """Numbers that tell when the host reads them."""

    def __init__(self, name, reads, value=1):
        self.name, self.reads, self.value = name, reads, value

    def __float__(self):
        self.reads.append(self.name)
        return 1.0

    def __array__(self, dtype=None, copy=None):
        self.reads.append(self.name)
        return np.full(8, self.value, float)


def metrics_on_device(name, reads):
    values = {"loss": 1, "grad_norm": 1, "count": 1, "skipped": 0}
    return {key: OnDevice(name, reads, value) for key, value in values.items()}


def test_training_metrics_are_read_one_call_late(book_path, tmp_path):
    setup = prepare(small_config(book_path), epath.Path(tmp_path / "run"))
    reads = []
    checkpoints = Checkpoints(setup.run.workdir)
    with Progress(setup, checkpoints, 0, Counters()) as progress:
        for step in (2, 4, 6):
            progress.push(step, 2, metrics_on_device(step, reads))
            assert set(reads) == set(range(2, step, 2))
        progress.log_training(6, lambda step: 0.1)
        assert set(reads) == {2, 4, 6}
    checkpoints.close()


def test_a_call_takes_as_many_steps_as_fit_into_a_quarter_of_a_second(
    book_path, tmp_path, monkeypatch
):
    setup = prepare(small_config(book_path), epath.Path(tmp_path / "run"))
    checkpoints = Checkpoints(setup.run.workdir)
    fitting = []
    with Progress(setup, checkpoints, 0, Counters()) as progress:
        clock = SimpleNamespace(monotonic=iter([50, 50.1, 50.35]).__next__)
        monkeypatch.setattr("charlstm.training.progress.time", clock)
        metrics = metrics_on_device("all", [])
        for step, count in ((1, 1), (6, 5), (7, 1)):
            progress.push(step, count, metrics)
            fitting.append(progress.steps_per_call)
    checkpoints.close()
    # Nothing known; then 0.1 s for the first step; then 0.25 s for the five after it.
    assert fitting == [1, 2, 5]


def test_a_clock_may_stand_still(book_path, tmp_path, monkeypatch):
    setup = prepare(small_config(book_path), epath.Path(tmp_path / "run"))
    clock = SimpleNamespace(monotonic=lambda: 100.0, time=lambda: 0.0)
    monkeypatch.setattr("charlstm.training.progress.time", clock)
    checkpoints = Checkpoints(setup.run.workdir)
    with Progress(setup, checkpoints, 0, Counters()) as progress:
        for step in (1, 2, 3):
            progress.push(step, 1, metrics_on_device("all", []))
            assert 1 <= progress.steps_per_call < 2**32
        progress.log_training(3, lambda step: 0.1)
    checkpoints.close()
    [record] = read_records(setup.run.workdir / "metrics.jsonl")
    assert math.isfinite(record["chars_per_second"])


def test_characters_a_second_leave_out_compilation_evaluation_and_an_earlier_process(
    book_path, tmp_path, monkeypatch
):
    setup = prepare(small_config(book_path), epath.Path(tmp_path / "run"))
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now, time=lambda: 0.0)
    monkeypatch.setattr("charlstm.training.progress.time", clock)
    before = Counters()
    before.since_log.add(1.0, 1000)
    checkpoints = Checkpoints(setup.run.workdir)
    with Progress(setup, checkpoints, 0, before) as progress:
        clock.now += 30  # the first call compiles
        progress.push(1, 1, metrics_on_device("a", []))  # of one character
        clock.now += 2
        with progress.evaluating():
            clock.now += 50
        progress.push(4, 3, metrics_on_device("b", []))
        clock.now += 6
        progress.log_training(4, lambda step: 0.1)
        progress.push(5, 1, metrics_on_device("c", []))
        clock.now += 4
        progress.log_training(5, lambda step: 0.1)
    checkpoints.close()
    records = read_records(setup.run.workdir / "metrics.jsonl")
    assert [record["chars_per_second"] for record in records] == [4 / 8, 1 / 4]


def test_evaluation_totals_are_read_one_batch_late():
    reads, batches = [], [Batch(number, None, None, None) for number in (1, 2, 3)]

    def eval_step(params, carry, batch):
        number = batch.inputs_BT
        assert number - 1 not in reads
        return carry, {name: OnDevice(number, reads) for name in ("nats", "correct", "count")}

    assert evaluate(eval_step, None, None, batches)["count"] == 3
    assert reads == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_an_evaluation_prints_its_figures_and_a_sample_behind_its_prompt():
    record = {"step": 500, "seconds": 83.4, "train/mean_loss": math.log(4)}
    assert list(describe_evaluation(record, 0.0)) == ["step 500: training 2.0000 bits/char, 83 s"]
    record |= {"val/bits_per_char": 2.25, "prompt": "x" * 99 + "the ", "sample": "count\n\nsaid"}
    figures, sample = describe_evaluation(record, 6680.4)
    wanted = "step 500: training 2.0000, validation 2.2500 bits/char, 6,680 chars/s, 83 s"
    assert figures == wanted
    title, blank, *lines = sample.splitlines()
    assert "500" in title
    assert blank == ""
    assert lines == ["    [..." + "x" * 56 + "the ]count", "    ", "    said"]
    unknown = {"step": 1, "seconds": 0.0, "train/mean_loss": None}
    assert list(describe_evaluation(unknown, 0.0)) == ["step 1: 0 s"]


def test_steps_in_a_row_whose_new_parameters_are_not_finite_are_a_divergence(book_path, tmp_path):
    setup = prepare(small_config(book_path), epath.Path(tmp_path / "run"))
    checkpoints = Checkpoints(setup.run.workdir)
    metrics = metrics_on_device("all", []) | {"skipped": OnDevice("all", [], 1)}
    with Progress(setup, checkpoints, 0, Counters()) as progress:
        progress.push(MAX_NONFINITE_STEPS, MAX_NONFINITE_STEPS, metrics)
        with pytest.raises(DivergedError, match=r"loss is 1.*the new parameters are not finite"):
            progress.log_training(MAX_NONFINITE_STEPS, lambda step: 0.1)
    checkpoints.close()
