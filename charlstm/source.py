"""Where a text comes from: files, folders, patterns or Dracula, and their bytes, decompressed."""

import glob
import hashlib
import io
import logging
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pooch
import zstandard
from etils import epath

from charlstm.errors import UserError
from charlstm.files import is_local

logger = logging.getLogger(__name__)

DRACULA_URLS = (
    "https://www.gutenberg.org/cache/epub/345/pg345.txt",
    "https://www.gutenberg.org/files/345/345-0.txt",
    "https://gutenberg.pglaf.org/cache/epub/345/pg345.txt",
    "https://aleph.pglaf.org/cache/epub/345/pg345.txt",
)
PYTHON_MANUAL = "pydoc_data.topics"
ENDINGS = (".txt", ".txt.gz", ".zst")  # of the files of a folder that are read
BLOCK = 2**20
# Of a compressed file, of which a piece may grow a thousand times.
COMPRESSED_BLOCK = 2**14


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
      path: a file, a folder (all files in it that end in ENDINGS, hidden ones apart), or a
        pattern with *, ? or [; empty means Dracula, downloaded once, or else Python's manual.
      source: what an earlier run read; PYTHON_MANUAL keeps it from taking Dracula instead.
      remedy: what the error of a text that can't be had tells to do.

    Raises:
      UserError: if there are none, or one cannot be read.
    """
    if not path and source != PYTHON_MANUAL:
        path = fetch_dracula()
    if not path:
        return Source(PYTHON_MANUAL, [_python_manual()])
    given = epath.Path(path)
    with readable(path, remedy):
        root, origin = given, given.resolve()
        if is_folder := given.is_dir():
            paths = [found for found in _walk(given) if found.name.endswith(ENDINGS)]
        elif glob.has_magic(path) and not given.exists():
            # Names are relative to the part before the first *.
            depth = [glob.has_magic(part) for part in given.parts].index(True)
            root, pattern = epath.Path(*given.parts[:depth]), "/".join(given.parts[depth:])
            origin = root.resolve() / pattern
            paths = [found for found in _glob(root, pattern) if not found.is_dir()]
        else:
            root, paths = given.parent, [given]
    if not paths:
        what = f"no {', '.join(ENDINGS)} in this folder" if is_folder else "no file matches"
        raise UserError(f"{path}: {what}; {remedy}")
    named = sorted((found.relative_to(root).as_posix(), found) for found in paths)
    return Source(os.fspath(origin), [_file(found, name, remedy) for name, found in named])


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


def read_blocks(file: File, heard: Callable[[bytes], Any] = len) -> Iterator[bytes]:
    """Yield what a file holds, decompressed, in blocks of BLOCK bytes.

    Args:
      file: compressed if its name ends in .gz or .zst.
      heard: called with all bytes as they lie on the disk, in order.

    Raises:
      UserError: if it cannot be read, or decompressed to its end.
    """
    make = next((make for end, make in DECOMPRESSORS.items() if file.name.endswith(end)), None)
    try:
        with readable(file.where, "mend it, or leave it out"), file.open() as stream:
            size = COMPRESSED_BLOCK if make else BLOCK
            pieces = _heard(iter(lambda: stream.read(size), b""), heard)
            yield from _regroup(_decompress(pieces, make)) if make else pieces
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise UserError(
            f"{file.where}: cannot be decompressed ({error}); fetch or compress it again"
        ) from None


def _heard(pieces: Iterable[bytes], heard: Callable[[bytes], Any]) -> Iterator[bytes]:
    for piece in pieces:
        heard(piece)
        yield piece


def _gunzip() -> Any:
    return zlib.decompressobj(wbits=31)  # with gzip's header and checksum


def _unzstd() -> Any:
    return zstandard.ZstdDecompressor().decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Any]] = {".gz": _gunzip, ".zst": _unzstd}


def _decompress(pieces: Iterable[bytes], make: Callable[[], Any]) -> Iterator[bytes]:
    """Yield the content of compressed files that may stand one behind the other."""
    # Not by the libraries' own readers: zstandard's takes half a file for a whole one.
    decompressor = make()
    for piece in pieces:
        while piece:
            if decompressor.eof:
                decompressor = make()
            yield decompressor.decompress(piece)
            piece = decompressor.unused_data
    if not decompressor.eof:
        raise EOFError("it ends too soon")


def _regroup(pieces: Iterable[bytes]) -> Iterator[bytes]:
    held = bytearray()
    for piece in pieces:
        held += piece
        if len(held) >= BLOCK:
            yield bytes(held)
            held.clear()
    yield bytes(held)


@contextmanager
def readable(path: str, remedy: str) -> Iterator[None]:
    """Turn what keeps a path from being read within the block into one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None


def _glob(root: epath.Path, pattern: str) -> Iterable[epath.Path]:
    if is_local(root):  # as a shell does, with ** and without hidden files
        return [root / name for name in glob.glob(pattern, root_dir=root, recursive=True)]
    if "**" in pattern:
        raise UserError(f"{root}/{pattern}: ** is for local folders only; give the folder itself")
    return root.glob(pattern)


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Yield all files in `folder` but hidden ones; a link to another folder is not followed."""
    for found in folder.iterdir():
        if found.name.startswith("."):
            continue
        if not found.is_dir():
            yield found
        elif not os.path.islink(found):
            yield from _walk(found)


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


def cache_folder() -> Path:
    """Return the folder for what is kept between runs: CHARLSTM_CACHE, or the user's cache."""
    return Path(os.environ.get("CHARLSTM_CACHE") or pooch.os_cache("charlstm"))


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
