"""Results of a sweep: trials.tsv with a line per trial, and the ranking of its combinations."""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from etils import epath
from rich.table import Table

from charlstm.errors import DamagedError
from charlstm.files import write_file
from charlstm.sweep.trials import FINISHED, Trial
from charlstm.system.tables import plain_text

Row = dict[str, str]  # a line of trials.tsv, by column


class Combination(NamedTuple):
    """The results of all trials with one combination of settings."""

    settings: dict[str, Any]  # those that vary
    bits: dict[str, float]  # bits per character on each text, the mean over seeds
    seconds: float | None  # mean of the trials; None if one was not timed
    num_failed: int
    num_trials: int

    @property
    def mean_bits(self) -> float:
        """Bits per character, the mean over texts."""
        return fmean(self.bits.values())


def columns_of(keys: Sequence[str]) -> list[str]:
    """Return the columns of trials.tsv if the settings `keys` vary."""
    metrics = ["steps", "bits_per_char", "best_bits_per_char", "seconds", "status", "versions"]
    return ["trial", "text", "seed", *sorted(keys), *metrics]


def read_table(path: Path, columns: Sequence[str]) -> dict[str, Row]:
    """Return the lines of a trials.tsv by the names of their trials; drop an incomplete last line.

    Raises:
      DamagedError: if a line is not as `append` writes it.
    """
    if not path.exists():
        return {}
    content = path.read_text(encoding="utf-8")
    complete = content[: content.rfind("\n") + 1]
    if complete != content:
        write_file(epath.Path(path), complete)
    head, *lines = list(csv.reader(io.StringIO(complete), delimiter="\t")) or [list(columns)]
    try:
        if head != list(columns):
            raise ValueError("other columns")
        rows = [dict(zip(columns, line, strict=True)) for line in lines]
        for row in rows:
            for name in ("bits_per_char", "seconds"):
                float(row[name] or 0)
            if row["status"] == FINISHED and not row["bits_per_char"]:
                raise ValueError("a finished trial without bits_per_char")
    except ValueError as error:
        raise DamagedError(
            f"{path}: damaged ({error}); correct the line, or choose another --out"
        ) from None
    return {row["trial"]: row for row in rows}


def append(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    """Append a line to a trials.tsv and wait until it is on the disk."""
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def rank(trials: Sequence[Trial], rows: Mapping[str, Row]) -> list[Combination]:
    """Return the combinations whose trials have all ended, the best first.

    Those without a failed trial are sorted by bits per character. The others come last, because
    their means would be over other texts and seeds.
    """
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial.settings.values()), []).append(trial)
    combinations = [
        summarize(group[0].settings, [rows[trial.name] for trial in group])
        for group in groups.values()
        if all(trial.name in rows for trial in group)
    ]
    return sorted(combinations, key=lambda c: (c.num_failed, 0.0 if c.num_failed else c.mean_bits))


def summarize(settings: dict[str, Any], rows: Sequence[Row]) -> Combination:
    """Return the means over the trials of one combination, given their lines."""
    finished = [row for row in rows if row["status"] == FINISHED]
    texts = dict.fromkeys(row["text"] for row in finished)
    bits = {
        text: fmean(float(row["bits_per_char"]) for row in finished if row["text"] == text)
        for text in texts
    }
    is_timed = finished and all(row["seconds"] for row in finished)
    seconds = fmean(float(row["seconds"]) for row in finished) if is_timed else None
    return Combination(settings, bits, seconds, len(rows) - len(finished), len(rows))


def ranking(combinations: Sequence[Combination]) -> str:
    """Return a table of `combinations`; each text has a column if there are several."""
    texts = list(dict.fromkeys(text for c in combinations for text in c.bits))
    columns = texts if len(texts) > 1 else []
    table = Table(box=None, pad_edge=False)
    for name in (*combinations[0].settings, "bits/char", *columns, "seconds"):
        table.add_column(name, justify="right")
    for combination in combinations:
        table.add_row(*_cells(combination, columns))
    return plain_text(table)


def _cells(combination: Combination, texts: Sequence[str]) -> Iterator[str]:
    yield from map(str, combination.settings.values())
    if combination.num_failed:
        yield f"{combination.num_failed} of {combination.num_trials} failed"
    else:
        yield f"{combination.mean_bits:.4f}"
    for text in texts:
        yield f"{combination.bits[text]:.4f}" if text in combination.bits else "-"
    yield "-" if combination.seconds is None else f"{combination.seconds:.1f}"
