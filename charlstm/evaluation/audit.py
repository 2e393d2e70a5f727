"""Checks that the loss of an evaluation is the length of a code.

The losses add up to the length of a code for the text only if the probabilities of the next
character sum to 1 and depend on nothing but the characters before it (Rissanen and Langdon 1981,
'Universal modeling and coding'). The functions return what they measure, or a Check of it.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm.data.batches import Batch
from charlstm.errors import RunError
from charlstm.evaluation.passes import Pass
from charlstm.model import Carry, CharLSTM, predict
from charlstm.steps import make_score_step, reset_rows, run_batches

NUM_CHANGES = 3
# Dynamic evaluation is slow, and each of its steps runs the same program.
MAX_DYNAMIC_CHARS = 10_000


class Check(NamedTuple):
    """One property of a pass over a text."""

    name: str
    measured: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the measured value is at most the limit; NaN is not."""
        return self.measured <= self.limit


def make_distribution_step(
    model: CharLSTM,
) -> Callable[[Any, Carry, Batch], tuple[Carry, jax.Array]]:
    """Return distribution_step(params, carry, batch) -> (carry, log_probs_BTV), a pure function.

    The logarithm of the probability of every character at every position.
    """

    def distribution_step(params: Any, carry: Carry, batch: Batch) -> tuple[Carry, jax.Array]:
        carry = reset_rows(carry, batch.reset_B)
        logits_BTV, carry = predict(model, params, batch.inputs_BT, carry)
        return carry, jax.nn.log_softmax(logits_BTV)

    return distribution_step


def scored_only(outputs: Iterable[tuple[Batch, Any]]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield (batch, array of its scored positions in order) for outputs of the shape [B, T, ...].

    An output may also be a tuple with such an array in front.
    """
    for batch, output in outputs:
        array_BT = np.asarray(output[0] if isinstance(output, tuple) else output)
        yield batch, array_BT[np.asarray(batch.weights_BT) > 0]


def count_errors(batches: Iterable[Batch], ids_M: np.ndarray, first: int = 1) -> int:
    """Return how many characters from index `first` on are not scored exactly once, in order.

    A character counts as an error, too, if the input at its position is not the character before
    it.
    """
    errors, place, end = 0, first, len(ids_M)
    for batch in batches:
        is_scored_BT = np.asarray(batch.weights_BT) > 0
        targets_M, inputs_M = (
            np.asarray(leaf)[is_scored_BT] for leaf in (batch.targets_BT, batch.inputs_BT)
        )
        size = min(len(targets_M), end - place)
        is_wrong_M = targets_M[:size] != ids_M[place : place + size]
        is_wrong_M |= inputs_M[:size] != ids_M[place - 1 : place - 1 + size]
        errors += int(is_wrong_M.sum()) + len(targets_M) - size
        place += size
    return errors + end - place


def measure_sums(outputs: Iterable[tuple[Batch, np.ndarray]]) -> tuple[float, float]:
    """Return how far probabilities are from summing to 1, and the loss that they give.

    Args:
      outputs: (batch, log_probs_BTV) of a distribution_step.

    Returns:
      The largest difference of a sum from 1 over all scored positions, and the nats per character
      of the targets, both in float64.
    """
    error, nats, count = 0.0, 0.0, 0
    for batch, log_probs_MV in scored_only(outputs):
        sums_M = np.exp(log_probs_MV.astype(np.float64)).sum(axis=-1)
        targets_M = np.asarray(batch.targets_BT)[np.asarray(batch.weights_BT) > 0]
        nats -= float(log_probs_MV[np.arange(len(targets_M)), targets_M].sum(dtype=np.float64))
        # NumPy's maximum, unlike Python's, keeps NaN.
        error = float(np.maximum(error, np.max(np.abs(sums_M - 1), initial=0)))
        count += len(targets_M)
    return error, nats / max(count, 1)


def change_after(key: jax.Array, ids_M: np.ndarray, first: int, vocab_size: int) -> tuple[int, Any]:
    """Return a random index of at least `first`, and the text with other characters from it on."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    begin = int(rng.integers(first, len(ids_M)))
    shifts_M = rng.integers(1, vocab_size, len(ids_M) - begin)
    changed_M = (ids_M[begin:].astype(np.int64) + shifts_M) % vocab_size
    return begin, np.concatenate([ids_M[:begin], changed_M.astype(ids_M.dtype)])


def measure_change(
    outputs: Iterable[tuple[Batch, Any]], changed: Iterable[tuple[Batch, Any]], count: int
) -> float:
    """Return the largest difference of two runs at their first `count` scored positions."""
    largest, seen = 0.0, 0
    pairs = zip(scored_only(outputs), scored_only(changed), strict=True)
    for (_, these_M), (_, others_M) in pairs:
        differences = np.abs(these_M[: count - seen] - others_M[: count - seen])
        largest = float(np.maximum(largest, np.max(differences, initial=0)))
        seen += len(these_M)
        if seen >= count:
            break
    return largest


def check_pass(
    name: str, scored: Pass, model: CharLSTM, ids_M: np.ndarray, loss: float, key: jax.Array
) -> Iterator[Check]:
    """Yield the checks of a stateful or cold pass, whose evaluation gave `loss` in nats."""
    yield _check_count(name, scored, ids_M)
    step = jax.jit(make_distribution_step(model))
    distributions = scored._replace(step=step)
    error, mean_nats = measure_sums(distributions.run(ids_M))
    yield Check(f"{name}: probabilities sum to 1 at every position; largest error", error, 1e-6)
    claim = f"{name}: the loss is minus the mean of their logarithms; difference in nats"
    yield Check(claim, abs(mean_nats - loss), 1e-5)
    largest = 0.0
    for part in jax.random.split(key, NUM_CHANGES):
        begin, changed_M = change_after(part, ids_M, scored.first, model.vocab_size)
        runs = distributions.run(ids_M), distributions.run(changed_M)
        # The distribution of the first changed character is the last that must not change.
        change = measure_change(*runs, begin - scored.first + 1)
        largest = float(np.maximum(largest, change))
    claim = f"{name}: later characters change no prediction; largest change in nats"
    yield Check(claim, largest, 0.0)


def check_dynamic(
    scored: Pass, model: CharLSTM, ids_M: np.ndarray, key: jax.Array
) -> Iterator[Check]:
    """Yield the checks of dynamic evaluation, on at most the first MAX_DYNAMIC_CHARS characters."""
    yield _check_count("dynamic", scored, ids_M)
    ids_M = ids_M[:MAX_DYNAMIC_CHARS]
    name = f"dynamic, first {len(ids_M):,} characters"
    claim = f"{name}: windows are scored before they are learnt; largest difference in nats"
    # Two compiled programs may round the nats of a character differently.
    yield Check(claim, measure_learning(scored, model, ids_M), 1e-4)
    largest = 0.0
    for part in jax.random.split(key, NUM_CHANGES):
        begin, changed_M = change_after(part, ids_M, scored.first, model.vocab_size)
        change = measure_change(scored.run(ids_M), scored.run(changed_M), begin - scored.first)
        largest = float(np.maximum(largest, change))
    claim = f"{name}: later characters change no loss; largest change in nats"
    yield Check(claim, largest, 0.0)


def measure_learning(scored: Pass, model: CharLSTM, ids_M: np.ndarray) -> float:
    """Return how much the loss of a character differs from that of the state before the step.

    It is the largest difference in nats, over all windows of a dynamic_pass.
    """
    score_step = jax.jit(make_score_step(model))

    def both(anchor: Any, state: Any, batch: Batch) -> Any:
        _, (before_BT, _) = score_step(state.params, state.carry, batch)
        state, (found_BT, _) = scored.step(anchor, state, batch)
        return state, (before_BT, found_BT)

    runs = run_batches(both, scored.params, scored.carry, scored.read(ids_M))
    before, found = itertools.tee(runs)
    return measure_change(
        ((batch, output[0]) for batch, output in before),
        ((batch, output[1]) for batch, output in found),
        len(ids_M),
    )


def _check_count(name: str, scored: Pass, ids_M: np.ndarray) -> Check:
    claim = f"{name}: each of {len(ids_M) - scored.first:,} characters is scored once; errors"
    return Check(claim, count_errors(scored.read(ids_M), ids_M, scored.first), 0)


def check_bytes(text: str, metrics: dict[str, Any]) -> Check:
    """Return the check that the bits per byte are those of the scored `text` in UTF-8."""
    num_bytes = len(text.encode())
    by_char = metrics["bits_per_char"] * metrics["characters"]
    by_byte = metrics["bits_per_byte"] * num_bytes
    claim = f"bits per byte are those of {num_bytes:,} bytes of UTF-8; difference in bits"
    return Check(claim, abs(by_byte - by_char), 1e-3)


def as_json(checks: Iterable[Check]) -> dict[str, Any]:
    """Return the checks for a JSON file, without NaN."""
    rows = [
        {
            "name": check.name,
            "measured": check.measured if math.isfinite(check.measured) else None,
            "limit": check.limit,
            "passed": check.passed,
        }
        for check in checks
    ]
    return {"passed": all(row["passed"] for row in rows), "checks": rows}


def refuse_failed(audit: dict[str, Any]) -> None:
    """Raise RunError with the name of each check of `as_json` that failed, if one did."""
    if failed := [row["name"] for row in audit["checks"] if not row["passed"]]:
        raise RunError(
            f"--audit: {len(failed)} of {len(audit['checks'])} checks failed "
            f"({', '.join(failed)}); the metrics are no code lengths"
        )
