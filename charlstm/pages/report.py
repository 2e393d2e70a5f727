"""Write the report of a run: one page that shows what it did and what it learnt."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from charlstm.data.batches import split
from charlstm.data.corpus import Corpus
from charlstm.errors import DamagedError, RunError, UserError
from charlstm.evaluation.measure import HeldOut, evaluate, validation_part
from charlstm.exchange.reading import read_exported
from charlstm.files import is_exported
from charlstm.model import CharLSTM
from charlstm.pages import held_out, sections
from charlstm.pages.embed import check_out, write_page
from charlstm.pages.held_out import Reading, read_held_out
from charlstm.runs.checkpoints import load_model
from charlstm.runs.folder import Run, load_run
from charlstm.runs.metrics import read_records
from charlstm.system.console import status
from charlstm.system.paths import BUILTIN, model_path
from charlstm.training.setup import open_run_text

logger = logging.getLogger(__name__)

REMEDY = "bring the text back to see the sections that need it"


class Sources:
    """What the sections of a run need, each read when it is first used.

    Each property raises UserError if the run does not have it.
    """

    def __init__(self, workdir: epath.PathLike):
        """Read the run and its records, which every report needs.

        An exported model has the record of its checkpoint, or none.
        """
        path = model_path(workdir)
        if is_exported(path):
            exported = read_exported(path)
            self.run, self.records = exported.run, [exported.metrics] if exported.metrics else []
        else:
            self.run, self.records = load_run(path), read_records(path / "metrics.jsonl")

    @cached_property
    def model(self) -> tuple[Run, CharLSTM, Any]:
        """The run, its model and the parameters of the best checkpoint."""
        return load_model(self.run.workdir)

    @cached_property
    def text(self) -> Corpus:
        """The run's text."""
        return open_run_text(self.run, REMEDY)

    @cached_property
    def train_M(self) -> np.ndarray:
        """The training part of the run's text."""
        return split(self.text.ids_M, self.run.config.data)[0]

    @cached_property
    def held_out(self) -> HeldOut:
        """The validation part of the run's text."""
        if not self.run.config.data.val_fraction:
            raise UserError("this run has no validation part")
        return validation_part(self.run, self.text)

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The metrics of the held-out text, with baselines."""
        return evaluate(*self.model, self.held_out, fit_temperature=True).metrics

    @cached_property
    def reading(self) -> Reading:
        """The predictions of the held-out text."""
        return read_held_out(*self.model, self.held_out.ids_M)


def write_report(
    workdir: epath.PathLike, compare: Sequence[epath.PathLike] = (), out: epath.PathLike = ""
) -> epath.Path:
    """Write the report of a run, and return its path.

    Sections that need what the run does not have are left out; the page says why.

    Args:
      workdir: the run folder, an exported model, or 'builtin'.
      compare: others whose curves are added.
      out: the file to write; if empty, WORKDIR/report.html, the name of a file with .html, or
        builtin-report.html.

    Raises:
      UserError: if a folder holds no run, or the file cannot be written or is not a page.
      DamagedError: if a file of a run is damaged.
    """
    folder = epath.Path(workdir)
    default = folder.with_suffix(".html") if folder.is_file() else folder / "report.html"
    if workdir == BUILTIN:
        default = epath.Path(f"{BUILTIN}-report.html")
    path = check_out(out or default)
    data = collect(workdir, compare)
    reasons: dict[str, list[str]] = {}
    for name, section in data.items():
        if isinstance(section, dict) and "missing" in section:
            reasons.setdefault(section["missing"], []).append(name)
    for reason, names in reasons.items():
        logger.warning("left out (%s): %s", ", ".join(names), reason)
    write_page("report.html", data, path)
    return path


def collect(workdir: epath.PathLike, compare: Sequence[epath.PathLike] = ()) -> dict[str, Any]:
    """Return the data of a report, by section; a section that is left out has 'missing'."""
    sources = Sources(workdir)
    others = [Sources(other) for other in compare]
    names = labels([source.run.workdir for source in (sources, *others)])
    found = {name: _section(name, find) for name, find in finders(sources).items()}
    evaluation = found["score"].get("evaluation")
    model = found.pop("model").get("params")
    return found | {
        "run": sections.describe_run(sources.run, model, sources.records),
        "evaluation": evaluation,
        "samples": sections.samples_of(sources.records) or {"missing": "no sample yet"},
        "curves": {
            "runs": [
                sections.curves_of(name, source.records)
                for name, source in zip(names, [sources, *others], strict=True)
            ],
            "baselines": evaluation["baselines"]["bits_per_char"] if evaluation else {},
        },
    }


def finders(sources: Sources) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return functions that find the data of sections, which not every run has."""

    def memorization() -> dict[str, Any]:
        has_held_out = bool(sources.run.config.data.val_fraction)
        held_out_M = sources.held_out.ids_M if has_held_out else None
        return sections.memorization_of(*sources.model, sources.train_M, held_out_M)

    def calibration() -> dict[str, Any]:
        return held_out.calibration_of(sources.reading, sources.evaluation["temperature"])

    return {
        "model": lambda: {"params": sources.model[2]},
        "score": lambda: {"evaluation": sources.evaluation},
        "surprise": lambda: held_out.page_of(sources.reading, len(sources.held_out.ids_M)),
        "units": lambda: held_out.units_of(sources.reading),
        "calibration": calibration,
        "errors": lambda: held_out.errors_of(sources.reading),
        "memorization": memorization,
    }


def labels(folders: Sequence[epath.Path]) -> list[str]:
    """Return a name for each run folder: its own name, or its path where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else os.fspath(folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def _section(name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `find` returns, or why the run does not have it as 'missing'."""
    try:
        with status(f"report: {name}"):
            return find()
    except (DamagedError, RunError):
        raise
    except UserError as error:
        return {"missing": str(error)}
