"""The passes of an evaluation: the ways in which a model reads a held-out text once."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from charlstm.data.batches import Batch, Streams, Windows, cold_batches, evaluation_batches
from charlstm.data.corpus import forget_pages
from charlstm.evaluation import dynamic
from charlstm.model import CharLSTM, zero_carry
from charlstm.steps import make_score_step, run_batches

COLD_CHARS = 2**13  # characters per batch of cold windows, which fit into the CPU cache


class Pass(NamedTuple):
    """A step, the state that it begins with, and the batches that it reads."""

    step: Callable[[Any, Any, Batch], tuple[Any, Any]]  # as make_score_step returns, compiled
    params: Any
    carry: Any
    read: Callable[[np.ndarray], Iterable[Batch]]  # ids_M -> batches, in the order of the text
    first: int  # the index of the first character that is scored

    def run(self, ids_M: np.ndarray) -> Iterator[tuple[Batch, Any]]:
        """Yield (batch, (nats_BT, correct_BT)) for each batch of a text."""

        def releasing() -> Iterator[Batch]:
            for batch in self.read(ids_M):
                yield batch
                forget_pages(ids_M)

        return run_batches(self.step, self.params, self.carry, releasing())


def stateful_pass(model: CharLSTM, params: Any, config: ConfigDict, ids_M: np.ndarray) -> Pass:
    """Return the pass that reads a text in order: in windows without a carry for order=windows.

    Raises:
      UserError: if the text is too short to predict anything in it.
    """
    read = partial(evaluation_batches, config=config, batch_size=1)
    batches = read(ids_M)
    first = batches.seq_len if isinstance(batches, Windows) else 1
    carry = zero_carry(model, batches.batch_size)
    step = jax.jit(make_score_step(model))
    return Pass(step, params, carry, lambda ids_M: read(ids_M).epoch(), first)


def cold_pass(model: CharLSTM, params: Any, window: int, num_chars: int) -> Pass:
    """Return the pass that reads adjacent windows of T = `window` characters from a zero carry."""
    batch_size = min(max(1, COLD_CHARS // window), -(-(num_chars - 1) // window))
    read = partial(cold_batches, seq_len=window, batch_size=batch_size)
    return Pass(jax.jit(make_score_step(model)), params, zero_carry(model, batch_size), read, 1)


def dynamic_pass(model: CharLSTM, anchor: dynamic.Anchor, rate: float) -> Pass:
    """Return the pass that learns from each window after it has predicted it.

    Its `params` are the anchor, and its carry is a DynamicState.
    """
    state = dynamic.DynamicState(anchor.params, zero_carry(model, 1))
    step = jax.jit(dynamic.make_dynamic_step(model, rate))
    return Pass(step, anchor, state, lambda ids_M: Streams(ids_M, 1, dynamic.WINDOW).epoch(), 1)
