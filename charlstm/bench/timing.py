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
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from charlstm.bench.cases import Call, Case, timed
from charlstm.cli.runtime import keep_memory
from charlstm.errors import UserError, one_line

logger = logging.getLogger("charlstm.bench")

Processes = Mapping[str, Executor]  # by the name of the backend
BASELINES = ("torch", "keras")
DEFAULT_RECURRENCE = "jax_backend.default_recurrence"  # for call


# In the process of a backend:
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
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def call(function: str, *arguments: Any) -> Any:
    """Import and call a function of charlstm.bench, named as 'module.function'."""
    module, _, name = function.partition(".")
    return getattr(importlib.import_module(f"charlstm.bench.{module}"), name)(*arguments)


def build(name: str, case: Case) -> float:
    """Build the work of `case`, do it once, and return its value."""
    global _call
    _call = call(f"{name if name in BASELINES else 'jax'}_backend.build", name, case)
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
    return timed(_call, _calls_per_round)


def peak_mib(who: int = resource.RUSAGE_SELF) -> float:
    """Return the peak memory of this process, or of the largest of its ended children."""
    return resource.getrusage(who).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def open_processes(names: Iterable[str], **environment: str) -> Iterator[dict[str, Executor]]:
    """Yield a process for each backend, with `environment` added to its variables."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {n: ProcessPoolExecutor(1, context, start, (n, environment)) for n in names}
        yield {name: stack.enter_context(pool) for name, pool in pools.items()}


def try_run(
    name: str, process: Executor, function: Callable[..., Any], *arguments: Any
) -> tuple[Any, str]:
    """Run a function in a process; return its result and '', or None and what it raised.

    A UserError, such as for a text that cannot be read, is raised here.
    """
    try:
        return process.submit(function, *arguments).result(), ""
    except UserError:
        raise
    except Exception as error:
        message = one_line(f"{type(error).__name__}: {error}")
        logger.warning("%s failed: %s", name, message)
        return None, message


def time_interleaved(
    processes: Processes, case: Case, rounds: int, round_seconds: float
) -> list[dict[str, Any]]:
    """Return a result of each backend on `case`; one that fails does not stop the others.

    Each of the `rounds` lasts about `round_seconds` per backend, and has at least one call.
    """
    logger.info("%s", case)
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    errors: dict[str, str] = {}

    def run(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        if name in errors:
            return None
        result, error = try_run(name, processes[name], function, *arguments)
        if error:
            errors[name] = error
        return result

    with ThreadPoolExecutor() as threads:  # in parallel, because nothing is timed yet
        built = threads.map(lambda name: run(name, build, name, case), processes)
        values = dict(zip(processes, built, strict=True))
    for name in processes:
        run(name, calibrate, name, round_seconds)
    order = list(processes)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(run(name, time_round))
        order.reverse()  # no backend always follows the same one
    memory = {name: {"value": values[name], "peak_mib": run(name, peak_mib)} for name in processes}
    metrics = summarize({n: s for n, s in seconds.items() if n not in errors}, case)
    for name in {"charlstm", "default"} & memory.keys():
        memory[name]["recurrence"] = run(name, call, DEFAULT_RECURRENCE)
    about = {"case": str(case), "sizes": case._asdict()}
    found = {
        name: {"error": errors[name]} if name in errors else metrics[name] | memory[name]
        for name in processes
    }
    return [about | {"backend": name} | found[name] for name in processes]


def summarize(seconds: Mapping[str, Sequence[float]], case: Case) -> dict[str, dict[str, Any]]:
    """Return the metrics of each backend from its seconds per call in each round.

    `time_over_ours` is the median over rounds of the ratio within a round.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for name, each in seconds.items():
        low, median, high = (1e3 * np.quantile(each, (0.25, 0.5, 0.75))).tolist()
        metrics[name] = {
            "ms": [1e3 * value for value in each],
            "median_ms": median,
            "low_ms": low,
            "high_ms": high,
            "chars_per_second": 1e3 * case.characters / median,
        }
        if "charlstm" in seconds:
            ratio = float(np.median(np.divide(each, seconds["charlstm"])))
            metrics[name]["time_over_ours"] = ratio
    return metrics
