import json
import math
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT
from etils import epath

from charlstm import journal
from charlstm.checkpoint import Checkpoints, load_model
from charlstm.config import base_config
from charlstm.data import evaluation_batches, split
from charlstm.errors import RunError, UserError
from charlstm.log import read_records
from charlstm.model import zero_carry
from charlstm.run import SCHEMA, load_run, write_run
from charlstm.steps import TrainState, evaluate, make_eval_step
from charlstm.train import train

NUM_STEPS = 30
FIXTURES = ROOT / "tests" / "fixtures"


def small_config(book_path, **changes):
    config = base_config()
    settings = {
        "data.path": str(book_path),
        "num_steps": NUM_STEPS,
        "batch_size": 4,
        "seq_len": 16,
        "eval_every_steps": 10,
        "log_every_steps": 4,
        "model.hidden_size": 16,
        "optimizer.warmup_steps": 4,
        "sample.length": 30,
    }
    config.update_from_flattened_dict(settings | changes)
    return config


def stop_after(num_calls):
    """Return a should_stop that becomes true after so many calls of train_steps."""
    calls = iter(range(1, 10**6))
    return lambda: next(calls) >= num_calls


def latest_leaves(workdir):
    """Return the parameters of the latest checkpoint."""
    return jax.tree.leaves(load_model(workdir, "latest")[2])


def timeless(workdir):
    """Return the records of a run without what depends on the clock."""
    clocked = ("seconds", "chars_per_second")
    records = read_records(epath.Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in clocked} for record in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, book):
    """Return (config, workdir) of a run that went through undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "book.txt").write_text(book, encoding="utf-8")
    config = small_config(folder / "book.txt")
    assert train(config, folder / "run")
    return config, folder / "run"


def test_the_run_folder_holds_all_that_it_should(finished, book):
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


def test_metrics_have_each_logged_step_once_and_in_order(finished):
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


def test_a_run_that_was_stopped_ends_as_one_that_was_not(finished, tmp_path, monkeypatch):
    config, workdir = finished
    stopped = tmp_path / "run"
    # A call of train_steps for each step here, and of several in the run to compare with.
    with monkeypatch.context() as patch:
        patch.setattr(journal, "CALL_SECONDS", 0)
        assert not train(config, stopped, should_stop=stop_after(7))
        assert not train(config, stopped, should_stop=stop_after(6))  # at step 13
    assert train(config, stopped)
    for ours, theirs in zip(latest_leaves(stopped), latest_leaves(workdir), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert timeless(stopped) == timeless(workdir)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    config, workdir = finished
    assert train(config, tmp_path / "same")
    assert timeless(tmp_path / "same") == timeless(workdir)
    other = small_config(config.data.path, seed=1)
    assert train(other, tmp_path / "other")
    assert timeless(tmp_path / "other") != timeless(workdir)


def test_a_finished_run_is_left_alone(finished):
    config, workdir = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    assert train(config, workdir)
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p in before} == before
    assert {path.parent.name for path in after.keys() - before.keys()} <= {"checkpoints"}


def test_a_folder_of_another_config_is_refused_with_the_keys_that_differ(finished):
    config, workdir = finished
    other = small_config(config.data.path, **{"model.hidden_size": 24, "seed": 5})
    with pytest.raises(
        UserError, match=r"model.hidden_size is 16 there and 24 here; seed is 0 there and 5"
    ):
        train(other, workdir)


def test_a_text_that_has_changed_is_refused(book, book_path, tmp_path):
    config = small_config(book_path)
    assert not train(config, tmp_path / "run", should_stop=stop_after(1))
    book_path.write_text(book + "x")
    with pytest.raises(UserError, match=r"book.txt: has changed"):
        train(config, tmp_path / "run")


def test_without_a_validation_part_the_best_is_by_training_loss(book_path, tmp_path):
    settings = {
        "data.val_fraction": 0.0,
        "data.order": "windows",
        "data.loss_on": "last",
        "model.input": "scaled",
        "sample.method": "window",
        "sample.temperature": 0.0,
    }
    config = small_config(book_path, **settings)
    assert train(config, tmp_path / "run")
    records = read_records(epath.Path(tmp_path / "run") / "metrics.jsonl")
    losses = {record["step"]: record["train/mean_loss"] for record in records if "sample" in record}
    checkpoints = Checkpoints(epath.Path(tmp_path / "run"))
    assert checkpoints.best_step() == min(losses, key=losses.get)
    checkpoints.close()


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(book_path, tmp_path):
    config = small_config(
        book_path, **{"optimizer.learning_rate": 1e38, "optimizer.warmup_steps": 0}
    )
    with pytest.raises(RunError, match=r"step \d+: the loss is .*learning_rate"):
        train(config, tmp_path / "run")
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_model(tmp_path / "run")


def test_latest_and_best_are_both_kept_and_nan_never_becomes_best(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path))
    state = TrainState(jax.numpy.zeros((), "int32"), {"w": jax.numpy.zeros(2)}, (), (), ())
    for step, loss in enumerate([3.0, 1.0, math.nan, 2.0, math.inf, None], start=1):
        state = state._replace(step=jax.numpy.int32(step), params={"w": jax.numpy.full(2, step)})
        checkpoints.save(state, {"loss": str(loss)}, loss)
    assert checkpoints.latest_step() == 6
    assert checkpoints.best_step() == 2
    for step in (2, 5, 6):
        restored, notes = checkpoints.restore(step, state)
        assert restored.params["w"][1] == step
        assert notes["loss"] == str([3.0, 1.0, math.nan, 2.0, math.inf, None][step - 1])
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [
        "2",
        "5",
        "6",
    ]


def test_loading_a_model_changes_nothing_in_its_folder(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    # As a trainer leaves them while it saves.
    (tmp_path / "run" / "checkpoints" / "31.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "run" / "checkpoints" / "trash" / "10").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for which in ("best", "latest"):
        load_model(tmp_path / "run", which)
    assert sorted(tmp_path.rglob("*")) == before


def test_reading_a_run_unpickles_and_evaluates_nothing(finished, monkeypatch):
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
        ("config.json", '{"schema": 99}', "newer version"),
        ("config.json", '{"schema": 1, "config": {"x": 1}}', "not a config of this version"),
        ("vocab.json", "", "vocab.json: missing or damaged"),
        ("prompts.json", None, "prompts.json: missing or damaged"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line(finished, tmp_path, name, content, message):
    for file in ("config.json", "vocab.json", "prompts.json"):
        (tmp_path / file).write_bytes((finished[1] / file).read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_run(epath.Path(tmp_path))


def test_a_run_of_cudnn_is_read_with_the_twin_that_runs_everywhere(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    run = load_run(epath.Path(tmp_path / "run"))
    run.config.model.recurrence = "cudnn"
    write_run(run)
    run, model, _ = load_model(tmp_path / "run")
    assert run.config.model.recurrence == "cudnn"
    assert model == load_model(finished[1])[1]


def test_a_torn_last_line_of_metrics_is_not_a_lost_run(book_path, tmp_path, monkeypatch):
    config = small_config(book_path)
    monkeypatch.setattr(journal, "CALL_SECONDS", 0)  # a call for each step
    assert not train(config, tmp_path / "run", should_stop=stop_after(12))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "tra')
    assert train(config, tmp_path / "run")
    steps = [record["step"] for record in timeless(tmp_path / "run") if "train/loss" in record]
    assert steps == [*range(4, NUM_STEPS, 4), NUM_STEPS]


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_a_run_folder_of_every_earlier_schema_still_reads_as_it_was(name, tmp_path, book):
    # A copy, since opening a run's checkpoints may tidy them up.
    shutil.copytree(FIXTURES / name, tmp_path / name)
    run, model, params = load_model(tmp_path / name)
    record = read_records(epath.Path(tmp_path / name) / "metrics.jsonl")[-1]
    val_ids = split(run.vocab.encode(book), run.config.data.val_fraction)[1]
    batches = evaluation_batches(val_ids, run.config)
    carry = zero_carry(model, batches.batch_size)
    indices = range(batches.steps_per_epoch)
    result = evaluate(jax.jit(make_eval_step(model)), params, carry, map(batches, indices))
    # The tolerance is for the order of float32 sums on other processors.
    np.testing.assert_allclose(result["loss"], record["val/loss"], rtol=1e-5)
