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
from charlstm.training.progress import MAX_NONFINITE_STEPS, Counters, DivergedError, Progress
from charlstm.training.setup import Setup, prepare, report, steps_ahead
from charlstm.training.validation import ShouldStop, StoppedError, make_evaluation, stop_if

logger = logging.getLogger(__name__)

# Rollbacks after nonfinite losses, each of which multiplies the learning rate.
MAX_ROLLBACKS = 3
ROLLBACK_RATE_SCALE = 0.5


@jax.transfer_guard("allow")  # batches and settings come from the host at every step
def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    should_stop: ShouldStop = lambda: False,
    profile: bool = False,
) -> bool:
    """Train or resume the run in `workdir`; return whether it is finished.

    Args:
      config: the settings. An existing run must have the same, except for its length, the
        intervals of logs and checkpoints, the samples and the path of the text.
      workdir: the run folder, created if it does not exist.
      should_stop: called several times per second, or after every step if a step takes longer.
        Once it returns true, the state is saved and the function returns.
      profile: write a trace of one call of the compiled steps to profile/ in the run folder.

    Raises:
      UserError: for an invalid setting or text, or a folder of another run or process.
      RunError: if the run cannot be saved or its loss stays nonfinite.
    """
    should_stop = processes.agree(should_stop)
    workdir = epath.Path(given_path(os.fspath(workdir)))
    setup, like = processes.together(partial(set_up, config, workdir))
    processes.check_same(shared_settings(setup))
    with ExitStack() as stack, failing_writes_reported(workdir):
        processes.together(partial(open_folder, setup, stack))
        processes.together(partial(check_shared, workdir))
        with closing(Checkpoints(workdir)) as checkpoints:
            rollbacks = 0
            while True:
                try:
                    return resume(setup, checkpoints, like, rollbacks, should_stop, profile)
                except DivergedError as error:
                    rollbacks = error.rollbacks + 1
                    if rollbacks > MAX_ROLLBACKS:
                        kept = "no checkpoint was saved"
                        if (latest := checkpoints.latest_step()) is not None:
                            kept = f"the checkpoint of step {latest} is kept"
                        raise RunError(
                            f"{error}, also after going back {MAX_ROLLBACKS} times; {kept}; train "
                            "in another --workdir with a lower config.optimizer.learning_rate"
                        ) from error
                    logger.warning("%s, as in the %d steps before", error, MAX_NONFINITE_STEPS - 1)


def set_up(config: ConfigDict, workdir: epath.Path) -> tuple[Setup, TrainState]:
    """Return the setup and the shapes and shardings of its state; write nothing."""
    validate(config)
    check_backend(config)
    setup = prepare(config, workdir)
    like = abstract_state(config, setup)
    check_memory(config, setup.model.vocab_size, setup.mesh)
    return setup, like


def abstract_state(config: ConfigDict, setup: Setup) -> TrainState:
    """Return the tree, shapes and shardings of the state of `setup` with the B of `config`."""
    like = state_shapes(config, setup.model, setup.run.prng_impl)
    places = state_shardings(like, setup.mesh)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), like, places)


def resume(
    setup: Setup,
    checkpoints: Checkpoints,
    like: TrainState,
    rollbacks: int,
    should_stop: ShouldStop,
    profile: bool,
) -> bool:
    """Train from the newest checkpoint; return whether the run is finished.

    Args:
      setup, checkpoints: the run.
      like: the tree, the shapes and the shardings of its state.
      rollbacks: rollbacks in this process. After a rollback only checkpoints with a finite loss
        and gradient are restored.
      should_stop, profile: as in train.
    """
    config = setup.run.config
    is_wanted = (
        (lambda counters: not counters.get("nonfinite_steps"))
        if rollbacks
        else (lambda counters: True)
    )
    if found := checkpoints.restore_newest(like, is_wanted):
        state, counters = found[0], Counters.from_json(found[1])
    else:
        state, counters = initial_state(setup, like), Counters()
    counters.rollbacks = max(counters.rollbacks, rollbacks)
    if rollbacks:
        logger.warning(
            "going back to %s, with %g times the learning rate",
            f"the checkpoint of step {int(state.step)}"
            if found
            else "step 0: no checkpoint is sound",
            ROLLBACK_RATE_SCALE**counters.rollbacks,
        )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    report(setup, int(state.step), num_params)
    if state.step >= setup.num_steps and not counters.has_unscored_steps:
        logger.info("finished already, at step %d: nothing to do", state.step)
        return True
    schedule = make_schedule(config, setup.num_steps, ROLLBACK_RATE_SCALE**counters.rollbacks)
    train_steps = compile_train_steps(setup, like, schedule)
    if profile:
        train_steps = traced_once(train_steps, setup.run.workdir / "profile")
    with Progress(setup, checkpoints, int(state.step), counters) as progress:
        is_finished = run_steps(setup, train_steps, schedule, state, progress, should_stop)
    # Success means that the final checkpoint can be read.
    latest = checkpoints.latest_step()
    if latest is not None:
        checkpoints.restore(latest, like)
    return is_finished


def run_steps(
    setup: Setup,
    train_steps: Callable[..., Any],
    schedule: Callable[[Any], Any],
    state: TrainState,
    progress: Progress,
    should_stop: ShouldStop,
) -> bool:
    """Take the remaining steps with their evaluations; return whether the run is finished."""
    first = step = int(state.step)
    evaluate_state = make_evaluation(setup, should_stop)

    def evaluate(state: TrainState, step: int) -> None:
        with progress.evaluating():
            params = averaged_params(state.params, state.opt_state)
            progress.log_evaluation(state, evaluate_state(params, step))

    try:
        # A stop during an evaluation leaves it to the next start.
        if setup.is_evaluated(step) and progress.counters.has_unscored_steps:
            evaluate(state, step)
        while step < setup.num_steps:
            stop_if(should_stop)
            count = min(progress.steps_per_call, setup.max_steps_per_call, steps_ahead(setup, step))
            state, metrics = train_steps(state, read_batches(setup, step, count), count)
            step += count
            progress.push(step, count, metrics)
            if step == setup.num_steps or step % setup.log_every == 0:
                progress.log_training(step, schedule)
            if setup.is_evaluated(step):
                evaluate(state, step)
            elif step % setup.save_every == 0:
                progress.save(state)
    except StoppedError:
        if step > first:
            progress.save(state)
        logger.info("stopped and saved at step %d; the same command goes on", step)
        return False
    progress.report_end()
    return True


def initial_state(setup: Setup, like: TrainState) -> TrainState:
    """Return the state before the first step, placed as `like` is."""
    config = setup.run.config
    optimizer = make_optimizer(config, make_schedule(config, setup.num_steps))
    make_state = partial(init_state, setup.model, optimizer, batch_size=config.batch_size)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(make_state, out_shardings=places)(setup.run.key(config.seed))


def compile_train_steps(
    setup: Setup, like: TrainState, schedule: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Return train_steps(state, batches, count) that donates states sharded as `like`."""
    train_step = make_train_step(setup.model, make_optimizer(setup.run.config, schedule))
    outputs = jax.tree.map(lambda leaf: leaf.sharding, like), replicated(setup.mesh)
    return jax.jit(make_train_steps(train_step), donate_argnums=0, out_shardings=outputs)


def read_batches(setup: Setup, step: int, count: int) -> Batch:
    """Return the batches of `count` steps from `step` on, on the setup's devices."""
    batch_size = setup.batches.batch_size
    rows = local_rows(by_rows(setup.mesh, batch_size), batch_size)
    batches = read_steps(setup.batches, step, count, setup.max_steps_per_call, rows)
    forget_pages(setup.batches.ids_M)
    # Behind the axis of steps.
    return put_batch(batches, by_rows(setup.mesh, batch_size, axis=1), batch_size)


def shared_settings(setup: Setup) -> dict[str, Any]:
    """Return what must be equal on all processes; the path of the text may differ."""
    settings = {f"config.{name}": value for name, value in flatten(setup.run.config).items()}
    del settings["config.data.path"]
    settings["the kind of random keys"] = setup.run.prng_impl
    return settings | {"the text": setup.run.text["sha256"], **this_machine()["versions"]}


def open_folder(setup: Setup, stack: ExitStack) -> None:
    """Lock the run folder until the end of `stack` and write config.json, on process 0."""
    if processes.is_first():
        stack.enter_context(sole_writer(setup.run.workdir))
        write_run(setup.run)


def check_shared(workdir: epath.Path) -> None:
    """Raise UserError if this process does not see the run folder of process 0."""
    if not has_run(workdir):
        raise UserError(
            f"{workdir}: process 0 has made it, and this process does not see it; give a --workdir "
            "that all share, such as a bucket or a network file system"
        )


@contextmanager
def failing_writes_reported(workdir: epath.Path) -> Iterator[None]:
    """Turn an OSError within the block into a RunError of one line."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or workdir}: could not be written ({error.strerror or error}); the "
            "last checkpoint is kept: make room, or mend the folder, and give the same command "
            "again"
        ) from error
