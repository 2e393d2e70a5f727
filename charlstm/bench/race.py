"""Contenders of bench.py side by side: repeats in turn, so that all see the same machine."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from charlstm.bench.cases import Case, most_memory
from charlstm.cli import signals, streams
from charlstm.errors import RunError


class Timing(NamedTuple):
    """What one contender took for one case."""

    seconds: tuple[float, ...]  # of one call, by round
    peak_bytes: int
    value: float
    given: str


class Worker:
    """The process of one contender."""

    def __init__(self, name: str, **variables: str):
        """Start it, with `variables` in its environment."""
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")
        environment = {"KERAS_BACKEND": "jax"} | os.environ | variables
        if name in ("torch", "keras"):
            # Our launchers set them for themselves; a peer has what its users have.
            environment.pop("OPENBLAS_NUM_THREADS", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "charlstm.bench.worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        signals.cleanups.append(self._process.kill)

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        self.send(what, **arguments)
        return self.answer()

    def send(self, what: str, **arguments: Any) -> None:
        """Send a request."""
        assert self._process.stdin
        try:
            print(json.dumps({"do": what} | arguments), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the missing answer is reported with the reason

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to what was sent."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            last = last_line(self._errors) or f"exit code {code}"
            raise RunError(f"the contender {self._name} failed: {last}; see --peers")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def start_workers(names: Iterable[str]) -> dict[str, Worker]:
    """Start a process for each contender, and wait until all have imported what they need."""
    started = {name: Worker(name) for name in names}
    for worker in started.values():
        worker.send("ready")
    for worker in started.values():
        worker.answer()
    return started


def race(
    contenders: Mapping[str, Worker], case: Case, repeats: int, repeat_seconds: float
) -> dict[str, Timing]:
    """Return what each contender takes for `case`, measured in turn.

    Args:
      contenders: their processes.
      case: what to do.
      repeats: how many rounds.
      repeat_seconds: how long a contender works in each round, at least once.
    """
    for worker in contenders.values():
        worker.send("build", **case._asdict())
    made = {name: worker.answer() for name, worker in contenders.items()}
    # Together until here, where nothing is measured; from here on one at a time.
    settled = {
        name: worker.ask("calibrate", repeat_seconds=repeat_seconds)
        for name, worker in contenders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(repeats):
        for name in order:
            seconds[name].append(contenders[name].ask("time")["seconds"])
        # The last contender goes first, so that none always follows the same one.
        order.reverse()
    return {
        name: Timing(
            tuple(seconds[name]),
            worker.ask("peak")["peak_bytes"],
            made[name]["value"],
            made[name]["given"] + settled[name]["given"],
        )
        for name, worker in contenders.items()
    }


def last_line(log: IO[str]) -> str:
    """Return the last line of what was written to `log`, '' if nothing was."""
    log.seek(0)
    return (log.read().strip().splitlines() or [""])[-1]


def refuse_failure(code: int, log: IO[str], ends: Sequence[int] = ()) -> None:
    """Raise RunError, quoting the `log`, if launch/train.py ended with neither 0 nor `ends`."""
    if code not in (0, *ends):
        raise RunError(f"launch/train.py ended with {code}: {last_line(log)}")


class Command(NamedTuple):
    """What a run of launch/train.py took."""

    seconds: float  # from the command to its end
    first_line_seconds: float  # from the command to the first line of metrics.jsonl
    first_line_step: int  # the step that this line is of
    peak_bytes: int


def run_training(flags: Sequence[str], folder: Path, cache: str, to_the_end: bool) -> Command:
    """Run launch/train.py in a new run folder, to its end or until its first step is logged.

    Args:
      flags: --config.KEY=VALUE.
      folder: where the run folder is made.
      cache: the name in `folder` of the cache where compilations are kept.
      to_the_end: otherwise every step is logged, and it is killed once the first one is.
    """
    if not to_the_end:
        flags = [*flags, "--config.log_every_steps=1"]
    workdir = Path(tempfile.mkdtemp(dir=folder))
    environment = os.environ | {"CHARLSTM_CACHE": str(folder / cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would come first
    command = [sys.executable, f"{streams.LAUNCH}/train.py", f"--workdir={workdir}", *flags]
    metrics, first_line_seconds = workdir / "metrics.jsonl", math.nan
    with open(workdir.with_suffix(".log"), "w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        signals.cleanups.append(process.kill)
        ended = 0
        while not ended:
            if math.isnan(first_line_seconds) and metrics.exists():
                first_line_seconds = time.perf_counter() - start
                if not to_the_end:
                    process.kill()
            time.sleep(0.002 if math.isnan(first_line_seconds) else 0.02)
            # Unlike Popen's methods, wait4 returns the memory of this process.
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        refuse_failure(process.returncode, log, () if to_the_end else (-signal.SIGKILL,))
        if math.isnan(first_line_seconds):
            first_line_seconds = seconds  # this process got no turn before the other one's end
        first_line = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
    return Command(seconds, first_line_seconds, first_line["step"], most_memory(usage))
