import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest
from etils import epath

from charlstm.config import base_config
from charlstm.data.batches import Batch
from charlstm.errors import UserError
from charlstm.model import CharLSTM, zero_carry
from charlstm.optim import make_optimizer, make_schedule
from charlstm.planning import cost
from charlstm.runs.checkpoints import Checkpoints
from charlstm.runs.machine import check_memory
from charlstm.steps import init_state, make_train_step

MODELS = [
    {"input": given, "num_layers": layers, "tie_embeddings": False}
    for given in ("one_hot", "embed", "scaled")
    for layers in (1, 3)
] + [{"input": "embed", "tie_embeddings": True}]
KINDS = [
    {"multiplicative": False, "recurrent_rms_norm": False, "variational_dropout": False},
    {"multiplicative": True, "recurrent_rms_norm": True, "variational_dropout": True},
]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=["plain", "all"])


def config_with(**model):
    config = base_config()
    config.model.update(model)
    return config


def model_of(config, vocab_size):
    fields = {field.name for field in dataclasses.fields(CharLSTM)}
    known = {name: value for name, value in config.model.items() if name in fields}
    return CharLSTM(vocab_size=vocab_size, **known)


def optimizer_of(config):
    return make_optimizer(config, make_schedule(config, 100))


def maker_of_state(config, vocab_size):
    model, optimizer = model_of(config, vocab_size), optimizer_of(config)
    return partial(init_state, model, optimizer, batch_size=config.batch_size)


def state_of(config, vocab_size):
    return jax.eval_shape(maker_of_state(config, vocab_size), jax.random.key(0))


def batch_shapes(batch_size, seq_len):
    ids, weights = (
        jax.ShapeDtypeStruct((batch_size, seq_len), dtype) for dtype in ("int32", "float32")
    )
    return Batch(ids, ids, weights, jax.ShapeDtypeStruct((batch_size,), "bool"))


def compiled_step(config, vocab_size, optimizer):
    model = model_of(config, vocab_size)
    # XLA counts operations and assigns memory before it optimizes code: conftest.py has no
    # influence on either.
    step = jax.jit(make_train_step(model, optimizer), donate_argnums=0)
    make_state = partial(init_state, model, optimizer, batch_size=config.batch_size)
    state = jax.eval_shape(make_state, jax.random.key(0))
    return step.lower(state, batch_shapes(config.batch_size, config.seq_len)).compile()


# --- counts ---


@by_kind
@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model.values())))
def test_parameters_are_as_many_as_the_model_has(model, kind):
    config = config_with(hidden_size=24, embed_size=7, **model, **kind)
    leaves = jax.tree.leaves(state_of(config, 11).params)
    assert cost.count_params(config, 11) == sum(leaf.size for leaf in leaves)


def test_the_default_model_has_the_parameters_that_readme_tells():
    assert cost.count_params(base_config(), 96) == 814_176


@by_kind
@pytest.mark.parametrize("model", [{"input": "one_hot"}, {"input": "embed", "num_layers": 2}])
def test_operations_of_the_forward_pass_are_those_that_xla_counts(model, kind):
    # With one time step, since XLA counts the body of a loop once. It counts what is not a product
    # as well: some 30 operations for each hidden unit, and the softmax.
    config = config_with(hidden_size=256, **model, **kind)
    net = model_of(config, 96)
    state = state_of(config, 96)
    ids = jax.ShapeDtypeStruct((32, 1), "int32")
    carry = jax.eval_shape(lambda: zero_carry(net, 32))
    forward = jax.jit(lambda params, ids, carry: net.apply({"params": params}, ids, carry))
    counted = forward.lower(state.params, ids, carry).compile().cost_analysis()["flops"]
    assert 1.0 <= counted / (32 * cost.flops_per_char(config, 96)) < 1.05


@by_kind
def test_training_takes_three_times_the_operations_of_the_forward_pass(kind):
    config = config_with(hidden_size=256, dropout_rate=0.0, num_layers=2, **kind)
    config.batch_size, config.seq_len = 256, 1
    counted = compiled_step(config, 96, optax.sgd(0.1)).cost_analysis()["flops"]
    expected = 3 * cost.flops_per_char(config, 96)
    if not config.model.multiplicative:
        # Nobody wants the gradient of the carry before the first time step, here the only one; but
        # that of the scales comes from it.
        expected -= cost.scan_flops(config)
    # The norms of parameters and gradients, and the update.
    expected += 6 * cost.count_params(config, 96) / 256
    assert counted / (256 * expected) == pytest.approx(1, abs=0.05)


# --- bytes ---


PLAIN, ALL = KINDS


@pytest.mark.parametrize(
    ("kind", "sizes", "model"),
    [
        (PLAIN, (64, 100, 96), {}),
        (PLAIN, (64, 100, 96), {"num_layers": 2, "dropout_rate": 0.0}),
        (ALL, (64, 100, 96), {"num_layers": 3}),
        (PLAIN, (64, 100, 5000), {"input": "embed"}),
        # With so many rows the gradient is computed one time step at a time.
        (PLAIN, (1024, 100, 96), {}),
        (ALL, (1024, 100, 96), {}),
    ],
)
def test_memory_is_what_xla_holds_within_an_eighth(kind, sizes, model, monkeypatch):
    config = config_with(hidden_size=256, **model, **kind)
    config.batch_size, config.seq_len, vocab_size = sizes
    # The update needs next to no memory beside the gradient, whatever its rule.
    is_default = not model and config.batch_size == 64
    optimizer = optimizer_of(config) if is_default else optax.sgd(0.1)
    held = compiled_step(config, vocab_size, optimizer).memory_analysis()
    used = held.temp_size_in_bytes
    assert used / cost.activation_bytes(config, vocab_size) == pytest.approx(1, abs=1 / 8)
    # A run that needs an eighth less than there is begins, and one that needs an eighth more not.
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    batch_bytes = config.batch_size * (3 * 4 * config.seq_len + 1)
    total = used + cost.state_bytes(config, vocab_size) + batch_bytes
    if is_default:
        assert held.argument_size_in_bytes == pytest.approx(total - used, rel=1e-3)
    monkeypatch.setattr("charlstm.runs.machine.memory_bytes", lambda: total / (1 - 1 / 8))
    check_memory(config, vocab_size, mesh)
    monkeypatch.setattr("charlstm.runs.machine.memory_bytes", lambda: total / (1 + 1 / 8))
    with pytest.raises(UserError, match=r"config.batch_size=.*training takes about"):
        check_memory(config, vocab_size, mesh)


def test_a_checkpoint_is_as_large_as_it_is_said_to_be(tmp_path):
    config = config_with(hidden_size=256)
    shapes = state_of(config, 96)
    rng = np.random.default_rng(0)
    # Orbax compresses arrays; it would compress zeros to nothing.
    state = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype)),
        shapes._replace(key=()),
    )
    checkpoints = Checkpoints(epath.Path(tmp_path))
    checkpoints.save(state._replace(key=jax.random.key(0)), {}, 1.0)
    checkpoints.close()
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.9 < on_disk / cost.state_bytes(config, 96) < 1.05


def test_a_state_holds_what_it_is_said_to():
    config = config_with(hidden_size=32, num_layers=2)
    state = state_of(config, 11)
    leaves = jax.tree.leaves(state._replace(key=()))
    key_bytes = 8
    assert cost.state_bytes(config, 11) == sum(leaf.size * 4 for leaf in leaves) + key_bytes


# --- a pod on paper ---


def wide():
    config = config_with(hidden_size=2048, num_layers=2, dtype="bfloat16")
    config.batch_size, config.seq_len = 4096, 128
    return config


@pytest.mark.parametrize("name", cost.CHIPS)
def test_more_chips_never_take_longer_over_the_same_batch_but_for_the_all_reduce(name):
    steps = [cost.step_time(wide(), 96, cost.CHIPS[name], 2**power) for power in range(11)]
    alone = [step.total - step.all_reduce for step in steps]
    assert alone == sorted(alone, reverse=True)
    assert steps[0].all_reduce == 0
    sums = [step.all_reduce for step in steps]
    assert sums == sorted(sums)


def test_a_step_cannot_be_shorter_than_its_turns():
    chip = cost.CHIPS["v5e"]
    config = config_with(hidden_size=64, dtype="bfloat16")
    step = cost.step_time(config, 96, chip, 16)
    assert step.limit == "latency"
    assert step.latency == pytest.approx(2 * config.seq_len * chip.loop_seconds)


def test_few_rows_wait_for_memory_and_many_for_products():
    # On a v5e, 197e12 / 819e9 = 240 operations a byte.
    chip = cost.CHIPS["v5e"]
    few, many = (cost.step_time(wide(), 96, chip, 4096 // rows) for rows in (64, 1024))
    assert few.memory > 3 * few.products
    assert many.products > 1.5 * many.memory


def test_a_step_on_paper_takes_at_least_its_products():
    config, chip = wide(), cost.CHIPS["v5p"]
    flops = 3 * cost.flops_per_char(config, 96) * config.batch_size * config.seq_len
    assert cost.step_time(config, 96, chip, 1).total >= flops / chip.flops


def test_an_all_reduce_sends_each_byte_twice_around_the_ring():
    chip = cost.CHIPS["v5e"]
    assert cost.all_reduce_seconds(1e9, chip, 1) == 0
    hops = 2 * 256**0.5 * 1e-6
    assert cost.all_reduce_seconds(1e9, chip, 256) == pytest.approx(
        2 * 255 / 256 * 1e9 / 2e11 + hops
    )
    # Four pods: what is left to sum is a 256th part, over a network 65 times as slow.
    beyond = 2 * 3 / 4 * 1e9 / 256 / 3.1e9
    assert cost.all_reduce_seconds(1e9, chip, 1024) == pytest.approx(
        2 * 255 / 256 * 1e9 / 2e11 + hops + beyond
    )


def test_what_a_chip_holds_falls_with_their_number_to_the_state():
    config = wide()
    held = [cost.device_bytes(config, 96, n) for n in (1, 64, 4096)]
    state = cost.state_bytes(config, 96) + cost.gradient_bytes(config, 96)
    assert held == sorted(held, reverse=True)
    assert state < held[-1] < 1.2 * state
