"""The training step under shard_map: with `axis_name`, two devices compute what one does."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from helpers import SUM_ORDER, assert_close
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from charlstm import Batch, CharLSTM, init_state, make_sampler, make_train_step, predict, zero_carry
from charlstm.steps import TrainState, cross_entropy

V, B, T, H, D = 7, 4, 6, 5, 2
RATE = 0.5
OPTIMIZER = optax.sgd(RATE)
ALL_PARTS = {"num_layers": 2, "input": "embed", "end_id": 2} | {
    "multiplicative": True,
    "recurrent_rms_norm": True,
}

pytestmark = pytest.mark.skipif(jax.device_count() < D, reason="needs two devices")


def make_model(**fields) -> CharLSTM:
    return CharLSTM(V, H, **fields)


def initial_state(model):
    """Return a state of random parameters and carry, for which nothing is compiled."""
    make = partial(init_state, model, OPTIMIZER, batch_size=B)
    shapes, rng = jax.eval_shape(make, jax.random.key(0)), np.random.default_rng(0)
    params, carry = jax.tree.map(
        lambda leaf: np.float32(rng.normal(0, 0.5, leaf.shape)), (shapes.params, shapes.carry)
    )
    return TrainState(np.int32(0), params, shapes.opt_state, carry, jax.random.key(0))


def unequal_batch() -> Batch:
    """Return a batch with many more counted characters on one device than on the other."""
    rng = np.random.default_rng(1)
    ids_BT = rng.integers(V, size=(2, B, T), dtype=np.int32)
    weights_BT = np.ones((B, T), np.float32)
    weights_BT[B // D :, 1:] = 0.25
    weights_BT[B - 1] = 0
    return Batch(*ids_BT, weights_BT, np.array([False, True, True, False]))


def on_two_devices(step, check_vma=True):
    rows = P("data")
    state_spec = TrainState(P(), P(), P(), rows, P())
    mapped = jax.shard_map(
        step,
        mesh=Mesh(np.array(jax.devices()[:D]), ("data",)),
        in_specs=(state_spec, rows),
        out_specs=(state_spec, P()),
        check_vma=check_vma,
    )
    return jax.jit(mapped)


@pytest.mark.parametrize(
    ("check_vma", "fields"),
    [
        pytest.param(True, {}, marks=pytest.mark.slow),
        pytest.param(False, {}, marks=pytest.mark.slow),
        pytest.param(True, {"recurrence": "flax"}, marks=pytest.mark.slow),
        (True, ALL_PARTS),
    ],
    ids=["fused", "fused without check_vma", "flax", "two layers with all parts"],
)
def test_two_devices_with_unequal_weights_match_one(check_vma, fields):
    model, batch = make_model(**fields), unequal_batch()
    state = initial_state(model)
    wanted, wanted_metrics = jax.jit(make_train_step(model, OPTIMIZER))(state, batch)
    step = make_train_step(model, OPTIMIZER, axis_name="data")
    found, metrics = on_two_devices(step, check_vma)(state, batch)
    assert_close(metrics, wanted_metrics, SUM_ORDER)
    assert_close(found[1:4], wanted[1:4], SUM_ORDER)
    # A mean of the devices' own means would be far off.
    assert abs(batch.weights_BT[:2].mean() - batch.weights_BT[2:].mean()) > 0.3


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_each_device_draws_its_own_dropout_masks(micro_batches):
    model = make_model(dropout_rate=0.5, recurrent_dropout=0.3)
    batch, state = unequal_batch(), initial_state(model)
    options = {"micro_batches": micro_batches, "axis_name": "data"}
    step = make_train_step(model, OPTIMIZER, **options)
    found, metrics = on_two_devices(step)(state, batch)

    step_key = jax.random.fold_in(state.key, state.step)

    @jax.jit
    @jax.value_and_grad
    def sum_of_nats(params, rows, carry, key):
        carry = jax.tree.map(lambda leaf: leaf * ~rows.reset_B[:, None], carry)
        logits_BTV, _ = predict(model, params, rows.inputs_BT, carry, key)
        return (cross_entropy(logits_BTV, rows) * rows.weights_BT).sum()

    def group(tree, indices):
        return jax.tree.map(lambda leaf: leaf[indices], tree)

    params, carry = state.params, state.carry
    total, grads, size = 0.0, jax.tree.map(np.zeros_like, params), B // D
    for device in range(D):
        for part in range(micro_batches):
            key = jax.random.fold_in(step_key, device)
            if micro_batches > 1:
                key = jax.random.fold_in(key, part)
            rows = np.arange(device * size, (device + 1) * size)[part::micro_batches]
            nats, grad = sum_of_nats(params, group(batch, rows), group(carry, rows), key)
            total, grads = total + nats, jax.tree.map(np.add, grads, grad)
    count = batch.weights_BT.sum()
    assert_close(metrics["loss"], total / count, SUM_ORDER)
    moved = jax.tree.map(lambda leaf, grad: leaf - RATE * grad / count, params, grads)
    assert_close(found.params, moved, SUM_ORDER)


def test_own_gradient_with_zero_carry_works_under_shard_map():
    model, ids_BT = make_model(), unequal_batch().inputs_BT
    params = initial_state(model).params

    def loss(params, ids_BT):
        logits_BTV, _ = predict(model, params, ids_BT, zero_carry(model, len(ids_BT)))
        return (logits_BTV**2).sum()

    mesh, specs = Mesh(np.array(jax.devices()[:D]), ("data",)), (P(), P("data"))
    mapped = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=P())
    found, wanted = jax.jit(mapped)(params, ids_BT), jax.jit(jax.grad(loss))(params, ids_BT)
    assert_close(found, wanted)


def test_sampler_under_shard_map_continues_each_prompt():
    model, prompt_BP = make_model(), unequal_batch().inputs_BT
    params = initial_state(model).params
    sampler = make_sampler(model, 5)
    options = {"key": jax.random.key(0), "temperature": 0.0}
    mapped = jax.shard_map(
        lambda params, prompt_BP: sampler(params, prompt_BP, **options),
        mesh=Mesh(np.array(jax.devices()[:D]), ("data",)),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )
    wanted = jax.jit(sampler)(params, prompt_BP, **options)
    np.testing.assert_array_equal(jax.jit(mapped)(params, prompt_BP), wanted)
