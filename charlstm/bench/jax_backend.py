"""Run the benchmark cases and the recipes with this package."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from charlstm import steps
from charlstm.bench import cases
from charlstm.bench.entropy import Source
from charlstm.config import base_config
from charlstm.data import batches
from charlstm.data.corpus import open_corpus
from charlstm.model import CharLSTM, with_recurrence, zero_carry
from charlstm.optim import averaged_params, make_optimizer, make_schedule
from charlstm.planning import cost
from charlstm.sampling import make_sampler

PRODUCT_SIZE = 1024  # columns of the matrices of 'products'
CALL_STEPS = 10  # training steps between two looks at the clock


def build(name: str, case: cases.Case) -> cases.Call:
    """Return the work of `case`.

    'charlstm' is a plain LSTM with the recurrence that default_recurrence names, 'fused' and 'flax'
    are the same with others; 'default' has the model and the optimizer of the default recipe.
    'products' is a single large matrix product with as many operations as those of 'charlstm'.
    """
    config = base_config()
    if name == "products":
        return large_product(config, case)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    settings: dict[str, Any] = {"recurrence": name}
    if name == "charlstm":
        settings = {"recurrence": default_recurrence()}
    elif name == "default":
        optimizer = make_optimizer(config, make_schedule(config, num_steps=10_000))
        settings = with_recurrence(config).model.to_dict()
    settings |= {"hidden_size": case.hidden_size, "num_layers": case.num_layers}
    model = CharLSTM(case.vocab_size, **settings)
    state = steps.init_state(model, optimizer, jax.random.key(0), case.batch_size)
    ids_BM, weights_BT = cases.random_ids(case), jnp.ones((case.batch_size, case.seq_len))
    reset_B = jnp.zeros(case.batch_size, bool)
    windows = [
        batches.Batch(jnp.asarray(ids_BT[:, :-1]), jnp.asarray(ids_BT[:, 1:]), weights_BT, reset_B)
        for ids_BT in cases.windows_of(ids_BM, case)
    ]
    if case.task == "generate":
        sampler = jax.jit(make_sampler(model, case.seq_len))
        sample = partial(
            sampler, state.params, ids_BM[:, :1], state.key, temperature=cases.TEMPERATURE
        )
        return lambda: np.asarray(sample()).size
    if case.task == "evaluate":
        eval_step = jax.jit(steps.make_eval_step(model))
        return lambda: steps.evaluate(eval_step, state.params, state.carry, windows)["loss"]
    train_step = jax.jit(steps.make_train_step(model, optimizer), donate_argnums=0)

    def call() -> float:
        nonlocal state
        state, metrics = train_step(state, windows[0])
        return float(metrics["loss"])

    return call


def default_recurrence() -> str:
    """Return the recurrence of the recipes on this machine, whose configs say 'auto'."""
    return with_recurrence(base_config()).model.recurrence


def large_product(config: ConfigDict, case: cases.Case) -> cases.Call:
    """Return a product of matrices that takes as long as those of a plain LSTM at best."""
    sizes = {"hidden_size": case.hidden_size, "num_layers": case.num_layers}
    config.model.update(sizes | {"multiplicative": False})
    flops = cost.flops_per_char(config, case.vocab_size) * case.characters
    flops *= 3 if case.task == "train" else 1  # forward, and two gradients
    num_rows = -(-flops // (2 * PRODUCT_SIZE**2))
    matrices = jnp.ones((num_rows, PRODUCT_SIZE)), jnp.ones((PRODUCT_SIZE, PRODUCT_SIZE))
    multiply = jax.jit(jnp.matmul)

    def call() -> float:
        multiply(*matrices).block_until_ready()
        return 0.0  # there is no loss

    return call


def train(
    settings: dict[str, Any], checkpoints: cases.Checkpoints, source: Source | None = None
) -> list[dict[str, float]]:
    """Train by a config, given as a dict, and return the points of the checkpoints.

    The text is that of `source`, or else at config.data.path.
    """
    config = with_recurrence(ConfigDict(settings))
    if source is None:
        text = open_corpus(config.data, config.data.path)
        source = Source(text.source, text.ids_M, len(text.vocab))
    train_M, held_out_M = batches.split(source.ids_M, config.data)
    read = batches.training_batches(train_M, config)
    num_steps = config.num_steps or config.num_epochs * read.steps_per_epoch
    model = CharLSTM(source.vocab_size, **config.model.to_dict())
    optimizer = make_optimizer(config, make_schedule(config, num_steps))
    state = steps.init_state(model, optimizer, jax.random.key(config.seed), config.batch_size)
    train_steps = jax.jit(
        steps.make_train_steps(steps.make_train_step(model, optimizer)), donate_argnums=0
    )
    for first in range(0, num_steps, CALL_STEPS):
        count = min(CALL_STEPS, num_steps - first)
        batch = batches.read_steps(read, first, count, CALL_STEPS)
        state, _ = jax.block_until_ready(train_steps(state, batch, count))
        step = first + count
        if checkpoints.add(step, partial(_copy_averaged, state), is_last=step == num_steps):
            break
    held_out = batches.evaluation_batches(held_out_M, config)
    indices = range(held_out.steps_per_epoch)
    if isinstance(held_out, batches.Windows):
        indices = cases.scored_steps(held_out.num_windows, held_out.batch_size)
    eval_step, carry = jax.jit(steps.make_eval_step(model)), zero_carry(model, held_out.batch_size)
    return checkpoints.points(
        lambda params: steps.evaluate(eval_step, params, carry, map(held_out, indices))["loss"]
    )


def _copy_averaged(state: steps.TrainState) -> Any:
    return jax.device_get(averaged_params(state.params, state.opt_state))
