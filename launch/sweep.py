"""Search for settings: train with each combination, and choose on text that is not reported on.

  python launch/sweep.py --set=optimizer.learning_rate=4e-3,8e-3 --set=model.hidden_size=256,384
      [--config=NAME] [--config.KEY=VALUE ...] [--texts=FILE,FILE] [--seeds=0,1] [--trials=N]
      [--jobs=N] [--out=DIR]

Each combination, or --trials=N of them drawn at random, is trained for each text and each seed, by
launch/train.py in a process of its own: on the first 85 % of the text, and measured on the next 5 %
with the final weights. config.data.val_fraction is set for that. No trial sees the last 10 %, by
which train.py and evaluate.py measure. At the end all combinations are shown, the best first: means
over seeds, then over texts. Exit code 1 if a trial failed. In DIR:

trials.tsv    a line for each trial as soon as it has ended; seconds are those of the whole command,
              and left out where it was begun before or other trials ran beside it (--jobs)
metrics/      the metrics.jsonl of each finished trial, of which nothing else is kept
runs/         run folders and logs of the trials that run, were stopped or have failed
texts/        the first 90 % of each text, as characters that are left after cleaning
sweep.json    what all trials have in common: another --config or other keys need another DIR

The same command goes on where it was stopped, and may have more values, texts and seeds. A trial
that has its line is not run again; take the line out to try a failed one anew.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import json
import logging
import signal
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from etils import epath

from charlstm.cli import folders, options
from charlstm.config_check import parse_setting
from charlstm.data.cleaning import Cleaning
from charlstm.errors import RunError
from charlstm.files import sole_writer, write_file
from charlstm.sweep import grid, results, runner
from charlstm.sweep.runner import Ended, Text, Trial

logger = logging.getLogger("charlstm.sweep")

CONFIG = options.define_config()
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE,VALUE,...: a setting to vary; many times")
TEXTS = flags.DEFINE_list("texts", [], "the texts; config.data.path if not given")
SEEDS = flags.DEFINE_list("seeds", [], "the seeds; config.seed if not given")
TRIALS = flags.DEFINE_integer(
    "trials", None, "how many combinations to draw; all if not given", lower_bound=1
)
DRAW_SEED = flags.DEFINE_integer("draw_seed", 0, "decides which ones --trials draws")
JOBS = flags.DEFINE_integer(
    "jobs", 1, "how many trials at a time, each on its share of the cores", lower_bound=1
)
OUT = flags.DEFINE(options.LOCAL_PATH, "out", "runs/sweep", "the folder for the table")


def search(
    trials: Sequence[Trial],
    texts: Sequence[Text],
    cleaning: Cleaning,
    shares: Sequence[set[int]],
    out: Path,
) -> int:
    """Run the trials of which the table in `out` has no line; return the exit code."""
    about, table = grid.common(trials), out / "trials.tsv"
    columns = results.columns_of(about["varied"])
    rows = results.read_table(table, columns)
    write_file(epath.Path(out / "sweep.json"), json.dumps(about, indent=1) + "\n")
    for trial in trials:
        # A kill may have come between its line and this.
        if trial.name in rows and rows[trial.name]["status"] == results.FINISHED:
            runner.tidy(trial, out)
    for text in texts:
        runner.write_first_part(text, cleaning, runner.text_path(out, text.name))
    waiting = [trial for trial in trials if trial.name not in rows]
    logger.info("%d of %d trials to run", len(waiting), len(trials))

    def record(ended: Ended) -> None:
        trial = ended.trial
        row = {"trial": trial.name, "text": trial.text, "seed": trial.seed, **trial.settings}
        row |= runner.outcome(ended, out)
        results.append(table, columns, row)
        what = " ".join(f"{name}={row[name]}" for name in ("text", "seed", *trial.settings))
        if row["status"] == results.FINISHED:
            logger.info("%s: %.4f bits/char", what, row["bits_per_char"])
            runner.tidy(trial, out)
        else:
            logger.warning("%s: %s", what, row["status"])

    with app.StopSignal() as stop:
        if not runner.run_trials(waiting, out, shares, stop, record):
            logger.info("stopped; the same command goes on")
            return 128 + (stop.number or signal.SIGTERM)
    return show(trials, results.read_table(table, columns))


def show(trials: Sequence[Trial], rows: dict[str, dict[str, str]]) -> int:
    """Print what the lines `rows` of a table say of `trials`; return the exit code."""
    keys, texts = list(trials[0].settings), list(dict.fromkeys(trial.text for trial in trials))
    scores = results.rank([rows[trial.name] for trial in trials], keys)
    print("\n".join(results.ranking(scores, keys, texts)))
    best = scores[0]
    if not best.num_failed:
        settings = dict(zip(keys, best.values, strict=True))
        if TEXTS.value:
            settings["data.path"] = TEXTS.value[0]
        print(f"best: {options.train_command(CONFIG, settings)}")
    return int(any(score.num_failed for score in scores))


def main() -> int:
    """Search as the flags say."""
    config, out = options.checked_config(CONFIG), Path(OUT.value)
    shares = runner.share_cores(JOBS.value)
    varied = grid.parse_sets(SET.value)
    combinations = grid.combine(varied, TRIALS.value, DRAW_SEED.value)
    words = SEEDS.value or [str(config.seed)]
    seeds = grid.distinct("--seeds", [parse_setting("seed", word) for word in words])
    # Before the texts are read, which may take long.
    grid.make_trials(config, combinations, ["any"], seeds)
    cleaning = Cleaning.from_config(config.data)
    texts = [runner.open_text(path, cleaning) for path in TEXTS.value or [config.data.path]]
    names = grid.distinct("--texts", [text.name for text in texts])
    trials = grid.make_trials(config, combinations, names, seeds)
    about = grid.common(trials)
    grid.refuse_other(out / "sweep.json", about)
    folders.make_out(OUT.value, "sweep.json", set(about))
    try:
        with sole_writer(epath.Path(out), "choose another --out"):
            return search(trials, texts, cleaning, shares, out)
    except OSError as error:
        raise RunError(
            f"{error.filename or out}: could not be written ({error.strerror or error}); "
            "make room, or mend the folder, and give the same command again"
        ) from None


if __name__ == "__main__":
    app.run(main, "--config=tiny --texts=book.txt --set=optimizer.learning_rate=4e-3,8e-3")
