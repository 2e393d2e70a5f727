"""Which folder a launcher writes to: the run folder, and that of --out."""

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
from charlstm.files import is_local, read_json, temporary_name

logger = logging.getLogger("charlstm.folders")

RUNS = Path("runs")
DRACULA = "pg345"  # the stem of the file that an empty config.data.path downloads
MANUAL = "python-manual"  # what trains instead where the download fails
_MAX_NAME = 80
_MAX_LISTED = 5  # runs in a message


def text_name(path: str) -> str:
    """Return a name for the text at config.data.path `path`, safe as part of a file name.

    A file gives its stem, a folder its name, and a pattern that of the folder it searches. The
    text is not read, since the name must be the same at every start.
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
    """Return `workdir`, or where there is something, the first of WORKDIR-2, WORKDIR-3, ... ."""
    number, free = 1, workdir
    while epath.Path(free).exists():
        number += 1
        free = f"{workdir.rstrip('/')}-{number}"
    return free


def in_free_workdir(words: Sequence[str], workdir: str) -> list[str]:
    """Return the flags `words` with --workdir=free_workdir(workdir) for any --workdir of theirs."""
    others, remaining = [], iter(words)
    for word in remaining:
        name, equals, _ = word.partition("=")
        if name not in ("-workdir", "--workdir"):
            others.append(word)
        elif not equals:
            next(remaining, "")  # its value
    return [*others, f"--workdir={free_workdir(workdir)}"]


def is_run(folder: Path) -> bool:
    """Return whether there is a run in `folder`."""
    return (folder / "config.json").is_file()


def existing_runs(parent: Path = RUNS) -> list[Path]:
    """Return the runs in the folder `parent`, the one that was trained last first."""

    def trained_at(folder: Path) -> float:
        files = (folder / name for name in ("config.json", "metrics.jsonl"))
        return max(path.stat().st_mtime for path in files if path.exists())

    runs = [folder for folder in parent.glob("*") if is_run(folder)]
    return sorted(runs, key=lambda folder: (-trained_at(folder), folder.name))


def trained_workdir(given: str) -> str:
    """Return the --workdir that was given, or the run in runs/ that was trained last; log which.

    Raises:
      UserError: if none was given and there is no run, or there is none in the given one.
    """
    if given:
        if is_local(epath.Path(given)) and not is_run(Path(given)) and (there := _nearby(given)):
            raise UserError(f"{given}: no run there (no config.json); there are {there}")
        return given
    runs = existing_runs()
    if not runs:
        there = _nearby("")
        hint = f"; there are {there}" if there else ", or train one with launch/train.py"
        raise UserError(f"no run in {RUNS.absolute()}; give --workdir=DIR{hint}")
    others = f", the last trained of {len(runs)} in {RUNS}/" if len(runs) > 1 else ""
    logger.info("run folder: %s%s", runs[0], others)
    return str(runs[0])


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
    """Return the folder `out`, made if need be, for a launcher that writes `report` and more there.

    Raises:
      UserError: if it cannot be made, or if it is not empty and has no `report` of an earlier
        start, a JSON object with `keys`.
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
    # What a start leaves that was killed before it wrote its report.
    leftovers = {".lock", temporary_name(report)}
    if others := sorted({path.name for path in entries} - leftovers):
        shown = ", ".join(others[:_MAX_LISTED])
        raise UserError(
            f"--out={out}: is not empty, and has no {report} of an earlier start (it holds "
            f"{shown}); choose another --out"
        )
    return folder
