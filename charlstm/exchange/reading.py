"""Read an exported model; no file is executed.

A model is a folder that launch/export.py wrote, one of its files with weights, or such a file from
another program with a vocab.json beside it: a JSON list of the characters in the order of their
ids, which is that of their code points.
"""

import math
from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from charlstm.config import base_config
from charlstm.config_check import validate
from charlstm.data.vocab import Vocab
from charlstm.errors import DamagedError, UserError, one_line
from charlstm.exchange import keras, safetensors, torch
from charlstm.exchange.folder import Trained, unknown_run
from charlstm.exchange.plain import PlainLSTM, from_plain
from charlstm.exchange.weights import damaged, flatten, unflatten
from charlstm.files import EXPORTED_WEIGHTS, read_small
from charlstm.model import model_of_run
from charlstm.runs.folder import Run, parse_run

Read = Callable[[str], bytes]


def read_exported(path: epath.Path) -> Trained:
    """Return the run, the model, the parameters and the metrics of an exported model.

    Its path is one for which charlstm.files.is_exported is true.

    The weights of Keras and torch determine the model settings; the other settings come from
    config.json if there is one.

    Raises:
      UserError: if the files do not belong together, or another version wrote them.
      DamagedError: if a file is missing or damaged.
      RunError: if a file cannot be read.
    """
    weights = path
    if path.is_dir():
        weights = next(path / name for name in EXPORTED_WEIGHTS if (path / name).exists())
    folder = weights.parent
    read: Read = lambda name: read_small(folder / name)  # noqa: E731
    has_config = (folder / "config.json").exists()
    if weights.suffix == keras.SUFFIX:
        plain = keras.read(weights)
    else:
        tensors, texts = safetensors.read_tensors(weights)
        if "config.json" in texts:
            folder, has_config = weights, True
            read = safetensors.reader_of(weights, texts)
        if not torch.is_state_dict(tensors):
            run, about = parse_run(folder, read)
            model, params = safetensors.read_params(weights, tensors, run, about)
            return Trained(run._replace(workdir=path), model, params, _metrics(weights, about))
        plain = torch.from_state_dict(weights, tensors)
    settings, params = from_plain(plain)
    if has_config:
        run, about = parse_run(folder, read)
    else:
        run, about = _unknown_run(folder, read), {}
    _check_sizes(weights, plain, run.vocab)
    config = ConfigDict(run.config.to_dict())
    config.model.update(settings)
    validate(config)
    run = run._replace(workdir=path, config=config)
    model = model_of_run(config, run.vocab)
    return Trained(run, model, unflatten(weights, model, flatten(params)), _metrics(weights, about))


def _check_sizes(path: epath.Path, plain: PlainLSTM, vocab: Vocab) -> None:
    """Raise UserError if the layers differ in size, or the vocabulary has another size."""
    sizes = {len(layer.recurrent_kernel_HG) for layer in plain.layers}
    if len(sizes) > 1:
        raise UserError(
            f"{path}: has layers of {' and '.join(map(str, sorted(sizes)))} units; all must have "
            "the same number"
        )
    if (num_logits := plain.bias_V.size) != len(vocab):
        raise UserError(
            f"{path}: predicts {num_logits} characters, and its vocab.json has {len(vocab)}; "
            "bring the vocab.json of this model"
        )


def _unknown_run(folder: epath.Path, read: Read) -> Run:
    """Return a run of an unknown text, with the vocabulary of vocab.json and no prompts."""
    path = folder / "vocab.json"
    try:
        vocab = Vocab.from_json(read("vocab.json").decode())
        "".join(vocab.characters).encode()  # lone surrogates are in no UTF-8 text
    except DamagedError as error:
        raise DamagedError(
            f"{path}: missing or damaged; the weights need it: a JSON list of the characters in "
            "the order of their ids"
        ) from error
    except (RecursionError, TypeError, ValueError) as error:
        raise DamagedError(
            f"{path}: not a vocabulary ({one_line(error)}); write a JSON list of the characters in "
            "the order of their ids"
        ) from error
    return unknown_run(folder, base_config(), vocab)


def _metrics(path: epath.Path, about: dict[str, Any]) -> dict[str, Any]:
    metrics = about.get("metrics", {})
    try:
        has_times = not metrics or {"step", "epoch", "seconds"} <= metrics.keys()
        texts = {name: metrics.pop(name) for name in ("prompt", "sample") if name in metrics}
        numbers = {name: value for name, value in metrics.items() if math.isfinite(value)}
    except (AttributeError, OverflowError, TypeError) as error:
        raise damaged(path, f"its metrics: {one_line(error)}") from error
    if not has_times or not all(isinstance(text, str) for text in texts.values()):
        raise damaged(path, "its metrics are not those of a run")
    return numbers | texts
