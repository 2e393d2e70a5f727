"""What a launcher shows: log records, and the progress of a training run."""

import logging
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from charlstm.errors import printable

logger = logging.getLogger(__name__)

# On stderr, so that stdout carries results alone.
CONSOLE = Console(stderr=True)


class ConsoleHandler(logging.Handler):
    """Prints log records as they are, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        prefix = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        message = printable(prefix + record.getMessage())
        CONSOLE.print(message, markup=False, highlight=False, emoji=False, soft_wrap=True)


def show_logs() -> None:
    """Let the package's log records appear on stderr."""
    package = logging.getLogger("charlstm")
    package.handlers = [ConsoleHandler()]
    package.propagate = False
    package.setLevel(logging.INFO)


class TrainingBar:
    """A progress bar with loss, bits per character, speed and time left; nothing off a terminal."""

    def __init__(self, num_steps: int, step: int, is_hidden: bool = False):
        self._is_shown = CONSOLE.is_terminal and not is_hidden
        self._progress = Progress(
            BarColumn(bar_width=10),  # so that a line of 80 columns has room for the figures
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=CONSOLE,
            disable=not self._is_shown,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=step, figures="")

    def start(self) -> None:
        """Show the bar."""
        self._progress.start()

    def stop(self) -> None:
        """Leave the bar as it stands."""
        if self._is_shown:  # rich ends one that is not by an empty line
            self._progress.stop()

    def advance(self, count: int) -> None:
        """Count `count` steps."""
        self._progress.advance(self._task, count)

    def show(self, record: dict[str, Any]) -> None:
        """Show a training record's figures: in the bar, or as a line where there is no bar."""
        figures = f"{record['chars_per_second']:,.0f} chars/s"
        if "train/loss" in record:
            bits_per_char = record["train/bits_per_char"]
            figures = f"loss {record['train/loss']:.3f}, {bits_per_char:.3f} bits/char, {figures}"
        self._progress.update(self._task, figures=figures)
        if not CONSOLE.is_terminal:
            logger.info("step %d: %s", record["step"], figures)
