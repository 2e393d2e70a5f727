"""A text of any size as an array of ids, in memory or memory-mapped.

The ids of a large text are stored in the user's cache:

texts/KEY/ids.bin      the ids, 1, 2 or 4 bytes each; KEY is a hash of content and settings
texts/KEY/about.json   their vocabulary and origin
texts/opened/*.json    sizes and times of the files of a text, and its KEY: saves hashing them
"""

import errno
import hashlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from charlstm.data.cleaning import Cleaning
from charlstm.data.passes import TextStats, check_stats, collect_stats, encode_text, log_cut
from charlstm.data.sources import Source, find_source
from charlstm.data.vocab import Vocab
from charlstm.errors import DamagedError, RunError, UserError
from charlstm.files import read_json, write_file
from charlstm.system.paths import cache_folder

logger = logging.getLogger(__name__)

FORMAT = 2  # increase it when the same text and settings give other ids
# Texts of at most this many characters are encoded in memory at each start, in about a second.
SMALL_CHARS = 2**24


class Corpus(NamedTuple):
    """The ids of a text and their origin."""

    ids_M: np.ndarray
    vocab: Vocab
    source: str  # an absolute path, or PYTHON_MANUAL
    sha256: str  # see sources.hash_of
    num_bytes: int  # of the files
    num_cut: int  # characters of Project Gutenberg's headers, footers and licences
    num_unknown: int  # characters outside `vocab`, replaced or dropped


def open_corpus(
    data: ConfigDict,
    path: str,
    *,
    source: str = "",
    vocab: Vocab | None = None,
    unknown: str = "error",
    remedy: str = "give UTF-8 text in config.data.path",
) -> Corpus:
    """Return the text at `path`, cleaned as `config.data` asks for.

    Args:
      data: the settings `config.data`.
      path: a file, a folder or a pattern: see find_source.
      source: the source of the run's text, if any: see find_source.
      vocab: the vocabulary; None builds one from the text.
      unknown: what to do with characters outside `vocab`: see Vocab.encode.
      remedy: what to do about a text that cannot be read, for errors.

    Raises:
      UserError: if the text is missing, unreadable, empty or not UTF-8, or changes meanwhile.
      RunError: if the ids of a large text cannot be written.
    """
    files = find_source(path, source, remedy)
    cleaning = Cleaning.from_config(data)
    settings = [FORMAT, *cleaning, data.min_count, vocab and vocab.characters, unknown]
    is_own = vocab is None
    corpus = _reopen(files, settings)
    if corpus is None:
        stats = collect_stats(files, cleaning)
        check_stats(stats, files, cleaning, remedy, needs_separator=is_own)
        if vocab is None:
            vocab, unknown = Vocab.from_counts(stats.counts, data.min_count), "replace"
        corpus = _encode(files, cleaning, stats, vocab, unknown, settings)
    log_cut(corpus.source, corpus.num_cut, len(corpus.ids_M), only_warn=is_own)
    return corpus


def _encode(
    files: Source,
    cleaning: Cleaning,
    stats: TextStats,
    vocab: Vocab,
    unknown: str,
    settings: list[Any],
) -> Corpus:
    """Encode a text in memory, or in the cache if it is large."""
    num_chars = int(stats.counts.sum())
    num_known = int(stats.counts[[ord(char) for char in vocab]].sum())
    about = {
        "vocab": vocab.characters,
        "sha256": stats.sha256,
        "num_cut": stats.num_cut,
        "num_unknown": num_chars - num_known,
    }
    pieces = encode_text(files, cleaning, vocab, unknown)
    if num_chars <= SMALL_CHARS:
        return _make_corpus(np.concatenate(list(pieces)), about, files)
    folder = texts_folder() / _hash([stats.sha256, settings])
    num_bytes = num_chars * vocab.dtype.itemsize
    try:
        with _lock(folder):
            if _load(folder, files) is None:
                _store(folder, pieces, about, num_bytes)
        _remember(files, settings, folder.name)
    except OSError as error:
        raise RunError(
            f"{texts_folder()}: cannot be written ({error.strerror or error}); the text needs "
            f"{num_bytes:,} bytes there: make room, or set the environment variable "
            "CHARLSTM_CACHE to another folder"
        ) from None
    corpus = _load(folder, files)
    if corpus is None:
        raise RunError(f"{folder}: was removed meanwhile; give the same command again")
    return corpus


def _make_corpus(ids_M: np.ndarray, about: dict[str, Any], files: Source) -> Corpus:
    return Corpus(
        ids_M=ids_M,
        vocab=Vocab(about["vocab"]),
        source=files.path,
        sha256=about["sha256"],
        num_bytes=files.num_bytes,
        num_cut=about["num_cut"],
        num_unknown=about["num_unknown"],
    )


def forget_pages(ids_M: np.ndarray) -> None:
    """Release the memory of a memory-mapped text; pages are read again when needed.

    Otherwise the system counts pages as used until memory is short.
    """
    base: Any = ids_M
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def texts_folder() -> Path:
    """Return the folder of the cache for the ids of large texts."""
    return cache_folder() / "texts"


def _lock(folder: Path) -> AbstractContextManager[Any]:
    """Acquire the lock of `folder`, which the system releases when its holder ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process, which encodes the same text")
        return lock.acquire()


def _store(
    folder: Path, pieces: Iterable[np.ndarray], about: dict[str, Any], num_bytes: int
) -> None:
    """Write the ids of a text, at most `num_bytes`, to `folder`: all or nothing."""
    for leftover in folder.parent.glob("*.tmp"):  # of killed processes
        with suppress(Timeout), FileLock(leftover.with_suffix(".lock"), timeout=0):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # damaged
    try:
        temporary.mkdir()
        if shutil.disk_usage(temporary).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(temporary / "ids.bin", "wb") as file:
            written = sum(file.write(ids.data) for ids in pieces)
            file.flush()
            os.fsync(file.fileno())
        (temporary / "about.json").write_text(json.dumps(about | {"num_bytes": written}))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(folder: Path, files: Source) -> Corpus | None:
    """Return the text whose ids are in `folder`, or None if they are missing or damaged."""
    with suppress(DamagedError, LookupError, TypeError, ValueError, OSError):
        about = read_json(epath.Path(folder / "about.json"))
        dtype = Vocab(about["vocab"]).dtype
        ids_M = np.asarray(np.memmap(folder / "ids.bin", dtype, mode="r"))
        if ids_M.nbytes == about["num_bytes"]:
            return _make_corpus(ids_M, about, files)
    return None


def _remember(files: Source, settings: list[Any], key: str) -> None:
    path = _note_path(files, settings)
    path.parent.mkdir(exist_ok=True)
    write_file(epath.Path(path), json.dumps({"signature": files.signature, "key": key}))


def _reopen(files: Source, settings: list[Any]) -> Corpus | None:
    """Return a text that was opened before and whose files have not changed, else None."""
    with suppress(UserError, KeyError, TypeError):  # a damaged note, or no cache
        note = read_json(epath.Path(_note_path(files, settings)))
        if note["signature"] == files.signature:
            return _load(texts_folder() / Path(note["key"]).name, files)
    return None


def _note_path(files: Source, settings: list[Any]) -> Path:
    return texts_folder() / "opened" / f"{_hash([files.path, settings])}.json"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
