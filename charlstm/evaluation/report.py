"""The report of an evaluation: baselines on the same split, a table and a comparison."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.table import Table

from charlstm.data.vocab import Vocab
from charlstm.errors import RunError
from charlstm.evaluation import baselines
from charlstm.system.tables import plain_text

COLUMNS = {
    "bits_per_char": "bits/char",
    "standard_error": "+-",
    "nats_per_char": "nats/char",
    "bits_per_byte": "bits/byte",
    "accuracy": "accuracy",
}


def measure_baselines(train_M: np.ndarray, ids_M: np.ndarray, vocab: Vocab) -> dict[str, Any]:
    """Return the bits per character of each baseline, and the numbers of characters they use."""
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


def check_finite(metrics: dict[str, Any], text: str) -> None:
    """Raise RunError if a metric, at any depth, is not finite."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            check_finite(value, text)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RunError(
                f"{text}: {name} is {value}, thus the weights are useless; try another --checkpoint"
            )


def compare(bits: float, baseline_bits: dict[str, float]) -> str:
    """Return a sentence that compares the model with the baselines."""
    worse = [name for name, value in baseline_bits.items() if value > bits]
    others = [name for name in baseline_bits if name not in worse]
    if not worse:
        return "The model is no better than any baseline."
    if others:
        return f"The model is better than {listed(worse)}, but not than {listed(others)}."
    best = min(baseline_bits, key=lambda name: baseline_bits[name])
    share = 1 - bits / baseline_bits[best]
    return (
        f"The model is better than all baselines: it needs {share:.1%} fewer bits than the best "
        f"of them, {best}."
    )


def listed(names: list[str]) -> str:
    """Return 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def format_report(metrics: dict[str, Any], train_size: int, held_out_size: int) -> Iterator[str]:
    """Yield the table of an evaluation, and sentences on it.

    Args:
      metrics: as evaluate.py --json prints them.
      train_size, held_out_size: the characters available to the baselines.
    """
    yield f"text           {metrics['text']}"
    yield f"characters     {metrics['characters']}"
    yield f"perplexity     {metrics['perplexity']:.4f}"
    yield ""
    table = Table("", box=None, pad_edge=False)
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    rows = {"stateful": metrics, "dynamic": metrics.get("dynamic")}
    rows[f"cold, windows of {metrics['cold']['window']}"] = metrics["cold"]
    found = metrics.get("baselines")
    bits = found["bits_per_char"] if found else {}
    for name, row in (
        rows | {name: {"bits_per_char": value} for name, value in bits.items()}
    ).items():
        if row:
            cells = (row.get(key) for key in COLUMNS)
            table.add_row(name, *("" if cell is None else f"{cell:.4f}" for cell in cells))
    yield plain_text(table)
    yield ""
    if fit := metrics.get("temperature"):
        yield (
            f"A softmax temperature of {fit['fitted']:.3f}, fitted on the first half, gives the "
            f"second {fit['bits_per_char']:.4f} bits/char instead of "
            f"{fit['bits_per_char_at_1']:.4f}."
        )
    if audit := metrics.get("audit"):
        yield from format_audit(audit)
    if not found:
        return
    if found["training_characters"] < train_size or found["held_out_characters"] < held_out_size:
        yield (
            f"The baselines learn from the last {found['training_characters']:,} characters of "
            f"{train_size:,}, and predict the first {found['held_out_characters']:,} of "
            f"{held_out_size:,}."
        )
    if found["held_out_characters"] < baselines.MIN_COMPRESSED_CHARS:
        yield "No compressors: the text is too short."
    yield compare(metrics["bits_per_char"], bits)


def format_audit(audit: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each check of an audit, and lines on what is counted."""
    for check in audit["checks"]:
        measured = "NaN" if check["measured"] is None else f"{check['measured']:.3g}"
        verdict = "pass" if check["passed"] else "FAIL"
        yield f"{verdict}  {check['name']}: {measured} (limit {check['limit']:g})"
    counts = audit["counts"]
    first = counts["characters"] - counts["scored"]
    scored = f"scored: {counts['scored']:,} characters, all but the first {first:,}"
    if "scored_bytes" in counts:
        scored += f"; {counts['scored_bytes']:,} bytes of UTF-8"
    yield scored
    if "file_bytes" in counts:
        yield (
            f"files: {counts['file_bytes']:,} bytes; {counts['file_characters']:,} characters "
            "after cleaning, where a line end or a document separator is one; "
            f"{counts['cut']:,} cut as Project Gutenberg's header and licence, "
            f"{counts['unknown']:,} unknown ones dropped or replaced"
        )
    yield ""
