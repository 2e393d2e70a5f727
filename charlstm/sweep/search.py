"""Search for settings with trials that resume."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from charlstm.cli import folders
from charlstm.data.cleaning import Cleaning
from charlstm.errors import RunError
from charlstm.files import lock_folder, write_file
from charlstm.sweep import grid, table, texts, trials
from charlstm.sweep.trials import FINISHED, Trial, TrialExit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """Results of a sweep. `str` gives a table."""

    combinations: list[table.Combination]  # whose trials have all ended, the best first
    is_complete: bool  # no trial was stopped

    @property
    def has_failures(self) -> bool:
        """Whether a trial has failed."""
        return any(combination.num_failed for combination in self.combinations)

    @property
    def best_settings(self) -> dict[str, Any] | None:
        """The settings of the best combination, None if every combination has a failed trial."""
        if not self.combinations or self.combinations[0].num_failed:
            return None
        return self.combinations[0].settings

    def __str__(self) -> str:
        return table.ranking(self.combinations) if self.combinations else "no results"


def run(
    config: ConfigDict,
    varied: Mapping[str, Sequence[Any]],
    *,
    paths: Sequence[str] = (),
    seeds: Sequence[int] = (),
    num_combinations: int | None = None,
    jobs: int = 1,
    out: str = "runs/sweep",
    should_stop: Callable[[], bool] = lambda: False,
) -> Results:
    """Train with each combination of settings, each text and each seed.

    Each trial is a process of launch/train.py. It trains on the first 85 % of the text and is
    validated on the next 5 % with its final weights; no trial sees the last 10 %. A trial that is
    recorded in `out` does not run again.

        print(sweep.run(base_config(), {"model.hidden_size": [128, 256]}, paths=["book.txt"]))

    Args:
      config: the settings of all trials; data.val_fraction is replaced.
      varied: the values of each setting that varies, by key.
      paths: the texts, each as config.data.path, which is the default.
      seeds: by default config.seed.
      num_combinations: how many combinations to draw at random; all by default.
      jobs: how many trials run at a time, each on its share of the cores.
      out: a local folder for trials.tsv, metrics/, runs/, texts/ and sweep.json.
      should_stop: called often. Once it returns true, running trials save and exit.

    Raises:
      UserError: for an invalid setting or text, or a folder with another sweep.
      RunError: if `out` cannot be written.
    """
    core_sets = trials.share_cores(jobs)
    grid.check_varied(varied)
    combinations = grid.combine(varied, num_combinations)
    seeds = seeds or [config.seed]
    grid.check_distinct("--seeds", seeds)
    # Checks the settings before texts are read, which can take minutes.
    grid.make_trials(config, combinations, ["any"], seeds)
    cleaning = Cleaning.from_config(config.data)
    opened = [texts.open_text(path, cleaning) for path in paths or [config.data.path]]
    names = [text.name for text in opened]
    grid.check_distinct("--texts", names)
    planned, folder = grid.make_trials(config, combinations, names, seeds), Path(out)
    shared = grid.shared_settings(planned)
    grid.refuse_other_sweep(folder / "sweep.json", shared)
    folders.make_out(out, "sweep.json", set(shared))
    try:
        with lock_folder(epath.Path(folder), "choose another --out"):
            write_file(epath.Path(folder / "sweep.json"), json.dumps(shared, indent=1) + "\n")
            for text in opened:
                texts.write_seen_part(text, cleaning, trials.text_path(folder, text.name))
            return _run_missing(planned, folder, core_sets, should_stop)
    except OSError as error:
        raise RunError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); "
            "free space or repair the folder, then give the same command again"
        ) from None


def _run_missing(
    planned: Sequence[Trial],
    out: Path,
    core_sets: Sequence[set[int]],
    should_stop: Callable[[], bool],
) -> Results:
    """Run the trials that have no line in trials.tsv; return the results of all."""
    path, columns = out / "trials.tsv", table.columns_of(list(planned[0].settings))
    rows = table.read_table(path, columns)
    for trial in planned:
        # A crash may have come between a trial's line and the deletion of its run.
        if trial.name in rows and rows[trial.name]["status"] == FINISHED:
            trials.delete_run(trial, out)
    missing = [trial for trial in planned if trial.name not in rows]
    logger.info("%d of %d trials to run", len(missing), len(planned))

    def record(ended: TrialExit) -> None:
        trial = ended.trial
        row = {"trial": trial.name, "text": trial.text, "seed": trial.seed, **trial.settings}
        row |= trials.read_outcome(ended, out)
        table.append(path, columns, row)
        label = " ".join(f"{name}={row[name]}" for name in ("text", "seed", *trial.settings))
        if row["status"] == FINISHED:
            logger.info("%s: %.4f bits/char", label, row["bits_per_char"])
            trials.delete_run(trial, out)
        else:
            logger.warning("%s: %s", label, row["status"])

    is_complete = trials.run_trials(missing, out, core_sets, should_stop, record)
    if not is_complete:
        logger.info("stopped; give the same command to resume")
    return Results(table.rank(planned, table.read_table(path, columns)), is_complete)
