"""Progress of a run: running means, metrics, checkpoints, console."""

import logging
import math
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from charlstm.errors import DamagedError
from charlstm.parallel import processes
from charlstm.runs.checkpoints import Checkpoints
from charlstm.runs.metrics import RunLog, bits, sample_after_prompt
from charlstm.steps import Metrics, TrainState
from charlstm.system.console import TrainingBar, launcher_command
from charlstm.training.setup import Setup

logger = logging.getLogger(__name__)

# Consecutive nonfinite steps that cause a rollback.
MAX_NONFINITE_STEPS = 5
# Target duration of a compiled call: amortizes dispatch, and keeps Ctrl-C responsive.
CALL_SECONDS = 0.25
CLOCK_TICK = time.get_clock_info("monotonic").resolution  # two readings may be equal


@dataclass
class Mean:
    """A running mean over counted characters."""

    total: float = 0.0
    count: float = 0.0

    def add(self, value: float, count: float) -> None:
        """Add `count` characters of mean `value`."""
        self.total += value * count
        self.count += count

    @property
    def value(self) -> float:
        """The mean, nan of nothing."""
        return self.total / self.count if self.count else math.nan


@dataclass
class Counters:
    """Counters of a run, saved with each checkpoint so that a resume is exact."""

    seconds: float = 0.0
    since_log: Mean = field(default_factory=Mean)
    since_eval: Mean = field(default_factory=Mean)
    grad_norm: float | None = None  # of the last step that was not skipped
    skipped: int = 0  # nonfinite steps: loss, gradient or new parameters
    nonfinite_steps: int = 0  # consecutive nonfinite steps up to now
    rollbacks: int = 0  # rollbacks

    @property
    def has_unscored_steps(self) -> bool:
        """Whether steps have been taken since the last evaluation."""
        return self.since_eval.count > 0

    @classmethod
    def from_json(cls, counters: dict[str, Any]) -> "Counters":
        """Return what asdict() gave.

        Raises:
          DamagedError: if `counters` are something else.
        """
        try:
            since_log, since_eval = (
                Mean(float(counters[name]["total"]), float(counters[name]["count"]))
                for name in ("since_log", "since_eval")
            )
            norm = counters["grad_norm"]
            grad_norm = None if norm is None else float(norm)
            skipped, nonfinite_steps, rollbacks = (
                int(counters[name]) for name in ("skipped", "nonfinite_steps", "rollbacks")
            )
            seconds = float(counters["seconds"])
            return cls(
                seconds, since_log, since_eval, grad_norm, skipped, nonfinite_steps, rollbacks
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DamagedError(f"the counters of a checkpoint are not ours: {error}") from error


@dataclass
class Lap:
    """Characters trained since a start time that excludes other work."""

    start: float
    chars: float = 0.0

    def rate(self, now: float) -> float:
        """Return the characters per second up to `now`."""
        return self.chars / max(now - self.start, CLOCK_TICK)


class DivergedError(Exception):
    """MAX_NONFINITE_STEPS consecutive steps were nonfinite; the message names the last."""

    def __init__(self, message: str, rollbacks: int):
        super().__init__(message)
        self.rollbacks = rollbacks
        """Rollbacks before."""


class Progress:
    """The progress of one run. Process 0 writes it.

    Metrics are read one call late, so that the device never waits for the host.
    """

    def __init__(self, setup: Setup, checkpoints: Checkpoints, step: int, counters: Counters):
        """Start at `step`, with the counters of its checkpoint."""
        self._job = setup
        self._checkpoints = checkpoints
        title, is_first = setup.run.workdir.name, processes.is_first()
        self._log = RunLog(setup.run.workdir, step, title, read_only=not is_first)
        self._bar = TrainingBar(setup.num_steps, step, is_hidden=not is_first)
        self.counters = counters
        self._pending: tuple[int, int, Metrics] | None = None
        self._seconds_per_step = math.inf
        self._pushed: float | None = None
        now = time.monotonic()
        self._log_lap, self._eval_lap, self._eval_rate = Lap(now), Lap(now), 0.0
        self._start = now - counters.seconds

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()
        self._log.close()

    def push(self, step: int, count: int, metrics: Metrics) -> None:
        """Take the metrics of the `count` steps up to `step`, and read those of the call before."""
        num_read = self._read()
        now = time.monotonic()
        if self._pushed is None:  # the first call has compiled
            self._log_lap.start = self._eval_lap.start = now
        elif num_read:
            self._seconds_per_step = (now - self._pushed) / num_read
        self._pushed = now
        self._pending = (step, count, metrics)
        self._bar.advance(count)

    @property
    def steps_per_call(self) -> int:
        """How many steps one call should take, short enough to wait for."""
        return processes.least(max(1, int(CALL_SECONDS / max(self._seconds_per_step, CLOCK_TICK))))

    def log_training(self, step: int, schedule: Callable[[int], Any]) -> None:
        """Write the means since the last such line, and show them."""
        self._read()
        mean, self.counters.since_log = self.counters.since_log, Mean()
        rate = self._log_lap.rate(time.monotonic())
        with self._pausing():
            self._log_lap = Lap(time.monotonic())
            self._write_training(step, mean, rate, schedule)

    def _write_training(
        self, step: int, mean: Mean, rate: float, schedule: Callable[[int], Any]
    ) -> None:
        record = self._stamp(step) | {
            "chars_per_second": rate,
            # The optimizer does not count steps that were left out.
            "learning_rate": float(schedule(step - 1 - self.counters.skipped)),
            "skipped_steps": self.counters.skipped,
        }
        if mean.count:
            record |= {
                "train/loss": mean.value,
                "train/bits_per_char": bits(mean.value),
                "grad_norm": self.counters.grad_norm,
            }
        self._log.write(record)
        self._bar.show(record)

    def log_evaluation(self, state: TrainState, figures: dict[str, Any]) -> None:
        """Write and print an evaluation's `figures`, and save the state it was made with.

        The best state is the one with the lowest val/loss, or, for a run without a validation
        part, with the lowest mean training loss since the evaluation before, as in the tutorial.
        """
        self._read()
        step = int(state.step)
        mean, self.counters.since_eval = self.counters.since_eval, Mean()
        record = self._stamp(step) | {"train/mean_loss": mean.value} | figures
        loss = record.get("val/loss", mean.value)
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None  # JSON has no word for it
        # The state comes after it: after a crash between them, a resume does all of this again.
        self._log.write(record)
        for line in describe_evaluation(record, self._eval_rate):
            logger.info(line)
        self.save(state, loss)
        self._log.draw()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Show that an evaluation runs, and leave its time out of the characters per second."""
        self._read()  # the steps before it have come to their end
        self._eval_rate = self._eval_lap.rate(time.monotonic())
        with self._bar.status("evaluating"), self._pausing():
            self._eval_lap = Lap(time.monotonic())
            yield

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - begin
            self._log_lap.start += elapsed
            self._eval_lap.start += elapsed

    def save(self, state: TrainState, loss: float | None = None) -> None:
        """Save a checkpoint, once the metrics of all its steps are known."""
        self._read()
        self.counters.seconds = self._seconds()
        self._checkpoints.save(state, asdict(self.counters), loss)

    def report_end(self) -> None:
        """Tell the best figure, the time, and what to do next."""
        scored = [record for record in self._log.records if record.get("val/loss") is not None]
        if scored:
            best = min(scored, key=lambda record: record["val/loss"])
            figure = best["val/bits_per_char"]
            logger.info("best validation: %.4f bits/char, at step %d", figure, best["step"])
        logger.info("trained %d steps in %.0f s", self._job.num_steps, self._seconds())
        command = launcher_command("sample", f"--workdir={self._job.run.workdir}")
        logger.info("to write more: %s", command)

    def _read(self) -> int:
        """Take in the metrics that wait, and return of how many steps they are."""
        if self._pending is None:
            return 0
        last, count, metrics = self._pending
        self._pending = None
        names = ("loss", "grad_norm", "count", "skipped")
        columns = [np.asarray(metrics[name])[:count].tolist() for name in names]
        for step, *figures in zip(range(last - count + 1, last + 1), *columns, strict=True):
            loss, grad_norm, num_chars, is_skipped = figures
            if is_skipped:
                self._count_skipped(step, loss, grad_norm)
                continue
            self.counters.nonfinite_steps = 0
            self.counters.grad_norm = grad_norm
            self.counters.since_log.add(loss, num_chars)
            self.counters.since_eval.add(loss, num_chars)
            self._log_lap.chars += num_chars
            self._eval_lap.chars += num_chars
        return count

    def _count_skipped(self, step: int, loss: float, grad_norm: float) -> None:
        self.counters.skipped += 1
        self.counters.nonfinite_steps += 1
        problem = f"step {step}: the loss is {loss} and the gradient's norm {grad_norm}"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            problem += ", but the new parameters are not finite"
        if self.counters.nonfinite_steps == MAX_NONFINITE_STEPS:
            raise DivergedError(problem, self.counters.rollbacks)
        logger.warning("%s: step skipped", problem)

    def _stamp(self, step: int) -> dict[str, Any]:
        epoch = step / self._job.batches.steps_per_epoch
        return {"step": step, "epoch": epoch, "seconds": self._seconds()}

    def _seconds(self) -> float:
        return time.monotonic() - self._start


def describe_evaluation(record: dict[str, Any], chars_per_second: float) -> Iterator[str]:
    """Yield the lines that stay on the screen: the figures of an evaluation and its sample."""
    found = {
        "training": None if record["train/mean_loss"] is None else bits(record["train/mean_loss"]),
        "validation": record.get("val/bits_per_char"),
    }
    parts = [f"{name} {value:.4f}" for name, value in found.items() if value is not None]
    if parts:
        parts[-1] += " bits/char"
    if chars_per_second:
        parts.append(f"{chars_per_second:,.0f} chars/s")
    parts.append(f"{record['seconds']:.0f} s")
    yield f"step {record['step']}: {', '.join(parts)}"
    if "sample" in record:
        text = textwrap.indent(sample_after_prompt(record), "    ", lambda line: True)
        yield f"sample at step {record['step']}, its prompt in brackets:\n\n{text}\n"
