"""The pure steps: (state, batch) -> (state, metrics)."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from charlstm.data import Batch
from charlstm.model import Carry, CharLSTM, predict, zero_carry

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a training run depends on, besides its text and config."""

    step: jax.Array  # int32, how many steps have been taken
    params: Any
    opt_state: Any
    carry: Carry
    key: jax.Array  # never changes: each step folds its number in


def init_state(
    model: CharLSTM,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch_size: int,
) -> TrainState:
    """Return the state before the first step, for batches of B = `batch_size` rows."""
    params_key, state_key = jax.random.split(key)
    carry = zero_carry(model, batch_size)
    params = model.init(params_key, jnp.zeros((batch_size, 1), jnp.int32), carry)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry, state_key)


def reset_rows(carry: Carry, reset_B: jax.Array) -> Carry:
    """Return `carry` with zeros in the rows that begin anew."""
    return jax.tree.map(lambda leaf_BH: jnp.where(reset_B[:, None], 0.0, leaf_BH), carry)


def make_train_step(
    model: CharLSTM, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return train_step(state, batch) -> (state, metrics), a pure function.

    The gradient stops at the carry that comes in (truncated back-propagation through time,
    Williams and Peng 1990). The metrics are scalars: `loss`, the weighted mean in nats per
    character; `count`, the sum of the weights; `grad_norm`, before the optimizer clips; `skipped`,
    1 where loss, gradient or new parameters are not finite, and else 0. A skipped step changes
    nothing in the state but its number.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout_key = jax.random.fold_in(state.key, state.step)
        carry_in = reset_rows(state.carry, batch.reset_B)
        count = jnp.sum(batch.weights_BT)

        def loss_fn(params: Any) -> tuple[jax.Array, Carry]:
            logits_BTV, carry_out = predict(model, params, batch.inputs_BT, carry_in, dropout_key)
            nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_BT)
            # A batch without a counted character has loss 0 and moves nothing by it.
            return jnp.sum(nats_BT * batch.weights_BT) / jnp.maximum(count, 1.0), carry_out

        (loss, carry), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        is_sound = jnp.isfinite(loss + grad_norm + optax.tree.norm(params))
        new, old = (params, opt_state, carry), (state.params, state.opt_state, state.carry)
        params, opt_state, carry = jax.tree.map(partial(jnp.where, is_sound), new, old)
        metrics = {"loss": loss, "count": count, "grad_norm": grad_norm, "skipped": ~is_sound}
        return TrainState(state.step + 1, params, opt_state, carry, state.key), metrics

    return train_step


def make_train_steps(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
) -> Callable[[TrainState, Batch, jax.Array | int], tuple[TrainState, Metrics]]:
    """Return train_steps(state, batches, count) -> (state, metrics), many steps as one function.

    It takes the first `count` of the S batches, which have the axis S in front, and gives the
    metrics of S steps, zeros for those not taken. Since `count` may be traced, one compilation
    serves any number of steps up to S.
    """
    # Traced once: here it is needed for its shapes, and in the loop.
    cached_step = jax.jit(train_step, inline=True)

    def train_steps(
        state: TrainState, batches: Batch, count: jax.Array | int
    ) -> tuple[TrainState, Metrics]:
        def batch_of(index: jax.Array | int) -> Batch:
            return Batch(*(leaf[index] for leaf in batches))

        def body(index: jax.Array, so_far: Any) -> tuple[TrainState, Metrics]:
            state, metrics_S = so_far
            state, metrics = cached_step(state, batch_of(index))
            return state, jax.tree.map(lambda all_S, m: all_S.at[index].set(m), metrics_S, metrics)

        _, shapes = jax.eval_shape(cached_step, state, batch_of(0))
        size = batches.reset_B.shape[0]
        metrics_S = jax.tree.map(lambda m: jnp.zeros((size, *m.shape), m.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, metrics_S))

    return train_steps


def make_score_step(
    model: CharLSTM,
) -> Callable[[Any, Carry, Batch], tuple[Carry, tuple[jax.Array, jax.Array]]]:
    """Return score_step(params, carry, batch) -> (carry, (nats_BT, correct_BT)), a pure function.

    The nats of each target, and whether it was the most probable one. Nothing is dropped out.
    """

    def score_step(params: Any, carry: Carry, batch: Batch) -> Any:
        carry = reset_rows(carry, batch.reset_B)
        logits_BTV, carry = predict(model, params, batch.inputs_BT, carry)
        nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_BT)
        return carry, (nats_BT, jnp.argmax(logits_BTV, axis=-1) == batch.targets_BT)

    return score_step


def make_eval_step(
    model: CharLSTM,
) -> Callable[[Any, Carry, Batch], tuple[Carry, Metrics]]:
    """Return eval_step(params, carry, batch) -> (carry, totals), a pure function.

    The totals are sums over the batch, so that totals of batches add up: `nats`, `correct` (the
    most probable character was right) and `count`. Nothing is dropped out.
    """

    score_step = make_score_step(model)

    def eval_step(params: Any, carry: Carry, batch: Batch) -> tuple[Carry, Metrics]:
        carry, (nats_BT, correct_BT) = score_step(params, carry, batch)
        totals = {
            "nats": jnp.sum(nats_BT * batch.weights_BT),
            "correct": jnp.sum(correct_BT * batch.weights_BT),
            "count": jnp.sum(batch.weights_BT),
        }
        return carry, totals

    return eval_step


def evaluate(
    eval_step: Callable[[Any, Carry, Batch], tuple[Carry, Metrics]],
    params: Any,
    carry: Carry,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Return `loss` (nats per character), `accuracy` and `count` over all `batches`."""
    sums = {"nats": 0.0, "correct": 0.0, "count": 0.0}
    pending: Metrics | None = None

    def add(totals: Metrics | None) -> None:
        # In Python's double precision: float32 would lose characters beyond 16 million.
        for name, value in (totals or {}).items():
            sums[name] += float(value)

    for batch in batches:
        carry, totals = eval_step(params, carry, batch)
        add(pending)  # one batch late, so that the device never waits for the host
        pending = totals
    add(pending)
    count = sums["count"]
    return {"loss": sums["nats"] / count, "accuracy": sums["correct"] / count, "count": count}
