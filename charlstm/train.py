"""The training loop, around the pure steps."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from charlstm.assess import ShouldStop, StoppedError, make_assessment, stop_if
from charlstm.checkpoint import Checkpoints, state_shapes
from charlstm.config import validate
from charlstm.corpus import forget_pages
from charlstm.data import read_steps
from charlstm.errors import RunError
from charlstm.files import sole_writer
from charlstm.job import Job, prepare, report, steps_ahead
from charlstm.journal import DivergedError, Journal, Notes
from charlstm.machine import check_backend, check_memory
from charlstm.optim import make_optimizer, make_schedule
from charlstm.run import write_run
from charlstm.steps import TrainState, init_state, make_train_step, make_train_steps

logger = logging.getLogger(__name__)

# A run whose loss is no longer finite goes back so often, each time with so much of the rate.
MAX_RETREATS = 3
RETREAT_SCALE = 0.5


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
    job = prepare(config, workdir)
    like = state_shapes(config, job.model)
    check_memory(config, like)
    with sole_writer(workdir), failing_writes_told(workdir):
        write_run(job.run)
        with closing(Checkpoints(workdir)) as checkpoints:
            retreats = 0
            while True:
                try:
                    return go_on(job, checkpoints, like, retreats, should_stop)
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


def go_on(
    job: Job, checkpoints: Checkpoints, like: TrainState, retreats: int, should_stop: ShouldStop
) -> bool:
    """Train from the newest checkpoint on; return whether the run is finished.

    Args:
      job, checkpoints: the run.
      like: the tree and the shapes of its state.
      retreats: how often it has gone back in this process; if ever, only a checkpoint will do at
        which loss and gradient were finite.
      should_stop: as in train.
    """
    config = job.run.config
    is_wanted = (lambda notes: not notes.get("streak")) if retreats else (lambda notes: True)
    if found := checkpoints.restore_newest(like, is_wanted):
        state, notes = found[0], Notes.from_json(found[1])
    else:
        optimizer = make_optimizer(config, make_schedule(config, job.num_steps))
        make_state = partial(init_state, job.model, optimizer, batch_size=config.batch_size)
        state, notes = jax.jit(make_state)(jax.random.key(config.seed)), Notes()
    notes.retreats = max(notes.retreats, retreats)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    report(job, int(state.step), num_params, ", ".join(map(str, jax.devices())))
    if state.step >= job.num_steps and not notes.has_unscored_steps:
        logger.info("finished already, at step %d: nothing to do", state.step)
        return True
    schedule = make_schedule(config, job.num_steps, RETREAT_SCALE**notes.retreats)
    with Journal(job, checkpoints, int(state.step), notes) as journal:
        is_finished = run_steps(job, schedule, state, journal, should_stop)
    # An exit code of success means that the state is there and can be read.
    latest = checkpoints.latest_step()
    if latest is not None:
        checkpoints.restore(latest, like)
    return is_finished


def run_steps(
    job: Job,
    schedule: Callable[[Any], Any],
    state: TrainState,
    journal: Journal,
    should_stop: ShouldStop,
) -> bool:
    """Take the steps that are left, and whatever is due between them; return whether all are."""
    first = step = int(state.step)
    optimizer = make_optimizer(job.run.config, schedule)
    train_step = make_train_step(job.model, optimizer)
    train_steps = jax.jit(make_train_steps(train_step), donate_argnums=0)
    assess = make_assessment(job, should_stop)
    try:
        # Left over from a stop amid an evaluation.
        if job.is_evaluated(step) and journal.notes.has_unscored_steps:
            journal.log_evaluation(state, assess(state.params, step))
        while step < job.num_steps:
            stop_if(should_stop)
            count = min(journal.fitting_count, job.max_count, steps_ahead(job, step))
            batches = read_steps(job.batches, step, count, job.max_count)
            forget_pages(job.batches.ids_M)
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
