"""Search for settings: train with each combination and rank them on text that is not reported.

  python launch/sweep.py --set=optimizer.learning_rate=4e-3,8e-3 --set=model.hidden_size=256,384
      [--config=NAME] [--config.KEY=VALUE ...] [--texts=FILE,FILE] [--seeds=0,1]
      [--combinations=N] [--jobs=N] [--out=DIR]

A trial is a run of launch/train.py with one combination, one text and one seed. It trains on the
first 85 % of the text and is validated on the next 5 % with its final weights. No trial sees the
last 10 %, which train.py and evaluate.py validate on. The table at the end ranks the combinations
by their mean over seeds, then over texts. Exit code 1 if a trial failed. DIR contains:

trials.tsv    a line per trial that has ended; seconds are those of the whole command, missing if
              the trial was resumed or others ran at the same time (--jobs)
metrics/      metrics.jsonl of each finished trial; the rest of its run is deleted
runs/         run folders and logs of trials that run, were stopped or failed
texts/        the first 90 % of each text, cleaned
sweep.json    what all trials share: another --config or other keys need another DIR

The same command resumes a sweep; values, texts and seeds may be added. A trial with a line in
trials.tsv does not run again: delete the line to repeat a failed trial.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import signal

from absl import flags

from charlstm import sweep
from charlstm.cli import options
from charlstm.config_check import parse_setting
from charlstm.sweep.grid import parse_sets

CONFIG = options.define_config()
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE,VALUE,...: a setting to vary; repeatable")
TEXTS = flags.DEFINE_list("texts", [], "the texts; config.data.path by default")
SEEDS = flags.DEFINE_list("seeds", [], "the seeds; config.seed by default")
COMBINATIONS = flags.DEFINE_integer(
    "combinations", None, "how many combinations to draw at random; all by default", lower_bound=1
)
JOBS = flags.DEFINE_integer(
    "jobs", 1, "how many trials run at a time, each on its share of the cores", lower_bound=1
)
OUT = flags.DEFINE(options.LOCAL_PATH, "out", "runs/sweep", "the folder for results and runs")


def main() -> int:
    """Run the sweep of the flags; print its results and a command with the best settings."""
    config = options.checked_config(CONFIG)
    with app.StopSignal() as stop:
        results = sweep.run(
            config,
            parse_sets(SET.value),
            paths=TEXTS.value,
            seeds=[parse_setting("seed", word) for word in SEEDS.value],
            num_combinations=COMBINATIONS.value,
            jobs=JOBS.value,
            out=OUT.value,
            should_stop=stop,
        )
    if not results.is_complete:
        return 128 + (stop.number or signal.SIGTERM)
    print(results)
    if (settings := results.best_settings) is not None:
        path = {"data.path": TEXTS.value[0]} if TEXTS.value else {}
        print(f"best: {options.train_command(CONFIG, settings | path)}")
    return int(results.has_failures)


if __name__ == "__main__":
    app.run(main, "--config=tiny --texts=book.txt --set=optimizer.learning_rate=4e-3,8e-3")
