"""Memory of a compiled training step, and the largest batch that fits."""

import math
from collections.abc import Callable
from typing import Any

import jax

from charlstm.data.batches import Batch
from charlstm.optim import make_optimizer, make_schedule
from charlstm.parallel.sharding import by_rows, init_sharded
from charlstm.planning import cost
from charlstm.runs.machine import memory_bytes
from charlstm.steps import make_train_step
from charlstm.training.setup import Setup

ROW_FACTOR = 4  # at least, between the two batch sizes that are compiled
PROCESS_BYTES = 500 * 2**20  # of Python and its modules, which XLA does not count
MEMORY_SHARE = 0.9  # because processes take more memory than XLA counts


def memory_costs(setup: Setup) -> dict[str, Any]:
    """Return the bytes of a step as XLA compiles it, and the largest batch that fits."""
    batch_size = setup.run.config.batch_size
    available = memory_bytes()
    if jax.default_backend() == "cpu":
        available /= len(setup.mesh.local_devices)  # which share the memory of the machine
    usable = MEMORY_SHARE * available - PROCESS_BYTES
    # The larger size is near the answer, because XLA compiles small batches to other programs.
    larger = max(ROW_FACTOR * batch_size, rows_by_formula(setup, usable))
    points = [(rows, step_bytes(setup, rows)) for rows in (batch_size, larger)]
    return {
        "compiled_step_bytes": points[0][1],
        "memory_bytes": available,
        "largest_batch": largest_batch(points[0], points[1], usable),
    }


def step_bytes(setup: Setup, batch_size: int) -> int:
    """Return the bytes per device of a step with B = `batch_size`, compiled but not executed.

    By XLA, or by formula on a device for which XLA does not report them.
    """
    config = setup.run.config
    optimizer = make_optimizer(config, make_schedule(config, setup.num_steps))
    key = setup.run.key(config.seed)
    abstract_state, _ = init_sharded(setup.model, optimizer, key, batch_size, setup.mesh)
    train_step = jax.jit(make_train_step(setup.model, optimizer), donate_argnums=0)
    compiled = train_step.lower(abstract_state, abstract_batch(setup, batch_size)).compile()
    used = compiled.memory_analysis()
    if used is None:
        return cost.device_bytes(config, setup.model.vocab_size, setup.mesh.size)
    new = used.output_size_in_bytes - used.alias_size_in_bytes
    return used.argument_size_in_bytes + used.temp_size_in_bytes + new


def abstract_batch(setup: Setup, batch_size: int, num_steps: int | None = None) -> Batch:
    """Return the shapes of a batch of B = `batch_size` rows, or of S = `num_steps` batches."""
    steps = () if num_steps is None else (num_steps,)
    sharding = by_rows(setup.mesh, batch_size, axis=len(steps))
    shape = batch_size, setup.run.config.seq_len
    ids, weights, reset = (
        jax.ShapeDtypeStruct((*steps, *shape[:rank]), dtype, sharding=sharding)
        for rank, dtype in ((2, "int32"), (2, "float32"), (1, "bool"))
    )
    return Batch(ids, ids, weights, reset)


def rows_by_formula(setup: Setup, usable: float) -> int:
    """Return how many rows fit if each device has `usable` bytes, by the formulas of cost."""
    config, vocab_size = setup.run.config, setup.model.vocab_size
    fixed = cost.state_bytes(config, vocab_size) + cost.gradient_bytes(config, vocab_size)
    return setup.mesh.size * int((usable - fixed) / cost.activation_bytes(config, vocab_size, 1))


def largest_batch(small: tuple[int, int], large: tuple[int, int], usable: float) -> int:
    """Return how many rows fit into `usable` bytes, on the line through two (rows, bytes)."""
    return max(0, int(rows_on_line(small, large, usable)))


def rows_on_line(point: tuple[int, float], other: tuple[int, float], num_bytes: float) -> float:
    """Return the rows that take `num_bytes` on the line through two (rows, bytes)."""
    slope = (other[1] - point[1]) / (other[0] - point[0])
    return (num_bytes - point[1]) / slope + point[0]


def find_largest(
    needed: Callable[[int], float], available: float, first: int
) -> tuple[int, int | float]:
    """Return the largest number of rows that was found to fit, and the smallest that was not.

    They differ by at most a sixteenth, or by 1.

    Args:
      needed: returns the bytes for a number of rows, in a short or long time.
      available: bytes.
      first: the number of rows to try first, at least 1.
    """
    tried: dict[int, float] = {}
    fits, refused, rows = 0, math.inf, first
    while True:
        tried[rows] = needed(rows)
        if tried[rows] <= available:
            fits = rows
        else:
            refused = rows
        step = 2 ** max(0, fits.bit_length() - 5)
        if refused - fits <= step:
            return fits, refused
        guess = _extrapolate(tried, available)
        if refused < math.inf and len(tried) % 2 == 0:
            guess = (fits + refused) / 2  # in case the bytes are far from a line
        guess = min(int(guess), 16 * max(tried)) // step * step  # memory may grow little at first
        rows = int(min(max(guess, fits + step), refused - step))


def _extrapolate(tried: dict[int, float], available: float) -> float:
    """Return the rows that fill `available` bytes on the line through the two nearest points."""
    points = sorted(tried.items(), key=lambda point: abs(point[1] - available))
    nearest, other = points[0], points[1] if points[1:] else (0, 0.0)
    if nearest[1] == other[1]:
        return 4 * max(tried)
    return rows_on_line(nearest, other, available)
