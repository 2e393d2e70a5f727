"""Find the files of a text, by default Dracula, and read their bytes, decompressed."""

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
# Small, because a block may grow by a factor of ten thousand when it is decompressed.
COMPRESSED_BLOCK = 2**12


class File(NamedTuple):
    """One file of a text."""

    path: str  # for errors
    name: str  # relative to the folder of the text
    signature: tuple[float, ...]  # size, times, inode: changes whenever the content does
    read_signature: Callable[[], tuple[float, ...]]
    open: Callable[[], BinaryIO]

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return int(self.signature[0])


class Source(NamedTuple):
    """The files of a text, in order."""

    path: str  # absolute, or PYTHON_MANUAL
    files: list[File]

    @property
    def num_bytes(self) -> int:
        """Size of all files on disk."""
        return sum(file.num_bytes for file in self.files)

    @property
    def signature(self) -> list[Any]:
        """Names, sizes and times of all files, which change whenever the content does."""
        return [[file.name, *file.signature] for file in self.files]

    def refuse_changed(self) -> None:
        """Raise UserError if a file has changed since it was found."""
        for file in self.files:
            with readable(file.path, "give the same command again"):
                if file.read_signature() != file.signature:
                    raise UserError(
                        f"{file.path}: has changed while it was read; give the same command again "
                        "when it is complete"
                    )


def find_source(path: str, source: str = "", remedy: str = "give another one") -> Source:
    """Find the files of a text.

    Args:
      path: a file, a folder or a pattern: see find_files. PYTHON_MANUAL: that manual. Empty:
        Dracula, downloaded once, or else Python's manual.
      source: PYTHON_MANUAL if the run was started with it, to read it again in place of Dracula.
      remedy: what to do about a missing or unreadable file, for errors.

    Raises:
      UserError: if there is no file, or one cannot be read.
    """
    if not path and source != PYTHON_MANUAL:
        path = fetch_dracula()
    if path in ("", PYTHON_MANUAL):
        return Source(PYTHON_MANUAL, [_python_manual()])
    found = find_files(path, remedy)
    files = [_file(file, name, remedy) for name, file in found.files.items()]
    return Source(os.fspath(found.origin), files)


def hash_of(source: Source, digests: list[str]) -> str:
    """Return one SHA-256 for all files of a text, given that of each.

    For one file it is the hash of the file. For several files it is the hash of the lines that
    sha256sum prints for them in the order of their names.
    """
    if len(digests) == 1:
        return digests[0]
    lines = (
        b"%s  %s\n" % (digest.encode(), os.fsencode(file.name))
        for digest, file in zip(digests, source.files, strict=True)
    )
    return hashlib.sha256(b"".join(lines)).hexdigest()


def read_blocks(file: File, on_bytes: Callable[[bytes], Any] = lambda raw: None) -> Iterator[bytes]:
    """Yield the content of a file, decompressed, in non-empty blocks of about BLOCK bytes.

    Args:
      file: a file, compressed if its name has one of the endings of DECOMPRESSORS.
      on_bytes: called with each piece of the file as it is on disk, in order.

    Raises:
      UserError: if the file cannot be read or is damaged.
    """
    ending = ending_of(file.name)
    try:
        with readable(file.path, "repair or remove it"), file.open() as stream:
            if ending in DECOMPRESSORS:
                pieces = _read_pieces(stream, COMPRESSED_BLOCK, on_bytes)
                yield from _regroup(_decompress(pieces, ending))
            else:
                yield from _read_pieces(stream, BLOCK, on_bytes)
    except DecompressionError as error:
        raise UserError(
            f"{file.path}: cannot be decompressed ({error}); download or compress it again"
        ) from None


def _read_pieces(stream: BinaryIO, size: int, on_bytes: Callable[[bytes], Any]) -> Iterator[bytes]:
    while piece := stream.read(size):
        on_bytes(piece)
        yield piece


class DecompressionError(Exception):
    """A damaged compressed file."""


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # with gzip's header and checksum
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


def _decompress(pieces: Iterable[bytes], ending: str) -> Iterator[bytes]:
    """Yield the content of concatenated compressed files."""
    # The libraries' file readers accept truncated (zstd) or trailing (bz2, xz) data.
    make = DECOMPRESSORS[ending]
    decompressor = make()
    for index, piece in enumerate(pieces):
        if index == 0 and compression_of(piece) not in ("", ending):
            raise DecompressionError(f"its name should end in {compression_of(piece)}")
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
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        if len(buffer) >= BLOCK:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


def _file(path: epath.Path, name: str, remedy: str) -> File:
    shown = os.fspath(path)

    def read_signature() -> tuple[float, ...]:
        if not is_local(path):
            remote = path.stat()
            return remote.length, remote.mtime or 0
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{shown}: not a regular file, and a text is read twice; {remedy}")
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino

    with readable(shown, remedy):
        return File(shown, name, read_signature(), read_signature, lambda: path.open("rb"))


def _python_manual() -> File:
    from pydoc_data.topics import topics  # half a megabyte that most runs do not need

    raw = "\n".join(topics[key] for key in sorted(topics)).encode()
    size = (len(raw),)
    return File(PYTHON_MANUAL, PYTHON_MANUAL, size, lambda: size, lambda: io.BytesIO(raw))


def fetch_dracula() -> str:
    """Return the path of Dracula in the user's cache, or '' if it cannot be downloaded.

    A process tries once, and logs one warning on failure.
    """
    return _fetch_into(cache_folder())


@cache
def _fetch_into(folder: Path) -> str:
    target = folder / "pg345.txt"
    if target.exists():
        return str(target)
    reason = ""
    pooch.get_logger().setLevel("ERROR")
    logger.info("downloading Dracula from Project Gutenberg to %s", target)
    for url in DRACULA_URLS:
        try:
            # No hash, because Project Gutenberg corrects its books now and then.
            pooch.retrieve(
                url,
                known_hash=None,
                fname=target.name,
                path=folder,
                downloader=pooch.HTTPDownloader(timeout=5),
            )
        except (OSError, ValueError) as error:  # errors of requests are OSErrors
            reason = f"{type(error).__name__} from {url}"
            continue
        if b"Dracula" in target.read_bytes()[:2000]:
            return str(target)
        target.unlink()  # the login page of a network, for example
        reason = f"{url} is another page"
    logger.warning(
        "Dracula cannot be downloaded (%s): using Python's manual (pydoc_data.topics) instead; "
        "to use another text, set --config.data.path=FILE",
        reason,
    )
    return ""
