"""Exchange plain LSTMs with Keras, as a .keras file.

The model maps ids_BT of any B and T to logits_BTV. It is not stateful, since that would fix B; a
stateful copy takes the same weights by set_weights. Keras has the gates in the order here and one
bias per gate.
"""

import io
import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from etils import epath

from charlstm.errors import UserError, one_line
from charlstm.exchange.folder import Trained, describe, write_folder
from charlstm.exchange.plain import PlainLayer, PlainLSTM, to_plain
from charlstm.exchange.weights import damaged
from charlstm.files import MAX_JSON_BYTES, is_file, parse_json, unreadable
from charlstm.system.extras import import_extra

SUFFIX = ".keras"
WEIGHTS = "model.keras"

_MEMBERS = {"metadata.json", "config.json", "model.weights.h5"}
# Keras imports the classes that a file names, so only these may be named.
_MODELS = {"Sequential", "Functional"}
_LAYERS = {"InputLayer", "OneHot", "Embedding", "LSTM", "Dropout", "Dense"}
_OTHERS = {"DTypePolicy", "__keras_tensor__"}
_HARMLESS_MODULES = {"keras.initializers", "keras.regularizers", "keras.constraints"}
_MODULES = {"keras", "keras.layers", "keras.src.models.functional", "keras.src.models.sequential"}
_MODULES |= {"keras.models", "keras.src.ops.nn", "None"}
# What the layers here do; a layer with other values is another one.
_WANTED: dict[str, dict[str, Any]] = {
    "Embedding": {"mask_zero": False},
    "LSTM": {
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "use_bias": True,
        "go_backwards": False,
    },
    "Dense": {"use_bias": True},
}

_FILES = "- `model.keras`: the model, in float32."
_LOADING = """
With Keras:

```python
import json

import keras

model = keras.saving.load_model("OUT/model.keras")  # ids_BT to logits_BTV
with open("OUT/vocab.json", encoding="utf-8") as file:
    characters = json.load(file)
```

charlstm reads this folder in place of a run folder, also after a model that was trained on has
replaced `model.keras`. A model of other characters needs a folder with its own `model.keras` and
`vocab.json`.
"""


def export(trained: Trained, out: epath.Path) -> None:
    """Write `trained` to the folder `out`.

    Raises:
      UserError: if the model is not a plain LSTM, or if `out` cannot be written.
    """
    model = to_keras(to_plain(trained.run, trained.params))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, WEIGHTS)
        model.save(path)
        weights = {WEIGHTS: path.read_bytes()}
    texts = describe(trained, out, _FILES, _LOADING)
    write_folder(texts, weights, out)


def read(path: epath.Path) -> PlainLSTM:
    """Return the weights of a .keras file.

    Raises:
      UserError: if its model is not a plain LSTM; Keras does not read a file with other classes.
      DamagedError: if it is no such file.
    """
    keras = _import_keras()
    try:
        if not is_file(path):
            raise damaged(path, "no such file")
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    _check_file(path, raw)
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, WEIGHTS)
        Path(copy).write_bytes(raw)  # what was checked
        try:
            model = keras.saving.load_model(copy, compile=False, safe_mode=True)
        except Exception as error:  # Keras raises errors of any type
            raise damaged(path, one_line(error)) from error
    return from_keras(model, str(path))


def to_keras(plain: PlainLSTM) -> Any:
    """Return a Keras model that maps ids_BT to logits_BTV."""
    keras = _import_keras()
    vocab_size = len(plain.bias_V)
    ids_BT = keras.Input((None,), dtype="int32")
    weights = []
    if plain.embedding_VE is None:
        layer = keras.ops.one_hot(ids_BT, vocab_size)
    else:
        layer = keras.layers.Embedding(*plain.embedding_VE.shape)(ids_BT)
        weights.append(plain.embedding_VE)
    for arrays in plain.layers:
        units = arrays.recurrent_kernel_HG.shape[0]
        layer = keras.layers.LSTM(units, return_sequences=True)(layer)
        weights += arrays
    model = keras.Model(ids_BT, keras.layers.Dense(vocab_size)(layer))
    model.set_weights([*weights, plain.kernel_HV, plain.bias_V])
    return model


def from_keras(model: Any, name: str = "the Keras model") -> PlainLSTM:
    """Return the weights of a Keras model.

    Args:
      model: a chain of at most one Embedding or one_hot, layers LSTM, and one Dense, which may have
        a softmax; Dropout may stand anywhere.
      name: its name, for messages.

    Raises:
      UserError: if it is another model.
    """
    if not model.built:
        raise _refused(name, "its unknown sizes: it was never called")
    # one_hot is no layer. A Sequential, which is a chain, has layers only.
    is_graph = hasattr(model, "operations")
    found, output = [], None
    for layer in model.operations if is_graph else model.layers:
        kind = type(layer).__name__
        is_next = output is None or layer.input is output
        if kind not in _LAYERS or not is_next:
            raise _refused(name, f"the layer {layer.name} ({kind})")
        output = layer.output if is_graph else None
        if kind in _WANTED:
            found.append((kind, layer))
            _check_layer(name, kind, layer)
    kinds = [kind for kind, _ in found]
    if not re.fullmatch("(Embedding )?(LSTM )+Dense", " ".join(kinds)):
        raise _refused(name, f"its layers ({', '.join(kinds)})")
    embedding_VE = found[0][1].get_weights()[0] if kinds[0] == "Embedding" else None
    layers = tuple(PlainLayer(*layer.get_weights()) for kind, layer in found if kind == "LSTM")
    return PlainLSTM(embedding_VE, layers, *found[-1][1].get_weights())


def _check_layer(name: str, kind: str, layer: Any) -> None:
    config, wanted = layer.get_config(), _WANTED[kind]
    for key, value in wanted.items():
        if config[key] != value:
            raise _refused(name, f"{key}={config[key]!r} of the layer {layer.name}")
    if kind == "Dense" and config["activation"] not in ("linear", "softmax"):
        raise _refused(name, f"activation={config['activation']!r} of the layer {layer.name}")


def _check_file(path: epath.Path, raw: bytes) -> None:
    """Raise UserError unless `raw` is a .keras file with known members and classes only."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = archive.infolist()
            if {member.filename for member in members} != _MEMBERS:
                raise damaged(path, f"not the files {', '.join(sorted(_MEMBERS))} in a zip")
            # Keras does not compress.
            if sum(member.file_size for member in members) > len(raw):
                raise damaged(path, "compressed")
            config = parse_json(archive.read("config.json")[: MAX_JSON_BYTES + 1], path)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise damaged(path, one_line(error)) from error
    if not isinstance(config, dict):
        raise damaged(path, "config.json is not an object")
    config.pop("compile_config", None)  # not read, because of compile=False
    for module, kind in _classes(config):
        is_known = kind in _MODELS | _LAYERS | _OTHERS and module in _MODULES
        if not is_known and module not in _HARMLESS_MODULES:
            raise _refused(str(path), f"{module}.{kind}")


def _classes(value: Any) -> list[tuple[Any, Any]]:
    """Return (module, class) of every object that a config names, at any depth."""
    # Not recursive, since an untrusted file may nest deeply.
    found, pending = [], [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if "class_name" in item or "module" in item:
                found.append((str(item.get("module")), str(item.get("class_name"))))
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return found


def _refused(name: str, what: str) -> UserError:
    return UserError(
        f"{name}: not a chain of an Embedding or one_hot, layers LSTM (tanh, sigmoid) and a Dense, "
        f"because of {what}; save such a model"
    )


def _import_keras() -> Any:
    # Keras would choose TensorFlow.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return import_extra("keras", "keras", "the format .keras")
