"""What a launcher prints: log records, and the last line of a terminal, which is drawn repeatedly.

Printing is best effort: a line that cannot be written is dropped, and the program goes on.
"""

import io
import logging
import math
import os
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
PIPE_SECONDS = 0.05  # which a line may take from stdout to the terminal through a pipe


class BestEffort(io.RawIOBase):
    """A file descriptor to write to; what the system does not take is dropped."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

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
        """Write some bytes of `data` and return how many are done with."""
        try:
            return os.write(self._descriptor, data)
        except OSError:
            return len(data)


def best_effort(stream: TextIO) -> TextIO:
    """Return a stream to the same file that drops what cannot be written."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # a notebook's, whose fileno() is that of the server's log
    try:
        raw = BestEffort(stream.fileno())
    except io.UnsupportedOperation:
        return stream  # in memory
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)


class ConsoleHandler(logging.Handler):
    """Prints log records: warnings and errors to stderr, the others where they are wanted."""

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
    """Print the package's log records: to stderr, or all but warnings and errors to stdout.

    From then on sys.stderr, and sys.stdout if it is used, drop what they cannot write.
    """
    sys.stderr = best_effort(sys.stderr)
    if progress_on_stdout:
        sys.stdout = best_effort(sys.stdout)
    package = logging.getLogger("charlstm")
    package.handlers = [ConsoleHandler(progress_on_stdout)]
    package.propagate = False
    package.setLevel(logging.INFO)


def launcher_command(name: str, *flags: str) -> str:
    """Return a shell command for launch/NAME.py, started the way this process was."""
    script = Path(sys.argv[0])
    if script.parent.joinpath("train.py").exists():  # otherwise this process is no launcher
        return shlex.join([sys.orig_argv[0], str(script.with_name(f"{name}.py")), *flags])
    return shlex.join(["python", f"launch/{name}.py", *flags])


_last_line: "LastLine | None" = None  # the one that is shown


class LastLine:
    """The last line of a terminal, below the lines that stay; nothing where stderr is none.

    It is drawn by the caller's thread alone, so that no other line runs into it, and leaves the
    cursor visible, which a process that is stopped or killed could not bring back.
    """

    def __init__(self, render: Callable[[int], RenderableType], is_hidden: bool = False):
        """Prepare to draw what render(number of columns) returns."""
        self._render = render
        self._console = Console(stderr=True)
        # Whatever FORCE_COLOR says.
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
        """Erase the line for good."""
        global _last_line
        if self.is_shown:
            self.erase()
            _last_line = None

    def draw(self, is_urgent: bool = True) -> None:
        """Draw the line; one that is not urgent is left out if the one before is fresh."""
        now = monotonic()
        if not self.is_shown or not (is_urgent or now - self._drawn_at > REDRAW_SECONDS):
            return
        if is_urgent and not sys.stdout.isatty():
            sleep(max(0.0, self._erased_at + PIPE_SECONDS - now))
        self._drawn_at = now
        width = (_width_of(sys.stderr) or 80) - len("^C ")  # the terminal echoes that behind it
        self._console.width = width
        with self._console.capture() as captured:
            self._console.print(self._render(width), end="")
        self._write(captured.get().rstrip("\n"))

    def erase(self) -> None:
        """Make room for a line that stays."""
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
    """Show `text` as a terminal's last line within the block."""
    line = LastLine(lambda width: Text(text))
    line.start()
    try:
        yield
    finally:
        line.stop()


@contextmanager
def reading_bar(text: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar within the block; yield advance(number of bytes that have been read)."""
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
    """A progress bar with the steps, the time left and, as far as there is room, the figures."""

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
        self._figures = [""]
        self._status = "compiling"

    def start(self) -> None:
        """Show the bar."""
        self._line.start()

    def stop(self) -> None:
        """Erase the bar."""
        self._line.stop()

    def advance(self, count: int) -> None:
        """Count `count` steps."""
        self._status = ""
        self._progress.advance(self._task, count)
        self._line.draw(is_urgent=False)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Show `text` in place of the figures within the block."""
        self._status = text
        self._line.draw()
        try:
            yield
        finally:
            self._status = ""

    def show(self, record: dict[str, Any]) -> None:
        """Show a training record's figures: in the bar, and as a line of a log."""
        speed = f"{record['chars_per_second']:,.0f} chars/s"
        self._figures = [speed, ""]
        if "train/loss" in record:
            bits = f"{record['train/bits_per_char']:.3f} bits"
            short = f"{bits}/char, {speed}"
            self._figures = [f"loss {record['train/loss']:.3f}, {short}", short, bits, ""]
        if not (self._line.is_shown and sys.stdout.isatty()):
            logger.info("step %d: %s", record["step"], self._figures[0])

    def _render(self, width: int) -> RenderableType:
        (task,) = self._progress.tasks
        # Beside a short bar, the steps, the time left and three spaces.
        room = width - 4 - len(f"{task.total}/{task.total}") - len("0:00:00") - 3
        texts = [self._status] if self._status else self._figures
        text = next((text for text in texts if len(text) <= room), "")
        self._progress.update(self._task, text=text)
        return self._progress.get_renderable()
