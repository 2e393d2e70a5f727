"""Define what the backends are timed on, and what they share.

All backends use float32, one-hot inputs, a loss in nats at every time step, gradients clipped to
norm 1 and Adam with learning rate 0.001, and pass the carry from batch to batch. The exception is
"default", which follows the default recipe.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

TEMPERATURE = 0.8
SCORED_BATCHES = 40  # of windows, each of which predicts one character per row

# Does the work of a case once, waits for the result and returns a value that shows whether all
# backends do the same work: the loss, or the number of generated characters.
Call = Callable[[], float]


class Case(NamedTuple):
    """One task and its sizes."""

    task: str  # train, generate or evaluate
    batch_size: int
    seq_len: int  # for generate: characters generated per text
    hidden_size: int
    vocab_size: int = 70
    num_layers: int = 1
    num_windows: int = 1  # for evaluate: windows of T characters, read one after another

    @property
    def characters(self) -> int:
        """Characters that one call processes."""
        return self.batch_size * self.seq_len * self.num_windows

    def __str__(self) -> str:
        return "{} B={} T={} H={} V={} N={}".format(*self)


def random_ids(case: Case) -> np.ndarray:
    """Return ids_BM of all windows and one more character, the same for every backend."""
    shape = case.batch_size, case.seq_len * case.num_windows + 1
    return np.random.default_rng(0).integers(case.vocab_size, size=shape, dtype=np.int32)


def windows_of(ids_BM: Any, case: Case) -> list[Any]:
    """Return the windows of T + 1 ids, each with the target of its last time step."""
    starts = range(0, case.seq_len * case.num_windows, case.seq_len)
    return [ids_BM[:, start : start + case.seq_len + 1] for start in starts]


def scored_steps(num_windows: int, batch_size: int) -> range:
    """Return evenly spaced batches of windows, because scoring all of them takes too long."""
    num_batches = -(-num_windows // batch_size)
    return range(0, num_batches, max(1, num_batches // SCORED_BATCHES))


def timed(call: Call, repeats: int = 1) -> float:
    """Return the mean seconds of a call."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


@dataclass
class Checkpoints:
    """Copies of the weights during a training: the first, the last, and others in between."""

    begin: float  # time.time() at the start
    max_seconds: float = math.inf
    spacing: float = math.inf  # least ratio of the elapsed seconds of two copies
    copies: list[tuple[int, float, Any]] = field(default_factory=list)  # step, seconds, weights

    def add(self, step: int, copy: Callable[[], Any], is_last: bool) -> bool:
        """Keep a copy of the weights if one is due; return whether the time is over."""
        seconds = time.time() - self.begin
        is_over = seconds >= self.max_seconds
        if is_over or is_last or not self.copies or seconds >= self.spacing * self.copies[-1][1]:
            weights = copy()  # waits for the step to end
            self.copies.append((step, time.time() - self.begin, weights))
        return is_over

    def points(self, score: Callable[[Any], float]) -> list[dict[str, float]]:
        """Return step, seconds and bits per character of each copy; `score` returns nats."""
        return [
            {"step": step, "seconds": seconds, "bits_per_char": score(weights) / math.log(2)}
            for step, seconds, weights in self.copies
        ]
