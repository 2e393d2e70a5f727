"""Calls of Orbax that report what a user needs, and nothing else."""

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


class OrbaxError(Exception):
    """A failure within Orbax, of whatever type its many layers raised, as one line."""

    def __init__(self, error: Exception):
        # TensorStore appends a specification of a thousand characters.
        super().__init__(one_line(error).partition(" [tensorstore_spec")[0])
        self.lacks_memory = isinstance(error, MemoryError | jax.errors.JaxRuntimeError)


def call_orbax(work: Callable[[], Result]) -> Result:
    """Return what `work` returns, or raise OrbaxError.

    After a failure Orbax leaves coroutines whose event loop is closed. Python reports each of them
    when it collects it, which happens here, unseen.
    """
    try:
        return work()
    except Exception as error:
        failure = OrbaxError(error)
    report, asyncio_logger = sys.unraisablehook, logging.getLogger("asyncio")
    was_disabled = asyncio_logger.disabled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        sys.unraisablehook, asyncio_logger.disabled = lambda event: None, True
        try:
            gc.collect()
        finally:
            sys.unraisablehook, asyncio_logger.disabled = report, was_disabled
    raise failure


@contextmanager
def without_warning(beginning: str) -> Iterator[None]:
    """Leave out what Orbax logs within the block with this `beginning`."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    absl = logging.getLogger("absl")
    absl.addFilter(is_other)
    try:
        yield
    finally:
        absl.removeFilter(is_other)
