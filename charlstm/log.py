"""What a run tells: metrics.jsonl and the files drawn from it, TensorBoard, and the screen."""

import json
import logging
import math
import time
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from charlstm.curves import draw_curves
from charlstm.errors import DamagedError, printable
from charlstm.files import write_file

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


def bits(nats: float) -> float:
    """Return `nats` in bits."""
    return nats / math.log(2)


class RunLog:
    """metrics.jsonl, its pictures samples.txt and curves.png, and TensorBoard events.

    The records of metrics.jsonl hold everything; the other files are drawn from them.
    """

    def __init__(self, workdir: epath.Path, step: int, title: str, read_only: bool = False):
        """Open the log of a run that stands at `step`; what a lost later step wrote is dropped.

        One that is `read_only` keeps its records to itself, for another process writes them.

        Raises:
          DamagedError: if metrics.jsonl is damaged.
        """
        # Not by its SummaryWriter, whose thread would tell of a full disk by a traceback.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._path = workdir / "metrics.jsonl"
        self._title = title
        self._read_only = read_only
        self.records = [record for record in read_records(self._path) if record["step"] <= step]
        if read_only:
            return
        self._events = EventsWriter(str(workdir / "events"), f".{step}")
        self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, which has at least 'step'."""
        from tensorboardX.summary import scalar

        self.records.append(record)
        if self._read_only:
            return
        # Rewritten whole: cheap at this size, never torn, and bucket storage has no append.
        lines = (json.dumps(record, allow_nan=False) + "\n" for record in self.records)
        write_file(self._path, "".join(lines))
        for name, value in record.items():
            if isinstance(value, float):
                self._write_event(record["step"], summary=scalar(name, value))
        self._events.flush()

    def _write_event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(step=step, wall_time=time.time(), **content))

    def draw(self) -> None:
        """Write samples.txt and curves.png anew."""
        if self._read_only:
            return
        samples = [
            f"=== step {record['step']}{_val_figure(record)} ===\n{record['sample']}\n\n"
            for record in self.records
            if "sample" in record
        ]
        write_file(self._path.parent / "samples.txt", "".join(samples))
        write_file(self._path.parent / "curves.png", draw_curves(self.records, self._title))

    def close(self) -> None:
        """Close the event file."""
        if not self._read_only:
            self._events.close()


def read_records(path: epath.Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, none where it does not exist.

    A torn last line, as an appending process leaves it when it is killed, is left out.

    Raises:
      DamagedError: if a line is no record, or the steps are not in order.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.endswith(b"\n"):
                record = json.loads(line)
                if record["step"] < (records[-1]["step"] if records else 0):
                    raise ValueError("a step out of order")
                records.append(record)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DamagedError(
                f"{path}: line {number} is damaged ({error}); mend it or take it out"
            ) from error
    return records


def _val_figure(record: dict[str, Any]) -> str:
    if record.get("val/bits_per_char") is None:
        return ""
    return f", validation {record['val/bits_per_char']:.3f} bits per character"


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
