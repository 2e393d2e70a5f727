"""What an evaluation tells, and how it is broken off."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from charlstm.job import Job
from charlstm.log import bits
from charlstm.model import zero_carry
from charlstm.sample import stream
from charlstm.steps import evaluate, make_eval_step

Item = TypeVar("Item")
ShouldStop = Callable[[], bool]

# Characters of a sample between two looks at should_stop.
SAMPLE_CHUNK = 128


class StoppedError(Exception):
    """Somebody has asked to stop."""


def stop_if(should_stop: ShouldStop) -> None:
    """Raise StoppedError if somebody has asked to stop."""
    if should_stop():
        raise StoppedError


def until(should_stop: ShouldStop, items: Iterable[Item]) -> Iterator[Item]:
    """Yield `items`; raise StoppedError between two of them once somebody has asked to stop."""
    for item in items:
        stop_if(should_stop)
        yield item


def make_assessment(job: Job, should_stop: ShouldStop) -> Callable[[Any, int], dict[str, Any]]:
    """Return assess(params, step) -> what an evaluation tells: validation figures and a sample.

    It raises StoppedError amid its work, once `should_stop` is true.
    """
    config, run, model = job.run.config, job.run, job.model
    eval_step = jax.jit(make_eval_step(model))

    def assess(params: Any, step: int) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if job.val_batches:
            carry = zero_carry(model, job.val_batches.batch_size)
            indices = until(should_stop, range(job.val_batches.steps_per_epoch))
            result = evaluate(eval_step, params, carry, map(job.val_batches, indices))
            figures = {
                "val/loss": result["loss"],
                "val/bits_per_char": bits(result["loss"]),
                "val/accuracy": result["accuracy"],
            }
        place = np.random.default_rng((config.seed, step)).integers(len(run.prompts))
        prompts = [run.vocab.encode(run.prompts[place])]
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        lengths = {"seq_len": config.seq_len, "chunk": SAMPLE_CHUNK}
        pieces = stream(model, params, prompts, key, **lengths, **config.sample.to_dict())
        ids_BL = np.concatenate(list(until(should_stop, pieces)), axis=1)
        return figures | {"sample": run.decode(ids_BL[0])}

    return assess
