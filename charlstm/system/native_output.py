"""What libraries in C++ do beside their work: they print, and they abort the process."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from charlstm.errors import RunError, printable

logger = logging.getLogger(__name__)


@contextmanager
def aborts_explained(message: str) -> Iterator[None]:
    """Print `message` if the runtime aborts the process within the block, as when process 0 dies.

    JAX has no hook for that, and Python's own signal handlers come too late.
    """
    if sys.platform == "win32":
        yield
        return
    signal_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    # Without locks, which the interrupted thread may hold: neither logging nor print.
    line = f"error: {printable(message)}\n".encode()
    stderr = sys.stderr.fileno()

    def write_and_exit(number: int) -> None:
        with suppress(OSError):
            os.write(stderr, line)
        os._exit(RunError.exit_code)

    handler = signal_type(write_and_exit)
    before = set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGABRT, before)


@contextmanager
def only_python_writes(name: str) -> Iterator[None]:
    """Discard what libraries in C++ print on sys.stdout or sys.stderr, by `name`."""
    before = getattr(sys, name)
    number = {"stdout": 1, "stderr": 2}[name]
    ours, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
    setattr(sys, name, os.fdopen(os.dup(ours), "w", encoding="utf-8", buffering=1))
    try:
        yield
    finally:
        getattr(sys, name).close()
        setattr(sys, name, before)
        os.dup2(ours, number)
        os.close(ours)


def end_at_once(message: str) -> None:
    """Log `message` and end the process, whatever its other threads wait for."""
    logger.error(message)
    os._exit(RunError.exit_code)
