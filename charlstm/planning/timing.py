"""What plan.py measures on this machine: the parts of a run, each done briefly as train.py does it.

States and files are made in a folder that the caller removes again.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from etils import epath

from charlstm.data.batches import ALL_ROWS, Batch, Streams, Windows
from charlstm.optim import make_optimizer, make_schedule
from charlstm.parallel.sharding import by_rows, init_sharded, on_one_device
from charlstm.planning import cost
from charlstm.runs.checkpoints import Checkpoints
from charlstm.runs.folder import write_run
from charlstm.runs.metrics import RunLog
from charlstm.steps import TrainState, make_train_step
from charlstm.training.loop import compile_train_steps, read_batches, steps_of_call
from charlstm.training.progress import Counters
from charlstm.training.setup import Setup
from charlstm.training.validation import compile_eval_step, validate, write_sample

MAX_BATCHES = 60  # of an evaluation: enough to time one


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


def estimate(setup: Setup, parts: Parts, loading: float) -> Estimate:
    """Return the seconds of the whole command; `loading` are those before all parts."""
    num_evaluations = -(-setup.num_steps // setup.eval_every)
    num_saves = num_evaluations + (setup.num_steps - 1) // setup.save_every
    each = evaluation_seconds(setup, parts)
    return Estimate(
        start=loading + parts.start,
        steps=setup.num_steps * parts.step,
        evaluations=parts.once + num_evaluations * each,
        checkpoints=num_saves * parts.save + parts.end,
    )


def evaluation_seconds(setup: Setup, parts: Parts) -> float:
    """Return what an evaluation takes, its checkpoint not counted."""
    num_batches = setup.val_batches.steps_per_epoch if setup.val_batches else 0
    return num_batches * parts.batch + parts.sample + parts.draw


def measure_parts(setup: Setup, folder: epath.Path, seconds: float) -> Parts:
    """Return the parts of `setup`, made in `folder`; the steps are timed for `seconds`.

    All is done twice: the first time leaves what is compiled in JAX's cache on disk, where the
    second time, and train.py after it, find it.
    """
    cold = _measure_parts(setup, folder / "cold", 0.0)
    jax.clear_caches()
    warm = _measure_parts(setup, folder / "warm", seconds)
    # The first time is slow also because Matplotlib and Orbax load.
    late = sum(
        max(0.0, getattr(cold, name) - getattr(warm, name)) for name in ("draw", "save", "end")
    )
    return warm._replace(once=warm.once + late)


def _measure_parts(setup: Setup, folder: epath.Path, seconds: float) -> Parts:
    lap = make_clock()
    folder.mkdir()
    write_run(setup.run._replace(workdir=folder))
    with closing(Checkpoints(folder)) as checkpoints, closing(RunLog(folder, 0, "")) as log:
        state, train_steps = begin(setup)
        start = lap()
        state, step = time_steps(setup, state, train_steps, seconds)
        batch, more_for_batch = _time_batch(setup, state)
        sample, more_for_sample = _time_sample(setup, state)
        lap()
        log.write({"step": 0, "seconds": 0.0, "val/bits_per_char": 5.0, "sample": ""})
        log.draw()
        draw = lap()
        checkpoints.save(state, asdict(Counters()), 1.0)
        save = lap()
        checkpoints.restore(int(state.step), state)
        end = lap()
    once = max(0.0, more_for_batch + more_for_sample)
    return Parts(start, step, batch, sample, draw, save, once, end)


def make_clock() -> Any:
    """Return a function that returns the seconds since its last call."""
    then = time.perf_counter()

    def lap() -> float:
        nonlocal then
        before, then = then, time.perf_counter()
        return then - before

    return lap


def time_process() -> float:
    """Return the seconds in which a process starts, loads what train.py loads, and ends."""
    modules = (
        "jax, charlstm.training.loop, ml_collections.config_flags, tensorboardX.event_file_writer"
    )
    # Once it has run something, JAX takes its time to end.
    program = f"import {modules}; jax.jit(lambda x: x)(0.0).block_until_ready()"
    run = partial(subprocess.run, [sys.executable, "-c", program], check=True)
    return min(_seconds_of(run) for _ in range(2))


def begin(setup: Setup) -> tuple[TrainState, Any]:
    """Return the state before the first step, and train_steps compiled, as train.py makes them."""
    config, key = setup.run.config, setup.run.key(setup.run.config.seed)
    optimizer = make_optimizer(config, make_schedule(config, setup.num_steps))
    abstract_state, init = init_sharded(setup.model, optimizer, key, config.batch_size, setup.mesh)
    train_steps = compile_train_steps(setup, optimizer, abstract_state)
    # A call of no steps compiles for any number of them.
    state, _ = train_steps(init(key), read_batches(setup, 0, 1), 0)
    return jax.block_until_ready(state), train_steps


def time_steps(
    setup: Setup, state: TrainState, train_steps: Any, seconds: float
) -> tuple[TrainState, float]:
    """Return the state after about `seconds` of steps, and the mean seconds of a step.

    In calls such as train.py makes, and like it reading what a call gave while the next one runs.
    The mean, not the median, because a run is also slowed by other processes at times.
    """
    calls: list[tuple[float, int]] = []
    before: tuple[Any, int] | None = None
    step, count = 0, 1
    lap, end = make_clock(), time.perf_counter() + seconds
    while len(calls) < 2 or time.perf_counter() < end:
        state, metrics = train_steps(state, read_batches(setup, step, count), count)
        if before:
            before[0]["loss"].tolist()
            calls.append((lap(), before[1]))
        before, step = (metrics, count), step + count
        if calls:
            count = steps_of_call(setup, step, calls[-1][0] / calls[-1][1])
    # But for the first one, which has waited for threads to wake.
    spent, steps = (sum(column) for column in zip(*calls[1:], strict=True))
    return jax.block_until_ready(state), spent / steps


@dataclass(frozen=True)
class LastBatches:
    """The last few of an evaluation's batches; the first ones may be context alone."""

    batches: Streams | Windows
    steps_per_epoch: int

    @property
    def batch_size(self) -> int:
        """B."""
        return self.batches.batch_size

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Batch:
        """Return one of them."""
        return self.batches(self.batches.steps_per_epoch - self.steps_per_epoch + step, rows)


def _time_batch(setup: Setup, state: TrainState) -> tuple[float, float]:
    """Return the seconds of an evaluation's batch, and how many more all took at first."""
    if setup.val_batches is None:
        return 0.0, 0.0
    few = LastBatches(setup.val_batches, min(setup.val_batches.steps_per_epoch, MAX_BATCHES))
    few_job = setup._replace(val_batches=few)  # type: ignore[arg-type]
    eval_step = compile_eval_step(few_job)
    call = partial(validate, few_job, eval_step, state.params, lambda: None)
    first, again = (_seconds_of(call) for _ in range(2))
    return again / few.steps_per_epoch, first - again


def _time_sample(setup: Setup, state: TrainState) -> tuple[float, float]:
    """Return the seconds of a sample, and how many more the first one took."""
    params = on_one_device(state.params)
    write = partial(write_sample, setup, params, 0, lambda: None)
    first, again = (_seconds_of(write) for _ in range(2))
    return again, first - again


def _seconds_of(call: Callable[[], Any]) -> float:
    lap = make_clock()
    call()
    return lap()


def step_bytes(setup: Setup, batch_size: int) -> int:
    """Return the bytes of a device in a step of `batch_size` rows, by XLA or estimated.

    The step is compiled and not run.
    """
    config = setup.run.config
    optimizer = make_optimizer(config, make_schedule(config, setup.num_steps))
    place = by_rows(setup.mesh, batch_size)
    ids, weights, reset = (
        jax.ShapeDtypeStruct((batch_size, config.seq_len)[:rank], dtype, sharding=place)
        for rank, dtype in ((2, "int32"), (2, "float32"), (1, "bool"))
    )
    train_step = jax.jit(make_train_step(setup.model, optimizer), donate_argnums=0)
    batch = Batch(ids, ids, weights, reset)
    key = setup.run.key(config.seed)
    abstract_state, _ = init_sharded(setup.model, optimizer, key, batch_size, setup.mesh)
    used = train_step.lower(abstract_state, batch).compile().memory_analysis()
    if used is None:
        return cost.device_bytes(config, setup.model.vocab_size, setup.mesh.size)
    new = used.output_size_in_bytes - used.alias_size_in_bytes
    return used.argument_size_in_bytes + used.temp_size_in_bytes + new


def rows_on_paper(setup: Setup, memory: float) -> int:
    """Return how many rows fit into `memory` of each device by planning.cost, as many on each."""
    config, vocab_size = setup.run.config, setup.model.vocab_size
    whole = cost.state_bytes(config, vocab_size) + cost.gradient_bytes(config, vocab_size)
    return setup.mesh.size * int((memory - whole) / cost.activation_bytes(config, vocab_size, 1))


def largest_batch(small: tuple[int, int], large: tuple[int, int], memory: float) -> int:
    """Return how many rows fit into `memory`, by the line through two (rows, bytes)."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    rows = (memory - small[1]) / slope + small[0]
    return max(0, int(rows))
