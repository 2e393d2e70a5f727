"""The pure steps: (state, batch) -> (state, metrics)."""

from __future__ import annotations  # help() then shows names such as TrainStep

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

from charlstm.checks import check_batch, check_count, check_divides, check_params, check_shape
from charlstm.data.batches import Batch
from charlstm.keys import derive_key
from charlstm.lstm.reference import mask_rows
from charlstm.model import Carry, CharLSTM, check_carry, predict, zero_carry
from charlstm.optim import update_with

Metrics = dict[str, jax.Array]
Loss = Callable[[jax.Array, Batch], jax.Array]


class TrainState(NamedTuple):
    """All that a training run depends on, besides its text and config.

    To serialize it with flax.serialization, which takes no keys, put jax.random.key_data(key) in
    place of the key, and jax.random.wrap_key_data to get it back.
    """

    step: jax.Array  # int32, how many steps have been taken
    params: Any
    opt_state: Any
    carry: Carry
    key: jax.Array  # never changes: each step folds its number in


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
TrainSteps = Callable[[TrainState, Batch, jax.Array | int], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Carry, Batch], tuple[Carry, Metrics]]
ScoreStep = Callable[[Any, Carry, Batch], tuple[Carry, tuple[jax.Array, jax.Array]]]

# For Exported.serialize; the states of an optimizer are for its user to register.
export.register_namedtuple_serialization(Batch, serialized_name="charlstm.Batch")
export.register_namedtuple_serialization(TrainState, serialized_name="charlstm.TrainState")


def init_state(
    model: CharLSTM,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch_size: int,
    *,
    params: Any = None,
) -> TrainState:
    """Return the state before the first step, for batches of B = `batch_size` rows.

    Args:
      model: the language model.
      optimizer: any of optax's but lookahead, which needs parameters of its own kind.
      key: a random key, from which those of charlstm.keys are derived.
      batch_size: B.
      params: trained parameters to start from, which are copied; None draws initial ones.

    Raises:
      ValueError: if `params` are not those of `model`.
    """
    check_count("batch_size", batch_size)
    if params is not None:
        wanted = jax.eval_shape(partial(init_state, model, optimizer, batch_size=batch_size), key)
        check_params(params, wanted.params)

    def make(key: jax.Array, params: Any) -> TrainState:
        carry = zero_carry(model, batch_size)
        if params is None:
            ids_B1 = jnp.zeros((batch_size, 1), jnp.int32)
            params = model.init(derive_key(key, "params"), ids_B1, carry)["params"]
        # Copied, since some optimizers keep params themselves, and no array may be donated twice.
        params, opt_state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, params, opt_state, carry, derive_key(key, "dropout"))

    # Compiled as a whole, which takes a fraction of compiling each of its operations.
    return jax.jit(make)(key, params)


def reset_rows(carry: Carry, reset_B: jax.Array) -> Carry:
    """Return `carry` with zeros in the rows where `reset_B` is true."""
    keep_B = jnp.logical_not(reset_B)
    return jax.tree.map(lambda leaf_BH: mask_rows(leaf_BH, keep_B), carry)


def cross_entropy(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Return nats_BT, minus the logarithm of the probability of each target.

    NaN for a target that no character has.
    """
    vocab_size = logits_BTV.shape[-1]
    # optax counts negative ones from the end.
    targets_BT = jnp.where(batch.targets_BT < 0, vocab_size, batch.targets_BT)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)


def make_train_step(
    model: CharLSTM,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = cross_entropy,
    micro_batches: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """Return train_step(state, batch) -> (state, metrics), a pure function.

    The gradient stops at the carry that comes in (truncated back-propagation through time,
    Williams and Peng 1990). The metrics are scalars: `loss`, the weighted mean in nats per
    character; `count`, the sum of the weights; `grad_norm`, before the optimizer clips; `skipped`,
    1 where loss, gradient or new parameters are not finite, and else 0. A skipped step changes
    nothing in the state but its number.

    Args:
      model: the language model.
      optimizer: any of optax's but lookahead. It gets `value` and `grad` if it takes them, as
        polyak_sgd does, and `value_fn`, as lbfgs does, unless one of the last two is used.
      loss: (logits_BTV, batch) -> nats_BT, whose mean with the weights is minimised.
      micro_batches: the number of groups of rows that the step works on one after another, to save
        memory. The result is that of the whole batch, except that each group draws its own dropout
        masks.
      axis_name: the axis of jax.shard_map over which the rows of batch and carry are split. Loss,
        count and gradient are summed over it, and each device draws its own dropout masks. None
        where no shard_map is used, as under jax.jit with shardings.

    The step raises ValueError for a batch whose shapes do not agree with each other, with the carry
    or with `micro_batches`, for ids that are not below V, and if the optimizer needs an argument
    that it does not get. The ids of traced batches are not known: a wrong one makes the loss NaN,
    and the step is skipped.
    """
    check_count("micro_batches", micro_batches)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_batch(batch, model.vocab_size)
        check_carry(state.carry, batch.reset_B.shape[0], model.hidden_size, model.num_layers)
        params, key = state.params, jax.random.fold_in(state.key, state.step)
        count = jnp.sum(batch.weights_BT, dtype=jnp.float32)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
            count = jax.lax.psum(count, axis_name)
            # The gradient of each use of a parameter would be summed over the axis otherwise.
            params = jax.lax.pcast(params, axis_name, to="varying")
        mean_loss = make_mean_loss(model, loss, count)
        given = batch, reset_rows(state.carry, batch.reset_B), key
        (value, carry), grads = accumulate(mean_loss, micro_batches, params, *given)
        extra_args: dict[str, Any] = {}
        if axis_name is not None:
            value, grads = jax.lax.psum((value, grads), axis_name)
        elif micro_batches == 1:
            extra_args["value_fn"] = lambda params: mean_loss(params, *given)[0]
        extra_args |= {"value": value, "grad": grads}
        state, metrics = apply_gradient(optimizer, state, carry, extra_args)
        return state, metrics | {"count": count}

    return train_step


def make_mean_loss(model: CharLSTM, loss: Loss, count: jax.Array) -> Callable[..., Any]:
    """Return mean_loss(params, batch, carry, key) -> (the weighted sum over `count`, carry)."""
    # A batch without a counted character has loss 0 and no gradient.
    divisor = jnp.where(count > 0, count, 1.0)

    def mean_loss(params: Any, batch: Batch, carry: Carry, key: jax.Array) -> Any:
        logits_BTV, carry = predict(model, params, batch.inputs_BT, carry, key)
        nats_BT = loss(logits_BTV, batch)
        check_shape("loss", nats_BT, batch.targets_BT)
        return jnp.sum(nats_BT * batch.weights_BT, dtype=jnp.float32) / divisor, carry

    return mean_loss


def accumulate(
    mean_loss: Callable[..., Any],
    micro_batches: int,
    params: Any,
    batch: Batch,
    carry: Carry,
    key: jax.Array,
) -> tuple[tuple[jax.Array, Carry], Any]:
    """Return ((value, carry), grads) of `mean_loss`, summed over groups of rows."""
    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
    if micro_batches == 1:
        return value_and_grad(params, batch, carry, key)
    check_divides("micro_batches", micro_batches, len(batch.reset_B))

    def split(leaf_B: jax.Array) -> jax.Array:
        # Each group has every n-th row, so that rows on several devices stay where they are.
        rows = jnp.reshape(leaf_B, (-1, micro_batches, *leaf_B.shape[1:]))
        return jnp.swapaxes(rows, 0, 1)

    def join(leaf_NB: jax.Array) -> jax.Array:
        return jnp.reshape(jnp.swapaxes(leaf_NB, 0, 1), (-1, *leaf_NB.shape[2:]))

    def add(sums: Any, part: Any) -> tuple[Any, Carry]:
        index, batch, carry = part
        part_key = jax.random.fold_in(key, index)
        (value, carry), grads = value_and_grad(params, batch, carry, part_key)
        return jax.tree.map(jnp.add, sums, (value, grads)), carry

    parts = jnp.arange(micro_batches), *jax.tree.map(split, (batch, carry))
    # Like arrays that vary over the axis, if there is one.
    zeros = jnp.zeros_like(batch.weights_BT, jnp.float32, ()), jax.tree.map(jnp.zeros_like, params)
    (value, grads), carry_N = jax.lax.scan(add, zeros, parts)
    return (value, jax.tree.map(join, carry_N)), grads


def apply_gradient(
    optimizer: optax.GradientTransformation, state: TrainState, carry: Carry, extra_args: Any
) -> tuple[TrainState, Metrics]:
    """Return the state after the step whose `value` and `grad` are in `extra_args`, and metrics."""
    value, grads = extra_args["value"], extra_args["grad"]
    updates, opt_state = update_with(optimizer, grads, state.opt_state, state.params, extra_args)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(value + grad_norm + optax.tree.norm(params))

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        # An optimizer may compute in float64, where that is enabled; the state keeps its types.
        new = new if new.dtype == old.dtype else new.astype(old.dtype)
        return jnp.where(is_finite, new, old)

    new, old = (params, opt_state, carry), (state.params, state.opt_state, state.carry)
    params, opt_state, carry = jax.tree.map(choose, new, old)
    metrics = {"loss": value, "grad_norm": grad_norm, "skipped": ~is_finite}
    return TrainState(state.step + 1, params, opt_state, carry, state.key), metrics


def make_train_steps(train_step: TrainStep) -> TrainSteps:
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


def make_score_step(model: CharLSTM) -> ScoreStep:
    """Return score_step(params, carry, batch) -> (carry, (nats_BT, correct_BT)), a pure function.

    The nats of each target, and whether it was the most probable one. Nothing is dropped out.
    """

    def score_step(params: Any, carry: Carry, batch: Batch) -> Any:
        carry = reset_rows(carry, batch.reset_B)
        logits_BTV, carry = predict(model, params, batch.inputs_BT, carry)
        nats_BT = cross_entropy(logits_BTV, batch)
        return carry, (nats_BT, jnp.argmax(logits_BTV, axis=-1) == batch.targets_BT)

    return score_step


def make_eval_step(model: CharLSTM) -> EvalStep:
    """Return eval_step(params, carry, batch) -> (carry, totals), a pure function.

    The totals are sums over the batch, so that totals of batches add up: `nats`, `correct` (the
    most probable character was right) and `count`. Nothing is dropped out.
    """

    score_step = make_score_step(model)

    def eval_step(params: Any, carry: Carry, batch: Batch) -> tuple[Carry, Metrics]:
        carry, (nats_BT, correct_BT) = score_step(params, carry, batch)
        totals = {
            "nats": jnp.sum(nats_BT * batch.weights_BT),
            "correct": jnp.sum(jnp.where(correct_BT, batch.weights_BT, 0.0)),
            "count": jnp.sum(batch.weights_BT),
        }
        return carry, totals

    return eval_step


def run_batches(
    step: Callable[[Any, Any, Batch], tuple[Any, Any]],
    params: Any,
    carry: Any,
    batches: Iterable[Batch],
) -> Iterator[tuple[Batch, Any]]:
    """Yield (batch, output) for each batch of step(params, carry, batch) -> (carry, output).

    Each output is yielded after the next step has started, so that the device does not wait for
    the host.
    """
    pending: tuple[Batch, Any] | None = None

    def to_device(leaf: Any) -> Any:
        # Explicit for NumPy arrays, because jax.transfer_guard forbids implicit transfers.
        return jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf

    for batch in batches:
        carry, output = step(params, carry, Batch(*map(to_device, batch)))
        if pending is not None:
            yield pending
        pending = batch, output
    if pending is not None:
        yield pending


def evaluate(
    eval_step: EvalStep,
    params: Any,
    carry: Carry,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Return `loss` (nats per character), `accuracy` and `count` over all `batches`.

    Args:
      eval_step: as make_eval_step returns, best compiled by jax.jit.
      params: the parameters of the model.
      carry: the carry before the first batch, such as zero_carry(model, batch_size).
      batches: Batches of the same size; the carry passes from each to the next.

    Raises:
      ValueError: if the sum of the weights is 0.
    """
    sums = {"nats": 0.0, "correct": 0.0, "count": 0.0}
    for _, totals in run_batches(eval_step, params, carry, batches):
        # In Python's double precision, because float32 cannot count beyond 16 million.
        for name in sums:
            sums[name] += float(totals[name])
    count = sums["count"]
    if not count:
        raise ValueError("batches: the sum of the weights is 0")
    return {"loss": sums["nats"] / count, "accuracy": sums["correct"] / count, "count": count}
