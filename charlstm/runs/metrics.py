"""The log of a run: metrics.jsonl, samples.txt, curves.png and TensorBoard events."""

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

# The beginning of the line before each sample in samples.txt.
SAMPLE_MARK = "=== step "
PROMPT_TAIL = 60  # characters of a prompt that are shown


def bits(nats: float) -> float:
    """Convert nats to bits."""
    return nats / math.log(2)


class RunLog:
    """The writer of metrics.jsonl, samples.txt, curves.png and TensorBoard events.

    All content comes from the records of metrics.jsonl.
    """

    def __init__(self, workdir: epath.Path, step: int, title: str, read_only: bool = False):
        """Open the log of a run after `step` steps; drop the records of later steps.

        Args:
          workdir: the run folder.
          step: the step of the restored checkpoint.
          title: the title of curves.png.
          read_only: write no file, because another process does.

        Raises:
          DamagedError: if metrics.jsonl is damaged.
          UserError: if samples.txt was not written by this program.
        """
        # Not SummaryWriter, whose thread prints a traceback when the disk is full.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import scalar

        self._scalar = scalar  # an import during the steps would count as their time
        self._picture = workdir / "curves.png"
        self._title = title
        self._read_only = read_only
        self._has_failed_to_draw = False
        metrics, samples = workdir / "metrics.jsonl", workdir / "samples.txt"
        self.records = read_records(metrics, step)
        if read_only:
            return
        before = samples.read_bytes()[: len(SAMPLE_MARK)] if samples.exists() else b""
        if not SAMPLE_MARK.encode().startswith(before):  # a crash may have cut it off
            raise UserError(f"{samples}: not written by a run; move it to another folder")
        self._metrics = GrowingFile(metrics, lambda: "".join(map(_line, self.records)))
        self._samples = GrowingFile(samples, lambda: "".join(map(_sample, self.records)))
        self._events = EventsWriter(str(workdir / "events"), f".{step}")
        self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, which has at least 'step'."""
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
        """Draw curves.png; if that fails, log one warning."""
        if self._read_only:
            return
        try:
            if self._picture.exists() and not is_ours(self._picture.read_bytes()):
                raise ValueError("the existing file was not drawn by this program")
            write_file(self._picture, draw_curves(self.records, self._title))
        except Exception as error:  # of any type, none of which should end a run
            if not self._has_failed_to_draw:
                logger.warning("%s: could not be drawn (%s)", self._picture, one_line(error))
            self._has_failed_to_draw = True

    def close(self) -> None:
        """Close the event file."""
        if not self._read_only:
            self._events.close()


def read_records(path: epath.Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl up to `last_step`; none if it does not exist.

    An incomplete last line, as after a kill, is ignored.

    Raises:
      DamagedError: if a line is not a record, or if the steps are not in order.
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
                f"{path}: line {number} is damaged ({error}); repair or delete the line"
            ) from error
    return [record for record in records if record["step"] <= last_step]


def evaluations_since_best(records: list[dict[str, Any]]) -> int:
    """Return the number of evaluations after the first one with the lowest validation loss.

    All count if no loss is finite. An evaluation that was repeated after a crash counts once.
    """
    losses = {record["step"]: record["val/loss"] for record in records if "val/loss" in record}
    values = [math.inf if loss is None else loss for loss in losses.values()]
    lowest = min(values, default=math.inf)
    return len(values) if lowest == math.inf else len(values) - 1 - values.index(lowest)


def sample_after_prompt(record: dict[str, Any]) -> str:
    """Return the sample of a record after the end of its prompt in brackets."""
    prompt = record.get("prompt", "")
    if not prompt:
        return record["sample"]
    tail = prompt if len(prompt) <= PROMPT_TAIL else f"...{prompt[-PROMPT_TAIL:]}"
    return f"[{tail}]{record['sample']}"


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _sample(record: dict[str, Any]) -> str:
    """Return the text of a record for samples.txt; empty if it has no sample."""
    if "sample" not in record:
        return ""
    loss = record.get("val/bits_per_char")
    validation = "" if loss is None else f", validation {loss:.3f} bits per character"
    return f"{SAMPLE_MARK}{record['step']}{validation} ===\n{sample_after_prompt(record)}\n\n"
