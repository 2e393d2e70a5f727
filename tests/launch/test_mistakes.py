"""Mistakes: each is answered by one line with the thing, the value and the remedy, and exit code 2.

Nothing is created or changed by any of them.
"""

import gzip
import json
import os
import shlex
import shutil
import subprocess

import pytest
import zstandard
from conftest import ROOT
from launching import WarmLauncher, command_of
from test_launch import TINY

from charlstm.runs.folder import _checksum, _sha256


def snapshot(folder):
    """Return all that is in a folder: names, links and contents."""
    return {
        path.relative_to(folder): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def check(answer, messages, folder, before):
    assert answer.returncode == 2, answer.stderr
    assert len(answer.stderr.splitlines()) == 1, answer.stderr
    for message in messages.split("|"):
        assert message in answer.stderr
    assert answer.stdout == ""
    assert snapshot(folder) == before


# --- the command line ---

COMMAND_LINE = [
    ("train", "--config=tuturial", "--config=tuturial: no such file|did you mean tutorial"),
    ("train", "--config=", "--config=: no such file|configs/ has default"),
    ("train", "--config=.", "--config=.: no such file"),
    ("train", "--config=none.py", "--config=none.py: no such file"),
    ("train", "--config.batchsize=3", "config.batchsize: no such key|did you mean batch_size"),
    ("train", "--config.hidden_size=3", "did you mean model.hidden_size"),
    ("train", "--config.xyzzy=1", "config.xyzzy: no such key; the keys are"),
    ("train", "--config.model=1", "config.model: no such key"),
    ("train", "--config.batch_size=1e3", "config.batch_size=1e3: must be a whole number"),
    ("train", "--config.batch_size=many", "config.batch_size=many: must be a whole number"),
    ("train", "--config.batch_size=", "config.batch_size=: must be a whole number"),
    ("train", "--config.batch_size", "config.batch_size=: must be a whole number"),
    ("train", "--config.batch_size=-8", "config.batch_size=-8: must be a whole number from 1"),
    ("train", "--config.batch_size=0", "config.batch_size=0: must be a whole number from 1"),
    ("train", "--config.batch_size=3000000000", "must be a whole number from 1 to 2147483647"),
    ("train", "--config.seq_len=0", "config.seq_len=0: must be"),
    ("train", "--config.num_epochs=0", "config.num_epochs=0: must be"),
    ("train", "--config.num_steps=-1", "config.num_steps=-1: must be"),
    ("train", "--config.log_every_steps=0", "config.log_every_steps=0: must be"),
    ("train", "--config.seed=-1", "config.seed=-1: must be from 0"),
    (
        "train",
        "--config.data.lowercase=maybe",
        "lowercase=maybe: must be true or false",
    ),
    ("train", "--config.data.val_fraction=1", "config.data.val_fraction=1.0: must be"),
    ("train", "--config.data.order=random", "must be streams or windows"),
    ("train", "--config.data.loss_on=last", "loss_on=last: |config.data.order=windows|use all"),
    ("train", "--config.model.dropout_rate=1.5", "at least 0 and below 1"),
    ("train", "--config.model.input=bytes", "must be one_hot or embed or scaled"),
    ("train", "--config.model.dtype=float16", "must be float32 or bfloat16"),
    ("train", "--config.model.recurrence=gru", "must be fused or flax or cudnn"),
    ("train", "--config.model.num_layers=two", "must be a whole number"),
    ("train", "--config.optimizer.learning_rate=nan", "must be a number above 0"),
    ("train", "--config.optimizer.learning_rate=fast", "learning_rate=fast: must be a number"),
    ("train", "--config.optimizer.learning_rate=-1", "must be a number above 0"),
    (
        "train",
        "--config.optimizer.name=sgd",
        "must be adam or adamw or cautious_adamw or keras_adam",
    ),
    ("train", "--config.optimizer.schedule=step", "must be constant or cosine or linear"),
    ("train", "--config.data.min_count=0", "config.data.min_count=0: must be a whole number"),
    ("train", "--config.data.max_val_chars=-1", "max_val_chars=-1: must be a whole number"),
    ("train", "--config.model.tie_embeddings", "input=one_hot has no embeddings; use"),
    (
        "train",
        "--config.model.recurrence=cudnn --config.data.document_separator=#",
        "config.model.recurrence=cudnn: |document_separator|use fused",
    ),
    (
        "train",
        "--config.model.recurrence=cudnn",
        "config.model.multiplicative=True: |config.model.recurrence=cudnn|use fused",
    ),
    ("train", "--config.optimizer.name=adam", "use config.optimizer.name=adamw"),
    ("train", "--config.optimizer.clip_norm=inf", "must be a number of at least 0"),
    ("train", "--config.sample.top_p=0", "above 0 and at most 1"),
    ("train", "--config.sample.temperature=-1", "must be a number of at least 0"),
    ("train", "--config.sample.method=beam", "must be carry or window"),
    ("train", "--wrokdir=x", "wrokdir|workdir"),
    ("train", "--workdir", "workdir"),
    ("train", "--flagfile=flags.txt", "config.batch_size=0: must be a whole number from 1"),
    ("train", "--flagfile=none.txt", "none.txt"),
    ("train", "tiny", "tiny: not a flag|--help"),
    ("train", "--config.data.path=https://x/y.txt", "https://x/y.txt: https:// is not supported"),
    ("train", "--workdir=file:///x", "file:///x: give the path without file://"),
    ("train", "--workdir=~nobody-here/x", "~nobody-here/x: there is no home folder ~nobody-here"),
    ("evaluate", "--text=https://x/y.txt", "https://x/y.txt: https:// is not supported"),
    ("sample", "--adapt_to=az://x/y.txt", "az://x/y.txt: az:// is not supported"),
    ("sample", "--prompt_file=gs://x/y.txt", "gs://x/y.txt: must be on this machine"),
    ("sweep", "--out=s3://x/y", "s3://x/y: must be on this machine"),
    ("sample", "--temprature=1", "temprature|temperature"),
    ("sample", "--temperature=warm", "temperature|warm"),
    ("sample", "--temperature=-1", "--temperature=-1.0: must be a number of at least 0"),
    ("sample", "--temperature=nan", "--temperature=nan: must be"),
    ("sample", "--top_k=-1", "--top_k=-1: must be"),
    ("sample", "--top_p=1.5", "--top_p=1.5: must be above 0"),
    ("sample", "--length=0", "--length=0: must be"),
    ("sample", "--length=ten", "length|ten"),
    ("sample", "--num_samples=0", "num_samples|0"),
    ("sample", "--num_samples=100000000", "num_samples=100000000|10000000]"),
    ("sample", "--seed=-1", "seed|-1"),
    ("sample", "--checkpoint=worst", "checkpoint|worst|best"),
    ("sample", "--method=beam", "method|beam|carry"),
    ("sample", "--unknown=ignore", "unknown|ignore|drop"),
    ("sample", "--stream --num_samples=2", "--num_samples=2: --stream shows one text at a time"),
    ("sample", "--prompt=a --prompt_file=b", "--prompt and --prompt_file: give one of them"),
    ("sample", "--words=none.txt", "--words=none.txt: is for --check, which is not given"),
    ("sample", "--check --words=none.txt", "--words=none.txt|give a UTF-8 file"),
    ("sample", "--prompt_file=none.txt", "--prompt_file=none.txt|give a UTF-8 file"),
    ("sample", "--prompt_file=latin1.txt", "--prompt_file=latin1.txt: not UTF-8|-f CP1252"),
    ("sample", "--prompt_file=empty.txt", "--prompt_file=empty.txt: is empty"),
    ("sample", "--prompt_file=/dev/zero", "--prompt_file=/dev/zero: has more than"),
    ("sample", "--prompt_file=.", "--prompt_file=.: Is a directory; give a UTF-8 file"),
    ("sample", "--seed=4294967296", "seed=4294967296|4294967295"),
    ("sample", "--seed=18446744073709551616", "seed=18446744073709551616|4294967295"),
    ("evaluate", "--jsn", "jsn|json"),
    ("evaluate", "--window=0", "window|0"),
    ("evaluate", "--dynamic --dynamic_rate=0", "--dynamic_rate=0.0: must be a number above 0"),
    ("evaluate", "--dynamic --dynamic_rate=nan", "--dynamic_rate=nan: must be a number above 0"),
    ("evaluate", "--dynamic_rate=1", "--dynamic_rate=1.0: is for --dynamic, which is not given"),
    ("evaluate", "--window=99999", "window|99999"),
    ("bench", "--what=stepp", "--what=stepp: must be of step"),
    ("bench", "--shapes=32x50", "--shapes=32x50: must be BxTxH"),
    ("plan", "--minutes=0", "--minutes=0.0: must be a number above 0"),
    ("plan", "--minutes=1e308", "--minutes=1e+308: must be a number above 0, at most 525,600"),
    ("plan", "--seconds=inf", "seconds|inf"),
    (
        "bench",
        "--what=quality --minutes=1e308",
        "--minutes=1e+308: must be a number above 0, at most",
    ),
    ("plan", "--minutes=nan", "--minutes=nan: must be a number above 0"),
    ("plan", "--minutes=ten", "minutes|ten"),
    ("plan", "--minutes=2 --seconds=0", "--seconds=0: --minutes has to time steps"),
    ("plan", "--seconds=-1", "seconds|-1"),
    ("plan", "--chips=v5e", "--chips=v5e: must be NAME:NUMBER, such as v5e:256; names: v4"),
    ("plan", "--chips=v9:4", "--chips=v9:4: must be NAME:NUMBER"),
    ("plan", "--chips=v5e:0", "--chips=v5e:0: must be NAME:NUMBER"),
    ("plan", "--chips=v5e:17", "--chips=v5e:17: config.batch_size=8 has no row for each"),
    ("plan", "--config.batch_size=0", "config.batch_size=0: must be a whole number from 1"),
    ("scaling", "--chip=v9", "chip|v9|v5e"),
    ("scaling", "--devices=0", "devices|0"),
    ("scaling", "--devices=3", "--devices=3: must be a power of two up to 64"),
    ("scaling", "--devices=128", "--devices=128: must be a power of two up to 64"),
    ("scaling", "--out=latin1.txt/x", "--out=latin1.txt/x|choose another --out"),
    ("train", "--config=broken.py", "broken.py: raised SyntaxError"),
    ("train", "--config=empty.py", "empty.py: raised AttributeError|define get_config()"),
    ("train", "--config=unknown.py", "config.hiden_size: no such key; did you mean"),
    ("train", "--config=wrong.py", "config.batch_size=|must be of type int"),
]
CONFIG_FILES = {
    "flags.txt": "--config=tiny\n# One flag a line.\n--config.batch_size=0\n",
    "broken.py": "def get_config(:\n",
    "empty.py": "",
    "unknown.py": "from charlstm.config import base_config\n\ndef get_config():\n"
    "    config = base_config()\n    config.hiden_size = 3\n    return config\n",
    "wrong.py": "from charlstm.config import base_config\n\ndef get_config():\n"
    "    config = base_config()\n    config.batch_size = None\n    return config\n",
}


@pytest.fixture(scope="module")
def launch_without_jax(tmp_path_factory):
    """Return launch(launcher, *flags, cwd=...) for processes in which importing JAX is the end."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "jax.py").write_text("raise SystemExit('JAX was imported')")
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    warm = WarmLauncher("ml_collections.config_flags", "charlstm.config", env=environment)
    yield warm
    warm.close()


@pytest.mark.parametrize(("launcher", "flags", "messages"), COMMAND_LINE)
def test_a_mistake_on_the_command_line_is_answered_before_jax_is_imported(
    launcher, flags, messages, tmp_path, launch_without_jax
):
    (tmp_path / "latin1.txt").write_bytes("Käse".encode("latin1"))
    (tmp_path / "empty.txt").touch()
    for name, content in CONFIG_FILES.items():
        (tmp_path / name).write_text(content)
    before = snapshot(tmp_path)
    check(launch_without_jax(launcher, *flags.split(), cwd=tmp_path), messages, tmp_path, before)


@pytest.mark.parametrize("flag", ["--config.batch_size=0", "--temprature=1"])
def test_debug_shows_where_a_mistake_was_noticed(flag, tmp_path):
    command = command_of("train", flag, "--debug")
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2
    assert answer.stderr.startswith("Traceback")
    assert flag.removeprefix("--").split("=")[0] in answer.stderr.splitlines()[-1]


# --- texts, prompts and run folders ---


@pytest.fixture(scope="module")
def launch():
    """Return launch(launcher, *flags, cwd=...)."""
    warm = WarmLauncher("charlstm.training.loop", "charlstm.system.console")
    yield warm
    warm.close()


def copy_run(run, target, section, changes):
    """Copy a run, with changes in a section of its config.json, as if it had been trained so."""
    shutil.copytree(run, target)
    about = json.loads((target / "config.json").read_text())
    del about["checksum"]
    (about if section in about else about["config"])[section].update(changes)
    about["checksum"] = _checksum(about)
    (target / "config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def ready(tmp_path_factory, book, launch):
    """Return a folder with texts, and with runs that are finished, in runs/."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "book.txt").write_text(book, encoding="utf-8")
    (folder / "other.txt").write_text(book[::-1], encoding="utf-8")
    (folder / "folder").mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "broken.txt.gz").write_text("not compressed at all")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(book.encode())[:-9])
    (folder / "cut.zst").write_bytes(zstandard.compress(book.encode())[:-9])
    os.mkfifo(folder / "pipe")
    (folder / "several").mkdir()
    (folder / "several" / "a.txt").write_text(book)
    (folder / "several" / "b.txt").write_bytes("Käse".encode("latin1"))
    (folder / "blank.txt").write_text(" \n\t\n")
    (folder / "one.txt").write_text("a" * 5000)
    (folder / "latin1.txt").write_bytes("Käse".encode("latin1") * 1000)
    (folder / "short.txt").write_text("Too short.")
    (folder / "dots.txt").write_text("...!!! " * 1000)
    (folder / "euro.txt").write_text("to € her", encoding="utf-8")
    (folder / "letter.txt").write_text("a", encoding="utf-8")
    (folder / "file").write_text("not a folder")
    where = ("--workdir=runs/full", "--config.data.path=book.txt")
    answer = launch("train", *TINY, *where, cwd=folder)
    assert answer.returncode == 0, answer.stderr
    full = folder / "runs" / "full"
    copy_run(full, folder / "runs" / "whole", "data", {"val_fraction": 0.0})
    copy_run(full, folder / "runs" / "windows", "data", {"order": "windows"})
    prompts = json.dumps(list("thecount"))
    copy_run(full, folder / "runs" / "single", "sha256", {"prompts.json": _sha256(prompts)})
    (folder / "runs" / "single" / "prompts.json").write_text(prompts)
    return folder


TEXTS = [
    ("none.txt", "none.txt: no such file; give UTF-8 text in config.data.path"),
    ("folder", "folder: no .txt, .gz, .zst, .bz2, .xz in this folder; give"),
    ("folder/*.txt", "folder/*.txt: no file matches; give"),
    ("broken.txt.gz", "broken.txt.gz: cannot be decompressed|download or compress it again"),
    ("cut.txt.gz", "cut.txt.gz: cannot be decompressed (it ends too soon)"),
    ("cut.zst", "cut.zst: cannot be decompressed (it ends too soon)"),
    ("pipe", "pipe: not a regular file"),
    ("several", "several/b.txt: not UTF-8 (byte 0xe4 at offset 1)"),
    (
        "book.txt --config.data.document_separator=###",
        "document_separator='###': |book.txt",
    ),
    ("book.txt --config.data.min_count=999999", "1 distinct character(s)|min_count=999999"),
    ("empty.txt", "empty.txt: the text is empty; give"),
    ("blank.txt", "blank.txt: the text is empty; give"),
    ("one.txt", "the text has 1 distinct character(s)|give a text with at least 2"),
    ("latin1.txt", "latin1.txt: not UTF-8 (byte 0xe4 at offset 1)|iconv"),
    ("short.txt", "config.seq_len=32: the training text has 9 characters|longer text"),
    ("dots.txt --config.data.strip_punctuation", "dots.txt: the text is empty"),
    ("book.txt --config.batch_size=5000", "config.batch_size=5000: with config.seq_len=32|lower"),
    ("book.txt --config.data.val_fraction=0.0001", "too short to evaluate|val_fraction higher"),
    (
        "book.txt --config.model.recurrence=cudnn --config.model.multiplicative=False "
        "--config.model.recurrent_rms_norm=False",
        "needs an NVIDIA GPU|cpu|use fused",
    ),
    ("book.txt --config.model.hidden_size=9999999", "hidden_size=9999999|GiB of memory|lower"),
    ("book.txt --workdir=file", "file: cannot be read (Not a directory)|choose another --workdir"),
    ("book.txt --workdir=file/run", "file/run: cannot write there|choose another --workdir"),
]


@pytest.mark.parametrize(("flags", "messages"), TEXTS)
def test_a_text_or_a_place_of_no_use_is_one_line(flags, messages, ready, launch):
    words = f"--workdir=runs/new --config.data.path={flags}".split()
    before = snapshot(ready)
    check(launch("train", *TINY, *words, cwd=ready), messages, ready, before)


OTHERS = [
    ("--config.model.hidden_size=65", "model.hidden_size is 64 there and 65 here|--workdir"),
    ("--config.model.num_layers=2", "model.num_layers is 1 there and 2 here"),
    ("--config.seed=3", "seed is 0 there and 3 here"),
    ("--config.batch_size=4", "batch_size is 8 there and 4 here"),
    ("--config.optimizer.schedule=cosine", "schedule is 'linear' there and 'cosine' here"),
    ("--config.optimizer.learning_rate=0.5", "learning_rate is 0.008 there and 0.5 here"),
    ("--config.data.lowercase", "data.lowercase is False there and True here"),
    ("--config.data.min_count=2", "data.min_count is 1 there and 2 here"),
    ("--config.data.path=other.txt", "other.txt: |has changed|SHA-256|--workdir"),
]


@pytest.mark.parametrize(("flag", "messages"), OTHERS)
def test_a_run_of_other_settings_is_refused_with_what_differs(flag, messages, ready, launch):
    words = ["--workdir=runs/full", "--config.data.path=book.txt", flag]
    before = snapshot(ready)
    check(launch("train", *TINY, *words, cwd=ready), messages, ready, before)


def test_a_refused_run_comes_with_a_command_that_trains_elsewhere(ready, launch, tmp_path):
    shutil.copytree(ready / "runs", tmp_path / "runs")
    shutil.copy(ready / "other.txt", tmp_path)
    flags = [*TINY, "--config.data.path=other.txt"]
    refusal = launch("train", "--workdir=runs/full", *flags, cwd=tmp_path)
    assert refusal.returncode == 2
    # The same flags again but for the folder, after interpreter and script.
    command = shlex.split(refusal.stderr)[-len(flags) - 3 :]
    assert command[1].endswith("train.py")
    assert command[2:] == [*flags, "--workdir=runs/full-2"]
    answer = launch("train", *command[2:], cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "runs" / "full-2" / "config.json").exists()


READING = [
    ("sample", "--workdir=nowhere", "nowhere: no run there|there are|runs/full"),
    ("sample", "--workdir=file", "file: no run there"),
    ("sample", "--workdir=runs/full --prompt=to€her", "'€' (U+20AC) at position 2|unknown to drop"),
    ("sample", "--workdir=runs/full --prompt=€€ --unknown=drop", "no character that the model"),
    (
        "sample",
        "--workdir=runs/full --num_samples=9999999 --length=9999999",
        "--num_samples=9999999 --length=9999999: |GiB of memory|give less",
    ),
    ("sample", "--workdir=runs/full --length=2147483647", "--length=2147483647: takes at least"),
    ("sample", "--workdir=runs/full --prompt=so --method=window", "at least 32 characters|carry"),
    ("evaluate", "--workdir=nowhere", "nowhere: no run there"),
    ("evaluate", "--workdir=runs/full --text=none.txt", "none.txt: no such file; give --text=FILE"),
    (
        "evaluate",
        "--workdir=runs/full --text=folder",
        "folder: no .txt, .gz, .zst, .bz2, .xz in this folder; give --text=FILE",
    ),
    ("evaluate", "--workdir=runs/full --text=latin1.txt", "latin1.txt: not UTF-8"),
    ("evaluate", "--workdir=runs/full --text=euro.txt", "'€' (U+20AC) at position 3"),
    ("evaluate", "--workdir=runs/full --text=letter.txt", "a text of 1 character(s) is too short"),
    (
        "evaluate",
        "--workdir=runs/windows --dynamic",
        "runs/windows: was trained on windows|streams",
    ),
    ("evaluate", "--workdir=runs/single --dynamic", "texts: have 1 character|a longer seq_len"),
    (
        "evaluate",
        "--workdir=runs/full --dynamic --dynamic_rate=1e6",
        "--dynamic_rate=1000000.0|diverges|give a lower rate",
    ),
    ("sample", "--workdir=runs/full --adapt_to=none.txt", "none.txt: no such file|--adapt_to=FILE"),
    ("sample", "--workdir=runs/full --adapt_to=euro.txt", "'€' (U+20AC) at position 3"),
    (
        "sample",
        "--workdir=runs/full --adapt_to=letter.txt",
        "letter.txt: has one character",
    ),
    ("evaluate", "--workdir=runs/whole", "runs/whole: this run has no validation part|--text"),
]


@pytest.mark.parametrize(("launcher", "flags", "messages"), READING)
def test_a_mistake_in_reading_a_run_is_one_line(launcher, flags, messages, ready, launch):
    before = snapshot(ready)
    check(launch(launcher, *flags.split(), cwd=ready), messages, ready, before)


def edited(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


DAMAGES = {
    "config.json is cut off": (
        lambda run: (run / "config.json").write_text('{"schema": 2, "conf'),
        "config.json: missing or damaged",
    ),
    "config.json was edited": (
        lambda run: edited(run / "config.json", config={}),
        "config.json: its checksum differs|flags",
    ),
    "config.json is a list": (
        lambda run: (run / "config.json").write_text("[]"),
        "config.json: not the config.json of a run",
    ),
    "config.json is deep": (
        lambda run: (run / "config.json").write_text("[" * 100_000),
        "config.json: missing or damaged",
    ),
    "config.json holds a huge number": (
        lambda run: (run / "config.json").write_text('{"schema": 1' + "0" * 5000 + "}"),
        "config.json: missing or damaged",
    ),
    "the run is of another version": (
        lambda run: edited(run / "config.json", schema=99),
        "written by another version of charlstm|schema 99 there",
    ),
    "vocab.json is missing": (
        lambda run: (run / "vocab.json").unlink(),
        "vocab.json: missing or damaged (no such file)",
    ),
    "vocab.json has another letter": (
        lambda run: (run / "vocab.json").write_text((run / "vocab.json").read_text()[:-4] + 'z"]'),
        "vocab.json: its checksum differs",
    ),
    "prompts.json is empty": (
        lambda run: (run / "prompts.json").write_text(""),
        "prompts.json: missing or damaged",
    ),
    "vocab.json leads out": (
        lambda run: (
            (run / "vocab.json").unlink(),
            (run / "vocab.json").symlink_to("/etc/hostname"),
        ),
        "vocab.json: a link to /etc/hostname, out of the run folder",
    ),
    "a checkpoint leads out": (
        lambda run: (
            (run / "checkpoints" / "60").rename(run.parent / "elsewhere"),
            (run / "checkpoints" / "60").symlink_to(run.parent / "elsewhere"),
        ),
        "checkpoints/60: a link to|out of the run folder",
    ),
    "there is no checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        "no checkpoint yet; let it train on",
    ),
    "all checkpoints are damaged": (
        lambda run: [
            path.rename(path.with_name(f"damaged-{path.name}"))
            for path in list((run / "checkpoints").iterdir())
        ],
        "checkpoints are damaged|damaged-30, damaged-60",
    ),
    "a checkpoint's weights are gone": (
        lambda run: shutil.rmtree(run / "checkpoints" / "60" / "state"),
        "checkpoints/60/state: missing or damaged",
    ),
    "a checkpoint's loss was edited": (
        lambda run: edited(run / "checkpoints" / "60" / "metrics" / "metrics", loss=0.1),
        "checkpoints/60/metrics/metrics: missing or damaged|another loss",
    ),
    "a checkpoint's metadata were edited": (
        lambda run: edited(run / "checkpoints" / "60" / "metadata" / "metadata", loss=0.1),
        "checkpoints/60/metadata/metadata: missing or damaged|checksum",
    ),
    "a checkpoint is an empty folder": (
        lambda run: (run / "checkpoints" / "70").mkdir(),
        "checkpoints/70/metadata/metadata: missing or damaged",
    ),
}


# Both launchers load a run by the same function.
@pytest.mark.parametrize(
    ("launcher", "damage"),
    [(("sample", "evaluate")[number % 2], damage) for number, damage in enumerate(DAMAGES)],
)
def test_a_damaged_run_is_refused_and_the_file_named(launcher, damage, ready, launch, tmp_path):
    shutil.copytree(ready / "runs/full", tmp_path / "run")
    do_damage, messages = DAMAGES[damage]
    do_damage(tmp_path / "run")
    before = snapshot(tmp_path)
    answer = launch(launcher, "--workdir=run", "--checkpoint=latest", cwd=tmp_path)
    check(answer, messages, tmp_path, before)


@pytest.mark.parametrize(
    ("command", "remedy"),
    [("evaluate", "give --text=FILE"), ("sample --check", "bring it back, or leave out --check")],
)
def test_a_text_that_has_gone_or_changed_is_told(command, remedy, ready, launch, tmp_path):
    workdir = tmp_path / "runs" / "tiny-book"
    copy_run(ready / "runs" / "full", workdir, "text", {"source": str(tmp_path / "book.txt")})
    launcher, *flags = command.split()
    (tmp_path / "book.txt").write_text("Something else.")
    before = snapshot(tmp_path)
    answer = launch(launcher, "--workdir=runs/tiny-book", *flags, cwd=tmp_path)
    wanted = f"book.txt: has changed since the run was trained; {remedy}"
    check(answer, wanted, tmp_path, before)
    (tmp_path / "book.txt").unlink()
    before = snapshot(tmp_path)
    answer = launch(launcher, "--workdir=runs/tiny-book", *flags, cwd=tmp_path)
    check(answer, f"book.txt: no such file; {remedy}", tmp_path, before)
