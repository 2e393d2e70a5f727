"""What plan.py measures on this machine: the parts of a run, each done briefly as train.py does it.

States and files are made in a folder that the caller removes again.
"""

import statistics
import time
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import jax
from etils import epath

from charlstm import cost
from charlstm.assess import make_assessment
from charlstm.checkpoint import Checkpoints, state_shapes
from charlstm.data import Batch, read_steps
from charlstm.job import Job
from charlstm.journal import CALL_SECONDS, Notes
from charlstm.log import RunLog
from charlstm.model import zero_carry
from charlstm.optim import make_optimizer, make_schedule
from charlstm.run import write_run
from charlstm.steps import (
    TrainState,
    evaluate,
    init_state,
    make_eval_step,
    make_train_step,
    make_train_steps,
)

MAX_BATCHES = 20  # of an evaluation: enough to time one


class Parts(NamedTuple):
    """The seconds of the parts of a run."""

    start: float  # folder, initial state, log; what an earlier start compiled is read again
    step: float
    batch: float  # of an evaluation
    sample: float
    draw: float  # metrics.jsonl, samples.txt, curves.png
    save: float
    once: float  # what the first evaluation takes beyond the others
    end: float  # the last checkpoint read back


class Estimate(NamedTuple):
    """The seconds of a whole command, by what they are spent on."""

    start: float
    steps: float
    evaluations: float
    checkpoints: float

    @property
    def total(self) -> float:
        """The seconds of the command."""
        return sum(self)


def estimate(job: Job, parts: Parts, loading: float) -> Estimate:
    """Return what the whole command takes, of which `loading` comes before all parts."""
    num_evaluations = -(-job.num_steps // job.eval_every)
    num_saves = num_evaluations + (job.num_steps - 1) // job.save_every
    each = evaluation_seconds(job, parts)
    return Estimate(
        start=loading + parts.start,
        steps=job.num_steps * parts.step,
        evaluations=parts.once + num_evaluations * each,
        checkpoints=num_saves * parts.save + parts.end,
    )


def evaluation_seconds(job: Job, parts: Parts) -> float:
    """Return what an evaluation takes, its checkpoint not counted."""
    num_batches = job.val_batches.steps_per_epoch if job.val_batches else 0
    return num_batches * parts.batch + parts.sample + parts.draw


def rehearse(job: Job, folder: epath.Path, seconds: float) -> Parts:
    """Return the parts of `job`, made in `folder`; the steps are timed for `seconds`.

    All is done twice: the first time leaves what is compiled in JAX's cache on disk, where the
    second time, and train.py after it, find it.
    """
    cold = _rehearse(job, folder / "cold", 0.0)
    jax.clear_caches()
    warm = _rehearse(job, folder / "warm", seconds)
    # Not all that is slow the first time is compilation: Matplotlib and Orbax begin slowly.
    late = max(0.0, cold.draw - warm.draw) + max(0.0, cold.save - warm.save)
    return warm._replace(once=warm.once + late)


def _rehearse(job: Job, folder: epath.Path, seconds: float) -> Parts:
    lap = make_clock()
    folder.mkdir()
    like = state_shapes(job.run.config, job.model)
    write_run(job.run._replace(workdir=folder))
    with closing(Checkpoints(folder)) as checkpoints, closing(RunLog(folder, 0, "")) as log:
        state, train_steps = begin(job)
        start = lap()
        state, step = time_steps(job, state, train_steps, seconds)
        batch, first_batch = _time_batch(job, state)
        sample, first_sample = _time_sample(job, state)
        lap()
        log.write({"step": 0, "seconds": 0.0, "val/bits_per_char": 5.0, "sample": ""})
        log.draw()
        draw = lap()
        checkpoints.save(state, asdict(Notes()), 1.0)
        save = lap()
        checkpoints.restore(int(state.step), like)
        end = lap()
    once = first_batch - batch + first_sample - sample
    return Parts(start, step, batch, sample, draw, save, max(0.0, once), end)


def make_clock() -> Any:
    """Return a function that tells the seconds since it was asked before."""
    then = time.perf_counter()

    def lap() -> float:
        nonlocal then
        before, then = then, time.perf_counter()
        return then - before

    return lap


def begin(job: Job) -> tuple[TrainState, Any]:
    """Return the state before the first step, and train_steps compiled, as train.py makes them."""
    config = job.run.config
    optimizer = make_optimizer(config, make_schedule(config, job.num_steps))
    make_state = partial(init_state, job.model, optimizer, batch_size=config.batch_size)
    state = jax.jit(make_state)(jax.random.key(config.seed))
    train_step = make_train_step(job.model, optimizer)
    train_steps = jax.jit(make_train_steps(train_step), donate_argnums=0)
    # A call of no steps compiles for any number of them.
    state, _ = train_steps(state, read_steps(job.batches, 0, 1, job.max_count), 0)
    return jax.block_until_ready(state), train_steps


def time_steps(
    job: Job, state: TrainState, train_steps: Any, seconds: float
) -> tuple[TrainState, float]:
    """Return the state after about `seconds` of steps, and the median seconds of a step.

    In calls such as train.py makes, and like it reading what a call gave while the next one runs.
    """
    calls: list[float] = []
    before: tuple[Any, int] | None = None
    step, count = 0, 1
    lap, end = make_clock(), time.perf_counter() + seconds
    while len(calls) < 2 or time.perf_counter() < end:
        batches = read_steps(job.batches, step, count, job.max_count)
        state, metrics = train_steps(state, batches, count)
        if before:
            before[0]["loss"].tolist()
            calls.append(lap() / before[1])
        before, step = (metrics, count), step + count
        if calls:
            count = max(1, min(int(CALL_SECONDS / calls[-1]), job.max_count))
    # The first one has waited for a thread or two to wake.
    return jax.block_until_ready(state), statistics.median(calls[1:])


def _time_batch(job: Job, state: TrainState) -> tuple[float, float]:
    """Return the seconds that a batch of an evaluation takes, and that the first one took."""
    if job.val_batches is None:
        return 0.0, 0.0
    eval_step = jax.jit(make_eval_step(job.model))
    carry = zero_carry(job.model, job.val_batches.batch_size)
    lap = make_clock()
    # The last ones, since the first one may be context alone.
    end = job.val_batches.steps_per_epoch
    evaluate(eval_step, state.params, carry, [job.val_batches(end - 1)])
    first = lap()
    count = min(end, MAX_BATCHES)
    evaluate(eval_step, state.params, carry, map(job.val_batches, range(end - count, end)))
    return lap() / count, first


def _time_sample(job: Job, state: TrainState) -> tuple[float, float]:
    """Return the seconds that an evaluation's sample takes, and that the first one took."""
    assess = make_assessment(job._replace(val_batches=None), should_stop=lambda: False)
    lap = make_clock()
    for step in range(2):
        assess(state.params, step)
        seconds = lap()
        if step == 0:
            first = seconds
    return seconds, first


def step_bytes(job: Job, batch_size: int) -> int:
    """Return what a training step of `batch_size` rows holds, by XLA where it tells, or on paper.

    It is compiled and not run.
    """
    config = job.run.config
    optimizer = make_optimizer(config, make_schedule(config, job.num_steps))
    make_state = partial(init_state, job.model, optimizer, batch_size=batch_size)
    state = jax.eval_shape(make_state, jax.random.key(0))
    ids, weights, reset = (
        jax.ShapeDtypeStruct((batch_size, config.seq_len)[:rank], dtype)
        for rank, dtype in ((2, "int32"), (2, "float32"), (1, "bool"))
    )
    train_step = jax.jit(make_train_step(job.model, optimizer), donate_argnums=0)
    compiled = train_step.lower(state, Batch(ids, ids, weights, reset)).compile()
    used = compiled.memory_analysis()
    if used is None:
        return cost.device_bytes(config, job.model.vocab_size, 1)
    new = used.output_size_in_bytes - used.alias_size_in_bytes
    return used.argument_size_in_bytes + used.temp_size_in_bytes + new


def largest_batch(small: tuple[int, int], large: tuple[int, int], memory: float) -> int:
    """Return how many rows fit into `memory`, by the line through two (rows, bytes)."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    rows = (memory - small[1]) / slope + small[0]
    return max(0, int(rows))
