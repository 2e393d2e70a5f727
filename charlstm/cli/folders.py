"""Choose the folders that launchers read and write: run folders and --out."""

import glob
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from etils import epath

from charlstm.cli import streams
from charlstm.data.find import ending_of
from charlstm.errors import DamagedError, UserError
from charlstm.files import is_exported, is_local, read_json, temporary_name
from charlstm.system.paths import BUILTIN

logger = logging.getLogger("charlstm.folders")

RUNS = Path("runs")
DRACULA = "pg345"  # the stem of the default book, for an empty config.data.path
MANUAL = "python-manual"  # the text in its place if the download fails
_MAX_NAME = 80
_MAX_LISTED = 5  # runs in a message


def text_name(path: str) -> str:
    """Return a safe file name for the text at `path`, a value of config.data.path.

    The name is the stem of a file, the name of a folder, or the folder of a pattern. It must be the
    same at every start, so it depends on `path` only.
    """
    if not path:
        return DRACULA
    given = Path(os.path.expanduser(path))
    if glob.has_magic(path) and not given.exists():
        depth = [glob.has_magic(part) for part in given.parts].index(True)
        given = Path(*given.parts[:depth])
    if given.name in ("", ".."):
        given = given.resolve()
    name = given.name
    while ending := ending_of(name):
        name = name[: -len(ending)]
    return re.sub(r"[^\w.-]+", "-", name)[:_MAX_NAME].strip("-.") or "text"


def default_workdir(config_name: str, path: str) -> str:
    """Return the run folder for a config and config.data.path: runs/CONFIG-TEXT."""
    usual = RUNS / f"{config_name}-{text_name(path)}"
    if path or is_run(usual):
        return str(usual)
    manual = RUNS / f"{config_name}-{MANUAL}"
    if is_run(manual):
        return str(manual)
    from charlstm.data.sources import fetch_dracula

    return str(usual if fetch_dracula() else manual)


def free_workdir(workdir: str) -> str:
    """Return the first of WORKDIR, WORKDIR-2, WORKDIR-3, ... that does not exist."""
    number, free = 1, workdir
    while epath.Path(free).exists():
        number += 1
        free = f"{workdir.rstrip('/')}-{number}"
    return free


def in_free_workdir(words: Sequence[str], workdir: str) -> list[str]:
    """Return the flags `words` with their --workdir replaced by free_workdir(workdir)."""
    others, remaining = [], iter(words)
    for word in remaining:
        name, equals, _ = word.partition("=")
        if name not in ("-workdir", "--workdir"):
            others.append(word)
        elif not equals:
            next(remaining, "")  # its value
    return [*others, f"--workdir={free_workdir(workdir)}"]


def is_run(folder: Path) -> bool:
    """Return whether there is a run in `folder`, and not an exported model."""
    path = epath.Path(folder)
    return (path / "config.json").is_file() and not is_exported(path)


def existing_runs(parent: Path = RUNS) -> list[Path]:
    """Return the runs in the folder `parent`, the most recently trained first."""

    def trained_at(folder: Path) -> float:
        files = (folder / name for name in ("config.json", "metrics.jsonl"))
        return max(path.stat().st_mtime for path in files if path.exists())

    runs = [folder for folder in parent.glob("*") if is_run(folder)]
    return sorted(runs, key=lambda folder: (-trained_at(folder), folder.name))


def trained_workdir(given: str) -> str:
    """Return the run folder or exported model `given`, or the most recently trained run in runs/.

    The latter is logged. 'builtin' is the model in the package.

    Raises:
      UserError: if there is no run.
    """
    if given == BUILTIN:
        if os.path.exists(given):
            logger.info("%s: the model in the package; the folder here is ./%s", given, given)
        return given
    if given:
        path = epath.Path(given)
        is_there = not is_local(path) or is_run(Path(given)) or is_exported(path)
        if not is_there and (there := _nearby(given)):
            raise UserError(f"{given}: no run in this folder (no config.json); found runs: {there}")
        return given
    runs = existing_runs()
    if not runs:
        there = _nearby("")
        hint = f", or --workdir={BUILTIN} for a small model, or train one with launch/train.py"
        if there:
            hint = f"; found runs: {there}"
        raise UserError(f"no run in {RUNS.absolute()}; give --workdir=DIR{hint}")
    others = f" (the most recent of {len(runs)} in {RUNS}/)" if len(runs) > 1 else ""
    logger.info("run folder: %s%s", runs[0], others)
    return str(runs[0])


def trained_workdirs(given: str) -> list[str]:
    """Return the run folders in `given`, a list with commas, as trained_workdir does.

    The path of a run may contain commas itself.
    """
    parts = [given] if is_run(Path(given)) else given.split(",")
    return [trained_workdir(part) for part in parts]


def _nearby(given: str) -> str:
    """Return the names of runs in runs/, in the folder `given` and in the repository's runs/."""
    found: dict[Path, str] = {}
    for parent in (RUNS, Path(given or RUNS), Path(streams.REPOSITORY) / RUNS):
        for run in existing_runs(parent):
            found.setdefault(run.resolve(), str(run))
    names = list(found.values())
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def make_out(out: str, report: str, keys: set[str]) -> epath.Path:
    """Create the folder `out` of a launcher, if necessary, and return it.

    Raises:
      UserError: if it cannot be created, or has files but no `report` of an earlier start, which
        is a JSON object with `keys`.
    """
    folder = epath.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = list(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"--out={out}: cannot write there ({error.strerror}); choose another --out"
        ) from None
    with suppress(DamagedError, TypeError):
        if keys <= set(read_json(folder / report)):
            return folder
    # Files of a start that was killed before it wrote its report.
    leftovers = {".lock", temporary_name(report)}
    if others := sorted({path.name for path in entries} - leftovers):
        shown = ", ".join(others[:_MAX_LISTED])
        raise UserError(
            f"--out={out}: is not empty and has no {report} of this launcher (found {shown}); "
            "choose another --out"
        )
    return folder
