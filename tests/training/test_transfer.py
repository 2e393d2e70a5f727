"""A run starts from the weights of another, character by character."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from helpers import (
    QUICK,
    assert_close,
    assert_equal,
    flip,
    no_pictures_and_samples,
    records_of,
    small_config,
    stop_after,
)
from helpers import untrained_run as saved_run

from charlstm.config import flatten
from charlstm.data.vocab import END, UNKNOWN
from charlstm.errors import UserError
from charlstm.exchange.export import export
from charlstm.model import CharLSTM, predict, zero_carry
from charlstm.runs.checkpoints import load_model, steps_in
from charlstm.runs.folder import load_run, write_run
from charlstm.training.loop import train
from charlstm.training.setup import prepare
from charlstm.training.transfer import (
    hash_params,
    load_source,
    reload_source,
    transfer_params,
    vocab_axes,
)

# V differs from H and E, so that swapped axes have other shapes.
H, E = 6, 4
OLD = f"{END}Zabcefxy{UNKNOWN}"
NEW = f"{END}Abcdfgyàéz{UNKNOWN}"
# New characters, and the known ones whose parameters they have: another case, no accent, both.
ADDED = {"A": "a", "d": None, "g": None, "à": "a", "é": "e", "z": "Z"}
KINDS = {
    "one_hot": {"multiplicative": True, "recurrent_rms_norm": True},
    "one_hot, two layers": {"num_layers": 2},
    "embed": {"input": "embed", "embed_size": E, "multiplicative": True},
    "tied": {"input": "embed", "embed_size": E, "tie_embeddings": True},
}
# The run of the fixtures, whose settings differ from the defaults of small_config.
FIXTURE = ROOT / "tests" / "fixtures" / "run_schema_1"
PLAIN = QUICK | {"data.val_fraction": 0.0}
FIXTURE_MODEL = {
    f"model.{name}": value
    for name, value in flatten(load_run(epath.Path(FIXTURE)).config.model).items()
}


def make_model(vocab, **fields):
    end_id = vocab.index(END) if END in vocab else None
    return CharLSTM(len(vocab), H, end_id=end_id, recurrence="flax", **fields)


def draw_params(model, seed):
    """Return random parameters, biases included, as after training."""

    def init():
        ids_BT = jnp.zeros((1, 1), jnp.int32)
        return model.init(jax.random.key(0), ids_BT, zero_carry(model, 1))["params"]

    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.5, leaf.shape)), shapes)


compiled = jax.jit(predict, static_argnums=0)


def logits_of(model, params, vocab, text):
    """Return a dict from each character to its logits_T after the characters of `text`."""
    ids_BT = np.array([[vocab.index(character) for character in text]], np.int32)
    carry = tuple((np.zeros((1, H), np.float32),) * 2 for _ in range(model.num_layers))
    logits_BTV, _ = compiled(model, params, ids_BT, carry)
    logits_TV = np.asarray(logits_BTV)[0]
    return {character: logits_TV[:, id] for id, character in enumerate(vocab)}


def rows_of(params, index, kind):
    """Return all parameters of the character with the id `index`, by their names."""
    tied = KINDS[kind].get("tie_embeddings")
    first, dense = params["lstm_0"], params["dense"]
    rows = {"bias": params["bias"][index] if tied else dense["bias"][index]}
    if not tied:
        rows["output"] = dense["kernel"][:, index]
    if "embed" in params:
        return rows | {"embedding": params["embed"]["embedding"][index]}
    names = [name for name in first if name in ("ii", "if", "ig", "io", "scale")]
    return rows | {name: first[name]["kernel"][index] for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_follow_their_character(kind):
    old, new = make_model(OLD, **KINDS[kind]), make_model(NEW, **KINDS[kind])
    params, fresh = draw_params(old, 0), draw_params(new, 1)
    before = jax.tree.map(np.copy, (params, fresh))
    moved, added, dropped = transfer_params(params, OLD, fresh, NEW, vocab_axes(new))
    assert_equal((params, fresh), before)
    assert (added, dropped) == (ADDED, list("Zaex"))
    for index, character in enumerate(NEW):
        origin = ADDED.get(character, character)
        wanted = (params, OLD.index(origin)) if origin else (fresh, index)
        assert_equal(rows_of(moved, index, kind), rows_of(*wanted, kind))
    # Parameters that belong to no character have the same shape for any vocabulary.
    for leaf, trained in zip(*map(jax.tree.leaves, (moved, params)), strict=True):
        if not {len(OLD), len(NEW)} & set(trained.shape + leaf.shape):
            assert_equal(leaf, trained)


@pytest.mark.parametrize("kind", ["one_hot", "tied"])
def test_same_or_reordered_characters_keep_the_logits(kind, cheaply):
    model = make_model(OLD, **KINDS[kind])
    params, fresh = draw_params(model, 0), draw_params(model, 1)
    same, *lists = transfer_params(params, OLD, fresh, OLD, vocab_axes(model))
    assert lists == [{}, []]
    assert_equal(same, params)
    shuffled = OLD[:1] + OLD[4:] + OLD[1:4]  # the end of a document keeps its id
    reordered, *lists = transfer_params(params, OLD, fresh, shuffled, vocab_axes(model))
    assert lists == [{}, []]
    text = f"xac{UNKNOWN}{END}Z"
    found = logits_of(model, reordered, shuffled, text)
    assert_close(found, logits_of(model, params, OLD, text))


def test_texts_without_a_common_character_keep_only_the_rest():
    model = make_model("ab")
    params, fresh = draw_params(model, 0), draw_params(model, 1)
    moved, *lists = transfer_params(params, "ab", fresh, "cd", vocab_axes(model))
    assert lists == [{"c": None, "d": None}, list("ab")]
    assert_equal(moved["dense"], fresh["dense"])
    assert_equal(moved["lstm_0"]["hi"], params["lstm_0"]["hi"])


# --- runs ---


@pytest.fixture(autouse=True)
def _no_pictures_and_samples():
    with no_pictures_and_samples():
        yield


@pytest.fixture
def other_path(book, tmp_path):
    """Return a text with characters that the runs of these tests do not know, and others."""
    path = tmp_path / "other.txt"
    path.write_text(book.replace("blood", "café!").replace("L", "Ł"), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path):
    """Return a copy of the run of the fixtures, whose text is `book`."""
    return shutil.copytree(FIXTURE, tmp_path / "source")


def config_from(source, path, **changes):
    return small_config(path, **FIXTURE_MODEL | {"init_from": str(source)} | changes)


def test_run_starts_from_the_weights_and_resumes_without(
    book_path, other_path, tmp_path, cheaply, caplog
):
    source = tmp_path / "source"
    vocab = saved_run(small_config(book_path, **PLAIN), source).vocab
    params = load_model(source)[2]
    caplog.set_level("INFO", "charlstm")
    config = small_config(other_path, init_from=str(source), num_steps=4, **PLAIN)
    assert train(config, tmp_path / "whole")
    # As after a kill before the first checkpoint.
    parts = epath.Path(tmp_path / "parts")
    parts.mkdir()
    write_run(prepare(config, parts).run)
    assert not train(config, parts, should_stop=stop_after(1))
    assert steps_in(parts / "checkpoints") == [0]
    shutil.rmtree(source)

    # The average, too, which load_model returns, starts at the loaded weights.
    run, _, started = load_model(parts)
    for index, character in enumerate(run.vocab):
        if character in vocab:
            wanted = rows_of(params, vocab.characters.index(character), "one_hot")
            assert_equal(rows_of(started, index, "one_hot"), wanted)
    assert_equal(started["lstm_0"]["hi"], params["lstm_0"]["hi"])
    dropped = set(vocab) - set(run.vocab)
    for listed in ("!fŁ", "é (e)", "".join(sorted(dropped))):
        assert any(repr(listed) in line for line in caplog.messages), listed
    about = json.loads((parts / "config.json").read_text())
    assert about["config"]["init_from"] == str(source)
    assert about["initial_weights"] == {
        "path": str(source.resolve()),
        "sha256": hash_params(params),
    }

    assert train(config, parts)
    assert_equal(*(load_model(folder, "latest")[2] for folder in (parts, tmp_path / "whole")))
    assert records_of(parts) == records_of(tmp_path / "whole")
    assert json.loads((parts / "config.json").read_text()) == about


def test_start_without_a_checkpoint_needs_the_same_weights(source, book_path, tmp_path):
    run = prepare(config_from(source, book_path), epath.Path(tmp_path / "run")).run
    assert reload_source(run).weights == run.initial_weights
    shutil.rmtree(source)
    with pytest.raises(UserError, match=f"init_from={source}"):
        reload_source(run)
    saved_run(small_config(book_path, **PLAIN), source)
    with pytest.raises(UserError, match=f"init_from={source}.*changed"):
        reload_source(run)


def test_exported_file_has_the_weights_of_its_run(source, tmp_path):
    export(source, "safetensors", tmp_path / "x.safetensors")
    found, wanted = load_source(str(tmp_path / "x.safetensors")), load_source(str(source))
    assert found.weights.sha256 == wanted.weights.sha256
    assert_equal(found.params, wanted.params)
    assert (found.vocab, found.config) == (wanted.vocab, wanted.config)


def test_unset_settings_are_those_of_the_initial_weights(source, book_path, tmp_path):
    config = small_config(book_path, init_from=str(source))
    config.model.recurrence = "flax"  # is a matter of the machine
    fixed = {"model.hidden_size", "model.dropout_rate"}
    changes = {"model.hidden_size": FIXTURE_MODEL["model.hidden_size"], "model.dropout_rate": 0.5}
    config.update_from_flattened_dict(changes)
    run = prepare(config, epath.Path(tmp_path / "run"), FIXTURE_MODEL.keys() - fixed).run
    found = {f"model.{key}": value for key, value in flatten(run.config.model).items()}
    assert found == FIXTURE_MODEL | changes | {"model.recurrence": "flax"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.hidden_size", 9),
        ("model.num_layers", 1),
        ("model.input", "embed"),
        ("model.multiplicative", False),
        ("model.norm_epsilon", 0.2),
        ("model.dtype", "bfloat16"),
    ],
)
def test_another_model_is_refused_by_setting(key, value, source, other_path, tmp_path):
    config = config_from(source, other_path, **{key: value})
    with pytest.raises(UserError) as caught:
        prepare(config, epath.Path(tmp_path / "run"))
    for part in (f"config.{key}={value}", str(FIXTURE_MODEL[key]), str(source)):
        assert part in str(caught.value)


def test_places_in_another_vocabulary_are_refused(book_path, other_path, tmp_path):
    changes = PLAIN | {"model.input": "scaled"}
    source = tmp_path / "scaled"
    saved_run(small_config(book_path, **changes), source)
    folder = epath.Path(tmp_path / "run")
    same, other = (
        small_config(path, init_from=str(source), **changes) for path in (book_path, other_path)
    )
    assert prepare(same, folder).initial
    with pytest.raises(UserError, match=r"init_from=.*scaled"):
        prepare(other, folder)


def test_sources_without_usable_weights_are_refused(source, other_path, tmp_path):
    def refusal(init_from, workdir="run"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as caught:
            prepare(config_from(init_from, other_path), epath.Path(tmp_path / workdir))
        assert sorted(tmp_path.rglob("*")) == before
        assert f"config.init_from={init_from}: " in str(caught.value)
        return str(caught.value)

    assert "no run" in refusal(tmp_path / "none")
    assert "folder" in refusal(other_path)
    assert "itself" in refusal(source, "source")
    assert "itself" in refusal(tmp_path / "run")
    saved_run(small_config(other_path, **PLAIN), tmp_path / "new", steps=())
    assert "no checkpoint" in refusal(tmp_path / "new")
    largest = max((source / "checkpoints").rglob("*"), key=lambda path: path.stat().st_size)
    flip(largest, 8 * 600)
    assert "damaged" in refusal(source)
