"""Write scored texts as a table, as TSV or as JSON, unit by unit."""

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table

from charlstm.data.vocab import END
from charlstm.errors import printable
from charlstm.evaluation.score import Scored, Totals
from charlstm.evaluation.units import Unit, split_units
from charlstm.runs.folder import Run
from charlstm.system.tables import plain_text

logger = logging.getLogger(__name__)

KEYS = {
    "char": ("line", "column", "bits", "entropy", "rank", "text", "top"),
    "word": ("line", "column", "characters", "bits", "bits_per_char", "text"),
    "line": ("line", "characters", "bits", "bits_per_char", "text"),
}
DIGITS = 6  # after the point in TSV and JSON
TABLE_DIGITS = {"entropy": 2, "bits": 2, "bits_per_char": 3, "bits_per_byte": 3, "perplexity": 3}
WIDTH = 10  # of a column of numbers in a table

Record = dict[str, Any]
Write = Callable[[str], Any]


def read_records(text: Scored, run: Run, by: str, is_ranked: bool) -> Iterator[Record]:
    """Yield a dict with KEYS[by] for each unit of a text, with None for what is not predicted.

    Ranked units are in descending order: lines by bits per character, words and characters by bits.
    """
    units: Iterable[Unit] = split_units(text.pieces, by)
    if is_ranked:
        key = "bits_per_char" if by == "line" else "bits"
        units = sorted(units, key=lambda unit: -getattr(unit, key) if unit.num_chars else 1)
    return (_record(unit, run, by) for unit in units)


def _begin(texts: Iterable[Scored], *settings: Any) -> Iterator[tuple[Scored, Iterator[Record]]]:
    """Yield each text with its records, after the first one is read, so that errors come first."""
    for text in texts:
        records = read_records(text, *settings)
        yield text, itertools.chain([next(records)], records)


def _record(unit: Unit, run: Run, by: str) -> Record:
    found: Record = {
        "line": unit.line,
        "column": unit.column,
        "text": _restored(unit.text, run),
        "characters": unit.num_chars,
    }
    if unit.num_chars:
        found |= {"bits": unit.bits, "bits_per_char": unit.bits_per_char}
    if unit.predictions is not None and unit.num_chars:
        _, [entropy], [rank], ids_1K, [probs] = (leaf.tolist() for leaf in unit.predictions)
        chars = [_restored(char, run) for char in run.vocab.decode(ids_1K[0])]
        top = [[char, round(prob, DIGITS)] for char, prob in zip(chars, probs, strict=True)]
        found |= {"entropy": entropy, "rank": rank, "top": top}
    return {key: found.get(key) for key in KEYS[by]}


def _restored(text: str, run: Run) -> str:
    """Return `text` with the run's separator for the end of a document."""
    separator = run.cleaning.separator
    return text.replace(END, separator) if separator else text


def _sum_up(texts: Sequence[Scored]) -> Totals:
    sums = Totals()
    for text in texts:
        sums.add(text.totals.num_chars, text.totals.bits, text.totals.num_bytes)
    return sums


def write_table(texts: Iterable[Scored], run: Run, by: str, is_ranked: bool, write: Write) -> None:
    r"""Write a table of units for each text, then a table of the sums.

    Control characters and white space other than spaces are escapes such as \n, except the newline
    at the end of a line and white space around a word, which are left out.
    """
    done = list[Scored]()
    for text, records in _begin(texts, run, by, is_ranked):
        write(f"{printable(text.name)}\n{_row({key: _title(key) for key in KEYS[by]})}\n")
        for record in records:
            cells = {key: _cell(key, value) for key, value in record.items()}
            write(_row(cells | {"text": _shown(record["text"], by)}) + "\n")
        write("\n")
        done.append(text)
    write(_totals_table(done) + "\n")


def _totals_table(texts: Sequence[Scored]) -> str:
    rows = [(text.name, text.totals.metrics()) for text in texts]
    if len(rows) > 1:
        rows.append(("total", _sum_up(texts).metrics()))
    table = Table("text", box=None, pad_edge=False)
    for key in rows[0][1]:
        table.add_column(_title(key), justify="right")
    for name, metrics in rows:
        table.add_row(name, *(_cell(key, value) for key, value in metrics.items()))
    return plain_text(table)


def _row(cells: dict[str, str]) -> str:
    """Return cells side by side: numbers right-aligned, then the text and what follows it."""
    widths = {"text": "<8", "top": ""}
    padded = (f"{cell:{widths.get(key, f'>{WIDTH}')}}" for key, cell in cells.items())
    return "  ".join(padded).rstrip()


def _title(key: str) -> str:
    return key.replace("_per_", "/").replace("top", "most probable")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "top":
        return "  ".join(f"{char!r} {prob:.2f}" for char, prob in value)
    return f"{value:,.{TABLE_DIGITS[key]}f}" if key in TABLE_DIGITS else str(value)


def _shown(text: str, by: str) -> str:
    if by == "char":
        return repr(text)
    text = text.strip() or text if by == "word" else text.removesuffix("\n")
    return printable(text.replace("\t", "\\t").replace("\n", "\\n"))


def write_tsv(texts: Iterable[Scored], run: Run, by: str, is_ranked: bool, write: Write) -> None:
    r"""Write tab-separated values with a title row: the name of the text, then KEYS[by].

    Tabs, newlines and other control characters are escapes such as \t, \n and \x1b, and a backslash
    is \\. The cell `top` is JSON. What is not predicted is empty. The sums are logged.
    """
    title = "\t".join(["file", *KEYS[by]]) + "\n"
    for text, records in _begin(texts, run, by, is_ranked):
        write(title)
        title = ""
        for record in records:
            write("\t".join(map(_tsv_cell, [text.name, *record.values()])) + "\n")
        log_totals(text)


def _tsv_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.{DIGITS}f}"
    if isinstance(value, list):
        return json.dumps(value)
    text = "" if value is None else str(value).replace("\\", "\\\\")
    return printable(text.replace("\t", "\\t").replace("\n", "\\n"))


def log_totals(text: Scored) -> None:
    """Log the sums of a text in one line."""
    metrics = text.totals.metrics().items()
    shown = (f"{_title(key)} {_cell(key, value)}" for key, value in metrics if value is not None)
    logger.info("%s: %s", text.name, ", ".join(shown))


def write_json(texts: Iterable[Scored], run: Run, by: str, is_ranked: bool, write: Write) -> None:
    """Write one JSON object: `by`, `texts` with their `units` (KEYS[by]) and `total`, and `total`.

    Each unit is one line.
    """
    done = list[Scored]()
    before = f'{{"workdir": {json.dumps(str(run.workdir))}, "by": "{by}", "texts": ['
    for text, records in _begin(texts, run, by, is_ranked):
        write(f'{before}\n{{"file": {json.dumps(text.name)}, "units": [')
        for index, record in enumerate(records):
            write(("," if index else "") + "\n" + _json(record))
        write(f'],\n"total": {_json(text.totals.metrics())}}}')
        before = ","
        done.append(text)
    write(f'],\n"total": {_json(_sum_up(done).metrics())}}}\n')


def write_json_lines(
    texts: Iterable[Scored], run: Run, by: str, is_ranked: bool, write: Write
) -> None:
    """Write a JSON object in each line: those of the units of a text, then its `total`."""
    for text in texts:
        for record in read_records(text, run, by, is_ranked):
            write(_json({"file": text.name} | record) + "\n")
        write(_json({"file": text.name, "total": text.totals.metrics()}) + "\n")


def _json(record: Record) -> str:
    return json.dumps(_rounded(record), allow_nan=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, DIGITS) if isinstance(value, float) else value
