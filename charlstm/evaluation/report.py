"""What evaluate.py shows beside a model: baselines on the same split, a table, and a verdict."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from charlstm.data.vocab import Vocab
from charlstm.errors import RunError
from charlstm.evaluation import baselines

COLUMNS = {
    "bits_per_char": "bits/char",
    "standard_error": "+-",
    "nats_per_char": "nats/char",
    "bits_per_byte": "bits/byte",
    "accuracy": "accuracy",
}


def measure_baselines(train_M: np.ndarray, ids_M: np.ndarray, vocab: Vocab) -> dict[str, Any]:
    """Return the bits per character of each baseline, and on how many characters they rest."""
    train_M = train_M[-baselines.MAX_TRAINING_CHARS :]
    ids_M = ids_M[: baselines.MAX_HELD_OUT_CHARS]
    size = len(vocab)
    bits = {
        "uniform": baselines.uniform_bits(size),
        "unigram": baselines.unigram_bits(train_M, ids_M, size),
    }
    for order in baselines.ORDERS:
        bits[f"{order}-gram"] = baselines.kneser_ney_bits(train_M, ids_M, size, order)
    if len(ids_M) >= baselines.MIN_COMPRESSED_CHARS:
        train, held_out = vocab.decode(train_M), vocab.decode(ids_M)
        for name, compress in baselines.COMPRESSORS.items():
            bits[name] = baselines.compressed_bits(compress, train, held_out)
    return {
        "training_characters": len(train_M),
        "held_out_characters": len(ids_M),
        "bits_per_char": bits,
    }


def refuse_not_finite(figures: dict[str, Any], text: str) -> None:
    """Raise RunError if a figure, at any depth, is not finite."""
    for name, value in figures.items():
        if isinstance(value, dict):
            refuse_not_finite(value, text)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RunError(
                f"{text}: {name} is {value}, so the weights are of no use; try another --checkpoint"
            )


def verdict(bits: float, baseline_bits: dict[str, float]) -> str:
    """Return a sentence that compares a model with the baselines."""
    worse = [name for name, value in baseline_bits.items() if value > bits]
    others = [name for name in baseline_bits if name not in worse]
    if not worse:
        return "The model is better than none of the baselines."
    if others:
        return f"The model is better than {listed(worse)}, and not better than {listed(others)}."
    best = min(baseline_bits, key=lambda name: baseline_bits[name])
    share = 1 - bits / baseline_bits[best]
    return (
        f"The model is better than all baselines: it needs {share:.1%} fewer bits than the best "
        f"of them, {best}."
    )


def listed(names: list[str]) -> str:
    """Return 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def table(figures: dict[str, Any], train_size: int, held_out_size: int) -> Iterator[str]:
    """Yield the lines that show figures such as evaluate.py --json prints.

    Args:
      figures: what was measured.
      train_size, held_out_size: the characters available to the baselines.
    """
    yield f"text           {figures['text']}"
    yield f"characters     {figures['characters']}"
    yield f"perplexity     {figures['perplexity']:.4f}"
    yield ""
    yield _row("", COLUMNS)
    yield _row("carried", _shown(figures))
    if "dynamic" in figures:
        yield _row("dynamic", _shown(figures["dynamic"]))
    yield _row(f"cold, windows of {figures['cold']['window']}", _shown(figures["cold"]))
    if heat := figures.get("temperature"):
        yield ""
        yield (
            f"A softmax temperature of {heat['fitted']:.3f}, fitted on the first half, gives the "
            f"second {heat['bits_per_char']:.4f} bits/char instead of "
            f"{heat['bits_per_char_at_1']:.4f}."
        )
    if not (found := figures.get("baselines")):
        return
    for name, value in found["bits_per_char"].items():
        yield _row(name, {"bits_per_char": f"{value:.4f}"})
    yield ""
    if found["training_characters"] < train_size or found["held_out_characters"] < held_out_size:
        yield (
            f"The baselines learn from the last {found['training_characters']:,} characters of "
            f"{train_size:,}, and predict the first {found['held_out_characters']:,} of "
            f"{held_out_size:,}."
        )
    if found["held_out_characters"] < baselines.MIN_COMPRESSED_CHARS:
        yield "No compressors: the text is too short."
    yield verdict(figures["bits_per_char"], found["bits_per_char"])


def _shown(figures: dict[str, Any]) -> dict[str, str]:
    return {key: f"{figures[key]:.4f}" for key in COLUMNS if figures[key] is not None}


def _row(name: str, cells: dict[str, str]) -> str:
    shown = "".join(f"{cells.get(key) or '':>11}" for key in COLUMNS)
    return f"{name:24}{shown}".rstrip()
