"""The training loop around the pure steps: restore, train, evaluate and save."""

import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import jax
import optax
from etils import epath
from ml_collections import ConfigDict

from charlstm.config import flatten
from charlstm.data.batches import Batch, read_steps
from charlstm.data.corpus import forget_pages
from charlstm.errors import RunError, UserError
from charlstm.files import lock_folder
from charlstm.optim import averaged_params, make_optimizer, make_schedule
from charlstm.parallel import processes
from charlstm.parallel.sharding import (
    by_rows,
    init_sharded,
    local_rows,
    on_one_device,
    put_batch,
    replicated,
    to_host,
)
from charlstm.runs.checkpoints import Checkpoints
from charlstm.runs.folder import has_run, write_run
from charlstm.runs.machine import this_machine, traced_once
from charlstm.runs.metrics import read_records
from charlstm.steps import TrainState, TrainSteps, make_train_step, make_train_steps
from charlstm.system.paths import given_path
from charlstm.training.progress import (
    MAX_NONFINITE_STEPS,
    Counters,
    DivergedError,
    Progress,
    has_stalled,
)
from charlstm.training.setup import Setup, log_setup, set_up
from charlstm.training.transfer import reload_source, start_params
from charlstm.training.validation import compile_eval_step, validate, write_sample

logger = logging.getLogger(__name__)

# Rollbacks after nonfinite losses, each of which multiplies the learning rate.
MAX_ROLLBACKS = 3
ROLLBACK_RATE_SCALE = 0.5
# Target duration of a compiled call: amortizes dispatch, and keeps Ctrl-C responsive.
CALL_SECONDS = 0.25
MAX_CALL_STEPS = 32
MAX_CALL_CHARS = 2**22

ShouldStop = Callable[[], bool]


@jax.transfer_guard("allow")  # batches and settings come from the host at every step
def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    should_stop: ShouldStop = lambda: False,
    profile: bool = False,
    unset: Collection[str] = (),
) -> bool:
    """Train or resume the run in `workdir`; return whether it is finished.

    Args:
      config: the settings. An existing run must have the same, except for its length, the
        intervals of logs and checkpoints, the samples and the path of the text.
      workdir: the run folder, created if it does not exist.
      should_stop: called several times per second, or after every step if a step takes longer.
        Once it returns true, the state is saved and the function returns.
      profile: write a trace of one call of the compiled steps to profile/ in the run folder.
      unset: settings that the user has not set, such as 'model.hidden_size'. With
        config.init_from, those of the model become the settings of the run that it names.

    Raises:
      UserError: for an invalid setting or text, a folder of another run or process, or if the run
        cannot start from config.init_from.
      RunError: if the run cannot be saved or its loss stays nonfinite.
    """
    workdir = epath.Path(given_path(os.fspath(workdir)))
    setup = processes.run_on_all_processes(partial(set_up, config, workdir, unset))
    processes.check_same(shared_settings(setup))
    with ExitStack() as stack, write_errors_reported(workdir):
        processes.run_on_all_processes(partial(open_folder, setup, stack))
        processes.run_on_all_processes(partial(check_shared, workdir))
        checkpoints = stack.enter_context(closing(Checkpoints(workdir)))
        rollbacks = 0
        while True:
            try:
                return resume(setup, checkpoints, rollbacks, should_stop, profile)
            except DivergedError as error:
                rollbacks = error.rollbacks + 1
                if rollbacks > MAX_ROLLBACKS:
                    step = checkpoints.latest_step()
                    saved = "no checkpoint" if step is None else f"the checkpoint of step {step}"
                    raise RunError(
                        f"{error}, also after {MAX_ROLLBACKS} rollbacks; {saved} was saved; train "
                        "in another --workdir with a lower config.optimizer.learning_rate"
                    ) from error
                logger.warning("%s, as in the %d steps before", error, MAX_NONFINITE_STEPS - 1)


def resume(
    setup: Setup,
    checkpoints: Checkpoints,
    rollbacks: int,
    should_stop: ShouldStop,
    profile: bool,
) -> bool:
    """Train from the newest checkpoint; return whether the run is finished.

    Args:
      setup, checkpoints: the run.
      rollbacks: the rollbacks of this process. After a rollback only checkpoints with a finite
        loss and gradient are restored.
      should_stop, profile: as in train.

    Raises:
      DivergedError: after too many consecutive nonfinite steps.
    """
    config, key = setup.run.config, setup.run.key(setup.run.config.seed)
    # The checkpoint decides on the scale of the schedule, which the abstract state does not need.
    optimizer = make_optimizer(config, make_schedule(config, setup.num_steps))
    abstract_state, init = init_sharded(setup.model, optimizer, key, config.batch_size, setup.mesh)
    found = checkpoints.restore_newest(
        abstract_state, lambda metadata: not (rollbacks and metadata.get("nonfinite_steps"))
    )
    if found:
        state, counters = found[0], Counters.from_json(found[1])
    else:
        state, counters = initial_state(setup, init, key), Counters()
    step = first_step = int(state.step)
    counters.rollbacks = max(counters.rollbacks, rollbacks)
    rate_scale = ROLLBACK_RATE_SCALE**counters.rollbacks
    if rollbacks:
        start = f"the checkpoint of step {step}" if found else "step 0: no checkpoint is finite"
        logger.warning("going back to %s, with %g times the learning rate", start, rate_scale)
    log_setup(setup, step, sum(leaf.size for leaf in jax.tree.leaves(state.params)))
    if is_finished_already(setup, step, counters):
        return True
    schedule = make_schedule(config, setup.num_steps, rate_scale)
    train_steps = compile_train_steps(setup, make_optimizer(config, schedule), abstract_state)
    if profile:
        train_steps = traced_once(train_steps, setup.run.workdir / "profile")
    eval_step = compile_eval_step(setup) if setup.val_batches else None
    agreement = processes.Agreement(should_stop)

    def save(loss: float | None = None) -> None:
        checkpoints.save(state, progress.checkpoint_metadata(), loss)

    def evaluate() -> None:
        with progress.evaluating():
            params = averaged_params(state.params, state.opt_state)
            metrics: dict[str, Any] = {}
            if eval_step:
                metrics |= validate(setup, eval_step, params, agreement.poll)
            if processes.is_first():
                # Only process 0 samples, so it cannot agree with the others on stopping.
                poll_alone = (lambda: None) if processes.is_shared() else agreement.poll
                metrics |= write_sample(setup, on_one_device(params), step, poll_alone)
            # The record comes first: after a crash between the two, a resume repeats both.
            save(progress.log_evaluation(step, metrics))

    with Progress(setup, step, counters) as progress:
        try:
            if not found and setup.run.initial_weights:
                save()  # so that the run does not need the source any more
            # A stop during an evaluation leaves it to the next start.
            if setup.is_evaluated(step) and counters.needs_evaluation:
                evaluate()
            # A lower patience may be given between two evaluations; it acts after the next one.
            while step < setup.num_steps and (
                not progress.has_stalled or counters.needs_evaluation
            ):
                in_time = agreement.smallest(steps_in_time(setup, progress.seconds_per_step))
                count = steps_of_call(setup, step, in_time)
                state, metrics = train_steps(state, read_batches(setup, step, count), count)
                step += count
                progress.push(step, count, metrics)
                if step == setup.num_steps or step % setup.log_every == 0:
                    progress.log_training(step, schedule)
                if setup.is_evaluated(step):
                    evaluate()
                elif step % setup.save_every == 0:
                    save()
            is_finished = True
            progress.log_end(step)
        except processes.StoppedError:
            is_finished = False
            if step > first_step:
                save()
            logger.info("stopped and saved at step %d; the same command resumes", step)
    # Success means that the final checkpoint can be read.
    latest = checkpoints.latest_step()
    if latest is not None:
        checkpoints.restore(latest, abstract_state)
    return is_finished


def is_finished_already(setup: Setup, step: int, counters: Counters) -> bool:
    """Return, and log, whether nothing is left to do after `step` steps."""
    is_stalled = has_stalled(setup, read_records(setup.run.workdir / "metrics.jsonl", step))
    if counters.needs_evaluation or not (step >= setup.num_steps or is_stalled):
        return False
    by = "" if step >= setup.num_steps else f", by config.patience={setup.run.config.patience}"
    logger.info("finished already, at step %d%s: nothing to do", step, by)
    return True


def initial_state(setup: Setup, init: Callable[..., TrainState], key: jax.Array) -> TrainState:
    """Return the state before the first step, with the weights of config.init_from if it is set.

    Args:
      setup: the run.
      init: as init_sharded returns.
      key: the random key of the run.

    Raises:
      UserError: if the weights cannot be loaded or have changed since the run began.
    """
    if not setup.run.initial_weights:
        return init(key)
    source, state = setup.initial or reload_source(setup.run), init(key)
    params = start_params(source, setup.run, setup.model, to_host(state.params))
    return init(key, params=params)


def max_steps_per_call(setup: Setup) -> int:
    """Return the largest number of steps of a compiled call, all of whose batches are in memory."""
    config = setup.run.config
    in_memory = MAX_CALL_CHARS // (config.batch_size * config.seq_len)
    return max(1, min(MAX_CALL_STEPS, in_memory, setup.log_every, setup.num_steps))


def steps_in_time(setup: Setup, seconds_per_step: float) -> int:
    """Return the number of steps that a compiled call takes in CALL_SECONDS, at least 1."""
    most = max_steps_per_call(setup)
    # The clock may stand still between two calls.
    return max(1, int(min(most, CALL_SECONDS / seconds_per_step))) if seconds_per_step else most


def steps_of_call(setup: Setup, step: int, in_time: int) -> int:
    """Return the number of steps of the compiled call after `step` steps, at most `in_time`.

    The call ends at the latest where a record, an evaluation or a checkpoint is due.
    """
    intervals = (setup.log_every, setup.eval_every, setup.save_every, setup.num_steps)
    return min(in_time, *(interval - step % interval for interval in intervals))


def compile_train_steps(
    setup: Setup, optimizer: optax.GradientTransformation, abstract_state: TrainState
) -> TrainSteps:
    """Return the compiled train_steps(state, batches, count), which donates the state."""
    train_steps = make_train_steps(make_train_step(setup.model, optimizer))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    outputs = shardings, replicated(setup.mesh)
    return jax.jit(train_steps, donate_argnums=0, out_shardings=outputs)


def read_batches(setup: Setup, step: int, count: int) -> Batch:
    """Return the batches of `count` steps after `step` steps, on the devices.

    They have a leading axis S of max_steps_per_call(setup); zeros follow the `count` batches.
    """
    batch_size = setup.batches.batch_size
    rows = local_rows(by_rows(setup.mesh, batch_size), batch_size)
    batches = read_steps(setup.batches, step, count, max_steps_per_call(setup), rows)
    forget_pages(setup.batches.ids_M)
    return put_batch(batches, by_rows(setup.mesh, batch_size, axis=1), batch_size)


def shared_settings(setup: Setup) -> dict[str, Any]:
    """Return what must be equal on all processes; the path of the text may differ."""
    settings = {f"config.{name}": value for name, value in flatten(setup.run.config).items()}
    del settings["config.data.path"]
    weights = setup.run.initial_weights
    settings["the weights of config.init_from"] = weights and weights.sha256
    settings["the kind of random keys"] = setup.run.prng_impl
    return settings | {"the text": setup.run.text.sha256, **this_machine()["versions"]}


def open_folder(setup: Setup, stack: ExitStack) -> None:
    """On process 0, lock the run folder until `stack` is closed, and write config.json."""
    if processes.is_first():
        stack.enter_context(lock_folder(setup.run.workdir))
        write_run(setup.run)


def check_shared(workdir: epath.Path) -> None:
    """Raise UserError if this process does not see the run folder of process 0."""
    if not has_run(workdir):
        raise UserError(
            f"{workdir}: created by process 0, but not visible to this process; use a --workdir "
            "that all processes share, such as a bucket or a network file system"
        )


@contextmanager
def write_errors_reported(workdir: epath.Path) -> Iterator[None]:
    """Turn an OSError within the block into a RunError of one line."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or workdir}: could not be written ({error.strerror or error}); the "
            "last checkpoint is kept: free some space, or repair the folder, and repeat the command"
        ) from error
