"""Write files atomically, read untrusted files, and lock and check folders."""

import json
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from etils import epath
from filelock import FileLock, Timeout

from charlstm.errors import DamagedError, RunError, UserError, one_line

# Ten times the size of a vocabulary of all of Unicode and 256 long prompts.
MAX_JSON_BYTES = 2**28
# The weights in the folder of an exported model; a run folder has none of them.
EXPORTED_WEIGHTS = ("model.safetensors", "model.keras")
# The beginning of the content of a lock file.
LOCK_TEXT = "process "
# glob interprets the first four, and TensorStore takes the last one for a slash.
PATTERN_CHARS = set("[]*?\\") - {os.sep}


def temporary_name(name: str) -> str:
    """Return the name under which write_file writes the file `name` until it is complete."""
    return f".{name}.tmp"


def write_file(path: epath.Path, content: bytes | str) -> None:
    """Write a file atomically: after a crash it has the old or the new content, never a part."""
    raw = content.encode() if isinstance(content, str) else content
    temporary = path.parent / temporary_name(path.name)
    # A leftover of a crash, or a link, through which the content would leave the folder.
    temporary.unlink(missing_ok=True)
    try:
        temporary.write_bytes(raw)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_file(path: epath.Path) -> Iterator[Callable[[str], Any]]:
    """Yield write(text) for a new file, which is there, complete, after the block or not at all.

    Raises:
      UserError: if the file exists or cannot be written.
    """
    temporary = path.parent / temporary_name(path.name)
    try:
        if path.exists():
            raise UserError(f"{path}: exists; remove it, or choose another --out")
        temporary.unlink(missing_ok=True)  # a leftover of a crash, or a link
        with temporary.open("w", encoding="utf-8") as file:
            yield file.write
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); choose another --out"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class GrowingFile:
    """A text file that only this process writes, and that grows at its end.

    A crash can cut its last line. A bucket cannot append, so each append writes the whole file.
    """

    def __init__(self, path: epath.Path, content: Callable[[], str]):
        """Write the file, unless it has the right content.

        Args:
          path: the file.
          content: returns the whole content that the file should have at the time of the call.
        """
        self._path, self._content = path, content
        raw = content().encode()
        if (path.read_bytes() if path.exists() else b"") != raw:
            write_file(path, raw)
        self._size = len(raw)

    def append(self, text: str) -> None:
        """Append `text`, the end of what `content` now returns."""
        raw = text.encode()
        if not is_local(self._path):
            write_file(self._path, self._content())
            return
        with self._path.open("ab") as file:
            is_unchanged = os.fstat(file.fileno()).st_size == self._size
            if is_unchanged:
                file.write(raw)
        if not is_unchanged:  # another process changed it, or an earlier write failed
            write_file(self._path, self._content())
        self._size += len(raw)


def read_json(path: epath.Path) -> Any:
    """Return the content of a JSON file.

    Raises:
      DamagedError: if the file is missing, too large or not JSON.
      RunError: if the file exists and cannot be read.
    """
    return parse_json(read_small(path), path)


def read_small(path: epath.Path) -> bytes:
    """Return the content of a file of at most MAX_JSON_BYTES.

    Raises:
      DamagedError: if the file is missing or too large.
      RunError: if the file exists and cannot be read.
    """
    try:
        if not is_file(path):
            raise _damaged(path, "no such file")
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) > MAX_JSON_BYTES:
        raise _damaged(path, f"larger than {MAX_JSON_BYTES:,} bytes")
    return raw


def parse_json(raw: bytes, path: epath.Path) -> Any:
    """Return the value of a JSON document; raise DamagedError, naming `path`, if it is not one."""
    try:
        return json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, one_line(error)) from error


def _damaged(path: epath.Path, reason: str) -> DamagedError:
    return DamagedError(f"{path}: missing or damaged ({reason}); restore the file, or train again")


def is_file(path: epath.Path) -> bool:
    """Return whether `path` is a regular file or a link to one; raise OSError if unknown."""
    # Path.is_file also returns False for a file in a folder that cannot be entered.
    if not is_local(path):
        return path.is_file()
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_exported(path: epath.Path) -> bool:
    """Return whether `path` is an exported model: a file with weights, or a folder with one."""
    suffixes = {os.path.splitext(name)[1] for name in EXPORTED_WEIGHTS}
    if path.suffix in suffixes and path.is_file():
        return True
    return any((path / name).exists() for name in EXPORTED_WEIGHTS)


def unreadable(path: epath.PathLike, error: OSError) -> RunError:
    """Return the error for a file that exists and cannot be read."""
    return RunError(
        f"{path}: cannot be read ({error.strerror or error}); make it readable, and give the same "
        "command again"
    )


def check_readable(folder: epath.Path) -> None:
    """Raise RunError if a file in `folder` cannot be opened, for lack of permission for example."""
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
    """Raise UserError if a link in `folder` points to a file outside of it.

    A run folder may come from somebody else. The entry `allowed` may be this user's own link to a
    folder, such as one on a larger disk.
    """
    if not is_local(folder):
        return
    roots = [os.path.realpath(folder)]
    own = os.path.join(roots[0], allowed)
    user = getattr(os, "geteuid", lambda: 0)()  # not on Windows
    if os.path.isdir(own) and os.path.islink(own) and os.lstat(own).st_uid == user:
        roots.append(os.path.realpath(own))
    for root in roots:
        for parent, folders, files in os.walk(root):
            for path in (os.path.join(parent, name) for name in folders + files):
                if not os.path.islink(path):
                    continue
                target = os.path.realpath(path)
                if target not in roots and not target.startswith(root + os.sep):
                    raise UserError(
                        f"{path}: a link to {target}, out of the run folder; replace the link by "
                        "its target"
                    )


def is_link(path: epath.Path) -> bool:
    """Return whether `path` is a symbolic link of a local file system."""
    return is_local(path) and os.path.islink(path)


def is_local(path: epath.Path) -> bool:
    """Return whether `path` is on a file system of this machine, not in a bucket."""
    return "://" not in os.fspath(path)


@contextmanager
def plain_path(folder: epath.Path) -> Iterator[epath.Path]:
    """Yield a path of `folder` without characters that Orbax would interpret.

    If the path has such characters, or is not UTF-8, yield a link to `folder` in a temporary
    folder that exists within the block.

    Raises:
      UserError: if the link cannot be made.
    """
    if not is_local(folder) or _is_plain(os.fspath(folder)):
        yield folder
        return
    refusal = UserError(
        f"{folder}: checkpoints need a path in UTF-8 without {' '.join(sorted(PATTERN_CHARS))} "
        "here; rename the folder, or choose another --workdir"
    )
    if not _is_plain(tempfile.gettempdir()):
        raise refusal
    with tempfile.TemporaryDirectory(prefix="charlstm-") as home:
        link = os.path.join(home, folder.name)
        try:
            os.symlink(folder, link)
        except OSError as error:  # for example on Windows without the privilege
            raise refusal from error
        yield epath.Path(link)


def _is_plain(path: str) -> bool:
    # In Python, names that are not UTF-8 contain lone surrogates, which are not printable.
    return not PATTERN_CHARS.intersection(path) and path.isprintable()


def is_lock(path: epath.Path) -> bool:
    """Return whether `path` is a lock file of lock_folder."""
    if not path.is_file() or is_link(path):
        return False
    return path.read_bytes()[: len(LOCK_TEXT)] in (b"", LOCK_TEXT.encode())


@contextmanager
def lock_folder(folder: epath.Path, remedy: str = "choose another --workdir") -> Iterator[None]:
    """Make `folder` if it is missing, and keep other writers out of it within the block.

    The operating system releases the lock when its holder ends. Buckets have no lock.

    Raises:
      UserError: if another process holds the lock, or the folder cannot be written.
    """
    if not is_local(folder):
        yield
        return
    path = folder / ".lock"
    lock = FileLock(os.fspath(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not is_lock(path):
            raise UserError(f"{path}: is not a lock of charlstm; {remedy}")
        lock.acquire(timeout=0)
        path.write_text(f"{LOCK_TEXT}{os.getpid()} on {socket.gethostname()}")
    except Timeout:
        holder = one_line(path.read_text() or "another process")
        raise UserError(f"{folder}: in use by {holder}; wait until it ends, or {remedy}") from None
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there ({error.strerror or error}); {remedy}"
        ) from None
    try:
        yield
    finally:
        lock.release()
