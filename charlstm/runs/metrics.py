"""The files that a run logs to: metrics.jsonl, those drawn from it, and TensorBoard events."""

import json
import logging
import math
import time
from typing import Any

from etils import epath

from charlstm.errors import DamagedError, UserError, one_line
from charlstm.files import GrowingFile, write_file
from charlstm.runs.plots import draw_curves, is_ours

logger = logging.getLogger(__name__)

# What each sample in samples.txt begins with, before its step.
SAMPLE_MARK = "=== step "
PROMPT_TAIL = 60  # characters of a sample's prompt that are shown


def bits(nats: float) -> float:
    """Return `nats` in bits."""
    return nats / math.log(2)


class RunLog:
    """metrics.jsonl, its pictures samples.txt and curves.png, and TensorBoard events.

    The records of metrics.jsonl hold everything; the other files follow from them.
    """

    def __init__(self, workdir: epath.Path, step: int, title: str, read_only: bool = False):
        """Open the log of a run that stands at `step`; what a lost later step wrote is dropped.

        One that is `read_only` keeps its records to itself, for another process writes them.

        Raises:
          DamagedError: if metrics.jsonl is damaged.
          UserError: if samples.txt is not of this program.
        """
        # Not by its SummaryWriter, whose thread prints a traceback when the disk is full.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import scalar

        self._scalar = scalar  # imported before the first characters per second are measured
        self._picture = workdir / "curves.png"
        self._title = title
        self._read_only = read_only
        self._has_failed_to_draw = False
        metrics, samples = workdir / "metrics.jsonl", workdir / "samples.txt"
        self.records = [record for record in read_records(metrics) if record["step"] <= step]
        if read_only:
            return
        before = samples.read_bytes()[: len(SAMPLE_MARK)] if samples.exists() else b""
        if not SAMPLE_MARK.encode().startswith(before):  # which a crash may have torn
            raise UserError(f"{samples}: is not what a run writes; move it to another place")
        self._metrics = GrowingFile(metrics, lambda: "".join(map(_line, self.records)))
        self._samples = GrowingFile(samples, lambda: "".join(map(_sample, self.records)))
        self._events = EventsWriter(str(workdir / "events"), f".{step}")
        self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, which has at least 'step'."""
        line = _line(record)
        self.records.append(record)
        if self._read_only:
            return
        self._metrics.append(line)
        if sample := _sample(record):
            self._samples.append(sample)
        for name, value in record.items():
            if isinstance(value, float):
                self._write_event(record["step"], summary=self._scalar(name, value))
        self._events.flush()

    def _write_event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(step=step, wall_time=time.time(), **content))

    def draw(self) -> None:
        """Draw curves.png; if that fails, warn once."""
        if self._read_only:
            return
        try:
            if self._picture.exists() and not is_ours(self._picture.read_bytes()):
                raise ValueError("what is there was not drawn by this program, and is kept")
            write_file(self._picture, draw_curves(self.records, self._title))
        except Exception as error:  # of any type: a picture is no reason to end a run
            if not self._has_failed_to_draw:
                logger.warning("%s: could not be drawn (%s)", self._picture, one_line(error))
            self._has_failed_to_draw = True

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


def sample_after_prompt(record: dict[str, Any]) -> str:
    """Return the sample of a record after the end of its prompt in brackets, if it has one."""
    prompt = record.get("prompt", "")  # older runs did not record it
    if not prompt:
        return record["sample"]
    tail = prompt if len(prompt) <= PROMPT_TAIL else f"...{prompt[-PROMPT_TAIL:]}"
    return f"[{tail}]{record['sample']}"


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _sample(record: dict[str, Any]) -> str:
    """Return what samples.txt has of a record: nothing if it holds no sample."""
    if "sample" not in record:
        return ""
    figure = record.get("val/bits_per_char")
    validation = "" if figure is None else f", validation {figure:.3f} bits per character"
    return f"{SAMPLE_MARK}{record['step']}{validation} ===\n{sample_after_prompt(record)}\n\n"
