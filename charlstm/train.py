"""The training loop: everything with an effect on disk, screen or clock, around the pure steps."""

import logging
import math
import shlex
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from charlstm.checkpoint import (
    Checkpoints,
    Run,
    check_same_config,
    create_run,
    load_run,
    random_prompts,
)
from charlstm.config import validate
from charlstm.data import Streams, Windows, evaluation_batches, split, training_batches
from charlstm.errors import RunError, UserError
from charlstm.log import RunLog, TrainingBar, bits
from charlstm.model import CharLSTM, model_from_config, zero_carry
from charlstm.optim import make_optimizer, make_schedule
from charlstm.sample import make_sampler
from charlstm.steps import (
    Metrics,
    TrainState,
    evaluate,
    init_state,
    make_eval_step,
    make_train_step,
)
from charlstm.text import Text, Vocab, load_text

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """A run with its text read and its length known."""

    run: Run
    batches: Streams | Windows
    val_batches: Streams | Windows | None
    num_steps: int


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
class Tally:
    """What the host remembers of the steps so far; saved with the state, so that resume is exact.

    Metrics are read one step late, so that the device never waits for the host.
    """

    seconds: float = 0.0
    since_log: Mean = field(default_factory=Mean)
    since_eval: Mean = field(default_factory=Mean)
    _pending: tuple[int, Metrics] | None = None

    @classmethod
    def from_notes(cls, notes: dict[str, Any]) -> "Tally":
        """Return the tally that notes() described."""
        return cls(notes["seconds"], Mean(**notes["since_log"]), Mean(**notes["since_eval"]))

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON."""
        return {
            "seconds": self.seconds,
            "since_log": asdict(self.since_log),
            "since_eval": asdict(self.since_eval),
        }

    def push(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of `step`, and read those of the step before."""
        self.read()
        self._pending = (step, metrics)

    def read(self) -> float:
        """Read what is pending and return its gradient norm.

        Raises:
          RunError: if its loss or gradient is not finite.
        """
        if self._pending is None:
            return math.nan
        step, metrics = self._pending
        self._pending = None
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"step {step}: the loss is {loss} and the gradient's norm {norm}; the last "
                "checkpoint is kept; start anew with a lower config.optimizer.learning_rate"
            )
        count = float(metrics["count"])
        self.since_log.add(loss, count)
        self.since_eval.add(loss, count)
        return norm


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train, or go on training, the run in `workdir`; return whether it is finished.

    Args:
      config: the settings; those of a run that is there already must be the same.
      workdir: the run folder, made if need be.
      should_stop: asked after every step; once true, all is saved and the function returns.

    Raises:
      UserError: for a senseless setting, a text that can't be used, a folder of another run.
      RunError: if the loss is not finite.
    """
    validate(config)
    job = prepare(config, epath.Path(workdir))
    run, model = job.run, model_from_config(config, len(job.run.vocab))
    optimizer = make_optimizer(config, job.num_steps)
    schedule = make_schedule(config, job.num_steps)
    train_step = jax.jit(make_train_step(model, optimizer), donate_argnums=0)
    finish_evaluation = make_evaluation(job, model)
    with closing(Checkpoints(run.workdir)) as checkpoints:
        state, tally = start_state(job, model, optimizer, checkpoints)
        first_step = int(state.step)
        report_start(job, state)
        if first_step >= job.num_steps:
            logger.info("finished already, at step %d: nothing to do", first_step)
            return True
        clock = Clock(tally.seconds)
        with (
            closing(RunLog(run.workdir, first_step, title=run.workdir.name)) as log,
            TrainingBar(job.num_steps, first_step) as bar,
        ):
            for step in range(first_step + 1, job.num_steps + 1):
                state, metrics = train_step(state, job.batches(step - 1))
                tally.push(step, metrics)
                bar.advance()
                where = {"step": step, "epoch": step / job.batches.steps_per_epoch}
                is_last = step == job.num_steps
                if is_last or step % config.log_every_steps == 0:
                    record = training_record(tally, clock, where, float(schedule(step - 1)))
                    log.write(record)
                    bar.show(record)
                eval_every = config.eval_every_steps or job.batches.steps_per_epoch
                save_every = config.checkpoint_every_steps or job.num_steps
                stopping = should_stop() and not is_last
                if is_last or step % eval_every == 0:
                    finish_evaluation(state, tally, clock, where, log, checkpoints)
                elif stopping or step % save_every == 0:
                    save(state, tally, clock, checkpoints, loss=None)
                if stopping:
                    logger.info("stopped and saved at step %d; the same command goes on", step)
                    return False
            report_end(job, log, clock)
    return True


class Clock:
    """Seconds of training, over all the processes that a run took."""

    def __init__(self, seconds_before: float):
        self._start = time.monotonic() - seconds_before
        self._mark = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds since the run began."""
        return time.monotonic() - self._start

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        now = time.monotonic()
        lap, self._mark = now - self._mark, now
        return lap


def prepare(config: ConfigDict, workdir: epath.Path) -> Job:
    """Read the text and open the run folder, or make it."""
    run = load_run(workdir) if (workdir / "config.json").exists() else None
    if run:
        check_same_config(run, config)
    text = load_text(
        config.data.path,
        lowercase=config.data.lowercase,
        strip_punctuation=config.data.strip_punctuation,
        source=run.text["source"] if run else "",
    )
    if run and run.text["sha256"] != text.sha256:
        raise UserError(
            f"{text.source}: has changed since the run in {workdir} began; "
            "bring the old text back, or choose another --workdir"
        )
    vocab = Vocab.from_text(text.content)
    train_ids, val_ids = split(vocab.encode(text.content), config.data.val_fraction)
    batches = training_batches(train_ids, config)
    val_batches = evaluation_batches(val_ids, config) if config.data.val_fraction else None
    num_steps = config.num_steps or config.num_epochs * batches.steps_per_epoch
    if run is None:
        about = describe_text(text, vocab, train_ids, val_ids)
        prompts = random_prompts(train_ids, vocab, config.seq_len, config.seed)
        run = create_run(workdir, config, vocab, about, prompts)
    return Job(run, batches, val_batches, num_steps)


def describe_text(
    text: Text, vocab: Vocab, train_ids: np.ndarray, val_ids: np.ndarray
) -> dict[str, Any]:
    """Return what config.json says of the text."""
    return {
        "source": text.source,
        "sha256": text.sha256,
        "bytes": text.num_bytes,
        "characters_cut": text.num_cut,
        "characters": len(train_ids) + len(val_ids),
        "training_characters": len(train_ids),
        "validation_characters": len(val_ids),
        "vocabulary": len(vocab),
    }


def start_state(
    job: Job,
    model: CharLSTM,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
) -> tuple[TrainState, Tally]:
    """Return the state and tally of the latest checkpoint, or of step 0."""
    config = job.run.config
    make_state = partial(init_state, model, optimizer, batch_size=config.batch_size)
    state = jax.jit(make_state)(jax.random.key(config.seed))
    latest = checkpoints.latest_step()
    if latest is None:
        return state, Tally()
    state, notes = checkpoints.restore(latest, like=state)
    return state, Tally.from_notes(notes)


def make_evaluation(job: Job, model: CharLSTM) -> Callable[..., None]:
    """Return the function that evaluates, writes a sample, and saves."""
    config, run = job.run.config, job.run
    eval_step = jax.jit(make_eval_step(model))
    sampler = jax.jit(make_sampler(model, seq_len=config.seq_len, **config.sample.to_dict()))

    def evaluation(
        state: TrainState,
        tally: Tally,
        clock: Clock,
        where: dict[str, Any],
        log: RunLog,
        checkpoints: Checkpoints,
    ) -> None:
        tally.read()
        # Without a validation part the best is by the training loss, as in the tutorial.
        loss = tally.since_eval.value
        record: dict[str, Any] = {"train/mean_loss": loss}
        if job.val_batches:
            carry = zero_carry(model, job.val_batches.batch_size)
            steps = range(job.val_batches.steps_per_epoch)
            result = evaluate(eval_step, state.params, carry, map(job.val_batches, steps))
            loss = result["loss"]
            record |= {
                "val/loss": loss,
                "val/bits_per_char": bits(loss),
                "val/accuracy": result["accuracy"],
            }
            logger.info("step %d: validation %.4f bits per character", where["step"], bits(loss))
        key = jax.random.fold_in(jax.random.key(config.seed), where["step"])
        prompt = run.prompts[int(jax.random.randint(key, (), 0, len(run.prompts)))]
        ids_BL = sampler(state.params, run.vocab.encode(prompt)[None].astype(np.int32), key)
        record["sample"] = run.vocab.decode(ids_BL[0])
        logger.info("a sample at step %d:\n%s\n", where["step"], record["sample"])
        tally.since_eval = Mean()
        save(state, tally, clock, checkpoints, loss)
        log.write(where | {"seconds": clock.seconds()} | record)
        log.draw()
        clock.lap()

    return evaluation


def save(
    state: TrainState, tally: Tally, clock: Clock, checkpoints: Checkpoints, loss: float | None
) -> None:
    """Save a checkpoint, once the metrics of all steps have been found to be finite."""
    tally.read()
    tally.seconds = clock.seconds()
    checkpoints.save(state, tally.notes(), loss)


def training_record(
    tally: Tally, clock: Clock, where: dict[str, Any], learning_rate: float
) -> dict[str, Any]:
    """Return the training part of a line of metrics.jsonl, and begin the next one."""
    norm = tally.read()
    mean, tally.since_log = tally.since_log, Mean()
    return where | {
        "seconds": clock.seconds(),
        "train/loss": mean.value,
        "train/bits_per_char": bits(mean.value),
        "chars_per_second": mean.count / clock.lap(),
        "learning_rate": learning_rate,
        "grad_norm": norm,
    }


def report_start(job: Job, state: TrainState) -> None:
    """Tell what was read, and what is trained on what."""
    run, text = job.run, job.run.text
    logger.info("run folder: %s", run.workdir)
    logger.info("text: %s", text["source"])
    if text["characters_cut"]:
        logger.info("header and licence: %s characters cut off", f"{text['characters_cut']:,}")
    logger.info("total characters: %s", f"{text['characters']:,}")
    logger.info("total vocabulary: %d", text["vocabulary"])
    if isinstance(job.batches, Windows):
        logger.info("total patterns: %s", f"{job.batches.num_windows:,}")
    logger.info(
        "training on %s characters, validating on %s",
        f"{text['training_characters']:,}",
        f"{text['validation_characters']:,}",
    )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    logger.info(
        "model: %d x %d LSTM, %s parameters",
        run.config.model.num_layers,
        run.config.model.hidden_size,
        f"{num_params:,}",
    )
    logger.info("devices: %s", ", ".join(str(device) for device in jax.devices()))
    logger.info(
        "steps: %s of %s, %s an epoch",
        f"{int(state.step):,}",
        f"{job.num_steps:,}",
        f"{job.batches.steps_per_epoch:,}",
    )


def report_end(job: Job, log: RunLog, clock: Clock) -> None:
    """Tell the best figure, the time, and what to do next."""
    scored = [record for record in log.records if "val/loss" in record]
    if scored:
        best = min(scored, key=lambda record: record["val/loss"])
        logger.info(
            "best validation: %.4f bits per character, at step %d",
            best["val/bits_per_char"],
            best["step"],
        )
    logger.info("trained %d steps in %.0f s", job.num_steps, clock.seconds())
    workdir = shlex.quote(str(job.run.workdir))
    logger.info("to write more: python launch/sample.py --workdir=%s", workdir)
