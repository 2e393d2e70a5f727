"""The progress of a run: counters, running means, records and console."""

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
from charlstm.runs.metrics import RunLog, bits, evaluations_since_best, sample_after_prompt
from charlstm.steps import Metrics
from charlstm.system.console import TrainingBar, launcher_command
from charlstm.training.setup import Setup

logger = logging.getLogger(__name__)

# Consecutive nonfinite steps that cause a rollback.
MAX_NONFINITE_STEPS = 5
CLOCK_TICK = time.get_clock_info("monotonic").resolution  # two readings may be equal


@dataclass
class Mean:
    """A running mean over characters."""

    total: float = 0.0
    count: float = 0.0

    def add(self, value: float, count: float) -> None:
        """Add `count` characters whose mean is `value`."""
        self.total += value * count
        self.count += count

    @property
    def value(self) -> float:
        """The mean; nan if there are no characters."""
        return self.total / self.count if self.count else math.nan


@dataclass
class Counters:
    """Counters of a run, saved as metadata of each checkpoint so that a resume is exact."""

    seconds: float = 0.0
    since_log: Mean = field(default_factory=Mean)
    since_eval: Mean = field(default_factory=Mean)
    grad_norm: float | None = None  # of the last step that was not skipped
    skipped: int = 0  # steps whose loss, gradient or new parameters were not finite
    nonfinite_steps: int = 0  # consecutive skipped steps up to now
    rollbacks: int = 0

    @property
    def needs_evaluation(self) -> bool:
        """Whether steps have been taken since the last evaluation."""
        return self.since_eval.count > 0

    @classmethod
    def from_json(cls, counters: dict[str, Any]) -> "Counters":
        """Return the counters that asdict() made a dict of.

        Raises:
          DamagedError: if `counters` is not such a dict.
        """

        def mean(name: str) -> Mean:
            return Mean(float(counters[name]["total"]), float(counters[name]["count"]))

        try:
            norm = counters["grad_norm"]
            return cls(
                seconds=float(counters["seconds"]),
                since_log=mean("since_log"),
                since_eval=mean("since_eval"),
                grad_norm=None if norm is None else float(norm),
                skipped=int(counters["skipped"]),
                nonfinite_steps=int(counters["nonfinite_steps"]),
                rollbacks=int(counters["rollbacks"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DamagedError(
                f"the counters of a checkpoint are missing or damaged: {error}"
            ) from error


@dataclass
class Stopwatch:
    """Characters trained since a start time that is moved to exclude other work."""

    start: float
    chars: float = 0.0

    def chars_per_second(self, now: float) -> float:
        """Return the mean speed up to `now`."""
        return self.chars / max(now - self.start, CLOCK_TICK)


class DivergedError(Exception):
    """MAX_NONFINITE_STEPS consecutive steps were nonfinite; the message names the last one."""

    def __init__(self, message: str, rollbacks: int):
        super().__init__(message)
        self.rollbacks = rollbacks
        """The rollbacks before this error."""


class Progress:
    """The logger of a training run; process 0 writes.

    It reads the metrics of a call when the next call runs, so that the device never waits.
    """

    def __init__(self, setup: Setup, step: int, counters: Counters):
        """Open the records of the run after `step` steps."""
        self._setup = setup
        title, is_first = setup.run.workdir.name, processes.is_first()
        self._log = RunLog(setup.run.workdir, step, title, read_only=not is_first)
        self._bar = TrainingBar(setup.num_steps, step, is_hidden=not is_first)
        self.counters = counters
        self.seconds_per_step = math.inf
        """The time of a step in the last call that was read; inf before the first one."""
        self.has_stalled = has_stalled(setup, self._log.records)
        """Whether config.patience ends the training after the last evaluation."""
        self._pending: tuple[int, int, Metrics] | None = None
        self._pushed_at: float | None = None
        now = time.monotonic()
        self._since_log, self._since_eval = Stopwatch(now), Stopwatch(now)
        self._eval_speed = 0.0
        self._start = now - counters.seconds

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()
        self._log.close()

    def push(self, step: int, count: int, metrics: Metrics) -> None:
        """Add the metrics of the `count` steps up to `step`; read those of the call before.

        Raises:
          DivergedError: if too many consecutive steps were nonfinite; so do all methods that read.
        """
        num_read = self._read()
        now = time.monotonic()
        if self._pushed_at is None:  # the first call has compiled
            self._since_log.start = self._since_eval.start = now
        elif num_read:
            self.seconds_per_step = (now - self._pushed_at) / num_read
        self._pushed_at = now
        self._pending = (step, count, metrics)
        self._bar.advance(count)

    def log_training(self, step: int, schedule: Callable[[int], Any]) -> None:
        """Write and show the means since the last training record."""
        self._read()
        mean, self.counters.since_log = self.counters.since_log, Mean()
        speed = self._since_log.chars_per_second(time.monotonic())
        with self._clock_stopped():
            self._since_log = Stopwatch(time.monotonic())
            record = self._new_record(step) | {
                "chars_per_second": speed,
                # The optimizer does not count skipped steps.
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

    def log_evaluation(self, step: int, metrics: dict[str, Any]) -> float:
        """Write, draw and print the metrics of an evaluation; return the loss for checkpoints.

        That loss is val/loss, or, without validation text, the mean training loss since the last
        evaluation.
        """
        self._read()
        mean, self.counters.since_eval = self.counters.since_eval, Mean()
        record = self._new_record(step) | {"train/mean_loss": mean.value} | metrics
        loss = record.get("val/loss", mean.value)
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None  # JSON has no nan
        self._log.write(record)
        for line in describe_evaluation(record, self._eval_speed):
            logger.info(line)
        self._log.draw()
        self.has_stalled = has_stalled(self._setup, self._log.records)
        return loss

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Show that an evaluation runs, and exclude its time from the characters per second."""
        self._read()  # waits for the steps before the evaluation
        self._eval_speed = self._since_eval.chars_per_second(time.monotonic())
        with self._bar.status("evaluating"), self._clock_stopped():
            self._since_eval = Stopwatch(time.monotonic())
            yield

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - start
            self._since_log.start += elapsed
            self._since_eval.start += elapsed

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Return the counters after all steps, as a dict for JSON."""
        self._read()
        self.counters.seconds = self._seconds()
        return asdict(self.counters)

    def log_end(self, step: int) -> None:
        """Log the best validation, the time of `step` steps, and the command that writes text."""
        if step < (num_steps := self._setup.num_steps):
            reason = f"config.patience={self._setup.run.config.patience} evaluations"
            logger.info(
                "stopped early, at step %d of %d: no lower validation loss in %s",
                *(step, num_steps, reason),
            )
        scored = [record for record in self._log.records if record.get("val/loss") is not None]
        if scored:
            best = min(scored, key=lambda record: record["val/loss"])
            value, best_step = best["val/bits_per_char"], best["step"]
            logger.info("best validation: %.4f bits/char, at step %d", value, best_step)
        logger.info("trained %d steps in %.0f s", step, self._seconds())
        command = launcher_command("sample", f"--workdir={self._setup.run.workdir}")
        logger.info("to write more: %s", command)

    def _read(self) -> int:
        """Read the pending metrics; return the number of their steps."""
        if self._pending is None:
            return 0
        last, count, metrics = self._pending
        self._pending = None
        names = ("loss", "grad_norm", "count", "skipped")
        columns = [np.asarray(metrics[name])[:count].tolist() for name in names]
        for step, *values in zip(range(last - count + 1, last + 1), *columns, strict=True):
            loss, grad_norm, num_chars, is_skipped = values
            if is_skipped:
                self._count_skipped(step, loss, grad_norm)
                continue
            self.counters.nonfinite_steps = 0
            self.counters.grad_norm = grad_norm
            self.counters.since_log.add(loss, num_chars)
            self.counters.since_eval.add(loss, num_chars)
            self._since_log.chars += num_chars
            self._since_eval.chars += num_chars
        return count

    def _count_skipped(self, step: int, loss: float, grad_norm: float) -> None:
        self.counters.skipped += 1
        self.counters.nonfinite_steps += 1
        problem = f"step {step}: the loss is {loss} and the norm of the gradient {grad_norm}"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            problem += ", but the new parameters are not finite"
        if self.counters.nonfinite_steps == MAX_NONFINITE_STEPS:
            raise DivergedError(problem, self.counters.rollbacks)
        logger.warning("%s: step skipped", problem)

    def _new_record(self, step: int) -> dict[str, Any]:
        epoch = step / self._setup.batches.steps_per_epoch
        return {"step": step, "epoch": epoch, "seconds": self._seconds()}

    def _seconds(self) -> float:
        return time.monotonic() - self._start


def has_stalled(setup: Setup, records: list[dict[str, Any]]) -> bool:
    """Return whether the last config.patience evaluations had no lower validation loss.

    All processes return the same, even if one of them reads an older metrics.jsonl.
    """
    patience = setup.run.config.patience
    return 0 < patience <= processes.min_over_processes(evaluations_since_best(records))


def describe_evaluation(record: dict[str, Any], chars_per_second: float) -> Iterator[str]:
    """Yield the lines to print for an evaluation record: its metrics, and its sample."""
    losses = {
        "training": None if record["train/mean_loss"] is None else bits(record["train/mean_loss"]),
        "validation": record.get("val/bits_per_char"),
    }
    parts = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
    if parts:
        parts[-1] += " bits/char"
    if chars_per_second:
        parts.append(f"{chars_per_second:,.0f} chars/s")
    parts.append(f"{record['seconds']:.0f} s")
    yield f"step {record['step']}: {', '.join(parts)}"
    if "sample" in record:
        text = textwrap.indent(sample_after_prompt(record), "    ", lambda line: True)
        yield f"sample at step {record['step']}, its prompt in brackets:\n\n{text}\n"
