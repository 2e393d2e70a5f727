"""The files of a run folder: written whole, read without trust, by one writer at a time."""

import json
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath
from filelock import FileLock, Timeout

from charlstm.errors import DamagedError, RunError, UserError, one_line

# A vocabulary of all of Unicode and 256 long prompts take a tenth of it.
MAX_JSON_BYTES = 2**28
# What the content of a lock file begins with.
LOCK_TEXT = "process "
# glob takes the first four for a pattern, and TensorStore the last one for a slash.
PATTERN_CHARS = set("[]*?\\") - {os.sep}


def temporary_name(name: str) -> str:
    """Return the name that write_file gives to the file `name` until it is whole."""
    return f".{name}.tmp"


def write_file(path: epath.Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one whole."""
    raw = content.encode() if isinstance(content, str) else content
    temporary = path.parent / temporary_name(path.name)
    # What is left of a crash; or a link, which would lead the content out of the folder.
    temporary.unlink(missing_ok=True)
    try:
        temporary.write_bytes(raw)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class GrowingFile:
    """A text file whose end this process alone writes.

    On a local disk text is appended, so that a crash can tear the last line. A bucket has no
    append: there the file is written whole.
    """

    def __init__(self, path: epath.Path, whole: Callable[[], str]):
        """Make the file, unless it is empty, hold what `whole` returns, now and at each append."""
        self._path, self._whole = path, whole
        content = whole().encode()
        if (path.read_bytes() if path.exists() else b"") != content:
            write_file(path, content)
        self._size = len(content)

    def append(self, text: str) -> None:
        """Add `text`, which `whole` has at its end already."""
        raw = text.encode()
        if not is_local(self._path):
            write_file(self._path, self._whole())
            return
        with self._path.open("ab") as file:
            is_as_left = os.fstat(file.fileno()).st_size == self._size
            if is_as_left:
                file.write(raw)
        if not is_as_left:  # it was changed, or an earlier write failed
            write_file(self._path, self._whole())
        self._size += len(raw)


def read_json(path: epath.Path) -> Any:
    """Return what a JSON file holds.

    Raises:
      DamagedError: if it is missing, too large, or not JSON.
      RunError: if it is there and cannot be read.
    """
    try:
        if not _is_file(path):
            raise ValueError("no such file")
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES:,} bytes")
        return json.loads(raw.decode())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{path}: missing or damaged ({one_line(error)}); bring the file back, or train again"
        ) from error


def _is_file(path: epath.Path) -> bool:
    # Path.is_file also denies a file whose folder may not be entered.
    if not is_local(path):
        return path.is_file()
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def unreadable(path: epath.PathLike, error: OSError) -> RunError:
    """Return the error for a file that is there and cannot be read."""
    return RunError(
        f"{path}: cannot be read ({error.strerror or error}); make it readable, and give the same "
        "command again"
    )


def check_readable(folder: epath.Path) -> None:
    """Raise RunError if a file in `folder` cannot be opened, as for want of permission."""
    if not is_local(folder):
        return

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise unreadable(error.filename, error) from error

    for parent, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            try:
                open(os.path.join(parent, name), "rb").close()
            except OSError as error:
                refuse(error)


def refuse_links(folder: epath.Path, allowed: str = "checkpoints") -> None:
    """Raise UserError if a link in `folder` leads out of it: a stranger's could lead anywhere.

    The entry `allowed` may be this user's own link to a folder, such as one on a larger disk. Files
    of a run are only read as data, so that a link which a stranger planted reveals nothing.
    """
    if not is_local(folder):
        return
    home = os.path.realpath(folder)
    own = os.path.join(home, allowed)
    roots = [home]
    user = getattr(os, "geteuid", lambda: 0)()  # Windows has none
    if os.path.isdir(own) and os.path.islink(own) and os.lstat(own).st_uid == user:
        roots.append(os.path.realpath(own))
    for root in roots:
        for parent, folders, files in os.walk(root):
            for name in folders + files:
                path = os.path.join(parent, name)
                target = os.path.realpath(path)
                if (
                    os.path.islink(path)
                    and target not in roots
                    and not target.startswith(root + os.sep)
                ):
                    raise UserError(
                        f"{path}: a link to {target}, out of the run folder; put what it leads to "
                        "in its place"
                    )


def is_link(path: epath.Path) -> bool:
    """Return whether `path` is a symbolic link of a local file system."""
    return is_local(path) and os.path.islink(path)


def is_local(path: epath.Path) -> bool:
    """Return whether `path` is of this machine's file systems, not of a bucket."""
    return "://" not in os.fspath(path)


@contextmanager
def plain_path(folder: epath.Path) -> Iterator[epath.Path]:
    """Yield a path of `folder` that Orbax takes as it is.

    Where a name on the way to `folder` has brackets or the like, or is not UTF-8, the path is a
    link in a temporary folder that exists until the end of the block.

    Raises:
      UserError: if there can be no such link.
    """
    if not is_local(folder) or _is_plain(os.fspath(folder)):
        yield folder
        return
    refusal = UserError(
        f"{folder}: checkpoints cannot have any of {' '.join(sorted(PATTERN_CHARS))} in their path "
        "here, or a name that is not UTF-8; rename the folder, or choose another --workdir"
    )
    if not _is_plain(tempfile.gettempdir()):
        raise refusal
    with tempfile.TemporaryDirectory(prefix="charlstm-") as home:
        link = os.path.join(home, folder.name)
        try:
            os.symlink(folder, link)
        except OSError as error:  # as on Windows without the right to
            raise refusal from error
        yield epath.Path(link)


def _is_plain(path: str) -> bool:
    # Names that are not UTF-8 have lone surrogates in Python.
    return not PATTERN_CHARS.intersection(path) and path.isprintable()


def is_lock(path: epath.Path) -> bool:
    """Return whether `path` is a file that lock_folder made."""
    if not path.is_file() or is_link(path):
        return False
    return path.read_bytes()[: len(LOCK_TEXT)] in (b"", LOCK_TEXT.encode())


@contextmanager
def lock_folder(folder: epath.Path, remedy: str = "choose another --workdir") -> Iterator[None]:
    """Make `folder` if need be, and keep other writers out of it until the end of the block.

    The lock is the operating system's, so that it ends with its holder, however that ends. In a
    bucket there is none.

    Raises:
      UserError: if another process writes there, or the folder cannot be written.
    """
    if not is_local(folder):
        yield
        return
    path = folder / ".lock"
    lock = FileLock(os.fspath(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not is_lock(path):
            raise UserError(f"{path}: is not a lock of this program; {remedy}")
        lock.acquire(timeout=0)
        path.write_text(f"{LOCK_TEXT}{os.getpid()} on {socket.gethostname()}")
    except Timeout:
        holder = one_line(path.read_text() or "another process")
        raise UserError(
            f"{folder}: in use by {holder}, which trains there; wait for its end, or {remedy}"
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there ({error.strerror or error}); {remedy}"
        ) from None
    try:
        yield
    finally:
        lock.release()
