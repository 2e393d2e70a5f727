"""A training step on virtual devices: what it gives and takes, and how often they must meet."""

import re
import statistics
import time
from collections.abc import Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from charlstm.data.batches import Batch
from charlstm.model import CharLSTM
from charlstm.parallel.sharding import AXIS, by_rows, init_sharded, replicated
from charlstm.steps import make_train_step


class Case(NamedTuple):
    """A model and a batch."""

    batch_size: int
    seq_len: int
    hidden_size: int
    vocab_size: int
    num_layers: int
    dtype: str = "float32"


class Outcome(NamedTuple):
    """What a few steps on some devices gave."""

    num_devices: int
    batch_size: int
    losses: list[float]
    difference: float  # the largest of a parameter from one device's
    work_seconds: float  # a step of all devices, whose work the machine's cores do in turn
    share_seconds: float  # a step of one device's rows alone: what it takes but for the all-reduce
    all_reduces: int
    in_loops: int  # of these, how many are in a loop, and so done many times a step


def random_batch(case: Case) -> Batch:
    """Return the characters that all devices together get."""
    shape = case.batch_size, case.seq_len + 1
    ids = np.random.default_rng(0).integers(case.vocab_size, size=shape, dtype=np.int32)
    weights = np.ones((case.batch_size, case.seq_len), np.float32)
    return Batch(ids[:, :-1], ids[:, 1:], weights, np.zeros(case.batch_size, bool))


def take_steps(case: Case, num_devices: int, num_steps: int) -> tuple[Outcome, Any]:
    """Return what so many steps on so many devices give, and the parameters after them."""
    model = CharLSTM(
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        num_layers=case.num_layers,
        dtype=case.dtype,
        dropout_rate=0.1,  # whose masks must be the same on all devices as on one
        num_shards=num_devices,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    mesh = Mesh(np.array(jax.devices()[:num_devices]), (AXIS,))
    key = jax.random.key(0)
    abstract_state, init = init_sharded(model, optimizer, key, case.batch_size, mesh)
    state = init(key)
    batch = jax.device_put(random_batch(case), by_rows(mesh, case.batch_size))
    outputs = jax.tree.map(lambda leaf: leaf.sharding, abstract_state), replicated(mesh)
    step = jax.jit(make_train_step(model, optimizer), donate_argnums=0, out_shardings=outputs)
    compiled = step.lower(state, batch).compile()
    losses, seconds = [], []
    for _ in range(num_steps):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    number, in_loops = count_all_reduces(compiled.as_text() or "")
    median = statistics.median(seconds)
    outcome = Outcome(num_devices, case.batch_size, losses, 0.0, median, median, number, in_loops)
    return outcome, jax.device_get(state.params)


def scale(
    case: Case, counts: Iterable[int], num_steps: int, rows_each: int | None = None
) -> list[Outcome]:
    """Return what steps on each number of devices give, compared with one device's.

    Args:
      case: the model, and the batch that all devices share.
      counts: the numbers of devices.
      num_steps: how many steps.
      rows_each: the rows of each device, so that the batch grows with them; None: a fixed batch.
    """
    take = cache(partial(take_steps, num_steps=num_steps))
    outcomes = []
    for count in counts:
        here = case if rows_each is None else case._replace(batch_size=rows_each * count)
        share = here._replace(batch_size=here.batch_size // count)
        outcome, params = take(here, count)
        differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, take(here, 1)[1])
        outcomes.append(
            outcome._replace(
                difference=float(max(jax.tree.leaves(differences))),
                share_seconds=take(share, 1)[0].work_seconds,
            )
        )
    return outcomes


def count_all_reduces(hlo: str) -> tuple[int, int]:
    """Return how many all-reduces a compiled program has, and how many of them are in loops."""
    bodies = set(re.findall(r"\bbody=%?([\w.\-]+)", hlo))
    name, number, in_loops = "", 0, 0
    for line in hlo.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = begins[1]
        elif re.search(r"= .*\ball-reduce(-start)?\(", line):
            number += 1
            in_loops += name in bodies
    return number, in_loops
