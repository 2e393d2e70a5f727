"""With the tutorial's config and Keras's initial weights, training and sampling match Keras."""

import importlib.util
import random
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from charlstm.data.batches import training_batches
from charlstm.data.vocab import Vocab
from charlstm.model import model_from_config, predict, zero_carry
from charlstm.optim import make_optimizer, make_schedule
from charlstm.sampling import make_sampler
from charlstm.steps import init_state, make_train_step

keras = pytest.importorskip("keras")
# Keras calls NumPy in a way that newer versions deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("rank_promotion"),
]

ROOT = Path(__file__).resolve().parent.parent
# An epoch has 4 batches, the last of 64 rows; 5 steps reach the second epoch.
SMALL_BATCH = 64
NUM_STEPS = 5
TEXT_LENGTH = 3 * 128 + SMALL_BATCH + 100


@pytest.fixture(scope="module")
def config():
    path = ROOT / "configs" / "tutorial.py"
    spec = importlib.util.spec_from_file_location("tutorial", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    # The libraries draw different dropout masks.
    config.model.dropout_rate = 0.0
    return config


@pytest.fixture(scope="module")
def ids_M():
    """Return the ids of a lower-case text, numbered as in the tutorial: sorted characters."""
    chooser = random.Random(0)
    words = "the count came down a dark stair and bade me welcome; “i am dracula,” he said.".split()
    text = " ".join(chooser.choices(words, k=TEXT_LENGTH))[:TEXT_LENGTH]
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    return np.array([number[character] for character in text], np.int32)


@pytest.fixture(scope="module")
def vocab_size(ids_M):
    return int(ids_M.max()) + 1


@pytest.fixture(scope="module")
def vocab(vocab_size):
    return Vocab([chr(code) for code in range(vocab_size)])


@pytest.fixture(scope="module")
def optimizer(config):
    return make_optimizer(config, make_schedule(config, NUM_STEPS))


@pytest.fixture(scope="module")
def initial_state(config, vocab, optimizer):
    model = model_from_config(config, vocab)
    return init_state(model, optimizer, jax.random.key(0), config.batch_size)


@pytest.fixture
def keras_model(config, vocab_size):
    """Return the tutorial's model without dropout, compiled as in the tutorial."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((100, 1)),
            keras.layers.LSTM(config.model.hidden_size),
            keras.layers.Dense(vocab_size, activation="softmax"),
        ]
    )
    model.compile(loss="categorical_crossentropy", optimizer="adam")
    return model


def keras_inputs(ids_BT, vocab_size):
    return (ids_BT / float(vocab_size)).astype(np.float32)[..., None]


def params_of(keras_model):
    """Return the weights of a Keras model as parameters; Keras orders the gates i, f, c, o."""
    kernel_EG, recurrent_kernel_HG, bias_G, dense_HV, dense_V = keras_model.get_weights()
    blocks = (np.split(array, 4, axis=-1) for array in (kernel_EG, recurrent_kernel_HG, bias_G))
    lstm = {}
    for gate, kernel_EH, kernel_HH, bias_H in zip("ifgo", *blocks, strict=True):
        lstm["i" + gate] = {"kernel": kernel_EH}
        lstm["h" + gate] = {"kernel": kernel_HH, "bias": bias_H}
    tree = {"lstm_0": lstm, "dense": {"kernel": dense_HV, "bias": dense_V}}
    return jax.tree.map(jnp.array, tree)


def test_logits_match_keras(config, ids_M, vocab_size, vocab, keras_model):
    # Initial biases are 0 and initial logits nearly 0, which would hide mistakes.
    rng = np.random.default_rng(1)
    keras_model.set_weights([w + rng.normal(0, 0.1, w.shape) for w in keras_model.get_weights()])
    inputs_BT = training_batches(ids_M, config)(0).inputs_BT[:8]
    probs_BV = keras_model.predict_on_batch(keras_inputs(inputs_BT, vocab_size))
    model = model_from_config(config, vocab)
    params, carry = params_of(keras_model), zero_carry(model, 8)
    logits_BTV, _ = jax.jit(partial(predict, model))(params, inputs_BT, carry)
    found_BV = jax.nn.log_softmax(logits_BTV[:, -1])
    assert np.all(np.ptp(found_BV, axis=0) > 0.01)
    np.testing.assert_allclose(found_BV, np.log(probs_BV), atol=1e-5)


def test_losses_match_keras(
    config, ids_M, vocab_size, vocab, optimizer, initial_state, keras_model
):
    state = initial_state._replace(params=params_of(keras_model))
    train_step = jax.jit(make_train_step(model_from_config(config, vocab), optimizer))
    batches = training_batches(ids_M, config)

    losses, wanted, counts = [], [], []
    for step in range(NUM_STEPS):
        batch = batches(step)
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
        counts.append(int(metrics["count"]))
        # Keras gets only the windows with weight, each with its next character; the small batch
        # twice, which has the same mean, so that it compiles one shape.
        real_B = np.flatnonzero(batch.weights_BT[:, -1] > 0)
        real_B = np.tile(real_B, 128 // len(real_B))
        inputs_BT1 = keras_inputs(batch.inputs_BT[real_B], vocab_size)
        targets_BV = np.eye(vocab_size)[batch.targets_BT[real_B, -1]]
        keras_model.reset_metrics()  # otherwise train_on_batch returns a running mean
        wanted.append(float(keras_model.train_on_batch(inputs_BT1, targets_BV)))
    assert counts == [128] * 3 + [SMALL_BATCH, 128]
    # The losses fall, so that their agreement means something.
    assert wanted[-1] < wanted[0] - 0.1
    # Adam magnifies rounding errors at every step.
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)


def test_keras_adam_matches_keras(optimizer):
    # The sizes of gradients in this model: half of the recurrent kernels' are below 1e-6.
    rng = np.random.default_rng(2)
    scale_N = 10.0 ** rng.uniform(-8, -1, size=200)
    start_N = rng.normal(size=200).astype(np.float32)
    keras_adam, keras_weights = keras.optimizers.get("adam"), keras.Variable(start_N)
    weights_N, opt_state = jnp.asarray(start_N), optimizer.init(jnp.asarray(start_N))
    for _ in range(12):
        grads_N = np.float32(scale_N * rng.normal(size=200))
        updates_N, opt_state = optimizer.update(jnp.asarray(grads_N), opt_state, weights_N)
        weights_N = optax.apply_updates(weights_N, updates_N)
        keras_adam.apply([jnp.asarray(grads_N)], [keras_weights])
    wanted_N = np.asarray(keras_weights)
    assert np.ptp(wanted_N - start_N) > 0.01
    # Each step moves a weight by about 1e-3; float32 keeps 1e-7 of weights of about 1.
    np.testing.assert_allclose(weights_N, wanted_N, atol=1e-5)


def test_greedy_text_matches_keras(config, ids_M, vocab_size, vocab, keras_model):
    # Initial weights repeat one character; larger input weights make the text vary.
    kernel_EG, *others, dense_HV, dense_V = keras_model.get_weights()
    keras_model.set_weights([100 * kernel_EG, *others, 10 * dense_HV, dense_V])
    seed_T = ids_M[: config.seq_len]
    window_T, wanted = seed_T, []
    for _ in range(200):
        # The tutorial's loop.
        (probs_V,) = keras_model.predict_on_batch(keras_inputs(window_T[None], vocab_size))
        wanted.append(int(np.argmax(probs_V)))
        window_T = np.append(window_T[1:], wanted[-1])
        second, first = np.sort(np.log(probs_V))[-2:]
        # Rounding must not decide which character is the most probable.
        assert first - second > 1e-3
    assert len(set(wanted)) >= 3

    model = model_from_config(config, vocab)
    sampler = make_sampler(model, 200, method=config.sample.method, seq_len=config.seq_len)
    found_1L = jax.jit(sampler)(
        params_of(keras_model),
        seed_T[None],
        jax.random.key(0),
        temperature=config.sample.temperature,
    )
    np.testing.assert_array_equal(found_1L[0], wanted)


@pytest.mark.parametrize("whose", ["ours", "keras"])
def test_initial_weights_have_the_distributions_of_keras(
    config, vocab_size, initial_state, keras_model, whose
):
    if whose == "ours":
        params = initial_state.params
    else:
        params = params_of(keras_model)  # the checks below hold for Keras, too
    hidden_size = config.model.hidden_size
    kernel_EG, recurrent_kernel_HG = (
        np.concatenate([params["lstm_0"][side + gate]["kernel"] for gate in "ifgo"], axis=1)
        for side in "ih"
    )
    assert kernel_EG.shape == (1, 4 * hidden_size)
    assert_uniform(kernel_EG, np.sqrt(6 / (1 + 4 * hidden_size)))
    assert_uniform(params["dense"]["kernel"], np.sqrt(6 / (hidden_size + vocab_size)))
    np.testing.assert_array_equal(params["dense"]["bias"], np.zeros(vocab_size))
    for gate in "ifgo":
        wanted_H = np.full(hidden_size, 1.0 if gate == "f" else 0.0)
        np.testing.assert_array_equal(params["lstm_0"]["h" + gate]["bias"], wanted_H)
    products_HH = recurrent_kernel_HG @ recurrent_kernel_HG.T
    np.testing.assert_allclose(products_HH, np.eye(hidden_size), atol=1e-5)


def assert_uniform(kernel, limit):
    kernel = np.asarray(kernel)
    assert 0.98 * limit < np.max(np.abs(kernel)) <= limit
    # Five standard errors: limit / sqrt(3 n) of the mean, a fraction sqrt(0.8 / n) of the variance.
    assert abs(np.mean(kernel)) < 5 * limit / np.sqrt(3 * kernel.size)
    share = 5 * np.sqrt(0.8 / kernel.size)
    np.testing.assert_allclose(np.var(kernel), limit**2 / 3, rtol=share)
