"""Write the report of a run: one page that shows what it did and what it learnt."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from charlstm.data.batches import split
from charlstm.errors import DamagedError, RunError, UserError
from charlstm.evaluation.measure import HeldOut, evaluate, open_held_out
from charlstm.exchange.reading import read_exported
from charlstm.files import is_exported
from charlstm.model import CharLSTM
from charlstm.pages import sections
from charlstm.pages.embed import check_out, write_page
from charlstm.runs.checkpoints import load_model
from charlstm.runs.folder import Run, load_run
from charlstm.runs.metrics import read_records
from charlstm.system.console import status
from charlstm.training.setup import open_run_text

logger = logging.getLogger(__name__)

REMEDY = "bring the text back to see the sections that need it"


class Sources:
    """What the sections of a run need, each read when it is first used.

    Each property raises UserError if the run does not have it.
    """

    def __init__(self, workdir: epath.Path):
        """Read the run and its records, which every report needs.

        An exported model has the record of its checkpoint, or none.
        """
        if is_exported(workdir):
            exported = read_exported(workdir)
            self.run, self.records = exported.run, [exported.metrics] if exported.metrics else []
        else:
            self.run, self.records = load_run(workdir), read_records(workdir / "metrics.jsonl")

    @cached_property
    def model(self) -> tuple[Run, CharLSTM, Any]:
        """The run, its model and the parameters of the best checkpoint."""
        return load_model(self.run.workdir)

    @cached_property
    def train_M(self) -> np.ndarray:
        """The training part of the run's text."""
        return split(open_run_text(self.run, REMEDY).ids_M, self.run.config.data)[0]

    @cached_property
    def held_out(self) -> HeldOut:
        """The validation part of the run's text."""
        if not self.run.config.data.val_fraction:
            raise UserError("this run has no validation part")
        _ = self.train_M  # names what to do if the text is missing
        return open_held_out(self.run)

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The metrics of the held-out text, with baselines."""
        return evaluate(*self.model, self.held_out).metrics


def write_report(
    workdir: epath.PathLike, compare: Sequence[epath.PathLike] = (), out: epath.PathLike = ""
) -> epath.Path:
    """Write the report of a run, and return its path.

    Sections that need what the run does not have are left out; the page says why.

    Args:
      workdir: the run folder, or an exported model.
      compare: others whose curves are added.
      out: the file to write; if empty, WORKDIR/report.html, or the name of a file with .html.

    Raises:
      UserError: if a folder holds no run, or the file cannot be written or is not a page.
      DamagedError: if a file of a run is damaged.
    """
    folder = epath.Path(workdir)
    default = folder.with_suffix(".html") if folder.is_file() else folder / "report.html"
    path = check_out(out or default)
    write_page("report.html", collect(folder, [epath.Path(other) for other in compare]), path)
    return path


def collect(workdir: epath.Path, compare: Sequence[epath.Path] = ()) -> dict[str, Any]:
    """Return the data of a report, by section; a section that is left out has 'missing'."""
    sources = Sources(workdir)
    others = [Sources(other) for other in compare]
    names = labels([workdir, *compare])
    evaluation = _section("evaluating", lambda: sources.evaluation)
    params = _section("reading the checkpoint", lambda: {"params": sources.model[2]}).get("params")
    has_figures = "missing" not in evaluation
    bits = evaluation["baselines"]["bits_per_char"] if has_figures else {}
    curves = [
        sections.curves_of(name, source.records)
        for name, source in zip(names, [sources, *others], strict=True)
    ]
    return {
        "run": sections.describe_run(sources.run, params, sources.records),
        "evaluation": evaluation if has_figures else None,
        "score": {"evaluation": evaluation} if has_figures else evaluation,
        "curves": {"runs": curves, "baselines": bits},
        "samples": sections.samples_of(sources.records) or {"missing": "no sample yet"},
        "memorization": _section(
            "looking for copies",
            lambda: sections.memorization_of(*sources.model, sources.train_M, _held_out(sources)),
        ),
    }


def labels(folders: Sequence[epath.Path]) -> list[str]:
    """Return a name for each run folder: its own name, or its path where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else os.fspath(folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def _held_out(sources: Sources) -> np.ndarray | None:
    return sources.held_out.ids_M if sources.run.config.data.val_fraction else None


def _section(title: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `find` returns, or why the run does not have it as 'missing'."""
    try:
        with status(title):
            return find()
    except (DamagedError, RunError):
        raise
    except UserError as error:
        logger.warning("%s: left out: %s", title, error)
        return {"missing": str(error)}
