"""Find the files that a path means: a file, a folder, or a pattern."""

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

# Of a text, which may also be compressed: .txt.gz, or .gz alone.
ENDINGS = (".txt", ".gz", ".zst", ".bz2", ".xz")
_SOME = 3  # names in a message


class Found(NamedTuple):
    """The files of a text by name, in order; the names are relative to a folder or a pattern."""

    origin: epath.Path  # absolute
    files: dict[str, epath.Path]


def ending_of(name: str) -> str:
    """Return which of ENDINGS a file name has, in any case; '' if it has none.

    A tar archive is no text, however it is compressed.
    """
    stem, ending = os.path.splitext(name.lower())
    return ending if ending in ENDINGS and not stem.endswith(".tar") else ""


def find_files(path: str, remedy: str) -> Found:
    """Return the files that `path` means.

    Hidden files, run folders, sweeps and the cache are left out of folders and patterns, links to
    folders are not followed, and a file with several names is taken once.

    Args:
      path: a file, a folder (its files with one of ENDINGS), or a pattern with
        *, **, ? or [ (all files that match).
      remedy: what to do, for errors.

    Raises:
      UserError: if there are none, or a folder cannot be read.
    """
    with readable(path, remedy):
        given = epath.Path(given_path(path))
        if given.is_dir():
            found = [file for file in _walk(given) if ending_of(file.name)]
            wanted = f"no {', '.join(ENDINGS)} in this folder"
            return Found(given.resolve(), _name(given, found, f"{path}: {wanted}; {remedy}"))
        if not glob.has_magic(path) or given.exists():
            return Found(given.resolve(), {given.name: given})
        depth = [glob.has_magic(part) for part in given.parts].index(True)
        root, pattern = epath.Path(*given.parts[:depth]), given.parts[depth:]
        max_depth = None if "**" in pattern else len(pattern)
        found = [
            file
            for file in _walk(root, max_depth)
            if _matches(file.relative_to(root).parts, pattern)
        ]
        origin = root.resolve() / "/".join(pattern)
        return Found(origin, _name(root, found, f"{path}: no file matches; {remedy}"))


@contextmanager
def readable(path: str, remedy: str) -> Iterator[None]:
    """Turn what keeps a path from being read within the block into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except ImportError as error:  # of the package for a kind of bucket
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path  # a folder in it
        raise UserError(f"{where}: cannot be read ({error.strerror or error}); {remedy}") from None


def _walk(root: epath.Path, max_depth: int | None = None) -> list[epath.Path]:
    """Return the files in `root`, those of at most `max_depth` names below it."""
    found, left_out = list[epath.Path](), list[epath.Path]()
    waiting = [(root, 1)]
    while waiting:
        folder, depth = waiting.pop()
        if _is_ours(folder):
            left_out.append(folder)
            continue
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                found.append(path)
            elif depth != max_depth and not is_link(path):
                waiting.append((path, depth + 1))
    if left_out:
        logger.info("no part of the text, as run folders or the cache: %s", _listed(left_out))
    return found


def _is_ours(folder: epath.Path) -> bool:
    """Return whether `folder` is a run folder, the checkpoints of one, a sweep, or the cache."""
    with suppress(UserError):  # there may be no cache
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
    """Return whether the names of a path match those of a pattern; ** is any number of them."""
    if not pattern:
        return not parts
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return any(_matches(parts[skip:], rest) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], first) and _matches(parts[1:], rest)


def _name(root: epath.Path, found: Sequence[epath.Path], refusal: str) -> dict[str, epath.Path]:
    """Return files by their names relative to `root`, in order, each file once."""
    if not found:
        raise UserError(refusal)
    named = dict(sorted((path.relative_to(root).as_posix(), path) for path in found))
    known, again = set[object](), list[epath.Path]()
    for name, path in list(named.items()):
        identity: object = path
        with suppress(OSError):  # a link to nowhere is refused where it is opened
            if is_local(path):
                status = os.stat(path)
                identity = status.st_dev, status.st_ino
        if identity in known:
            again.append(named.pop(name))
        known.add(identity)
    if again:
        logger.info("other names of files that are read already: %s", _listed(again))
    return named


def _listed(paths: Sequence[epath.Path]) -> str:
    names = [os.fspath(path) for path in sorted(paths)]
    more = f" and {len(names) - _SOME:,} more" if len(names) > _SOME else ""
    return ", ".join(names[:_SOME]) + more
