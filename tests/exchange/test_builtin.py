"""The small trained model in the package, which launchers and load_model call 'builtin'."""

import logging
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from helpers import assert_equal

import charlstm
from charlstm.cli import folders
from charlstm.evaluation.surprise import predict_text
from charlstm.exchange.export import export
from charlstm.pages import report
from charlstm.runs.checkpoints import load_model
from charlstm.training.transfer import check_other, load_source

pytestmark = pytest.mark.usefixtures("cheaply")

FOLDER = Path(charlstm.__file__).parent / "builtin"
RUN = ROOT / "tests" / "fixtures" / "run_schema_1"
# Not a passage of the manual, which differs between versions of Python.
TEXT = "The method returns a new list of the names of all attributes that the class has.\n"


@pytest.fixture(scope="module")
def builtin():
    return load_model("builtin")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_builtin_predicts_english(builtin):
    run, model, params = builtin
    bits_M = predict_text(model, params, run.vocab.encode(TEXT)).bits_M[1:]
    # Less than half of the bits of letters that are equally probable.
    assert np.mean(bits_M) < math.log2(26) / 2
    scrambled = "".join(np.random.default_rng(0).permutation(list(TEXT)))
    other_M = predict_text(model, params, run.vocab.encode(scrambled)).bits_M[1:]
    assert np.mean(other_M) > 2 * np.mean(bits_M)


def test_builtin_is_small_and_has_no_path_of_a_machine(builtin):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1.5e6
    for path in FOLDER.glob("*.json"):
        assert not re.search(r"/(home|root|tmp|work|Users)\b", path.read_text()), path
    run = builtin[0]
    assert run.text.source == run.config.data.path == "pydoc_data.topics"
    # The first text does not wait for a C++ compiler.
    assert run.config.model.recurrence == "fused"


def test_path_of_a_folder_is_not_the_name_builtin(builtin, here, caplog):
    shutil.copytree(RUN, here / "builtin")
    for path in ("./builtin", Path("builtin")):
        assert len(load_model(path)[0].vocab) < len(builtin[0].vocab)
    assert load_model("builtin")[0] == builtin[0]
    with caplog.at_level(logging.INFO):
        assert folders.trained_workdir("builtin") == "builtin"
    assert "./builtin" in caplog.text
    assert folders.trained_workdirs("builtin,./builtin") == ["builtin", "./builtin"]


def test_what_is_made_of_builtin_is_written_here(builtin, here, monkeypatch):
    assert_equal(load_model(export("builtin", "safetensors"))[2], builtin[2])
    monkeypatch.setattr(report, "collect", lambda workdir, compare: {"run": {"name": "builtin"}})
    report.write_report("builtin")
    assert {path.name for path in here.iterdir()} == {"builtin-safetensors", "builtin-report.html"}


def test_builtin_is_a_source_of_initial_weights(builtin, here):
    source = load_source("builtin")
    assert_equal(source.params, builtin[2])
    assert source.weights.path == str(FOLDER.resolve())
    check_other("builtin", epath.Path("builtin"))  # a folder of this name is another model
