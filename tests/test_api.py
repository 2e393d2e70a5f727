"""The public API: README's program, help, saved states, exported steps, errors."""

import contextlib
import inspect
import io
import os
import pydoc
import re
from functools import partial
from importlib import metadata

import jax
import numpy as np
import optax
import pytest
from conftest import ROOT
from flax import serialization
from helpers import assert_equal

import charlstm
from charlstm import Batch, CharLSTM, Streams, init_state, make_train_step

MODEL = CharLSTM(vocab_size=5, hidden_size=4)
BATCHES = Streams(np.arange(40) % 5, batch_size=2, seq_len=3)


def jitted_init(optimizer, key):
    return jax.jit(partial(init_state, MODEL, optimizer, batch_size=2))(key)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # open(...).read(), for brevity
def test_program_in_readme_runs(book, tmp_path, monkeypatch):
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("I " + book[:1000], encoding="utf-8")
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), names)
    assert int(names["state"].step) == names["num_steps"] == 8
    assert len(printed.getvalue()) == 200 + len("\n")
    assert set(printed.getvalue()) <= set(book)


def test_help_and_completion_list_public_names():
    assert set(charlstm.__all__) <= set(dir(charlstm))
    page = pydoc.render_doc(charlstm, renderer=pydoc.plaintext)
    for name in charlstm.__all__:
        assert re.search(rf"^    (class )?{name}\b", page, re.M), name
        assert inspect.getdoc(getattr(charlstm, name))
    assert re.search("-> '?TrainStep\\b", page)


def test_package_has_a_version_and_types():
    assert charlstm.__version__ == metadata.version("charlstm")
    assert os.path.exists(os.path.join(os.path.dirname(charlstm.__file__), "py.typed"))


def test_state_survives_flax_serialization():
    optimizer = optax.adam(0.1)
    state = jitted_init(optimizer, jax.random.key(0))
    saved = serialization.to_bytes(state._replace(key=jax.random.key_data(state.key)))
    other = jitted_init(optimizer, jax.random.key(1))
    like = other._replace(key=jax.random.key_data(other.key))
    found = serialization.from_bytes(like, saved)
    found = found._replace(key=jax.random.wrap_key_data(found.key))
    step = jax.jit(make_train_step(MODEL, optimizer))
    one, other = (step(start, BATCHES(0))[0] for start in (state, found))
    assert_equal(one.params, other.params)


def test_training_step_survives_export():
    pytest.importorskip("flatbuffers")  # JAX needs it to serialize
    with contextlib.suppress(ValueError):  # where another test has done it
        jax.export.register_namedtuple_serialization(optax.EmptyState, serialized_name="empty")
    optimizer = optax.sgd(0.1)
    state, batch = jitted_init(optimizer, jax.random.key(0)), Batch(*BATCHES(0))
    step = jax.jit(make_train_step(MODEL, optimizer))
    read_back = jax.export.deserialize(jax.export.export(step)(state, batch).serialize())
    found, metrics = read_back.call(state, batch)
    assert type(found) is type(state)
    wanted, wanted_metrics = step(state, batch)
    assert_equal(found.params, wanted.params)
    assert_equal(metrics, wanted_metrics)


def wrong_batch(**changes):
    return BATCHES(0)._replace(**changes)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (wrong_batch(inputs_BT=np.zeros(3, np.int32)), "inputs_BT: must have two axes"),
        (wrong_batch(inputs_BT=np.zeros((2, 3))), "inputs_BT: must be integers"),
        (wrong_batch(targets_BT=np.full((2, 3), 5)), "targets_BT: ids are 0 to 4, .*; got 5"),
        (wrong_batch(weights_BT=np.ones((2, 1))), r"weights_BT: must have the shape \(2, 3\)"),
        (wrong_batch(reset_B=np.ones((2, 3), bool)), r"reset_B: must have the shape \(2,\)"),
        (Batch(*(leaf[:, :0] for leaf in BATCHES(0)[:3]), np.ones(2, bool)), "at least one"),
        (Streams(np.arange(40) % 5, 3, 3)(0), "carry: has the shapes .*; 3 rows of ids"),
    ],
)
def test_an_invalid_batch_raises(batch, message):
    make = partial(init_state, MODEL, optax.sgd(0.1), batch_size=2)
    state = jax.eval_shape(make, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        # The batch is a constant of the program.
        jax.eval_shape(lambda state: make_train_step(MODEL, optax.sgd(0.1))(state, batch), state)


@pytest.mark.parametrize("wrong", [5, -1])
@pytest.mark.parametrize("name", ["inputs_BT", "targets_BT"])
def test_compiled_step_skips_a_batch_with_an_invalid_id(name, wrong):
    state = jitted_init(optax.sgd(0.1), jax.random.key(0))
    batch = BATCHES(0)
    getattr(batch, name)[0, 1] = wrong
    new_state, metrics = jax.jit(make_train_step(MODEL, optax.sgd(0.1)))(state, batch)
    assert metrics["skipped"]
    assert_equal(new_state.params, state.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batches": 0}, "micro_batches=0: must be"),
        ({"micro_batches": 3}, "micro_batches=3: must divide the 2 rows"),
        ({"loss": lambda logits_BTV, batch: logits_BTV.sum()}, "loss: must return .*; got"),
    ],
)
def test_invalid_options_of_a_step_raise(options, message):
    make = partial(init_state, MODEL, optax.sgd(0.1), batch_size=2)
    state = jax.eval_shape(make, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda state: make_train_step(MODEL, optax.sgd(0.1), **options)(state, BATCHES(0)),
            state,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params | {"extra": params["dense"]}, "params: extra/bias is"),
        (lambda params: {"dense": params["dense"]}, "params: lstm_0/hf/bias is missing"),
        (
            lambda params: params | {"dense": {"bias": np.zeros(4), "kernel": np.zeros((4, 5))}},
            r"params: dense/bias is float64\[4\], and the model has float32\[5\]",
        ),
    ],
)
def test_parameters_of_another_model_raise(change, message):
    params = jitted_init(optax.sgd(0.1), jax.random.key(0)).params
    with pytest.raises(ValueError, match=message):
        init_state(MODEL, optax.sgd(0.1), jax.random.key(0), 2, params=change(params))


def test_evaluation_without_batches_raises():
    with pytest.raises(ValueError, match="batches: "):
        charlstm.evaluate(charlstm.make_eval_step(MODEL), {}, (), [])
