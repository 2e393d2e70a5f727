"""Eight virtual devices of one process train as one device does, up to the order of sums."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    SUM_ORDER,
    assert_close,
    assert_runs_close,
    no_pictures_and_samples,
    series,
    stop_after,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from charlstm.config import base_config
from charlstm.data.batches import Batch, Streams, read_steps
from charlstm.errors import UserError
from charlstm.model import CharLSTM
from charlstm.optim import make_optimizer, make_schedule
from charlstm.parallel.sharding import (
    by_rows,
    init_sharded,
    local_rows,
    make_mesh,
    put_batch,
    replicated,
)
from charlstm.steps import make_train_step
from charlstm.training.loop import train

NUM_DEVICES = 8


@pytest.fixture(scope="module", autouse=True)
def _needs_eight_devices():
    if jax.device_count() < NUM_DEVICES:
        pytest.skip(f"needs {NUM_DEVICES} devices, found {jax.device_count()}")


def config_of(book_path, num_devices, **changes):
    config = base_config()
    settings = {
        "data.path": str(book_path),
        "num_steps": 20,
        "batch_size": 16,
        "seq_len": 24,
        "eval_every_steps": 10,
        "log_every_steps": 1,
        "model.hidden_size": 32,
        "model.recurrent_dropout": 0.1,
        # Adam divides by the size of a gradient: the rounding error of one near 0 moves a weight by
        # as much as the learning rate.
        "optimizer.learning_rate": 2e-3,
        # A cautious optimizer moves a weight or not by the sign of such a gradient.
        "optimizer.name": "adamw",
        "optimizer.warmup_steps": 10,
        "sample.length": 20,
        "mesh.data": num_devices,
    }
    config.update_from_flattened_dict(settings | changes)
    return config


@pytest.fixture(scope="module", autouse=True)
def _no_pictures_and_samples():
    with no_pictures_and_samples():
        yield


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory, book):
    """Return the folder of a run on one device, and the path of its text."""
    folder = tmp_path_factory.mktemp("devices")
    path = folder / "book.txt"
    path.write_text(book, encoding="utf-8")
    assert train(config_of(path, 1), folder / "run")
    return folder / "run", path


def test_first_steps_of_cautious_optimizer_agree():
    config = config_of("", NUM_DEVICES, **{"optimizer.name": "cautious_adamw"})
    optimizer = make_optimizer(config, make_schedule(config, 6))
    model = CharLSTM(vocab_size=20, hidden_size=8, recurrence="flax")  # compiles in less time
    batches = Streams(np.random.default_rng(0).integers(0, 20, 1000), batch_size=16, seq_len=8)
    losses = []
    for number in (1, NUM_DEVICES):
        config.mesh.data = number
        mesh = make_mesh(config)
        step = jax.jit(make_train_step(model.clone(num_shards=number), optimizer))
        key = jax.random.key(0)
        state = init_sharded(model, optimizer, key, 16, mesh)[1](key)
        for index in range(6):
            state, metrics = step(state, put_batch(batches(index), by_rows(mesh, 16), 16))
            losses.append(float(metrics["loss"]))
    assert_close(losses[6:], losses[:6], SUM_ORDER)
    assert losses[5] < losses[0]


def test_run_of_one_device_goes_on_with_eight_as_with_one(on_one_device, tmp_path):
    reference, path = on_one_device
    # test_processes.py starts with eight and continues with one.
    assert not train(config_of(path, 1), tmp_path / "run", stop_after(4))
    assert 0 < len(series(tmp_path / "run", "train/loss")) < 5
    assert train(config_of(path, NUM_DEVICES), tmp_path / "run")
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
def test_mesh_that_does_not_divide_the_batch_is_refused(settings, message, book_path, tmp_path):
    config = config_of(book_path, -1, **settings)
    with pytest.raises(UserError, match=re.escape(message)):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_put_batch_splits_rows_over_devices(book_path):
    mesh = make_mesh(config_of(book_path, 4))
    batches = Streams(np.arange(1000), batch_size=8, seq_len=10)
    sharding, wanted = by_rows(mesh, 8, axis=1), read_steps(batches, 3, 2, 4)
    rows = local_rows(by_rows(mesh, 8), 8)
    assert rows == slice(0, 8)
    batch = put_batch(read_steps(batches, 3, 2, 4, rows), sharding, 8)
    for found, whole in zip(batch, wanted, strict=True):
        np.testing.assert_array_equal(found, whole)
        for index, shard in enumerate(found.addressable_shards):
            np.testing.assert_array_equal(shard.data, whole[:, 2 * index : 2 * index + 2])


def test_indivisible_rows_are_replicated(book_path):
    mesh = make_mesh(config_of(book_path, 4))
    assert by_rows(mesh, 6) == replicated(mesh)
    assert local_rows(by_rows(mesh, 6), 6) == slice(0, 6)


def test_batches_return_the_requested_rows():
    ids_M = np.arange(997)
    batches = Streams(ids_M, batch_size=6, seq_len=10, context=10)
    for step in (0, 3, np.arange(4)):
        whole, part = batches(step), batches(step, slice(2, 5))
        for name in Batch._fields:
            axis = 1 if isinstance(step, np.ndarray) else 0
            rows = np.take(getattr(whole, name), [2, 3, 4], axis=axis)
            np.testing.assert_array_equal(getattr(part, name), rows)


# --- communication between devices ---


def computations_with_all_reduce(num_shards, batch_size, **options):
    """Return the name of the HLO computation of each all-reduce of a compiled train step."""
    model = CharLSTM(vocab_size=20, hidden_size=8, num_shards=num_shards, **options)
    optimizer = optax.adam(1e-3)
    mesh = Mesh(np.array(jax.devices()[:NUM_DEVICES]), ("data",))
    state, _ = init_sharded(model, optimizer, jax.random.key(0), batch_size, mesh)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    ids, weights, reset = (
        jax.ShapeDtypeStruct((batch_size, 16)[:rank], dtype, sharding=rows)
        for rank, dtype in ((2, jnp.int32), (2, jnp.float32), (1, bool))
    )
    batch = Batch(ids, ids, weights, reset)
    step = jax.jit(make_train_step(model, optimizer))
    found, computation = [], ""
    for line in step.lower(state, batch).compile().as_text().splitlines():
        if line and not line.startswith(" "):
            computation = line.split()[0]
        if re.search(r" all-reduce(-start)?\(", line):
            found.append(computation)
        assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line)
    return found


# Little optimization leaves the passes that combine or move all-reduces.
@pytest.mark.parametrize(("view", "num_layers"), [("one_hot", 2), ("embed", 1)])
def test_train_step_has_two_all_reduces_outside_loops(view, num_layers):
    # The number of counted characters, and the loss together with all gradients.
    found = computations_with_all_reduce(NUM_DEVICES, 1024, input=view, num_layers=num_layers)
    assert found == ["ENTRY", "ENTRY"]


def test_without_num_shards_all_reduces_are_in_a_loop():
    found = computations_with_all_reduce(1, 1024)
    assert len([name for name in found if name != "ENTRY"]) >= 1
