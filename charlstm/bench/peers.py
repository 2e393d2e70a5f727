"""Contenders of bench.py: torch and Keras, each as its users would have it at its best."""

import math
import os
import time
from typing import Any

from charlstm.bench.cases import (
    SPACING,
    TEMPERATURE,
    Call,
    Case,
    Made,
    describe_sample,
    evaluation_streams,
    inputs_and_targets,
    random_ids,
    sampled_starts,
    timed,
)


def make_torch(case: Case) -> Made:
    """Return the work of `case` done by torch as its users would, with its faster threads."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Time first, which is how the kernel has it.
            self.lstm = nn.LSTM(case.vocab_size, case.hidden_size, case.num_layers)
            self.dense = nn.Linear(case.hidden_size, case.vocab_size)

        def forward(self, ids_TB: Any, carry: Any) -> Any:
            one_hot_TBV = nn.functional.one_hot(ids_TB, case.vocab_size).float()
            hidden_TBH, carry = self.lstm(one_hot_TBV, carry)
            return self.dense(hidden_TBH), carry

    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    torch.manual_seed(0)
    make = {"train": _torch_train, "generate": _torch_generate, "evaluate": _torch_evaluate}
    call, given = make[case.task](case, Model())
    return call, f"{given}, on {torch.get_default_device()}"


def use_faster_threads(call: Call) -> str:
    """Let torch have one thread or all, whichever is faster, and return what was chosen."""
    import torch

    # Small steps lose more by waiting for a second thread than they win by it.
    most = os.cpu_count() or 1
    seconds = {}
    for threads in {1, most}:
        torch.set_num_threads(threads)
        call()
        seconds[threads] = min(timed(call) for _ in range(3))
    best = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(best)
    return f", set_num_threads({best}) as the faster of 1 and {most}"


def _torch_train(case: Case, model: Any) -> Made:
    import torch
    from torch import nn

    inputs_TB, targets_TB = (torch.tensor(ids_BT.T).long() for ids_BT in inputs_and_targets(case))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    carry: Any = None

    def call() -> float:
        nonlocal carry
        logits_TBV, carry = model(inputs_TB, carry)
        carry = tuple(leaf.detach() for leaf in carry)
        loss = nn.functional.cross_entropy(logits_TBV.flatten(0, 1), targets_TB.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return call, "fused nn.LSTM (time first) on one-hot vectors, Adam(fused=True)"


def _torch_generate(case: Case, model: Any) -> Made:
    import torch
    from torch import nn

    # A cell costs less to call for one time step than nn.LSTM does.
    sizes = [case.vocab_size] + [case.hidden_size] * (case.num_layers - 1)
    cells = [nn.LSTMCell(size, case.hidden_size) for size in sizes]
    prompt_B = torch.tensor(random_ids(case, case.batch_size, 1)[:, 0]).long()

    @torch.inference_mode()
    def call() -> float:
        ids_B, written = prompt_B, []
        carry: list[Any] = [None] * len(cells)
        for _ in range(case.seq_len):
            layer = nn.functional.one_hot(ids_B, case.vocab_size).float()
            for index, cell in enumerate(cells):
                carry[index] = cell(layer, carry[index])
                layer = carry[index][0]
            probs_BV = torch.softmax(model.dense(layer) / TEMPERATURE, dim=-1)
            ids_B = torch.multinomial(probs_BV, 1)[:, 0]
            written.append(ids_B)
        return torch.stack(written, dim=1).cpu().numpy().size

    return call, "a loop of nn.LSTMCell and multinomial under inference_mode"


def _torch_evaluate(case: Case, model: Any) -> Made:
    import torch
    from torch import nn

    batches = evaluation_streams(case)
    zeros_NBH = torch.zeros(case.num_layers, case.batch_size, case.hidden_size)

    @torch.inference_mode()
    def call() -> float:
        carry, nats, correct, count = (zeros_NBH, zeros_NBH), 0.0, 0.0, 0.0
        for batch in batches.epoch():
            weights_TB, inputs_TB, targets_TB = (
                torch.tensor(array_BT.T)
                for array_BT in (batch.weights_BT, batch.inputs_BT, batch.targets_BT)
            )
            kept_B1 = torch.tensor(~batch.reset_B)[:, None]
            logits_TBV, carry = model(inputs_TB.long(), tuple(leaf * kept_B1 for leaf in carry))
            nats_M = nn.functional.cross_entropy(
                logits_TBV.flatten(0, 1), targets_TB.flatten().long(), reduction="none"
            )
            nats += (nats_M * weights_TB.flatten()).sum().item()
            # Unused, but ours computes it as well.
            correct += ((logits_TBV.argmax(-1) == targets_TB) * weights_TB).sum().item()
            count += weights_TB.sum().item()
        return nats / count

    return call, "fused nn.LSTM (time first) on one-hot vectors under inference_mode"


def make_keras(case: Case) -> Made:
    """Return the work of `case` done by Keras as its users would."""
    import keras

    keras.utils.set_random_seed(0)
    steps = case.seq_len if case.task == "train" else 1
    ids_BT = keras.Input((steps,), batch_size=case.batch_size, dtype="int32")
    layer = keras.ops.one_hot(ids_BT, case.vocab_size)
    for _ in range(case.num_layers):
        layer = keras.layers.LSTM(case.hidden_size, return_sequences=True, stateful=True)(layer)
    model = keras.Model(ids_BT, keras.layers.Dense(case.vocab_size)(layer))
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    given = f"LSTM(stateful=True) on one-hot vectors, backend {keras.backend.backend()}"
    if case.task == "generate":
        return _keras_generate(case, model), f"{given}, predict_on_batch for each character"
    inputs_BT, targets_BT = inputs_and_targets(case)

    def call() -> float:
        model.reset_metrics()  # else it returns the mean over all batches so far
        return float(model.train_on_batch(inputs_BT, targets_BT))

    return call, f"{given}, compiled, train_on_batch"


def _keras_generate(case: Case, model: Any) -> Call:
    import numpy as np

    prompt_B1, rng = random_ids(case, case.batch_size, 1), np.random.default_rng(1)

    def call() -> float:
        ids_B1, written = prompt_B1, []
        for _ in range(case.seq_len):
            logits_BV = model.predict_on_batch(ids_B1)[:, 0] / TEMPERATURE
            ids_B1 = np.argmax(logits_BV + rng.gumbel(size=logits_BV.shape), -1, keepdims=True)
            written.append(ids_B1)
        return np.concatenate(written, axis=1).size

    return call


def learn_tutorial(
    config: dict[str, Any], source: str, start: float, seconds: float
) -> dict[str, Any]:
    """Learn as the tutorial does, in Keras, and return its points on the held-out part.

    Three things differ from its program, and none makes it slower: NumPy makes the patterns in
    place of a loop, no progress is shown, and weights are kept in memory in place of a file.

    Args:
      config: of a run with configs/tutorial.py.
      source: the text that the run has read.
      start: when the command was given, by time.time().
      seconds: from then on to the end.
    """
    import keras
    import numpy as np
    from ml_collections import ConfigDict

    from charlstm.data.batches import split
    from charlstm.data.corpus import open_corpus

    keras.utils.set_random_seed(config["seed"])
    data, batch_size, seq_len = ConfigDict(config["data"]), config["batch_size"], config["seq_len"]
    text = open_corpus(data, data.path, source=source)
    vocab_size = len(text.vocab)
    train_M, held_out_M = split(text.ids_M, data)

    def patterns(ids_M: Any, starts_N: Any) -> tuple[Any, Any]:
        windows_NT = np.lib.stride_tricks.sliding_window_view(ids_M, seq_len)[starts_N]
        inputs_NT1 = windows_NT[..., None] / np.float32(vocab_size)
        return inputs_NT1, keras.utils.to_categorical(ids_M[starts_N + seq_len], vocab_size)

    model = keras.Sequential(
        [
            keras.Input((seq_len, 1)),
            keras.layers.LSTM(config["model"]["hidden_size"]),
            keras.layers.Dropout(config["model"]["dropout_rate"]),
            keras.layers.Dense(vocab_size, activation="softmax"),
        ]
    )
    model.compile(loss="categorical_crossentropy", optimizer="adam")
    kept: list[tuple[int, float, Any]] = []
    keeper = _make_keeper(kept, start, seconds)
    sizes = {"batch_size": batch_size, "verbose": 0}
    inputs_NT1, targets_NV = patterns(train_M, np.arange(len(train_M) - seq_len))
    model.fit(inputs_NT1, targets_NV, epochs=config["num_epochs"], callbacks=[keeper], **sizes)
    starts_N = sampled_starts(len(held_out_M) - seq_len)
    held_out, points = patterns(held_out_M, starts_N), []
    for step, spent, weights in kept:
        model.set_weights(weights)
        bits = float(model.evaluate(*held_out, **sizes)) / math.log(2)
        points.append({"step": step, "seconds": spent, "bits_per_char": bits})
    return {"scored": describe_sample(len(held_out_M) - seq_len), "points": points}


def _make_keeper(kept: list[Any], start: float, seconds: float) -> Any:
    """Return a callback that appends (step, seconds, weights) to `kept`, a growing time apart."""
    import keras

    class Keeper(keras.callbacks.Callback):
        step, due = 0, 0.0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.step += 1
            if time.time() - start >= min(self.due, seconds):
                self.keep()

        def on_train_end(self, logs: Any = None) -> None:
            if kept[-1][0] < self.step:
                self.keep()

        def keep(self) -> None:
            # Both wait for the step to end: not to be done at every step.
            weights = self.model.get_weights()
            now = time.time() - start
            kept.append((self.step, now, weights))
            self.due = SPACING * now
            self.model.stop_training = now >= seconds

    return Keeper()
