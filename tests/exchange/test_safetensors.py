"""Exported folders and files: what they hold, how they load, and what is refused."""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from helpers import assert_equal, flip
from safetensors.numpy import load_file, save, save_file

from charlstm.cli import folders
from charlstm.errors import UserError
from charlstm.exchange import folder as folder_module
from charlstm.exchange import safetensors
from charlstm.exchange.card import metrics_of, model_card
from charlstm.exchange.export import export, load_trained
from charlstm.exchange.weights import flatten
from charlstm.files import write_file
from charlstm.runs.checkpoints import load_model
from charlstm.runs.folder import _checksum, load_run
from charlstm.runs.metrics import read_records
from charlstm.training.loop import train

pytestmark = pytest.mark.usefixtures("cheaply")

RUN = ROOT / "tests" / "fixtures" / "run_schema_1"
NAMES = {"README.md", "config.json", "model.safetensors", "prompts.json", "vocab.json"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the run, and its exports as a folder and as one file."""
    home = tmp_path_factory.mktemp("exported")
    folder, file = (
        export(RUN, "safetensors", home / "book"),
        export(RUN, "safetensors", home / "book.safetensors"),
    )
    return load_model(RUN), Path(folder), Path(file)


def texts_of(path):
    """Return the text files by the definition of the format: 8 bytes of length, then JSON."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["charlstm"])


def assert_refused(path, pattern, reader=load_model):
    with pytest.raises(UserError, match=pattern) as caught:
        reader(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "file", "weights"])
def test_export_loads_as_the_run_does(kind, exported):
    (run, model, params), folder, file = exported
    path = {"folder": folder, "file": file, "weights": folder / "model.safetensors"}[kind]
    found, found_model, found_params = load_model(path)
    assert found == run._replace(workdir=path)
    assert found_model == model
    assert_equal(found_params, params)


def test_files_are_those_of_the_hub(exported):
    (_, _, params), folder, file = exported
    assert {path.name for path in folder.iterdir()} == NAMES
    assert_equal(load_file(folder / "model.safetensors"), flatten(params))
    assert_equal(load_file(file), flatten(params))
    files = {name: (folder / name).read_text() for name in NAMES - {"model.safetensors"}}
    # The cards differ in the title and the path.
    assert texts_of(file).keys() == files.keys()
    for name in files.keys() - {"README.md"}:
        assert texts_of(file)[name] == files[name]
    assert json.loads(files["config.json"])["model_type"] == "charlstm"


def test_model_card_has_the_metrics_of_the_best_checkpoint(exported):
    (run, _, params), folder, _ = exported
    card = (folder / "README.md").read_text()
    _, front, _ = card.split("---\n", 2)
    assert "library_name: charlstm\n" in front
    records = read_records(epath.Path(RUN) / "metrics.jsonl")
    best = min(record["val/bits_per_char"] for record in records if "val/loss" in record)
    cells = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card, re.MULTILINE))
    assert cells["held-out bits per character"] == f"{best:.3f}"
    assert cells["parameters"] == f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"
    assert cells["distinct characters"] == str(len(run.vocab))
    assert load_trained(epath.Path(folder)).metrics["val/bits_per_char"] == best


def test_metrics_are_those_of_the_best_or_the_last_record():
    records = [{"step": 1, "val/loss": 2.0}, {"step": 2, "val/loss": 1.0}, {"step": 3}]
    records += [{"step": 4, "val/loss": float("nan")}]
    assert metrics_of(records, "best")["step"] == 2
    assert metrics_of(records, "latest")["step"] == 4
    assert metrics_of(records[2:3], "best")["step"] == 3
    assert metrics_of([], "best") == {}


def test_text_in_a_model_card_adds_no_markup(exported):
    run = exported[0][0]
    source = "/books/a`|b\n# <script>"
    metrics = {"prompt": "a\n", "sample": "```\n# title\n<b>\x1b[31m"}
    text = run.text._replace(source=source)
    card = model_card(run._replace(text=text), metrics, 5, "<i>|", "", "")
    assert not re.search(r"^(# (?!-i--)|<|```)", card.split("---\n", 2)[2], re.MULTILINE)
    assert "\x1b" not in card
    assert "`a'/b # <script>`" in card


def test_float16_halves_the_file_and_rounds_the_weights(exported, tmp_path):
    (_, _, params), _, file = exported
    path = Path(export(RUN, "safetensors", tmp_path / file.name, weights="float16"))
    found = load_model(path)[2]
    assert_equal(found, jax.tree.map(lambda leaf: np.float32(np.float16(leaf)), params))
    num_values = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert file.stat().st_size - path.stat().st_size == pytest.approx(2 * num_values, abs=200)
    # An export in float32 has the rounded weights.
    assert_equal(load_model(export(path, "safetensors", tmp_path / "whole"))[2], found)
    trained = load_trained(RUN)
    large = trained._replace(params=jax.tree.map(lambda leaf: leaf + 1e5, trained.params))
    with pytest.raises(UserError, match="too large for float16"):
        safetensors.export(large, epath.Path(tmp_path / "large"), weights="float16")
    assert not (tmp_path / "large").exists()


def test_export_of_an_export_is_the_same(exported, tmp_path):
    _, folder, file = exported
    twice = Path(export(folder, "safetensors", tmp_path / file.name))
    assert twice.read_bytes() == file.read_bytes()
    again = export(file, "safetensors", tmp_path / "book")
    assert {path.name: path.read_bytes() for path in Path(again).iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_only_an_earlier_export_is_replaced(exported, tmp_path):
    _, folder, file = exported
    for source in (folder, file):
        target = tmp_path / source.name
        assert Path(export(RUN, "safetensors", target)) == target
        assert Path(export(RUN, "safetensors", target)) == target
        assert_equal(load_model(target)[2], load_model(source)[2])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "poem.txt").write_text("x")
    for name, content in (("a", b"poem"), ("b", save({"x": np.zeros(2, np.float32)}))):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    shutil.copytree(RUN, tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("mine", "a.safetensors", "b.safetensors", "run"):
        with pytest.raises(UserError, match=f"{name}: .*choose another --out"):
            export(RUN, "safetensors", tmp_path / name)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_interrupted_export_can_be_repeated(exported, tmp_path, monkeypatch):
    target, calls = epath.Path(tmp_path / "book"), []

    def write_two(path, content):
        calls.append(path)
        if len(calls) > 2:
            raise KeyboardInterrupt
        write_file(path, content)

    monkeypatch.setattr(folder_module, "write_file", write_two)
    with pytest.raises(KeyboardInterrupt):
        export(RUN, "safetensors", target)
    monkeypatch.undo()
    assert_refused(target, "prompts.json: missing or damaged")
    export(RUN, "safetensors", target)
    assert_equal(load_model(target)[2], exported[0][2])


def test_name_that_is_not_utf_8_can_be_exported(tmp_path):
    target = epath.Path(tmp_path) / os.fsdecode(b"caf\xe9")
    assert_equal(load_model(export(RUN, "safetensors", target))[2], load_model(RUN)[2])


def test_export_is_not_a_run(exported, tmp_path, monkeypatch):
    run, folder, file = exported[0][0], *exported[1:]
    assert_refused(folder, "an exported model, not a run", lambda path: load_run(epath.Path(path)))
    for path in (folder, file):
        remedy = f"an exported model, not a run.*--config.init_from={re.escape(str(path))}"
        assert_refused(path, remedy, lambda path: train(run.config, path))
    (tmp_path / "book.txt").write_text("text")
    assert_refused(tmp_path / "book.txt", "a file", lambda path: train(run.config, path))
    assert_refused(folder, "leave out --checkpoint=latest", lambda path: load_model(path, "latest"))
    shutil.copytree(folder, tmp_path / "runs" / "exported")
    monkeypatch.chdir(tmp_path)
    assert folders.existing_runs() == []
    for path in exported[1:]:
        assert folders.trained_workdir(str(path)) == str(path)


def with_tensors(exported, path, change):
    """Write the exported file with changed tensors and metadata to `path`."""
    tensors, metadata = load_file(exported[2]), texts_of(exported[2])
    change(tensors, metadata)
    save_file(tensors, path, {"charlstm": json.dumps(metadata)})


def set_config(metadata, **entries):
    about = json.loads(metadata["config.json"])
    del about["checksum"]
    for key, value in entries.items():
        *sections, name = key.split("__")
        section = about
        for part in sections:
            section = section[part]
        section[name] = value
    metadata["config.json"] = json.dumps(about | {"checksum": _checksum(about)})


BIAS = "dense.bias"
CHANGES = {
    r"dense.bias is missing there": lambda t, m: t.pop(BIAS),
    r"extra is float32\(2,\) there and not used": lambda t, m: t.update(
        extra=np.zeros(2, np.float32)
    ),
    r"dense.bias is float32\(3,\) there": lambda t, m: t.update({BIAS: t[BIAS][:3]}),
    r"must be F32 or F16, and dense.bias is F64": lambda t, m: t.update(
        {BIAS: np.float64(t[BIAS])}
    ),
    r"dense.bias has values that are not finite": lambda t, m: t.update({BIAS: t[BIAS] * np.nan}),
    r"the checksum of a weight differs": lambda t, m: t.update({BIAS: t[BIAS] + 1}),
    r"no vocab.json in its metadata": lambda t, m: m.pop("vocab.json"),
    r"prompts.json: missing or damaged": lambda t, m: m.update({"prompts.json": "\ud800"}),
    r"the entry charlstm": lambda t, m: m.update({"vocab.json": 3}),
    r"vocab.json: its checksum differs": lambda t, m: m.update({"vocab.json": '["a", "b"]'}),
    r"schema 2 there and 1 here": lambda t, m: set_config(m, schema=2),
    r"values for 99999999 layers of 8 units": lambda t, m: set_config(
        m, config__model__num_layers=99999999
    ),
    r"values for 2 layers of 2147483647 units": lambda t, m: set_config(
        m, config__model__hidden_size=2**31 - 1
    ),
    r"lstm_0.hf.bias is float32\(8,\) there and float32\(9,\)": lambda t, m: set_config(
        m, config__model__hidden_size=9
    ),
}


@pytest.mark.parametrize("pattern", CHANGES)
def test_changed_file_is_refused(pattern, exported, tmp_path):
    path = tmp_path / "changed.safetensors"
    with_tensors(exported, path, CHANGES[pattern])
    assert_refused(path, pattern)


def test_file_of_another_kind_is_refused(exported, tmp_path):
    raw = exported[2].read_bytes()
    wrong = {
        "empty": b"",
        "text": b"It was a dark night. " * 9,
        "cut": raw[:-1],
        "cut header": raw[:100],
        "long": raw + b"x",
        "huge header": (2**62).to_bytes(8, "little") + raw[8:],
        "deep header": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    }
    for name, content in wrong.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        assert_refused(path, "not an exported model, or damaged")
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match=r"config\.json: missing or damaged \(no such file\)"):
        load_model(tmp_path / "foreign.safetensors")
    (tmp_path / "book.txt").write_text("text")
    assert_refused(tmp_path / "book.txt", "a format that charlstm does not read")


def test_damaged_folder_is_refused(exported, tmp_path):
    for name in NAMES - {"README.md"}:
        folder = tmp_path / name
        shutil.copytree(exported[1], folder)
        (folder / name).unlink()
        assert_refused(folder, "missing or damaged|without its weights|not a run")
        (folder / name).write_text("{}")
        assert_refused(folder, "damaged|restore the file")


def test_flipped_bit_is_refused_or_harmless(exported, tmp_path):
    path = tmp_path / "book.safetensors"
    num_refused = 0
    for place in np.random.default_rng(0).integers(0, 10**9, size=20):
        shutil.copy(exported[2], path)
        flip(path, int(place))
        try:
            run, _, params = load_model(path)
        except UserError:
            num_refused += 1
        else:
            assert run.vocab == exported[0][0].vocab
            assert_equal(params, exported[0][2])
    assert num_refused > 10  # the card has no checksum
