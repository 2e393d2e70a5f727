"""Measure a training step on virtual devices; compute and compile it for accelerators."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from charlstm.bench.cases import Case, random_ids
from charlstm.bench.report import table
from charlstm.bench.scaling_picture import draw
from charlstm.data.batches import Batch
from charlstm.model import CharLSTM
from charlstm.parallel.sharding import AXIS, by_rows, init_sharded, replicated
from charlstm.planning import hlo
from charlstm.planning.chips import Chip, step_time
from charlstm.planning.planner import compile_for
from charlstm.steps import make_train_step

CASE = Case("train", 64, 32, hidden_size=128, vocab_size=96)
ROWS_PER_DEVICE = 8  # in weak scaling, on virtual devices
ROWS_PER_CHIP = 256  # in weak scaling, computed
VOCAB_SIZE = 256  # computed
COMPILED_ROWS = (256, 64, 16)  # per chip
MAX_CHIPS = 1024
STEPS = 7  # of which the median is reported


class Result(NamedTuple):
    """Measurements of a training step on some virtual devices."""

    num_devices: int
    batch_size: int
    losses: list[float]
    difference: float  # largest difference of a parameter from that on one device
    work_seconds: float  # all devices together, because they share the cores
    share_seconds: float  # the rows of one device alone, without all-reduce
    all_reduces: int
    in_loops: int  # all-reduces inside loops, which run many times per step


@dataclass(frozen=True)
class Scaling:
    """Results of strong scaling (a fixed batch) and weak scaling (fixed rows per device)."""

    virtual: dict[str, list[dict[str, Any]]]
    computed: dict[str, list[dict[str, Any]]]  # by the formulas of charlstm.planning.chips
    compiled: dict[str, list[dict[str, Any]]]  # by the compiler's estimate of cycles; may be empty
    picture: bytes  # a PNG

    def __str__(self) -> str:
        parts = {f"{name}, virtual devices": rows for name, rows in self.virtual.items()}
        parts |= {f"{name}, computed": rows for name, rows in self.computed.items()}
        parts |= {f"{name}, compiled": rows for name, rows in self.compiled.items()}
        return "\n".join(f"{title}\n{table(rows)}\n" for title, rows in parts.items())


def measure_scaling(
    config: ConfigDict, chip: Chip, num_devices: int, is_compiled: bool = False
) -> Scaling:
    """Measure a small model on up to `num_devices` devices, and compute `config` on more chips.

    JAX must have that many devices; its option jax_num_cpu_devices makes virtual ones. With
    `is_compiled` also compile `config` for a chip, as planning.compile_for does.
    """
    counts = powers_of_two(num_devices)
    virtual = {
        name: [result._asdict() for result in scale(CASE, counts, STEPS, rows)]
        for name, rows in (("strong", None), ("weak", ROWS_PER_DEVICE))
    }
    chips = powers_of_two(MAX_CHIPS)
    computed = compute(config, chip, chips)
    compiled = compile_steps(config, chip, chips) if is_compiled else {}
    about = f"{config.model.num_layers} x {config.model.hidden_size}, T = {config.seq_len}"
    picture = draw(virtual, computed, compiled, f"{about}, {chip.name}")
    return Scaling(virtual, computed, compiled, picture)


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4 ... up to `most`."""
    return [2**power for power in range(most.bit_length())]


def take_steps(case: Case, num_devices: int, num_steps: int, dtype: str) -> tuple[Result, Any]:
    """Train for a few steps; return the measurements and the parameters."""
    model = CharLSTM(
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        num_layers=case.num_layers,
        dtype=dtype,
        dropout_rate=0.1,  # whose masks must not depend on the number of devices
        num_shards=num_devices,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    mesh = Mesh(np.array(jax.devices()[:num_devices]), (AXIS,))
    key = jax.random.key(0)
    abstract_state, init = init_sharded(model, optimizer, key, case.batch_size, mesh)
    state, ids_BT = init(key), random_ids(case)
    weights_BT = np.ones((case.batch_size, case.seq_len), np.float32)
    batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], weights_BT, np.zeros(case.batch_size, bool))
    batch = jax.device_put(batch, by_rows(mesh, case.batch_size))
    outputs = jax.tree.map(lambda leaf: leaf.sharding, abstract_state), replicated(mesh)
    step = jax.jit(make_train_step(model, optimizer), donate_argnums=0, out_shardings=outputs)
    compiled = step.lower(state, batch).compile()
    losses, seconds = [], []
    for _ in range(num_steps):
        begin = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - begin)
    sums = hlo.collectives(hlo.parse(compiled.as_text() or ""))
    number, in_loops = len(sums), sum(one.loops > 0 for one in sums)
    median = statistics.median(seconds)
    result = Result(num_devices, case.batch_size, losses, 0.0, median, median, number, in_loops)
    return result, jax.device_get(state.params)


def scale(
    case: Case,
    counts: Iterable[int],
    num_steps: int,
    rows_per_device: int | None = None,
    dtype: str = "float32",
) -> list[Result]:
    """Train on each number of devices, and compare the parameters with those of one device.

    Args:
      case: the model and the batch that all devices share.
      counts: numbers of devices.
      num_steps: training steps.
      rows_per_device: the batch size per device; None keeps the batch size of `case`.
      dtype: of the products.
    """
    take = cache(partial(take_steps, num_steps=num_steps, dtype=dtype))
    results = []
    for count in counts:
        batch_size = rows_per_device * count if rows_per_device else case.batch_size
        whole = case._replace(batch_size=batch_size)
        result, params = take(whole, count)
        differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, take(whole, 1)[1])
        share, _ = take(case._replace(batch_size=batch_size // count), 1)
        difference = float(max(jax.tree.leaves(differences)))
        results.append(result._replace(difference=difference, share_seconds=share.work_seconds))
    return results


def compute(
    config: ConfigDict, chip: Chip, counts: Iterable[int]
) -> dict[str, list[dict[str, Any]]]:
    """Return the seconds of the parts of a step on each number of chips that has enough rows."""
    scaled = config.copy_and_resolve_references()
    results: dict[str, list[dict[str, Any]]] = {"strong": [], "weak": []}
    for count in counts:
        for name, rows in (("strong", config.batch_size), ("weak", ROWS_PER_CHIP * count)):
            if rows >= count:
                scaled.batch_size = rows
                step = step_time(scaled, VOCAB_SIZE, chip, count)
                rate = rows * config.seq_len / step.total
                about = {"chips": count, "rows": rows, "chars_per_second": rate}
                results[name].append(about | {"total": step.total} | step._asdict())
    return results


def compile_steps(
    config: ConfigDict, chip: Chip, counts: Iterable[int]
) -> dict[str, list[dict[str, Any]]]:
    """Return the seconds of a step by the compiler's estimate, for COMPILED_ROWS per chip.

    The step is compiled for one chip. The all-reduce of several, which has no estimate, is added by
    formula.
    """
    topology = f"{chip.name}:{'x'.join('1' * chip.axes)}"
    seconds = {}
    for rows in COMPILED_ROWS:
        alone = config.copy_and_resolve_references()
        alone.batch_size = rows
        step = compile_for(alone, topology).costs["programs"]["training step"]
        seconds[rows] = step["estimated_cycles"] / chip.clock
    results: dict[str, list[dict[str, Any]]] = {"strong": [], "weak": []}
    for count in counts:
        total = step_time(config, VOCAB_SIZE, chip, count)
        for name, rows in (("strong", config.batch_size / count), ("weak", ROWS_PER_CHIP)):
            if rows in seconds:
                about = {"chips": count, "rows_per_chip": rows}
                results[name].append(about | {"seconds": seconds[rows] + total.all_reduce})
    return results
