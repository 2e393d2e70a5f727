"""Mistakes of users: one line with the key, the value, the file and the remedy, exit code 2.

None of them creates or changes a file. The tables list the facts of each line, not its wording.
"""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from importlib import import_module

import launching
import pytest
import zstandard
from conftest import ROOT
from etils import epath
from helpers import untrained_run
from launching import TINY, WarmLauncher, command_of

from charlstm.errors import UserError
from charlstm.runs.checkpoints import load_model
from charlstm.runs.folder import _checksum, _sha256
from charlstm.training.setup import prepare


def snapshot(folder):
    """Return the names, links and contents of all files of a folder."""
    return {
        path.relative_to(folder): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def check(answer, facts, folder, before):
    """Check that a mistake is answered by one line with all `facts`, words of any sentence."""
    assert answer.returncode == 2, answer.stderr
    check_line(answer.stderr, facts)
    assert answer.stdout == ""
    assert snapshot(folder) == before


def check_raised(function, facts, folder):
    """Check the UserError of `function`, which a launcher prints as one line, in the same way."""
    before = snapshot(folder)
    with pytest.raises(UserError) as caught:
        function()
    check_line(str(caught.value), facts)
    assert snapshot(folder) == before


def check_line(line, facts):
    assert len(line.splitlines()) == 1, line
    for fact in facts.split():
        assert re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", line), (fact, line)


# --- the command line ---

COMMAND_LINE = [
    ("train", "--config=tuturial", "--config=tuturial tutorial"),
    ("train", "--config=", "--config= configs/ default"),
    ("train", "--config=none.py", "--config=none.py configs/"),
    ("train", "--config.batchsize=3", "config.batchsize batch_size"),
    ("train", "--config.hidden_size=3", "config.hidden_size model.hidden_size"),
    ("train", "--config.xyzzy=1", "config.xyzzy batch_size model.hidden_size"),
    ("train", "--config.model=1", "config.model model.input"),
    ("train", "--config.batch_size=1e3", "config.batch_size=1e3 number"),
    ("train", "--config.batch_size=", "config.batch_size= number"),
    ("train", "--config.batch_size", "config.batch_size= number"),
    ("train", "--config.batch_size=0", "config.batch_size=0 1"),
    ("train", "--config.data.lowercase=maybe", "config.data.lowercase=maybe true false"),
    ("train", "--config.data.order=random", "config.data.order=random streams windows"),
    ("train", "--config.model.num_layers=two", "config.model.num_layers=two number"),
    ("train", "--config.optimizer.learning_rate=nan", "config.optimizer.learning_rate=nan 0"),
    (
        "train",
        "--config.model.tie_embeddings",
        "config.model.tie_embeddings=True input=one_hot embed",
    ),
    (
        "train",
        "--config.model.recurrence=cudnn --config.data.document_separator=#",
        "config.model.recurrence=cudnn document_separator fused",
    ),
    (
        "train",
        "--config.optimizer.name=adam",
        "config.optimizer.weight_decay config.optimizer.name=adamw",
    ),
    ("train", "--wrokdir=x", "wrokdir workdir"),
    ("train", "--workdir", "workdir"),
    ("train", "--flagfile=flags.txt", "config.batch_size=0 1"),
    ("train", "--flagfile=none.txt", "none.txt"),
    ("train", "tiny", "tiny --help"),
    ("train", "--config.data.path=https://x/y.txt", "https://x/y.txt https:// curl"),
    ("train", "--workdir=file:///x", "file:///x file:// /x"),
    ("train", "--workdir=builtin", "--workdir=builtin --config.init_from=builtin"),
    ("train", "--workdir=~nobody-here/x", "~nobody-here/x ~nobody-here ./~nobody-here/x"),
    ("evaluate", "--text=https://x/y.txt", "https://x/y.txt https:// curl"),
    ("sample", "--adapt_to=az://x/y.txt", "az://x/y.txt az:// curl"),
    ("sample", "--prompt_file=gs://x/y.txt", "gs://x/y.txt local"),
    ("sweep", "--out=s3://x/y", "s3://x/y local"),
    ("sample", "--temprature=1", "temprature temperature"),
    ("sample", "--temperature=warm", "temperature warm"),
    ("sample", "--temperature=-1", "--temperature=-1.0 0"),
    ("sample", "--top_p=1.5", "--top_p=1.5 0 1"),
    ("sample", "--length=ten", "length ten"),
    ("sample", "--num_samples=100000000", "num_samples=100000000 10000000"),
    ("sample", "--checkpoint=worst", "checkpoint worst best latest"),
    ("sample", "--stream --num_samples=2", "--num_samples=2 --stream"),
    ("sample", "--stream --best_of=2", "--best_of=2 --stream"),
    ("sample", "--num_samples=3 --best_of=2", "--num_samples=3 --best_of"),
    ("sample", "--no_copy=10001", "no_copy 10001 10000"),
    ("sample", "--min_p=1.5", "--min_p=1.5 0 1"),
    ("sample", "--prompt=a --prompt_file=b", "--prompt --prompt_file"),
    ("sample", "--words=none.txt", "--words=none.txt --check"),
    ("sample", "--check --words=none.txt", "--words=none.txt UTF-8"),
    ("sample", "--prompt_file=none.txt", "--prompt_file=none.txt UTF-8"),
    ("sample", "--prompt_file=latin1.txt", "--prompt_file=latin1.txt UTF-8 iconv CP1252"),
    ("sample", "--prompt_file=/dev/zero", "--prompt_file=/dev/zero 67,108,864"),
    ("sample", "--prompt_file=.", "--prompt_file=. directory UTF-8"),
    ("sample", "--seed=4294967296", "seed=4294967296 4294967295"),
    ("evaluate", "--jsn", "jsn json"),
    ("evaluate", "--window=0", "window 0"),
    ("evaluate", "--dynamic --dynamic_rate=0", "--dynamic_rate=0.0 0"),
    ("evaluate", "--dynamic --dynamic_rate=1e39", "--dynamic_rate=1e+39 float32"),
    ("evaluate", "--dynamic_rate=1", "--dynamic_rate=1.0 --dynamic"),
    ("evaluate", "--window=99999", "window 99999"),
    ("evaluate", "--compare=runs/a --dynamic", "--dynamic --compare"),
    ("evaluate", "--compare=runs/a --window=64", "--window --compare"),
    ("compress", "", "0 FILE --help"),
    ("compress", "latin1.txt empty.txt", "2 FILE --help"),
    ("compress", "none.txt", "none.txt"),
    ("compress", ".", "file"),
    ("compress", "latin1.txt --out=empty.txt", "empty.txt --out --overwrite"),
    ("compress", "latin1.txt --out=none/x", "none/x folder --out"),
    ("compress", "latin1.txt --decompress", "latin1.txt .clstm --out"),
    ("score", "book.txt --by=page", "by page word"),
    ("score", "--format=html book.txt", "--format=html --out"),
    ("score", "--format=html --out=page.html --rank book.txt", "--rank --format"),
    ("score", "--format=tsv book.txt --rankd", "rankd rank"),
    ("bench", "--what=stepp", "--what=stepp step"),
    ("bench", "--shapes=32x50", "--shapes=32x50 BxTxH"),
    ("plan", "--minutes=0", "--minutes=0.0 0"),
    ("bench", "--what=quality --minutes=1e308", "--minutes=1e+308 0 525,600"),
    ("plan", "--minutes=ten", "minutes ten"),
    ("plan", "--minutes=2 --seconds=0", "--seconds=0 --minutes"),
    ("plan", "--config.init_from=runs/full", "config.init_from=runs/full config.model"),
    ("plan", "--seconds=-1", "seconds -1"),
    ("plan", "--chips=v5e", "--chips=v5e NAME:NUMBER v5e:256 v4"),
    ("plan", "--chips=v5e:0", "--chips=v5e:0 NAME:NUMBER"),
    ("plan", "--chips=v5e:17", "--chips=v5e:17 config.batch_size=8"),
    ("scaling", "--chip=v9", "chip v9 v5e"),
    ("scaling", "--devices=0", "devices 0"),
    ("scaling", "--devices=3", "--devices=3 64"),
    ("scaling", "--out=latin1.txt/x", "--out=latin1.txt/x --out"),
    ("train", "--config=broken.py", "broken.py SyntaxError get_config()"),
    ("train", "--config=empty.py", "empty.py AttributeError get_config()"),
    ("train", "--config=unknown.py", "config.hiden_size model.hidden_size"),
    ("train", "--config=wrong.py", "config.batch_size=None int"),
    ("serve", "--port=70000", "--port=70000 65535"),
    ("serve", "--host=", "--host= address"),
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
    """Return launch(launcher, *flags, cwd=...) for processes that exit if they import JAX."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "jax.py").write_text("raise SystemExit('JAX was imported')")
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    warm = WarmLauncher(*launching.WITHOUT_JAX, env=environment)
    yield warm
    warm.close()


@pytest.mark.parametrize(("launcher", "flags", "facts"), COMMAND_LINE)
def test_flag_mistake_is_one_line_before_jax_is_imported(
    launcher, flags, facts, tmp_path, launch_without_jax
):
    (tmp_path / "latin1.txt").write_bytes("Käse".encode("latin1"))
    (tmp_path / "empty.txt").touch()
    for name, content in CONFIG_FILES.items():
        (tmp_path / name).write_text(content)
    before = snapshot(tmp_path)
    check(launch_without_jax(launcher, *flags.split(), cwd=tmp_path), facts, tmp_path, before)


@pytest.mark.parametrize("flag", ["--config.batch_size=0", "--temprature=1"])
def test_debug_shows_the_traceback_of_a_mistake(flag, tmp_path):
    command = command_of("train", flag, "--debug")
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2
    assert answer.stderr.startswith("Traceback")
    assert flag.removeprefix("--").split("=")[0] in answer.stderr.splitlines()[-1]


# --- texts, prompts and run folders ---


@pytest.fixture(scope="module")
def launch():
    """Return launch(launcher, *flags, cwd=...)."""
    warm = WarmLauncher(*launching.TRAINING, "charlstm.evaluation.sample_check")
    yield warm
    warm.close()


def copy_run(run, target, section, changes):
    """Copy a run, change a section of its config.json and update the checksum."""
    shutil.copytree(run, target)
    about = json.loads((target / "config.json").read_text())
    del about["checksum"]
    (about if section in about else about["config"])[section].update(changes)
    about["checksum"] = _checksum(about)
    (target / "config.json").write_text(json.dumps(about))


# Without native.cc, which the first process compiles, and says so.
FLAGS = [*TINY, "--config.model.recurrence=fused"]


def config_of_flags(text):
    """Return the config that FLAGS describe."""
    config = import_module("configs.tiny").get_config()
    config.update({"num_steps": 60, "eval_every_steps": 30})
    config.optimizer.name, config.model.recurrence = "adamw", "fused"
    config.data.path = str(text)
    return config


@pytest.fixture(scope="module")
def ready(tmp_path_factory, book):
    """Return a folder with texts, and with finished runs of made-up weights in runs/."""
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
    full = folder / "runs" / "full"
    untrained_run(config_of_flags(folder / "book.txt"), full, steps=(30, 60))
    copy_run(full, folder / "runs" / "whole", "data", {"val_fraction": 0.0})
    copy_run(full, folder / "runs" / "windows", "data", {"order": "windows"})
    prompts = json.dumps(list("thecount"))
    copy_run(full, folder / "runs" / "single", "sha256", {"prompts.json": _sha256(prompts)})
    (folder / "runs" / "single" / "prompts.json").write_text(prompts)
    return folder


TEXTS = [
    ("none.txt", "none.txt config.data.path"),
    ("folder", "folder .txt .gz .zst .bz2 .xz config.data.path"),
    ("folder/*.txt", "folder/*.txt config.data.path"),
    ("broken.txt.gz", "broken.txt.gz"),
    ("cut.txt.gz", "cut.txt.gz"),
    ("cut.zst", "cut.zst"),
    ("pipe", "pipe"),
    ("several", "several/b.txt UTF-8 0xe4 1"),
    ("book.txt --config.data.document_separator=###", "document_separator='###' book.txt"),
    ("book.txt --config.data.min_count=999999", "1 2 min_count=999999"),
    ("empty.txt", "empty.txt empty"),
    ("blank.txt", "blank.txt empty"),
    ("one.txt", "1 2"),
    ("latin1.txt", "latin1.txt UTF-8 0xe4 1 iconv"),
    ("short.txt", "config.seq_len=32 9"),
    ("dots.txt --config.data.strip_punctuation", "dots.txt empty"),
    ("book.txt --config.batch_size=5000", "config.batch_size=5000 config.seq_len=32"),
    ("book.txt --config.data.val_fraction=0.0001", "val_fraction"),
    (
        "book.txt --config.model.recurrence=cudnn --config.model.multiplicative=False "
        "--config.model.recurrent_rms_norm=False",
        "GPU cpu fused",
    ),
    ("book.txt --config.model.hidden_size=9999999", "hidden_size=9999999 GiB"),
    ("book.txt --workdir=file", "file folder --workdir"),
    ("book.txt --workdir=file/run", "file/run --workdir"),
    ("book.txt --config.init_from=none", "config.init_from=none config.json launch/train.py"),
    ("book.txt --config.init_from=runs/full --workdir=runs/full", "runs/full itself --workdir"),
    # A flag that repeats a default is not replaced by the setting of the other run, 64.
    (
        "book.txt --config=default --config.init_from=runs/full --config.model.hidden_size=384",
        "config.model.hidden_size=384 config.model.hidden_size=64 config.init_from=runs/full",
    ),
    (
        "book.txt --config=default --config.init_from=runs/full --config.model.norm_epsilon=0.2",
        "config.model.norm_epsilon=0.2 config.model.norm_epsilon=0.1 config.init_from=runs/full",
    ),
]


@pytest.mark.parametrize(("flags", "facts"), TEXTS)
def test_unusable_text_or_workdir_is_one_line(flags, facts, ready, launch):
    words = f"--workdir=runs/new --config.data.path={flags}".split()
    before = snapshot(ready)
    check(launch("train", *FLAGS, *words, cwd=ready), facts, ready, before)


OTHERS = [
    ({"model.hidden_size": 65}, "model.hidden_size 64 65 --workdir"),
    ({"model.num_layers": 2}, "model.num_layers 1 2 --workdir"),
    ({"seed": 3}, "seed 0 3 --workdir"),
    ({"batch_size": 16}, "batch_size 8 16 --workdir"),
    ({"optimizer.schedule": "cosine"}, "optimizer.schedule linear cosine --workdir"),
    ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate 0.008 0.5 --workdir"),
    ({"data.lowercase": True}, "data.lowercase False True --workdir"),
    ({"data.min_count": 2}, "data.min_count 1 2 --workdir"),
    ({"data.path": "other.txt"}, "other.txt SHA-256 --workdir"),
]


@pytest.mark.parametrize(("changes", "facts"), OTHERS)
def test_resume_with_other_settings_names_what_differs(changes, facts, ready):
    config = config_of_flags("book.txt")
    config.update_from_flattened_dict(changes)
    config.data.path = str(ready / config.data.path)
    check_raised(lambda: prepare(config, epath.Path(ready / "runs/full")), facts, ready)


def test_refused_resume_proposes_a_command_that_works(ready, launch, tmp_path):
    shutil.copytree(ready / "runs", tmp_path / "runs")
    shutil.copy(ready / "other.txt", tmp_path)
    flags = [*FLAGS, "--config.data.path=other.txt"]
    refusal = launch("train", "--workdir=runs/full", *flags, cwd=tmp_path)
    assert refusal.returncode == 2
    # The same flags again but for the folder, after interpreter and script.
    command = shlex.split(refusal.stderr)[-len(flags) - 3 :]
    assert command[1].endswith("train.py")
    assert command[2:] == [*flags, "--workdir=runs/full-2"]
    out = tmp_path / "out"
    out.touch()
    process = launch.start("train", *command[2:], cwd=tmp_path, out=out)
    try:
        deadline = time.monotonic() + 60
        while "steps: 0 of 60 done" not in out.read_text():
            assert time.monotonic() < deadline, out.read_text()
            assert process.poll() is None, out.read_text()
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


READING = [
    ("sample", "--workdir=nowhere", "nowhere runs/full"),
    ("sample", "--workdir=file", "file runs/full"),
    ("sample", "--workdir=runs/full --prompt=to€her", "'€' U+20AC 2 unknown drop"),
    ("sample", "--workdir=runs/full --prompt=€€ --unknown=drop", "prompt"),
    (
        "sample",
        "--workdir=runs/full --num_samples=9999999 --length=9999999",
        "--num_samples=9999999 --length=9999999 GiB",
    ),
    ("sample", "--workdir=runs/full --stop=a€", "--stop=a€ '€' U+20AC"),
    ("sample", "--workdir=runs/full --length=2147483647", "--length=2147483647 GiB"),
    ("sample", "--workdir=runs/full --prompt=so --method=window", "32 carry"),
    ("evaluate", "--workdir=nowhere", "nowhere runs/full"),
    ("evaluate", "--workdir=runs/full --compare=runs/full,nowhere", "nowhere runs/full"),
    ("evaluate", "--workdir=runs/full --text=none.txt", "none.txt --text"),
    ("evaluate", "--workdir=runs/full --text=folder", "folder .txt .gz .zst .bz2 .xz --text"),
    ("evaluate", "--workdir=runs/full --text=latin1.txt", "latin1.txt UTF-8 iconv"),
    ("evaluate", "--workdir=runs/full --text=euro.txt", "'€' U+20AC 3 unknown drop"),
    ("evaluate", "--workdir=runs/full --text=letter.txt", "1 2"),
    ("evaluate", "--workdir=runs/windows --dynamic", "runs/windows windows streams"),
    ("evaluate", "--workdir=runs/single --dynamic", "1 seq_len"),
    ("sample", "--workdir=runs/full --adapt_to=none.txt", "none.txt --adapt_to"),
    ("sample", "--workdir=runs/full --adapt_to=euro.txt", "'€' U+20AC 3"),
    ("sample", "--workdir=runs/full --adapt_to=letter.txt", "letter.txt"),
    ("evaluate", "--workdir=runs/whole", "runs/whole --text"),
    ("compress", "book.txt --workdir=nowhere", "nowhere runs/full"),
    ("compress", "book.txt --decompress --workdir=runs/full --out=new.txt", "book.txt compress"),
    ("score", "book.txt --workdir=nowhere", "nowhere runs/full"),
    ("score", "book.txt none.txt --workdir=runs/full", "none.txt"),
    ("score", "folder --workdir=runs/full", "folder .txt .gz .zst .bz2 .xz"),
    ("score", "pipe --workdir=runs/full", "pipe"),
    ("score", "--workdir=runs/full --format=json -- euro.txt", "euro.txt '€' U+20AC 3 drop"),
    ("score", "empty.txt --workdir=runs/full --format=tsv", "empty.txt 0 2"),
    ("score", "--workdir=runs/full", "- 0 2"),
    ("score", "book.txt --workdir=runs/full --out=other.txt", "other.txt --out"),
    ("score", "book.txt --workdir=runs/full --out=other.txt --format=html", "other.txt --out"),
    ("score", "letter.txt --workdir=runs/full --out=new.txt", "letter.txt 1 2"),
    ("score", "book.txt --workdir=runs/full --out=folder/none/new.txt", "new.txt --out"),
]


@pytest.mark.parametrize(("launcher", "flags", "facts"), READING)
def test_unusable_run_prompt_or_text_is_one_line(launcher, flags, facts, ready, launch):
    before = snapshot(ready)
    check(launch(launcher, *flags.split(), cwd=ready), facts, ready, before)


def edited(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


DAMAGES = {
    "config.json is cut off": (
        lambda run: (run / "config.json").write_text('{"schema": 2, "conf'),
        "config.json",
    ),
    "config.json was edited": (
        lambda run: edited(run / "config.json", config={}),
        "config.json checksum flags",
    ),
    "config.json is a list": (
        lambda run: (run / "config.json").write_text("[]"),
        "config.json",
    ),
    "config.json is deep": (
        lambda run: (run / "config.json").write_text("[" * 100_000),
        "config.json",
    ),
    "config.json holds a huge number": (
        lambda run: (run / "config.json").write_text('{"schema": 1' + "0" * 5000 + "}"),
        "config.json",
    ),
    "the run is of another version": (
        lambda run: edited(run / "config.json", schema=99),
        "version schema 99 1 --workdir",
    ),
    "vocab.json is missing": (
        lambda run: (run / "vocab.json").unlink(),
        "vocab.json",
    ),
    "vocab.json has another letter": (
        lambda run: (run / "vocab.json").write_text((run / "vocab.json").read_text()[:-4] + 'z"]'),
        "vocab.json checksum",
    ),
    "prompts.json is empty": (
        lambda run: (run / "prompts.json").write_text(""),
        "prompts.json",
    ),
    "vocab.json leads out": (
        lambda run: (
            (run / "vocab.json").unlink(),
            (run / "vocab.json").symlink_to("/etc/hostname"),
        ),
        "vocab.json link /etc/hostname",
    ),
    "a checkpoint leads out": (
        lambda run: (
            (run / "checkpoints" / "60").rename(run.parent / "elsewhere"),
            (run / "checkpoints" / "60").symlink_to(run.parent / "elsewhere"),
        ),
        "checkpoints/60 link elsewhere",
    ),
    "there is no checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        "run checkpoint",
    ),
    "all checkpoints are damaged": (
        lambda run: [
            path.rename(path.with_name(f"damaged-{path.name}"))
            for path in list((run / "checkpoints").iterdir())
        ],
        "damaged-30 damaged-60",
    ),
    "a checkpoint's weights are gone": (
        lambda run: shutil.rmtree(run / "checkpoints" / "60" / "state"),
        "checkpoints/60/state",
    ),
    "a checkpoint's loss was edited": (
        lambda run: edited(run / "checkpoints" / "60" / "metrics" / "metrics", loss=0.1),
        "checkpoints/60/metrics/metrics loss",
    ),
    "a checkpoint's metadata were edited": (
        lambda run: edited(run / "checkpoints" / "60" / "metadata" / "metadata", loss=0.1),
        "checkpoints/60/metadata/metadata checksum",
    ),
    "a checkpoint is an empty folder": (
        lambda run: (run / "checkpoints" / "70").mkdir(),
        "checkpoints/70/metadata/metadata",
    ),
}


# All launchers load a run by this function.
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_run_is_refused_with_the_name_of_the_file(damage, ready, tmp_path):
    shutil.copytree(ready / "runs/full", tmp_path / "run")
    do_damage, facts = DAMAGES[damage]
    do_damage(tmp_path / "run")
    check_raised(lambda: load_model(tmp_path / "run", "latest"), facts, tmp_path)


@pytest.mark.parametrize(
    ("command", "remedy"),
    [("evaluate", "--text"), ("sample --check", "--check"), ("sample --no_copy=9", "--no_copy=9")],
)
def test_missing_or_changed_text_is_one_line_with_a_remedy(
    command, remedy, ready, launch, tmp_path
):
    workdir = tmp_path / "runs" / "tiny-book"
    copy_run(ready / "runs" / "full", workdir, "text", {"source": str(tmp_path / "book.txt")})
    launcher, *flags = command.split()
    (tmp_path / "book.txt").write_text("Something else.")
    before = snapshot(tmp_path)
    answer = launch(launcher, "--workdir=runs/tiny-book", *flags, cwd=tmp_path)
    check(answer, f"book.txt changed {remedy}", tmp_path, before)
    (tmp_path / "book.txt").unlink()
    before = snapshot(tmp_path)
    answer = launch(launcher, "--workdir=runs/tiny-book", *flags, cwd=tmp_path)
    check(answer, f"book.txt {remedy}", tmp_path, before)
