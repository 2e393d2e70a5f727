"""The folder of an exported model: the text files of its run, a model card, and its weights.

config.json        settings, text, versions, metrics and checksums
vocab.json         the characters in the order of their ids
prompts.json       windows of the training text, for samples without a prompt
README.md          the model card
model.safetensors  the weights, or model.keras
"""

from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from charlstm.checks import check_params
from charlstm.config_check import validate
from charlstm.data.vocab import Vocab
from charlstm.errors import UserError, printable
from charlstm.exchange.card import model_card
from charlstm.exchange.weights import flatten, shapes_of
from charlstm.files import write_file
from charlstm.model import CharLSTM, model_from_config
from charlstm.runs.checksums import checksums
from charlstm.runs.folder import PRNG_IMPLS, Run, TextInfo, texts_of

# In config.json, as on the hub of Hugging Face; a run has no such entry.
MODEL_TYPE = "charlstm"


class Trained(NamedTuple):
    """What is exported: a trained model with its run and metrics."""

    run: Run
    model: CharLSTM
    params: Any  # float32, or float16 for safetensors
    metrics: dict[str, Any]  # the record of metrics.jsonl of the checkpoint, {} if unknown


def as_trained(config: ConfigDict, vocab: Vocab, params: Any) -> Trained:
    """Return weights of a training loop of your own, for the export functions of this package.

    Args:
      config: of whose settings the model's matter most, as for model_from_config.
      vocab: the characters.
      params: the parameters of model_from_config(config, vocab).

    Raises:
      UserError: if a setting is invalid.
      ValueError: if `params` are not those of the model.
    """
    validate(config)
    run, model = unknown_run(epath.Path("model"), config, vocab), model_from_config(config, vocab)
    check_params(params, shapes_of(model))
    return Trained(run, model, params, {})


def unknown_run(folder: epath.Path, config: ConfigDict, vocab: Vocab) -> Run:
    """Return a run in `folder` whose text is unknown."""
    text = TextInfo("", "", 0, 0, 0, 0, 0, len(vocab))
    machine: dict[str, Any] = {"versions": {}, "devices": []}
    return Run(folder, config, vocab, text, [], machine, PRNG_IMPLS[0])


def describe(trained: Trained, out: epath.Path, files: str, loading: str) -> dict[str, str]:
    """Return the content of the text files by name, config.json first.

    Args:
      trained: what is exported.
      out: what is written; its name without suffix is the title of the model card.
      files: Markdown for the card that lists the file of the weights.
      loading: Markdown for the card that says how to load them, with OUT for the name of `out`.
    """
    loading = loading.replace("OUT", printable(out.name))
    weights = flatten(trained.params)
    # Of what a reader has, which converts float16.
    crc32 = checksums({name: np.float32(array) for name, array in weights.items()})
    texts = texts_of(
        trained.run, model_type=MODEL_TYPE, metrics=trained.metrics, params_crc32=crc32
    )
    num_params = sum(array.size for array in weights.values())
    card = model_card(trained.run, trained.metrics, num_params, out.stem, files, loading)
    return {"config.json": texts.pop("config.json")} | texts | {"README.md": card}


def write_folder(texts: dict[str, str], weights: dict[str, bytes], out: epath.Path) -> None:
    """Write the files of an exported model.

    config.json comes first: an export that was interrupted can then be repeated. Until the weights
    are there, the checksums in it do not match.

    Raises:
      UserError: if the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (texts | weights).items():
            write_file(out / name, content)
    except OSError as error:
        raise UserError(
            f"{out}: cannot write there ({error.strerror or error}); choose another --out"
        ) from None
