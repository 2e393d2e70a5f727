"""Evaluation during training: validation loss and a sample, which a signal may interrupt."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from charlstm.data.batches import Batch
from charlstm.keys import derive_key
from charlstm.model import zero_carry
from charlstm.parallel import processes
from charlstm.parallel.sharding import by_rows, local_rows, on_one_device, put_batch, replicated
from charlstm.runs.metrics import bits
from charlstm.sampling import stream
from charlstm.steps import evaluate, make_eval_step
from charlstm.training.setup import Setup

Item = TypeVar("Item")
ShouldStop = Callable[[], bool]

# Characters of a sample between two calls of should_stop.
SAMPLE_CHUNK = 128


class StoppedError(Exception):
    """A stop was requested."""


def stop_if(should_stop: ShouldStop) -> None:
    """Raise StoppedError if a stop was requested."""
    if should_stop():
        raise StoppedError


def until(should_stop: ShouldStop, items: Iterable[Item]) -> Iterator[Item]:
    """Yield `items`; raise StoppedError between two of them once a stop is requested."""
    for item in items:
        stop_if(should_stop)
        yield item


def make_evaluation(setup: Setup, should_stop: ShouldStop) -> Callable[[Any, int], dict[str, Any]]:
    """Return evaluate_state(params, step) -> validation metrics and a sample.

    The devices share the evaluation; the first process writes the sample. It raises
    StoppedError once `should_stop` returns true.
    """
    validate = make_validation(setup, should_stop)
    # Only process 0 samples, so it cannot agree with the others on stopping.
    while_writing = (lambda: False) if processes.is_shared() else should_stop

    def evaluate_state(params: Any, step: int) -> dict[str, Any]:
        figures = validate(params) if validate else {}
        if processes.is_first():
            figures |= write_sample(setup, on_one_device(params), step, while_writing)
        return figures

    return evaluate_state


def make_validation(
    setup: Setup, should_stop: ShouldStop
) -> Callable[[Any], dict[str, Any]] | None:
    """Return a function of params that gives validation figures; None where there is no text."""
    if not setup.val_batches:
        return None
    batches, batch_size = setup.val_batches, setup.val_batches.batch_size
    sharding = by_rows(setup.mesh, batch_size)
    rows = local_rows(sharding, batch_size)
    outputs = sharding, replicated(setup.mesh)
    eval_step = jax.jit(make_eval_step(setup.model), out_shardings=outputs)
    empty = jax.jit(partial(zero_carry, setup.model, batch_size), out_shardings=sharding)

    def read(index: int) -> Batch:
        return put_batch(batches(index, rows), sharding, batch_size)

    def validation(params: Any) -> dict[str, Any]:
        indices = until(should_stop, range(batches.steps_per_epoch))
        result = evaluate(eval_step, params, empty(), map(read, indices))
        return {
            "val/loss": result["loss"],
            "val/bits_per_char": bits(result["loss"]),
            "val/accuracy": result["accuracy"],
        }

    return validation


def write_sample(setup: Setup, params: Any, step: int, should_stop: ShouldStop) -> dict[str, str]:
    """Return a prompt from the training text, and the sample that continues it."""
    config, run = setup.run.config, setup.run
    key = jax.random.fold_in(derive_key(run.key(config.seed), "sample"), step)
    place = np.random.default_rng(np.asarray(jax.random.key_data(key))).integers(len(run.prompts))
    prompt_L = run.vocab.encode(run.prompts[place])
    lengths = {"seq_len": config.seq_len, "chunk": SAMPLE_CHUNK}
    pieces = stream(setup.model, params, [prompt_L], key, **lengths, **config.sample.to_dict())
    ids_BL = np.concatenate(list(until(should_stop, pieces)), axis=1)
    return {"prompt": run.decode(prompt_L), "sample": run.decode(ids_BL[0])}
