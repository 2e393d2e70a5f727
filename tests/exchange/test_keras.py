"""Plain LSTMs as a Keras model, and back."""

import io
import json
import shutil
import zipfile

import jax
import numpy as np
import pytest
from etils import epath
from exchanging import logits_of, plain_trained
from helpers import assert_equal

from charlstm.errors import UserError
from charlstm.exchange.keras import export, from_keras, to_keras
from charlstm.exchange.plain import from_plain, to_plain
from charlstm.lstm import native_library
from charlstm.runs.checkpoints import load_model

keras = pytest.importorskip("keras")
# Keras calls NumPy in a way that newer versions deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.usefixtures("rank_promotion", "cheaply"),
]

ONE_HOT = {"model.input": "one_hot", "model.num_layers": 2}
EMBED = {"model.input": "embed", "model.embed_size": 6}


@pytest.fixture(scope="module")
def exported(book, tmp_path_factory):
    """Return a trained plain LSTM and the folder of its export."""
    home = tmp_path_factory.mktemp("keras")
    (home / "book.txt").write_text(book)
    trained = plain_trained(home / "book.txt", home / "run", **EMBED)
    with jax.numpy_rank_promotion("allow"):
        export(trained, epath.Path(home / "keras"))
    return trained, home / "keras"


def logits_in_keras(model, ids_BT):
    return np.asarray(model(ids_BT, training=False))


def random_ids(vocab, seed=1):
    return np.random.default_rng(seed).integers(0, len(vocab), (2, 12)).astype(np.int32)


def test_keras_computes_the_same_logits(book_path, tmp_path):
    trained = plain_trained(book_path, tmp_path / "run", **ONE_HOT)
    ids_BT = random_ids(trained.run.vocab)
    model = to_keras(to_plain(trained.run, trained.params))
    wanted_BTV = logits_in_keras(model, ids_BT)
    found_BTV = logits_of(trained.model, trained.params, ids_BT)
    assert np.ptp(wanted_BTV) > 1
    np.testing.assert_allclose(found_BTV, wanted_BTV, atol=1e-5)
    assert_equal(from_plain(from_keras(model))[1], jax.device_get(trained.params))


def test_export_loads_as_the_run_and_in_keras(exported):
    trained, folder = exported
    run, _, params = load_model(folder)
    assert_equal(params, jax.device_get(trained.params))
    assert run.vocab == trained.run.vocab
    ids_BT = random_ids(run.vocab)
    model = keras.saving.load_model(folder / "model.keras")
    np.testing.assert_allclose(
        logits_in_keras(model, ids_BT), logits_of(trained.model, params, ids_BT), atol=1e-5
    )


def test_model_trained_in_keras_has_the_same_logits_here(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(native_library, "choose", lambda *args: "fused")  # nothing to compile
    trained, folder = exported
    vocab = trained.run.vocab
    keras.utils.set_random_seed(0)
    # Another model than an export: a Sequential with dropout and a softmax.
    layers = [
        keras.layers.Embedding(len(vocab), 6),
        keras.layers.LSTM(6, return_sequences=True, dropout=0.1),
        keras.layers.Dropout(0.1),
        keras.layers.LSTM(6, return_sequences=True),
        keras.layers.Dense(len(vocab), activation="softmax"),
    ]
    model = keras.Sequential([keras.Input((12,), dtype="int32"), *layers])
    model.compile(keras.optimizers.SGD(5.0), "sparse_categorical_crossentropy")
    ids_BT = random_ids(vocab)
    before = model.get_weights()[-1].copy()
    for _ in range(3):
        model.train_on_batch(ids_BT, ids_BT)
    assert np.max(np.abs(model.get_weights()[-1] - before)) > 0.1
    model.save(tmp_path / "own.keras")
    shutil.copy(folder / "vocab.json", tmp_path)
    _, found, params = load_model(tmp_path / "own.keras")
    found_BTV = jax.nn.log_softmax(logits_of(found, params, ids_BT))
    wanted_BTV = np.log(logits_in_keras(model, ids_BT))
    np.testing.assert_allclose(found_BTV, wanted_BTV, atol=1e-5)


def test_other_models_are_refused():
    lstm = keras.layers.LSTM
    others = {
        "GRU": [keras.layers.Embedding(9, 6), keras.layers.GRU(6), keras.layers.Dense(9)],
        "activation='relu'": [keras.layers.Embedding(9, 6), lstm(6, activation="relu")],
        "mask_zero=True": [keras.layers.Embedding(9, 6, mask_zero=True), lstm(6)],
        "use_bias=False": [keras.layers.Embedding(9, 6), lstm(6, use_bias=False)],
        "activation='tanh' of the layer dense": [
            keras.layers.Embedding(9, 6),
            keras.layers.Dense(9, activation="tanh"),
        ],
        r"its layers \(Embedding, LSTM\)": [keras.layers.Embedding(9, 6), lstm(6)],
    }
    for reason, layers in others.items():
        model = keras.Sequential([keras.Input((None,), dtype="int32"), *layers])
        with pytest.raises(UserError, match=reason):
            from_keras(model)
    with pytest.raises(UserError, match="it was never called"):
        from_keras(keras.Sequential([keras.layers.Embedding(9, 6), lstm(6)]))
    ids_BT = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(9, 6)(ids_BT)
    hidden = lstm(6, return_sequences=True)(embedded)
    with pytest.raises(UserError, match="because of the layer add"):
        from_keras(keras.Model(ids_BT, keras.layers.Dense(9)(hidden + embedded)))


def rewritten(raw, **changed):
    """Return the bytes of a .keras file with other members."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive, zipfile.ZipFile(output, "w") as copy:
        for member in archive.infolist():
            content = archive.read(member)
            name = member.filename
            copy.writestr(name, changed.pop(name.split(".")[0], lambda text: text)(content))
        for name, content in changed.items():
            copy.writestr(name, content)
    return output.getvalue()


def test_hostile_file_is_refused_before_keras_reads_it(exported, tmp_path, monkeypatch):
    raw = (exported[1] / "model.keras").read_bytes()
    shutil.copy(exported[1] / "vocab.json", tmp_path)
    monkeypatch.setattr(keras.saving, "load_model", lambda *args, **options: pytest.fail("read"))

    def other_class(module, name):
        def change(content):
            config = json.loads(content)
            config["config"]["layers"][1] |= {"module": module, "class_name": name}
            return json.dumps(config).encode()

        return change

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, b" " * 10**6)
    wrong = {
        "because of keras.layers.Lambda": rewritten(
            raw, config=other_class("keras.layers", "Lambda")
        ),
        "because of subprocess.Popen": rewritten(raw, config=other_class("subprocess", "Popen")),
        "because of subprocess.LSTM": rewritten(raw, config=other_class("subprocess", "LSTM")),
        "not JSON|damaged": rewritten(raw, config=lambda content: content[:-5]),
        "deep|damaged": rewritten(raw, config=lambda content: b"[" * 10**5),
        "not an object": rewritten(raw, config=lambda content: b"[]"),
        "not the files": rewritten(raw, **{"../evil": b"x"}),
        "compressed": bomb.getvalue(),
        "not a zip": raw[:100],
        "not a zip file": b"",
    }
    for reason, content in wrong.items():
        path = tmp_path / "wrong.keras"
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason) as caught:
            load_model(path)
        assert str(path) in str(caught.value)


def test_damaged_weights_are_refused(exported, tmp_path):
    raw = (exported[1] / "model.keras").read_bytes()
    shutil.copy(exported[1] / "vocab.json", tmp_path)
    (tmp_path / "cut.keras").write_bytes(rewritten(raw, model=lambda content: content[:5000]))
    with pytest.raises(UserError, match=r"cut.keras: not an exported model, or damaged"):
        load_model(tmp_path / "cut.keras")
