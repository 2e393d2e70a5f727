"""Find the files of a path: a file, a folder or a pattern."""

import fnmatch
import glob
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from etils import epath

from charlstm.errors import DamagedError, RunError, UserError
from charlstm.files import is_link, is_local, read_json
from charlstm.system.paths import cache_folder, given_path

logger = logging.getLogger(__name__)

# Endings of texts; a compressed text ends in .txt.gz or .gz, for example.
ENDINGS = (".txt", ".gz", ".zst", ".bz2", ".xz")
_MAX_NAMES = 3  # in a message


class Found(NamedTuple):
    """Files by name, in order; names are relative to the folder or to the pattern's."""

    origin: epath.Path  # absolute
    files: dict[str, epath.Path]


def ending_of(name: str) -> str:
    """Return the one of ENDINGS that a file name has, in any case, or ''.

    A compressed tar archive is not a text.
    """
    stem, ending = os.path.splitext(name.lower())
    return ending if ending in ENDINGS and not stem.endswith(".tar") else ""


def find_files(path: str, remedy: str) -> Found:
    """Find the files of `path`.

    Folders and patterns leave out hidden files, run folders, sweeps and the cache, do not follow
    links to folders, and take a file with several names once.

    Args:
      path: a file, a folder (its files with one of ENDINGS), or a pattern with *, **, ? or [.
      remedy: what to do about a missing or unreadable file, for errors.

    Raises:
      UserError: if there is no file, or a folder cannot be read.
    """
    with readable(path, remedy):
        root = epath.Path(given_path(path))
        if root.is_dir():
            files = [file for file in _walk(root) if ending_of(file.name)]
            message = f"{path}: no {', '.join(ENDINGS)} in this folder; {remedy}"
            return Found(root.resolve(), _name(root, files, message))
        if not glob.has_magic(path) or root.exists():
            return Found(root.resolve(), {root.name: root})
        parts = root.parts
        depth = [glob.has_magic(part) for part in parts].index(True)
        root, pattern = epath.Path(*parts[:depth]), parts[depth:]
        max_depth = None if "**" in pattern else len(pattern)
        files = [
            file
            for file in _walk(root, max_depth)
            if _matches(file.relative_to(root).parts, pattern)
        ]
        origin = root.resolve() / "/".join(pattern)
        return Found(origin, _name(root, files, f"{path}: no file matches; {remedy}"))


@contextmanager
def readable(path: str, remedy: str) -> Iterator[None]:
    """Raise UserError in place of an OSError or ImportError within the block."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except ImportError as error:  # a bucket without the package that reads it
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path  # a file in a folder
        raise UserError(f"{where}: cannot be read ({error.strerror or error}); {remedy}") from None


def _walk(root: epath.Path, max_depth: int | None = None) -> list[epath.Path]:
    """Return the files in `root`, down to `max_depth` levels below it."""
    files, excluded = list[epath.Path](), list[epath.Path]()
    folders = [(root, 1)]
    while folders:
        folder, depth = folders.pop()
        if _is_output(folder):
            excluded.append(folder)
            continue
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                files.append(path)
            elif depth != max_depth and not is_link(path):
                folders.append((path, depth + 1))
    if excluded:
        logger.info("not read, as run folders or the cache: %s", _join(excluded))
    return files


def _is_output(folder: epath.Path) -> bool:
    """Return whether `folder` is a run folder, its checkpoints, a sweep or the cache."""
    with suppress(UserError):  # without a home folder there is no cache
        if is_local(folder) and os.path.realpath(folder) == os.path.realpath(cache_folder()):
            return True
    keys = {"config.json": {"schema", "config"}, "sweep.json": {"varied"}}
    for name, wanted in keys.items():
        with suppress(DamagedError, RunError, TypeError):
            if (folder / name).exists() and wanted <= set(read_json(folder / name)):
                return True
    return any(
        (step / "_CHECKPOINT_METADATA").exists()
        for steps in (folder, folder / "checkpoints")
        if steps.name == "checkpoints" and steps.is_dir()
        for step in steps.iterdir()
    )


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path match those of a pattern; ** matches any number."""
    if not pattern:
        return not parts
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return any(_matches(parts[skip:], rest) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], first) and _matches(parts[1:], rest)


def _name(root: epath.Path, files: Sequence[epath.Path], message: str) -> dict[str, epath.Path]:
    """Return files by their names relative to `root`, in order, each file once.

    Raises:
      UserError: with `message`, if there are none.
    """
    if not files:
        raise UserError(message)
    named = dict(sorted((path.relative_to(root).as_posix(), path) for path in files))
    known, duplicates = set[object](), list[epath.Path]()
    for name, path in list(named.items()):
        identity: object = path
        with suppress(OSError):  # a broken link, which is refused when it is opened
            if is_local(path):
                status = os.stat(path)
                identity = status.st_dev, status.st_ino
        if identity in known:
            duplicates.append(named.pop(name))
        known.add(identity)
    if duplicates:
        logger.info("not read, as other names of the same files: %s", _join(duplicates))
    return named


def _join(paths: Sequence[epath.Path]) -> str:
    names = [os.fspath(path) for path in sorted(paths)]
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
