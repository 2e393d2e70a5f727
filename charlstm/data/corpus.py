"""A text of any size as an array of ids: one pass for the characters, one to number them.

A large text's ids lie in the user's cache and are mapped into memory, so that only the pages that
are read take any:

texts/KEY/ids.bin      the ids, 1, 2 or 4 bytes each; KEY is a hash of content and preparation
texts/KEY/about.json   their vocabulary, and what they were made of
texts/opened/*.json    what the files of a text looked like, and their KEY: saves hashing them
"""

import errno
import hashlib
import json
import logging
import mmap
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from charlstm.data.cleaning import Cleaning
from charlstm.data.encoding import decode
from charlstm.data.sources import File, Source, find_source, hash_of, read_blocks
from charlstm.data.vocab import END, Vocab, count_characters
from charlstm.errors import DamagedError, RunError, UserError
from charlstm.files import read_json, write_file
from charlstm.system.console import reading_bar
from charlstm.system.paths import cache_folder

logger = logging.getLogger(__name__)

FORMAT = 2  # raised whenever the same text would give other ids
# Texts of at most this many characters are encoded in memory at each start, in a second.
SMALL_CHARS = 2**24
SMALL_BYTES = 2**24  # on disk; above it the passes are worth a progress bar


class Corpus(NamedTuple):
    """A text as ids, and its origin: `source` is an absolute path or PYTHON_MANUAL."""

    ids_M: np.ndarray
    vocab: Vocab
    source: str
    sha256: str  # see source.hash_of
    num_bytes: int  # of the files
    num_cut: int  # characters of Project Gutenberg's headers, footers and licences left out
    num_unknown: int  # characters that are not in `vocab`, replaced or dropped


class TextStats(NamedTuple):
    """What the first pass finds."""

    counts: np.ndarray  # how often each code point occurs
    sha256: str
    num_cut: int
    num_separators: int


def open_corpus(
    data: ConfigDict,
    path: str,
    *,
    source: str = "",
    vocab: Vocab | None = None,
    unknown: str = "error",
    remedy: str = "give UTF-8 text in config.data.path",
) -> Corpus:
    """Read a text as `config.data` says, in memory of a fixed size but for the ids of a small one.

    Args:
      data: how to clean it.
      path: what to read: see find_source.
      source: what an earlier run read.
      vocab: the characters; None takes the text's own, of which the rare ones are folded.
      unknown: what to do with others than those of `vocab`: see Vocab.encode.
      remedy: what to do, for the error of a text that cannot be read.

    Raises:
      UserError: if it is missing, unreadable, empty, not UTF-8, or changes meanwhile.
      RunError: if the ids of a large text cannot be written.
    """
    found = find_source(path, source, remedy)
    cleaning = Cleaning.from_config(data)
    characters = vocab.characters if vocab else None
    recipe = [FORMAT, *cleaning, data.min_count, characters, unknown]
    corpus = _reopen(found, recipe)
    if corpus is None:
        stats = collect_stats(found, cleaning)
        check_stats(stats, found, cleaning, remedy, is_own=vocab is None)
        used = vocab or Vocab.from_counts(stats.counts, data.min_count)
        if vocab is None and data.min_count > 1:
            unknown = "replace"
        corpus = _prepare(found, cleaning, stats, used, unknown, recipe)
    log_cut(corpus.source, corpus.num_cut, len(corpus.ids_M), is_reported=vocab is None)
    return corpus


def _prepare(
    found: Source,
    cleaning: Cleaning,
    stats: TextStats,
    vocab: Vocab,
    unknown: str,
    recipe: list[Any],
) -> Corpus:
    """Return a text whose ids are in memory, or in the cache if there are many."""
    pieces = number(found, cleaning, vocab, unknown)
    num_chars = int(stats.counts.sum())
    num_unknown = num_chars - int(stats.counts[[ord(char) for char in vocab.characters]].sum())
    if num_chars <= SMALL_CHARS:
        ids_M = np.concatenate(list(pieces))
        origin = found.path, stats.sha256, found.num_bytes, stats.num_cut, num_unknown
        return Corpus(ids_M, vocab, *origin)
    about = {
        "vocabulary": vocab.characters,
        "sha256": stats.sha256,
        "characters_cut": stats.num_cut,
        "characters_unknown": num_unknown,
    }
    folder = texts_folder() / _hash([stats.sha256, recipe])
    num_bytes = num_chars * vocab.dtype.itemsize
    with cache_writable(num_bytes):
        with prepared_once(folder):
            if _open(folder, found) is None:
                _store(folder, pieces, about, num_bytes)
        _remember(found, recipe, folder.name)
    corpus = _open(folder, found)
    if corpus is None:
        raise RunError(f"{folder}: has vanished; give the same command again")
    return corpus


def log_cut(path: str, num_cut: int, num_left: int, is_reported: bool = False) -> None:
    """Log how many characters were left out of a text, if any; a lot is a warning.

    Of a text of which this `is_reported` elsewhere, only the warning is logged.
    """
    is_much = 10 * num_cut > num_cut + num_left
    if is_much or (num_cut and not is_reported):
        logger.log(
            logging.WARNING if is_much else logging.INFO,
            "%s: left out %s characters of Project Gutenberg's headers and licences, %s remain",
            path,
            f"{num_cut:,}",
            f"{num_left:,}",
        )


def read_characters(
    source: Source,
    cleaning: Cleaning,
    tally: Counter[str],
    on_read: Callable[[File, bytes], Any],
) -> Iterator[str]:
    """Yield the cleaned characters of all files in order: see Cleaning.apply and read_blocks."""
    for file in source.files:
        blocks = read_blocks(file, partial(on_read, file))
        yield from cleaning.apply(decode(blocks, file.where), tally)


def collect_stats(source: Source, cleaning: Cleaning) -> TextStats:
    """Read a text for the first time: count its characters and hash its bytes."""
    tally: Counter[str] = Counter()
    digests = {file.name: hashlib.sha256() for file in source.files}
    with reading("counting characters", source) as advance:

        def on_read(file: File, raw: bytes) -> None:
            digests[file.name].update(raw)
            advance(len(raw))

        counts = count_characters(read_characters(source, cleaning, tally, on_read))
    sha256 = hash_of(source, [digest.hexdigest() for digest in digests.values()])
    return TextStats(counts, sha256, tally["cut"], tally["separators"])


def number(source: Source, cleaning: Cleaning, vocab: Vocab, unknown: str) -> Iterator[np.ndarray]:
    """Yield the ids of a text, which is read for the second time, in pieces.

    Raises:
      UserError: at the end, if the files are not as they were found.
    """
    start = 0
    with reading("numbering characters", source) as advance:
        on_read = lambda file, raw: advance(len(raw))  # noqa: E731
        for chunk in read_characters(source, cleaning, Counter(), on_read):
            yield vocab.encode(chunk, unknown, start)
            start += len(chunk)
        source.refuse_changed()


def check_stats(
    stats: TextStats, source: Source, cleaning: Cleaning, remedy: str, is_own: bool = True
) -> None:
    """Raise UserError if a text is empty, or lacks the separator though it `is_own`: the run's."""
    found = "".join(map(chr, np.flatnonzero(stats.counts))).replace(END, "")
    if not found.strip():
        raise UserError(f"{source.path}: the text is empty; {remedy}")
    if num_nul := stats.counts[0]:
        logger.warning(
            "%s: holds %s NUL characters (U+0000), as damaged files do", source.path, f"{num_nul:,}"
        )
    is_missing = cleaning.separator and not stats.num_separators
    if is_own and is_missing and len(source.files) == 1:
        raise UserError(
            f"config.data.document_separator={cleaning.separator!r}: is nowhere in {source.path}; "
            "give the one that stands between its documents, or none"
        )


@contextmanager
def reading(what: str, source: Source) -> Iterator[Callable[[int], Any]]:
    """Yield advance(number of bytes) for a pass over a large text: a bar, and at its end a line."""
    if source.num_bytes <= SMALL_BYTES:
        yield lambda count: None
        return
    begin = time.perf_counter()
    with reading_bar(what, source.num_bytes) as advance:
        yield advance
    seconds, megabytes = time.perf_counter() - begin, source.num_bytes / 1e6
    speed = megabytes / seconds
    logger.info("%s: %s MB in %.1f s, %.0f MB/s", what, f"{megabytes:,.0f}", seconds, speed)


def forget_pages(ids_M: np.ndarray) -> None:
    """Let go of the pages of a mapped text that have been read; reading them again is cheap.

    The system would take them back where memory is short, but would count them as used till then.
    """
    base: Any = ids_M
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def texts_folder() -> Path:
    """Return the folder of the cache that holds the ids of large texts."""
    return cache_folder() / "texts"


@contextmanager
def cache_writable(num_bytes: int) -> Iterator[None]:
    """Turn a write that fails within the block into one line."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{texts_folder()}: could not be written ({error.strerror or error}); the text takes "
            f"{num_bytes:,} bytes there: make room, or name a folder that has it in the "
            "environment variable CHARLSTM_CACHE"
        ) from None


@contextmanager
def prepared_once(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block for `folder`; a lock ends with its holder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process prepares this text: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _note_of(source: Source, recipe: list[Any]) -> Path:
    return texts_folder() / "opened" / f"{_hash([source.path, recipe])}.json"


def _remember(source: Source, recipe: list[Any], key: str) -> None:
    path = _note_of(source, recipe)
    path.parent.mkdir(exist_ok=True)
    note = {"signature": source.signature, "key": key}
    write_file(epath.Path(path), json.dumps(note))


def _reopen(source: Source, recipe: list[Any]) -> Corpus | None:
    """Return the text if it was opened before and its files look as they did."""
    with suppress(UserError, KeyError, TypeError):  # damaged, or there is no cache
        note = read_json(epath.Path(_note_of(source, recipe)))
        if note["signature"] == source.signature:
            return _open(texts_folder() / Path(note["key"]).name, source)
    return None


def _open(folder: Path, source: Source) -> Corpus | None:
    """Return the text whose ids lie in `folder`, None where they don't, or not whole."""
    with suppress(DamagedError, LookupError, TypeError, ValueError, OSError):
        about = read_json(epath.Path(folder / "about.json"))
        vocab = Vocab(about["vocabulary"])
        with open(folder / "ids.bin", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(mapped) == about["bytes"]:
            ids_M = np.frombuffer(mapped, vocab.dtype)
            origin = source.path, about["sha256"], source.num_bytes
            return Corpus(
                ids_M, vocab, *origin, about["characters_cut"], about["characters_unknown"]
            )
    return None


def _store(
    folder: Path, pieces: Iterable[np.ndarray], about: dict[str, Any], num_bytes: int
) -> None:
    """Write the ids of a text as `folder`, whole or not at all; `num_bytes` are enough."""
    for leftover in folder.parent.glob("*.tmp"):  # of preparations that were killed
        with suppress(Timeout), FileLock(leftover.with_suffix(".lock"), timeout=0):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # not whole
    try:
        temporary.mkdir()
        if shutil.disk_usage(temporary).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(temporary / "ids.bin", "wb") as file:
            written = sum(file.write(ids.data) for ids in pieces)
            file.flush()
            os.fsync(file.fileno())
        (temporary / "about.json").write_text(json.dumps(about | {"bytes": written}))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
