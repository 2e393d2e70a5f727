import json
import math
import shlex
import subprocess
import tempfile

import jax
import pytest
from launching import command_of

from charlstm import planning
from charlstm.config import base_config
from charlstm.config_check import check_key
from charlstm.errors import UserError
from charlstm.planning import memory, planner, report, rules, timing
from charlstm.planning.chips import CHIPS
from charlstm.planning.timing import StageTimes
from charlstm.training.setup import prepare

# A model and an optimizer that compile in less time than the default ones, and to the same program
# for any number of steps.
PLAIN = {
    "model.multiplicative": False,
    "model.recurrent_rms_norm": False,
    "optimizer.name": "adam",
    "optimizer.weight_decay": 0.0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.average_window": 0.0,
}
# What the rules choose for many epochs, given here so that the widths are timed with one program.
MANY_EPOCHS = {"model.dropout_rate": 0.4, "model.recurrent_dropout": 0.15}
STAGES = StageTimes(
    start=1.0,
    step=0.1,
    eval_batch=0.01,
    sample=0.5,
    write_log=0.2,
    save=0.3,
    first_evaluation=2.0,
    restore=0.4,
)


@pytest.fixture
def config(book_path):
    config = base_config()
    config.update_from_flattened_dict(PLAIN)
    config.update({"num_steps": 205, "batch_size": 8, "seq_len": 32, "eval_every_steps": 100})
    config.data.path = str(book_path)
    config.mesh.data, config.sample.length = 1, 16
    config.model.hidden_size = 64
    return config


@pytest.fixture
def setup(config, tmp_path):
    return prepare(config, tmp_path / "run")


# --- proposals ---


@pytest.mark.slow
def test_proposal_can_be_trained_and_leaves_no_files(config, book_path, monkeypatch):
    config.update_from_flattened_dict(MANY_EPOCHS)
    temporary = book_path.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(planner, "WIDTH_SECONDS", 0.0)
    monkeypatch.setattr(timing, "process_seconds", lambda: 5.0)
    monkeypatch.setattr(memory, "step_bytes", lambda setup, rows: (20 + 2 * rows) * 2**20)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # they also serve the other tests
    chips = (CHIPS["v5e"], 4)
    result = planning.plan(config, 4, timing_seconds=0.1, chips=chips)
    assert list(temporary.iterdir()) == []
    # Four minutes are more than enough to read 5,400 characters as often as the rules allow.
    num_steps = rules.MAX_EPOCHS * math.ceil(5399 / 8 / 100)
    assert result.settings["num_steps"] == result.config.num_steps == num_steps
    assert result.settings.items() > MANY_EPOCHS.items()
    for key in result.settings:
        check_key(key)
    costs = result.costs
    assert costs["steps"] == num_steps
    seconds = costs["command_seconds"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
    assert seconds["steps"] == pytest.approx(num_steps * costs["step_seconds"])
    accelerator = costs["accelerator"]
    assert accelerator["fits"]
    assert accelerator["step_seconds"] >= max(accelerator["seconds"].values())
    assert "whole command" in str(result)
    assert json.loads(json.dumps(costs)) == costs


def test_time_too_short_to_train_is_an_error(config, monkeypatch):
    monkeypatch.setattr(timing, "process_seconds", lambda: 5.0)
    with pytest.raises(UserError, match=r"--minutes=0\.001: .* \d+\.\d s .* at least 0\.\d"):
        planning.plan(config, 0.001, timing_seconds=0.1)


def test_more_chips_than_proposed_rows_is_an_error(config):
    with pytest.raises(UserError, match=r"--chips=v5e:64: config.batch_size=8 .* fewer chips"):
        planning.plan(config, 4, chips=(CHIPS["v5e"], 64))


# Starts the launcher with a ready proposal.
PROGRAM = """
import runpy, sys
from types import SimpleNamespace
from charlstm import planning
settings = {"num_steps": 7, "model.hidden_size": 64}
plan = SimpleNamespace(settings=settings, costs={"steps": 7})
planning.plan = lambda config, minutes, **others: plan
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_plan_command_prints_a_command_of_train(as_json, book_path):
    (book_path.parent / "runs" / "default-book").mkdir(parents=True)
    given = [f"--config.{key}={value}" for key, value in PLAIN.items()]
    given.append("--config.data.path=book.txt")
    flags = [*given, "--config.num_steps=9", "--minutes=4", *(["--json"] if as_json else [])]
    python, *command = command_of("plan", *flags)
    result = subprocess.run(
        [python, "-c", PROGRAM, *command],
        cwd=book_path.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    printed = json.loads(last)["command"] if as_json else last.removeprefix("try: ")
    python, script, *words = shlex.split(printed)
    assert [python, script] == command_of("train")
    # The flags that were not replaced are repeated; the folder with the default name exists.
    proposed = ["--config.num_steps=7", "--config.model.hidden_size=64"]
    assert words == [*given, *proposed, "--workdir=runs/default-book-2"]


# --- estimates ---


def test_estimate_without_measurements_counts_on_any_machine(config):
    config.model.update({"hidden_size": 2048, "num_layers": 2, "dtype": "bfloat16"})
    config.batch_size, config.seq_len = 128, 16
    result = planning.estimate(config, timing_seconds=0, chips=(CHIPS["v5e"], 16))
    assert result.settings == {}
    assert result.costs["accelerator"]["chips"] == 16
    table = str(result)
    assert "16 x v5e" in table
    assert "whole command" not in table


def test_estimate_of_an_invalid_config_is_an_error(config):
    config.batch_size = 0
    with pytest.raises(UserError, match=r"config\.batch_size=0"):
        planning.estimate(config, timing_seconds=0)


def test_estimate_has_counts_times_and_memory(config, monkeypatch):
    monkeypatch.setattr(timing, "process_seconds", lambda: 5.0)
    monkeypatch.setattr(timing, "measure_stages", lambda setup, folder, seconds: STAGES)
    # 2 MiB a row and 20 MiB beside them.
    monkeypatch.setattr(memory, "step_bytes", lambda setup, rows: (20 + 2 * rows) * 2**20)
    monkeypatch.setattr(memory, "memory_bytes", lambda: 2**30)
    result = planning.estimate(config, timing_seconds=0.1)
    costs = result.costs
    assert costs["steps"] == 205
    assert costs["steps_per_epoch"] == math.ceil(5399 / 8 / 32)
    assert costs["training_flops_per_char"] == 3 * costs["forward_flops_per_char"]
    assert costs["chars_per_second"] == pytest.approx(8 * 32 / 0.1)
    seconds = costs["command_seconds"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
    assert 6.0 < seconds["start"] < 7.0
    assert costs["compiled_step_bytes"] == 36 * 2**20
    usable = memory.MEMORY_SHARE * costs["memory_bytes"] - memory.PROCESS_BYTES
    assert costs["largest_batch"] == int((usable / 2**20 - 20) / 2)
    assert ["epoch", "2.2", "s"] in [line.split() for line in str(result).splitlines()]


def test_cost_table_shows_a_long_path_uncut(config):
    path = f"/{'folder/' * 60}book.txt"
    costs = planning.estimate(config, timing_seconds=0).costs | {"text": path}
    assert report.cost_table(costs).splitlines()[0].split() == ["text", path]


def test_command_times_count_each_stage_as_often_as_train(setup):
    times = timing.command_times(setup, STAGES, loading=5.0)
    # Evaluations at 100, 200 and the end, each of which saves.
    each = setup.val_batches.steps_per_epoch * 0.01 + 0.7
    assert times.start == 6.0
    assert times.steps == pytest.approx(20.5)
    assert times.evaluations == pytest.approx(2.0 + 3 * each)
    assert times.checkpoints == pytest.approx(3 * 0.3 + 0.4)


# --- memory ---


@pytest.mark.slow
def test_largest_batch_just_fits_when_compiled(setup):
    usable = 200 * 2**20
    by_formula = memory.rows_by_formula(setup, usable)
    small, large = ((rows, memory.step_bytes(setup, rows)) for rows in (8, by_formula))
    rows = memory.largest_batch(small, large, usable)
    assert 256 < rows < 10_000
    assert 0.98 < memory.step_bytes(setup, rows) / usable < 1.02


def test_largest_batch_is_0_if_no_row_fits():
    assert memory.largest_batch((16, 1000), (64, 2000), 100) == 0
