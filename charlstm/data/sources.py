"""Where a text comes from: files, folders, patterns or Dracula, and their bytes, decompressed."""

import bz2
import hashlib
import io
import logging
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pooch
import zstandard
from etils import epath

from charlstm.data.encoding import compression_of
from charlstm.data.find import ending_of, find_files, readable
from charlstm.errors import UserError
from charlstm.files import is_local
from charlstm.system.paths import cache_folder

logger = logging.getLogger(__name__)

DRACULA_URLS = (
    "https://www.gutenberg.org/cache/epub/345/pg345.txt",
    "https://www.gutenberg.org/files/345/345-0.txt",
    "https://gutenberg.pglaf.org/cache/epub/345/pg345.txt",
    "https://aleph.pglaf.org/cache/epub/345/pg345.txt",
)
PYTHON_MANUAL = "pydoc_data.topics"
BLOCK = 2**20
# Of a compressed file, of which a piece may grow ten thousand times.
COMPRESSED_BLOCK = 2**12


class File(NamedTuple):
    """One file of a text."""

    where: str  # for errors
    name: str  # relative to the folder, the same wherever the folder lies
    signature: tuple[float, ...]  # size, times, inode: what changes where the content does
    look: Callable[[], tuple[float, ...]]  # gives the signature of now
    open: Callable[[], BinaryIO]

    @property
    def num_bytes(self) -> int:
        """The size on disk."""
        return int(self.signature[0])


class Source(NamedTuple):
    """The files of a text, in order."""

    path: str  # absolute, or PYTHON_MANUAL
    files: list[File]

    @property
    def num_bytes(self) -> int:
        """The size of all files on disk."""
        return sum(file.num_bytes for file in self.files)

    @property
    def signature(self) -> list[Any]:
        """Names, sizes and times of all files: equal to the one before if nothing has changed."""
        return [[file.name, *file.signature] for file in self.files]

    def refuse_changed(self) -> None:
        """Raise UserError if a file is not as it was found."""
        for file in self.files:
            with readable(file.where, "give the same command again"):
                if file.look() != file.signature:
                    raise UserError(
                        f"{file.where}: has changed while it was read; give the same command again "
                        "once it is whole"
                    )


def find_source(path: str, source: str = "", remedy: str = "give another one") -> Source:
    """Return the files that `path` means.

    Args:
      path: a file, a folder or a pattern: see find_files. Empty means Dracula, downloaded once, or
        else Python's manual.
      source: what an earlier run read; PYTHON_MANUAL keeps it from taking Dracula instead.
      remedy: what to do, for errors.

    Raises:
      UserError: if there are none, or one cannot be read.
    """
    if not path and source != PYTHON_MANUAL:
        path = fetch_dracula()
    if not path:
        return Source(PYTHON_MANUAL, [_python_manual()])
    found = find_files(path, remedy)
    files = [_file(file, name, remedy) for name, file in found.files.items()]
    return Source(os.fspath(found.origin), files)


def hash_of(source: Source, digests: list[str]) -> str:
    """Return a SHA-256 for the content of all files, from that of each.

    For a single file it is the file's, as sha256sum prints it; for several that of the lines that
    sha256sum prints of them, in order of their names.
    """
    if len(digests) == 1:
        return digests[0]
    names = (os.fsencode(file.name) for file in source.files)
    lines = (
        b"%s  %s\n" % (digest.encode(), name) for digest, name in zip(digests, names, strict=True)
    )
    return hashlib.sha256(b"".join(lines)).hexdigest()


def read_blocks(file: File, on_read: Callable[[bytes], Any] = len) -> Iterator[bytes]:
    """Yield what a file holds, decompressed, in blocks of BLOCK bytes.

    Args:
      file: compressed if its name says so.
      on_read: called with each piece as it lies on the disk, in order.

    Raises:
      UserError: if it cannot be read, or decompressed to its end.
    """
    ending = ending_of(file.name)
    make = DECOMPRESSORS.get(ending)
    try:
        with readable(file.where, "mend it, or leave it out"), file.open() as stream:
            size = COMPRESSED_BLOCK if make else BLOCK
            pieces = _reported(iter(lambda: stream.read(size), b""), on_read)
            yield from _regroup(_decompress(pieces, ending)) if make else pieces
    except DecompressionError as error:
        raise UserError(
            f"{file.where}: cannot be decompressed ({error}); fetch or compress it again"
        ) from None


def _reported(pieces: Iterable[bytes], on_read: Callable[[bytes], Any]) -> Iterator[bytes]:
    for piece in pieces:
        on_read(piece)
        yield piece


class DecompressionError(Exception):
    """A compressed file that is not as it was written."""


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # with gzip's header and checksum
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


def _decompress(pieces: Iterable[bytes], ending: str) -> Iterator[bytes]:
    """Yield the content of concatenated compressed files."""
    # Not by the libraries' own readers: some take half a file for a whole one, or ignore its end.
    make = DECOMPRESSORS[ending]
    decompressor, is_first = make(), True
    for piece in pieces:
        other = compression_of(piece) if is_first else ""
        if other not in ("", ending):
            raise DecompressionError(f"its name should end in {other}")
        is_first = False
        while piece:
            if decompressor.eof:
                decompressor = make()
            try:
                content = decompressor.decompress(piece)
            except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError) as error:
                raise DecompressionError(error) from None
            yield content
            piece = decompressor.unused_data
    if not decompressor.eof:
        raise DecompressionError("it ends too soon")


def _regroup(pieces: Iterable[bytes]) -> Iterator[bytes]:
    held = bytearray()
    for piece in pieces:
        held += piece
        if len(held) >= BLOCK:
            yield bytes(held)
            held.clear()
    yield bytes(held)


def _file(path: epath.Path, name: str, remedy: str) -> File:
    where = os.fspath(path)

    def look() -> tuple[float, ...]:
        if not is_local(path):
            found = path.stat()
            return found.length, found.mtime or 0
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{where}: is no regular file, which can be read twice; {remedy}")
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino

    with readable(where, remedy):
        return File(where, name, look(), look, lambda: path.open("rb"))


def _python_manual() -> File:
    from pydoc_data.topics import topics  # half a megabyte that most runs don't need

    raw = "\n".join(topics[key] for key in sorted(topics)).encode()
    size = (len(raw),)
    return File(PYTHON_MANUAL, PYTHON_MANUAL, size, lambda: size, lambda: io.BytesIO(raw))


def fetch_dracula() -> str:
    """Return the path of Dracula in the user's cache, downloaded if need be; '' if that fails.

    A process tries, and warns, only once.
    """
    return _fetch_into(cache_folder())


@cache
def _fetch_into(folder: Path) -> str:
    import requests  # comes with pooch, which raises its errors

    target = folder / "pg345.txt"
    if target.exists():
        return str(target)
    reason = ""
    pooch.get_logger().setLevel("ERROR")
    logger.info("downloading Dracula from Project Gutenberg to %s", target)
    for url in DRACULA_URLS:
        try:
            # Gutenberg mends its books now and then, so the bytes have no lasting hash.
            pooch.retrieve(
                url,
                known_hash=None,
                fname=target.name,
                path=folder,
                downloader=pooch.HTTPDownloader(timeout=5),
            )
        except (requests.RequestException, OSError, ValueError) as error:
            reason = f"{type(error).__name__} from {url}"
            continue
        if b"Dracula" in target.read_bytes()[:2000]:
            return str(target)
        target.unlink()  # a captive portal's page, say
        reason = f"{url} sent something else"
    logger.warning(
        "Dracula could not be downloaded (%s): using the manual that Python carries "
        "(pydoc_data.topics) instead; --config.data.path=FILE takes any text",
        reason,
    )
    return ""
