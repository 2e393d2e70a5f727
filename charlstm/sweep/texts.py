"""Texts of a sweep: each without its last tenth, which no trial sees."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from charlstm.data.cleaning import Cleaning
from charlstm.data.passes import TextStats, check_stats, collect_stats, log_cut, read_characters
from charlstm.data.sources import Source, find_source
from charlstm.data.vocab import END

UNSEEN_FRACTION = 0.1
VAL_FRACTION = 1 / 18  # of the rest, which is 5 % of the whole text
MAX_STEM = 40


class Text(NamedTuple):
    """A text that was read once."""

    name: str  # contains a part of the hash, since other content is another text
    source: Source
    stats: TextStats


def open_text(path: str, cleaning: Cleaning) -> Text:
    """Read the text at `path`, given as config.data.path.

    Raises:
      UserError: if it cannot be read or is empty.
    """
    remedy = "give UTF-8 text in --texts"
    source = find_source(path, remedy=remedy)
    stats = collect_stats(source, cleaning)
    check_stats(stats, source, cleaning, remedy)
    log_cut(source.path, stats.num_cut, int(stats.counts.sum()))
    stem = re.sub(r"\W+", "_", Path(source.path).name.split(".")[0])[:MAX_STEM] or "text"
    return Text(f"{stem}-{stats.sha256[:8]}", source, stats)


def write_seen_part(text: Text, cleaning: Cleaning, path: Path) -> None:
    """Write the cleaned text without its last tenth to `path`, unless the file exists.

    The cut is where train.py would cut. Cleaning is idempotent, so train.py may clean it again.

    Raises:
      UserError: if the source changes meanwhile.
    """
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    num_chars = int(text.stats.counts.sum())
    chunks = read_characters(text.source, cleaning)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for chunk in first_chars(chunks, num_chars - round(UNSEEN_FRACTION * num_chars)):
            file.write(chunk.replace(END, cleaning.separator) if cleaning.separator else chunk)
    text.source.refuse_changed()
    temporary.replace(path)


def first_chars(chunks: Iterable[str], count: int) -> Iterator[str]:
    """Yield the first `count` characters of a text in chunks."""
    for chunk in chunks:
        if count <= 0:
            return
        yield chunk[:count]
        count -= len(chunk)
