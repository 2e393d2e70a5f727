from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SUM_ORDER, assert_close, assert_equal

from charlstm import (
    Batch,
    CharLSTM,
    init_state,
    make_eval_step,
    make_train_step,
    make_train_steps,
    zero_carry,
)
from charlstm.data.batches import Streams
from charlstm.steps import evaluate

V, B, T, H = 11, 4, 8, 12
# Shared by the tests, so that most of them need one of few compiled steps.
PLAIN = CharLSTM(V, H)
DROPPED = CharLSTM(V, H, dropout_rate=0.5)
# The rate is part of the state. The first step is that of plain SGD.
SGD = optax.inject_hyperparams(optax.sgd, static_args="momentum")(0.5, momentum=0.9)


def with_rate(state, rate):
    """Return `state` with another learning rate of SGD."""
    hyperparams = {"learning_rate": jnp.float32(rate)}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))


def random_ids(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, size)


@pytest.fixture
def batches() -> Streams:
    return Streams(random_ids(300), batch_size=B, seq_len=T)


def initial_state(model, optimizer=SGD, seed=0):
    return compiled_init(model, optimizer)(jax.random.key(seed))


@lru_cache
def compiled_init(model, optimizer):
    return jax.jit(partial(init_state, model, optimizer, batch_size=B))


@lru_cache
def compiled_step(model, optimizer=SGD):
    return jax.jit(make_train_step(model, optimizer))


def run_steps(state, batches, num_steps, model, optimizer=SGD):
    step = compiled_step(model, optimizer)
    losses = []
    for index in range(num_steps):
        state, metrics = step(state, batches(index))
        losses.append(metrics["loss"])
    return state, np.array(losses)


def with_count_of_traces(function):
    """Return `function` and a list with one entry per trace; jax.jit compiles once per trace."""
    traces = []

    def traced(*args):
        traces.append(None)
        return function(*args)

    return traced, traces


def unkeyed(state):
    return state._replace(key=jax.random.key_data(state.key))


def test_step_applies_the_optimizer_to_the_mean_gradient(batches):
    state = initial_state(PLAIN)
    batch = batches(batches.steps_per_epoch - 1)  # the padded one
    rows, times = np.nonzero(batch.weights_BT)

    def mean_nats(params):
        logits_BTV, _ = PLAIN.apply({"params": params}, batch.inputs_BT, state.carry)
        log_probs_BTV = jax.nn.log_softmax(logits_BTV)
        return -log_probs_BTV[rows, times, batch.targets_BT[rows, times]].mean()

    found = state.params, jax.jit(jax.value_and_grad(mean_nats))(state.params)
    params, (loss, grads) = jax.tree.map(np.asarray, found)
    desired = jax.tree.map(lambda param, grad: param - 0.5 * grad, params, grads)
    grad_norm = np.sqrt(sum(np.square(grad).sum() for grad in jax.tree.leaves(grads)))
    new_state, metrics = compiled_step(PLAIN)(state, batch)
    assert 0 < metrics["count"] < B * T
    assert_close(metrics["loss"], loss)
    assert_close(metrics["grad_norm"], grad_norm)
    assert_close(new_state.params, desired)
    assert new_state.step == 1


def test_a_position_of_weight_zero_has_no_influence(batches):
    state = initial_state(DROPPED)
    batch = batches(batches.steps_per_epoch - 1)
    other = (batch.targets_BT + 1) % V
    changed = batch._replace(
        targets_BT=np.where(batch.weights_BT > 0, batch.targets_BT, other).astype(np.int32)
    )
    assert (changed.targets_BT != batch.targets_BT).any()
    step = compiled_step(DROPPED)
    assert_equal(step(state, batch)[0].params, step(state, changed)[0].params)


@pytest.mark.parametrize("cause", ["loss", "gradient", "parameters"])
def test_what_is_not_finite_never_reaches_the_state(cause, batches):
    state, batch = initial_state(PLAIN), batches(0)
    if cause == "loss":  # NaN
        batch = batch._replace(weights_BT=batch.weights_BT * np.float32(np.nan))
    if cause == "gradient":  # That of a recurrent kernel is h times that of the gates' sums.
        (c_BH, h_BH), *_ = state.carry
        lstm = {
            name: leaves | {"kernel": leaves["kernel"] * (name[0] == "i")}
            for name, leaves in state.params["lstm_0"].items()
        }
        dense = jax.tree.map(lambda leaf: leaf * 1e15, state.params["dense"])
        params = {"lstm_0": lstm, "dense": dense}
        state = state._replace(params=params, carry=((c_BH, h_BH + 1e30),))
        batch = batch._replace(reset_B=np.zeros(B, bool))
    if cause == "parameters":  # infinite after a finite gradient
        state = with_rate(state, 1e38)
        momentum = jax.tree.map(lambda leaf: leaf + 10, state.opt_state.inner_state)
        state = state._replace(opt_state=state.opt_state._replace(inner_state=momentum))
    new_state, metrics = compiled_step(PLAIN)(state, batch)
    assert metrics["skipped"]
    assert np.isfinite(metrics["loss"]) == (cause != "loss")
    assert np.isfinite(metrics["grad_norm"]) == (cause == "parameters")
    assert new_state.step == state.step + 1
    unchanged = unkeyed(state)._replace(step=new_state.step)
    jax.tree.map(np.testing.assert_array_equal, unkeyed(new_state), unchanged)
    # And it goes on as if that batch had not been.
    if cause == "loss":
        _, metrics = compiled_step(PLAIN)(new_state, batches(1))
        assert not metrics["skipped"]


def test_carry_passes_between_batches_and_resets_rows(batches):
    state, _ = run_steps(with_rate(initial_state(PLAIN), 0), batches, 2, PLAIN)
    both_BT = np.concatenate([batches(0).inputs_BT, batches(1).inputs_BT], axis=1)
    apply = jax.jit(PLAIN.apply)
    _, whole = apply({"params": state.params}, both_BT, zero_carry(PLAIN, B))
    assert_close(state.carry, whole)

    reset_B = np.array([False, True, False, True])
    batch = batches(2)._replace(reset_B=reset_B)
    after = compiled_step(PLAIN)(state, batch)[0].carry
    _, kept = apply({"params": state.params}, batch.inputs_BT, whole)
    _, fresh = apply({"params": state.params}, batch.inputs_BT, zero_carry(PLAIN, B))
    for after_BH, kept_BH, fresh_BH in zip(
        *map(jax.tree.leaves, (after, kept, fresh)), strict=True
    ):
        assert_close(after_BH, np.where(reset_B[:, None], fresh_BH, kept_BH))
        assert np.abs(kept_BH - fresh_BH).max() > 1e-3


def test_dropout_depends_on_key_and_step_alone(batches):
    state, step = initial_state(DROPPED), compiled_step(DROPPED)
    loss = step(state, batches(0))[1]["loss"]
    assert step(state, batches(0))[1]["loss"] == loss
    assert step(state._replace(step=state.step + 1), batches(0))[1]["loss"] != loss
    assert step(state._replace(key=jax.random.key(9)), batches(0))[1]["loss"] != loss


def test_one_compilation_serves_all_steps_from_own_parameters(batches):
    optimizer = optax.adam(1e-3)
    own = initial_state(DROPPED).params
    state = init_state(DROPPED, optimizer, jax.random.key(1), B, params=own)
    assert_equal(state.params, own)
    traced, traces = with_count_of_traces(make_train_step(DROPPED, optimizer))
    step = jax.jit(traced, donate_argnums=0)
    for index in range(batches.steps_per_epoch + 1):
        state, _ = step(state, batches(index))
    assert len(traces) == 1
    # They are a copy: the step that takes the state leaves the user's own alone.
    assert np.isfinite(optax.tree.norm(own))


def test_many_steps_in_one_call_equal_as_many_calls(batches):
    state, step = initial_state(DROPPED, seed=1), compiled_step(DROPPED)
    traced, traces = with_count_of_traces(make_train_steps(make_train_step(DROPPED, SGD)))
    steps = jax.jit(traced)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(batches, range(5)))
    for count in (5, 3, 1):
        looped, losses = state, []
        for index in range(count):
            looped, metrics = step(looped, batches(index))
            losses.append(float(metrics["loss"]))
        together, metrics = steps(state, stacked, count)
        assert_close(unkeyed(together), unkeyed(looped))
        assert_close(metrics["loss"], np.array(losses + [0] * (5 - count)))
    assert len(traces) == 1


def test_four_seeds_at_once_equal_each_alone(batches):
    keys = jax.random.split(jax.random.key(2), 4)
    init = compiled_init(DROPPED, SGD)
    states = jax.jit(jax.vmap(init))(keys)
    step = jax.jit(jax.vmap(make_train_step(DROPPED, SGD), in_axes=(0, None)))
    together = []
    for index in range(3):
        states, metrics = step(states, batches(index))
        together.append(metrics["loss"])
    for seed in range(4):
        _, alone = run_steps(init(keys[seed]), batches, 3, DROPPED)
        assert_close(np.array(together)[:, seed], alone)
    assert len(set(np.array(together)[-1].tolist())) == 4


def test_vmapped_learning_rates_match_separate_loops(batches):
    state = initial_state(DROPPED)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(batches, range(3)))

    @jax.jit
    @jax.vmap
    def scan(rate):
        optimizer = optax.sgd(rate, momentum=0.9)
        start = state._replace(opt_state=optimizer.init(state.params))
        last, metrics = jax.lax.scan(make_train_step(DROPPED, optimizer), start, stacked)
        return last.params, metrics["loss"]

    rates = np.float32([0.0, 0.1, 0.3])
    params, losses = jax.tree.map(np.asarray, scan(rates))
    for index, rate in enumerate(rates):
        last, alone = run_steps(with_rate(state, rate), batches, 3, DROPPED)
        assert_close(losses[index], alone)
        found = jax.tree.map(lambda leaf, index=index: leaf[index], params)
        assert_close(found, last.params)
    assert losses[2, 2] < losses[0, 2]


def test_micro_batches_equal_the_whole_batch(batches):
    state, _ = run_steps(initial_state(PLAIN), batches, 1, PLAIN)  # for a carry that is not zeros
    weights_BT = np.random.default_rng(3).uniform(size=(B, T)).astype(np.float32)
    weights_BT[1] = 0
    reset_B = np.array([True, False, False, True])
    batch = batches(1)._replace(weights_BT=weights_BT, reset_B=reset_B)
    wanted, wanted_metrics = compiled_step(PLAIN)(state, batch)
    step = jax.jit(make_train_step(PLAIN, SGD, micro_batches=2))
    found, metrics = step(state, batch)
    assert_close(metrics, wanted_metrics, SUM_ORDER)
    assert_close(unkeyed(found), unkeyed(wanted), SUM_ORDER)


def test_each_micro_batch_draws_its_own_dropout_masks(batches):
    model = CharLSTM(V, H, num_layers=2, dropout_rate=0.5)
    state = initial_state(model)
    batch = Batch(*(np.concatenate([leaf[:1], leaf[:1], leaf[:2]]) for leaf in batches(0)))
    step = jax.jit(make_train_step(model, SGD, micro_batches=2))
    (_, _), (_, h_BH) = step(state, batch)[0].carry
    assert np.abs(h_BH[0] - h_BH[1]).max() > 1e-3  # the same row, in two micro-batches


def test_a_users_own_loss_is_minimised(batches):
    state, batch = initial_state(PLAIN), batches(batches.steps_per_epoch - 1)

    def squared(logits_BTV, batch):
        one_hot_BTV = jax.nn.one_hot(batch.targets_BT, V)
        return jnp.sum((jax.nn.softmax(logits_BTV) - one_hot_BTV) ** 2, axis=-1)

    def mean(params):
        logits_BTV, _ = PLAIN.apply({"params": params}, batch.inputs_BT, state.carry)
        return (squared(logits_BTV, batch) * batch.weights_BT).sum() / batch.weights_BT.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean))(state.params)
    step = jax.jit(make_train_step(PLAIN, SGD, loss=squared))
    found, metrics = step(state, batch)
    assert_close(metrics["loss"], loss)
    moved = jax.tree.map(lambda param, grad: param - 0.5 * grad, state.params, grads)
    assert_close(found.params, moved)


def test_weights_that_sum_to_less_than_one_give_a_mean_too(batches):
    state, batch = initial_state(PLAIN), batches(0)
    light = batch._replace(weights_BT=batch.weights_BT * np.float32(1e-3))
    step = compiled_step(PLAIN)
    found, wanted = step(state, light)[1], step(state, batch)[1]
    assert_close(found["loss"], wanted["loss"])
    nothing = batch._replace(weights_BT=np.zeros_like(batch.weights_BT))
    unmoved, metrics = step(state, nothing)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
    assert_equal(unmoved.params, state.params)


def test_own_loss_is_differentiable_through_the_eval_step(batches):
    state, eval_step = initial_state(DROPPED), make_eval_step(DROPPED)

    @jax.jit
    def own_loss(params):
        _, totals = eval_step(params, state.carry, batches(0))
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return totals["nats"] / totals["count"] + 0.01 * penalty

    grads = jax.grad(own_loss)(state.params)
    direction = jax.tree.map(lambda grad: grad / optax.tree.norm(grads), grads)
    step = 1e-2  # float32: small enough for the slope, large enough for the rounding
    plus, minus = (
        own_loss(jax.tree.map(lambda p, d, s=sign: p + s * step * d, state.params, direction))
        for sign in (1, -1)
    )
    slope = (plus - minus) / (2 * step)
    np.testing.assert_allclose(slope, optax.tree.norm(grads), rtol=1e-2)


def test_evaluation_counts_every_character_once_without_dropout():
    model, ids_M = DROPPED, random_ids(203, seed=5)
    params = initial_state(model).params
    logits_1MV, _ = jax.jit(model.apply)({"params": params}, ids_M[None, :-1], zero_carry(model, 1))
    log_probs_MV = np.asarray(jax.nn.log_softmax(logits_1MV[0]))
    nats = -log_probs_MV[np.arange(202), ids_M[1:]].mean()
    accuracy = (log_probs_MV.argmax(axis=1) == ids_M[1:]).mean()
    one_stream = Streams(ids_M, batch_size=1, seq_len=T)
    batches = one_stream.epoch()
    result = evaluate(jax.jit(make_eval_step(model)), params, zero_carry(model, 1), batches)
    assert result["count"] == 202
    assert_close(result["loss"], nats)
    np.testing.assert_allclose(result["accuracy"], accuracy, rtol=1e-6)


def test_streams_with_context_nearly_match_one_stream():
    model, ids_M = DROPPED, random_ids(2003, seed=6)
    params = initial_state(model).params
    params = jax.tree.map(lambda leaf: 4 * leaf, params)  # so that what was read matters
    eval_step = jax.jit(make_eval_step(model))

    def loss(batch_size, context):
        streams = Streams(ids_M, batch_size, T, context)
        batches = streams.epoch()
        return evaluate(eval_step, params, zero_carry(model, batch_size), batches)

    exact, warm, cold = loss(1, 0), loss(8, 4 * T), loss(8, 0)
    assert exact["count"] == warm["count"] == cold["count"] == 2002
    assert abs(warm["loss"] - exact["loss"]) < 0.1 * abs(cold["loss"] - exact["loss"])
