"""Any input gives a correct result or an error of one clear line.

pytest --hypothesis-profile=long tests/runs/test_fuzz.py tries forty times as many examples.
"""

import json
import shutil
from functools import lru_cache

import jax
import numpy as np
import pytest
from etils import epath
from helpers import config_with, flip, small_config, untrained_run
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from charlstm import CharLSTM, zero_carry
from charlstm.cli import options
from charlstm.config import base_config, flatten
from charlstm.config_check import validate
from charlstm.data.batches import Streams, Windows, evaluation_batches, split, training_batches
from charlstm.data.corpus import open_corpus
from charlstm.data.vocab import Vocab
from charlstm.errors import DamagedError, UserError, one_line, printable
from charlstm.runs.checkpoints import load_model
from charlstm.runs.checksums import checksum_of, read_metadata
from charlstm.runs.folder import _checksum, load_run
from charlstm.runs.metrics import RunLog, read_records
from charlstm.streaming import stream
from charlstm.training.progress import Counters

NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 2**31, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)
ANY_TEXT = st.text(st.characters(codec=None), max_size=300)  # lone surrogates too


def assert_clear(error):
    """Assert that an error is one line, not too long, and without control characters."""
    line = one_line(error)
    assert line
    assert len(line) <= 1000
    assert "\n" not in line
    assert printable(line) == line


@pytest.fixture(scope="module")
def folder(tmp_path_factory, book):
    """Return a folder with the run run/ and its text."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "book.txt").write_text(book, encoding="utf-8")
    untrained_run(small_config(folder / "book.txt"), folder / "run")
    log = RunLog(epath.Path(folder / "run"), 0, "run")
    log.write({"step": 1, "train/loss": 3.0})
    log.close()
    return folder


@given(st.binary(max_size=500) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_a_text_or_an_error(folder, raw):
    (folder / "any.txt").write_bytes(raw)
    try:
        text = open_corpus(base_config().data, str(folder / "any.txt"))
    except UserError as error:
        assert_clear(error)
        return
    content = text.vocab.decode(text.ids_M)
    # Headers of Project Gutenberg are unlikely here.
    decoded = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    assert content == decoded.replace("\r\n", "\n").replace("\r", "\n")
    assert text.vocab.characters == Vocab.from_text(content).characters


@given(
    st.text(min_size=2, max_size=300),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["streams", "windows"]),
    st.floats(0, 0.99),
)
def test_batches_of_any_sizes_count_each_target_once(
    text, batch_size, seq_len, order, val_fraction
):
    config = config_with(
        {
            "batch_size": batch_size,
            "seq_len": seq_len,
            "data.order": order,
            "data.val_fraction": val_fraction,
        }
    )
    try:
        ids = Vocab.from_text(text).encode(text)
        train_ids, val_ids = split(ids, config.data)
        batches = training_batches(train_ids, config)
        evaluation = evaluation_batches(val_ids, config) if val_fraction else None
    except UserError as error:
        assert_clear(error)
        return
    assert isinstance(batches, Windows if order == "windows" else Streams)
    steps = np.arange(batches.steps_per_epoch)
    count = batches(steps).weights_BT.sum()
    assert count == (len(train_ids) - 1 if order == "streams" else batches.num_windows * seq_len)
    if evaluation:
        first = seq_len if order == "windows" else 1
        count = evaluation(np.arange(evaluation.steps_per_epoch)).weights_BT.sum()
        assert count == len(val_ids) - first


@given(st.sampled_from(sorted(flatten(base_config()))), JSON)
def test_any_setting_is_valid_or_an_error(key, value):
    try:
        config = config_with({key: value})
    except ValueError:  # of ConfigDict, for a dot in a name
        reject()
    try:
        validate(config)
    except UserError as error:
        assert_clear(error)
        return
    assert type(value) is type(flatten(base_config())[key])
    if isinstance(value, float):
        assert np.isfinite(value)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
KEYS = st.sampled_from([*flatten(base_config()), "model", "batchsize", "x" * 50, ""])


@given(st.lists(st.builds("--config.{}={}".format, KEYS, WORDS) | WORDS, max_size=4))
def test_any_command_line_is_parsed_or_an_error(words):
    try:
        normal = options.normalise(["train.py", *words])
        assert normal[0] == "train.py"
    except UserError as error:
        assert_clear(error)


@given(
    name=st.sampled_from(["config.json", "vocab.json", "prompts.json"]),
    content=JSON.map(json.dumps).map(str.encode) | st.binary(max_size=200),
)
def test_any_content_of_a_run_file_is_an_error(folder, name, content):
    path = folder / "run" / name
    original = path.read_bytes()
    try:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_run(epath.Path(folder / "run"))
        assert_clear(caught.value)
    finally:
        path.write_bytes(original)


@given(st.sampled_from(sorted(flatten(base_config()))), JSON)
def test_any_setting_with_checksum_loads_or_is_an_error(folder, key, value):
    path = folder / "run" / "config.json"
    original = path.read_bytes()
    about = json.loads(original)
    del about["checksum"]
    *sections, name = key.split(".")
    (about["config"][sections[0]] if sections else about["config"])[name] = value
    try:
        path.write_text(json.dumps(about | {"checksum": _checksum(about)}))
        load_model(folder / "run")
    except UserError as error:
        assert_clear(error)
    finally:
        path.write_bytes(original)


cached_model = lru_cache(load_model)


@given(st.sampled_from(["config", "text", "versions", "devices", "sha256", "schema"]), JSON)
def test_any_config_with_checksum_loads_or_is_an_error(folder, key, value):
    path = folder / "run" / "config.json"
    original = path.read_bytes()
    about = json.loads(original) | {key: value}
    del about["checksum"]
    try:
        path.write_text(json.dumps(about | {"checksum": _checksum(about)}))
        load_run(epath.Path(folder / "run"))
    except UserError as error:
        assert_clear(error)
    finally:
        path.write_bytes(original)


NAMES = [
    "metadata",
    "loss",
    "crc32",
    "seconds",
    "since_log",
    "since_eval",
    "nonfinite_steps",
    "grad_norm",
]


@given(st.sampled_from(NAMES), JSON)
def test_any_metadata_with_checksum_load_or_are_an_error(folder, name, value):
    checkpoint = epath.Path(folder / "run" / "checkpoints" / "0")
    path = checkpoint / "metadata" / "metadata"
    original = path.read_bytes()
    record = json.loads(original)
    del record["checksum"]
    (record if name in record else record["metadata"])[name] = value
    try:
        path.write_text(json.dumps(record | {"checksum": checksum_of(record)}))
        Counters.from_json(read_metadata(checkpoint)["metadata"])
        load_model(folder / "run")
    except UserError as error:
        assert_clear(error)
    finally:
        path.write_bytes(original)


@settings(max_examples=settings().max_examples // 4)  # each takes a third of a second
@given(number=st.integers(0, 10**6), place=st.integers(0, 10**9), kind=st.integers(0, 3))
def test_any_damage_to_a_run_is_an_error_or_harmless(folder, number, place, kind, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(folder / "run", workdir)
    files = sorted(path for path in workdir.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[number % len(files)]
    if kind < 2:
        flip(path, place)
    elif kind == 2:
        path.write_bytes(path.read_bytes()[: place % path.stat().st_size])
    else:
        path.unlink()
    original = cached_model(folder / "run")
    try:
        run, model, params = load_model(workdir)
        assert model == original[1]
        assert run.vocab.characters == original[0].vocab.characters
        jax.tree.map(np.testing.assert_array_equal, params, original[2])
        read_records(epath.Path(workdir / "metrics.jsonl"))
    except UserError as error:
        assert_clear(error)
    shutil.rmtree(workdir.parent)


@given(st.lists(JSON.map(json.dumps).map(str.encode) | st.binary(max_size=50), max_size=4))
def test_any_metrics_file_is_read_or_an_error(folder, lines):
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        assert len(read_records(epath.Path(path))) <= len(b"\n".join(lines).splitlines())
    except DamagedError as error:
        assert_clear(error)


MODEL = CharLSTM(vocab_size=5, hidden_size=4)


@pytest.fixture(scope="module")
def params():
    init = jax.jit(lambda key: MODEL.init(key, np.zeros((1, 1), int), zero_carry(MODEL, 1)))
    return init(jax.random.key(0))["params"]


@settings(max_examples=settings().max_examples // 2)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    length=st.integers(1, 30),
    temperature=st.floats(0, 100) | st.sampled_from([1e-30, 1e30]),
    top_k=st.integers(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    chunk=st.integers(1, 50),
)
def test_any_sampler_settings_give_ids_of_the_vocabulary(
    params, lengths, length, temperature, top_k, top_p, min_p, chunk
):
    key = jax.random.key(0)
    prompts = [np.arange(size) % 5 for size in lengths]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options["chunk"] = chunk
    ids = np.concatenate(list(stream(MODEL, params, prompts, key, length=length, **options)), 1)
    assert ids.shape == (3, length)
    assert ids.min() >= 0
    assert ids.max() < 5


@given(ANY_TEXT)
def test_printable_removes_all_control_characters(text):
    shown = printable(text)
    assert "\x1b" not in shown
    assert all(char in "\t\n" or not 0 <= ord(char) < 32 for char in shown)
    shown.encode()  # no lone surrogates
    if text.isprintable():
        assert shown == text
