import logging
import re
from functools import partial

import jax
import numpy as np
import pytest
from conftest import ROOT

from charlstm.evaluation.writing import collect, generate
from charlstm.model import predict, zero_carry
from charlstm.runs.checkpoints import load_model

WIDTH = 50


@pytest.fixture(scope="module")
def trained():
    return load_model(ROOT / "tests" / "fixtures" / "run_schema_1")


@pytest.fixture(scope="module")
def bits_per_char(trained):
    """Return (prompt, text) -> the mean surprise of the text, by a softmax in NumPy."""
    run, model, params = trained
    predict_ids = jax.jit(partial(predict, model, params))

    def bits_of(prompt, text):
        ids_M = run.vocab.encode(prompt + text)
        # Padded at its end, of which a causal model sees nothing before, to compile once.
        padded_1W = np.pad(ids_M, (0, WIDTH - len(ids_M)))[None]
        logits_1WV, _ = predict_ids(padded_1W, zero_carry(model, 1))
        logits_MV = np.asarray(logits_1WV, np.float64)[0, : len(ids_M) - 1]
        own_M = logits_MV[np.arange(len(ids_M) - 1), ids_M[1:]]
        nats_M = np.log(np.exp(logits_MV).sum(axis=1)) - own_M
        return nats_M[len(prompt) - 1 :].mean() / np.log(2)

    return bits_of


def write(trained, *args, **options):
    writing = generate(*trained, *args, length=40, temperature=1.5, **options)
    return [trained[0].decode(ids_L) for ids_L in collect(writing)]


def test_best_of_keeps_the_most_probable_text(trained, bits_per_char, caplog):
    caplog.set_level(logging.INFO)
    texts = write(trained, "The ", num_samples=5, seed=1)
    bits = [bits_per_char("The ", text) for text in texts]
    # Otherwise the choice would prove little.
    assert np.argmin(bits) > 0
    assert write(trained, "The ", best_of=5, seed=1) == [texts[np.argmin(bits)]]
    listed = re.search(r"best of 5 texts: (.*)", caplog.text)[1].split(", ")
    assert [float(value) for value in listed] == pytest.approx(sorted(bits), abs=6e-4)


def test_best_of_is_over_the_characters_before_the_stop(trained, bits_per_char):
    options = {"stop": " ", "seed": 3}
    texts = write(trained, "The", num_samples=5, **options)
    assert len({*map(len, texts)}) > 1
    bits = [bits_per_char("The", text) if text else np.inf for text in texts]
    assert write(trained, "The", best_of=5, **options) == [texts[np.argmin(bits)]]
