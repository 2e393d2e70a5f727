"""Comparisons with one tolerance policy, configs of small runs, and edits of a run."""

import re
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from launching import NOISE
from ml_collections import ConfigDict

from charlstm.config import base_config
from charlstm.model import model_from_config, zero_carry
from charlstm.optim import make_optimizer, make_schedule
from charlstm.runs.checkpoints import Checkpoints, load_model, steps_in
from charlstm.runs.folder import write_run
from charlstm.runs.metrics import read_records
from charlstm.steps import init_state
from charlstm.training.progress import Counters
from charlstm.training.setup import prepare

NUM_STEPS = 30
# Settings of small_config that compile in half the time, where the model does not matter.
QUICK = {
    "model.recurrence": "flax",
    "model.dropout_rate": 0.0,
    "model.multiplicative": False,
    "model.recurrent_rms_norm": False,
    "optimizer.name": "adam",
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 0.0,
}

# Tolerances of assert_close. What a guarantee calls equal is compared bit for bit, without one.
SUM_ORDER = 1e-6  # float32, the same operations with sums in another order
FLOAT32 = 1e-5  # float32 against another program or a float64 oracle
FLOAT64 = 1e-10  # float64 against an oracle


def assert_close(found, wanted, relative=FLOAT32):
    """Compare two trees: each error is at most `relative` times the leaf's largest value.

    Integers and booleans have to be equal.
    """
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    # Moved to NumPy first: JAX would compile each operation for each shape.
    found, wanted = jax.tree.map(np.asarray, (found, wanted))
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert leaf.shape == other.shape, name
        if other.dtype.kind in "biu":
            np.testing.assert_array_equal(leaf, other, name)
            continue
        leaf, other = np.float64(leaf), np.float64(other)
        error, largest = (np.max(np.abs(x), initial=0) for x in (leaf - other, other))
        assert error <= relative * largest, f"{name}: off by {error}, largest value {largest}"


def assert_equal(found, wanted):
    """Compare two trees bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def records_of(workdir):
    """Return the records of metrics.jsonl without what depends on the clock."""
    clocked = ("seconds", "chars_per_second")
    records = read_records(epath.Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in clocked} for record in records]


def series(workdir, name):
    """Return (step, value) for each record of metrics.jsonl that has the metric `name`."""
    return [(record["step"], record[name]) for record in records_of(workdir) if name in record]


def assert_runs_close(workdir, reference):
    """Compare two runs up to the order of sums: losses to 1e-6, parameters to 1e-5."""
    for name in ("train/loss", "val/loss"):
        assert_close(series(workdir, name), series(reference, name), SUM_ORDER)
    assert_close(load_model(workdir, "latest")[2], load_model(reference, "latest")[2])


def assert_stopped(workdir, output):
    """Check that `output`, of a run that a signal stopped, names the step of its checkpoint."""
    step = max(steps_in(epath.Path(workdir) / "checkpoints"), default=0)
    assert re.search(rf"saved .*\bstep {step}\b", output), output
    assert not [noise for noise in NOISE if noise in output], output


def small_config(book_path, **changes):
    """Return the config of a short run; the compiled program does not depend on its length."""
    config = base_config()
    settings = {
        "data.path": str(book_path),
        "num_steps": NUM_STEPS,
        "batch_size": 4,
        "seq_len": 16,
        "eval_every_steps": 10,
        # Also the number of steps that one compiled call takes at most.
        "log_every_steps": 1,
        "model.hidden_size": 16,
        "optimizer.warmup_steps": 0,
        "optimizer.schedule": "constant",
        "sample.length": 30,
        "mesh.data": 1,
    }
    config.update_from_flattened_dict(settings | changes)
    return config


def abstract_state_of(run):
    """Return the abstract state of a run, without shardings."""
    model = model_from_config(run.config, run.vocab)
    optimizer = make_optimizer(run.config, make_schedule(run.config, num_steps=1))
    make_state = partial(init_state, model, optimizer, batch_size=run.config.batch_size)
    return jax.eval_shape(make_state, run.key(0))


def random_params(model, scale=0.5, seed=0):
    """Return made-up parameters, with which each character read matters, without compiling."""

    def init(key):
        return model.init(key, jnp.zeros((1, 1), int), zero_carry(model, 1))["params"]

    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.float32(draw.normal(0, scale, leaf.shape)), shapes)


def untrained_run(config, workdir, steps=(0,)):
    """Return a run with checkpoints of `steps` and made-up weights, without compiling anything."""
    run = prepare(config, epath.Path(workdir)).run
    run.workdir.mkdir(parents=True, exist_ok=True)
    write_run(run)

    def make_up(leaf):
        if leaf.dtype == np.int32:
            return np.zeros(leaf.shape, leaf.dtype)
        return np.linspace(-0.1, 0.1, leaf.size, dtype=leaf.dtype).reshape(leaf.shape)

    state = jax.tree.map(make_up, abstract_state_of(run)._replace(key=()))
    with closing(Checkpoints(run.workdir)) as checkpoints:
        for step in steps:
            saved = state._replace(step=np.int32(step), key=run.key(config.seed))
            checkpoints.save(saved, asdict(Counters()), 1.0)
    return run


def stop_after(num_calls):
    """Return a should_stop that becomes true after `num_calls` calls of train_steps."""
    calls = iter(range(1, 10**6))
    return lambda: next(calls) >= num_calls


@contextmanager
def no_pictures_and_samples():
    """Draw no curves and no samples within the block: they take longer than the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("charlstm.runs.metrics.RunLog.draw", lambda self: None)
        patch.setattr("charlstm.training.loop.write_sample", lambda *arguments: {"sample": ""})
        yield


def flip(path, place):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    bit = place % (8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def config_with(changes: dict) -> ConfigDict:
    # ConfigDict converts or refuses most wrong types on assignment, so build a new one.
    sections = base_config().to_dict()
    for key, value in changes.items():
        *section, name = key.split(".")
        (sections.setdefault(section[0], {}) if section else sections)[name] = value
    return ConfigDict(sections)
