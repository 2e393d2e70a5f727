"""Evaluate a trained model on a held-out text."""

import logging
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm.data.batches import evaluation_batches, split
from charlstm.data.corpus import Corpus, open_corpus
from charlstm.errors import UserError
from charlstm.evaluation import audit as audits
from charlstm.evaluation import dynamic
from charlstm.evaluation.memorization import PIECE_CHARS, share_found
from charlstm.evaluation.passes import Pass, cold_pass, dynamic_pass, stateful_pass
from charlstm.evaluation.report import check_finite, format_report, measure_baselines
from charlstm.evaluation.scoring import (
    TEMPERATURES_R,
    best_temperature,
    losses_at_temperatures,
    metrics_of,
    sum_losses,
)
from charlstm.model import CharLSTM
from charlstm.runs.folder import Run
from charlstm.training.setup import open_run_text

logger = logging.getLogger(__name__)

MAX_KNOWN_SHARE = 0.1


class HeldOut(NamedTuple):
    """A held-out text of M characters, and the training part of the run's own text."""

    ids_M: np.ndarray
    name: str = "the text"
    bytes_V: np.ndarray | None = None  # UTF-8 bytes of each character, if ids are the text's own
    train_M: np.ndarray | None = None
    corpus: Corpus | None = None  # whose cleaned characters contain the text


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one held-out text. `str` gives a table."""

    metrics: dict[str, Any]  # as `launch/evaluate.py --json` prints them
    train_size: int  # characters of the training part, 0 without one
    held_out_size: int

    def __str__(self) -> str:
        return "\n".join(format_report(self.metrics, self.train_size, self.held_out_size))


def open_held_out(
    run: Run, path: str = "", unknown: str = "error", with_training_part: bool = True
) -> HeldOut:
    """Return the text at `path`, or the validation part of the run's own text if it is empty.

    Args:
      run: the run whose vocabulary maps characters to ids.
      path: a text, as config.data.path.
      unknown: what to do with characters outside the vocabulary: 'error', 'drop' or 'replace'.
      with_training_part: warn if the training part, which baselines need, cannot be read.

    Raises:
      UserError: if the text cannot be read, or the run has no validation part.
    """
    data, remedy = run.config.data, "give --text=FILE, a UTF-8 text"
    if not path and not data.val_fraction:
        raise UserError(f"{run.workdir}: this run has no validation part; give --text=FILE")
    if not path:
        return validation_part(run, open_run_text(run, remedy))
    text = open_corpus(data, path, vocab=run.vocab, unknown=unknown, remedy=remedy)
    held_out = HeldOut(text.ids_M, path, _bytes_of(run, text), None, text)
    try:
        own = open_run_text(run, remedy, may_fetch=False)
    except UserError as error:
        if with_training_part:
            problem = str(error).split(";")[0]
            logger.warning("no baselines, which need the run's own text: %s", problem)
        return held_out
    held_out = held_out._replace(train_M=split(own.ids_M, data)[0])
    _warn_of_known_text(held_out)
    return held_out


def validation_part(run: Run, own: Corpus) -> HeldOut:
    """Return the validation part of `own`, the run's text as open_run_text returns it."""
    train_M, ids_M = split(own.ids_M, run.config.data)
    name = f"the last {len(ids_M):,} characters of {own.source}"
    return HeldOut(ids_M, name, _bytes_of(run, own), train_M, own)


def evaluate(
    run: Run,
    model: CharLSTM,
    params: Any,
    held_out: HeldOut,
    *,
    window: int = 256,
    dynamic_rate: float | None = None,
    fit_temperature: bool = False,
    baselines: bool = True,
    audit: bool = False,
) -> Evaluation:
    """Return the metrics of a held-out text, stateful and in stateless windows.

    Args:
      run, model, params: as load_model returns them.
      held_out: the text, as open_held_out returns it.
      window: T of the stateless windows.
      dynamic_rate: the learning rate of dynamic evaluation; None skips it.
      fit_temperature: fit a softmax temperature on the first half of the text, and measure it on
        the second.
      baselines: measure n-grams and compressors, if there is a training part.
      audit: check that the losses are lengths of a code: see charlstm.evaluation.audit.

    Raises:
      UserError: if dynamic evaluation cannot be done or diverges.
      RunError: if a metric is not finite.
    """
    if dynamic_rate is not None and run.config.data.order == "windows":
        raise UserError(
            f"{run.workdir}: was trained on windows, and --dynamic needs a stateful run; "
            "give a run of config.data.order=streams"
        )
    ids_M = held_out.ids_M
    stateful = stateful_pass(model, params, run.config, ids_M)
    window = min(window, len(ids_M) - 1)  # a longer window would read the same characters
    cold = cold_pass(model, params, window, len(ids_M))
    metrics: dict[str, Any] = {"text": held_out.name} | _measure(stateful, held_out)
    metrics["cold"] = {"window": window} | _measure(cold, held_out)
    if dynamic_rate is not None:
        loss = metrics["nats_per_char"]
        metrics["dynamic"] = _measure_dynamic(run, model, params, held_out, dynamic_rate, loss)
    if fit_temperature:
        metrics["temperature"] = _measure_temperature(run, model, params, ids_M)
    check_finite(metrics, held_out.name)
    if audit:
        is_stateful = run.config.data.order == "streams"
        passes = {"stateful" if is_stateful else "windows": stateful, "cold": cold}
        metrics["audit"] = _audit(run, model, params, held_out, passes, metrics, dynamic_rate)
    if baselines and held_out.train_M is not None:
        metrics["baselines"] = measure_baselines(held_out.train_M, ids_M, run.vocab)
    train_size = 0 if held_out.train_M is None else len(held_out.train_M)
    return Evaluation(metrics, train_size, len(ids_M))


def _bytes_of(run: Run, text: Corpus) -> np.ndarray | None:
    is_as_written = not any(run.cleaning) and not text.num_unknown
    return run.vocab.utf8_bytes() if is_as_written else None


def _warn_of_known_text(held_out: HeldOut) -> None:
    if held_out.train_M is None or len(held_out.ids_M) < PIECE_CHARS:
        return
    share = share_found(held_out.ids_M, held_out.train_M)
    if share > MAX_KNOWN_SHARE:
        logger.warning(
            "about %.0f %% of %s occurs verbatim in the training part; the metrics show "
            "memorization, not prediction",
            100 * share,
            held_out.name,
        )


def _measure(scored: Pass, held_out: HeldOut) -> dict[str, Any]:
    num_chars = len(held_out.ids_M) - scored.first
    return metrics_of(sum_losses(scored.run(held_out.ids_M), num_chars, held_out.bytes_V))


def _measure_dynamic(
    run: Run, model: CharLSTM, params: Any, held_out: HeldOut, rate: float, static_loss: float
) -> dict[str, Any]:
    scored = _dynamic_pass(run, model, params, rate)
    sums = sum_losses(scored.run(held_out.ids_M), len(held_out.ids_M) - 1, held_out.bytes_V)
    if not sums.loss < static_loss + math.log(len(run.vocab)):
        raise UserError(f"--dynamic_rate={rate}: dynamic evaluation diverges; give a lower rate")
    return {"rate": rate, "window": dynamic.WINDOW} | metrics_of(sums)


def _dynamic_pass(run: Run, model: CharLSTM, params: Any, rate: float) -> Pass:
    texts = [run.vocab.encode(prompt) for prompt in run.prompts]
    return dynamic_pass(model, dynamic.make_anchor(model, params, texts), rate)


def _audit(
    run: Run,
    model: CharLSTM,
    params: Any,
    held_out: HeldOut,
    passes: dict[str, Pass],
    metrics: dict[str, Any],
    dynamic_rate: float | None,
) -> dict[str, Any]:
    """Return the checks of all passes as JSON, and the numbers of characters and bytes."""
    ids_M, first = held_out.ids_M, max(scored.first for scored in passes.values())
    checks: list[audits.Check] = []
    for key, (name, scored) in zip(jax.random.split(run.key(0)), passes.items(), strict=True):
        loss = (metrics | metrics.get(name, {}))["nats_per_char"]
        checks += audits.check_pass(name, scored, model, ids_M, loss, key)
    if run.config.data.order == "streams" and run.config.seq_len > 1:
        rate = dynamic.RATE if dynamic_rate is None else dynamic_rate
        scored = _dynamic_pass(run, model, params, rate)
        checks += audits.check_dynamic(scored, model, ids_M, run.key(1))
    counts: dict[str, Any] = {"characters": len(ids_M), "scored": len(ids_M) - first}
    if held_out.bytes_V is not None:
        text = run.vocab.decode(ids_M[first:])
        checks.append(audits.check_bytes(text, metrics))
        counts["scored_bytes"] = len(text.encode())
    if (corpus := held_out.corpus) is not None:
        counts["file_bytes"] = corpus.num_bytes
        counts["file_characters"] = len(corpus.ids_M)
        counts["cut"], counts["unknown"] = corpus.num_cut, corpus.num_unknown
    return audits.as_json(checks) | {"counts": counts}


def _measure_temperature(
    run: Run, model: CharLSTM, params: Any, ids_M: np.ndarray
) -> dict[str, Any]:
    halves_M = np.split(ids_M, [len(ids_M) // 2])
    first, second = (evaluation_batches(half_M, run.config) for half_M in halves_M)
    fitted = best_temperature(losses_at_temperatures(model, params, first, TEMPERATURES_R))
    losses_R = losses_at_temperatures(model, params, second, np.array([1.0, fitted]))
    plain, tempered = (losses_R / math.log(2)).tolist()
    return {"fitted": fitted, "bits_per_char": tempered, "bits_per_char_at_1": plain}
