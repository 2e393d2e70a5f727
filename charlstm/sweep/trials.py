"""Trials of a sweep: training runs, each a process of launch/train.py."""

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from charlstm.cli import signals, streams
from charlstm.config import flatten
from charlstm.errors import UserError, one_line

TRAIN = Path(streams.LAUNCH, "train.py")
FINISHED = "finished"  # the status of a trial that has not failed
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
# A signal ends a run with the first code before train.py handles it, and with the second after.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
STOPPED = [code for number in SIGNALS for code in (-number, 128 + number)]


class Trial(NamedTuple):
    """A training run with one combination of settings, one text and one seed."""

    text: str  # its name
    seed: int
    settings: dict[str, Any]  # those that vary
    config: ConfigDict  # all settings but data.path

    @property
    def name(self) -> str:
        """An identifier that does not depend on the order of the settings."""
        about = json.dumps([self.text, self.seed, sorted(self.settings.items())])
        return f"{self.text}-{hashlib.sha256(about.encode()).hexdigest()[:10]}"


class TrialExit(NamedTuple):
    """The end of a trial's process that no signal has stopped."""

    trial: Trial
    code: int
    seconds: float | None  # of the whole command; None if not comparable with other trials


class RunningTrial(NamedTuple):
    """A trial and its process."""

    trial: Trial
    process: subprocess.Popen[bytes]
    cores: set[int]
    start: float | None  # None if its time is not comparable

    def exit(self) -> TrialExit:
        """Return how its process, which has just ended, has ended."""
        seconds = None if self.start is None else time.monotonic() - self.start
        return TrialExit(self.trial, self.process.returncode, seconds)


def share_cores(jobs: int) -> list[set[int]]:
    """Return disjoint sets of cores for `jobs` trials at a time.

    Raises:
      UserError: if there is not a core for each.
    """
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    if not 1 <= jobs <= len(cores):
        raise UserError(f"--jobs={jobs}: must be from 1 to {len(cores)}, the number of cores")
    return [set(cores[first::jobs]) for first in range(jobs)]


def run_trials(
    trials: Iterable[Trial],
    out: Path,
    core_sets: Sequence[set[int]],
    should_stop: Callable[[], bool],
    record: Callable[[TrialExit], None],
) -> bool:
    """Run each trial on one of `core_sets`; return whether none was stopped.

    Args:
      trials: in the order in which they start.
      out: the folder of the sweep.
      core_sets: one for each trial that may run at the same time.
      should_stop: called every POLL_SECONDS. Once it returns true, running trials save and exit.
      record: called with each trial that has finished or failed.
    """
    is_alone = len(core_sets) == 1
    waiting, free, running = deque(trials), list(core_sets), list[RunningTrial]()
    is_stopped = should_stop()
    try:
        while running or (waiting and not is_stopped):
            while waiting and free and not is_stopped:
                running.append(start(waiting.popleft(), out, free.pop(), is_alone))
            time.sleep(POLL_SECONDS)
            ended = [run for run in running if run.process.poll() is not None]
            for run in ended:
                running.remove(run)
                free.append(run.cores)
                if run.process.returncode not in STOPPED:
                    record(run.exit())
            # A signal that stops one trial from outside stops the sweep.
            is_stopping = should_stop() or any(run.process.returncode in STOPPED for run in ended)
            if is_stopping and not is_stopped:
                is_stopped = True
                for run in running:
                    run.process.terminate()
    finally:
        for run in running:
            run.process.kill()
    return not is_stopped


def start(trial: Trial, out: Path, cores: set[int], is_alone: bool) -> RunningTrial:
    """Start or resume train.py for a trial, which is timed if it is new and runs alone."""
    workdir = run_folder(out, trial)
    workdir.parent.mkdir(exist_ok=True)
    is_timed = is_alone and not workdir.exists()
    config = flatten(trial.config) | {"data.path": text_path(out, trial.text)}
    words = [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in config.items())]
    begin = time.monotonic()
    with open(log_path(out, trial), "ab") as log:
        process = subprocess.Popen(
            [sys.executable, TRAIN, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Otherwise a terminal would send Ctrl-C too, and a second signal ends a run unsaved.
            start_new_session=True,
            preexec_fn=make_preexec(cores),
        )
    signals.cleanups.append(process.kill)
    return RunningTrial(trial, process, cores, begin if is_timed else None)


def make_preexec(cores: set[int]) -> Callable[[], None] | None:
    """Return a function that binds a new process to `cores` and kills it when its parent ends.

    None except on Linux.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def preexec() -> None:
        os.sched_setaffinity(0, cores)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return preexec


def text_path(out: Path, text: str) -> Path:
    """Return the path of the text that trials read."""
    return out.absolute() / "texts" / f"{text}.txt"


def run_folder(out: Path, trial: Trial) -> Path:
    """Return the run folder of a trial, deleted once the trial is finished."""
    return out / "runs" / trial.name


def log_path(out: Path, trial: Trial) -> Path:
    """Return the file for the output of a trial's train.py."""
    return out / "runs" / f"{trial.name}.log"


def read_outcome(ended: TrialExit, out: Path) -> dict[str, Any]:
    """Return the columns of a trial in trials.tsv that its run decides."""
    workdir = run_folder(out, ended.trial)
    row: dict[str, Any] = {"seconds": "" if ended.seconds is None else f"{ended.seconds:.1f}"}
    with suppress(OSError, ValueError, KeyError):
        about = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        row["versions"] = " ".join(f"{name}={what}" for name, what in about["versions"].items())
    if ended.code:
        return row | {"status": f"failed: {_reason(ended.code, log_path(out, ended.trial))}"}
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return row | final_metrics([json.loads(line) for line in lines])


def final_metrics(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return steps, bits per character and status from the metrics.jsonl of a finished run."""
    evaluated = [record for record in records if "val/bits_per_char" in record]
    final = evaluated[-1]["val/bits_per_char"] if evaluated else None
    if final is None:
        return {"status": "failed: the last validation loss is not finite"}
    values = (record["val/bits_per_char"] for record in evaluated)
    return {
        "steps": evaluated[-1]["step"],
        "bits_per_char": final,
        "best_bits_per_char": min(value for value in values if value is not None),
        "status": FINISHED,
    }


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"ended by signal {-code}"
    last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
    return one_line(last.removeprefix(f"{TRAIN.name}: error: ")) if last else f"exit code {code}"


def delete_run(trial: Trial, out: Path) -> None:
    """Move metrics.jsonl of a finished trial to metrics/, and delete its checkpoints and log."""
    workdir, metrics = run_folder(out, trial), out / "metrics"
    metrics.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):
        (workdir / "metrics.jsonl").replace(metrics / f"{trial.name}.jsonl")
    shutil.rmtree(workdir, ignore_errors=True)
    log_path(out, trial).unlink(missing_ok=True)
