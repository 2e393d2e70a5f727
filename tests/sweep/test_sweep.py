import csv
import json
import os
import shlex
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from launching import command_of, run_command

from charlstm.config import base_config, flatten
from charlstm.data.cleaning import Cleaning
from charlstm.data.corpus import open_corpus
from charlstm.errors import DamagedError, UserError
from charlstm.sweep import grid, results, runner

SHORT = ["--config=tiny", "--config.num_steps=20", "--config.eval_every_steps=10", "--out=out"]
# A model and an optimizer that compile in less time than the default ones.
PLAIN = [
    f"--config.{setting}"
    for setting in (
        "model.multiplicative=0",
        "model.recurrent_rms_norm=0",
        "optimizer.average_window=0",
    )
]
# Only train.py notices that the text is too short for a batch.
SWEEP = [*SHORT, *PLAIN, "--texts=book.txt", "--set=batch_size=8,999"]


def table_of(folder):
    with open(folder / "out" / "trials.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


# --- the launcher ---


def test_a_sweep_records_every_trial_once_and_goes_on_after_one_that_fails(book_path):
    folder = book_path.parent
    result = run_command("sweep", *SWEEP, cwd=folder)
    assert result.returncode == 1, result.stderr
    finished, failed = table_of(folder)
    assert [finished["batch_size"], failed["batch_size"]] == ["8", "999"]
    assert finished["status"] == "finished"
    assert finished["steps"] == "20"
    assert 1 < float(finished["best_bits_per_char"]) <= float(finished["bits_per_char"]) < 7
    assert float(finished["seconds"]) > 0
    assert "jax=" in finished["versions"]
    assert failed["status"].startswith("failed: config.batch_size=999: with config.seq_len=32")
    assert failed["bits_per_char"] == ""
    assert "1 of 1 failed" in result.stdout.splitlines()[2]
    best = shlex.split(result.stdout.splitlines()[-1].removeprefix("best: "))
    assert best[:2] == command_of("train")
    assert best[2] == "--config=tiny"
    assert "--config.batch_size=8" in best
    assert best[-2:] == ["--config.data.path=book.txt", "--workdir=runs/tiny-book"]
    # The figure is that of the final weights, on 5 % of the text.
    records = (folder / "out" / "metrics" / f"{finished['trial']}.jsonl").read_text().splitlines()
    final = json.loads(records[-1])
    assert final["val/bits_per_char"] == float(finished["bits_per_char"])
    assert not (folder / "out" / "runs" / finished["trial"]).exists()

    again = run_command("sweep", *SWEEP, cwd=folder)
    assert "0 of 2 trials to run" in again.stderr
    assert again.stdout == result.stdout
    assert table_of(folder) == [finished, failed]


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
    ("--set=data.lowercase=0,1", "decides what is measured|--config.data.lowercase"),
    ("--seeds=0,one", "config.seed=one: must be a whole number"),
    ("--seeds=-1", "config.seed=-1: must be from 0"),
    ("--seeds=1,1", "--seeds: has a value twice"),
    ("--trials=2", "--trials=2: there are 1 combinations"),
    ("--trials=0", "trials|0"),
    ("--jobs=9999", "--jobs=9999: there are|cores"),
    ("--texts=none.txt", "none.txt: no such file; give UTF-8 text in --texts"),
    ("--texts=blank.txt", "blank.txt: the text is empty"),
    ("--texts=book.txt,book.txt", "--texts: has a value twice"),
    ("--texts=book.txt --out=book.txt", "book.txt: cannot write there|choose another --out"),
    ("--texts=book.txt --out=gs://bucket", "gs://bucket: must be on this machine"),
    ("--texts=book.txt --out=other", "another sweep (it varies model.hidden_size)"),
    ("--texts=book.txt --out=same", "num_steps is 7 there and 20 here|another --out"),
    ("--texts=book.txt --out=broken", "sweep.json: is not as it was written"),
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Return launch(*flags, cwd=...) for a sweep that must end before JAX is imported."""
    from launching import WarmLauncher

    folder = tmp_path_factory.mktemp("without")
    (folder / "jax.py").write_text("raise SystemExit('JAX was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    warm = WarmLauncher("ml_collections.config_flags", "charlstm.data.corpus", env=environment)
    yield lambda *flags, cwd: warm("sweep", *SHORT, *flags, cwd=cwd)
    warm.close()


@pytest.mark.parametrize(("flags", "messages"), MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_run(flags, messages, book_path, launch):
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


# --- the text ---


@pytest.mark.parametrize(
    "cleaning",
    [
        Cleaning(),
        Cleaning(lowercase=True),
        Cleaning(strip_punctuation=True),
        Cleaning(lowercase=True, strip_punctuation=True, separator="\n%\n"),
    ],
)
def test_the_last_tenth_of_what_train_would_read_is_cut_off(cleaning, book, tmp_path, caplog):
    frame = "*** {} OF THE PROJECT GUTENBERG EBOOK X ***\n"
    body = book[:3000] + "\n%\n" + "İstanbul, Straße!\r\n" * 20 + book[3000:]
    content = "\ufeffheader\n" + frame.format("START") + body + frame.format("END") + "licence\n"
    (tmp_path / "book.txt").write_bytes(content.encode())
    caplog.set_level("INFO", "charlstm")
    text = runner.open_text(str(tmp_path / "book.txt"), cleaning)
    assert "of Project Gutenberg's headers and licences" in caplog.text
    runner.write_first_part(text, cleaning, tmp_path / "texts" / "cut.txt")

    data = base_config().data
    data.lowercase, data.strip_punctuation, data.document_separator = cleaning
    whole, cut = (open_corpus(data, str(tmp_path / name)) for name in ("book.txt", "texts/cut.txt"))
    characters, kept = whole.vocab.decode(whole.ids_M), cut.vocab.decode(cut.ids_M)
    if cleaning.separator:
        kept = kept.removesuffix("\x03")  # the cut ends a document
    # As charlstm.data.batches.split counts.
    assert len(kept) == len(characters) - round(len(characters) * 0.1)
    assert characters.startswith(kept)


def test_the_validation_part_is_a_twentieth_of_the_whole():
    kept = 100_000 - round(100_000 * runner.UNREAD)
    assert round(kept * runner.VAL_FRACTION) == 5_000


def test_a_text_of_another_content_has_another_name(tmp_path):
    path, names = tmp_path / "my text.old.txt", set()
    for content in ("abc", "abd"):
        path.write_text(content)
        names.add(runner.open_text(str(path), Cleaning()).name)
    assert len(names) == 2
    assert {name.split("-")[0] for name in names} == {"my_text"}


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 99])
def test_the_first_part_does_not_depend_on_chunks(count):
    assert "".join(runner.first_part(["abc", "", "defg"], count)) == "abcdefg"[:count]


# --- the trials ---


def test_combinations_come_in_order_and_draws_without_repetition():
    varied = grid.parse_sets(["batch_size=8,16", "model.hidden_size=64,128,256"])
    every = grid.combine(varied, None, 0)
    assert [tuple(settings.values()) for settings in every[:4]] == [
        (8, 64),
        (8, 128),
        (8, 256),
        (16, 64),
    ]
    assert len(every) == 6
    few, more = (grid.combine(varied, number, seed=3) for number in (2, 4))
    assert all(settings in more for settings in few)
    assert [settings for settings in every if settings in more] == more
    assert grid.combine(varied, 6, seed=1) == every
    assert grid.combine({}, None, 0) == [{}]


def test_a_trial_has_all_settings_and_a_name_of_its_own():
    config = base_config()
    config.seed, config.data.path, config.num_steps = 5, "book.txt", 7
    combinations = [{"batch_size": 8, "seq_len": 32}, {"seq_len": 32, "batch_size": 16}]
    trials = grid.make_trials(config, combinations, ["a", "b"], [0, 1])
    assert [(t.seed, t.config.batch_size, t.text) for t in trials[:4]] == [
        (0, 8, "a"),
        (0, 8, "b"),
        (0, 16, "a"),
        (0, 16, "b"),
    ]
    assert len({trial.name for trial in trials}) == 8
    assert trials[-1].config.seed == 1
    assert trials[0].config.num_steps == 7
    assert trials[0].config.data.val_fraction == runner.VAL_FRACTION
    assert config.data.val_fraction == 0.1
    twin = trials[0]._replace(settings={"seq_len": 32, "batch_size": 8})
    assert twin.name == trials[0].name


def test_seeds_and_values_may_be_added_to_a_sweep_and_nothing_else(tmp_path):
    path, config = tmp_path / "sweep.json", base_config()

    def common(seeds, **settings):
        return grid.common(grid.make_trials(config, [settings], ["a"], seeds))

    about = common([0], batch_size=8)
    grid.refuse_other(path, about)
    path.write_text(json.dumps(about))
    grid.refuse_other(path, common([1], batch_size=16))
    with pytest.raises(UserError, match="it varies batch_size"):
        grid.refuse_other(path, common([0], seq_len=8))
    config.data.lowercase = True
    with pytest.raises(UserError, match=r"data\.lowercase is False there and True here"):
        grid.refuse_other(path, common([0], batch_size=8))


# --- processes, with a program in the place of train.py ---

PROGRAM = """
import json, os, signal, sys, time
def leave(number, frame):
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, leave)
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
folder = flags["workdir"]
os.makedirs(folder, exist_ok=True)
with open(folder + "/cores", "w") as file:
    json.dump(sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else [], file)
seq_len = int(flags["config.seq_len"])
if seq_len == 2:
    print("train.py: error: a bad day")
    sys.exit(1)
if seq_len == 3:
    os.kill(os.getpid(), signal.SIGKILL)
while seq_len > 9 and not os.path.exists(folder + "/../go"):
    time.sleep(0.01)
"""


# These processes have JAX's threads, a sweep has not.
FORKS = pytest.mark.filterwarnings("ignore:os.fork")


@pytest.fixture
def trials(tmp_path, monkeypatch):
    """Return make(seq_len, ...) for trials that the program above runs."""
    (tmp_path / "train.py").write_text(PROGRAM)
    monkeypatch.setattr(runner, "TRAIN", tmp_path / "train.py")

    def make(*lengths):
        sets = [{"seq_len": length} for length in lengths]
        return grid.make_trials(base_config(), sets, ["a"], [0])

    return make


def run(trials, out, shares=None, should_stop=lambda: False):
    ended = []
    shares = shares or runner.share_cores(1)
    is_done = runner.run_trials(trials, out, shares, should_stop, ended.append)
    return is_done, ended


@FORKS
def test_how_a_process_ended_is_told(trials, tmp_path):
    is_done, ended = run(trials(2, 3), tmp_path)
    assert is_done
    assert [end.seconds > 0 for end in ended] == [True, True]
    rows = [runner.outcome(end, tmp_path) for end in ended]
    assert [row["status"] for row in rows] == ["failed: a bad day", "failed: ended by signal 9"]


@FORKS
@pytest.mark.skipif(len(runner.share_cores(1)[0]) < 2, reason="needs two cores")
def test_trials_at_a_time_share_the_cores_and_are_not_timed(trials, tmp_path):
    shares = runner.share_cores(2)
    pair = trials(10, 11)

    def should_stop():
        # Both wait for the other's folder: they do run at a time.
        if len(list(tmp_path.glob("runs/*/cores"))) == 2:
            (tmp_path / "runs" / "go").touch()
        return False

    is_done, ended = run(pair, tmp_path, shares, should_stop)
    assert is_done
    assert [(end.code, end.seconds) for end in ended] == [(0, None), (0, None)]
    if sys.platform == "linux":
        seen = [set(json.loads(path.read_text())) for path in tmp_path.glob("runs/*/cores")]
        assert sorted(seen, key=min) == sorted(shares, key=min)
        assert not set.intersection(*seen)


@FORKS
def test_a_stop_reaches_the_runs_and_starts_no_more(trials, tmp_path):
    started = lambda: bool(list(tmp_path.glob("runs/*/cores")))  # noqa: E731
    is_done, ended = run(trials(10, 11), tmp_path, should_stop=started)
    assert (is_done, ended) == (False, [])
    assert len(list(tmp_path.glob("runs/*/"))) == 1
    # The next start goes on, and its time would say nothing.
    (tmp_path / "runs" / "go").touch()
    is_done, ended = run(trials(10, 11), tmp_path)
    assert is_done
    assert [end.seconds is None for end in ended] == [True, False]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_runs_end_with_a_sweep_that_is_killed(trials, tmp_path):
    (trial,) = trials(10)
    program = (
        "import time; from pathlib import Path\n"
        "from charlstm.sweep import grid, runner\n"
        "from charlstm.config import base_config\n"
        f"runner.TRAIN = Path({str(runner.TRAIN)!r})\n"
        "(trial,) = grid.make_trials(base_config(), [{'seq_len': 10}], ['a'], [0])\n"
        "[cores] = runner.share_cores(1)\n"
        f"runner.start(trial, Path({str(tmp_path)!r}), cores, is_alone=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    folder = runner.run_folder(tmp_path, trial)
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


# --- the table ---


def test_the_figure_is_that_of_the_final_weights():
    records = [{"step": 5}, *({"step": s, "val/bits_per_char": b} for s, b in ((5, 2.5), (9, 3.0)))]
    row = runner.scores(records)
    assert row == {
        "steps": 9,
        "bits_per_char": 3.0,
        "best_bits_per_char": 2.5,
        "status": "finished",
    }
    records[-1]["val/bits_per_char"] = None
    assert runner.scores(records)["status"].startswith("failed")
    assert runner.scores([])["status"].startswith("failed")


KEYS = ["seq_len", "batch_size"]
COLUMNS = results.columns_of(KEYS)


def row(trial, text, seq_len, bits, **others):
    status = 'failed: a "quote", a comma' if bits is None else "finished"
    figures = {"bits_per_char": "" if bits is None else bits, "status": status, "seconds": 2.0}
    return {"trial": trial, "text": text, "seed": 0, "seq_len": seq_len, "batch_size": 8} | (
        figures | others
    )


def test_a_table_reads_as_it_was_written_and_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "trials.tsv"
    assert results.read_table(path, COLUMNS) == {}
    for name, bits in (("one", 2.25), ("two", None)):
        results.append(path, COLUMNS, row(name, "a", 32, bits))
    rows = results.read_table(path, COLUMNS)
    assert list(rows) == ["one", "two"]
    assert rows["one"]["bits_per_char"] == "2.25"
    assert rows["two"]["status"] == 'failed: a "quote", a comma'
    whole = path.read_bytes()
    for end in (1, 10, len(whole) - 3):
        path.write_bytes(whole[:end])
        results.read_table(path, COLUMNS)
        assert path.read_bytes() == whole[: whole.rfind(b"\n", 0, end) + 1]
        results.append(path, COLUMNS, row("new", "a", 32, 2.0))
        assert "new" in results.read_table(path, COLUMNS)


@pytest.mark.parametrize(("old", "new"), [("seq_len", "seqlen"), ("2.25", "good"), ("\t8", "")])
def test_a_table_that_was_edited_badly_is_one_line(old, new, tmp_path):
    path = tmp_path / "trials.tsv"
    results.append(path, COLUMNS, row("one", "a", 32, 2.25))
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DamagedError, match=r"trials\.tsv: is not as it was written"):
        results.read_table(path, COLUMNS)


def test_the_best_mean_comes_first_and_combinations_that_failed_last():
    rows = [
        row("1", "a", "16", 2.0),
        row("2", "b", "16", 4.0),
        row("3", "a", "32", 1.0),
        row("4", "b", "32", None),
        row("5", "a", "64", 2.5),
        row("6", "a", "64", 1.5, seconds=""),
        row("7", "b", "64", 3.0),
    ]
    rows = [{key: str(value) for key, value in line.items()} for line in rows]
    scores = results.rank(rows, KEYS)
    assert [score.values for score in scores] == [("64", "8"), ("16", "8"), ("32", "8")]
    # Texts count the same, whatever their seeds.
    assert [score.mean for score in scores[:2]] == [2.5, 3.0]
    assert [score.seconds for score in scores] == [None, 2.0, 2.0]
    assert list(results.ranking(scores, KEYS, ["a", "b"])) == [
        "seq_len  batch_size      bits/char       a       b  seconds",
        "     64           8         2.5000  2.0000  3.0000        -",
        "     16           8         3.0000  2.0000  4.0000      2.0",
        "     32           8  1 of 2 failed  1.0000       -      2.0",
    ]
