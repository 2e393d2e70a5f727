"""The table of sweep.py: trials.tsv, a line a trial, and what it says of each combination."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from etils import epath

from charlstm.errors import DamagedError
from charlstm.files import write_file

FINISHED = "finished"


class Score(NamedTuple):
    """What the trials of one combination of settings have come to."""

    values: tuple[str, ...]  # of the settings that vary
    bits: dict[str, float]  # bits per character of each text, the mean over seeds
    seconds: float | None  # the mean, if all were timed
    num_failed: int
    num_trials: int

    @property
    def mean(self) -> float:
        """Bits per character, every text counting the same."""
        return fmean(self.bits.values())


def columns_of(keys: Sequence[str]) -> list[str]:
    """Return the names of the columns where the settings `keys` vary."""
    figures = ["steps", "bits_per_char", "best_bits_per_char", "seconds", "status", "versions"]
    return ["trial", "text", "seed", *sorted(keys), *figures]


def read_table(path: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the lines of a table by the names of their trials; half a last line is dropped.

    Raises:
      DamagedError: if a line is not as `append` writes it.
    """
    if not path.exists():
        return {}
    content = path.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        write_file(epath.Path(path), whole)
    head, *lines = list(csv.reader(io.StringIO(whole), delimiter="\t")) or [list(columns)]
    try:
        if head != list(columns):
            raise ValueError("other columns")
        rows = [dict(zip(columns, line, strict=True)) for line in lines]
        for row in rows:
            for name in ("bits_per_char", "seconds"):
                float(row[name] or 0)
            if row["status"] == FINISHED and not row["bits_per_char"]:
                raise ValueError("a finished trial without its figure")
    except ValueError as error:
        raise DamagedError(
            f"{path}: is not as it was written ({error}); mend it, or choose another --out"
        ) from None
    return {row["trial"]: row for row in rows}


def append(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    """Add a line, which is on the disk when this returns."""
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def rank(rows: Sequence[dict[str, str]], keys: Sequence[str]) -> list[Score]:
    """Return the combinations: finished ones ranked by bits per character, then the others.

    Another mean would be over other texts and seeds.
    """

    def values_of(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[key] for key in keys)

    groups = groupby(sorted(rows, key=values_of), values_of)
    scores = [_score(values, list(group)) for values, group in groups]
    return sorted(scores, key=lambda s: (s.num_failed, 0.0 if s.num_failed else s.mean))


def _score(values: tuple[str, ...], rows: list[dict[str, str]]) -> Score:
    finished = [row for row in rows if row["status"] == FINISHED]
    texts = dict.fromkeys(row["text"] for row in finished)
    bits = {
        text: fmean(float(row["bits_per_char"]) for row in finished if row["text"] == text)
        for text in texts
    }
    is_timed = finished and all(row["seconds"] for row in finished)
    seconds = fmean(float(row["seconds"]) for row in finished) if is_timed else None
    return Score(values, bits, seconds, len(rows) - len(finished), len(rows))


def ranking(scores: Sequence[Score], keys: Sequence[str], texts: Sequence[str]) -> Iterator[str]:
    """Yield the lines that show `scores`."""
    shown = [[*keys, "bits/char", *(texts if len(texts) > 1 else []), "seconds"]]
    for score in scores:
        figures = [f"{score.bits[text]:.4f}" if text in score.bits else "-" for text in texts]
        failed = f"{score.num_failed} of {score.num_trials} failed"
        shown.append(
            [
                *score.values,
                failed if score.num_failed else f"{score.mean:.4f}",
                *(figures if len(texts) > 1 else []),
                "-" if score.seconds is None else f"{score.seconds:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for line in shown:
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
