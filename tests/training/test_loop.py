import json
import math
import os
import shutil
from contextlib import closing

import jax
import numpy as np
import pytest
from conftest import ROOT, little_optimization
from etils import epath
from helpers import (
    NUM_STEPS,
    QUICK,
    abstract_state_of,
    assert_equal,
    no_pictures_and_samples,
    records_of,
    series,
    small_config,
    stop_after,
    untrained_run,
)

from charlstm.data.batches import Streams
from charlstm.errors import RunError, UserError
from charlstm.files import lock_folder
from charlstm.lstm import native_library
from charlstm.model import model_from_config
from charlstm.optim import make_schedule
from charlstm.runs.checkpoints import Checkpoints, load_model, steps_in
from charlstm.runs.checksums import read_metadata
from charlstm.runs.folder import SCHEMA, load_run, write_run
from charlstm.runs.metrics import read_records
from charlstm.training import loop
from charlstm.training.loop import steps_in_time, steps_of_call, train
from charlstm.training.setup import log_setup, prepare
from charlstm.training.validation import compile_eval_step, validate

FIXTURES = ROOT / "tests" / "fixtures"
# With a schedule that depends on the number of steps, and several steps per compiled call.
SCHEDULED = {
    "log_every_steps": 4,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 4,
}
PLAIN = SCHEDULED | QUICK | {"optimizer.average_window": 0.0}


def latest_leaves(workdir):
    """Return the parameters of the latest checkpoint."""
    return jax.tree.leaves(load_model(workdir, "latest")[2])


def assert_same_run(workdir, reference):
    """Assert that two runs have the same weights, bit for bit, and the same records."""
    assert_equal(latest_leaves(workdir), latest_leaves(reference))
    assert records_of(workdir) == records_of(reference)
    assert best_and_latest(workdir) == best_and_latest(reference)


def best_and_latest(workdir):
    """Return (step, loss) of the best checkpoint and of the latest."""
    with closing(Checkpoints(epath.Path(workdir), read_only=True)) as checkpoints:
        steps = checkpoints.best_step(), checkpoints.latest_step()
    folder = epath.Path(workdir) / "checkpoints"
    return [(step, read_metadata(folder / str(step))["loss"]) for step in steps]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, book):
    """Return (config, workdir) of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "book.txt").write_text(book, encoding="utf-8")
    config = small_config(folder / "book.txt", **SCHEDULED)
    assert train(config, folder / "run")
    return config, folder / "run"


@pytest.fixture(autouse=True)
def _no_pictures(finished, monkeypatch):
    """Draw no curves but those of the finished run: they take longer than the steps."""
    monkeypatch.setattr("charlstm.runs.metrics.RunLog.draw", lambda self: None)


@pytest.fixture
def cheaply(cheaply, monkeypatch):
    """Draw no samples either, which need another program."""
    monkeypatch.setattr(loop, "write_sample", lambda *arguments: {"sample": ""})


def test_run_folder_has_all_files(finished, book):
    _, workdir = finished
    names = {path.name for path in workdir.iterdir()}
    files = "config.json vocab.json prompts.json metrics.jsonl samples.txt curves.png checkpoints"
    assert names >= set(files.split())
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".tmp") for name in names)
    about = json.loads((workdir / "config.json").read_text())
    assert about["schema"] == SCHEMA
    assert about["config"]["model"]["hidden_size"] == 16
    assert about["text"]["source"].endswith("book.txt")
    assert about["text"]["characters"] == len(book)
    assert about["versions"]["jax"] == jax.__version__
    assert json.loads((workdir / "vocab.json").read_text()) == sorted(set(book))
    assert all(prompt in book for prompt in json.loads((workdir / "prompts.json").read_text()))
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "samples.txt").read_text().count("=== step") == 3


def test_records_have_each_logged_step_once(finished):
    _, workdir = finished
    records = read_records(epath.Path(workdir) / "metrics.jsonl")
    training = [record for record in records if "train/loss" in record]
    scored = [record for record in records if "val/loss" in record]
    assert [record["step"] for record in training] == [*range(4, NUM_STEPS, 4), NUM_STEPS]
    assert [record["step"] for record in scored] == [10, 20, 30]
    fields = "epoch seconds train/bits_per_char chars_per_second learning_rate grad_norm".split()
    assert all(record.keys() >= set(fields) for record in training)
    assert all(record.keys() >= {"seconds", "val/accuracy", "sample"} for record in scored)
    for record in scored:
        np.testing.assert_allclose(record["val/bits_per_char"], record["val/loss"] / math.log(2))
        assert len(record["sample"]) == 30
    assert scored[-1]["val/loss"] < scored[0]["val/loss"]


def test_stopped_and_resumed_run_has_the_same_bits(finished, tmp_path, monkeypatch):
    # One step per compiled call; the reference run has several.
    config, workdir = finished
    monkeypatch.setattr(loop, "CALL_SECONDS", 0)
    # Before the first step, between steps, at the sample of step 10, during the validation of 20.
    for num_calls, steps in ((1, []), (7, [6]), (15, [6, 10]), (24, [10, 20])):
        assert not train(config, tmp_path / "run", should_stop=stop_after(num_calls))
        assert steps_in(tmp_path / "run" / "checkpoints") == steps
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 21, "tra')  # as after a kill
    assert train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", workdir)


def test_seed_changes_the_run(finished, tmp_path):
    config, workdir = finished
    other = small_config(config.data.path, **SCHEDULED, seed=1)
    assert not train(other, tmp_path / "other", should_stop=stop_after(4))
    first, theirs = records_of(tmp_path / "other")[0], records_of(workdir)[0]
    assert first["step"] == theirs["step"]
    assert first["train/loss"] != theirs["train/loss"]


@pytest.mark.slow
def test_resume_keeps_prng_impl_of_the_run(cheaply, book_path, tmp_path):
    changes = {"num_steps": 8, "eval_every_steps": 4, "model.dropout_rate": 0.25}
    config = small_config(book_path, **PLAIN | changes)
    with jax.default_prng_impl("rbg"):
        assert train(config, tmp_path / "whole")
        assert not train(config, tmp_path / "parts", should_stop=stop_after(2))
    assert train(config, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["prng_impl"] == "rbg"


def test_train_refuses_other_random_numbers_of_jax(book_path, tmp_path):
    with jax.threefry_partitionable(False):
        with pytest.raises(UserError, match="JAX_THREEFRY_PARTITIONABLE"):
            train(small_config(book_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_train_works_under_a_transfer_guard(finished, tmp_path, monkeypatch):
    compile_train_steps = loop.compile_train_steps

    def compile_guarded(*args):
        train_steps = compile_train_steps(*args)

        # The number of steps is the only argument from the host.
        def guarded(state, batches, count):
            count = jax.device_put(count)
            with jax.transfer_guard("disallow"):
                return train_steps(state, batches, count)

        return guarded

    # train() itself allows transfers.
    monkeypatch.setattr(loop, "compile_train_steps", compile_guarded)
    with jax.transfer_guard("disallow"):
        assert train(finished[0], tmp_path / "run")
        load_model(tmp_path / "run")


def test_finished_run_is_not_changed(finished):
    config, workdir = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    assert train(config, workdir)
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    before[workdir / ".lock"] = after[workdir / ".lock"]  # names the last process
    assert {p: t for p, t in after.items() if p in before} == before
    assert {path.parent.name for path in after.keys() - before.keys()} <= {"checkpoints"}


def test_compiled_call_ends_in_time_and_where_something_is_due(book_path, tmp_path):
    changes = {"num_steps": 100, "log_every_steps": 8, "checkpoint_every_steps": 10}
    changes |= {"eval_every_steps": 50}
    setup = prepare(small_config(book_path, **changes), epath.Path(tmp_path / "run"))

    def steps_of(step, seconds_per_step):
        return steps_of_call(setup, step, steps_in_time(setup, seconds_per_step))

    # The first call takes one step, because the time of a step is unknown.
    assert steps_of(0, math.inf) == 1
    assert steps_of(0, loop.CALL_SECONDS / 3) == 3
    assert steps_of(0, 10 * loop.CALL_SECONDS) == 1
    # With fast steps, and with a clock that stands still.
    for seconds in (1e-9, 0.0):
        calls = [(step, steps_of(step, seconds)) for step in (0, 8, 10, 48, 96)]
        assert calls == [(0, 8), (8, 2), (10, 6), (48, 2), (96, 4)]


def test_changed_settings_are_refused_by_key(finished):
    config, workdir = finished
    changes = {"model.hidden_size": 24, "seed": 5}
    other = small_config(config.data.path, **SCHEDULED | changes)
    with pytest.raises(
        UserError, match=r"model.hidden_size is 16 there and 24 here; seed is 0 there and 5"
    ):
        train(other, workdir)


def test_changed_text_is_refused(finished, book, book_path):
    book_path.write_text(book + "x")
    with pytest.raises(UserError, match=r"book.txt: .*has changed.*SHA-256"):
        train(small_config(book_path, **SCHEDULED), finished[1])


def test_best_is_by_training_loss_without_validation(cheaply, book_path, tmp_path):
    settings = {
        "num_steps": 12,
        "eval_every_steps": 4,
        "data.val_fraction": 0.0,
        "data.order": "windows",
        "data.loss_on": "last",
        "model.input": "scaled",
    }
    config = small_config(book_path, **PLAIN | settings)
    assert train(config, tmp_path / "run")
    records = read_records(epath.Path(tmp_path / "run") / "metrics.jsonl")
    losses = {record["step"]: record["train/mean_loss"] for record in records if "sample" in record}
    checkpoints = Checkpoints(epath.Path(tmp_path / "run"))
    assert checkpoints.best_step() == min(losses, key=losses.get)
    checkpoints.close()


def test_finished_run_can_be_extended(cheaply, book_path, tmp_path, caplog):
    caplog.set_level("INFO", logger="charlstm")
    assert train(small_config(book_path, **PLAIN), tmp_path / "run")
    before = records_of(tmp_path / "run")
    changes = {"num_steps": 0, "num_epochs": 1, "eval_every_steps": 50}
    config = small_config(book_path, **PLAIN | changes)
    assert train(config, tmp_path / "run")
    records = records_of(tmp_path / "run")
    assert records[: len(before)] == before
    num_steps = 85  # 5,400 characters in 4 streams of windows of 16
    later = [record["step"] for record in records if record["step"] > NUM_STEPS]
    assert sorted(set(later)) == sorted({*range(32, num_steps, 4), 50, num_steps})
    assert load_run(epath.Path(tmp_path / "run")).config.num_epochs == 1
    # The schedule is that of the new length, at which the rate is higher.
    rates = {r["step"]: r["learning_rate"] for r in records if "learning_rate" in r}
    assert rates[30] < rates[32]
    schedule = make_schedule(config, num_steps)
    for step in rates.keys() - range(NUM_STEPS + 1):
        assert rates[step] == pytest.approx(float(schedule(step - 1)))
    assert "changed setting: eval_every_steps is 10 there and 50 here" in caplog.text


def test_moved_run_with_moved_text_resumes(finished, tmp_path):
    assert not train(finished[0], tmp_path / "run", should_stop=stop_after(2))
    (tmp_path / "moved").mkdir()
    (tmp_path / "run").rename(tmp_path / "moved" / "elsewhere")
    shutil.copy(finished[0].data.path, tmp_path / "again.txt")
    config = small_config(tmp_path / "again.txt", **SCHEDULED)
    assert train(config, tmp_path / "moved" / "elsewhere")
    assert_same_run(tmp_path / "moved" / "elsewhere", finished[1])
    run = load_run(epath.Path(tmp_path / "moved" / "elsewhere"))
    assert run.text.source == str(tmp_path / "again.txt")


def test_other_versions_are_a_warning(finished, tmp_path, caplog):
    shutil.copytree(finished[1], tmp_path / "run")
    run = load_run(epath.Path(tmp_path / "run"))
    run.machine["versions"]["jax"] = "0.0.1"
    write_run(run)
    assert train(finished[0], tmp_path / "run")
    assert f"other versions (jax 0.0.1 there and {jax.__version__} here)" in caplog.text


def test_short_validation_text_is_a_warning(book_path, tmp_path, caplog):
    config = small_config(book_path, **{"data.val_fraction": 0.01})
    log_setup(prepare(config, epath.Path(tmp_path / "run")), 0, 1)
    assert "60 characters" in caplog.text


def test_second_trainer_is_refused_with_pid_of_first(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    with (
        lock_folder(epath.Path(tmp_path / "run")),
        pytest.raises(UserError, match=rf"run: in use by process {os.getpid()} on .*; wait"),
    ):
        train(finished[0], tmp_path / "run")
    assert train(finished[0], tmp_path / "run")


# --- early stop ---


@pytest.fixture(scope="module")
def stalled(tmp_path_factory, book):
    """Return (settings, workdir) of a run of 60 steps that config.patience=2 ended.

    Its learning rate changes no weight, so that the loss of step 10 is the lowest.
    """
    folder = tmp_path_factory.mktemp("stalled")
    (folder / "book.txt").write_text(book, encoding="utf-8")
    changes = {"num_steps": 60, "patience": 2, "optimizer.learning_rate": 1e-30}
    settings = PLAIN | changes | {"data.path": str(folder / "book.txt")}
    with little_optimization(), no_pictures_and_samples():
        assert train(small_config("", **settings), folder / "run")
    return settings, folder / "run"


def test_run_ends_after_patience_evaluations(cheaply, stalled, caplog):
    caplog.set_level("INFO", logger="charlstm")
    settings, workdir = stalled
    assert [step for step, _ in series(workdir, "val/loss")] == [10, 20, 30]
    assert best_and_latest(workdir)[1][0] == 30
    before = records_of(workdir)
    assert train(small_config("", **settings), workdir)
    assert "finished already, at step 30, by config.patience=2" in caplog.text
    assert records_of(workdir) == before


def test_resumed_run_stops_early_at_the_same_step(cheaply, stalled, tmp_path, monkeypatch):
    settings, workdir = stalled
    config = small_config("", **settings)
    monkeypatch.setattr(loop, "CALL_SECONDS", 0)  # one step per call
    assert not train(config, tmp_path / "run", should_stop=stop_after(51))
    assert 20 < max(steps_in(tmp_path / "run" / "checkpoints")) < 30
    shutil.copytree(tmp_path / "run", tmp_path / "lower")
    assert train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", workdir)
    # As after a kill between the record of step 30 and its checkpoint.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "30")
    assert train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", workdir)
    # A lower patience, given between two evaluations, acts after the next one.
    assert train(small_config("", **settings | {"patience": 1}), tmp_path / "lower")
    assert records_of(tmp_path / "lower") == records_of(workdir)


def test_higher_patience_extends_a_run(cheaply, stalled, tmp_path, caplog):
    caplog.set_level("INFO", logger="charlstm")
    settings, workdir = stalled
    shutil.copytree(workdir, tmp_path / "run")
    assert train(small_config("", **settings | {"patience": 3}), tmp_path / "run")
    assert "changed setting: patience is 2 there and 3 here" in caplog.text
    assert "stopped early, at step 40 of 60" in caplog.text
    assert records_of(tmp_path / "run")[: len(records_of(workdir))] == records_of(workdir)
    assert steps_in(tmp_path / "run" / "checkpoints") == [30, 40]


# --- nonfinite losses ---


def poison(monkeypatch, is_poisoned):
    """Make the loss nan at each step for which is_poisoned(step) is true."""
    clean = Streams.__call__

    def poisoned(self, steps, rows):
        batch = clean(self, steps, rows)
        if np.ndim(steps) == 0:
            return batch  # of an evaluation
        factors = [np.nan if is_poisoned(step) else 1 for step in steps.tolist()]
        weights = batch.weights_BT * np.float32(factors)[:, None, None]
        return batch._replace(weights_BT=weights)

    monkeypatch.setattr(Streams, "__call__", poisoned)


def states_of(workdir):
    """Return (state, metadata) of each checkpoint of a run by its step."""
    run = load_run(epath.Path(workdir))
    abstract_state = abstract_state_of(run)
    with closing(Checkpoints(run.workdir, read_only=True)) as checkpoints:
        steps = steps_in(run.workdir / "checkpoints")
        return {step: checkpoints.restore(step, abstract_state) for step in steps}


def assert_all_states_are_finite(workdir):
    for state, _ in states_of(workdir).values():
        leaves = jax.tree.leaves(state._replace(key=None))
        assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_nonfinite_steps_are_skipped_and_counted(finished, tmp_path, monkeypatch, caplog):
    seen = []
    poison(monkeypatch, lambda step: seen.append(step) or step in (5, 12, 13))
    # Stopped between two nonfinite steps, and resumed.
    with monkeypatch.context() as patch:
        patch.setattr(loop, "CALL_SECONDS", 0)  # one step per call
        assert not train(finished[0], tmp_path / "run", should_stop=lambda: 12 in seen)
    assert "step 6: the loss is nan" in caplog.text
    assert states_of(tmp_path / "run")[13][1]["nonfinite_steps"] == 1
    assert train(finished[0], tmp_path / "run")
    records = records_of(tmp_path / "run")
    counts = {r["step"]: r["skipped_steps"] for r in records if "skipped_steps" in r}
    assert counts == {4: 0, 8: 1, 12: 1, 16: 3, 20: 3, 24: 3, 28: 3, 30: 3}
    assert_all_states_are_finite(tmp_path / "run")


def test_consecutive_nonfinite_steps_cause_rollbacks(
    cheaply, book_path, tmp_path, monkeypatch, caplog
):
    # Poisoned until the learning rate is a quarter, so that two rollbacks are needed.
    rates = []
    make = loop.make_schedule

    def remember(config, num_steps, rate_scale=1.0):
        rates.append(rate_scale)
        return make(config, num_steps, rate_scale)

    monkeypatch.setattr(loop, "make_schedule", remember)
    poison(monkeypatch, lambda step: 13 <= step < 20 and rates[-1] > 0.25)
    config = small_config(book_path, **PLAIN, checkpoint_every_steps=5)
    assert train(config, tmp_path / "run")
    assert caplog.text.count("going back to the checkpoint of step 10, with") == 2
    assert "with 0.25 times the learning rate" in caplog.text
    records = records_of(tmp_path / "run")
    steps = [record["step"] for record in records]
    assert steps == sorted(steps)
    rate = {r["step"]: r["learning_rate"] for r in records if "learning_rate" in r}
    full = make(config, NUM_STEPS)
    np.testing.assert_allclose(rate[8], full(7), rtol=1e-6)
    np.testing.assert_allclose(rate[16], 0.25 * full(15), rtol=1e-6)
    assert records[-1]["val/loss"] < 3.5
    assert_all_states_are_finite(tmp_path / "run")
    # A resume after a kill has the lower rate too.
    assert states_of(tmp_path / "run")[NUM_STEPS][1]["rollbacks"] == 2


def test_run_that_stays_nonfinite_is_an_error(cheaply, book_path, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "MAX_ROLLBACKS", 1)  # each takes a compilation
    poison(monkeypatch, lambda step: True)
    with pytest.raises(
        RunError,
        match=r"step \d+: the loss is nan .*1 rollbacks; no checkpoint was saved.*learning_rate",
    ):
        train(small_config(book_path, **PLAIN), tmp_path / "run")
    assert "going back to step 0: no checkpoint is finite, with 0.5 times" in caplog.text
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_model(tmp_path / "run")


def test_load_model_changes_no_file(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    # As during a save of a trainer.
    (tmp_path / "run" / "checkpoints" / "31.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "run" / "checkpoints" / "trash" / "10").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for which in ("best", "latest"):
        load_model(tmp_path / "run", which)
    assert sorted(tmp_path.rglob("*")) == before


def test_load_model_unpickles_nothing(finished, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("code from a file would run")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr("numpy.load", refuse)
    run, _, params = load_model(finished[1])
    assert len(run.vocab) == params["dense"]["kernel"].shape[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json: missing or damaged"),
        ("config.json", '{"schema": 99}', "schema 99 there"),
        ("config.json", '{"schema": 1, "config": {"x": 1}}', "checksum differs"),
        ("vocab.json", "", "vocab.json: missing or damaged"),
        ("prompts.json", None, "prompts.json: missing or damaged"),
    ],
)
def test_damaged_run_file_is_an_error(finished, tmp_path, name, content, message):
    for file in ("config.json", "vocab.json", "prompts.json"):
        (tmp_path / file).write_bytes((finished[1] / file).read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_run(epath.Path(tmp_path))


@pytest.mark.parametrize("recurrence", ["cudnn", "native"])
def test_run_that_cannot_run_here_is_loaded_as_fused(recurrence, book_path, tmp_path, monkeypatch):
    monkeypatch.setattr(native_library, "is_available", lambda: False)
    config = small_config(book_path, **PLAIN | {"model.recurrence": "fused"})
    run = untrained_run(config, tmp_path / "run")
    fused = model_from_config(run.config, run.vocab)
    run.config.model.recurrence = recurrence
    write_run(run)
    run, model, _ = load_model(tmp_path / "run")
    assert run.config.model.recurrence == recurrence
    assert model == fused


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.glob("run_*")))
def test_run_of_each_schema_loads_and_resumes(cheaply, name, tmp_path, book_path):
    workdir = epath.Path(tmp_path / name)
    shutil.copytree(FIXTURES / name, workdir)
    run, _, params = load_model(workdir)
    before = records_of(workdir)
    config = run.config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(
        {"data.path": str(book_path), "num_steps": 44, "mesh.data": 1}
    )
    setup = prepare(config, workdir)
    metrics = validate(setup, compile_eval_step(setup), params, lambda: None)
    # The tolerance is for the order of float32 sums on other processors.
    np.testing.assert_allclose(metrics["val/loss"], before[-1]["val/loss"], rtol=1e-5)
    assert train(config, workdir)
    assert records_of(workdir)[: len(before)] == before
    assert steps_in(workdir / "checkpoints") == [40, 44]
