"""The two passes over the files of a text: count its characters, then encode them."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from charlstm.data.cleaning import Cleaning, CleaningStats
from charlstm.data.encoding import decode
from charlstm.data.sources import File, Source, hash_of, read_blocks
from charlstm.data.vocab import END, Vocab, count_characters
from charlstm.errors import UserError
from charlstm.system.console import reading_bar

logger = logging.getLogger(__name__)

LARGE_BYTES = 2**24  # on disk; passes over larger texts show their progress


class TextStats(NamedTuple):
    """Statistics of a text, from the first pass."""

    counts: np.ndarray  # occurrences of each code point
    sha256: str  # see sources.hash_of
    num_cut: int  # characters of Project Gutenberg's headers, footers and licences
    num_separators: int


def read_characters(
    source: Source,
    cleaning: Cleaning,
    stats: CleaningStats | None = None,
    on_bytes: Callable[[File, bytes], Any] = lambda file, raw: None,
) -> Iterator[str]:
    """Yield the cleaned characters of all files in order.

    Args:
      source: the files.
      cleaning: how to clean their characters.
      stats: see Cleaning.apply.
      on_bytes: called with each file and piece of its bytes as they are on disk.
    """
    for file in source.files:
        blocks = read_blocks(file, partial(on_bytes, file))
        yield from cleaning.apply(decode(blocks, file.path), stats)


def collect_stats(source: Source, cleaning: Cleaning) -> TextStats:
    """Count the characters of a text and hash its files, the first pass."""
    stats = CleaningStats()
    digests = {file.name: hashlib.sha256() for file in source.files}
    with _progress("counting characters", source) as advance:

        def on_bytes(file: File, raw: bytes) -> None:
            digests[file.name].update(raw)
            advance(len(raw))

        counts = count_characters(read_characters(source, cleaning, stats, on_bytes))
    sha256 = hash_of(source, [digest.hexdigest() for digest in digests.values()])
    return TextStats(counts, sha256, stats.num_cut, stats.num_separators)


def encode_text(
    source: Source, cleaning: Cleaning, vocab: Vocab, unknown: str
) -> Iterator[np.ndarray]:
    """Yield the ids of a text in pieces, the second pass.

    Args:
      source: the files.
      cleaning: how to clean their characters.
      vocab: the vocabulary.
      unknown: what to do with characters outside `vocab`: see Vocab.encode.

    Raises:
      UserError: at the end, if a file has changed since it was found.
    """
    start = 0
    with _progress("encoding characters", source) as advance:
        on_bytes = lambda file, raw: advance(len(raw))  # noqa: E731
        for chunk in read_characters(source, cleaning, on_bytes=on_bytes):
            yield vocab.encode(chunk, unknown, start)
            start += len(chunk)
        source.refuse_changed()


def check_stats(
    stats: TextStats, source: Source, cleaning: Cleaning, remedy: str, needs_separator: bool = True
) -> None:
    """Raise UserError if a text is empty, or is one file that `needs_separator` and has none."""
    characters = "".join(map(chr, np.flatnonzero(stats.counts))).replace(END, "")
    if not characters.strip():
        raise UserError(f"{source.path}: the text is empty; {remedy}")
    if num_nul := stats.counts[0]:
        logger.warning(
            "%s: contains %s NUL characters (U+0000), like a damaged file",
            source.path,
            f"{num_nul:,}",
        )
    is_missing = cleaning.separator and not stats.num_separators
    if needs_separator and is_missing and len(source.files) == 1:
        raise UserError(
            f"config.data.document_separator={cleaning.separator!r}: does not occur in "
            f"{source.path}; give the separator of its documents, or none"
        )


def log_cut(path: str, num_cut: int, num_left: int, only_warn: bool = False) -> None:
    """Log how many characters were cut from a text, as a warning if more than a tenth."""
    is_much = 10 * num_cut > num_cut + num_left
    if is_much or (num_cut and not only_warn):
        logger.log(
            logging.WARNING if is_much else logging.INFO,
            "%s: cut %s characters of Project Gutenberg's headers and licences, %s remain",
            path,
            f"{num_cut:,}",
            f"{num_left:,}",
        )


@contextmanager
def _progress(title: str, source: Source) -> Iterator[Callable[[int], Any]]:
    """Yield advance(number of bytes); show a bar for a large text, and log the speed at the end."""
    if source.num_bytes <= LARGE_BYTES:
        yield lambda count: None
        return
    begin = time.perf_counter()
    with reading_bar(title, source.num_bytes) as advance:
        yield advance
    seconds, megabytes = time.perf_counter() - begin, source.num_bytes / 1e6
    speed = megabytes / seconds
    logger.info("%s: %s MB in %.1f s, %.0f MB/s", title, f"{megabytes:,.0f}", seconds, speed)
