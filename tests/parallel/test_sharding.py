"""Many devices of one process: eight virtual ones give what one gives, up to the order of a sum."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SUM_ORDER, assert_close, assert_runs_close, series
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from charlstm.config import base_config
from charlstm.data.batches import Batch, Streams, read_steps
from charlstm.errors import UserError
from charlstm.model import CharLSTM
from charlstm.optim import make_optimizer, make_schedule
from charlstm.parallel.sharding import (
    by_rows,
    local_rows,
    make_mesh,
    put_batch,
    replicated,
    state_shardings,
)
from charlstm.steps import init_state, make_train_step
from charlstm.training.loop import train

NUM_DEVICES = 8


@pytest.fixture(scope="module", autouse=True)
def _enough_devices():
    if jax.device_count() < NUM_DEVICES:
        pytest.skip(f"{jax.device_count()} devices, and it takes {NUM_DEVICES}")


def config_of(book_path, num_devices, **changes):
    config = base_config()
    settings = {
        "data.path": str(book_path),
        "num_steps": 50,
        "batch_size": 16,
        "seq_len": 24,
        "eval_every_steps": 25,
        "log_every_steps": 1,
        "model.hidden_size": 32,
        "model.recurrent_dropout": 0.1,
        # Adam divides by a gradient's size, so that the rounding of one that is all but 0 moves a
        # weight by as much as the rate: with 8e-3 single weights differ by 3e-5 after 50 steps.
        "optimizer.learning_rate": 2e-3,
        # A cautious one moves a weight or leaves it by the sign of such a gradient.
        "optimizer.name": "adamw",
        "optimizer.warmup_steps": 10,
        "sample.length": 20,
        "mesh.data": num_devices,
    }
    config.update_from_flattened_dict(settings | changes)
    return config


@pytest.fixture(scope="module")
def on_one(tmp_path_factory, book):
    """Return the folder of a run on one device, and the path of its text."""
    folder = tmp_path_factory.mktemp("devices")
    path = folder / "book.txt"
    path.write_text(book, encoding="utf-8")
    assert train(config_of(path, 1), folder / "run")
    return folder / "run", path


def test_eight_devices_train_as_one_does(on_one, tmp_path):
    reference, path = on_one
    assert train(config_of(path, NUM_DEVICES), tmp_path / "run")
    assert_runs_close(tmp_path / "run", reference)


@pytest.mark.usefixtures("cheaply")
def test_eight_devices_begin_as_one_does_with_a_cautious_optimizer():
    config = config_of("", NUM_DEVICES, **{"optimizer.name": "cautious_adamw"})
    optimizer = make_optimizer(config, make_schedule(config, 6))
    model = CharLSTM(vocab_size=20, hidden_size=8, recurrent_rms_norm=True)
    batches = Streams(np.random.default_rng(0).integers(0, 20, 1000), batch_size=16, seq_len=8)
    initial = init_state(model, optimizer, jax.random.key(0), 16)
    losses = []
    for number in (1, NUM_DEVICES):
        config.mesh.data = number
        mesh = make_mesh(config)
        step = jax.jit(make_train_step(model.clone(num_shards=number), optimizer))
        state = jax.device_put(initial, state_shardings(initial, mesh))
        for index in range(6):
            state, metrics = step(state, put_batch(batches(index), by_rows(mesh, 16), 16))
            losses.append(float(metrics["loss"]))
    assert_close(losses[6:], losses[:6], SUM_ORDER)
    assert losses[5] < losses[0]


def test_a_run_goes_on_with_other_devices(on_one, tmp_path):
    reference, path = on_one
    num_steps = [0]
    for number in (8, 1):
        calls = iter(range(10**6))
        assert not train(
            config_of(path, number), tmp_path / "run", lambda calls=calls: next(calls) > 9
        )
        num_steps.append(len(series(tmp_path / "run", "train/loss")))
    assert num_steps == sorted(set(num_steps))
    assert num_steps[-1] < 50
    assert train(config_of(path, 8), tmp_path / "run")
    assert_runs_close(tmp_path / "run", reference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh.data": 9}, "config.mesh.data=9: there are 8 devices"),
        ({"batch_size": 12}, "config.batch_size=12: 8 devices cannot share it evenly; use a mul"),
        ({"batch_size": 5}, "such as 8"),
        ({"batch_size": 9, "mesh.data": 2}, "such as 8"),
    ],
)
def test_devices_that_cannot_share_a_batch_are_refused(settings, message, book_path, tmp_path):
    config = config_of(book_path, -1, **settings)
    with pytest.raises(UserError, match=re.escape(message)):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_comes_to_its_devices_row_by_row(book_path):
    mesh = make_mesh(config_of(book_path, 4))
    batches = Streams(np.arange(1000), batch_size=8, seq_len=10)
    sharding, wanted = by_rows(mesh, 8, axis=1), read_steps(batches, 3, 2, 4)
    rows = local_rows(by_rows(mesh, 8), 8)
    assert rows == slice(0, 8)  # one process has them all
    batch = put_batch(read_steps(batches, 3, 2, 4, rows), sharding, 8)
    for found, whole in zip(batch, wanted, strict=True):
        np.testing.assert_array_equal(found, whole)
        for index, shard in enumerate(found.addressable_shards):
            np.testing.assert_array_equal(shard.data, whole[:, 2 * index : 2 * index + 2])


def test_rows_that_devices_cannot_share_are_on_all_of_them(book_path):
    mesh = make_mesh(config_of(book_path, 4))
    assert by_rows(mesh, 6) == replicated(mesh)
    assert local_rows(by_rows(mesh, 6), 6) == slice(0, 6)


def test_rows_of_a_batch_are_those_of_the_whole_one():
    ids_M = np.arange(997)
    batches = Streams(ids_M, batch_size=6, seq_len=10, context=10)
    for step in (0, 3, np.arange(4)):
        whole, part = batches(step), batches(step, slice(2, 5))
        for name in Batch._fields:
            axis = 1 if isinstance(step, np.ndarray) else 0
            rows = np.take(getattr(whole, name), [2, 3, 4], axis=axis)
            np.testing.assert_array_equal(getattr(part, name), rows)


# --- what the devices tell one another ---


def places_of_all_reduce(num_shards, batch_size, **options):
    """Return the computation that each all-reduce of a compiled training step is in."""
    model = CharLSTM(vocab_size=20, hidden_size=8, num_shards=num_shards, **options)
    optimizer = optax.adam(1e-3)
    mesh = Mesh(np.array(jax.devices()[:NUM_DEVICES]), ("data",))
    make = partial(init_state, model, optimizer, batch_size=batch_size)
    state = jax.eval_shape(make, jax.random.key(0))
    shape = batch_size, 16
    batch = Batch(
        *(jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.int32, jnp.float32)),
        jax.ShapeDtypeStruct((batch_size,), bool),
    )
    rows = NamedSharding(mesh, PartitionSpec("data"))
    inputs = state_shardings(state, mesh), jax.tree.map(lambda leaf: rows, batch)
    step = jax.jit(make_train_step(model, optimizer), in_shardings=inputs)
    places, place = [], ""
    for line in step.lower(state, batch).compile().as_text().splitlines():
        if line and not line.startswith(" "):
            place = line.split()[0]
        if re.search(r" all-reduce(-start)?\(", line):
            places.append(place)
        assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line)
    return places


@pytest.mark.parametrize(("view", "num_layers"), [("one_hot", 2), ("embed", 1)])
def test_the_devices_add_up_gradients_once_a_step_and_tell_nothing_else(view, num_layers):
    # How many characters count, and the loss with all gradients in one.
    places = places_of_all_reduce(NUM_DEVICES, 1024, input=view, num_layers=num_layers)
    assert places == ["ENTRY", "ENTRY"]


def test_without_the_number_of_shards_they_would_do_so_in_a_loop():
    places = places_of_all_reduce(1, 1024, num_layers=2)
    assert len([place for place in places if place != "ENTRY"]) >= 2
