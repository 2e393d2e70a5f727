"""Faults that a run survives: kills, signals, full disks, lost folders, a second trainer."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import jax
import numpy as np
import optax
import pytest
from etils import epath
from helpers import abstract_state_of, assert_equal, assert_stopped, records_of
from launching import TRAINING, WarmLauncher, command_of, run_command

from charlstm.files import lock_folder
from charlstm.model import CharLSTM
from charlstm.runs.checkpoints import Checkpoints, load_model, steps_in
from charlstm.runs.checksums import checksums
from charlstm.runs.folder import load_run
from charlstm.steps import init_state

FLAGS = [
    "--config=tiny",
    "--config.num_steps=60",
    "--config.log_every_steps=5",
    "--config.eval_every_steps=20",
    "--config.checkpoint_every_steps=10",
    "--config.sample.length=40",
    # One compiled program for any number of steps, and a plain model: that of test_processes.py.
    "--config.optimizer.learning_rate=2e-3",
    "--config.optimizer.name=adamw",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup_steps=10",
    "--config.model.recurrent_rms_norm=false",
    "--config.model.multiplicative=false",
    "--config.data.path=book.txt",
]
POINTS = "mid_save:10 after_commit:20 before_log:35 torn_log:35 after_log:35 mid_delete:50".split()
ENDLESS = [*FLAGS, "--config.num_steps=1000000"]
TOGETHER = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def last_state(workdir):
    """Return the leaves of the latest state of a run."""
    run = load_run(epath.Path(workdir))
    with closing(Checkpoints(run.workdir, read_only=True)) as checkpoints:
        state, _ = checkpoints.restore(checkpoints.latest_step(), abstract_state_of(run))
    return jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))


def best_weights(workdir):
    return jax.tree.leaves(load_model(workdir, "best")[2])


def assert_same_run(workdir, reference):
    """Assert that two runs ended with the same bits and files."""
    for leaves_of in (last_state, best_weights):
        assert_equal(leaves_of(workdir), leaves_of(reference))
    assert records_of(workdir) == records_of(reference)
    # After a kill right after a save, older checkpoints remain.
    steps = steps_in(reference / "checkpoints")
    assert set(steps_in(workdir / "checkpoints")) >= set(steps)
    for name in ("samples.txt", "vocab.json", "prompts.json"):
        assert (workdir / name).read_bytes() == (reference / name).read_bytes()
    names = {path.name for path in [*workdir.iterdir(), *(workdir / "checkpoints").iterdir()]}
    assert not {name for name in names if "tmp" in name or "trash" in name or "damaged" in name}


@pytest.fixture(scope="module")
def launch():
    """Return a WarmLauncher of launch/train.py."""
    with closing(WarmLauncher(*TRAINING)) as launch:
        yield launch


@pytest.fixture(scope="module")
def reference(launch, tmp_path_factory, book):
    """Return the folder of an undisturbed run, next to its text."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "book.txt").write_text(book, encoding="utf-8")
    answer = launch("train", *FLAGS, "--workdir=reference", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return folder / "reference"


def test_run_killed_at_each_point_ends_with_the_same_bits(launch, reference, tmp_path):
    flags = [*FLAGS, f"--workdir={tmp_path}/run"]
    for point in POINTS:
        killed = launch("../tests/killed_at", point, *flags, cwd=reference.parent)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    result = launch("train", *flags, cwd=reference.parent)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_runs_killed_at_random_times_end_with_the_same_bits(reference, tmp_path):
    # Saves take most of the time, so that most kills happen during one.
    flags = [*FLAGS, "--config.num_steps=150", "--config.checkpoint_every_steps=5"]
    flags += ["--config.eval_every_steps=50"]
    undisturbed = run_command("train", *flags, "--workdir=long", cwd=reference.parent)
    assert undisturbed.returncode == 0, undisturbed.stderr
    chooser = random.Random(0)
    kills = resumes = torn = lost_steps = finished = 0
    while kills < 100:
        workdir = tmp_path / f"run{finished}"
        command = command_of("train", *flags, f"--workdir={workdir}")
        with subprocess.Popen(command, cwd=reference.parent, **TOGETHER) as process:
            has_started = threading.Event()
            watcher = threading.Thread(target=watch, args=(process, has_started))
            watcher.start()
            if chooser.random() < 0.8:
                has_started.wait(timeout=60)
                time.sleep(chooser.uniform(0, 4))
            else:
                time.sleep(chooser.uniform(0, 6))
            process.kill()
            watcher.join()
        code = process.returncode
        assert code in (0, -signal.SIGKILL)
        if code == -signal.SIGKILL:
            records = records_of(workdir)
            steps = steps_in(workdir / "checkpoints")
            kills += 1
            resumes += bool(steps)
            torn += bool(list(workdir.glob("**/*tmp*")) + list(workdir.glob("**/trash")))
            lost_steps += max(0, (records[-1]["step"] if records else 0) - max(steps, default=0))
        else:
            result = run_command("train", *flags, f"--workdir={workdir}", cwd=reference.parent)
            assert result.returncode == 0, result.stderr
            assert_same_run(workdir, reference.parent / "long")
            finished += 1
    print(f"{kills} kills, {resumes} with a checkpoint to resume from, {torn} during a write;")
    print(f"{lost_steps} logged steps repeated; {finished} runs finished with the same bits")
    assert resumes > 50
    assert torn > 5
    assert finished > 3


def watch(process, has_started):
    for line in process.stdout:
        if line.startswith("step "):
            has_started.set()


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends_the_run(number, launch, reference, tmp_path):
    flags = [*ENDLESS, f"--workdir={tmp_path}/run"]
    out = tmp_path / "out"
    out.touch()
    process = launch.start("train", *flags, cwd=reference.parent, out=out)
    if number == signal.SIGTERM:
        wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    else:
        # Compilation comes next.
        wait_for(lambda: re.search("^steps: ", out.read_text(), re.MULTILINE))
    process.send_signal(number)
    code = process.wait(timeout=60)
    output = out.read_text()
    assert code == 128 + number, output
    assert_stopped(tmp_path / "run", output)
    # Its process group must be empty.
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_signal_interrupts_an_evaluation(launch, reference, tmp_path, book):
    # A long evaluation, after five steps.
    (tmp_path / "long.txt").write_text(book * 300, encoding="utf-8")
    flags = [*FLAGS, "--config.data.path=long.txt", "--config.data.val_fraction=0.9"]
    flags += ["--config.eval_every_steps=5", "--workdir=run"]
    process = launch.start("train", *flags, cwd=tmp_path, out=tmp_path / "out")
    wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    process.send_signal(signal.SIGHUP)  # as from a closed terminal
    assert process.wait(timeout=30) == 128 + signal.SIGHUP
    assert steps_in(tmp_path / "run" / "checkpoints") == [5]
    assert [record["step"] for record in records_of(tmp_path / "run")] == [5]
    assert "val/loss" not in records_of(tmp_path / "run")[0]


def test_full_disk_is_an_error_and_keeps_the_checkpoint(launch, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    before = load_model(tmp_path / "run", "latest")[2]
    flags = [*ENDLESS, f"--workdir={tmp_path}/run"]
    flags += ["--config.eval_every_steps=1000000", "--config.checkpoint_every_steps=10000"]
    err = tmp_path / "err"
    process = launch.start("train", *flags, cwd=reference.parent, out=os.devnull, err=err)
    wait_for(lambda: records_of(tmp_path / "run")[-1]["step"] > 60)
    # A limit on file sizes that metrics.jsonl does not reach, but a checkpoint does.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    errors = err.read_text()
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert "could not be saved" in last
    assert "is kept" in last
    after = load_model(tmp_path / "run", "latest")[2]
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_vanished_run_folder_is_an_error(launch, reference, tmp_path):
    flags = [*ENDLESS, f"--workdir={tmp_path}/run"]
    err = tmp_path / "err"
    process = launch.start("train", *flags, cwd=reference.parent, out=os.devnull, err=err)
    wait_for(lambda: steps_in(epath.Path(tmp_path / "run" / "checkpoints")))
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    code = process.wait(timeout=60)
    errors = err.read_text()
    assert code == 1, errors
    assert "Traceback" not in errors
    assert "error: " in errors.splitlines()[-1]
    # The renamed folder is a run like any other.
    assert load_model(tmp_path / "elsewhere", "latest")[0].config.num_steps == 1000000


def test_second_trainer_is_refused_and_readers_are_not(launch, reference, tmp_path):
    flags = [*ENDLESS, f"--workdir={tmp_path}/run"]
    flags += ["--config.checkpoint_every_steps=1", "--config.eval_every_steps=4"]
    folder = epath.Path(tmp_path / "run" / "checkpoints")
    process = launch.start("train", *flags, cwd=reference.parent, out=os.devnull)
    try:
        wait_for(lambda: steps_in(folder))
        second = launch("train", *flags, cwd=reference.parent)
        assert second.returncode == 2
        assert f"run: in use by process {process.pid} on " in second.stderr
        assert len(second.stderr.splitlines()) == 1
        first = steps_in(folder)[-1]
        num_loads = 0
        # Checkpoints of both kinds are replaced while they are read.
        while num_loads < 6 or steps_in(folder)[-1] < first + 5:
            load_model(tmp_path / "run", ("best", "latest")[num_loads % 2])
            num_loads += 1
        assert num_loads < 100
    finally:
        process.kill()
        process.wait()
    # The lock ends with its process.
    with lock_folder(epath.Path(tmp_path / "run")):
        pass


def test_initial_weights_do_not_depend_on_blas_threads(cheaply):
    # Large enough that the factorization uses several threads.
    settings = {"vocab_size": 70, "hidden_size": 256, "num_layers": 1}
    program = (
        "from charlstm.cli import runtime\n"
        "runtime.prepare()\n"
        "import jax, optax\n"
        "from charlstm import CharLSTM, init_state\n"
        "from charlstm.runs.checksums import checksums\n"
        f"model = CharLSTM(**{settings})\n"
        "print(checksums(init_state(model, optax.sgd(1.0), jax.random.key(0), 1)))"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    # This process has one thread.
    state = init_state(CharLSTM(**settings), optax.sgd(1.0), jax.random.key(0), 1)
    assert answer.stdout == f"{checksums(state)}\n", answer.stderr
