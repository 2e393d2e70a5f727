"""The trials of sweep.py: texts cut, runs of train.py in processes, and what came of them."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from charlstm.cli import signals, streams
from charlstm.config import flatten
from charlstm.data.cleaning import END, Cleaning
from charlstm.data.corpus import TextStats, check_stats, collect_stats, log_cut, read_characters
from charlstm.data.sources import Source, find_source
from charlstm.errors import UserError, one_line

TRAIN = Path(streams.LAUNCH, "train.py")
UNREAD = 0.1  # the last part of a text, which no trial sees
VAL_FRACTION = 1 / 18  # of the rest, which is 5 % of the whole
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
# The exit codes of a run that a signal has stopped: before it can catch the signal, and after.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
STOPPED = [code for number in SIGNALS for code in (-number, 128 + number)]


class Text(NamedTuple):
    """A text whose first part is used by trials."""

    name: str  # with some of its hash: another content is another text
    source: Source
    stats: TextStats


class Trial(NamedTuple):
    """A run to be made, in a folder that its text, seed and settings name."""

    text: str
    seed: int
    settings: dict[str, Any]  # those that vary
    config: ConfigDict  # all, but for where the text lies

    @property
    def name(self) -> str:
        """A name that does not depend on the order of the settings."""
        about = json.dumps([self.text, self.seed, sorted(self.settings.items())])
        return f"{self.text}-{hashlib.sha256(about.encode()).hexdigest()[:10]}"


class Ended(NamedTuple):
    """A trial whose process has ended by itself."""

    trial: Trial
    code: int
    seconds: float | None  # of the whole command, if they can be compared with others'


class Running(NamedTuple):
    """A trial and its process."""

    trial: Trial
    process: subprocess.Popen[bytes]
    cores: set[int]
    begin: float | None  # None if its time is not meaningful

    def ended(self) -> Ended:
        """Return how it has ended just now."""
        seconds = None if self.begin is None else time.monotonic() - self.begin
        return Ended(self.trial, self.process.returncode, seconds)


def open_text(path: str, cleaning: Cleaning) -> Text:
    """Return the text that `path` means, read once.

    Raises:
      UserError: if it cannot be read.
    """
    remedy = "give UTF-8 text in --texts"
    source = find_source(path, remedy=remedy)
    stats = collect_stats(source, cleaning)
    check_stats(stats, source, cleaning, remedy)
    log_cut(source.path, stats.num_cut, int(stats.counts.sum()))
    stem = re.sub(r"\W+", "_", Path(source.path).name.split(".")[0])[:40] or "text"
    return Text(f"{stem}-{stats.sha256[:8]}", source, stats)


def first_part(chunks: Iterable[str], count: int) -> Iterator[str]:
    """Yield the first `count` characters of a text."""
    for chunk in chunks:
        if count <= 0:
            return
        yield chunk[:count]
        count -= len(chunk)


def write_first_part(text: Text, cleaning: Cleaning, path: Path) -> None:
    """Write a text without its last tenth as `path`, cleaned, unless it is there.

    It is cut where train.py would cut; to clean it once more, as train.py does, changes nothing.

    Raises:
      UserError: if the files change meanwhile.
    """
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    num_chars = int(text.stats.counts.sum())
    chunks = read_characters(text.source, cleaning, Counter(), lambda file, raw: None)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for chunk in first_part(chunks, num_chars - round(UNREAD * num_chars)):
            file.write(chunk.replace(END, cleaning.separator) if cleaning.separator else chunk)
    text.source.refuse_changed()
    temporary.replace(path)


def share_cores(jobs: int) -> list[set[int]]:
    """Return the cores of each of `jobs` trials at a time.

    Raises:
      UserError: if there is not one for each.
    """
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    if jobs > len(cores):
        raise UserError(f"--jobs={jobs}: there are {len(cores)} cores; give as many at most")
    return [set(cores[first::jobs]) for first in range(jobs)]


def run_trials(
    trials: Iterable[Trial],
    out: Path,
    shares: Sequence[set[int]],
    should_stop: Callable[[], bool],
    record: Callable[[Ended], None],
) -> bool:
    """Run each trial on one of the `shares` of the cores; return whether all came to their end.

    Args:
      trials: in order.
      out: the folder of the sweep.
      shares: as many as trials may run at a time.
      should_stop: asked often; once true, the runs save and end.
      record: called with each trial that has finished or failed.
    """
    waiting, free, running, is_stopped = deque(trials), list(shares), list[Running](), False
    try:
        while running or (waiting and not is_stopped):
            while waiting and free and not is_stopped:
                running.append(start(waiting.popleft(), out, free.pop(), is_alone=len(shares) == 1))
            time.sleep(POLL_SECONDS)
            ended = [run for run in running if run.process.poll() is not None]
            for run in ended:
                running.remove(run)
                free.append(run.cores)
                if run.process.returncode not in STOPPED:
                    record(run.ended())
            # Whoever has stopped one of them from outside means all.
            was_asked = should_stop() or any(run.process.returncode in STOPPED for run in ended)
            if was_asked and not is_stopped:
                is_stopped = True
                for run in running:
                    run.process.terminate()
    finally:
        for run in running:
            run.process.kill()
    return not is_stopped


def start(trial: Trial, out: Path, cores: set[int], is_alone: bool) -> Running:
    """Start or resume train.py for a trial."""
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
            # From a terminal Ctrl-C would come twice, which ends a run at once.
            start_new_session=True,
            preexec_fn=make_settle(cores),
        )
    signals.cleanups.append(process.kill)
    return Running(trial, process, cores, begin if is_timed else None)


def make_settle(cores: set[int]) -> Callable[[], None] | None:
    """Return what keeps a new process to `cores`, and ends it with this one; on Linux only."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def calibrate() -> None:
        os.sched_setaffinity(0, cores)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return calibrate


def text_path(out: Path, text: str) -> Path:
    """Return where the first part of a text lies."""
    return out.absolute() / "texts" / f"{text}.txt"


def run_folder(out: Path, trial: Trial) -> Path:
    """Return the run folder of a trial, while there is one."""
    return out / "runs" / trial.name


def log_path(out: Path, trial: Trial) -> Path:
    """Return the log file of a trial's train.py."""
    return out / "runs" / f"{trial.name}.log"


def outcome(ended: Ended, out: Path) -> dict[str, Any]:
    """Return what the table says of a trial beside its settings."""
    workdir = run_folder(out, ended.trial)
    row: dict[str, Any] = {"seconds": "" if ended.seconds is None else f"{ended.seconds:.1f}"}
    with suppress(OSError, ValueError, KeyError):
        about = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
        row["versions"] = " ".join(f"{name}={what}" for name, what in about["versions"].items())
    if ended.code:
        return row | {"status": f"failed: {_reason(ended.code, log_path(out, ended.trial))}"}
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return row | scores([json.loads(line) for line in lines])


def scores(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a run that has come to its end, from its metrics.jsonl."""
    scored = [record for record in records if "val/bits_per_char" in record]
    final = scored[-1]["val/bits_per_char"] if scored else None
    if final is None:
        return {"status": "failed: the last evaluation gave no finite figure"}
    figures = (record["val/bits_per_char"] for record in scored)
    return {
        "steps": scored[-1]["step"],
        "bits_per_char": final,
        "best_bits_per_char": min(figure for figure in figures if figure is not None),
        "status": "finished",
    }


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"ended by signal {-code}"
    last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
    return one_line(last.removeprefix(f"{TRAIN.name}: error: ")) if last else f"exit code {code}"


def tidy(trial: Trial, out: Path) -> None:
    """Leave of a finished trial its metrics.jsonl alone: a checkpoint takes megabytes."""
    workdir, kept = run_folder(out, trial), out / "metrics"
    kept.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):
        (workdir / "metrics.jsonl").replace(kept / f"{trial.name}.jsonl")
    shutil.rmtree(workdir, ignore_errors=True)
    log_path(out, trial).unlink(missing_ok=True)
