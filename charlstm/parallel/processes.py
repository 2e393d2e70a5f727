"""What the processes of one run ask each other.

All of them must call the same functions in the same order. With one process, the functions do no
communication.
"""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from charlstm.errors import RunError, UserError

Result = TypeVar("Result")

POLL_EVERY = 8


def is_shared() -> bool:
    """Return whether there are several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Return whether this is process 0, which writes logs, samples and pictures."""
    return jax.process_index() == 0


def run_on_all_processes(work: Callable[[], Result]) -> Result:
    """Return work(), after all processes have finished theirs.

    Raises:
      UserError: on all processes if `work` raises it on one: its own error there, one that names
        the process elsewhere.
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
        message = f"process {which} of {len(failed)} failed; see the message of that process"
        raise RunError(message) if code == RunError.exit_code else UserError(message)
    return result


def min_over_processes(value: int) -> int:
    """Return the smallest `value` of all processes."""
    return int(gather(value).min())


class StoppedError(Exception):
    """A stop was requested on one of the processes."""


class Agreement:
    """Stops all processes at the same point of a loop, and shares a number in each turn."""

    def __init__(self, should_stop: Callable[[], bool]):
        """Let `should_stop` of each process stop all of them."""
        self._should_stop = should_stop
        self._pending: Any = None
        self._num_polls = 0

    def smallest(self, number: int) -> int:
        """Return the smallest `number` that the processes gave in the call before.

        Devices gather the numbers after the programs that they have been given already. To let
        them go on, only the first call waits for its own result. One process gets `number`.

        Raises:
          StoppedError: if should_stop() of any process was true in that call.
        """
        row = _start_gather([not self._should_stop(), number])
        known = row if self._pending is None else self._pending
        self._pending = row if is_shared() else None
        goes_on, smallest = np.asarray(known).min(axis=0).tolist()
        if not goes_on:
            raise StoppedError
        return smallest

    def poll(self) -> None:
        """Raise StoppedError if should_stop() of any process is true.

        Several processes ask each other in every POLL_EVERY-th call only, since that waits for the
        devices.
        """
        self._num_polls += 1
        if is_shared() and self._num_polls % POLL_EVERY:
            return
        if gather(self._should_stop()).any():
            raise StoppedError


def check_same(settings: dict[str, Any]) -> None:
    """Raise UserError with the names of `settings` that differ between processes."""
    lengths = gather(len(settings))
    if len(set(lengths.tolist())) > 1:
        raise UserError(
            "the processes run different versions of charlstm; install the same version on all"
        )
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
            f"{', '.join(differing)}: differs between process 0 and process {', '.join(others)}; "
            "use the same flags, files and versions for all processes"
        )


def gather(value: Any) -> np.ndarray:
    """Return `value`, a uint32 or several, of each process along a new first axis."""
    return np.asarray(_start_gather(value))


def _start_gather(value: Any) -> Any:
    """Return an array with the result of `gather`, which the devices may not have computed yet."""
    row = np.asarray(value, np.uint32)[None]
    if not is_shared():
        return row
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("process", "device"))
    by_process = NamedSharding(mesh, PartitionSpec("process"))
    array = jax.make_array_from_process_local_data(by_process, row)
    return jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)


def _same(array: jax.Array) -> jax.Array:
    return array
