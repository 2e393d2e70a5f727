"""Control what C++ libraries print, and explain an abort of the process."""

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
    """Print `message` if the runtime aborts the process within the block.

    It does if process 0 dies. JAX has no hook for it, and Python's signal handlers run too late.
    """
    if sys.platform == "win32":
        yield
        return
    signal_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    # Neither logging nor print: the interrupted thread may hold their locks.
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
    """Discard what C++ libraries print to `name` ("stdout" or "stderr") within the block."""
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


def hard_exit(message: str) -> None:
    """Log `message` and exit at once, without waiting for other threads."""
    logger.error(message)
    os._exit(RunError.exit_code)
