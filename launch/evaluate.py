"""Measure how well a trained run predicts a held-out text.

  python launch/evaluate.py --workdir=runs/default-pg345 [--text=FILE] [--dynamic] [--json]

Without --text it measures the validation part of the run's own text, in two ways:

carried  Stateful: the whole text in order. Every character but the first counts once.
cold     Stateless: adjacent windows of --window characters, each from an empty state, as code in
         the style of nanoGPT reports. Every character but the first counts once.

--dynamic adds dynamic evaluation: the model learns from every 20 characters after it has predicted
them. --temperature fits a softmax temperature on the first half and measures it on the second.

--audit checks that the losses are lengths of a code, prints what it measures, and ends with exit
code 1 if a check fails: probabilities sum to 1, later characters change no prediction, every
character counts once, dynamic evaluation predicts before it learns.

--compare=DIR prints the stateful difference to another run on the same characters, and its paired
standard error over blocks. With several runs of each recipe, which differ in config.seed, as in
--workdir=A1,A2,A3 --compare=B1,B2,B3, it tests the difference against the noise between seeds.

Bits per byte count UTF-8 bytes; they are left out if the model reads other characters than the
text has (lower case, --unknown and the like). +- is the standard error over up to 30 blocks. The
baselines learn from the training part: uniform, unigram, Kneser-Ney 5- and 7-grams, compressors.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import json
import math

from absl import flags

from charlstm.checks import as_float32
from charlstm.cli import folders, options
from charlstm.errors import UserError

WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; the last trained in runs/ if none"
)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which weights")
TEXT = flags.DEFINE(options.ANY_PATH, "text", "", "a UTF-8 text; none: the run's validation part")
UNKNOWN = flags.DEFINE_enum(
    "unknown", "error", ["error", "drop", "replace"], "unknown characters of --text"
)
WINDOW = flags.DEFINE_integer(
    "window", 256, "the length of cold windows", lower_bound=1, upper_bound=2**16
)
DYNAMIC = flags.DEFINE_boolean("dynamic", False, "add dynamic evaluation")
DYNAMIC_RATE = flags.DEFINE_float("dynamic_rate", None, "its learning rate")
TEMPERATURE = flags.DEFINE_boolean("temperature", False, "fit a softmax temperature")
BASELINES = flags.DEFINE_boolean("baselines", True, "compare with n-grams and compressors")
AUDIT = flags.DEFINE_boolean("audit", False, "check that the losses are the lengths of a code")
COMPARE = flags.DEFINE(
    options.ANY_PATH, "compare", "", "one or more other run folders, separated by commas"
)
JSON = flags.DEFINE_boolean("json", False, "print one JSON object")


def check_flags() -> None:
    """Raise UserError for flags that make no sense."""
    rate = DYNAMIC_RATE.value
    if rate is not None and not 0 < as_float32(rate) < math.inf:
        raise UserError(f"--dynamic_rate={rate}: must be a number above 0, in float32 too")
    if rate is not None and not DYNAMIC.value:
        raise UserError(f"--dynamic_rate={rate}: is for --dynamic, which is not given")
    for flag in (WINDOW, DYNAMIC, TEMPERATURE, BASELINES, AUDIT):
        if COMPARE.value and flag.present:
            raise UserError(f"--{flag.name}: is not for --compare; give one of them")


def compare() -> None:
    """Compare the runs of --workdir and --compare and print the result on stdout."""
    sides = [folders.trained_workdirs(flag.value) for flag in (WORKDIR, COMPARE)]
    from charlstm.evaluation import comparison  # it imports JAX

    given = {"checkpoint": CHECKPOINT.value, "path": TEXT.value, "unknown": UNKNOWN.value}
    metrics = comparison.compare_runs(*sides, **given)
    lines = comparison.format_comparison(metrics)
    print(json.dumps(metrics, allow_nan=False) if JSON.value else "\n".join(lines))


def main() -> None:
    """Evaluate as the flags say and print the metrics on stdout."""
    check_flags()
    if COMPARE.value:
        compare()
        return
    workdir = folders.trained_workdir(WORKDIR.value)
    from charlstm.evaluation import dynamic, evaluate, open_held_out  # they import JAX
    from charlstm.evaluation.audit import refuse_failed
    from charlstm.runs.checkpoints import load_model

    run, model, params = load_model(workdir, CHECKPOINT.value)
    rate = dynamic.RATE if DYNAMIC_RATE.value is None else DYNAMIC_RATE.value
    result = evaluate(
        run,
        model,
        params,
        open_held_out(run, TEXT.value, UNKNOWN.value, BASELINES.value),
        window=WINDOW.value,
        dynamic_rate=rate if DYNAMIC.value else None,
        fit_temperature=TEMPERATURE.value,
        baselines=BASELINES.value,
        audit=AUDIT.value,
    )
    print(json.dumps(result.metrics, allow_nan=False) if JSON.value else result)
    if AUDIT.value:
        refuse_failed(result.metrics["audit"])


if __name__ == "__main__":
    app.run(main, "--text=other.txt --nobaselines")
