"""The training loop, around the pure steps."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from charlstm.checkpoint import Checkpoints
from charlstm.config import validate
from charlstm.data import read_steps
from charlstm.errors import RunError, UserError
from charlstm.files import sole_writer
from charlstm.job import Job, prepare, report, steps_ahead
from charlstm.journal import DivergedError, Journal, Notes
from charlstm.log import bits
from charlstm.model import CharLSTM, model_from_config, zero_carry
from charlstm.optim import make_optimizer, make_schedule
from charlstm.run import write_run
from charlstm.sample import stream
from charlstm.steps import (
    TrainState,
    evaluate,
    init_state,
    make_eval_step,
    make_train_step,
    make_train_steps,
)

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
ShouldStop = Callable[[], bool]

# A run whose loss is no longer finite goes back so often, each time with so much of the rate.
MAX_RETREATS = 3
RETREAT_SCALE = 0.5
# Characters of a sample between two looks at should_stop.
SAMPLE_CHUNK = 128


class StoppedError(Exception):
    """Somebody has asked to stop."""


def train(
    config: ConfigDict, workdir: epath.PathLike, should_stop: ShouldStop = lambda: False
) -> bool:
    """Train, or go on training, the run in `workdir`; return whether it is finished.

    Args:
      config: the settings; those of a run that is there already must be the same, but for its
        length, how often it tells and saves, its samples, and where the text lies.
      workdir: the run folder, made if need be.
      should_stop: asked several times a second, or after every step if it takes longer; once true,
        all is saved and the function returns.

    Raises:
      UserError: for a senseless setting, a text that can't be used, a folder of another run or in
        use by another process.
      RunError: if the run cannot go on or be saved: a full disk, a loss that stays not finite.
    """
    validate(config)
    check_backend(config)
    workdir = epath.Path(workdir)
    job = prepare(config, workdir, [str(device) for device in jax.devices()])
    with sole_writer(workdir), failing_writes_told(workdir):
        write_run(job.run)
        with closing(Checkpoints(workdir)) as checkpoints:
            retreats = 0
            while True:
                try:
                    return go_on(job, checkpoints, retreats, should_stop)
                except DivergedError as error:
                    retreats = error.retreats + 1
                    if retreats > MAX_RETREATS:
                        raise RunError(
                            f"{error}, and so it was after going back {MAX_RETREATS} times; the "
                            "last sound checkpoint is kept; start anew, in another --workdir, "
                            "with a lower config.optimizer.learning_rate"
                        ) from error
                    logger.warning(
                        "%s, as in the steps before: going back to the last sound checkpoint, with "
                        "%g times the learning rate",
                        error,
                        RETREAT_SCALE**retreats,
                    )


def go_on(job: Job, checkpoints: Checkpoints, retreats: int, should_stop: ShouldStop) -> bool:
    """Train from the newest checkpoint on; return whether the run is finished.

    Args:
      job, checkpoints: the run.
      retreats: how often it has gone back in this process; if ever, only a checkpoint will do at
        which loss and gradient were finite.
      should_stop: as in train.
    """
    config = job.run.config
    model = model_from_config(config, len(job.run.vocab))

    optimizer = make_optimizer(config, make_schedule(config, job.num_steps))
    make_state = partial(init_state, model, optimizer, batch_size=config.batch_size)
    key = jax.random.key(config.seed)
    like = jax.eval_shape(make_state, key)
    is_wanted = (lambda notes: notes["streak"] == 0) if retreats else (lambda notes: True)
    if found := checkpoints.restore_newest(like, is_wanted):
        state, notes = found[0], Notes.from_json(found[1])
    else:
        state, notes = jax.jit(make_state)(key), Notes()
    notes.retreats = max(notes.retreats, retreats)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    report(job, int(state.step), num_params, ", ".join(map(str, jax.devices())))
    if state.step >= job.num_steps and not notes.has_unscored_steps:
        logger.info("finished already, at step %d: nothing to do", state.step)
        return True
    schedule = make_schedule(config, job.num_steps, RETREAT_SCALE**notes.retreats)
    with Journal(job, checkpoints, int(state.step), notes) as journal:
        is_finished = run_steps(job, model, schedule, state, journal, should_stop)
    # An exit code of success means that the state is there and can be read.
    latest = checkpoints.latest_step()
    if latest is not None:
        checkpoints.restore(latest, like)
    return is_finished


def run_steps(
    job: Job,
    model: CharLSTM,
    schedule: Callable[[Any], Any],
    state: TrainState,
    journal: Journal,
    should_stop: ShouldStop,
) -> bool:
    """Take the steps that are left, and whatever is due between them; return whether all are."""
    first = step = int(state.step)
    optimizer = make_optimizer(job.run.config, schedule)
    train_steps = jax.jit(make_train_steps(make_train_step(model, optimizer)), donate_argnums=0)
    assess = make_assessment(job, model, should_stop)
    try:
        # Left over from a stop amid an evaluation.
        if job.is_evaluated(step) and journal.notes.has_unscored_steps:
            journal.log_evaluation(state, assess(state.params, step))
        while step < job.num_steps:
            stop_if(should_stop)
            count = min(journal.fitting_count, job.max_count, steps_ahead(job, step))
            batches = read_steps(job.batches, step, count, job.max_count)
            state, metrics = train_steps(state, batches, count)
            step += count
            journal.push(step, count, metrics)
            if step == job.num_steps or step % job.log_every == 0:
                journal.log_training(step, schedule)
            if job.is_evaluated(step):
                journal.log_evaluation(state, assess(state.params, step))
            elif step % job.save_every == 0:
                journal.save(state)
    except StoppedError:
        if step > first:
            journal.save(state)
        logger.info("stopped and saved at step %d; the same command goes on", step)
        return False
    journal.report_end()
    return True


def stop_if(should_stop: ShouldStop) -> None:
    """Raise StoppedError if somebody has asked to stop."""
    if should_stop():
        raise StoppedError


def until(should_stop: ShouldStop, items: Iterable[Item]) -> Iterator[Item]:
    """Yield `items`; raise StoppedError between two of them once somebody has asked to stop."""
    for item in items:
        stop_if(should_stop)
        yield item


@contextmanager
def failing_writes_told(workdir: epath.Path) -> Iterator[None]:
    """Turn a write that fails within the block into one line."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or workdir}: could not be written ({error.strerror or error}); the "
            "last checkpoint is kept: make room, or mend the folder, and give the same command "
            "again"
        ) from error


def check_backend(config: ConfigDict) -> None:
    """Raise UserError if `config` asks for what the machine does not have."""
    if config.model.recurrence == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            "config.model.recurrence=cudnn: needs an NVIDIA GPU, and JAX has found "
            f"{jax.default_backend()}; use fused"
        )


def make_assessment(
    job: Job, model: CharLSTM, should_stop: ShouldStop
) -> Callable[[Any, int], dict[str, Any]]:
    """Return assess(params, step) -> what an evaluation tells: validation figures and a sample.

    It raises StoppedError amid its work, once `should_stop` is true.
    """
    config, run = job.run.config, job.run
    eval_step = jax.jit(make_eval_step(model))

    def assess(params: Any, step: int) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if job.val_batches:
            carry = zero_carry(model, job.val_batches.batch_size)
            indices = until(should_stop, range(job.val_batches.steps_per_epoch))
            result = evaluate(eval_step, params, carry, map(job.val_batches, indices))
            figures = {
                "val/loss": result["loss"],
                "val/bits_per_char": bits(result["loss"]),
                "val/accuracy": result["accuracy"],
            }
        place = np.random.default_rng((config.seed, step)).integers(len(run.prompts))
        prompts = [run.vocab.encode(run.prompts[place])]
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        lengths = {"seq_len": config.seq_len, "chunk": SAMPLE_CHUNK}
        pieces = stream(model, params, prompts, key, **lengths, **config.sample.to_dict())
        ids_BL = np.concatenate(list(until(should_stop, pieces)), axis=1)
        return figures | {"sample": run.vocab.decode(ids_BL[0])}

    return assess
