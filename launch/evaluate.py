"""Measure how well a trained run predicts a text.

  python launch/evaluate.py --workdir=runs/default [--text=FILE] [--json]

Without --text: the validation part of the run's own text. Every character but the first counts
once, read in one go with the carry handed on; for a run trained on windows, every character that
has a full window before it.
"""

import json
import math
from typing import Any

import app
from absl import flags

from charlstm.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", "runs/default", "the run folder")
CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which weights")
TEXT = flags.DEFINE_string("text", "", "a UTF-8 text; none: the run's validation part")
UNKNOWN = flags.DEFINE_enum(
    "unknown", "error", ["error", "drop", "replace"], "characters of --text that are not known"
)
JSON = flags.DEFINE_boolean("json", False, "print one JSON object")


def main() -> None:
    """Evaluate as the flags say and print the figures on stdout."""
    import jax

    from charlstm.checkpoint import load_model
    from charlstm.corpus import forget_pages, open_corpus
    from charlstm.data import evaluation_batches, split
    from charlstm.model import zero_carry
    from charlstm.source import PYTHON_MANUAL
    from charlstm.steps import evaluate, make_eval_step

    run, model, params = load_model(WORKDIR.value, CHECKPOINT.value)
    data = run.config.data
    if not TEXT.value and not data.val_fraction:
        raise UserError(f"{WORKDIR.value}: this run has no validation part; give --text=FILE")
    source = run.text["source"]
    text = open_corpus(
        data,
        # As an absolute path, since the run was perhaps started somewhere else; and Dracula, whose
        # path is "", may have to be downloaded again.
        TEXT.value or (source if data.path and source != PYTHON_MANUAL else ""),
        source=source,
        vocab=run.vocab if TEXT.value else None,
        unknown=UNKNOWN.value,
        remedy="give --text=FILE, a UTF-8 text",
    )
    if not TEXT.value and text.sha256 != run.text["sha256"]:
        raise UserError(f"{text.source}: has changed since the run was trained; give --text=FILE")
    ids_M = text.ids_M
    if not TEXT.value:
        ids_M = split(ids_M, data.val_fraction, data.max_val_chars)[1]
    batches = evaluation_batches(ids_M, run.config, batch_size=1)

    def read(step: int) -> Any:
        batch = batches(step)
        forget_pages(ids_M)
        return batch

    result = evaluate(
        jax.jit(make_eval_step(model)),
        params,
        zero_carry(model, batches.batch_size),
        map(read, range(batches.steps_per_epoch)),
    )
    figures = {
        "text": TEXT.value or f"the last {len(ids_M):,} characters of {text.source}",
        "characters": int(result["count"]),
        "nats_per_char": result["loss"],
        "bits_per_char": result["loss"] / math.log(2),
        "perplexity": math.exp(result["loss"]),
        "accuracy": result["accuracy"],
    }
    if JSON.value:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:14} {value:.4f}" if isinstance(value, float) else f"{name:14} {value}")


if __name__ == "__main__":
    app.run(main)
