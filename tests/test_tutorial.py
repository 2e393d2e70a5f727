"""Promise 2: with the tutorial's config and Keras's own initial weights, all goes as in Keras."""

import importlib.util
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charlstm.data import training_batches
from charlstm.model import model_from_config, predict, zero_carry
from charlstm.optim import make_optimizer
from charlstm.steps import init_state, make_train_step

keras = pytest.importorskip("keras")

ROOT = Path(__file__).resolve().parent.parent
# An epoch of 15 batches, the last of 37 rows: 20 steps meet the small batch and go beyond it.
SMALL_BATCH = 37
NUM_STEPS = 20
TEXT_LENGTH = 14 * 128 + SMALL_BATCH + 100


@pytest.fixture(scope="module")
def config():
    path = ROOT / "configs" / "tutorial.py"
    spec = importlib.util.spec_from_file_location("tutorial", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    # Two libraries never draw the same dropout.
    config.model.dropout_rate = 0.0
    return config


@pytest.fixture(scope="module")
def ids_M():
    """Return the ids of a lower-case text, in the tutorial's way: sorted characters, numbered."""
    chooser = random.Random(0)
    words = "the count came down a dark stair and bade me welcome; “i am dracula,” he said.".split()
    text = " ".join(chooser.choices(words, k=TEXT_LENGTH))[:TEXT_LENGTH]
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    return np.array([number[character] for character in text])


@pytest.fixture(scope="module")
def vocab_size(ids_M):
    return int(ids_M.max()) + 1


def make_keras(vocab_size, hidden_size):
    """Return the tutorial's model without its dropout, compiled as there."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((100, 1)),
            keras.layers.LSTM(hidden_size),
            keras.layers.Dense(vocab_size, activation="softmax"),
        ]
    )
    model.compile(loss="categorical_crossentropy", optimizer="adam")
    return model


def keras_inputs(ids_BT, vocab_size):
    return (ids_BT / float(vocab_size)).astype(np.float32)[..., None]


def params_of(keras_model):
    """Return the weights of a Keras model as our parameters; Keras has the gates as i, f, c, o."""
    kernel_EG, recurrent_HG, bias_G, dense_HV, dense_V = keras_model.get_weights()
    lstm = {}
    blocks = (np.split(array, 4, axis=-1) for array in (kernel_EG, recurrent_HG, bias_G))
    for gate, into, back, bias in zip("ifgo", *blocks, strict=True):
        lstm["i" + gate] = {"kernel": into}
        lstm["h" + gate] = {"kernel": back, "bias": bias}
    tree = {"lstm_0": lstm, "dense": {"kernel": dense_HV, "bias": dense_V}}
    # A copy: train_step may be given its memory to reuse.
    return jax.tree.map(lambda leaf: jnp.array(leaf), tree)


def test_logits_equal_those_of_keras(config, ids_M, vocab_size):
    keras_model = make_keras(vocab_size, config.model.hidden_size)
    # Spread out, for initial biases and logits are all but equal.
    rng = np.random.default_rng(1)
    keras_model.set_weights([w + rng.normal(0, 0.1, w.shape) for w in keras_model.get_weights()])
    model = model_from_config(config, vocab_size)
    inputs_BT = training_batches(ids_M, config)(0).inputs_BT[:8]
    probs_BV = np.asarray(keras_model(keras_inputs(inputs_BT, vocab_size)))
    logits_BTV, _ = predict(model, params_of(keras_model), inputs_BT, zero_carry(model, 8))
    found_BV = jax.nn.log_softmax(logits_BTV[:, -1])
    assert np.ptp(found_BV, axis=0).max() > 0.1
    np.testing.assert_allclose(found_BV, np.log(probs_BV), atol=1e-5)


def test_losses_follow_those_of_keras(config, ids_M, vocab_size):
    keras_model = make_keras(vocab_size, config.model.hidden_size)
    model = model_from_config(config, vocab_size)
    optimizer = make_optimizer(config, NUM_STEPS)
    state = init_state(model, optimizer, jax.random.key(0), config.batch_size)
    params = params_of(keras_model)
    state = state._replace(params=params, opt_state=optimizer.init(params))
    train_step = jax.jit(make_train_step(model, optimizer), donate_argnums=0)
    batches = training_batches(ids_M, config)

    losses, wanted, counts = [], [], []
    for step in range(NUM_STEPS):
        batch = batches(step)
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
        real_B = batch.weights_BT[:, -1] > 0
        counts.append(int(real_B.sum()))
        # Keras gets just the windows that count, each with the one character after it.
        x = keras_inputs(batch.inputs_BT[real_B], vocab_size)
        y = keras.utils.to_categorical(batch.targets_BT[real_B, -1], vocab_size)
        keras_model.reset_metrics()  # else it returns the mean of all batches so far
        wanted.append(float(keras_model.train_on_batch(x, y)))
    assert counts == [128] * 14 + [SMALL_BATCH] + [128] * 5
    print([abs(a - b) / b for a, b in zip(losses, wanted)], losses)
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    # It has learnt something, so the losses agree about more than a constant.
    assert losses[-1] < losses[0] - 0.1
