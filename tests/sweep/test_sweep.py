import csv
import json
import os
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from launching import command_of, run_command

from charlstm import sweep
from charlstm.config import base_config, flatten
from charlstm.sweep import trials

SHORT = ["--config=tiny", "--config.num_steps=20", "--config.eval_every_steps=10", "--out=out"]
# A model and an optimizer that compile in less time than the default ones.
PLAIN = [
    f"--config.{setting}"
    for setting in (
        "model.multiplicative=0",
        "model.recurrent_rms_norm=0",
        "model.dropout_rate=0",
        "optimizer.name=adam",
        "optimizer.weight_decay=0",
        "optimizer.average_window=0",
        "sample.length=20",
    )
]


def table_of(out):
    with open(out / "trials.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


# --- the function, with a program in place of train.py ---


@pytest.mark.filterwarnings("ignore:os.fork")  # these processes have JAX's threads
def test_run_resumes_and_returns_ranked_results(book_path, monkeypatch):
    monkeypatch.setattr(trials, "TRAIN", Path(__file__).with_name("fake_train.py"))
    config, out = base_config(), book_path.parent / "out"
    config.data.path = str(book_path)
    results = sweep.run(config, {"seq_len": [8, 4]}, out=str(out))
    assert results.is_complete
    assert not results.has_failures
    assert results.best_settings == {"seq_len": 4}
    assert [each.mean_bits for each in results.combinations] == [1.0, 2.0]
    assert [line.split()[:2] for line in str(results).splitlines()[1:]] == [
        ["4", "1.0000"],
        ["8", "2.0000"],
    ]
    more = sweep.run(config, {"seq_len": [8, 4, 2]}, out=str(out))
    assert more.combinations[:2] == results.combinations
    assert more.has_failures
    assert more.best_settings == {"seq_len": 4}
    rows = table_of(out)
    assert [row["status"] for row in rows] == ["finished", "finished", "failed: a bad day"]
    assert rows[0]["versions"] == "jax=1.2"
    assert {path.name for path in (out / "runs").iterdir()} == {
        name for name in (rows[2]["trial"], f"{rows[2]['trial']}.log")
    }
    assert len(list((out / "metrics").iterdir())) == 2


def test_stopped_run_has_no_results(book_path):
    config = base_config()
    config.data.path = str(book_path)
    out = str(book_path.parent / "out")
    results = sweep.run(config, {"seq_len": [8]}, out=out, should_stop=lambda: True)
    assert not results.is_complete
    assert results.best_settings is None
    assert str(results) == "no results"


# --- the launcher ---


@pytest.mark.slow
def test_sweep_trains_and_prints_the_best_command(book_path):
    folder = book_path.parent
    result = run_command(
        "sweep", *SHORT, *PLAIN, "--texts=book.txt", "--set=batch_size=8", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    (row,) = table_of(folder / "out")
    assert row["batch_size"] == "8"
    assert row["status"] == "finished"
    assert row["steps"] == "20"
    assert 1 < float(row["best_bits_per_char"]) <= float(row["bits_per_char"]) < 7
    assert float(row["seconds"]) > 0
    assert "jax=" in row["versions"]
    best = shlex.split(result.stdout.splitlines()[-1].removeprefix("best: "))
    assert best[:2] == command_of("train")
    assert best[2] == "--config=tiny"
    assert "--config.batch_size=8" in best
    assert best[-2:] == ["--config.data.path=book.txt", "--workdir=runs/tiny-book"]
    # The metric is that of the final weights, on 5 % of the text.
    records = (folder / "out" / "metrics" / f"{row['trial']}.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["val/bits_per_char"] == float(row["bits_per_char"])


MISTAKES = [
    ("--set=model.hiden_size=3", "config.model.hiden_size: no such key; did you mean"),
    ("--set=batch_size", "--set=batch_size: must be KEY=VALUE"),
    ("--set=batch_size=", "config.batch_size=: must be a whole number"),
    ("--set=batch_size=8,many", "config.batch_size=many: must be a whole number"),
    ("--set=batch_size=8,0", "config.batch_size=0: must be a whole number from 1"),
    ("--set=optimizer.name=adamw,adam", "use config.optimizer.name=adamw"),
    ("--set=batch_size=8 --set=batch_size=16", "batch_size is given twice"),
    ("--set=seq_len=32,32", "--set=seq_len=32,32: has a value twice"),
    ("--set=seed=1,2", "--set=seed=1,2: give seeds in --seeds"),
    ("--set=data.lowercase=0,1", "--set=data.lowercase=False,True|--config.data.lowercase"),
    ("--seeds=0,one", "config.seed=one: must be a whole number"),
    ("--seeds=-1", "config.seed=-1: must be from 0"),
    ("--seeds=1,1", "--seeds: has a value twice"),
    ("--combinations=2", "--combinations=2: must be from 1 to 1"),
    ("--combinations=0", "combinations|0"),
    ("--jobs=9999", "--jobs=9999: must be from 1 to|cores"),
    ("--texts=none.txt", "none.txt: no such file; give UTF-8 text in --texts"),
    ("--texts=blank.txt", "blank.txt: the text is empty"),
    ("--texts=book.txt,book.txt", "--texts: has a value twice"),
    ("--texts=book.txt --out=book.txt", "book.txt: cannot write there|choose another --out"),
    ("--texts=book.txt --out=gs://bucket", "gs://bucket|this machine"),
    ("--texts=book.txt --out=other", "other: |it varies model.hidden_size|--out"),
    ("--texts=book.txt --out=same", "num_steps is 7 there and 20 here|--out"),
    ("--texts=book.txt --out=broken", "sweep.json: |--out"),
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Return launch(*flags, cwd=...) for a sweep without JAX, whose import ends a process."""
    from launching import WITHOUT_JAX, WarmLauncher

    folder = tmp_path_factory.mktemp("without")
    (folder / "jax.py").write_text("raise SystemExit('JAX was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    warm = WarmLauncher(*WITHOUT_JAX, "charlstm.data.corpus", env=environment)
    yield lambda *flags, cwd: warm("sweep", *SHORT, *flags, cwd=cwd)
    warm.close()


def test_failed_trial_is_shown_and_gives_exit_code_1(book_path, launch):
    result = launch("--texts=book.txt", "--set=batch_size=8", cwd=book_path.parent)
    assert result.returncode == 1, result.stderr
    assert "failed: JAX was imported" in result.stderr
    header, line = result.stdout.splitlines()
    assert header.split() == ["batch_size", "bits/char", "seconds"]
    assert line.split()[:5] == ["8", "1", "of", "1", "failed"]


@pytest.mark.parametrize(("flags", "messages"), MISTAKES)
def test_mistake_is_one_line_before_anything_runs(flags, messages, book_path, launch):
    folder = book_path.parent
    (folder / "blank.txt").write_text(" \n")
    settings = {"num_steps": 7, "eval_every_steps": 10}
    for name, about in {
        "other": {"varied": ["model.hidden_size"], "config": {}},
        "same": {"varied": [], "config": trial_config(**settings)},
        "broken": [],
    }.items():
        (folder / name).mkdir()
        (folder / name / "sweep.json").write_text(json.dumps(about))
    before = sorted(folder.rglob("*"))
    answer = launch(*flags.split(), cwd=folder)
    assert answer.returncode == 2, answer.stderr
    assert len(answer.stderr.splitlines()) == 1, answer.stderr
    for message in messages.split("|"):
        assert message in answer.stderr
    assert sorted(folder.rglob("*")) == before


def trial_config(**settings):
    config = flatten(base_config()) | settings
    return {key: value for key, value in config.items() if key != "seed"}
