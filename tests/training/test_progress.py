import math
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from helpers import small_config

from charlstm.data.batches import Batch
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
    """Numbers that record when the host reads them."""

    def __init__(self, name, reads, value=1):
        self.name, self.reads, self.value = name, reads, value

    def __float__(self):
        self.reads.append(self.name)
        return 1.0

    def __array__(self, dtype=None, copy=None):
        self.reads.append(self.name)
        return np.full(8, self.value, float)


def metrics_on_device(name="all", reads=None, **values):
    """Return metrics of up to 8 steps of one character each."""
    values = {"loss": 1, "grad_norm": 1, "count": 1, "skipped": 0} | values
    reads = [] if reads is None else reads
    return {key: OnDevice(name, reads, value) for key, value in values.items()}


@pytest.fixture
def setup(book_path, tmp_path):
    (tmp_path / "run").mkdir()
    config = small_config(book_path)
    return prepare(config, epath.Path(tmp_path / "run"))


@pytest.fixture
def clock(monkeypatch):
    """Return a clock for Progress whose time is `clock.now`."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now, time=lambda: 0.0)
    monkeypatch.setattr("charlstm.training.progress.time", clock)
    return clock


def test_training_metrics_are_read_one_call_late(setup):
    reads = []
    with Progress(setup, 0, Counters()) as progress:
        for step in (2, 4, 6):
            progress.push(step, 2, metrics_on_device(step, reads))
            assert set(reads) == set(range(2, step, 2))
        progress.log_training(6, lambda step: 0.1)
        assert set(reads) == {2, 4, 6}


def test_checkpoint_metadata_count_all_steps(setup):
    with Progress(setup, 0, Counters()) as progress:
        progress.push(3, 3, metrics_on_device(loss=2))
        counters = Counters.from_json(progress.checkpoint_metadata())
    assert (counters.since_eval.value, counters.since_eval.count) == (2, 3)


def test_seconds_per_step_are_those_of_the_last_call_read(setup, clock):
    found = []
    with Progress(setup, 0, Counters()) as progress:
        for seconds, count in ((9, 1), (2, 4), (3, 1)):
            clock.now += seconds
            progress.push(1, count, metrics_on_device())
            found.append(progress.seconds_per_step)
    # The 2 s before the second call are those of the first one, of one step.
    assert found == [math.inf, 2, 3 / 4]


def test_speed_is_finite_when_the_clock_stands_still(setup, clock):
    with Progress(setup, 0, Counters()) as progress:
        for step in (1, 2, 3):
            progress.push(step, 1, metrics_on_device())
        progress.log_training(3, lambda step: 0.1)
    [record] = read_records(setup.run.workdir / "metrics.jsonl")
    assert math.isfinite(record["chars_per_second"])


def test_speed_excludes_compilation_evaluation_and_past_process(setup, clock):
    counters = Counters()
    counters.since_log.add(1.0, 1000)
    with Progress(setup, 0, counters) as progress:
        clock.now += 30  # the first call compiles
        progress.push(1, 1, metrics_on_device())
        clock.now += 2
        with progress.evaluating():
            clock.now += 50
        progress.push(4, 3, metrics_on_device())
        clock.now += 6
        progress.log_training(4, lambda step: 0.1)
        progress.push(5, 1, metrics_on_device())
        clock.now += 4
        progress.log_training(5, lambda step: 0.1)
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


@pytest.mark.parametrize(("metrics", "loss"), [({"val/loss": 1.5}, 1.5), ({}, 2.0)])
def test_log_evaluation_returns_validation_or_training_loss(setup, metrics, loss):
    with Progress(setup, 0, Counters()) as progress:
        progress.push(3, 3, metrics_on_device(loss=2))
        assert progress.log_evaluation(3, metrics) == loss


def test_evaluation_prints_metrics_and_sample_after_prompt():
    record = {"step": 500, "seconds": 83.4, "train/mean_loss": math.log(4)}
    assert list(describe_evaluation(record, 0.0)) == ["step 500: training 2.0000 bits/char, 83 s"]
    record |= {"val/bits_per_char": 2.25, "prompt": "x" * 99 + "the ", "sample": "count\n\nsaid"}
    metrics, sample = describe_evaluation(record, 6680.4)
    wanted = "step 500: training 2.0000, validation 2.2500 bits/char, 6,680 chars/s, 83 s"
    assert metrics == wanted
    title, blank, *lines = sample.splitlines()
    assert "500" in title
    assert blank == ""
    assert lines == ["    [..." + "x" * 56 + "the ]count", "    ", "    said"]
    unknown = {"step": 1, "seconds": 0.0, "train/mean_loss": None}
    assert list(describe_evaluation(unknown, 0.0)) == ["step 1: 0 s"]


def test_consecutive_steps_with_nonfinite_params_diverge(setup):
    with Progress(setup, 0, Counters()) as progress:
        progress.push(MAX_NONFINITE_STEPS, MAX_NONFINITE_STEPS, metrics_on_device(skipped=1))
        with pytest.raises(DivergedError, match=r"loss is 1.*the new parameters are not finite"):
            progress.log_training(MAX_NONFINITE_STEPS, lambda step: 0.1)
