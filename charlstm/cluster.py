"""Several processes as one run. JAX's own runtime connects them; here they agree and part.

Every function is to be called by all processes alike. Where there is one process, they do nothing.
"""

import logging
import os
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental.multihost_utils import process_allgather

from charlstm.errors import RunError, UserError, one_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A process that has been silent for so long is taken for dead.
HEARTBEAT_SECONDS = 20
# How often each asks who is there.
WATCH_SECONDS = 3.0
# How long a process that has finished waits for the others.
PARTING_SECONDS = 60


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Join the other processes of a cluster, where there is one or one is named.

    Without arguments jax.distributed looks for one: Slurm, Open MPI, Cloud TPU, Kubernetes.

    Args:
      coordinator: HOST:PORT at which process 0 listens.
      num_processes, process_id: how many there are, and which this is, from 0.
      timeout: how many seconds to wait for the others.

    Raises:
      UserError: if the arguments do not fit together.
    """
    given = {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    # The runtime would end the process by an abort with a stack trace; this comes before that.
    where = f" at {coordinator}" if coordinator else ""
    who = f"process {process_id}" if process_id is not None else "this process"
    alarm = threading.Timer(
        timeout,
        end_at_once,
        [
            f"--coordinator={coordinator or ''}: {who} has waited {timeout} s for all "
            f"{num_processes or ''} processes to meet{where}; start all of them, with the same "
            "--coordinator and --num_processes, a --process_id of its own for each, and "
            "process 0 on the coordinator's host",
        ],
    )
    alarm.daemon = True
    alarm.start()
    # The watch ends a process that has lost another, and launchers catch signals themselves.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **given,  # type: ignore[arg-type]
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        if any(value is not None for value in given.values()):
            raise UserError(f"--coordinator={coordinator}: {one_line(error)}") from error
        return  # no cluster was found, and none was asked for
    except RuntimeError as error:
        raise UserError(
            f"--coordinator={coordinator or ''}: {who} could not join ({one_line(error)}); start "
            "all processes anew, with one --process_id each"
        ) from error
    finally:
        alarm.cancel()
    if jax.process_count() > 1:
        watch.start()


def is_first() -> bool:
    """Return whether this process is the one that writes logs, samples and pictures."""
    return jax.process_index() == 0


def together(work: Callable[[], Result]) -> Result:
    """Return what `work` gives here, once it is done everywhere; if it fails on one, all fail.

    Raises:
      UserError: that of `work`, or one that names the process on which it failed.
    """
    error: UserError | None = None
    try:
        result = work()
    except UserError as failure:
        error = failure
    failed = gather(0 if error is None else error.exit_code)
    if error is not None:
        raise error
    if failed.any():
        which, code = int(np.argmax(failed > 0)), int(failed.max())
        message = f"process {which} of {len(failed)} could not go on: its own message says why"
        raise RunError(message) if code == RunError.exit_code else UserError(message)
    return result


def agree(should_stop: Callable[[], bool]) -> Callable[[], bool]:
    """Return a should_stop that is true on all processes once `should_stop` is on one of them."""
    if jax.process_count() == 1:
        return should_stop
    return lambda: bool(gather(int(should_stop())).any())


def least(value: int) -> int:
    """Return the least of the `value` of all processes."""
    return int(gather(value).min())


def check_same(settings: dict[str, Any]) -> None:
    """Raise UserError, naming them, if `settings` are not the same on all processes."""
    lengths = gather(len(settings))
    if len(set(lengths.tolist())) > 1:
        raise UserError("the processes run different versions of charlstm; install one on all")
    sums = [zlib.crc32(f"{name}={value!r}".encode()) for name, value in settings.items()]
    all_sums = gather(sums)
    differing = [
        name for name, column in zip(settings, all_sums.T, strict=True) if len(set(column)) > 1
    ]
    if differing:
        others = [
            str(index) for index, row in enumerate(all_sums) if not np.array_equal(row, all_sums[0])
        ]
        raise UserError(
            f"{', '.join(differing)}: not the same on process 0 and on {', '.join(others)}; give "
            "all processes the same flags, files and versions"
        )


def gather(value: Any) -> np.ndarray:
    """Return the numbers of all processes, process by process; they are of 32 bits, unsigned."""
    return process_allgather(np.asarray(value, np.uint32))


def leave() -> None:
    """Part from the others, once all of them have come here."""
    if jax.process_count() == 1:
        return
    watch.stop()
    try:
        client().wait_at_barrier("leave", PARTING_SECONDS * 1000)
    except Exception as error:  # of the runtime's own types
        logger.warning("the other processes have not ended (%s)", one_line(error))
    jax.distributed.shutdown()


def client() -> Any:
    """Return this process's line to the others, of which JAX makes nothing public."""
    return distributed.global_state.client


class Watch:
    """A thread that ends this process, with one line, when another one has gone.

    Without it a process would wait for ever in a sum to which another no longer adds.
    """

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def start(self) -> None:
        """Watch the processes that are there now."""
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._is_over.set()

    def _run(self) -> None:
        everybody = list(range(jax.process_count()))
        met = client().get_live_nodes(everybody)
        while not self._is_over.wait(WATCH_SECONDS):
            try:
                there = client().get_live_nodes(everybody)
                # One that was started anew has another number, and knows nothing of this run.
                gone = [str(index) for index in everybody if there.get(index) != met.get(index)]
            except Exception:  # of the runtime's own types; the service is process 0's
                gone = ["0"]
            if gone and not self._is_over.is_set():
                end_at_once(
                    f"process {', '.join(gone)} of {len(everybody)} has gone or does not answer: "
                    f"process {jax.process_index()} ends, too; give all the same command again, "
                    "which goes on from the last checkpoint"
                )


watch = Watch()


def end_at_once(message: str) -> None:
    """Tell `message` and end the process, whatever its other threads wait for."""
    logger.error(message)
    time.sleep(0.1)
    os._exit(RunError.exit_code)
