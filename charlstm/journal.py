"""What a run keeps and tells while it trains: means, seconds, metrics, checkpoints, the screen."""

import logging
import math
import shlex
import time
from dataclasses import asdict, dataclass
from typing import Any

from charlstm.checkpoint import Checkpoints
from charlstm.errors import RunError
from charlstm.job import Job
from charlstm.log import RunLog, TrainingBar, bits
from charlstm.steps import Metrics, TrainState

logger = logging.getLogger(__name__)

# Long beside what a call costs, short beside what a person at Ctrl-C waits gladly.
CALL_SECONDS = 0.25


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


class Journal:
    """The record of one run; its notes go into each checkpoint, so that a resume is exact.

    Metrics are read one call late, so that the device never waits for the host.
    """

    def __init__(self, job: Job, checkpoints: Checkpoints, step: int, notes: dict[str, Any]):
        """Open the journal of a run that stands at `step`, with the notes of its checkpoint."""
        self._job = job
        self._checkpoints = checkpoints
        self._log = RunLog(job.run.workdir, step, title=job.run.workdir.name)
        self._bar = TrainingBar(job.num_steps, step)
        self._since_log = Mean(**notes.get("since_log", {}))
        self._since_eval = Mean(**notes.get("since_eval", {}))
        self._pending: tuple[int, int, Metrics] | None = None
        self._grad_norm = math.nan
        self._seconds_per_step = math.inf
        self._pushed = 0.0
        self._lap_start = time.monotonic()
        self._start = self._lap_start - notes.get("seconds", 0.0)

    def __enter__(self) -> "Journal":
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()
        self._log.close()

    def push(self, step: int, count: int, metrics: Metrics) -> None:
        """Take the metrics of the `count` steps up to `step`, and read those of the call before."""
        num_read = self._read()
        now = time.monotonic()
        if num_read:
            self._seconds_per_step = (now - self._pushed) / num_read
        self._pushed = now
        self._pending = (step, count, metrics)
        self._bar.advance(count)

    @property
    def fitting_count(self) -> int:
        """How many steps one call should take, so that whoever waits for its end waits little."""
        return max(1, int(CALL_SECONDS / self._seconds_per_step))

    def log_training(self, step: int, learning_rate: float) -> None:
        """Write the means since the last such line, and show them."""
        self._read()
        mean, self._since_log = self._since_log, Mean()
        record = self._stamp(step) | {
            "train/loss": mean.value,
            "train/bits_per_char": bits(mean.value),
            "chars_per_second": mean.count / self._lap(),
            "learning_rate": learning_rate,
            "grad_norm": self._grad_norm,
        }
        self._log.write(record)
        self._bar.show(record)

    def log_evaluation(self, state: TrainState, figures: dict[str, Any]) -> None:
        """Write and show an evaluation's `figures`, and save the state it was made with.

        The best state is the one with the lowest val/loss, or, for a run without a validation
        part, with the lowest mean training loss since the evaluation before, as in the tutorial.
        """
        self._read()
        step = int(state.step)
        mean, self._since_eval = self._since_eval, Mean()
        record = self._stamp(step) | {"train/mean_loss": mean.value} | figures
        self.save(state, record.get("val/loss", mean.value))
        self._log.write(record)
        self._log.draw()
        if "val/bits_per_char" in record:
            logger.info("step %d: validation %.4f bits/char", step, record["val/bits_per_char"])
        logger.info("a sample at step %d:\n%s\n", step, record["sample"])
        self._lap()

    def save(self, state: TrainState, loss: float | None = None) -> None:
        """Save a checkpoint, once the metrics of all its steps are known to be finite."""
        self._read()
        notes = {
            "seconds": self._seconds(),
            "since_log": asdict(self._since_log),
            "since_eval": asdict(self._since_eval),
        }
        self._checkpoints.save(state, notes, loss)

    def report_end(self) -> None:
        """Tell the best figure, the time, and what to do next."""
        scored = [record for record in self._log.records if "val/loss" in record]
        if scored:
            best = min(scored, key=lambda record: record["val/loss"])
            figure = best["val/bits_per_char"]
            logger.info("best validation: %.4f bits/char, at step %d", figure, best["step"])
        logger.info("trained %d steps in %.0f s", self._job.num_steps, self._seconds())
        workdir = shlex.quote(str(self._job.run.workdir))
        logger.info("to write more: python launch/sample.py --workdir=%s", workdir)

    def _read(self) -> int:
        """Take in the metrics that wait, and return of how many steps they are."""
        if self._pending is None:
            return 0
        last, count, metrics = self._pending
        self._pending = None
        columns = [metrics[name][:count].tolist() for name in ("loss", "grad_norm", "count")]
        for step, *figures in zip(range(last - count + 1, last + 1), *columns, strict=True):
            loss, self._grad_norm, num_chars = figures
            if not (math.isfinite(loss) and math.isfinite(self._grad_norm)):
                raise RunError(
                    f"step {step}: the loss is {loss} and the gradient's norm {self._grad_norm}; "
                    "the last checkpoint is kept; start anew with a lower "
                    "config.optimizer.learning_rate"
                )
            self._since_log.add(loss, num_chars)
            self._since_eval.add(loss, num_chars)
        return count

    def _stamp(self, step: int) -> dict[str, Any]:
        epoch = step / self._job.batches.steps_per_epoch
        return {"step": step, "epoch": epoch, "seconds": self._seconds()}

    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _lap(self) -> float:
        now = time.monotonic()
        lap, self._lap_start = now - self._lap_start, now
        return lap
