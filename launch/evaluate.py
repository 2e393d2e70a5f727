"""Measure how well a trained run predicts a text, and what to compare that with.

  python launch/evaluate.py --workdir=runs/default-pg345 [--text=FILE] [--dynamic] [--json]

Without --text: the validation part of the run's own text. Two standards, since published figures
follow either, and a third that asks for more:

carried  The whole text in order, in one go, the carry handed on. Every character but the first
         counts once; for a run trained on windows, every character that has a full window before
         it.
cold     Windows of --window characters side by side, each read from an empty carry, as code in the
         manner of nanoGPT reports. Every character but the text's first counts once, the first of
         each window after the one character that the last window ended with.
dynamic  With --dynamic. As carried, but the model goes on learning: it predicts 20 characters, then
         learns from them (charlstm/evaluation/dynamic.py).

Bits per byte are those of the text in UTF-8, a line end being one byte; they are left out where the
model reads other characters than the text has (config.data.lowercase, strip_punctuation, min_count,
document_separator, --unknown). A warning says if much of --text stands in the training part.

The standard error of the bits per character is that over up to 30 blocks of the text. The baselines
learn from the run's training part and predict the same text: a guess among all characters, their
frequencies, interpolated 5- and 7-grams (Kneser-Ney), and how many bits the text adds to the
compressed training part. With --text they need the run's own text, too; where it can't be had, a
warning says so. --nobaselines leaves them out. With --temperature a softmax temperature is fitted
on the first half of the text, and what it is worth measured on the second.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import json
import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from charlstm.cli import folders, options
from charlstm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from charlstm.runs.folder import Run

logger = logging.getLogger("charlstm.evaluate")

MUCH_KNOWN = 0.1
COLD_CHARS = 2**13  # that cold windows are read at once: few enough to be in the cache

WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; the last trained in runs/ if none"
)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which weights")
TEXT = flags.DEFINE(options.ANY_PATH, "text", "", "a UTF-8 text; none: the run's validation part")
UNKNOWN = flags.DEFINE_enum(
    "unknown", "error", ["error", "drop", "replace"], "characters of --text that are not known"
)
WINDOW = flags.DEFINE_integer(
    "window", 256, "the length of cold windows", lower_bound=1, upper_bound=2**16
)
DYNAMIC = flags.DEFINE_boolean("dynamic", False, "also let the model learn while it reads")
DYNAMIC_RATE = flags.DEFINE_float("dynamic_rate", None, "how fast; none: as found on Dracula")
TEMPERATURE = flags.DEFINE_boolean("temperature", False, "also fit a softmax temperature")
BASELINES = flags.DEFINE_boolean("baselines", True, "compare with n-grams and compressors")
JSON = flags.DEFINE_boolean("json", False, "print one JSON object")


class Parts(NamedTuple):
    """What to evaluate, and what to compare it with."""

    train_M: "np.ndarray | None"  # None if the run's text cannot be read
    ids_M: "np.ndarray"  # the text to evaluate
    name: str
    bytes_V: "np.ndarray | None"  # of each character; None if ids are not the text's characters


def open_parts(run: "Run") -> Parts:
    """Return the held-out text, and the run's training part."""
    from charlstm.data.batches import split
    from charlstm.data.corpus import Corpus, open_corpus
    from charlstm.training.setup import open_own

    data, remedy = run.config.data, "give --text=FILE, a UTF-8 text"

    def bytes_of(text: Corpus) -> "np.ndarray | None":
        is_as_written = not any(run.cleaning) and not text.num_unknown
        return run.vocab.utf8_bytes() if is_as_written else None

    if not TEXT.value:
        own = open_own(run, remedy)
        train_M, ids_M = split(own.ids_M, data.val_fraction, data.max_val_chars)
        name = f"the last {len(ids_M):,} characters of {own.source}"
        return Parts(train_M, ids_M, name, bytes_of(own))
    text = open_corpus(data, TEXT.value, vocab=run.vocab, unknown=UNKNOWN.value, remedy=remedy)
    parts = Parts(None, text.ids_M, TEXT.value, bytes_of(text))
    try:
        own = open_own(run, remedy, may_fetch=False)
    except UserError as error:
        if BASELINES.value:
            problem = str(error).split(";")[0]
            logger.warning("no baselines, which need the run's own text: %s", problem)
        return parts
    train_M, _ = split(own.ids_M, data.val_fraction, data.max_val_chars)
    return parts._replace(train_M=train_M)


def warn_of_known_text(parts: Parts) -> None:
    """Warn if much of a text that --text gives stands in the training part."""
    from charlstm.evaluation.memorization import PIECE_CHARS, share_found

    if not TEXT.value or parts.train_M is None or len(parts.ids_M) < PIECE_CHARS:
        return
    share = share_found(parts.ids_M, parts.train_M)
    if share > MUCH_KNOWN:
        logger.warning(
            "about %.0f %% of %s stands verbatim in the training part: the figures show what the "
            "model has memorised, not how well it predicts",
            100 * share,
            parts.name,
        )


def measure_both(run: "Run", model: Any, params: Any, parts: Parts) -> dict[str, Any]:
    """Return the figures of a held-out text, those of cold windows as 'cold'."""
    import jax

    from charlstm.data.batches import Windows, cold_batches, evaluation_batches
    from charlstm.data.corpus import forget_pages
    from charlstm.evaluation.scoring import figures, read, scores
    from charlstm.model import zero_carry
    from charlstm.steps import make_score_step

    score_step, ids_M = jax.jit(make_score_step(model)), parts.ids_M

    def forgetting(batches: Any) -> Any:
        for batch in batches:
            yield batch
            forget_pages(ids_M)

    def measure(batches: Any, batch_size: int, num_chars: int) -> dict[str, Any]:
        empty = zero_carry(model, batch_size)
        scored = scores(score_step, params, empty, forgetting(batches))
        return figures(read(scored, num_chars, parts.bytes_V))

    batches, last = evaluation_batches(ids_M, run.config, batch_size=1), len(ids_M) - 1
    num_counted = batches.num_windows if isinstance(batches, Windows) else last
    window = min(WINDOW.value, last)  # a longer one would read the same
    batch_size = min(max(1, COLD_CHARS // window), -(-last // window))
    cold = measure(cold_batches(ids_M, window, batch_size), batch_size, last)
    steps = map(batches, range(batches.steps_per_epoch))
    carried = measure(steps, batches.batch_size, num_counted)
    return carried | {"cold": {"window": window} | cold}


def measure_dynamic(
    run: "Run", model: Any, params: Any, parts: Parts, static_loss: float
) -> dict[str, Any]:
    """Return the figures of a held-out text of which the model learns while it reads."""
    import jax

    from charlstm.data.batches import Streams
    from charlstm.evaluation import dynamic
    from charlstm.evaluation.scoring import figures, read, scores
    from charlstm.model import zero_carry

    rate = dynamic.RATE if DYNAMIC_RATE.value is None else DYNAMIC_RATE.value
    anchor = dynamic.make_anchor(model, params, [run.vocab.encode(text) for text in run.prompts])
    reader = dynamic.Reader(params, zero_carry(model, 1))
    batches = Streams(parts.ids_M, 1, dynamic.WINDOW)
    steps = map(batches, range(batches.steps_per_epoch))
    scored = scores(jax.jit(dynamic.make_dynamic_step(model, rate)), anchor, reader, steps)
    reading = read(scored, len(parts.ids_M) - 1, parts.bytes_V)
    if not reading.loss < static_loss + math.log(len(run.vocab)):
        raise UserError(
            f"--dynamic_rate={rate}: the model has unlearnt all it knew; give a lower one"
        )
    return {"rate": rate, "window": dynamic.WINDOW} | figures(reading)


def measure_temperature(run: "Run", model: Any, params: Any, ids_M: "np.ndarray") -> dict[str, Any]:
    """Return the temperature that fits the first half of a text best, and figures of the second."""
    import jax

    from charlstm.data.batches import evaluation_batches
    from charlstm.evaluation.scoring import (
        TEMPERATURES_R,
        best_temperature,
        heated_losses,
        make_heated_step,
    )
    from charlstm.model import zero_carry

    heated_step, half = jax.jit(make_heated_step(model)), len(ids_M) // 2

    def losses(part_M: "np.ndarray", temperatures_R: Any) -> "np.ndarray":
        batches = evaluation_batches(part_M, run.config)
        steps = map(batches, range(batches.steps_per_epoch))
        empty = zero_carry(model, batches.batch_size)
        return heated_losses(heated_step, params, empty, steps, temperatures_R)

    fitted = best_temperature(losses(ids_M[:half], TEMPERATURES_R))
    plain, heated = losses(ids_M[half:], [1.0, fitted]) / math.log(2)
    return {"fitted": fitted, "bits_per_char": heated, "bits_per_char_at_1": plain}


def check_flags() -> None:
    """Raise UserError for flags that make no sense."""
    rate = DYNAMIC_RATE.value
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(f"--dynamic_rate={rate}: must be a number above 0")
    if rate is not None and not DYNAMIC.value:
        raise UserError(f"--dynamic_rate={rate}: is for --dynamic, which is not given")


def main() -> None:
    """Evaluate as the flags say and print the figures on stdout."""
    check_flags()
    from charlstm.evaluation.report import measure_baselines, refuse_not_finite, table
    from charlstm.runs.checkpoints import load_model

    workdir = folders.trained_workdir(WORKDIR.value)
    run, model, params = load_model(workdir, CHECKPOINT.value)
    if not TEXT.value and not run.config.data.val_fraction:
        raise UserError(f"{workdir}: this run has no validation part; give --text=FILE")
    if DYNAMIC.value and run.config.data.order == "windows":
        raise UserError(
            f"{workdir}: was trained on windows, and --dynamic reads on and on; "
            "give a run of config.data.order=streams"
        )
    parts = open_parts(run)
    warn_of_known_text(parts)
    figures = {"text": parts.name} | measure_both(run, model, params, parts)
    if DYNAMIC.value:
        loss = figures["nats_per_char"]
        figures["dynamic"] = measure_dynamic(run, model, params, parts, loss)
    if TEMPERATURE.value:
        figures["temperature"] = measure_temperature(run, model, params, parts.ids_M)
    refuse_not_finite(figures, parts.name)
    if BASELINES.value and parts.train_M is not None:
        figures["baselines"] = measure_baselines(parts.train_M, parts.ids_M, run.vocab)
    if JSON.value:
        print(json.dumps(figures, allow_nan=False))
        return
    num_train = 0 if parts.train_M is None else len(parts.train_M)
    print("\n".join(table(figures, num_train, len(parts.ids_M))))


if __name__ == "__main__":
    app.run(main, "--text=other.txt --nobaselines")
