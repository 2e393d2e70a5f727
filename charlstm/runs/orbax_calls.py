"""Calls of Orbax that report an error as one line."""

import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax

from charlstm.errors import one_line

Result = TypeVar("Result")


class OrbaxError(RuntimeError):
    """An error of any type within Orbax, as one line.

    It is a RuntimeError, since the death of another process may be its reason: cluster.joined
    then waits for the report of that death.
    """

    def __init__(self, error: Exception):
        # TensorStore appends a specification of a thousand characters.
        super().__init__(one_line(error).partition(" [tensorstore_spec")[0])
        self.lacks_memory = isinstance(error, MemoryError | jax.errors.JaxRuntimeError)


def call_orbax(work: Callable[[], Result]) -> Result:
    """Return the result of `work`, or raise OrbaxError.

    After an error Orbax leaves coroutines without an event loop, which Python reports when it
    collects them. They are collected here, without reports.
    """
    try:
        return work()
    except Exception as error:
        failure = OrbaxError(error)
    hook, asyncio_logger = sys.unraisablehook, logging.getLogger("asyncio")
    was_disabled = asyncio_logger.disabled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        sys.unraisablehook, asyncio_logger.disabled = lambda event: None, True
        try:
            gc.collect()
        finally:
            sys.unraisablehook, asyncio_logger.disabled = hook, was_disabled
    raise failure


@contextmanager
def without_warning(beginning: str) -> Iterator[None]:
    """Suppress log messages of Orbax within the block that start with `beginning`."""

    def has_other_beginning(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    absl = logging.getLogger("absl")
    absl.addFilter(has_other_beginning)
    try:
        yield
    finally:
        absl.removeFilter(has_other_beginning)
