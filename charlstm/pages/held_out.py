"""What the sections of a report show on the held-out text: surprise, units, calibration, errors."""

import base64
import zlib
from typing import Any, NamedTuple

import numpy as np

from charlstm.evaluation import calibration
from charlstm.evaluation.features import text_features
from charlstm.evaluation.inside import record_states
from charlstm.evaluation.probes import UnitScores, linear_probe, probe_units
from charlstm.evaluation.surprise import Predictions, predict_text
from charlstm.lstm.reference import LayerStates
from charlstm.model import CharLSTM
from charlstm.pages.sections import rounded
from charlstm.runs.folder import Run

MAX_CHARS = 200_000  # characters of the held-out text that are predicted, within 20 s
PAGE_CHARS = 2000
PROBE_CHARS = 40_000  # characters before the page that probes read, besides the page
MAX_STATE_BYTES = 2**29  # of the recorded states
# Limits the data of the units to 2.3 MB, since a value of a cell takes at most 5 bits, one of a
# gate 4, and base64 a third more.
MAX_VALUES = 3_100_000
CELL_LEVELS, GATE_LEVELS = 30, 15  # largest integers; 0 of a cell state is in the middle
GATES = {
    "input gate": "input_gate_BTH",
    "forget gate": "forget_gate_BTH",
    "output gate": "output_gate_BTH",
}


class Reading(NamedTuple):
    """A held-out text that a model has read, and the page of it that is shown."""

    run: Run
    model: CharLSTM
    params: Any
    ids_M: np.ndarray
    predictions: Predictions
    page: slice

    @property
    def page_text(self) -> str:
        """The characters of the page."""
        return self.run.vocab.decode(self.ids_M[self.page])


def read_held_out(run: Run, model: CharLSTM, params: Any, ids_M: np.ndarray) -> Reading:
    """Return the reading of at most the first MAX_CHARS characters of a held-out text."""
    ids_M = np.asarray(ids_M[:MAX_CHARS])
    predictions = predict_text(model, params, ids_M)
    return Reading(run, model, params, ids_M, predictions, choose_page(run.vocab.decode(ids_M)))


def choose_page(text: str, length: int = PAGE_CHARS) -> slice:
    """Return the page: about `length` characters from a paragraph, or line, after the middle.

    It ends with a line if one ends in its last tenth. It never depends on what the model does well.
    """
    if len(text) <= length:
        return slice(0, len(text))
    last = len(text) - length
    start = min(len(text) // 2, last)
    for border in ("\n\n", "\n"):
        place = text.find(border, start, min(start + length, last))
        if place >= 0:
            start = place + len(border)
            break
    line_end = text.rfind("\n", start + length - length // 10, start + length)
    return slice(start, line_end + 1 if line_end >= 0 else start + length)


def page_of(reading: Reading, total: int) -> dict[str, Any]:
    """Return the page and the predictions of its characters.

    Args:
      reading: the held-out text.
      total: its characters, including those that were not read.
    """
    part = Predictions(*(leaf[reading.page] for leaf in reading.predictions))
    used, place_MK = np.unique(part.top_ids_MK, return_inverse=True)
    return {
        "text": reading.page_text,
        "start": reading.page.start,
        "total": total,
        "bits": rounded(part.bits_M, 2),
        "entropy": rounded(part.entropy_M, 2),
        "rank": part.rank_M,
        # The characters that occur in `top`; a character that is not predicted has none.
        "characters": [reading.run.vocab.characters[index] if index >= 0 else "" for index in used],
        "top": place_MK.reshape(part.top_ids_MK.shape),
        "shares": rounded(part.top_probs_MK, 3),
        "order": reading.run.config.data.order,
        "window": reading.run.config.seq_len,
    }


def units_of(reading: Reading) -> dict[str, Any]:
    """Return the states of units on the page, and how well they explain features of the text.

    If the model has more units than fit on a page, those are chosen that a feature explains best.
    """
    model, page = reading.model, reading.page
    num_units = model.num_layers * model.hidden_size
    length = page.stop - page.start
    before = max(0, min(PROBE_CHARS, MAX_STATE_BYTES // (24 * num_units) - length))
    start = max(0, page.start - before)
    ids_M = reading.ids_M[start : page.stop]
    layers = record_states(model, reading.params, ids_M)
    features = text_features(reading.run.vocab.decode(ids_M))
    cells_MH = np.concatenate([states.c_BTH for states in layers], axis=1)
    found = probe_units(cells_MH, features) if len(ids_M) > 3 else {}
    linear = linear_probe(cells_MH, {name: features[name] for name in found}) if found else {}
    scores = {name: _by_unit(scores) for name, scores in found.items()}
    order = _best_explained(found, scores, num_units)
    shown = order[: max(1, MAX_VALUES // (length * (1 + len(GATES))))]
    values, scale_K = pack_states(layers, len(ids_M) - length, shown)
    return {
        "text": reading.page_text,
        "units": [[index // model.hidden_size, index % model.hidden_size] for index in shown],
        "total": num_units,
        "characters": len(ids_M),
        "fields": ["cell state", *GATES],
        "levels": [CELL_LEVELS, GATE_LEVELS],
        "scales": rounded(scale_K, 3),
        "values": values,
        "features": [
            {
                "name": name,
                "measure": found[name].measure,
                "control": rounded(found[name].control, 3),
                "scores": rounded(scores[name][shown], 3),
                "probe": rounded(linear[name][1:], 3),
            }
            for name in found
        ],
    }


def _by_unit(scores: UnitScores) -> np.ndarray:
    scores_H = np.empty_like(scores.scores_H)
    scores_H[scores.units_H] = scores.scores_H
    return scores_H


def _best_explained(
    found: dict[str, UnitScores], scores: dict[str, np.ndarray], num_units: int
) -> np.ndarray:
    """Return all units, first those that exceed the control of a feature by most.

    The excess is relative to the best excess that is possible, since scores of features differ.
    """
    excess_FH = [
        (scores[name] - found[name].control) / max(1 - found[name].control, 1e-9) for name in found
    ]
    best_H = np.max(excess_FH, axis=0) if found else np.zeros(num_units)
    return np.argsort(-best_H, kind="stable")


def pack_states(
    layers: tuple[LayerStates, ...], first: int, units_K: np.ndarray
) -> tuple[str, np.ndarray]:
    """Return the cell state and gates of K units as text, and the scale of each cell state.

    The text is base64 of zlib of bytes with the axes (field, unit, character). A cell state is
    (byte / CELL_LEVELS * 2 - 1) times its scale, a gate is byte / GATE_LEVELS.

    Args:
      layers: the states of each layer.
      first: the first character that is packed.
      units_K: indices of units, counted over all layers.
    """

    def field(name: str) -> np.ndarray:
        return np.concatenate([getattr(states, name)[first:] for states in layers], 1)[:, units_K].T

    cells_KM = field("c_BTH")
    scale_K = np.abs(cells_KM).max(axis=1)
    relative_KM = cells_KM / np.maximum(scale_K, 1e-30)[:, None]
    packed = [np.rint((relative_KM + 1) / 2 * CELL_LEVELS)]
    packed += [np.rint(field(name) * GATE_LEVELS) for name in GATES.values()]
    raw = zlib.compress(np.stack(packed).astype(np.uint8).tobytes(), 9)
    return base64.b64encode(raw).decode(), scale_K


def calibration_of(reading: Reading, fit: dict[str, float]) -> dict[str, Any]:
    """Return the reliability diagram, and `fit`, the softmax temperature that evaluate measures."""
    found = calibration.reliability(reading.predictions)
    is_used_K = found.count_K > 0
    return {
        "confidence": rounded(found.confidence_K[is_used_K]),
        "accuracy": rounded(found.accuracy_K[is_used_K]),
        "count": found.count_K[is_used_K],
        "error": found.error,
        "noise": found.noise,
        "temperature": fit,
    }


def errors_of(reading: Reading) -> dict[str, Any]:
    """Return the loss by kind, position in a word and context, and the worst passages."""
    text, bits_M = reading.run.vocab.decode(reading.ids_M), reading.predictions.bits_M
    worst = calibration.worst_passages(bits_M)
    context = calibration.loss_by_context(reading.model, reading.params, reading.ids_M, bits_M)
    return {
        "kinds": _groups(calibration.loss_by_kind(text, bits_M)),
        "positions": _groups(calibration.loss_by_word_position(text, bits_M)),
        "context": {
            "most": context.most_K,
            "bits": rounded(context.bits_K),
            "whole": rounded(context.whole_bits_K),
        },
        "worst": [
            {
                "start": start,
                "bits": round(float(bits) / worst.width, 2),
                "text": text[start : start + worst.width],
            }
            for start, bits in zip(worst.start_K.tolist(), worst.bits_K, strict=True)
        ],
    }


def _groups(loss: calibration.GroupLoss) -> list[dict[str, Any]]:
    columns = loss.names, loss.count_K.tolist(), rounded(loss.bits_K), rounded(loss.share_K)
    return [
        {"name": name, "count": count, "bits": bits, "share": share}
        for name, count, bits, share in zip(*columns, strict=True)
        if count
    ]
