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
from charlstm.lstm.fused import fused_lstm
from charlstm.lstm.reference import init_lstm
from charlstm.model import CharLSTM, zero_carry
from charlstm.optim import make_optimizer, make_schedule
from charlstm.planning import cost
from charlstm.runs.checkpoints import Checkpoints
from charlstm.runs.machine import check_memory
from charlstm.steps import init_state, make_train_step

MODELS = [
    {"input": form, "num_layers": layers, "tie_embeddings": False}
    for form in ("one_hot", "embed", "scaled")
    for layers in (1, 3)
] + [{"input": "embed", "tie_embeddings": True}]
KINDS = [
    {"multiplicative": False, "recurrent_rms_norm": False, "variational_dropout": False},
    {"multiplicative": True, "recurrent_rms_norm": True, "variational_dropout": True},
]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=["plain", "full"])


def config_with(**model):
    config = base_config()
    # XLA cannot count the operations of native.cc.
    config.model.update(recurrence="fused", **model)
    return config


def model_of(config, vocab_size):
    fields = {field.name for field in dataclasses.fields(CharLSTM)}
    known = {name: value for name, value in config.model.items() if name in fields}
    return CharLSTM(vocab_size=vocab_size, **known)


def optimizer_of(config):
    return make_optimizer(config, make_schedule(config, 100))


def state_of(config, vocab_size, optimizer):
    init = partial(
        init_state, model_of(config, vocab_size), optimizer, batch_size=config.batch_size
    )
    return jax.eval_shape(init, jax.random.key(0))


def batch_shapes(batch_size, seq_len):
    ids, weights = (
        jax.ShapeDtypeStruct((batch_size, seq_len), dtype) for dtype in ("int32", "float32")
    )
    return Batch(ids, ids, weights, jax.ShapeDtypeStruct((batch_size,), "bool"))


def compiled_step(config, vocab_size, optimizer):
    # Little optimization changes neither count: XLA counts before it optimizes code.
    step = jax.jit(make_train_step(model_of(config, vocab_size), optimizer), donate_argnums=0)
    state = state_of(config, vocab_size, optimizer)
    return step.lower(state, batch_shapes(config.batch_size, config.seq_len)).compile()


# --- counts ---


@by_kind
@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model.values())))
def test_parameter_count_equals_the_model(model, kind):
    config = config_with(hidden_size=24, embed_size=7, **model, **kind)
    leaves = jax.tree.leaves(state_of(config, 11, optimizer_of(config)).params)
    assert cost.count_params(config, 11) == sum(leaf.size for leaf in leaves)


def test_default_model_has_the_parameters_of_readme():
    assert cost.count_params(base_config(), 96) == 814_176


@by_kind
@pytest.mark.parametrize("model", [{"input": "one_hot"}, {"input": "embed", "num_layers": 2}])
def test_forward_operations_agree_with_xla(model, kind):
    # One time step, because XLA counts the body of a loop once. XLA also counts elementwise
    # operations: about 30 for each hidden unit, and the softmax.
    config = config_with(hidden_size=256, **model, **kind)
    net = model_of(config, 96)
    state = state_of(config, 96, optimizer_of(config))
    ids = jax.ShapeDtypeStruct((32, 1), "int32")
    carry = jax.eval_shape(lambda: zero_carry(net, 32))
    forward = jax.jit(lambda params, ids, carry: net.apply({"params": params}, ids, carry))
    counted = forward.lower(state.params, ids, carry).compile().cost_analysis()["flops"]
    assert 1.0 <= counted / (32 * cost.flops_per_char(config, 96)) < 1.05


@by_kind
def test_training_operations_agree_with_xla(kind):
    config = config_with(hidden_size=256, dropout_rate=0.0, num_layers=2, **kind)
    config.batch_size, config.seq_len = 256, 1
    counted = compiled_step(config, 96, optax.sgd(0.1)).cost_analysis()["flops"]
    expected = 3 * cost.flops_per_char(config, 96)
    if not config.model.multiplicative:
        # No gradient is computed for the carry before the first time step, here the only one,
        # except for the scales.
        expected -= cost.scan_flops(config)
    # The norms of parameters and gradients, and the update.
    expected += 6 * cost.count_params(config, 96) / 256
    assert counted / (256 * expected) == pytest.approx(1, abs=0.05)


# --- bytes ---


PLAIN, FULL = KINDS


@pytest.mark.parametrize(
    ("kind", "sizes", "model"),
    [
        pytest.param(PLAIN, (64, 100, 96), {}, marks=pytest.mark.slow),
        (FULL, (64, 100, 96), {"num_layers": 3}),
        pytest.param(PLAIN, (64, 100, 5000), {"input": "embed"}, marks=pytest.mark.slow),
        # With so many rows the gradient is computed one time step at a time.
        (FULL, (1024, 100, 96), {}),
    ],
)
def test_activation_memory_agrees_with_xla(kind, sizes, model, monkeypatch):
    config = config_with(hidden_size=256, **model, **kind)
    config.batch_size, config.seq_len, vocab_size = sizes
    # The update takes little memory beside the gradient, with any optimizer.
    is_default = not model and config.batch_size == 64
    optimizer = optimizer_of(config) if is_default else optax.sgd(0.1)
    analysis = compiled_step(config, vocab_size, optimizer).memory_analysis()
    used = analysis.temp_size_in_bytes
    assert used / cost.activation_bytes(config, vocab_size) == pytest.approx(1, abs=1 / 8)
    # A run that needs 1/8 less memory than available is accepted, one that needs 1/8 more is not.
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    batch_bytes = config.batch_size * (3 * 4 * config.seq_len + 1)
    total = used + cost.state_bytes(config, vocab_size) + batch_bytes
    if is_default:
        assert analysis.argument_size_in_bytes == pytest.approx(total - used, rel=1e-3)
    monkeypatch.setattr("charlstm.runs.machine.memory_bytes", lambda: total / (1 - 1 / 8))
    check_memory(config, vocab_size, mesh)
    monkeypatch.setattr("charlstm.runs.machine.memory_bytes", lambda: total / (1 + 1 / 8))
    with pytest.raises(UserError, match=r"config\.batch_size=.* GiB"):
        check_memory(config, vocab_size, mesh)


def test_state_bytes_agree_with_a_checkpoint_on_disk(tmp_path):
    config = config_with(hidden_size=256)
    shapes = state_of(config, 96, optimizer_of(config))
    rng = np.random.default_rng(0)
    # Random numbers, because Orbax compresses arrays.
    state = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype)),
        shapes._replace(key=()),
    )
    checkpoints = Checkpoints(epath.Path(tmp_path))
    checkpoints.save(state._replace(key=jax.random.key(0)), {}, 1.0)
    checkpoints.close()
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.9 < on_disk / cost.state_bytes(config, 96) < 1.05


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residual_bytes_equal_the_arrays_of_the_gradient(dtype, norm):
    num_steps, batch_size, hidden_size = 3, 5, 32
    config = config_with(dtype=dtype, hidden_size=hidden_size, recurrent_rms_norm=norm)
    params = init_lstm(jax.random.key(0), 7, hidden_size, recurrent_rms_norm=norm)
    carry = (jax.ShapeDtypeStruct((batch_size, hidden_size), "float32"),) * 2
    ids_TB = jax.ShapeDtypeStruct((num_steps, batch_size), "int32")
    run = partial(fused_lstm, dtype=dtype)
    kept = jax.eval_shape(lambda *given: jax.vjp(run, *given, ids_TB)[1], params, carry)
    sequences = [leaf for leaf in jax.tree.leaves(kept) if leaf.ndim == 3 and leaf.shape[-1] > 1]
    assert {leaf.shape[:2] for leaf in sequences} == {(num_steps, batch_size)}
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in sequences)
    assert num_bytes / (num_steps * batch_size * hidden_size) == cost.residual_bytes(config)


def test_state_bytes_equal_the_arrays_of_a_state():
    config = config_with(hidden_size=32, num_layers=2)
    state = state_of(config, 11, optimizer_of(config))
    leaves = jax.tree.leaves(state._replace(key=()))
    key_bytes = 8
    assert cost.state_bytes(config, 11) == sum(leaf.size * 4 for leaf in leaves) + key_bytes
