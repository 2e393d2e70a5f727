"""The training step under shard_map: with `axis_name`, two devices do what one does."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from charlstm import Batch, CharLSTM, init_state, make_sampler, make_train_step, predict, zero_carry
from charlstm.steps import TrainState, cross_entropy

V, B, T, H, D = 7, 4, 6, 5, 2
RATE = 0.5
OPTIMIZER = optax.sgd(RATE)

pytestmark = pytest.mark.skipif(jax.device_count() < D, reason="needs two devices")


def make_model(**fields) -> CharLSTM:
    return CharLSTM(V, H, num_layers=2, **fields)


def initial_state(model):
    make = partial(init_state, model, OPTIMIZER, batch_size=B)
    state = jax.jit(make)(jax.random.key(0))
    rng = np.random.default_rng(0)
    carry = jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), state.carry)
    return state._replace(carry=carry)


def unequal_batch() -> Batch:
    """Return a batch of which one device has many more counted characters than the other."""
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


def assert_close(found, wanted):
    # float32: the order of sums differs.
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, found, wanted)


@pytest.mark.parametrize(
    ("check_vma", "fields"),
    [
        (True, {}),
        (False, {}),
        (True, {"recurrence": "flax"}),
        (True, {"input": "embed", "multiplicative": True, "recurrent_rms_norm": True, "end_id": 2}),
    ],
    ids=["fused", "fused without check_vma", "flax", "all parts of a layer"],
)
def test_two_devices_with_unequal_weights_equal_one(check_vma, fields):
    model, batch = make_model(**fields), unequal_batch()
    state = initial_state(model)
    wanted, wanted_metrics = jax.jit(make_train_step(model, OPTIMIZER))(state, batch)
    step = make_train_step(model, OPTIMIZER, axis_name="data")
    found, metrics = on_two_devices(step, check_vma)(state, batch)
    assert_close(metrics, wanted_metrics)
    assert_close(found[1:4], wanted[1:4])
    # A mean of the devices' own means would be far off.
    assert abs(batch.weights_BT[:2].mean() - batch.weights_BT[2:].mean()) > 0.3


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_each_device_draws_its_own_dropout_masks(micro_batches):
    model, batch = make_model(dropout_rate=0.5, recurrent_dropout=0.3), unequal_batch()
    state = initial_state(model)
    options = {"micro_batches": micro_batches, "axis_name": "data"}
    step = make_train_step(model, OPTIMIZER, **options)
    found, metrics = on_two_devices(step)(state, batch)

    step_key = jax.random.fold_in(state.key, state.step)

    @jax.jit
    def sum_of_nats(params, rows, carry, key):
        carry = jax.tree.map(lambda leaf: leaf * ~rows.reset_B[:, None], carry)
        logits_BTV, _ = predict(model, params, rows.inputs_BT, carry, key)
        return (cross_entropy(logits_BTV, rows) * rows.weights_BT).sum()

    def group(tree, indices):
        return jax.tree.map(lambda leaf: leaf[indices], tree)

    total, grads, size = 0.0, jax.tree.map(np.zeros_like, state.params), B // D
    for device in range(D):
        for part in range(micro_batches):
            key = jax.random.fold_in(step_key, device)
            if micro_batches > 1:
                key = jax.random.fold_in(key, part)
            rows = np.arange(device * size, (device + 1) * size)[part::micro_batches]
            given = state.params, group(batch, rows), group(state.carry, rows), key
            nats, grad = jax.value_and_grad(sum_of_nats)(*given)
            total, grads = total + nats, jax.tree.map(np.add, grads, grad)
    count = batch.weights_BT.sum()
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-6)
    moved = jax.tree.map(lambda leaf, grad: leaf - RATE * grad / count, state.params, grads)
    assert_close(found.params, moved)


def test_masks_differ_from_device_to_device():
    # Both devices read the same rows from the same carry: only their masks can differ.
    model = make_model(dropout_rate=0.5)
    state = initial_state(model)
    state = state._replace(carry=zero_carry(model, B))
    half = unequal_batch()
    twice = Batch(*(np.concatenate([leaf[:2], leaf[:2]]) for leaf in half))
    step = make_train_step(model, OPTIMIZER, axis_name="data")
    carry = on_two_devices(step)(state, twice)[0].carry
    first_layer, second_layer = carry
    assert_close(first_layer[1][:2], first_layer[1][2:])
    assert np.abs(second_layer[1][:2] - second_layer[1][2:]).max() > 1e-3


@pytest.mark.parametrize("recurrence", ["fused", "flax"])
def test_a_users_own_gradient_and_an_empty_carry_pass_the_check_of_varying_axes(recurrence):
    model, ids_BT = make_model(recurrence=recurrence), unequal_batch().inputs_BT
    params = initial_state(model).params

    def loss(params, ids_BT):
        logits_BTV, _ = predict(model, params, ids_BT, zero_carry(model, len(ids_BT)))
        return (logits_BTV**2).sum()

    mesh, specs = Mesh(np.array(jax.devices()[:D]), ("data",)), (P(), P("data"))
    mapped = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=P())
    found, wanted = jax.jit(mapped)(params, ids_BT), jax.jit(jax.grad(loss))(params, ids_BT)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, wanted)


@pytest.mark.parametrize("method", ["carry", "window"])
def test_a_sampler_under_shard_map_continues_each_row_by_its_prompt(method):
    model, prompt_BP = make_model(), unequal_batch().inputs_BT
    params = initial_state(model).params
    sampler = make_sampler(model, 5, method=method, seq_len=3)
    options = {"key": jax.random.key(0), "temperature": 0.0}
    mapped = jax.shard_map(
        lambda params, prompt_BP: sampler(params, prompt_BP, **options),
        mesh=Mesh(np.array(jax.devices()[:D]), ("data",)),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )
    wanted = jax.jit(sampler)(params, prompt_BP, **options)
    np.testing.assert_array_equal(jax.jit(mapped)(params, prompt_BP), wanted)
