"""The files that a run logs to: metrics.jsonl, those drawn from it, and TensorBoard events."""

import json
import math
import time
from typing import Any

from etils import epath

from charlstm.curves import draw_curves
from charlstm.errors import DamagedError
from charlstm.files import write_file


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
