import json
import math
import shlex
import subprocess

import pytest
from launching import command_of, run_command

from charlstm.config import base_config
from charlstm.config_check import check_key, validate
from charlstm.errors import UserError
from charlstm.planning import plan, rules, timing
from charlstm.planning.timing import Parts

QUICK = ["--seconds=0.1", "--config.data.path=book.txt"]
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
PLAIN_FLAGS = [f"--config.{key}={value}" for key, value in PLAIN.items()]
# What the rule chooses for a text that is read often: the widths are timed with the same program.
RATE_FLAGS = ["--config.model.dropout_rate=0.4", "--config.model.recurrent_dropout=0.15"]


# --- the launcher ---


def test_a_config_for_a_pod_is_counted_on_paper(book_path):
    flags = ["--config=tpu", "--chips=v5e:16", "--seconds=0", "--config.data.path=book.txt"]
    text = book_path.read_text(encoding="utf-8")
    book_path.write_text(text * 110, encoding="utf-8")
    result = run_command("plan", *flags, cwd=book_path.parent)
    assert result.returncode == 0, result.stderr
    assert "16 x v5e on paper" in result.stdout
    assert "the whole command" not in result.stdout


# Starts the launcher, whose widths are timed for no longer than they have to be.
PROGRAM = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
from charlstm.planning import plan
plan.SHORT = 0.0
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def test_a_proposal_is_a_command_that_train_takes(book_path):
    (book_path.parent / "runs" / "default-book").mkdir(parents=True)
    flags = ["--minutes=4", "--json", "--chips=v5e:4", *PLAIN_FLAGS, *RATE_FLAGS, *QUICK]
    python, script, *flags = command_of("plan", *flags)
    command = [python, "-c", PROGRAM, script, *flags]
    result = subprocess.run(
        command, cwd=book_path.parent, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name for path in book_path.parent.iterdir()} == {"book.txt", "runs"}
    about = json.loads(result.stdout)
    last = plan.table(about).splitlines()[-1]
    python, script, *words = shlex.split(last.removeprefix("try: "))
    assert [python, script] == command_of("train")
    # The flags that the rule leaves alone are repeated as they were given.
    assert words[: len(PLAIN) + 1] == [*PLAIN_FLAGS, "--config.data.path=book.txt"]
    # The folder with the default name exists.
    assert words.pop() == "--workdir=runs/default-book-2"
    # Four minutes are more than enough to read 5,400 characters as often as the rule allows.
    steps = next(word for word in words if word.startswith("--config.num_steps="))
    most = rules.MAX_EPOCHS * math.ceil(5399 / 16 / 50)
    assert steps == f"--config.num_steps={most}"
    assert set(RATE_FLAGS) < set(words)
    for word in words:
        check_key(word.removeprefix("--config.").split("=")[0])
    # What the proposed run takes was measured, and is estimated.
    assert about["steps"] == most
    spent = about["command_seconds"]
    assert spent["total"] == pytest.approx(sum(spent.values()) - spent["total"])
    assert spent["steps"] == pytest.approx(most * about["step_seconds"])
    assert about["largest_batch"] > 1000
    paper = about["on paper"]
    assert paper["fits"]
    assert paper["step_seconds"] >= max(paper["seconds"].values())


def test_a_time_in_which_nothing_can_be_trained_is_an_error(book_path, monkeypatch):
    config = base_config()
    config.data.path = str(book_path)
    monkeypatch.setattr(timing, "time_process", lambda: 5.0)
    message = r"--minutes=0\.001: all but the steps takes 5\.\d s here; give at least 0\.2"
    with pytest.raises(UserError, match=message):
        plan.propose(config, 0.06, 0.1)


# --- the estimate ---


@pytest.fixture
def setup(book_path):
    config = base_config()
    config.update_from_flattened_dict(PLAIN)
    config.update({"num_steps": 205, "batch_size": 8, "seq_len": 32, "eval_every_steps": 100})
    config.data.path = str(book_path)
    config.mesh.data = 1
    config.model.hidden_size = 64
    return plan.read(config)


PARTS = Parts(start=1.0, step=0.1, batch=0.01, sample=0.5, draw=0.2, save=0.3, once=2.0, end=0.4)


def test_an_estimate_counts_each_part_as_often_as_train_does_it(setup):
    spent = timing.estimate(setup, PARTS, loading=5.0)
    # Evaluations at 100, 200 and the end, each of which saves.
    each = setup.val_batches.steps_per_epoch * 0.01 + 0.7
    assert spent.start == 6.0
    assert spent.steps == pytest.approx(20.5)
    assert spent.evaluations == pytest.approx(2.0 + 3 * each)
    assert spent.checkpoints == pytest.approx(3 * 0.3 + 0.4)


def test_a_plan_of_given_settings_has_counts_times_and_memory(setup, monkeypatch):
    monkeypatch.setattr(timing, "time_process", lambda: 5.0)
    monkeypatch.setattr(timing, "measure_parts", lambda setup, folder, seconds: PARTS)
    # 2 MiB a row and 20 MiB beside them.
    monkeypatch.setattr(timing, "step_bytes", lambda setup, rows: (20 + 2 * rows) * 2**20)
    monkeypatch.setattr(plan, "memory_bytes", lambda: 2**30)
    about = plan.describe(setup.run.config, 0.1)
    assert about["steps"] == 205
    assert about["steps_per_epoch"] == math.ceil(5399 / 8 / 32)
    assert about["training_flops_per_char"] == 3 * about["forward_flops_per_char"]
    assert about["chars_per_second"] == pytest.approx(8 * 32 / 0.1)
    spent = about["command_seconds"]
    assert spent["total"] == pytest.approx(sum(spent.values()) - spent["total"])
    assert 6.0 < spent["start"] < 7.0
    assert about["compiled_step_bytes"] == 36 * 2**20
    usable = plan.MEMORY_SHARE * about["memory_bytes"] - plan.PROCESS_BYTES
    assert about["largest_batch"] == int((usable / 2**20 - 20) / 2)
    assert "an epoch: 2.2 s" in plan.table(about)


def test_the_largest_batch_is_the_last_one_that_fits(setup):
    memory = 200 * 2**20
    on_paper = timing.rows_on_paper(setup, memory)
    small, large = ((rows, timing.step_bytes(setup, rows)) for rows in (8, on_paper))
    rows = timing.largest_batch(small, large, memory)
    assert 256 < rows < 10_000
    assert 0.98 < timing.step_bytes(setup, rows) / memory < 1.02


def test_where_not_one_row_fits_the_largest_batch_is_none():
    assert timing.largest_batch((16, 1000), (64, 2000), 100) == 0


# --- the rule ---


@pytest.mark.parametrize("num_chars", [2, 3, 60, 1000, 10**9])
@pytest.mark.parametrize("seconds", [12, 120, 36_000])
def test_any_text_has_a_window_for_each_stream(num_chars, seconds):
    batch_size, seq_len = rules.choose_shape(seconds, num_chars, is_cpu=True)
    assert batch_size >= 1
    assert seq_len >= 1
    assert batch_size * seq_len + 1 <= num_chars


def width(seconds, num_chars=10**9, vocab_size=96, flops=5e10):
    return rules.widest(base_config(), vocab_size, num_chars, seconds, flops)


def test_more_time_is_for_wider_models():
    widths = [width(seconds) for seconds in (12, 60, 120, 600, 3600, 36_000)]
    places = [rules.WIDTHS.index(found) for found in widths]
    assert places == sorted(places)
    assert len(set(places)) > 4


def test_a_short_text_is_for_a_narrow_model_however_long_the_time_is():
    assert width(36_000, num_chars=10_000) == rules.WIDTHS[0]
    assert width(36_000, num_chars=761_330) < width(36_000)


def test_thousands_of_characters_become_vectors():
    text = {"validation_characters": 100, "vocabulary": 5000}
    config = rules.with_text(base_config(), 120, text)
    assert config.model.input == "embed"
    assert config.data.max_val_chars == base_config().data.max_val_chars
    validate(config)


def test_a_large_text_is_not_validated_for_most_of_the_time():
    text = {"validation_characters": 10**8, "vocabulary": 96}
    config = rules.with_text(base_config(), 600, text)
    assert config.data.max_val_chars == 300_000
    config.data.max_val_chars = 50
    assert rules.with_text(config, 600, text).data.max_val_chars == 50


@pytest.mark.parametrize(
    ("epochs", "dropout"), [(0.5, 0.0), (1, 0.05), (3.7, 0.2), (5.2, 0.3), (100, 0.4)]
)
def test_a_text_that_is_read_often_is_dropped_out_more(epochs, dropout):
    assert rules.with_rates(base_config(), epochs).model.dropout_rate == dropout


@pytest.mark.parametrize(
    ("epochs", "hidden"), [(0.5, 0.0), (5.9, 0.0), (6, 0.06), (12.2, 0.12), (100, 0.15)]
)
def test_the_gates_see_less_of_a_text_the_more_often_it_is_read(epochs, hidden):
    assert rules.with_rates(base_config(), epochs).model.recurrent_dropout == hidden


@pytest.mark.parametrize(("hidden_size", "rate"), [(64, 1.2e-2), (448, 1.2e-2), (1024, 5.25e-3)])
def test_a_wider_model_has_a_lower_rate(hidden_size, rate):
    config = rules.with_width(base_config(), (hidden_size, 1))
    assert rules.with_rates(config, 1).optimizer.learning_rate == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize(("seconds", "each", "number"), [(120, 1, 5), (120, 4, 3), (12, 60, 1)])
def test_evaluations_leave_the_time_to_training(seconds, each, number):
    assert rules.choose_evaluations(seconds, each) == number


def test_the_last_evaluation_is_at_the_end():
    config = rules.with_length(base_config(), 1001, 5)
    assert math.ceil(1001 / config.eval_every_steps) == 5


def test_settings_told_are_the_rules_own_and_what_else_has_changed():
    given = base_config()
    proposed = rules.settings_of(rules.with_streams(given), given)
    assert proposed.keys() == rules.ALWAYS
    given.data.order, given.data.loss_on = "windows", "last"
    proposed = rules.settings_of(rules.with_streams(given), given)
    assert proposed["data.order"] == "streams"
