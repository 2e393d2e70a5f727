import math
import re
import shutil
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import flip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from charlstm.errors import DamagedError, RunError, UserError
from charlstm.optim import AverageState, averaged_params
from charlstm.runs.checkpoints import Checkpoints, only_params, steps_in
from charlstm.runs.checksums import checksums
from charlstm.steps import TrainState

METADATA = {"seconds": 1.5, "nonfinite_steps": 0}


def state_at(step):
    """Return a state in which each leaf depends on the step."""
    numbers = jnp.arange(12.0).reshape(3, 4) + step
    return TrainState(
        jnp.int32(step), {"w": numbers, "b": numbers[0] / 7}, (numbers,), (), jax.random.key(step)
    )


ABSTRACT_STATE = jax.eval_shape(lambda: state_at(0))


def save_states(workdir, losses):
    """Save states 1, 2, ... with these losses."""
    with closing(Checkpoints(epath.Path(workdir))) as checkpoints:
        for step, loss in enumerate(losses, start=1):
            checkpoints.save(state_at(step), METADATA | {"name": step}, loss)


def assert_is(state, step):
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True):
        assert ours.dtype == theirs.dtype
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)


def newest(workdir, **options):
    with closing(Checkpoints(epath.Path(workdir))) as checkpoints:
        return checkpoints.restore_newest(ABSTRACT_STATE, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a run with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    save_states(folder, [2.0, 1.0])
    return folder


def test_restored_state_equals_saved_state(tmp_path):
    save_states(tmp_path, [2.5])
    state, metadata = newest(tmp_path)
    assert_is(state, 1)
    assert metadata == METADATA | {"name": 1}


@pytest.mark.parametrize("name", ["[My] a*b?c\\d", "[[", "caf\udce9", "%41 {a}#'\n\""])
def test_folder_may_have_any_name(name, tmp_path):
    for parent in (tmp_path / name, tmp_path / "moved" / name):
        if not parent.exists():
            parent.parent.mkdir(exist_ok=True)
            save_states(parent, [2.0, 1.0])
        with closing(Checkpoints(epath.Path(parent), read_only=True)) as checkpoints:
            assert_is(checkpoints.restore(checkpoints.best_step(), ABSTRACT_STATE)[0], 2)
        assert_is(newest(parent)[0], 2)
        assert steps_in(epath.Path(parent / "checkpoints")) == [1, 2]
        assert [path.name for path in parent.parent.iterdir()] == [name]
        if parent.parent == tmp_path:
            (tmp_path / "moved").mkdir()
            parent.rename(tmp_path / "moved" / name)


def test_save_overwrites_a_step_only_with_a_loss(tmp_path):
    with closing(Checkpoints(epath.Path(tmp_path))) as checkpoints:
        checkpoints.save(state_at(1), METADATA, 1.0)
        checkpoints.save(state_at(2), METADATA, None)
        checkpoints.save(state_at(2), METADATA | {"name": "again"}, 0.5)
        checkpoints.save(state_at(2), METADATA | {"name": "too late"}, None)
        checkpoints.save(state_at(3), METADATA, None)
        assert checkpoints.best_step() == 2
        assert checkpoints.restore(2, ABSTRACT_STATE)[1]["name"] == "again"


def test_two_latest_and_finite_best_are_kept(tmp_path):
    save_states(tmp_path, [3.0, 1.0, math.nan, 2.0, math.inf, None])
    with closing(Checkpoints(epath.Path(tmp_path), read_only=True)) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 6)
    assert steps_in(epath.Path(tmp_path / "checkpoints")) == [2, 5, 6]


def test_best_is_newest_without_finite_loss(tmp_path):
    save_states(tmp_path, [None, math.nan, math.inf])
    with closing(Checkpoints(epath.Path(tmp_path), read_only=True)) as checkpoints:
        assert checkpoints.best_step() == 3


def test_restore_newest_deletes_unwanted_states(tmp_path):
    save_states(tmp_path, [3.0, 2.0, 1.0])
    state, _ = newest(tmp_path, is_wanted=lambda metadata: metadata["name"] < 3)
    assert_is(state, 2)
    assert steps_in(epath.Path(tmp_path / "checkpoints")) == [2]
    assert newest(tmp_path, is_wanted=lambda metadata: False) is None
    assert steps_in(epath.Path(tmp_path / "checkpoints")) == []


def test_restore_newest_fails_if_all_are_damaged(tmp_path):
    save_states(tmp_path, [3.0, 2.0])
    for step in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "state")
    # At every try, until the user removes them.
    for _ in range(3):
        with pytest.raises(
            UserError, match=r"checkpoints are damaged.*damaged-1, damaged-2.*delete"
        ):
            newest(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "damaged-1",
        "damaged-2",
    }
    for path in (tmp_path / "checkpoints").iterdir():
        shutil.rmtree(path)
    assert newest(tmp_path) is None


def test_renamed_damaged_checkpoints_are_kept(tmp_path):
    for mark in ("first", "second"):
        save_states(tmp_path, [3.0, 2.0])
        (tmp_path / "checkpoints" / "2" / "mark").write_text(mark)
        (tmp_path / "checkpoints" / "2" / "metadata" / "metadata").unlink()
        newest(tmp_path)
        shutil.rmtree(tmp_path / "checkpoints" / "1")
    marks = [path.read_text() for path in (tmp_path / "checkpoints").glob("damaged-2*/mark")]
    assert sorted(marks) == ["first", "second"]


# By the difference from the saved state that the error names.
OTHER_STATES = {
    "key is key<fry>() there and key<rbg>() here": lambda state: state._replace(
        key=jax.random.key(0, impl="rbg")
    ),
    "params/w is float32(3, 4) there and float16(3, 4) here": lambda state: state._replace(
        params=state.params | {"w": state.params["w"].astype(jnp.float16)}
    ),
    "params/w is float32(3, 4) there and float32(4, 4) here": lambda state: state._replace(
        params=state.params | {"w": jnp.zeros((4, 4))}
    ),
    "params/more is missing there and float32(2,) here": lambda state: state._replace(
        params=state.params | {"more": jnp.zeros(2)}
    ),
    "opt_state/0 is float32(3, 4) there and missing here": lambda state: state._replace(
        opt_state=()
    ),
}


@pytest.mark.parametrize("difference", OTHER_STATES)
def test_restore_refuses_other_arrays_by_name(difference, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    other_state = jax.eval_shape(lambda: OTHER_STATES[difference](state_at(0)))
    with closing(Checkpoints(epath.Path(tmp_path))) as checkpoints:
        with pytest.raises(UserError, match=re.escape(difference)) as caught:
            checkpoints.restore_newest(other_state)
        assert not isinstance(caught.value, DamagedError)
        assert_is(checkpoints.restore_newest(ABSTRACT_STATE)[0], 2)


@pytest.mark.parametrize("name", ["metadata/metadata", "state/manifest.ocdbt", "state/_METADATA"])
def test_unreadable_file_is_not_damage(name, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "2" / name
    # A link to itself, since root may read every file.
    moved = path.rename(path.with_name("moved"))
    path.symlink_to(path.name)
    with pytest.raises(RunError, match=f"2/{name}: cannot be read"):
        newest(tmp_path)
    path.unlink()
    moved.rename(path)
    assert_is(newest(tmp_path)[0], 2)


def test_files_of_unknown_owner_are_read(tmp_path, monkeypatch):
    def nameless(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", nameless)
    monkeypatch.setattr("grp.getgrgid", nameless)
    save_states(tmp_path, [1.0])
    assert_is(newest(tmp_path)[0], 1)


def test_checksum_depends_on_type_shape_and_content():
    one = jnp.zeros(2, jnp.float32)
    others = [jnp.zeros(2, jnp.int32), jnp.zeros((2, 1)), jnp.zeros(2).at[1].set(-0.0)]
    assert len({checksums([x])["0"] for x in [one, *others]}) == 4
    keys = [jax.random.key(0), jax.random.key(1)]
    assert checksums(keys)["0"] != checksums(keys)["1"]
    assert checksums({"a": (one,)}).keys() == {"a/0"}


def bytes_read():
    """Return the number of bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's counters")
def test_only_params_reads_one_of_four_arrays(tmp_path):
    def make_state():
        params = {"w": jax.random.normal(jax.random.key(1), (10**6,))}
        twice = {"w": 2 * params["w"]}
        average = AverageState(jnp.int32(0), {"w": 3 * params["w"]})
        return TrainState(jnp.int32(1), params, (twice, average), (4 * params["w"],), ())

    with closing(Checkpoints(epath.Path(tmp_path))) as checkpoints:
        checkpoints.save(make_state(), METADATA, 1.0)
    abstract_state, counts = jax.eval_shape(make_state), {}
    for name, wanted in (("all", abstract_state), ("params", only_params(abstract_state))):
        with closing(Checkpoints(epath.Path(tmp_path), read_only=True)) as checkpoints:
            before = bytes_read()
            state, _ = checkpoints.restore(1, wanted)
            counts[name] = bytes_read() - before
    average = averaged_params(state.params, state.opt_state)["w"]
    np.testing.assert_array_equal(average, make_state().opt_state[1].average["w"])
    assert counts["params"] < 0.3 * counts["all"]


def test_reader_logs_nothing(tmp_path, caplog):
    save_states(tmp_path, [1.0])
    caplog.clear()
    Checkpoints(epath.Path(tmp_path), read_only=True).close()
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


FILES = [
    "_CHECKPOINT_METADATA",
    "metrics/metrics",
    "metadata/metadata",
    "state/_METADATA",
    "state/_sharding",
    "state/manifest.ocdbt",
    "state/array_metadatas/process_0",
    "state/d/*",
    "state/ocdbt.process_0/manifest.ocdbt",
    "state/ocdbt.process_0/d/*",
]
DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "deleted": lambda path: path.unlink(),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


def assert_damage_is_noticed(workdir, caplog):
    """Assert that a resume gets state 2, or 1 and a warning; a reader state 2 or an error."""
    for choose in (Checkpoints.best_step, Checkpoints.latest_step):
        try:
            with closing(Checkpoints(epath.Path(workdir), read_only=True)) as checkpoints:
                assert choose(checkpoints) == 2
                assert_is(checkpoints.restore(2, ABSTRACT_STATE)[0], 2)
        except DamagedError as error:
            refusal = str(error)
            assert "checkpoints/2" in refusal
    caplog.clear()
    state, metadata = newest(workdir)
    warnings = [r.message for r in caplog.records if r.name.startswith("charlstm")]
    assert metadata["name"] == int(state.step)
    assert_is(state, int(state.step))
    assert (int(state.step) == 2) == (not warnings)
    assert int(state.step) == 2 or "damaged-2" in warnings[0]


# All damages of the files that every reader parses, and one of the four of each other file.
PARSED = ["metadata/metadata", "state/manifest.ocdbt", "state/ocdbt.process_0/d/*"]
CASES = [
    (damage, name)
    for row, name in enumerate(FILES)
    for column, damage in enumerate(DAMAGES)
    if name in PARSED or (row + column) % 4 == 0
]


@pytest.mark.parametrize(("damage", "name"), CASES)
def test_damaged_file_is_noticed_or_harmless(damage, name, saved, tmp_path, caplog):
    shutil.copytree(saved, tmp_path / "run")
    paths = list((tmp_path / "run" / "checkpoints" / "2").glob(name))
    assert paths
    for path in paths:
        DAMAGES[damage](path)
    assert_damage_is_noticed(tmp_path / "run", caplog)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=settings().max_examples // 5,  # each takes a fifth of a second
)
@given(number=st.integers(0, 10**6), place=st.integers(0, 10**9))
def test_flipped_bit_is_noticed_or_harmless(number, place, saved, tmp_path_factory, caplog):
    workdir = tmp_path_factory.mktemp("flip") / "run"
    shutil.copytree(saved, workdir)
    folder = workdir / "checkpoints" / "2"
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    flip(paths[number % len(paths)], place)
    assert_damage_is_noticed(workdir, caplog)
    shutil.rmtree(workdir.parent)


def test_damage_error_omits_tensorstore_spec(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").glob("*/state/d/*"):
        path.write_text("x")
    with closing(Checkpoints(epath.Path(tmp_path), read_only=True)) as checkpoints:
        with pytest.raises(DamagedError, match="missing or damaged") as caught:
            checkpoints.restore(checkpoints.latest_step(), ABSTRACT_STATE)
    assert "tensorstore_spec" not in str(caught.value)
