"""What bench.py asks of every contender, and on which characters.

A contender gets a Case and gives a Call, which does the case's work once, waits for the result and
returns a figure that tells whether all do the same work: the loss, or how many characters there
are.

Equal for all: float32, one-hot characters, a loss in nats at every time step, gradients clipped to
a norm of 1, Adam with a rate of 0.001, the carry handed on.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

TEMPERATURE = 0.8
HELD_OUT_WINDOWS = 5000  # of 'quality', where each predicts a single character
SPACING = 1.1  # of 'quality': the least ratio of the seconds of a point and of the one before
PRODUCT_SIZE = 1024  # of the square product whose rate is taken as the machine's


class Case(NamedTuple):
    """What is to be done, and its sizes."""

    task: str  # train, generate or evaluate
    batch_size: int
    seq_len: int  # of 'generate': how many characters each text is continued by
    hidden_size: int
    vocab_size: int
    num_layers: int
    dropout_rate: float = 0.0
    num_characters: int = 0  # of the text that 'evaluate' reads

    @property
    def characters(self) -> int:
        """How many characters one call handles."""
        return self.num_characters or self.batch_size * self.seq_len


Call = Callable[[], float]
Made = tuple[Call, str]  # and what the contender was given, in words


def random_ids(case: Case, *shape: int) -> Any:
    """Return the characters that every contender gets for `case`."""
    import numpy as np

    return np.random.default_rng(0).integers(case.vocab_size, size=shape, dtype=np.int32)


def inputs_and_targets(case: Case) -> tuple[Any, Any]:
    """Return ids_BT of a training batch, and those that follow."""
    ids_BT = random_ids(case, case.batch_size, case.seq_len + 1)
    return ids_BT[:, :-1], ids_BT[:, 1:]


def evaluation_streams(case: Case) -> Any:
    """Return the batches of a held-out text, as a run reads it."""
    from charlstm.data.batches import Streams

    ids_M = random_ids(case, case.num_characters + 1)
    return Streams(ids_M, case.batch_size, case.seq_len, context=case.seq_len)


def sampled_starts(num_windows: int) -> Any:
    """Return where HELD_OUT_WINDOWS of so many windows begin, evenly spread, or all if fewer."""
    import numpy as np

    count = min(HELD_OUT_WINDOWS, num_windows)
    return np.arange(count) * num_windows // count


def describe_sample(num_windows: int) -> str:
    """Return in words which characters the windows that `sampled_starts` chooses predict."""
    count = min(HELD_OUT_WINDOWS, num_windows)
    return f"{count:,} of {num_windows:,} characters, evenly spread, each after its own window"


def most_memory(usage: Any) -> int:
    """Return the bytes of ru_maxrss in a result of getrusage or wait4."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timed(call: Call) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
