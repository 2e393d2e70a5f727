"""Run the benchmark cases and the tutorial with Keras."""

import itertools
from typing import Any

import keras
import numpy as np
from ml_collections import ConfigDict

from charlstm.bench.cases import TEMPERATURE, Call, Case, Checkpoints, random_ids, scored_steps
from charlstm.data.batches import split
from charlstm.data.corpus import open_corpus


def build(name: str, case: Case) -> Call:
    """Return the work of `case`, which trains or generates."""
    keras.utils.set_random_seed(0)
    seq_len = case.seq_len if case.task == "train" else 1
    ids_BT = keras.Input((seq_len,), batch_size=case.batch_size, dtype="int32")
    layer = keras.ops.one_hot(ids_BT, case.vocab_size)
    for _ in range(case.num_layers):
        layer = keras.layers.LSTM(case.hidden_size, return_sequences=True, stateful=True)(layer)
    model = keras.Model(ids_BT, keras.layers.Dense(case.vocab_size)(layer))
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return {"train": _train, "generate": _generate}[case.task](case, model)


def _train(case: Case, model: keras.Model) -> Call:
    ids_BT = random_ids(case)

    def call() -> float:
        model.reset_metrics()  # otherwise it returns the mean over all calls
        return float(model.train_on_batch(ids_BT[:, :-1], ids_BT[:, 1:]))

    return call


def _generate(case: Case, model: keras.Model) -> Call:
    prompt_B1, rng = random_ids(case)[:, :1], np.random.default_rng(1)

    def call() -> float:
        ids_B1, generated = prompt_B1, []
        for _ in range(case.seq_len):
            logits_BV = model.predict_on_batch(ids_B1)[:, 0] / TEMPERATURE
            ids_B1 = np.argmax(logits_BV + rng.gumbel(size=logits_BV.shape), -1, keepdims=True)
            generated.append(ids_B1)
        return np.concatenate(generated, axis=1).size

    return call


def train(settings: dict[str, Any], checkpoints: Checkpoints) -> list[dict[str, float]]:
    """Train as the tutorial does, and return the points of the checkpoints.

    It differs from the tutorial in what costs no time: NumPy builds the patterns without a loop,
    there is no progress bar, and checkpoints stay in memory.
    """
    config = ConfigDict(settings)
    keras.utils.set_random_seed(config.seed)
    batch_size, seq_len = config.batch_size, config.seq_len
    text = open_corpus(config.data, config.data.path)
    vocab_size = len(text.vocab)
    train_M, held_out_M = split(text.ids_M, config.data)

    def patterns(ids_M: np.ndarray, starts_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        windows_NT = np.lib.stride_tricks.sliding_window_view(ids_M, seq_len)[starts_N]
        inputs_NT1 = windows_NT[..., None] / np.float32(vocab_size)
        return inputs_NT1, keras.utils.to_categorical(ids_M[starts_N + seq_len], vocab_size)

    layers = [
        keras.Input((seq_len, 1)),
        keras.layers.LSTM(config.model.hidden_size),
        keras.layers.Dropout(config.model.dropout_rate),
        keras.layers.Dense(vocab_size, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    model.compile(loss="categorical_crossentropy", optimizer="adam")
    steps = itertools.count(1)
    starts_N = np.arange(len(train_M) - seq_len)
    num_steps = config.num_epochs * -(-len(starts_N) // batch_size)

    def copy() -> list[np.ndarray]:
        return callback.model.get_weights()  # only this property synchronizes the weights on JAX

    def after_batch(batch: int, logs: Any) -> None:
        step = next(steps)
        model.stop_training = checkpoints.add(step, copy, is_last=step == num_steps)

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=after_batch)
    sizes = {"batch_size": batch_size, "verbose": 0}
    inputs_NT1, targets_NV = patterns(train_M, starts_N)
    model.fit(inputs_NT1, targets_NV, epochs=config.num_epochs, callbacks=[callback], **sizes)
    starts_N = np.arange(len(held_out_M) - seq_len)
    scored = scored_steps(len(starts_N), batch_size)
    held_out = patterns(held_out_M, starts_N[np.isin(starts_N // batch_size, scored)])

    def score(weights: list[np.ndarray]) -> float:
        model.set_weights(weights)
        return model.evaluate(*held_out, **sizes)

    return checkpoints.points(score)
