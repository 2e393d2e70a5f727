"""A page that writes: one HTML file with the weights and a model in JavaScript."""

import base64
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from etils import epath

from charlstm.data.vocab import END, UNKNOWN
from charlstm.errors import UserError
from charlstm.exchange.folder import Trained
from charlstm.lstm.reference import GATES, concat_gates
from charlstm.model import CharLSTM, model_from_config
from charlstm.pages.embed import write_page
from charlstm.runs.folder import Run

TEMPLATE = "write.html"
# The types of the kernels: the largest integer of those with a scale per row. The error of int16
# relative to the largest weight of a row is a tenth of that of float16, which has the same size.
TYPES = {"float32": None, "int16": 2**15 - 1, "int8": 2**7 - 1}


def export(trained: Trained, out: epath.Path, weights: str = "int16") -> None:
    """Write a page with the model of `trained` to the file `out`; an earlier page is replaced.

    Args:
      trained: what is exported, any model.
      out: the file to write.
      weights: the type of the kernels, one of TYPES.

    Raises:
      UserError: if `out` cannot be written or is not a page, or a weight is not finite.
    """
    model = pack_model(trained.model, jax.device_get(trained.params), weights)
    write_page(TEMPLATE, describe(trained.run) | {"engine": "local", "model": model}, out)


def describe(run: Run) -> dict[str, Any]:
    """Return what the page needs of a run besides the model."""
    data, cleaning = run.config.data, run.cleaning
    has_documents = model_from_config(run.config, run.vocab).end_id is not None
    return {
        "name": run.workdir.name,
        "text": PurePath(run.text.source).name,
        "characters": run.vocab.characters,
        "end": END if has_documents else None,
        "unknown": UNKNOWN if UNKNOWN in run.vocab else None,
        "cleaning": {
            "lowercase": data.lowercase,
            "strip_punctuation": data.strip_punctuation,
            "separator": cleaning.separator,
        },
        "temperature": run.config.sample.temperature,
        "length": run.config.sample.length,
    }


def pack_model(model: CharLSTM, params: Any, weights: str) -> dict[str, Any]:
    """Return the parameters as the engine of the page reads them.

    A kernel has a row for each output; those of a one-hot input have H columns, and a row for each
    character and gate.

    Raises:
      UserError: if a weight is not finite.
    """
    packed: dict[str, Any] = {
        "one_hot": model.input == "one_hot",
        "norm_epsilon": model.norm_epsilon,
        "end_id": model.end_id,
        "layers": [_pack_layer(model, params, index, weights) for index in range(model.num_layers)],
        "dense": _pack(params["dense"]["kernel"].T, weights),
        "dense_bias": _pack(params["dense"]["bias"][None], "float32"),
    }
    if model.input == "embed":
        packed["embedding"] = _pack(params["embed"]["embedding"], weights)
    if model.tie_embeddings:
        packed["tied_bias"] = _pack(params["bias"][None], "float32")
    return packed


def _pack_layer(model: CharLSTM, params: Any, index: int, weights: str) -> dict[str, Any]:
    layer = params[f"lstm_{index}"]
    has_row_per_id = model.input == "one_hot" and index == 0
    inputs = {"input": concat_gates(layer, "i")}
    inputs |= {"scale": layer["scale"]["kernel"]} if model.multiplicative else {}
    packed = {
        name: _pack(kernel.reshape(-1, model.hidden_size) if has_row_per_id else kernel.T, weights)
        for name, kernel in inputs.items()
    }
    packed["recurrent"] = _pack(concat_gates(layer, "h").T, weights)
    bias_G = np.concatenate([layer[f"h{gate}"]["bias"] for gate in GATES])
    packed["bias"] = _pack(bias_G[None], "float32")
    if model.recurrent_rms_norm:
        packed["gain"] = _pack(layer["norm"]["gain"][None], "float32")
    return packed


def _pack(matrix_RC: Any, weights: str) -> dict[str, Any]:
    """Return a matrix of R rows and C columns as base64, little-endian."""
    matrix_RC = np.asarray(matrix_RC, np.float32)
    if not np.isfinite(matrix_RC).all():
        raise UserError("a weight of the model is not finite; give another --checkpoint")
    rows, columns = matrix_RC.shape
    packed: dict[str, Any] = {"type": weights, "rows": rows, "columns": columns}
    if largest := TYPES[weights]:
        scale_R1 = np.abs(matrix_RC).max(axis=1, keepdims=True) / np.float32(largest)
        packed["scales"] = _pack(scale_R1, "float32")
        matrix_RC = np.rint(matrix_RC / np.where(scale_R1 > 0, scale_R1, 1))
    values = matrix_RC.astype(np.dtype(weights).newbyteorder("<")).tobytes()
    return packed | {"values": base64.b64encode(values).decode("ascii")}
