"""Measure the stages of a run on this machine, each executed briefly as train.py does it."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import jax
from etils import epath

from charlstm.optim import make_optimizer, make_schedule
from charlstm.parallel.sharding import init_sharded, on_one_device
from charlstm.runs.checkpoints import Checkpoints
from charlstm.runs.folder import write_run
from charlstm.runs.metrics import RunLog
from charlstm.steps import TrainState, TrainSteps
from charlstm.training.loop import compile_train_steps, read_batches, steps_in_time, steps_of_call
from charlstm.training.progress import Counters
from charlstm.training.setup import Setup
from charlstm.training.validation import compile_eval_step, validate, write_sample

MAX_EVAL_BATCHES = 60  # enough to time one


class StageTimes(NamedTuple):
    """Seconds of the stages of a run whose programs are in the compilation cache."""

    start: float  # run folder, initial state, log
    step: float
    eval_batch: float
    sample: float
    write_log: float  # metrics.jsonl, samples.txt, curves.png
    save: float
    first_evaluation: float  # what the first evaluation takes beyond the others
    restore: float  # of the last checkpoint, which is read back at the end


class CommandTimes(NamedTuple):
    """Seconds of a whole command, by what they are spent on."""

    start: float
    steps: float
    evaluations: float
    checkpoints: float

    @property
    def total(self) -> float:
        """Seconds of the command."""
        return sum(self)


def command_times(setup: Setup, stages: StageTimes, loading: float) -> CommandTimes:
    """Return the times of the whole command, whose imports and text take `loading` seconds."""
    num_evaluations = -(-setup.num_steps // setup.eval_every)
    num_saves = num_evaluations + (setup.num_steps - 1) // setup.save_every
    evaluations = num_evaluations * evaluation_seconds(setup, stages)
    return CommandTimes(
        start=loading + stages.start,
        steps=setup.num_steps * stages.step,
        evaluations=stages.first_evaluation + evaluations,
        checkpoints=num_saves * stages.save + stages.restore,
    )


def evaluation_seconds(setup: Setup, stages: StageTimes) -> float:
    """Return the seconds of an evaluation, without its checkpoint."""
    num_batches = setup.val_batches.steps_per_epoch if setup.val_batches else 0
    return num_batches * stages.eval_batch + stages.sample + stages.write_log


def measure_stages(setup: Setup, folder: epath.Path, seconds: float) -> StageTimes:
    """Execute each stage of a run in `folder`, and training steps for `seconds`.

    Everything is executed twice. The first time fills JAX's compilation cache on disk, which the
    second time and a later train.py use.
    """
    cold = _measure_stages(setup, folder / "cold", 0.0)
    jax.clear_caches()
    warm = _measure_stages(setup, folder / "warm", seconds)
    # The first time also imports Matplotlib and Orbax, as the first evaluation of a run does.
    names = ("write_log", "save", "restore")
    imports = sum(max(0.0, getattr(cold, name) - getattr(warm, name)) for name in names)
    return warm._replace(first_evaluation=warm.first_evaluation + imports)


def _measure_stages(setup: Setup, folder: epath.Path, seconds: float) -> StageTimes:
    begin = time.perf_counter()
    folder.mkdir()
    write_run(setup.run._replace(workdir=folder))
    with closing(Checkpoints(folder)) as checkpoints, closing(RunLog(folder, 0, "")) as log:
        state, train_steps = start_training(setup)
        start = time.perf_counter() - begin
        state, step = time_steps(setup, state, train_steps, seconds)
        eval_batch, extra_eval = _time_eval_batch(setup, state.params)
        params = on_one_device(state.params)
        sample, extra_sample = _time_twice(partial(write_sample, setup, params, 0, lambda: None))

        def write_log() -> None:
            log.write({"step": 0, "seconds": 0.0, "val/bits_per_char": 5.0, "sample": ""})
            log.draw()

        return StageTimes(
            start=start,
            step=step,
            eval_batch=eval_batch,
            sample=sample,
            write_log=elapsed(write_log),
            save=elapsed(partial(checkpoints.save, state, asdict(Counters()), 1.0)),
            first_evaluation=max(0.0, extra_eval + extra_sample),
            restore=elapsed(partial(checkpoints.restore, int(state.step), state)),
        )


def process_seconds() -> float:
    """Return the seconds in which a process starts, imports what train.py imports, and ends."""
    modules = (
        "jax, charlstm.training.loop, ml_collections.config_flags, tensorboardX.event_file_writer"
    )
    # JAX also takes time to end once it has computed something.
    program = f"import {modules}; jax.jit(lambda x: x)(0.0).block_until_ready()"
    run = partial(subprocess.run, [sys.executable, "-c", program], check=True)
    return min(elapsed(run) for _ in range(2))


def start_training(setup: Setup) -> tuple[TrainState, TrainSteps]:
    """Return the initial state and the compiled train_steps of train.py."""
    config, key = setup.run.config, setup.run.key(setup.run.config.seed)
    optimizer = make_optimizer(config, make_schedule(config, setup.num_steps))
    abstract_state, init = init_sharded(setup.model, optimizer, key, config.batch_size, setup.mesh)
    train_steps = compile_train_steps(setup, optimizer, abstract_state)
    # A call with no steps compiles for any number of steps.
    state, _ = train_steps(init(key), read_batches(setup, 0, 1), 0)
    return jax.block_until_ready(state), train_steps


def time_steps(
    setup: Setup, state: TrainState, train_steps: TrainSteps, seconds: float
) -> tuple[TrainState, float]:
    """Train for about `seconds`; return the state and the mean seconds of a step.

    As in train.py, the metrics of a call are read while the next one runs. The mean, not the
    median, because a run is also slowed by other processes at times.
    """
    calls: list[tuple[float, int]] = []  # seconds and steps of each finished call
    pending: tuple[Any, int] | None = None
    step, count = 0, 1
    before = time.perf_counter()
    end = before + seconds
    while len(calls) < 2 or before < end:
        state, metrics = train_steps(state, read_batches(setup, step, count), count)
        step += count
        if pending:
            pending[0]["loss"].tolist()  # waits for the call
            now = time.perf_counter()
            calls.append((now - before, pending[1]))
            before = now
        pending = metrics, count
        if calls:
            in_time = steps_in_time(setup, calls[-1][0] / calls[-1][1])
            count = steps_of_call(setup, step, in_time)
    # Without the first call, which also waits for threads to wake.
    total, num_steps = (sum(column) for column in zip(*calls[1:], strict=True))
    return jax.block_until_ready(state), total / num_steps


def _time_eval_batch(setup: Setup, params: Any) -> tuple[float, float]:
    """Return the seconds of an evaluation batch, and how many more the first evaluation takes."""
    if setup.val_batches is None:
        return 0.0, 0.0
    num_batches = min(setup.val_batches.steps_per_epoch, MAX_EVAL_BATCHES)
    eval_step = compile_eval_step(setup)
    evaluate = partial(validate, setup, eval_step, params, lambda: None, num_batches)
    seconds, extra = _time_twice(evaluate)
    return seconds / num_batches, extra


def _time_twice(function: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of the second call, and how many more the first one takes."""
    first, second = elapsed(function), elapsed(function)
    return second, first - second


def elapsed(function: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
