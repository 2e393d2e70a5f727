"""What the sections of a report show, as dicts of numbers and texts."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from charlstm.config import base_config, flatten
from charlstm.evaluation.memorization import match_lengths
from charlstm.keys import derive_key
from charlstm.model import CharLSTM
from charlstm.runs.folder import Run
from charlstm.runs.plots import thinned
from charlstm.streaming import stream

# Limits that keep a page below 3 MB.
CURVE_POINTS = 600  # of one curve
MAX_SAMPLES, SAMPLE_CHARS = 60, 1500
# Generated texts at each temperature, and as many pieces of held-out text.
TEMPERATURES = 0.5, 0.8, 1.0
NUM_TEXTS, TEXT_CHARS = 16, 500

CURVES = {
    "training": "train/bits_per_char",
    "validation": "val/bits_per_char",
    "rate": "learning_rate",
    "norm": "grad_norm",
}
Records = Sequence[dict[str, Any]]


def rounded(values: Any, digits: int = 4) -> list:
    """Return an array as a list of numbers of at most `digits` decimals."""
    return np.round(np.asarray(values, np.float64), digits).tolist()


def describe_run(run: Run, params: Any, records: Records) -> dict[str, Any]:
    """Return the text, the settings, the machine and the length of a run.

    Args:
      run: the run.
      params: its parameters; None without a checkpoint.
      records: of its metrics.jsonl.
    """
    default, model = flatten(base_config()), run.config.model
    changed = {key: value for key, value in flatten(run.config).items() if value != default[key]}
    last = records[-1] if records else {"step": 0, "epoch": 0, "seconds": 0}
    return {
        "name": run.workdir.name,
        "text": run.text._asdict(),
        "model": f"{model.num_layers} x {model.hidden_size} LSTM",
        "parameters": None if params is None else sum(x.size for x in jax.tree.leaves(params)),
        "settings": [[key, repr(value), repr(default[key])] for key, value in changed.items()],
        "versions": run.machine["versions"],
        "devices": run.machine["devices"],
        "step": last["step"],
        "epoch": round(last["epoch"], 2),
        "seconds": round(last["seconds"], 1),
    }


def curves_of(name: str, records: Records) -> dict[str, Any]:
    """Return the curves of a run over steps and seconds; each has at most CURVE_POINTS points."""
    curves: dict[str, Any] = {"name": name}
    for curve, metric in CURVES.items():
        with_metric = [record for record in records if record.get(metric) is not None]
        kept = thinned(with_metric, metric, CURVE_POINTS)
        curves[curve] = {
            "step": [record["step"] for record in kept],
            "seconds": rounded([record["seconds"] for record in kept], 2),
            "value": [float(f"{record[metric]:.5g}") for record in kept],
        }
    return curves


def samples_of(records: Records) -> dict[str, Any] | None:
    """Return the samples of a run, at most MAX_SAMPLES evenly spread ones; None without any."""
    found = [record for record in records if "sample" in record]
    if not found:
        return None
    places = np.linspace(0, len(found) - 1, min(len(found), MAX_SAMPLES)).round().astype(int)
    samples = [
        {
            "step": found[place]["step"],
            "bits": found[place].get("val/bits_per_char"),
            "prompt": found[place].get("prompt", ""),
            "text": found[place]["sample"][:SAMPLE_CHARS],
        }
        for place in places.tolist()
    ]
    is_cut = any(len(found[place]["sample"]) > SAMPLE_CHARS for place in places.tolist())
    return {
        "samples": samples,
        "total": len(found),
        "characters": SAMPLE_CHARS if is_cut else None,
    }


def memorization_of(
    run: Run, model: CharLSTM, params: Any, train_M: np.ndarray, held_out_M: np.ndarray | None
) -> dict[str, Any]:
    """Return the lengths of the longest matches of generated and held-out text with train_M.

    Each length belongs to one position: that of the longest text from there on which also occurs
    in the training text. The pieces of held-out text have the size of the generated texts.

    Args:
      run, model, params: as load_model returns them.
      train_M: the training text.
      held_out_M: the held-out text; None leaves it out.
    """
    names = [f"temperature {temperature}" for temperature in TEMPERATURES]
    generated = generate_texts(run, model, params, TEMPERATURES)
    texts = dict(zip(names, generated, strict=True))
    if held_out_M is not None and len(held_out_M) >= TEXT_CHARS:
        starts = np.linspace(0, len(held_out_M) - TEXT_CHARS, NUM_TEXTS).astype(int)
        texts["held-out text"] = [held_out_M[start : start + TEXT_CHARS] for start in starts]
    flat = [ids_L for pieces in texts.values() for ids_L in pieces]
    lengths = iter(match_lengths(flat, train_M, len(run.vocab)))
    return {
        "texts": [_matches(run, name, pieces, lengths) for name, pieces in texts.items()],
        "characters": NUM_TEXTS * TEXT_CHARS,
        "pieces": NUM_TEXTS,
        "training": len(train_M),
    }


def generate_texts(
    run: Run, model: CharLSTM, params: Any, temperatures: Sequence[float]
) -> list[list[np.ndarray]]:
    """Return NUM_TEXTS texts ids_L per temperature, each after a passage of the training text."""
    settings = run.config.sample.to_dict() | {
        "temperature": np.repeat(temperatures, NUM_TEXTS),
        "length": TEXT_CHARS,
    }
    passages = [run.prompts[index % len(run.prompts)] for index in range(NUM_TEXTS)]
    prompts = list(map(run.vocab.encode, passages)) * len(temperatures)
    key, seq_len = derive_key(run.key(0), "sample"), run.config.seq_len
    chunks = stream(model, params, prompts, key, seq_len=seq_len, **settings)
    ids_BL = np.concatenate(list(chunks), axis=1)
    return [list(part) for part in np.split(ids_BL, len(temperatures))]


def _matches(run: Run, name: str, pieces: list[np.ndarray], lengths: Any) -> dict[str, Any]:
    found = [next(lengths) for _ in pieces]
    index = max(range(len(found)), key=lambda index: found[index].max())
    start, lengths_L = int(found[index].argmax()), np.concatenate(found)
    longest = int(lengths_L.max())
    return {
        "name": name,
        "counts": np.bincount(lengths_L).tolist(),
        "longest": longest,
        "quantiles": np.quantile(lengths_L, (0.5, 0.99)).round(1).tolist(),
        "example": run.vocab.decode(pieces[index][start : start + longest]),
    }
