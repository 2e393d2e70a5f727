"""The training loop, around the pure steps."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from charlstm.config import flatten
from charlstm.config_check import validate
from charlstm.data.batches import Batch, read_steps
from charlstm.data.corpus import forget_pages
from charlstm.errors import RunError, UserError
from charlstm.files import sole_writer
from charlstm.optim import averaged_params, make_optimizer, make_schedule
from charlstm.parallel import processes
from charlstm.parallel.sharding import (
    by_rows,
    local_rows,
    put_batch,
    replicated,
    state_shardings,
)
from charlstm.runs.checkpoints import Checkpoints, state_shapes
from charlstm.runs.folder import has_run, write_run
from charlstm.runs.machine import check_backend, check_memory, this_machine, traced_once
from charlstm.steps import TrainState, init_state, make_train_step, make_train_steps
from charlstm.system.paths import given_path
from charlstm.training.progress import MAX_STREAK, DivergedError, Journal, Notes
from charlstm.training.setup import Job, prepare, report, steps_ahead
from charlstm.training.validation import ShouldStop, StoppedError, make_evaluation, stop_if

logger = logging.getLogger(__name__)

# A run whose loss is no longer finite goes back so often, each time with so much of the rate.
MAX_RETREATS = 3
RETREAT_SCALE = 0.5


@jax.transfer_guard("allow")  # batches and settings come from the host at every step
def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    should_stop: ShouldStop = lambda: False,
    profile: bool = False,
) -> bool:
    """Train, or go on training, the run in `workdir`; return whether it is finished.

    Args:
      config: the settings; those of a run that is there already must be the same, but for its
        length, how often it logs and saves, its samples, and where the text lies.
      workdir: the run folder, made if need be.
      should_stop: asked several times a second, or after every step if it takes longer; once true,
        all is saved and the function returns.
      profile: write a trace of one call of the compiled steps to profile/ in the run folder.

    Raises:
      UserError: for a senseless setting, a text that can't be used, a folder of another run or in
        use by another process.
      RunError: if the run cannot go on or be saved: a full disk, a loss that stays not finite.
    """
    should_stop = processes.agree(should_stop)
    workdir = epath.Path(given_path(os.fspath(workdir)))
    job, like = processes.together(partial(make_ready, config, workdir))
    processes.check_same(what_must_agree(job))
    with ExitStack() as stack, failing_writes_reported(workdir):
        processes.together(partial(open_folder, job, stack))
        processes.together(partial(check_shared, workdir))
        with closing(Checkpoints(workdir)) as checkpoints:
            retreats = 0
            while True:
                try:
                    return go_on(job, checkpoints, like, retreats, should_stop, profile)
                except DivergedError as error:
                    retreats = error.retreats + 1
                    if retreats > MAX_RETREATS:
                        kept = "no checkpoint was saved"
                        if (latest := checkpoints.latest_step()) is not None:
                            kept = f"the checkpoint of step {latest} is kept"
                        raise RunError(
                            f"{error}, also after going back {MAX_RETREATS} times; {kept}; train "
                            "in another --workdir with a lower config.optimizer.learning_rate"
                        ) from error
                    logger.warning("%s, as in the %d steps before", error, MAX_STREAK - 1)


def make_ready(config: ConfigDict, workdir: epath.Path) -> tuple[Job, TrainState]:
    """Return the job, and the tree, shapes and shardings of its state; nothing is written."""
    validate(config)
    check_backend(config)
    job = prepare(config, workdir)
    like = placed_shapes(config, job)
    check_memory(config, job.model.vocab_size, job.mesh)
    return job, like


def placed_shapes(config: ConfigDict, job: Job) -> TrainState:
    """Return the tree, shapes and shardings of the state of `job` with the B of `config`."""
    like = state_shapes(config, job.model, job.run.prng_impl)
    places = state_shardings(like, job.mesh)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), like, places)


def go_on(
    job: Job,
    checkpoints: Checkpoints,
    like: TrainState,
    retreats: int,
    should_stop: ShouldStop,
    profile: bool,
) -> bool:
    """Train from the newest checkpoint on; return whether the run is finished.

    Args:
      job, checkpoints: the run.
      like: the tree, the shapes and the shardings of its state.
      retreats: how often it has gone back in this process; if ever, only a checkpoint will do at
        which loss and gradient were finite.
      should_stop, profile: as in train.
    """
    config = job.run.config
    is_wanted = (lambda notes: not notes.get("streak")) if retreats else (lambda notes: True)
    if found := checkpoints.restore_newest(like, is_wanted):
        state, notes = found[0], Notes.from_json(found[1])
    else:
        state, notes = first_state(job, like), Notes()
    notes.retreats = max(notes.retreats, retreats)
    if retreats:
        logger.warning(
            "going back to %s, with %g times the learning rate",
            f"the checkpoint of step {int(state.step)}"
            if found
            else "step 0: no checkpoint is sound",
            RETREAT_SCALE**notes.retreats,
        )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    report(job, int(state.step), num_params)
    if state.step >= job.num_steps and not notes.has_unscored_steps:
        logger.info("finished already, at step %d: nothing to do", state.step)
        return True
    schedule = make_schedule(config, job.num_steps, RETREAT_SCALE**notes.retreats)
    train_steps = compile_train_steps(job, like, schedule)
    if profile:
        train_steps = traced_once(train_steps, job.run.workdir / "profile")
    with Journal(job, checkpoints, int(state.step), notes) as journal:
        is_finished = run_steps(job, train_steps, schedule, state, journal, should_stop)
    # An exit code of success means that the state is there and can be read.
    latest = checkpoints.latest_step()
    if latest is not None:
        checkpoints.restore(latest, like)
    return is_finished


def run_steps(
    job: Job,
    train_steps: Callable[..., Any],
    schedule: Callable[[Any], Any],
    state: TrainState,
    journal: Journal,
    should_stop: ShouldStop,
) -> bool:
    """Take the steps that are left, and whatever is due between them; return whether all are."""
    first = step = int(state.step)
    evaluate_state = make_evaluation(job, should_stop)

    def evaluate(state: TrainState, step: int) -> None:
        with journal.evaluating():
            params = averaged_params(state.params, state.opt_state)
            journal.log_evaluation(state, evaluate_state(params, step))

    try:
        # Left over from a stop amid an evaluation.
        if job.is_evaluated(step) and journal.notes.has_unscored_steps:
            evaluate(state, step)
        while step < job.num_steps:
            stop_if(should_stop)
            count = min(journal.fitting_count, job.max_count, steps_ahead(job, step))
            state, metrics = train_steps(state, read_batches(job, step, count), count)
            step += count
            journal.push(step, count, metrics)
            if step == job.num_steps or step % job.log_every == 0:
                journal.log_training(step, schedule)
            if job.is_evaluated(step):
                evaluate(state, step)
            elif step % job.save_every == 0:
                journal.save(state)
    except StoppedError:
        if step > first:
            journal.save(state)
        logger.info("stopped and saved at step %d; the same command goes on", step)
        return False
    journal.report_end()
    return True


def first_state(job: Job, like: TrainState) -> TrainState:
    """Return the state before the first step, placed as `like` is."""
    config = job.run.config
    optimizer = make_optimizer(config, make_schedule(config, job.num_steps))
    make_state = partial(init_state, job.model, optimizer, batch_size=config.batch_size)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(make_state, out_shardings=places)(job.run.key(config.seed))


def compile_train_steps(
    job: Job, like: TrainState, schedule: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Return train_steps(state, batches, count) of states placed as `like`, given away."""
    train_step = make_train_step(job.model, make_optimizer(job.run.config, schedule))
    outputs = jax.tree.map(lambda leaf: leaf.sharding, like), replicated(job.mesh)
    return jax.jit(make_train_steps(train_step), donate_argnums=0, out_shardings=outputs)


def read_batches(job: Job, step: int, count: int) -> Batch:
    """Return the batches of `count` steps from `step` on, on the job's devices."""
    batch_size = job.batches.batch_size
    rows = local_rows(by_rows(job.mesh, batch_size), batch_size)
    batches = read_steps(job.batches, step, count, job.max_count, rows)
    forget_pages(job.batches.ids_M)
    # Behind the axis of steps.
    return put_batch(batches, by_rows(job.mesh, batch_size, axis=1), batch_size)


def what_must_agree(job: Job) -> dict[str, Any]:
    """Return what all processes of a run must have alike; the text may lie in different places."""
    settings = {f"config.{name}": value for name, value in flatten(job.run.config).items()}
    del settings["config.data.path"]
    # Of this process; job.run.machine has those that the run began with.
    settings["the kind of random keys"] = job.run.prng_impl
    return settings | {"the text": job.run.text["sha256"], **this_machine()["versions"]}


def open_folder(job: Job, stack: ExitStack) -> None:
    """Lock the run folder until the end of `stack` and write what identifies the run: one does."""
    if processes.is_first():
        stack.enter_context(sole_writer(job.run.workdir))
        write_run(job.run)


def check_shared(workdir: epath.Path) -> None:
    """Raise UserError if this process does not see the run folder that the first one has made."""
    if not has_run(workdir):
        raise UserError(
            f"{workdir}: process 0 has made it, and this process does not see it; give a --workdir "
            "that all share, such as a bucket or a network file system"
        )


@contextmanager
def failing_writes_reported(workdir: epath.Path) -> Iterator[None]:
    """Turn a write that fails within the block into one line."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or workdir}: could not be written ({error.strerror or error}); the "
            "last checkpoint is kept: make room, or mend the folder, and give the same command "
            "again"
        ) from error
