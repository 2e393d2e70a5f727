"""Print log records, and redraw the last line of a terminal: progress bars and a status.

Printing is best effort: the program continues if a line cannot be written.
"""

import io
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from charlstm.errors import printable

logger = logging.getLogger(__name__)

REDRAW_SECONDS = 0.25
PIPE_SECONDS = 0.05  # a line needs at most this to pass from stdout through a pipe to the terminal


class BestEffort(io.RawIOBase):
    """A writable file descriptor that drops what it cannot write, and warns of the first time.

    A closed pipe is no reason to warn: its reader has ended, as `head` does.
    """

    def __init__(self, descriptor: int, name: str):
        self._descriptor = descriptor
        self._name = name
        self._has_failed = False

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Write some bytes of `data`; return how many are written or dropped."""
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            is_new, self._has_failed = not self._has_failed, True
            if is_new and self._name != "stderr" and not isinstance(error, BrokenPipeError):
                logger.warning(
                    "%s: cannot be written (%s); its lines are lost, the program continues",
                    self._name,
                    error.strerror,
                )
            return len(data)


def best_effort(stream: TextIO, name: str) -> TextIO:
    """Return a stream to the same file, called `name`, that drops what it cannot write."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # of a notebook, where fileno() is the log of the server
    try:
        raw = BestEffort(stream.fileno(), name)
    except io.UnsupportedOperation:
        return stream  # in memory
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)


class ConsoleHandler(logging.Handler):
    """A handler that prints warnings and errors to stderr, and progress to stdout or stderr."""

    def __init__(self, progress_on_stdout: bool = False):
        super().__init__()
        self._progress_on_stdout = progress_on_stdout

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        is_progress = record.levelno <= logging.INFO
        prefix = "" if is_progress else f"{record.levelname.lower()}: "
        if _last_line:
            _last_line.erase()
        stream = sys.stdout if is_progress and self._progress_on_stdout else sys.stderr
        print(printable(prefix + record.getMessage()), file=stream, flush=True)


def show_logs(progress_on_stdout: bool = False) -> None:
    """Print the log records of charlstm to stderr, or progress to stdout.

    The streams in use become best effort.
    """
    sys.stderr = best_effort(sys.stderr, "stderr")
    if progress_on_stdout:
        sys.stdout = best_effort(sys.stdout, "stdout")
    package = logging.getLogger("charlstm")
    package.handlers = [ConsoleHandler(progress_on_stdout)]
    package.propagate = False
    package.setLevel(logging.INFO)


def launcher_command(name: str, *flags: str) -> str:
    """Return a shell command for launch/NAME.py, with the interpreter and path of this process."""
    script = Path(sys.argv[0])
    words = ["python", f"launch/{name}.py"]
    if script.parent.joinpath("train.py").exists():  # otherwise this process is not a launcher
        words = [sys.orig_argv[0], str(script.with_name(f"{name}.py"))]
    return " ".join(map(_quote, [*words, *flags]))


def _quote(word: str) -> str:
    """Return `word` for a shell, with bytes that a terminal cannot show as escapes in $'...'."""
    if printable(word) == word and not re.search(r"[\t\n]", word):
        return shlex.quote(word)
    escaped = [
        char
        if char.isascii() and char.isprintable() and char not in "\\'"
        else "".join(f"\\{byte:03o}" for byte in os.fsencode(char))
        for char in word
    ]
    return f"$'{''.join(escaped)}'"


_last_line: "LastLine | None" = None  # the one on the terminal


class LastLine:
    """The last line of a terminal, below the log; hidden if stderr is not a terminal.

    Only the caller's thread draws it, so that no other line runs into it. The cursor stays visible,
    because a killed process could not restore it.
    """

    def __init__(self, render: Callable[[int], RenderableType], is_hidden: bool = False):
        """Create a line that shows render(number of columns)."""
        self._render = render
        self._console = Console(stderr=True)
        # Console.is_terminal would follow FORCE_COLOR.
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.is_shown = is_terminal and not self._console.is_dumb_terminal and not is_hidden
        self._drawn_at = self._erased_at = -math.inf

    def start(self) -> None:
        """Draw the line for the first time."""
        global _last_line
        if self.is_shown:
            _last_line = self
            self.draw()

    def stop(self) -> None:
        """Erase the line and forget it."""
        global _last_line
        if self.is_shown:
            self.erase()
            _last_line = None

    def draw(self, is_urgent: bool = True) -> None:
        """Draw the line; if not urgent, at most once per REDRAW_SECONDS."""
        now = monotonic()
        if not self.is_shown or not (is_urgent or now - self._drawn_at > REDRAW_SECONDS):
            return
        if is_urgent and not sys.stdout.isatty():
            sleep(max(0.0, self._erased_at + PIPE_SECONDS - now))
        self._drawn_at = now
        width = (_width_of(sys.stderr) or 80) - len("^C ")  # which a terminal echoes after it
        self._console.width = width
        with self._console.capture() as captured:
            self._console.print(self._render(width), end="")
        self._write(captured.get().rstrip("\n"))

    def erase(self) -> None:
        """Erase the line, to print another one."""
        self._drawn_at = self._erased_at = monotonic()
        self._write("")

    def _write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()


def _width_of(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return 0


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show `text` as the last line of the terminal within the block."""
    line = LastLine(lambda width: Text(text))
    line.start()
    try:
        yield
    finally:
        line.stop()


@contextmanager
def reading_bar(text: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar within the block; yield advance(number of bytes read)."""
    columns = TextColumn(text), _wide_bar(), TaskProgressColumn(), TimeRemainingColumn()
    progress = Progress(*columns, expand=True)
    task = progress.add_task("", total=num_bytes)
    line = LastLine(lambda width: progress.get_renderable())

    def advance(count: int) -> None:
        progress.advance(task, count)
        line.draw(is_urgent=False)

    line.start()
    try:
        yield advance
    finally:
        line.stop()


def _wide_bar() -> BarColumn:
    return BarColumn(bar_width=None, table_column=Column(ratio=1))


class TrainingBar:
    """A progress bar with the steps, the time left and as many metrics as fit."""

    def __init__(self, num_steps: int, step: int, is_hidden: bool = False):
        self._line = LastLine(self._render, is_hidden)
        self._progress = Progress(
            _wide_bar(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            expand=True,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=step, text="")
        self._metrics = [""]
        self._status = "compiling"

    def start(self) -> None:
        """Show the bar."""
        self._line.start()

    def stop(self) -> None:
        """Erase the bar."""
        self._line.stop()

    def advance(self, count: int) -> None:
        """Add `count` steps."""
        self._status = ""
        self._progress.advance(self._task, count)
        self._line.draw(is_urgent=False)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Show `text` in place of the metrics within the block."""
        self._status = text
        self._line.draw()
        try:
            yield
        finally:
            self._status = ""

    def show(self, record: dict[str, Any]) -> None:
        """Show the metrics of a training record in the bar, or as a line of the log."""
        speed = f"{record['chars_per_second']:,.0f} chars/s"
        self._metrics = [speed, ""]
        if "train/loss" in record:
            bits = f"{record['train/bits_per_char']:.3f} bits"
            short = f"{bits}/char, {speed}"
            self._metrics = [f"loss {record['train/loss']:.3f}, {short}", short, bits, ""]
        if not (self._line.is_shown and sys.stdout.isatty()):
            logger.info("step %d: %s", record["step"], self._metrics[0])

    def _render(self, width: int) -> RenderableType:
        (task,) = self._progress.tasks
        # Reserve a short bar, the steps, the time left and three spaces.
        room = width - 4 - len(f"{task.total}/{task.total}") - len("0:00:00") - 3
        texts = [self._status] if self._status else self._metrics
        text = next((text for text in texts if len(text) <= room), "")
        self._progress.update(self._task, text=text)
        return self._progress.get_renderable()
