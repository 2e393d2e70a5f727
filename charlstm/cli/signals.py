"""Exit at a signal at any moment, or after the state is saved, with the exit code 128 + signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from charlstm.cli import streams

# Functions to call before a signal ends the process; each may be called when it is not needed.
cleanups: list[Callable[[], object]] = []


def leave(number: int) -> None:
    """Exit at once with the code of signal `number`."""
    for undo in reversed(cleanups):
        with suppress(Exception):
            undo()
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\n")  # after a progress bar and the ^C of the terminal
    os._exit(128 + number)


class SignalWatch:
    """A thread that handles SIGINT, SIGTERM and SIGHUP while the main thread is busy.

    Python runs its handlers in the main thread, which may compile for a minute. C extensions and
    callbacks of JAX may drop KeyboardInterrupt, and a normal exit during a compilation crashes XLA.
    """

    def __init__(self) -> None:
        self.action: Callable[[int], None] = leave
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread and handle the signals, except a SIGHUP that nohup ignores."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        self._thread = threading.Thread(target=self._watch, args=[reader], daemon=True)
        self._thread.start()
        self.handle()

    def handle(self) -> dict[int, object]:
        """Set the signal handlers; return the previous ones."""
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        is_ignored = signal.getsignal(numbers[-1]) == signal.SIG_IGN
        taken = numbers[:2] if is_ignored else numbers
        return {number: signal.signal(number, self._handle) for number in taken}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._thread is None:  # otherwise the thread handles it
            self.action(number)

    def _watch(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 16):
                self.action(number)


watch = SignalWatch()


class StopSignal:
    """Is true after SIGINT, SIGTERM or SIGHUP within its block; a second signal exits at once."""

    def __init__(
        self, message: str = "stopping after the state is saved; a second signal exits at once"
    ) -> None:
        """Print `message` at the first signal."""
        self.number = 0
        self._message = message

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
        # Neither logging nor print: the main thread may hold their locks.
        # Erase a progress bar and the ^C of the terminal.
        erase = "\r\x1b[2K" if os.isatty(2) else ""
        with suppress(OSError):
            os.write(2, f"{erase}{self._message}\n".encode())

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return self.number != 0


if streams.is_launcher() and not streams.is_notebook():
    watch.start()
