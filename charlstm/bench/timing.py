"""Time backends in interleaved rounds, each in a process of its own.

Frameworks in one process would compete for threads and devices, and peak memory is measured per
process. The rounds alternate between backends, so that a slow phase of the machine affects all.
"""

import importlib
import logging
import math
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np

from charlstm.bench.cases import Call, Case, timed
from charlstm.cli.runtime import keep_memory
from charlstm.errors import one_line

logger = logging.getLogger("charlstm.bench")

BASELINES = ("torch", "keras")
LIMIT = "matmul"  # the backend whose rate gives the time limit of a training step


class Timing(NamedTuple):
    """Measurements of one backend on one case."""

    value: float  # what a call returns
    seconds: tuple[float, ...]  # of one call, by round
    peak_bytes: int


# --- in the process of a backend ---

_call: Call
_calls_per_round = 1


def start(name: str, environment: dict[str, str]) -> None:
    """Set up the process of the backend `name`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, then this process
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.dup2(2, 1)  # what libraries print must not mix with the tables
    os.environ.update({"KERAS_BACKEND": "jax"} | os.environ | environment)
    if name not in BASELINES:
        keep_memory()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(1)


def call(function: str, *arguments: Any) -> Any:
    """Import and call a function of charlstm.bench, named as 'module.function'."""
    module, _, name = function.partition(".")
    return getattr(importlib.import_module(f"charlstm.bench.{module}"), name)(*arguments)


def build(name: str, case: Case) -> float:
    """Build the work of `case`, do it once, and return its value."""
    global _call
    module = name if name in BASELINES else "jax"
    _call = call(f"{module}_backend.build", name, case)
    return _call()


def calibrate(name: str, round_seconds: float) -> None:
    """Warm up, and set the number of calls that take `round_seconds`."""
    global _calls_per_round
    if name == "torch":
        call("torch_backend.use_fastest_threads", _call)
    fastest = min(timed(_call) for _ in range(3))
    _calls_per_round = max(1, math.ceil(round_seconds / fastest))


def time_round() -> float:
    """Return the mean seconds of a call in one round."""
    begin = time.perf_counter()
    for _ in range(_calls_per_round):
        _call()
    return (time.perf_counter() - begin) / _calls_per_round


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    return max_rss(resource.getrusage(resource.RUSAGE_SELF))


def max_rss(usage: resource.struct_rusage) -> int:
    """Return ru_maxrss in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- in the parent ---


@contextmanager
def open_processes(names: Iterable[str], **environment: str) -> Iterator[dict[str, Executor]]:
    """Yield a process for each backend, with `environment` added to its variables."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {
            name: ProcessPoolExecutor(1, context, start, (name, environment)) for name in names
        }
        yield {name: stack.enter_context(pool) for name, pool in pools.items()}


def time_interleaved(
    processes: Mapping[str, Executor], case: Case, rounds: int, round_seconds: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time all backends on `case`; a backend that fails does not stop the others.

    Args:
      processes: one for each backend.
      case: the work.
      rounds: number of measurements of each backend.
      round_seconds: least duration of a measurement, which has at least one call.

    Returns:
      The timings of the backends that worked, and the errors of the others.
    """
    values: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    errors: dict[str, str] = {}

    def run(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return None if name in errors else processes[name].submit(function, *arguments).result()
        except Exception as error:
            errors[name] = one_line(f"{type(error).__name__}: {error}")
            logger.warning("%s failed: %s", name, errors[name])

    def run_build(name: str) -> None:
        values[name] = run(name, build, name, case)

    with ThreadPoolExecutor() as threads:
        list(threads.map(run_build, processes))  # in parallel, because nothing is timed yet
    for name in processes:
        run(name, calibrate, name, round_seconds)
    order = list(processes)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(run(name, time_round))
        order.reverse()  # no backend always follows the same one
    peaks = {name: run(name, peak_bytes) for name in processes}
    working = [name for name in processes if name not in errors]
    timings = {name: Timing(values[name], tuple(seconds[name]), peaks[name]) for name in working}
    return timings, errors


# --- statistics ---


def product_flops(case: Case) -> float:
    """Return the floating-point operations of the matrix products in a training step.

    Each layer computes gates from the hidden state, each but the first also gates from the layer
    below; the dense layer follows. Each product is computed once forward and twice backward, for
    the gradients of the input and of the kernel. One-hot inputs need no product.
    """
    rows, hidden_size = case.batch_size * case.seq_len, case.hidden_size
    gates = 2 * rows * hidden_size * 4 * hidden_size
    dense = 2 * rows * hidden_size * case.vocab_size
    return 3.0 * ((2 * case.num_layers - 1) * gates + dense)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over rounds of the ratio within a round."""
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


def summarize(
    timings: Mapping[str, Timing], errors: Mapping[str, str], case: Case
) -> dict[str, Any]:
    """Return the measurements of one case in the format of bench.json."""
    timings = dict(timings)
    if LIMIT in timings:
        product = timings[LIMIT]  # one large product
        scale = product_flops(case) / product.value
        timings[LIMIT] = product._replace(seconds=tuple(scale * s for s in product.seconds))
    results: dict[str, Any] = {}
    for name, timing in timings.items():
        low, median, high = np.quantile(timing.seconds, (0.25, 0.5, 0.75)).tolist()
        results[name] = timing._asdict() | {
            "median_seconds": median,
            "quartile_seconds": [low, high],
            "characters_per_second": case.characters / median,
        }
        if "charlstm" in timings:
            ratio = median_ratio(timing.seconds, timings["charlstm"].seconds)
            results[name]["time_over_ours"] = ratio
        if LIMIT in timings:
            share = median_ratio(timings[LIMIT].seconds, timing.seconds)
            results[name]["share_of_limit"] = share
    results |= {name: {"error": error} for name, error in errors.items()}
    return {"case": case._asdict() | {"characters": case.characters}, "results": results}
