"""Signals: they end a launcher with their exit code at any moment, or once its work is saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from charlstm.cli import streams

# Called before a signal ends the process; harmless where there is nothing left to undo.
cleanups: list[Callable[[], object]] = []


def leave(number: int) -> None:
    """Exit at once with the code of signal `number`."""
    for undo in reversed(cleanups):
        with suppress(Exception):
            undo()
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\n")  # behind a progress bar and the terminal's ^C
    os._exit(128 + number)


class SignalWatch:
    """A thread that acts on SIGINT, SIGTERM and SIGHUP while the main thread is busy.

    Python's own handlers wait for the main thread, which may compile for a minute. Its
    KeyboardInterrupt gets lost in C extensions and in JAX's callbacks, and an ordinary end of the
    process crashes XLA's compiling threads.
    """

    def __init__(self) -> None:
        self.action: Callable[[int], None] = leave
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Handle the signals from now on, except a SIGHUP that is ignored, as by nohup."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        self._thread = threading.Thread(target=self._watch, args=[reader], daemon=True)
        self._thread.start()
        self.handle()

    def handle(self) -> dict[int, object]:
        """Take over the signals; return the handlers that were there."""
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        is_ignored = signal.getsignal(numbers[-1]) == signal.SIG_IGN
        taken = numbers[:2] if is_ignored else numbers
        return {number: signal.signal(number, self._handle) for number in taken}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._thread is None:  # otherwise the thread has seen it already
            self.action(number)

    def _watch(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 16):
                self.action(number)


watch = SignalWatch()


class StopSignal:
    """Becomes true at SIGINT, SIGTERM or SIGHUP within its block; a second one ends the process."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> StopSignal:
        self._handlers = watch.handle()
        watch.action = self._catch
        return self

    def __exit__(self, *error: object) -> None:
        watch.action = leave
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _catch(self, number: int) -> None:
        if self.number:
            leave(number)
        self.number = number
        # Neither by logging nor by print, whose locks the main thread may hold.
        # In place of a progress bar, and of the ^C that a terminal echoes behind it.
        erase = "\r\x1b[2K" if os.isatty(2) else ""
        with suppress(OSError):
            os.write(
                2, f"{erase}stopping once the step is saved; another signal ends now\n".encode()
            )

    def __call__(self) -> bool:
        """Return whether a signal has come."""
        return self.number != 0


if streams.is_launcher() and not streams.is_notebook():
    watch.start()
