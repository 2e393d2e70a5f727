"""Evaluation during training: metrics of the validation text, and a sample."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.data.batches import Batch
from charlstm.keys import derive_key
from charlstm.model import zero_carry
from charlstm.parallel.sharding import by_rows, local_rows, put_batch, replicated
from charlstm.runs.metrics import bits
from charlstm.steps import EvalStep, evaluate, make_eval_step
from charlstm.streaming import stream
from charlstm.training.setup import Setup

# Characters of a sample between two calls of poll.
SAMPLE_CHUNK = 128


def compile_eval_step(setup: Setup) -> EvalStep:
    """Return the compiled eval_step for `setup.val_batches`."""
    assert setup.val_batches
    rows = by_rows(setup.mesh, setup.val_batches.batch_size)
    return jax.jit(make_eval_step(setup.model), out_shardings=(rows, replicated(setup.mesh)))


def validate(
    setup: Setup,
    eval_step: EvalStep,
    params: Any,
    poll: Callable[[], None],
    max_batches: int | None = None,
) -> dict[str, float]:
    """Return val/loss (nats per character), val/bits_per_char and val/accuracy of `params`.

    Args:
      setup: of a run with validation text.
      eval_step: that of compile_eval_step.
      params: the parameters to evaluate.
      poll: called before each batch; it may raise an exception to end the validation.
      max_batches: how many batches to evaluate at most; all by default.
    """
    batches = setup.val_batches
    assert batches
    sharding = by_rows(setup.mesh, batches.batch_size)
    rows = local_rows(sharding, batches.batch_size)

    def read() -> Iterator[Batch]:
        for index in range(batches.steps_per_epoch)[:max_batches]:
            poll()
            yield put_batch(batches(index, rows), sharding, batches.batch_size)

    shapes = jax.eval_shape(partial(zero_carry, setup.model, batches.batch_size))
    carry = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=sharding), shapes)
    totals = evaluate(eval_step, params, carry, read())
    return {
        "val/loss": totals["loss"],
        "val/bits_per_char": bits(totals["loss"]),
        "val/accuracy": totals["accuracy"],
    }


def write_sample(setup: Setup, params: Any, step: int, poll: Callable[[], None]) -> dict[str, str]:
    """Return a `prompt` from the training text, and the `sample` that continues it.

    Args:
      setup: of the run.
      params: parameters on one device.
      step: determines the prompt and the random key.
      poll: called after each chunk of characters; it may raise an exception to end the sampling.
    """
    config, run = setup.run.config, setup.run
    key = jax.random.fold_in(derive_key(run.key(config.seed), "sample"), step)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    prompt_L = run.vocab.encode(run.prompts[rng.integers(len(run.prompts))])
    lengths = {"seq_len": config.seq_len, "chunk": SAMPLE_CHUNK}
    chunks = []
    for ids_1L in stream(
        setup.model, params, [prompt_L], key, **lengths, **config.sample.to_dict()
    ):
        poll()
        chunks.append(ids_1L[0])
    return {"prompt": run.decode(prompt_L), "sample": run.decode(np.concatenate(chunks))}
