"""The recurrence of a run: chosen once, recorded in config.json, and kept when it is resumed."""

import json

import pytest
from etils import epath
from helpers import small_config

from charlstm.errors import UserError
from charlstm.runs.folder import load_run, write_run
from charlstm.training.setup import log_setup, prepare


def begin(config, workdir, **changes):
    """Write the files of a run, except checkpoints, with `changes` to its recurrence."""
    run = prepare(config, workdir).run
    run.config.model.update(changes)
    workdir.mkdir()
    write_run(run)


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path / "run")


@pytest.fixture
def config(book_path):
    return small_config(book_path)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({}, "native"), ({"mesh.data": 4}, "fused"), ({"model.dtype": "bfloat16"}, "fused")],
)
def test_config_json_has_the_chosen_recurrence(changes, wanted, book_path, workdir, caplog):
    caplog.set_level("INFO", "charlstm")
    config = small_config(book_path, **changes)
    setup = prepare(config, workdir)
    workdir.mkdir()
    write_run(setup.run)
    assert (
        json.loads((workdir / "config.json").read_text())["config"]["model"]["recurrence"] == wanted
    )
    assert setup.model.recurrence == wanted
    assert config.model.recurrence == "auto"
    log_setup(setup, 0, 1)
    assert f"16 LSTM ({wanted})" in caplog.text


def test_without_a_compiler_a_run_is_that_of_fused(no_compiler, config, book_path, workdir):
    setup = prepare(config, workdir)
    fused = prepare(small_config(book_path, **{"model.recurrence": "fused"}), workdir)
    assert setup.model == fused.model
    assert setup.run.config == fused.run.config


def test_missing_text_is_reported_before_a_missing_compiler(no_compiler, config, workdir, caplog):
    config.data.path = "none.txt"
    caplog.set_level("INFO", "charlstm")
    with pytest.raises(UserError, match=r"none\.txt"):
        prepare(config, workdir)
    assert not caplog.records


@pytest.mark.parametrize("began_with", ["fused", "flax"])
def test_resumed_run_keeps_its_recurrence(began_with, config, workdir, caplog):
    begin(config, workdir, recurrence=began_with)
    caplog.set_level("INFO", "charlstm")
    setup = prepare(config, workdir)
    assert setup.model.recurrence == setup.run.config.model.recurrence == began_with
    assert not caplog.records


@pytest.mark.parametrize("given", ["fused", "native"])
def test_resumed_run_takes_a_given_recurrence(given, config, workdir, caplog):
    begin(config, workdir, recurrence="flax")
    config.model.recurrence = given
    caplog.set_level("INFO", "charlstm")
    assert prepare(config, workdir).model.recurrence == given
    (line,) = caplog.messages
    assert f"model.recurrence is 'flax' there and '{given}' here" in line


def test_native_run_on_several_devices_goes_on(no_compiler, config, workdir, caplog):
    begin(config, workdir, recurrence="native")
    config.mesh.data = 4
    caplog.set_level("WARNING", "charlstm")
    assert prepare(config, workdir).run.config.model.recurrence == "native"
    (line,) = caplog.messages
    assert all(part in line for part in ("=native", "fused", "cpu:0, cpu:1", "not with the same"))


@pytest.mark.parametrize(("began_with", "lacks"), [("native", "c++, g++"), ("cudnn", "NVIDIA")])
def test_run_whose_recurrence_cannot_run_is_one_line(
    began_with, lacks, no_compiler, config, workdir
):
    begin(config, workdir, recurrence=began_with, multiplicative=False, recurrent_rms_norm=False)
    config.model.update(multiplicative=False, recurrent_rms_norm=False)
    with pytest.raises(UserError) as caught:
        prepare(config, workdir)
    remedy = "--config.model.recurrence=fused"
    for part in (str(workdir), f"config.model.recurrence={began_with}", lacks, remedy):
        assert part in str(caught.value)
    assert load_run(workdir).config.model.recurrence == began_with
